//! Matrix products on the tile unit of recent x86 processors (AMX), which multiplies bf16 numbers sixteen times as fast
//! as the vector units multiply f32 ones.
//!
//! An f32 number is the sum of three bf16 numbers, `x = x₁ + x₂ + x₃`, without any error: each takes the eight leading
//! bits of what the ones before it left. Of the nine products of two such sums the six largest are taken,
//! `x₁y₁ + (x₁y₂ + x₂y₁) + (x₁y₃ + x₂y₂ + x₃y₁)`; the rest is below the rounding of the f32 sums in which the unit
//! adds. The result is an f32 product, at more than twice the speed of the vector units.
//!
//! A matrix that is stored in bf16 is its own first part, so three products are enough: `x₁y + x₂y + x₃y`. Nothing of
//! either operand is lost there but subnormal numbers, at half the cost.

use std::arch::asm;
use std::arch::x86_64::{
    __cpuid_count, __m512, __m512i, _mm256_maskz_loadu_epi16, _mm512_add_epi32, _mm512_and_si512, _mm512_castps_si512,
    _mm512_castsi512_ps, _mm512_cvtepu16_epi32, _mm512_loadu_si512, _mm512_maskz_loadu_ps, _mm512_mul_ps,
    _mm512_or_si512, _mm512_permutex2var_epi16, _mm512_permutex2var_epi32, _mm512_set1_epi32, _mm512_set1_ps,
    _mm512_setzero_si512, _mm512_slli_epi32, _mm512_srli_epi32, _mm512_store_si512, _mm512_sub_ps,
};
use std::cell::Cell;
use std::sync::OnceLock;

use rayon::prelude::*;

use crate::kernel::Kernel;
use crate::matrix::RawMatrix;
use crate::parallel::Shared;

/// Rows or columns of a tile, and pairs of the inner dimension that it spans.
const TILE: usize = 16;
/// Elements of the inner dimension that one tile spans.
const STEP: usize = 2 * TILE;
/// Rows or columns of a panel: two tiles, so that four products share four loads.
const PANEL: usize = 2 * TILE;
/// Parts of an f32 number.
const PARTS: usize = 3;
/// Bytes of a tile.
const TILE_BYTES: usize = 1024;
/// Bytes of one step of a panel: both tiles of every part.
const fn step_bytes(parts: usize) -> usize {
    parts * 2 * TILE_BYTES
}
/// Elements of the inner dimension that are packed at a time.
const DEPTH: usize = 1024;
/// Columns that one task packs: with [`DEPTH`] they fill about half of a core's second-level cache.
const COLUMNS: usize = 128;

/// The tile unit.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Amx(());

// SAFETY: the processor is asked for the unit and the vectors, the system for leave to use the tiles.
unsafe impl Kernel for Amx {
    fn new() -> Option<Self> {
        static AVAILABLE: OnceLock<bool> = OnceLock::new();
        let available = *AVAILABLE.get_or_init(|| {
            let vectors = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vl");
            vectors && has_unit() && allowed()
        });
        available.then_some(Self(()))
    }

    fn name(self) -> &'static str {
        "avx512+amx bf16"
    }
}

fn has_unit() -> bool {
    const BF16_AND_TILE: u32 = 1 << 22 | 1 << 24;
    __cpuid_count(7, 0).edx & BF16_AND_TILE == BF16_AND_TILE
}

/// Asks the kernel for the tiles' state, which a process has to do once before it touches them.
#[cfg(target_os = "linux")]
fn allowed() -> bool {
    const ARCH_PRCTL: i64 = 158;
    const REQUEST_PERMISSION: i64 = 0x1023;
    const TILE_DATA: i64 = 18;
    let result: i64;
    // SAFETY: the call reads and writes no memory of this process.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") ARCH_PRCTL => result,
            in("rdi") REQUEST_PERMISSION,
            in("rsi") TILE_DATA,
            out("rcx") _,
            out("r11") _,
            options(nostack)
        );
    }
    result == 0
}

#[cfg(not(target_os = "linux"))]
fn allowed() -> bool {
    false
}

/// Loads the two tiles of one part of the left operand, which lie at these bytes of the step.
macro_rules! left {
    ($first:literal, $second:literal) => {
        concat!("tileloadd tmm4, [{a} + {line} + ", $first, "]\ntileloadd tmm5, [{a} + {line} + ", $second, "]")
    };
}

