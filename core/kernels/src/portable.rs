//! Matrix products with the same bits on every processor.
//!
//! The order of summation is fixed. The inner dimension is cut into blocks of [`DEPTH`]; the products of a block are summed
//! by one chain of fused multiply-adds, from the first to the last; and `alpha` times each block's sum is added to `C`, from
//! the first block to the last. Vectors run along the columns of `C`, so that each lane is an element with a chain of its
//! own: how wide they are, how large the tiles are and which thread computes a tile changes no bit.

use std::cell::Cell;

use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use crate::matrix::RawMatrix;
use crate::parallel::Shared;
use crate::real::Lanes;
use crate::simd::dispatch;

/// Length of a chain of multiply-adds. Part of the arithmetic: another value gives other bits.
const DEPTH: usize = 256;
/// Vectors of a row of a tile.
const VECTORS: usize = 2;
/// The most columns of a tile: two vectors of 512 bits.
const WIDEST: usize = VECTORS * 16;
/// The most columns of `B` that one task packs and then reads for all its rows: with [`DEPTH`], a quarter of a megabyte.
const COLUMNS: usize = 256;
/// The fewest rows of `C` that are worth a task.
const ROWS: usize = 96;
/// Tasks for each thread, so that none waits long for the last.
const TASKS: usize = 4;
/// Multiply-adds that are worth a second thread.
const WORTH: usize = 1 << 17;

/// `C (+)= alpha A B`.
///
/// # Safety
/// The matrices lie in valid memory, and nothing else accesses `C` meanwhile.
pub(crate) unsafe fn multiply<T: Lanes>(
    c: RawMatrix<*mut T>,
    accumulate: bool,
    alpha: T,
    a: RawMatrix<*const T>,
    b: RawMatrix<*const T>,
    threads: usize,
) {
    // Vectors run along contiguous elements of `C`. Each element is the same sum either way.
    if c.column_stride != 1 && c.row_stride == 1 {
        // SAFETY: the caller's; `Cᵀ = Bᵀ Aᵀ`.
        return unsafe { multiply(c.t(), accumulate, alpha, b.t(), a.t(), threads) };
    }
    let (m, n, k) = (c.rows, c.columns, a.columns);
    let product = Product {
        c: RawMatrix {
            data: Shared::new(c.data),
            rows: m,
            columns: n,
            row_stride: c.row_stride,
            column_stride: c.column_stride,
        },
        a: shared(a),
        b: shared(b),
        accumulate,
        alpha,
    };
    // Every task packs its columns for itself. So the columns are divided among the tasks, and the rows only if there are
    // too few columns.
    let parallel = threads > 1 && m * n * k >= WORTH;
    let tasks = if parallel { TASKS * threads } else { 1 };
    let width = n.div_ceil(tasks).max(1).next_multiple_of(WIDEST).min(COLUMNS);
    let wide = n.div_ceil(width);
    let tall = tasks.div_ceil(wide.max(1)).min(m.div_ceil(ROWS));
    let height = m.div_ceil(tall.max(1)).max(1);
    let tall = m.div_ceil(height);
    let task = |task: usize| {
        let (row, column) = (task / wide * height, task % wide * width);
        let (rows, columns) = (row..m.min(row + height), column..n.min(column + width));
        dispatch(RowShare { product: &product, rows, columns });
    };
    if parallel {
        (0..tall * wide).into_par_iter().for_each(task);
    } else {
        (0..tall * wide).for_each(task);
    }
}

fn shared<T>(matrix: RawMatrix<*const T>) -> RawMatrix<Shared<T>> {
    let RawMatrix { rows, columns, row_stride, column_stride, data } = matrix;
    RawMatrix { rows, columns, row_stride, column_stride, data: Shared::new(data.cast_mut()) }
}

struct Product<T> {
    c: RawMatrix<Shared<T>>,
    a: RawMatrix<Shared<T>>,
    b: RawMatrix<Shared<T>>,
    accumulate: bool,
    alpha: T,
}

/// Some rows and columns of a product.
struct RowShare<'a, T> {
    product: &'a Product<T>,
    rows: std::ops::Range<usize>,
    columns: std::ops::Range<usize>,
}

