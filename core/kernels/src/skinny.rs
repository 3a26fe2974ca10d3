//! Products of f32 matrices with one small dimension: the two factors of an adapter, and decoding, where a batch has as
//! many rows as answers are under way. A general product spends its time on packing such operands; these read each number
//! of the large operand once, where it lies.
//!
//! Every sum has one order, whatever the width of the vectors and the number of threads: over [`LANES`] lanes where the
//! summed dimension lies along the vectors, and by one chain of fused multiply-adds where it does not.

use pulp::{Simd, WithSimd};

use crate::arithmetic::LANES;
use crate::low_precision::EncodedMatrix;
use crate::matrix::RawMatrix;
use crate::parallel::{Shared, tasks};
use crate::simd::{dispatch, prefetch};

/// A dimension up to this size is small.
pub(crate) const SMALL: usize = 16;
/// Dimensions from this size on are large; between the two, a general product does well.
pub(crate) const LARGE: usize = 64;
/// Rows of either operand whose products are summed at a time. The small operand is read again for each block of the
/// large one, the large one only once.
const BLOCK: usize = 4;
/// Large rows that one task takes.
const SHARE: usize = 64;
/// Runs of large rows that are read beside each other for a single small row. Processors foresee a few long runs, but not
/// short ones in turn; and a single one would wait for its sums.
const STREAMS: usize = 2;
/// Vectors of a row of `C` that stay in registers while it is combined.
const VECTORS: usize = 4;
/// Rows and vectors of a block of gathered rows.
const GATHERED: [usize; 2] = [8, 2];

/// Computes `C (+)= alpha A B` if one dimension is small and the others are large; says whether it did.
///
/// # Safety
/// The matrices lie in valid memory, and nothing else accesses `C` meanwhile.
pub(crate) unsafe fn multiply(
    c: RawMatrix<*mut f32>,
    accumulate: bool,
    alpha: f32,
    a: RawMatrix<*const f32>,
    b: RawMatrix<*const f32>,
) -> bool {
    let (m, n, k) = (c.rows, c.columns, a.columns);
    let small = |size: usize, others: [usize; 2]| size <= SMALL && others.iter().all(|&other| other >= LARGE);
    // SAFETY: the caller's, in every branch.
    unsafe {
        let result = |c: RawMatrix<*mut f32>| Target {
            data: Shared::new(c.data),
            columns: c.columns,
            strides: [c.row_stride, c.column_stride],
            accumulate,
            alpha,
        };
        if small(m, [n, k]) && a.column_stride == 1 && b.row_stride == 1 {
            dots(result(c.t()), LeftRows::of(b.t()), LeftRows::of(a));
        } else if small(n, [m, k]) && a.column_stride == 1 {
            let columns = Copied::of(b.t());
            dots(result(c), LeftRows::of(a), columns.rows());
        } else if small(k, [m, n]) && c.column_stride == 1 && a.column_stride == 1 {
            let rows = Copied::of(b);
            combine(result(c), LeftRows::of(a), rows.rows());
        } else if small(m, [n, k]) && a.row_stride == 1 && b.column_stride == 1 {
            gather(result(c), LeftRows::of(a.t()), LeftRows::of(b));
        } else if small(n, [m, k]) && a.row_stride == 1 && b.column_stride == 1 {
            gather(result(c.t()), LeftRows::of(b), LeftRows::of(a.t()));
        } else {
            return false;
        }
    }
    true
}

/// The matrix `C`, and what happens to it.
#[derive(Clone, Copy)]
struct Target {
    data: Shared<f32>,
    columns: usize,
    strides: [usize; 2],
    accumulate: bool,
    alpha: f32,
}