/// The same of the right operand.
macro_rules! right {
    ($first:literal, $second:literal) => {
        concat!("tileloadd tmm6, [{b} + {line} + ", $first, "]\ntileloadd tmm7, [{b} + {line} + ", $second, "]")
    };
}

/// Adds the products of the loaded tiles to the sums.
macro_rules! products {
    () => {
        "tdpbf16ps tmm0, tmm4, tmm6\ntdpbf16ps tmm1, tmm4, tmm7\ntdpbf16ps tmm2, tmm5, tmm6\ntdpbf16ps tmm3, tmm5, tmm7"
    };
}

/// Adds up the products that one step asks for, over all steps of two panels, and writes the sums.
macro_rules! sum_of_tiles {
    ($c:ident, $stride:ident, $left:ident, $right:ident, $steps:ident, $right_parts:expr, $($step:expr,)*) => {
        // Four tiles of sums (0 to 3), two of the left operand (4, 5), two of the right one (6, 7).
        // SAFETY: the caller's; no register that the compiler uses is touched but those named.
        unsafe {
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "2:",
                $($step,)*
                "add {a}, {left_bytes}",
                "add {b}, {right_bytes}",
                "dec {steps}",
                "jnz 2b",
                "tilestored [{c} + {stride}], tmm0",
                "tilestored [{c} + {stride} + 64], tmm1",
                "tilestored [{below} + {stride}], tmm2",
                "tilestored [{below} + {stride} + 64], tmm3",
                a = inout(reg) $left => _,
                b = inout(reg) $right => _,
                steps = inout(reg) $steps => _,
                line = in(reg) 64usize,
                left_bytes = const step_bytes(PARTS),
                right_bytes = const step_bytes($right_parts),
                c = in(reg) $c,
                below = in(reg) $c.wrapping_add(TILE * $stride),
                stride = in(reg) $stride * size_of::<f32>(),
                options(nostack)
            );
        }
    };
}

/// Numbers that tiles are packed from.
pub(crate) trait TileNumber: Copy + Send {
    /// The bf16 numbers that make up one.
    const PARTS: usize;
    /// Rows of the other operand from which on a product is worth being computed here.
    const ROWS: usize;
    /// Multiplications from which on it is.
    const WORTH: usize;

    /// Sixteen of them as f32 numbers, zero where the mask is.
    ///
    /// # Safety
    /// The processor has the vectors, and `from` leads to the numbers that the mask chooses.
    unsafe fn load(mask: u16, from: *const Self) -> __m512;

    /// The product of two packed panels, of f32 numbers on the left and of these on the right, written to `c`, whose rows lie
    /// `stride` elements apart.
    ///
    /// # Safety
    /// The tiles are configured, both panels have `steps` steps (at least one), and `c` has room for the block.
    unsafe fn tiles(c: *mut f32, stride: usize, left: *const u8, right: *const u8, steps: usize);
}

impl TileNumber for f32 {
    const PARTS: usize = PARTS;
    const ROWS: usize = PANEL;
    const WORTH: usize = 1 << 25;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn load(mask: u16, from: *const f32) -> __m512 {
        // SAFETY: the caller's.
        unsafe { _mm512_maskz_loadu_ps(mask, from) }
    }

    unsafe fn tiles(c: *mut f32, stride: usize, left: *const u8, right: *const u8, steps: usize) {
        // In this order of the parts few are loaded twice.
        sum_of_tiles!(
            c,
            stride,
            left,
            right,
            steps,
            PARTS,
            left!(0, 1024),
            right!(4096, 5120),
            products!(), // x₁y₃
            right!(2048, 3072),
            products!(), // x₁y₂
            right!(0, 1024),
            products!(), // x₁y₁
            left!(4096, 5120),
            products!(), // x₃y₁
            left!(2048, 3072),
            products!(), // x₂y₁
            right!(2048, 3072),
            products!(), // x₂y₂
        );
    }
}