impl<T: Lanes> WithSimd for RowShare<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { product, rows, columns } = self;
        let (k, width) = (product.a.columns, T::lanes::<S>() * VECTORS);
        let many = size_of::<S::f32s>() >= 64;
        let padded = columns.len().next_multiple_of(width);
        let mut space = PackedColumns::<T>::take(padded * DEPTH.min(k));
        let mut first = 0;
        // An inner dimension of zero is a sum of nothing.
        loop {
            let depth = DEPTH.min(k - first);
            let accumulate = product.accumulate || first > 0;
            // SAFETY: the ranges lie within the matrices, and nobody else writes this part of `C`.
            unsafe {
                pack(&product.b, first..first + depth, &columns, T::lanes::<S>(), space.start());
                for row in Tile::<T>::split(rows.clone(), many) {
                    for (index, column) in columns.clone().step_by(width).enumerate() {
                        let tile = Tile {
                            a: product.a.data.at(row.start * product.a.row_stride + first * product.a.column_stride),
                            a_strides: [product.a.row_stride, product.a.column_stride],
                            b: space.start().add(index * width * depth),
                            depth,
                            c: product.c.data.at(row.start * product.c.row_stride + column * product.c.column_stride),
                            c_strides: [product.c.row_stride, product.c.column_stride],
                            columns: width.min(columns.end - column),
                            accumulate,
                            alpha: product.alpha,
                        };
                        let narrow = tile.columns <= T::lanes::<S>();
                        match (row.len(), narrow) {
                            (12, false) if many => tile.compute::<S, 12, VECTORS>(simd),
                            (12, true) if many => tile.compute::<S, 12, 1>(simd),
                            (6, false) if !many => tile.compute::<S, 6, VECTORS>(simd),
                            (6, true) if !many => tile.compute::<S, 6, 1>(simd),
                            (4, false) => tile.compute::<S, 4, VECTORS>(simd),
                            (4, true) => tile.compute::<S, 4, 1>(simd),
                            (_, false) => tile.compute::<S, 1, VECTORS>(simd),
                            (_, true) => tile.compute::<S, 1, 1>(simd),
                        }
                    }
                }
            }
            first += depth;
            if first >= k {
                break;
            }
        }
        space.put_back();
    }
}

/// Copies rows `depths` of the columns of `B` to `to`: panels of as many columns as two vectors of `lanes` have, or one if
/// no more are left; in each the numbers of one depth beside each other, zero beyond the last column.
///
/// # Safety
/// The ranges lie within `B`, and `to` has room for them.
#[inline(always)]
unsafe fn pack<T: Lanes>(
    b: &RawMatrix<Shared<T>>,
    depths: std::ops::Range<usize>,
    columns: &std::ops::Range<usize>,
    lanes: usize,
    to: *mut T,
) {
    let mut panel = to;
    for column in columns.clone().step_by(lanes * VECTORS) {
        let count = (lanes * VECTORS).min(columns.end - column);
        let width = if count <= lanes { lanes } else { lanes * VECTORS };
        // SAFETY: the caller's.
        unsafe {
            let from = b.data.at(depths.start * b.row_stride + column * b.column_stride);
            if b.column_stride == 1 {
                for depth in 0..depths.len() {
                    let (from, to) = (from.add(depth * b.row_stride), panel.add(depth * width));
                    std::ptr::copy_nonoverlapping(from, to, count);
                    std::slice::from_raw_parts_mut(to.add(count), width - count).fill(T::zero());
                }
            } else {
                transpose(from, [b.row_stride, b.column_stride], [depths.len(), count], panel, width);
            }
            panel = panel.add(width * depths.len());
        }
    }
}

/// Copies a matrix `[depth, count]` with these strides to rows of `width`, zero beyond `count`. Four by four, which stays in
/// registers: the depths of a column are contiguous as a rule.
///
/// # Safety
/// The matrix lies at `from`, and `to` has room for it.
#[inline(always)]
unsafe fn transpose<T: Lanes>(
    from: *const T,
    strides: [usize; 2],
    [depth, count]: [usize; 2],
    to: *mut T,
    width: usize,
) {
    const SIDE: usize = 4;
    // SAFETY: the caller's.
    unsafe {
        let one = |at: usize, column: usize| {
            let value = if column < count { *from.add(at * strides[0] + column * strides[1]) } else { T::zero() };
            *to.add(at * width + column) = value;
        };
        let (deep, wide) = if strides[0] == 1 { (depth - depth % SIDE, count - count % SIDE) } else { (0, 0) };
        for column in (0..wide).step_by(SIDE) {
            for at in (0..deep).step_by(SIDE) {
                let read =
                    |lane: usize| from.add(at + (column + lane) * strides[1]).cast::<[T; SIDE]>().read_unaligned();
                let block = [read(0), read(1), read(2), read(3)];
                for (row, to) in (0..SIDE).map(|row| (row, to.add((at + row) * width + column))) {
                    let turned = [block[0][row], block[1][row], block[2][row], block[3][row]];
                    to.cast::<[T; SIDE]>().write_unaligned(turned);
                }
            }
        }
        for at in 0..deep {
            (wide..width).for_each(|column| one(at, column));
        }
        for at in deep..depth {
            (0..width).for_each(|column| one(at, column));
        }
    }
}

/// A few rows of `C` and as many columns as some vectors have.
#[derive(Clone, Copy)]
struct Tile<T> {
    a: *const T,
    a_strides: [usize; 2],
    /// Packed: see [`pack`].
    b: *const T,
    depth: usize,
    c: *mut T,
    c_strides: [usize; 2],
    /// How many of the columns there are.
    columns: usize,
    accumulate: bool,
    alpha: T,
}