impl Target {
    /// Writes a sum, or adds it to what is there.
    ///
    /// # Safety
    /// The element exists, and nobody else accesses it.
    unsafe fn put(&self, row: usize, column: usize, sum: f32) {
        let at = self.data.at(row * self.strides[0] + column * self.strides[1]);
        // SAFETY: the caller's.
        unsafe { *at = if self.accumulate { self.alpha.mul_add(sum, *at) } else { self.alpha * sum } };
    }
}

/// An operand whose rows are contiguous.
#[derive(Clone, Copy)]
struct LeftRows {
    data: Shared<f32>,
    count: usize,
    width: usize,
    stride: usize,
}

impl LeftRows {
    fn of(matrix: RawMatrix<*const f32>) -> Self {
        debug_assert_eq!(matrix.column_stride, 1);
        let (count, width, stride) = (matrix.rows, matrix.columns, matrix.row_stride);
        Self { data: Shared::new(matrix.data.cast_mut()), count, width, stride }
    }

    /// `width` numbers of a row.
    ///
    /// # Safety
    /// They exist, and nobody writes them meanwhile.
    unsafe fn part(&self, row: usize, first: usize, width: usize) -> &[f32] {
        // SAFETY: the caller's.
        unsafe { std::slice::from_raw_parts(self.data.at(row * self.stride + first), width) }
    }
}

/// A small operand, copied so that its rows are contiguous.
struct Copied {
    values: Vec<f32>,
    width: usize,
}

impl Copied {
    /// # Safety
    /// The matrix lies in valid memory.
    unsafe fn of(matrix: RawMatrix<*const f32>) -> Self {
        let at = |at: usize| {
            let (row, column) = (at / matrix.columns, at % matrix.columns);
            // SAFETY: the caller's.
            unsafe { *matrix.data.add(row * matrix.row_stride + column * matrix.column_stride) }
        };
        Self { values: (0..matrix.rows * matrix.columns).map(at).collect(), width: matrix.columns }
    }

    fn rows(&self) -> LeftRows {
        let (count, stride) = (self.values.len() / self.width.max(1), self.width);
        LeftRows { data: Shared::new(self.values.as_ptr().cast_mut()), count, width: self.width, stride }
    }
}

/// `C (+)= alpha A Bᵀ` for a large `A` and a small `B`: a sum of products for each pair of rows.
///
/// # Safety
/// As [`multiply`].
unsafe fn dots(c: Target, a: LeftRows, b: LeftRows) {
    tasks(a.count.div_ceil(SHARE), a.count * b.count * a.width / 8, |task| {
        let share = task * SHARE..a.count.min((task + 1) * SHARE);
        if b.count == 1 {
            // SAFETY: whole rows; every task writes its own rows of `C`.
            return unsafe {
                products_with_one(c, share, |rows| {
                    let a = rows.map(|row| a.part(row, 0, a.width));
                    dispatch(Dots { a, b: [b.part(0, 0, b.width)], next: [] }).map(|[sum]| sum)
                });
            };
        }
        for row in share.step_by(BLOCK) {
            // SAFETY: whole rows; every task writes its own rows of `C`.
            unsafe {
                // Of the rows that come next: when this block is done, all of them are on their way.
                let next = |at: usize| a.data.at((row + BLOCK + at % BLOCK) * a.stride).cast_const();
                block_dots(c, row..a.count.min(row + BLOCK), block(&a, row), b, next);
            }
        }
    });
}