/// The bits of a bf16 number.
impl TileNumber for u16 {
    const PARTS: usize = 1;
    const ROWS: usize = crate::skinny::SMALL + 1;
    const WORTH: usize = 1 << 22;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn load(mask: u16, from: *const u16) -> __m512 {
        // SAFETY: the caller's.
        let bits = unsafe { _mm256_maskz_loadu_epi16(mask, from.cast()) };
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(bits)))
    }

    unsafe fn tiles(c: *mut f32, stride: usize, left: *const u8, right: *const u8, steps: usize) {
        sum_of_tiles!(
            c,
            stride,
            left,
            right,
            steps,
            1,
            right!(0, 1024),
            left!(4096, 5120),
            products!(), // x₃y
            left!(2048, 3072),
            products!(), // x₂y
            left!(0, 1024),
            products!(), // x₁y
        );
    }
}

/// Whether a product `m × n × k` with these strides can be, and is worth being, computed here.
pub(crate) fn suits<N: TileNumber>(
    c: &RawMatrix<*mut f32>,
    a: &RawMatrix<*const f32>,
    b: &RawMatrix<*const N>,
) -> bool {
    let unit = |strides: [usize; 2]| strides.contains(&1);
    c.rows >= N::ROWS
        && c.columns.min(a.columns) >= PANEL
        && c.rows * c.columns * a.columns >= N::WORTH
        && c.column_stride == 1
        && unit([a.row_stride, a.column_stride])
        && unit([b.row_stride, b.column_stride])
}

impl Amx {
    /// `C (+)= alpha A B`.
    ///
    /// # Safety
    /// [`suits`] is true, the matrices lie in valid memory, and nothing else accesses `C` meanwhile.
    pub(crate) unsafe fn multiply<N: TileNumber>(
        self,
        c: RawMatrix<*mut f32>,
        accumulate: bool,
        alpha: f32,
        a: RawMatrix<*const f32>,
        b: RawMatrix<*const N>,
        threads: usize,
    ) {
        let (panels, chunks) = (c.rows.div_ceil(PANEL), c.columns.div_ceil(COLUMNS).next_multiple_of(threads.max(1)));
        // Equal shares for the threads, in whole panels.
        let width = c.columns.div_ceil(chunks).next_multiple_of(PANEL);
        let chunks = c.columns.div_ceil(width);
        let (left, right) = (TileLines::rows(a), TileLines::columns(b));
        let target = Destination { data: Shared::new(c.data), stride: c.row_stride, size: [c.rows, c.columns] };
        let mut packed = LEFT.take();
        for k in (0..a.columns).step_by(DEPTH) {
            let depth = DEPTH.min(a.columns - k);
            let steps = depth.div_ceil(STEP);
            let [bytes, right_bytes] = [f32::PARTS, N::PARTS].map(|parts| steps * step_bytes(parts));
            packed.resize_at_least(panels * bytes);
            let space = Shared::new(packed.start());
            for_each(panels, threads, |panel| {
                // SAFETY: every panel has its own part of the space.
                unsafe { left.pack(space.at(panel * bytes), panel * PANEL, k..k + depth, alpha, Across::Rows) };
            });
            let packed = Shared::new(packed.start());
            for_each(chunks, threads, |chunk| {
                let first = chunk * width;
                let columns = width.min(target.size[1] - first);
                let mut own = RIGHT.take();
                own.resize_at_least(columns.div_ceil(PANEL) * right_bytes);
                let start = own.start();
                // SAFETY: the panels fill the space of this thread; every chunk writes its own columns of `C`.
                unsafe {
                    for panel in 0..columns.div_ceil(PANEL) {
                        right.pack(
                            start.add(panel * right_bytes),
                            first + panel * PANEL,
                            k..k + depth,
                            1.,
                            Across::Columns,
                        );
                    }
                    configure(self);
                    for row in 0..panels {
                        for column in 0..columns.div_ceil(PANEL) {
                            let (left, right) = (packed.at(row * bytes), start.add(column * right_bytes));
                            let from = [row * PANEL, first + column * PANEL];
                            target.compute::<N>(from, [left, right], steps, accumulate || k > 0);
                        }
                    }
                    release(self);
                }
                RIGHT.set(own);
            });
        }
        LEFT.set(packed);
    }
}

fn for_each(count: usize, threads: usize, f: impl Fn(usize) + Sync + Send) {
    if threads > 1 && count > 1 {
        (0..count).into_par_iter().with_max_len(1).for_each(f);
    } else {
        (0..count).for_each(f);
    }
}