impl<T: Lanes> Tile<T> {
    /// Cuts rows into runs for which there is a kernel. With 32 registers a tile has twelve rows, with 16 it has six.
    #[inline(always)]
    fn split(rows: std::ops::Range<usize>, many: bool) -> impl Iterator<Item = std::ops::Range<usize>> {
        let mut next = rows.start;
        std::iter::from_fn(move || {
            let left = rows.end - next;
            let size = [if many { 12 } else { 6 }, 4, 1].into_iter().find(|&size| size <= left)?;
            next += size;
            Some(next - size..next)
        })
    }

    /// `M` rows of `V` vectors.
    ///
    /// # Safety
    /// The rows of `A` and `C` exist, and nobody else accesses those of `C`.
    #[inline(always)]
    unsafe fn compute<S: Simd, const M: usize, const V: usize>(self, simd: S) {
        let lanes = T::lanes::<S>();
        let width = lanes * V;
        let mut sums = [[T::splat(simd, T::zero()); V]; M];
        let (mut a, mut b) = (self.a, self.b);
        // SAFETY: the caller's.
        unsafe {
            for _ in 0..self.depth {
                let mut columns = [T::splat(simd, T::zero()); V];
                for (vector, value) in columns.iter_mut().enumerate() {
                    *value = load::<T, S>(b.add(vector * lanes));
                }
                for (row, sums) in sums.iter_mut().enumerate() {
                    let factor = T::splat(simd, *a.add(row * self.a_strides[0]));
                    for (sum, value) in sums.iter_mut().zip(columns) {
                        *sum = T::multiply_add(simd, factor, value, *sum);
                    }
                }
                a = a.add(self.a_strides[1]);
                b = b.add(width);
            }
            // Small loops that unroll: an array with an index that is not constant would not stay in registers.
            if self.columns == width && self.c_strides[1] == 1 {
                let alpha = T::splat(simd, self.alpha);
                for (row, sums) in sums.iter().enumerate() {
                    for (vector, &sum) in sums.iter().enumerate() {
                        let c = self.c.add(row * self.c_strides[0] + vector * lanes);
                        let value = if self.accumulate {
                            T::multiply_add(simd, alpha, sum, load::<T, S>(c))
                        } else {
                            T::multiply(simd, alpha, sum)
                        };
                        store::<T, S>(c, value);
                    }
                }
            } else {
                let mut edge = [[T::zero(); WIDEST]; M];
                for (sums, edge) in sums.iter().zip(&mut edge) {
                    for (vector, &sum) in sums.iter().enumerate() {
                        store::<T, S>(edge.as_mut_ptr().add(vector * lanes), sum);
                    }
                }
                self.write(&edge);
            }
        }
    }

    /// Writes sums one at a time.
    ///
    /// # Safety
    /// As [`Tile::compute`].
    #[inline(never)]
    unsafe fn write(self, sums: &[[T; WIDEST]]) {
        for (row, sums) in sums.iter().enumerate() {
            for (column, &sum) in sums[..self.columns].iter().enumerate() {
                let c = self.c.wrapping_add(row * self.c_strides[0] + column * self.c_strides[1]);
                // SAFETY: the caller's.
                unsafe { *c = if self.accumulate { self.alpha.mul_add(sum, *c) } else { self.alpha * sum } };
            }
        }
    }
}

/// # Safety
/// There is room for a vector at `at`.
#[inline(always)]
unsafe fn store<T: Lanes, S: Simd>(at: *mut T, value: T::Vector<S>) {
    // SAFETY: the caller's; vectors are plain numbers.
    unsafe { at.cast::<T::Vector<S>>().write_unaligned(value) }
}

/// # Safety
/// A vector's numbers lie at `at`.
#[inline(always)]
unsafe fn load<T: Lanes, S: Simd>(at: *const T) -> T::Vector<S> {
    // SAFETY: the caller's; vectors are plain numbers.
    unsafe { at.cast::<T::Vector<S>>().read_unaligned() }
}

/// Memory for packed columns that a thread keeps from one product to the next.
struct PackedColumns<T> {
    words: Vec<u64>,
    of: std::marker::PhantomData<T>,
}

thread_local! {
    static SPACE: Cell<Vec<u64>> = const { Cell::new(Vec::new()) };
}

impl<T> PackedColumns<T> {
    fn take(count: usize) -> Self {
        let mut words = SPACE.take();
        let needed = (count * size_of::<T>()).div_ceil(size_of::<u64>());
        if words.len() < needed {
            words.resize(needed, 0);
        }
        Self { words, of: std::marker::PhantomData }
    }

    fn start(&mut self) -> *mut T {
        self.words.as_mut_ptr().cast()
    }

    fn put_back(self) {
        SPACE.set(self.words);
    }
}