/// `C = A Bᵀ` for a large `A` in low precision and a small `B`, row-major. The sums are those of [`multiply`] with the
/// decoded numbers, to the last bit.
pub(crate) fn encoded_dots(c: &mut [f32], a: EncodedMatrix, xs: &[f32]) {
    let [count, width] = a.size();
    let rows = xs.len() / width;
    debug_assert_eq!((xs.len(), c.len()), (rows * width, rows * count));
    let target =
        Target { data: Shared::new(c.as_mut_ptr()), columns: rows, strides: [1, count], accumulate: false, alpha: 1. };
    let b = LeftRows { data: Shared::new(xs.as_ptr().cast_mut()), count: rows, width, stride: width };
    tasks(count.div_ceil(SHARE), count * width, |task| {
        let share = task * SHARE..count.min((task + 1) * SHARE);
        if rows == 1 && a.has_dots() {
            // SAFETY: every task writes its own rows of `C`, which has as many as `A`.
            return unsafe { products_with_one(target, share, |rows| a.dots(rows, xs).map(total)) };
        }
        let mut decoded = vec![0.; BLOCK * width];
        for row in share.step_by(BLOCK) {
            let rows = row..count.min(row + BLOCK);
            for (row, out) in rows.clone().zip(decoded.chunks_exact_mut(width)) {
                a.decode_row(row, out);
            }
            let part = std::array::from_fn(|at| &decoded[at * width..][..width]);
            // SAFETY: as above.
            unsafe { block_dots(target, rows, part, b, |_| decoded.as_ptr()) };
        }
    });
}

/// The products of some large rows with the only small one, given those of one row of each stream.
///
/// # Safety
/// The rows exist, and nobody else accesses these rows of `C`.
unsafe fn products_with_one(
    c: Target,
    rows: std::ops::Range<usize>,
    products: impl Fn([usize; STREAMS]) -> [f32; STREAMS],
) {
    let each = rows.len().div_ceil(STREAMS);
    for row in rows.start..rows.start + each {
        // Of the last stream, some rows may be missing: another one is read again.
        let beside = std::array::from_fn(|stream| (row + stream * each).min(rows.end - 1));
        for (stream, sum) in products(beside).into_iter().enumerate() {
            if row + stream * each < rows.end {
                // SAFETY: the caller's.
                unsafe { c.put(row + stream * each, 0, sum) };
            }
        }
    }
}

/// The sum of all lanes: of both halves until one is left.
#[inline(always)]
fn total(mut lanes: [f32; LANES]) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for lane in 0..half {
            lanes[lane] += lanes[lane + half];
        }
        half /= 2;
    }
    lanes[0]
}

/// The products of some rows of a large operand with all rows of a small one. `next(i)` is where memory is asked for
/// along with the `i`-th block of small rows; it need not exist.
///
/// # Safety
/// As [`multiply`]; nobody else writes these rows of `C`.
unsafe fn block_dots(
    c: Target,
    rows: std::ops::Range<usize>,
    a: [&[f32]; BLOCK],
    b: LeftRows,
    next: impl Fn(usize) -> *const f32,
) {
    let mut column = 0;
    while column < b.count {
        // SAFETY: the caller's.
        unsafe {
            let next = next(column / BLOCK);
            column += match b.count - column {
                1 => put_dots(c, rows.clone(), Dots { a, b: block::<1>(&b, column), next: [next] }, column),
                2 => put_dots(c, rows.clone(), Dots { a, b: block::<2>(&b, column), next: [next] }, column),
                _ => put_dots(c, rows.clone(), Dots { a, b: block::<BLOCK>(&b, column), next: [next] }, column),
            };
        }
    }
}

/// Puts the sums of one block of pairs into `C`; how many columns it had.
///
/// # Safety
/// As [`block_dots`].
unsafe fn put_dots<const N: usize>(
    c: Target,
    rows: std::ops::Range<usize>,
    dots: Dots<BLOCK, N, 1>,
    column: usize,
) -> usize {
    let sums = dispatch(dots);
    for (sums, row) in sums.iter().zip(rows) {
        for (j, &sum) in sums.iter().enumerate().take(c.columns - column) {
            // SAFETY: the caller's.
            unsafe { c.put(row, column + j, sum) };
        }
    }
    N
}

/// `N` rows from `first` on; beyond the last row it is taken again.
///
/// # Safety
/// As [`LeftRows::part`].
unsafe fn block<const N: usize>(rows: &LeftRows, first: usize) -> [&[f32]; N] {
    // SAFETY: the caller's.
    std::array::from_fn(|at| unsafe { rows.part((first + at).min(rows.count - 1), 0, rows.width) })
}