/// Memory that tiles are packed into, kept by each thread for its next product.
#[derive(Default)]
struct PackedTiles(Vec<CacheLine>);

#[derive(Clone, Copy)]
#[repr(align(64))]
#[expect(dead_code, reason = "reached through pointers")]
struct CacheLine([u8; 64]);

thread_local! {
    static LEFT: Cell<PackedTiles> = Cell::default();
    static RIGHT: Cell<PackedTiles> = Cell::default();
}

impl PackedTiles {
    fn resize_at_least(&mut self, bytes: usize) {
        let lines = bytes.div_ceil(size_of::<CacheLine>());
        if self.0.len() < lines {
            self.0.resize(lines, CacheLine([0; 64]));
        }
    }

    fn start(&mut self) -> *mut u8 {
        self.0.as_mut_ptr().cast()
    }
}

/// The lines of an operand: rows of `A`, columns of `B`.
#[derive(Clone, Copy)]
struct TileLines<N> {
    data: Shared<N>,
    count: usize,
    /// Elements from one line to the next, and from one element of the inner dimension to the next. One of them is 1.
    stride: [usize; 2],
}

/// What the rows of a packed tile are.
#[derive(Clone, Copy, PartialEq)]
enum Across {
    /// A row is a line: tiles of `A`.
    Rows,
    /// A row is a pair of the inner dimension, its columns are lines: tiles of `B`.
    Columns,
}

impl<N: TileNumber> TileLines<N> {
    fn rows(a: RawMatrix<*const N>) -> Self {
        Self { data: Shared::new(a.data.cast_mut()), count: a.rows, stride: [a.row_stride, a.column_stride] }
    }

    fn columns(b: RawMatrix<*const N>) -> Self {
        Self { data: Shared::new(b.data.cast_mut()), count: b.columns, stride: [b.column_stride, b.row_stride] }
    }

    /// Packs the parts of the panel that begins at line `first`, elements `inner`, times `factor`.
    ///
    /// # Safety
    /// `to` leads to the bytes of a panel of this depth, aligned to 64.
    unsafe fn pack(&self, to: *mut u8, first: usize, inner: std::ops::Range<usize>, factor: f32, across: Across) {
        for (step, k) in inner.clone().step_by(STEP).enumerate() {
            for tile in 0..2 {
                let line = first + tile * TILE;
                let lines = self.count.saturating_sub(line).min(TILE);
                // SAFETY: the caller's; `lines` and the depth keep to the operand.
                unsafe {
                    let from = self.data.at(line * self.stride[0] + k * self.stride[1]);
                    let to = to.add(step * step_bytes(N::PARTS) + tile * TILE_BYTES);
                    let size = [lines, (inner.end - k).min(STEP)];
                    match (self.stride[1] == 1, across) {
                        (true, Across::Rows) => self.pack_tile::<true, false>(to, from, size, factor),
                        (true, Across::Columns) => self.pack_tile::<true, true>(to, from, size, factor),
                        (false, Across::Rows) => self.pack_tile::<false, true>(to, from, size, factor),
                        (false, Across::Columns) => self.pack_tile::<false, false>(to, from, size, factor),
                    }
                }
            }
        }
    }

    /// Packs the parts of one tile, `size` lines and elements of the operand; the rest of the tile is zero. Elements of
    /// a line lie side by side if `ALONG`, else those of different lines do; what is read so is written transposed if
    /// `TURN`.
    ///
    /// # Safety
    /// The processor has the vectors, `from` leads to that many lines and elements, and `to` to the first part.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn pack_tile<const ALONG: bool, const TURN: bool>(
        &self,
        to: *mut u8,
        from: *const N,
        [lines, depth]: [usize; 2],
        factor: f32,
    ) {
        let mut parts = [[_mm512_setzero_si512(); TILE]; PARTS];
        let row = |line: usize, k: usize| from.wrapping_add(line * self.stride[0] + k * self.stride[1]);
        let factor = _mm512_set1_ps(factor);
        let first = |count: usize| (0xffff_u32 >> (TILE - count.min(TILE))) as u16;
        for at in 0..TILE {
            // Thirty-two elements of one line, or a pair of elements of sixteen lines.
            let (second, masks) = if ALONG {
                let mask = |count: usize| if at < lines { first(count) } else { 0 };
                (row(at, TILE), [mask(depth), mask(depth.saturating_sub(TILE))])
            } else {
                let mask = |k: usize| if k < depth { first(lines) } else { 0 };
                (row(0, 2 * at + 1), [mask(2 * at), mask(2 * at + 1)])
            };
            let from = if ALONG { row(at, 0) } else { row(0, 2 * at) };
            // SAFETY: nothing is read where the mask is zero, which is what lies beyond the operand.
            let (mut low, mut high) = unsafe { (N::load(masks[0], from), N::load(masks[1], second)) };
            (low, high) = (_mm512_mul_ps(low, factor), _mm512_mul_ps(high, factor));
            for part in &mut parts[..N::PARTS] {
                let (low_top, high_top) = (top(low), top(high));
                part[at] = if ALONG { join_lines(low_top, high_top) } else { join_pairs(low_top, high_top) };
                low = _mm512_sub_ps(low, _mm512_castsi512_ps(low_top));
                high = _mm512_sub_ps(high, _mm512_castsi512_ps(high_top));
            }
        }
        for (index, part) in parts[..N::PARTS].iter_mut().enumerate() {
            if TURN {
                transpose(part);
            }
            for (at, row) in part.iter().enumerate() {
                // SAFETY: the caller's.
                unsafe { _mm512_store_si512(to.add(index * 2 * TILE_BYTES + at * 64).cast(), *row) };
            }
        }
    }
}

/// Each number rounded to bf16, as an f32 with sixteen zeros at its end.
#[inline]
#[target_feature(enable = "avx512f")]
fn top(x: __m512) -> __m512i {
    let rounded = _mm512_add_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(0x8000));
    _mm512_and_si512(rounded, _mm512_set1_epi32(-0x1_0000))
}

/// The upper halves of thirty-two numbers, in their order.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn join_lines(first: __m512i, second: __m512i) -> __m512i {
    const UPPER: [u16; 32] = {
        let mut index = [0; 32];
        let mut at = 0;
        while at < 32 {
            index[at] = 2 * at as u16 + 1;
            at += 1;
        }
        index
    };
    // SAFETY: the constant has 64 bytes.
    let index = unsafe { _mm512_loadu_si512(UPPER.as_ptr().cast()) };
    _mm512_permutex2var_epi16(first, index, second)
}

/// The upper halves of two vectors of sixteen numbers, in turn.
#[inline]
#[target_feature(enable = "avx512f")]
fn join_pairs(first: __m512i, second: __m512i) -> __m512i {
    _mm512_or_si512(_mm512_srli_epi32::<16>(first), second)
}

/// Exchanges rows and columns: blocks of eight first, then of four, two and one.
#[inline]
#[target_feature(enable = "avx512f")]
fn transpose(rows: &mut [__m512i; TILE]) {
    exchange::<8>(rows);
    exchange::<4>(rows);
    exchange::<2>(rows);
    exchange::<1>(rows);
}

/// Exchanges the blocks of `D` rows and lanes that lie beside the diagonal.
#[inline]
#[target_feature(enable = "avx512f")]
fn exchange<const D: usize>(rows: &mut [__m512i; TILE]) {
    let index = const {
        let mut index = [[0u32; TILE]; 2];
        let mut lane = 0;
        while lane < TILE {
            let upper = lane & D != 0;
            index[0][lane] = (if upper { TILE + lane - D } else { lane }) as u32;
            index[1][lane] = (if upper { TILE + lane } else { lane + D }) as u32;
            lane += 1;
        }
        index
    };
    // SAFETY: the constants have 64 bytes each.
    let (lower, upper) =
        unsafe { (_mm512_loadu_si512(index[0].as_ptr().cast()), _mm512_loadu_si512(index[1].as_ptr().cast())) };
    for at in 0..TILE {
        if at & D == 0 {
            let (a, b) = (rows[at], rows[at + D]);
            rows[at] = _mm512_permutex2var_epi32(a, lower, b);
            rows[at + D] = _mm512_permutex2var_epi32(a, upper, b);
        }
    }
}

/// The matrix `C`.
struct Destination {
    data: Shared<f32>,
    stride: usize,
    size: [usize; 2],
}