/// The sums of products of all pairs of rows.
struct Dots<'a, const M: usize, const N: usize, const P: usize> {
    a: [&'a [f32]; M],
    b: [&'a [f32]; N],
    /// What will be read soon and would not be foreseen: it comes from memory while these are computed with. It need not
    /// exist.
    next: [*const f32; P],
}

impl<const M: usize, const N: usize, const P: usize> WithSimd for Dots<'_, M, N, P> {
    type Output = [[f32; N]; M];

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> Self::Output {
        let width = self.a[0].len();
        let whole = width - width % LANES;
        let mut lanes = [[[0.; LANES]; N]; M];
        // As many lanes at once as a vector has; all blocks of rows fit into the registers.
        for part in (0..LANES).step_by(S::F32_LANES) {
            let mut sums = [[simd.splat_f32s(0.); N]; M];
            for at in (part..whole).step_by(LANES) {
                for next in self.next {
                    prefetch(next.wrapping_add(at));
                }
                let mut b = [simd.splat_f32s(0.); N];
                for (vector, row) in b.iter_mut().zip(self.b) {
                    *vector = S::as_simd_f32s(&row[at..at + S::F32_LANES]).0[0];
                }
                for (sums, row) in sums.iter_mut().zip(self.a) {
                    let a = S::as_simd_f32s(&row[at..at + S::F32_LANES]).0[0];
                    for (sum, b) in sums.iter_mut().zip(b) {
                        *sum = simd.mul_add_f32s(a, b, *sum);
                    }
                }
            }
            for i in 0..M {
                for j in 0..N {
                    S::as_mut_simd_f32s(&mut lanes[i][j][part..part + S::F32_LANES]).0[0] = sums[i][j];
                }
            }
        }
        let mut result = [[0.; N]; M];
        for i in 0..M {
            for j in 0..N {
                let lanes = &mut lanes[i][j];
                for (lane, at) in (whole..width).enumerate() {
                    lanes[lane] = self.a[i][at].mul_add(self.b[j][at], lanes[lane]);
                }
                result[i][j] = total(*lanes);
            }
        }
        result
    }
}

/// `C (+)= alpha A B` for a small inner dimension: each row of `C` is a combination of the rows of `B`.
///
/// # Safety
/// As [`multiply`]; the rows of `C` are contiguous.
unsafe fn combine(c: Target, a: LeftRows, b: LeftRows) {
    tasks(a.count.div_ceil(SHARE), a.count * b.width, |task| {
        for row in task * SHARE..a.count.min((task + 1) * SHARE) {
            // SAFETY: every task writes its own rows of `C`; the others are only read.
            unsafe {
                let out = std::slice::from_raw_parts_mut(c.data.at(row * c.strides[0]), b.width);
                if !c.accumulate {
                    out.fill(0.);
                }
                dispatch(Combine { out, factors: a.part(row, 0, a.width), alpha: c.alpha, b });
            }
        }
    });
}

/// Adds to one row of `C`.
struct Combine<'a> {
    out: &'a mut [f32],
    factors: &'a [f32],
    alpha: f32,
    b: LeftRows,
}

impl WithSimd for Combine<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { out, factors, alpha, b } = self;
        // SAFETY: as many rows as factors, of the width of `out`.
        let row = |at: usize| unsafe { b.part(at, 0, b.width) };
        let (vectors, rest) = S::as_mut_simd_f32s(out);
        let done = b.width - rest.len();
        let (blocks, single) = vectors.as_chunks_mut::<VECTORS>();
        let first = blocks.len() * VECTORS;
        for (index, block) in blocks.iter_mut().enumerate() {
            let mut sums = *block;
            for (at, factor) in factors.iter().enumerate() {
                let factor = simd.splat_f32s(factor * alpha);
                let b = &S::as_simd_f32s(row(at)).0[index * VECTORS..][..VECTORS];
                for vector in 0..VECTORS {
                    sums[vector] = simd.mul_add_f32s(factor, b[vector], sums[vector]);
                }
            }
            *block = sums;
        }
        for (at, factor) in factors.iter().enumerate() {
            let b = row(at);
            let wide = simd.splat_f32s(factor * alpha);
            for (sum, &b) in single.iter_mut().zip(&S::as_simd_f32s(b).0[first..]) {
                *sum = simd.mul_add_f32s(wide, b, *sum);
            }
            for (sum, b) in rest.iter_mut().zip(&b[done..]) {
                *sum = (factor * alpha).mul_add(*b, *sum);
            }
        }
    }
}

/// `C (+)= alpha Aᵀ B` for `A: [k, small]` and `B: [k, n]`: rows of `B` gathered with the factors of each column of `A`.
///
/// # Safety
/// As [`multiply`].
unsafe fn gather(c: Target, a: LeftRows, b: LeftRows) {
    const WIDTH: usize = 32;
    tasks(b.width.div_ceil(WIDTH), a.width * b.width * a.count / 8, |task| {
        let (first, width) = (task * WIDTH, WIDTH.min(b.width - task * WIDTH));
        for row in (0..a.width).step_by(GATHERED[0]) {
            let height = GATHERED[0].min(a.width - row);
            let mut sums = [[0.; WIDTH]; GATHERED[0]];
            dispatch(Gather { a, b, rows: row..row + height, columns: first..first + width, sums: &mut sums });
            for (i, sums) in sums.iter().enumerate().take(height) {
                for (j, &sum) in sums.iter().enumerate().take(width) {
                    // SAFETY: every task writes its own columns of `C`.
                    unsafe { c.put(row + i, first + j, sum) };
                }
            }
        }
    });
}

/// The sums of some rows and columns of `C`.
struct Gather<'a, const W: usize> {
    a: LeftRows,
    b: LeftRows,
    rows: std::ops::Range<usize>,
    columns: std::ops::Range<usize>,
    sums: &'a mut [[f32; W]; GATHERED[0]],
}

impl<const W: usize> WithSimd for Gather<'_, W> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { a, b, rows, columns, sums: out } = self;
        let (height, width) = (rows.len(), columns.len());
        let lanes = S::F32_LANES;
        let whole = if height == GATHERED[0] { width / (GATHERED[1] * lanes) * GATHERED[1] * lanes } else { 0 };
        for first in (0..whole).step_by(GATHERED[1] * lanes) {
            let mut sums = [[simd.splat_f32s(0.); GATHERED[1]]; GATHERED[0]];
            for at in 0..a.count {
                // SAFETY: parts of rows of either operand.
                let (factors, values) = unsafe {
                    let values = b.part(at, columns.start + first, GATHERED[1] * lanes);
                    (a.part(at, rows.start, GATHERED[0]), S::as_simd_f32s(values).0)
                };
                for i in 0..GATHERED[0] {
                    let factor = simd.splat_f32s(factors[i]);
                    for j in 0..GATHERED[1] {
                        sums[i][j] = simd.mul_add_f32s(factor, values[j], sums[i][j]);
                    }
                }
            }
            for (out, sums) in out.iter_mut().zip(sums) {
                S::as_mut_simd_f32s(&mut out[first..][..GATHERED[1] * lanes]).0.copy_from_slice(&sums);
            }
        }
        for at in 0..a.count {
            // SAFETY: parts of rows of either operand.
            let (factors, values) =
                unsafe { (a.part(at, rows.start, height), b.part(at, columns.start + whole, width - whole)) };
            for (out, factor) in out.iter_mut().zip(factors) {
                for (out, value) in out[whole..].iter_mut().zip(values) {
                    *out = factor.mul_add(*value, *out);
                }
            }
        }
    }
}