impl Destination {
    /// Adds up `steps` of two packed panels, and writes the sums to the block that begins at `from` or adds them to it.
    ///
    /// # Safety
    /// The tiles are configured, both panels are of that depth, and this block of `C` is nobody else's.
    unsafe fn compute<N: TileNumber>(&self, from: [usize; 2], [left, right]: [*const u8; 2], steps: usize, add: bool) {
        let [rows, columns] = [0, 1].map(|side| PANEL.min(self.size[side] - from[side]));
        let at = |row: usize| self.data.at((from[0] + row) * self.stride + from[1]);
        // SAFETY: the caller's.
        unsafe {
            if rows == PANEL && columns == PANEL && !add {
                return N::tiles(at(0), self.stride, left, right, steps);
            }
            let mut sums = [0f32; PANEL * PANEL];
            N::tiles(sums.as_mut_ptr(), PANEL, left, right, steps);
            for (row, sums) in sums.chunks_exact(PANEL).take(rows).enumerate() {
                let c = std::slice::from_raw_parts_mut(at(row), columns);
                if add {
                    for (c, sum) in c.iter_mut().zip(sums) {
                        *c += sum;
                    }
                } else {
                    c.copy_from_slice(&sums[..columns]);
                }
            }
        }
    }
}

/// Shapes the eight tiles of this thread: sixteen rows of 64 bytes each.
fn configure(_: Amx) {
    let mut shape = [0u8; 64];
    shape[0] = 1;
    for tile in 0..8 {
        shape[16 + 2 * tile] = 64;
        shape[48 + tile] = TILE as u8;
    }
    // SAFETY: the unit is there, and 64 bytes are read.
    unsafe { asm!("ldtilecfg [{}]", in(reg) shape.as_ptr(), options(nostack, readonly)) };
}

/// Gives the tiles back, so that the system need not save them at every switch of threads.
fn release(_: Amx) {
    // SAFETY: the unit is there.
    unsafe { asm!("tilerelease", options(nostack, nomem)) };
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers that look random, of either sign.
    fn numbers(count: usize, seed: usize) -> Vec<f32> {
        (0..count).map(|at| (((at + seed) * 2_654_435_761) % 4093) as f32 / 2048. - 1.).collect()
    }

    /// Products with a matrix in bf16 have the accuracy of f32: the error is small beside the magnitudes of the terms. Sizes
    /// fill no tile, cross the packed depth, and have one row only.
    #[test]
    fn products_with_bf16_are_f32_products() {
        let Some(unit) = Amx::new() else { return };
        for [m, n, k] in [[1, 33, 40], [4, 70, 1100], [17, 256, 64], [75, 131, 1025]] {
            let (x, start) = (numbers(m * k, 1), numbers(m * n, 3));
            let bits: Vec<u16> = numbers(k * n, 2).into_iter().map(|x| (x.to_bits() >> 16) as u16).collect();
            let wide = |bits: u16| f64::from(f32::from_bits(u32::from(bits) << 16));
            for (transpose, accumulate, threads) in [(false, false, 1), (true, false, 3), (false, true, 2)] {
                let b = RawMatrix::row_major(
                    bits.as_ptr(),
                    if transpose { [n, k] } else { [k, n] },
                    if transpose { k } else { n },
                );
                let b = if transpose { b.t() } else { b };
                let mut found = start.clone();
                let (a, c) =
                    (RawMatrix::row_major(x.as_ptr(), [m, k], k), RawMatrix::row_major(found.as_mut_ptr(), [m, n], n));
                // SAFETY: the matrices lie in the vectors above.
                unsafe { unit.multiply(c, accumulate, 1., a, b, threads) };
                for (at, found) in found.into_iter().enumerate() {
                    let (row, column) = (at / n, at % n);
                    let mut sums = [if accumulate { f64::from(start[at]) } else { 0. }; 2];
                    for inner in 0..k {
                        let w = bits[if transpose { column * k + inner } else { inner * n + column }];
                        let term = f64::from(x[row * k + inner]) * wide(w);
                        sums = [sums[0] + term, sums[1].abs() + term.abs()];
                    }
                    let off = (f64::from(found) - sums[0]).abs();
                    assert!(off <= 1e-6 * sums[1], "{m} × {n} × {k}: {found} instead of {}", sums[0]);
                }
            }
        }
    }
}
