//! Products in whole numbers on processors that have the instructions for it. The results are those of the plain code in
//! [`int8`](crate::int8), to the last bit.
//!
//! For one or two rows of activations, weights are multiplied as they come from memory, four rows of them at a time. For
//! more, sixteen rows are laid beside each other first, so that each lane of a vector sums a row of its own.

use std::arch::x86_64::{__m128i, __m256, __m256i, __m512, __m512i, _mm512_dpbusd_epi32};

use pulp::cast;
use pulp::x86::{V3, V4};

use crate::arithmetic::{LANES, Level, widest};
use crate::encoding::{Encoding, half_at, scale_and_minimum};
use crate::low_precision::EncodedMatrix;
use crate::parallel::{Shared, tasks};
use crate::rounded::{BLOCK, GROUP, RoundedRow, RoundedRows, place};
use crate::simd::prefetch;
use crate::widen::{Q4_0, Q4_1, Q4K, Q8_0, Unit as Floats};

/// Rows of activations that are multiplied with weights as these come from memory.
const FEW: usize = 2;
/// Rows of weights that one task takes.
const SHARE: usize = 64;
/// Bytes of a vector.
const BYTES: usize = 64;
/// Bytes of a piece, which fill a lane of 128 bits.
const PIECE: usize = 16;
/// Bytes of the longest group of blocks in the formats whose rows may end within one.
const TAIL: usize = GROUP * 34;

/// `Y = X Wᵀ`, row-major; says whether this processor can.
pub(crate) fn multiply(y: &mut [f32], x: &RoundedRows, w: EncodedMatrix) -> bool {
    if widest() == Level::Bits512
        && let (Some(wide), Some(own)) = (V4::try_new(), Vnni::try_new())
    {
        by(Unit512 { wide, own }, y, x, w);
        return true;
    }
    if widest() < Level::Bits256 {
        return false;
    }
    V3::try_new().map(|unit| by(unit, y, x, w)).is_some()
}

fn by<U: DotUnit>(unit: U, y: &mut [f32], x: &RoundedRows, w: EncodedMatrix) {
    match w.encoding() {
        Encoding::Q8_0 => product::<U, Q8_0>(unit, y, x, w),
        Encoding::Q4_0 => product::<U, Q4_0>(unit, y, x, w),
        Encoding::Q4_1 => product::<U, Q4_1>(unit, y, x, w),
        Encoding::Q4K => product::<U, Q4K>(unit, y, x, w),
        Encoding::F16 | Encoding::Bf16 | Encoding::Q6K => unreachable!("asked for before"),
    }
}

fn product<U: DotUnit, F: IntegerFormat>(unit: U, y: &mut [f32], x: &RoundedRows, w: EncodedMatrix) {
    let [count, columns] = w.size();
    let blocks = columns / BLOCK;
    // What the sums of products have too much, since weights count from another zero than the instructions do.
    let offset = if F::SIGNED { U::LIFT } else { F::OFFSET };
    let corrections = x.sums().iter().map(|sum| -offset * sum).collect::<Vec<i32>>();
    let operands: Vec<RoundedOperand> = (0..x.count())
        .zip(corrections.chunks_exact(x.blocks()))
        .map(|(row, corrections)| RoundedOperand { x: x.row(row), corrections })
        .collect();
    let target = Products { data: Shared::new(y.as_mut_ptr()), rows: count };
    tasks(count.div_ceil(SHARE), operands.len() * count * columns, |task| {
        let share = task * SHARE..count.min((task + 1) * SHARE);
        let work = WeightShare { w, blocks, rows: share, operands: &operands, target };
        unit.vectorize(
            #[inline(always)]
            || match operands.len() {
                0 => {}
                1 => work.few::<U, F, 1>(unit),
                FEW => work.few::<U, F, FEW>(unit),
                _ => work.many::<U, F>(unit),
            },
        );
    });
}

/// A row of activations, and what is added to the sum of each block.
#[derive(Clone, Copy)]
struct RoundedOperand<'a> {
    x: RoundedRow<'a>,
    corrections: &'a [i32],
}

impl<'a> RoundedOperand<'a> {
    #[inline(always)]
    fn groups(self, count: usize) -> RoundedGroups<'a> {
        RoundedGroups {
            numbers: &self.x.numbers.as_chunks().0.as_chunks().0[..count],
            scales: &self.x.scales.as_chunks().0[..count],
            sums: &self.x.sums.as_chunks().0[..count],
            corrections: &self.corrections.as_chunks().0[..count],
        }
    }
}

/// The same, in groups of blocks.
#[derive(Clone, Copy)]
struct RoundedGroups<'a> {
    numbers: &'a [[[i8; BYTES]; 2]],
    scales: &'a [[f32; GROUP]],
    sums: &'a [[i32; GROUP]],
    corrections: &'a [[i32; GROUP]],
}

/// Where results go: `rows` of them for each row of activations.
#[derive(Clone, Copy)]
struct Products {
    data: Shared<f32>,
    rows: usize,
}

impl Products {
    /// Puts the results of some rows of weights with one of activations, as far as `rows` has so many.
    ///
    /// # Safety
    /// The row of activations exists, and nobody else writes these results.
    #[inline(always)]
    unsafe fn put(&self, operand: usize, rows: &std::ops::Range<usize>, results: &[f32]) {
        let results = &results[..results.len().min(rows.len())];
        // SAFETY: the caller's.
        let out =
            unsafe { std::slice::from_raw_parts_mut(self.data.at(operand * self.rows + rows.start), results.len()) };
        out.copy_from_slice(results);
    }
}

/// The products of some rows of weights with all activations.
struct WeightShare<'a> {
    w: EncodedMatrix<'a>,
    /// Of a row.
    blocks: usize,
    rows: std::ops::Range<usize>,
    operands: &'a [RoundedOperand<'a>],
    target: Products,
}

impl WeightShare<'_> {
    /// `N` rows from `first` on; beyond the last one it is taken again.
    #[inline(always)]
    fn weights<const N: usize>(&self, first: usize) -> [&[u8]; N] {
        std::array::from_fn(|at| self.w.row((first + at).min(self.rows.end - 1)))
    }

    /// For `N` rows of activations: four rows of weights and four blocks of each at a time. A lane of 128 bits is a block, and
    /// each number in it a row.
    #[inline(always)]
    fn few<U: DotUnit, F: IntegerFormat, const N: usize>(&self, unit: U) {
        let (groups, whole) = (self.blocks.div_ceil(GROUP), self.blocks / GROUP);
        let operands = *self.operands.first_chunk::<N>().expect("there are as many");
        let operands = operands.map(
            #[inline(always)]
            |operand| operand.groups(groups),
        );
        let (mut factors, mut tails) = (BlockFactors::new(groups), [[0; TAIL]; GROUP]);
        for first in self.rows.clone().step_by(GROUP) {
            let rows = self.weights::<GROUP>(first);
            let mut starts = rows.map(<[u8]>::as_ptr);
            for (at, row) in rows.into_iter().enumerate() {
                // SAFETY: a row has these blocks.
                let mut note = |group, block| unsafe {
                    factors.note::<F>(row, group * GROUP + block, [group, block * GROUP + at]);
                };
                for group in 0..whole {
                    for block in 0..GROUP {
                        note(group, block);
                    }
                }
                for block in whole * GROUP..self.blocks {
                    note(whole, block - whole * GROUP);
                }
            }
            factors.widen::<U, F>(unit);
            let mut sums = [unit.wide().splat(0.); N];
            for group in 0..groups {
                if group == whole {
                    // The last group goes on with zeros.
                    for ((tail, row), start) in tails.iter_mut().zip(rows).zip(&mut starts) {
                        for block in group * GROUP..self.blocks {
                            let at = F::start(block % GROUP);
                            tail[at..at + F::start(1)].copy_from_slice(&row[F::start(block)..][..F::start(1)]);
                        }
                        *start = tail.as_ptr().wrapping_sub(F::start(group * GROUP));
                    }
                }
                let mut products = [[unit.splat(0); GROUP]; N];
                for (row, start) in starts.iter().enumerate() {
                    let mut pieces = [[*start; GROUP]; 2];
                    for (piece, starts) in pieces.iter_mut().enumerate() {
                        for (block, start) in starts.iter_mut().enumerate() {
                            *start = start.wrapping_add(F::piece(group * GROUP + block, piece));
                        }
                    }
                    // SAFETY: the group lies in the row, or in the tail.
                    let pieces = unsafe { [together(unit, pieces[0]), together(unit, pieces[1])] };
                    let [low, high] = F::split(unit, pieces, [0, 1, 0, 1]);
                    for (products, operand) in products.iter_mut().zip(operands) {
                        let [first, second] = &operand.numbers[group];
                        let sum = unit.dot(F::SIGNED, products[row], low, unit.load(first));
                        products[row] = unit.dot(F::SIGNED, sum, high, unit.load(second));
                    }
                }
                let [scale, minimum] = factors.full.each_ref().map(|all| unit.wide().load(&all[group]));
                for ((sum, products), operand) in sums.iter_mut().zip(products).zip(operands) {
                    let exact = unit.add(totals(unit, products), unit.spread(&operand.corrections[group]));
                    let own = unit.spread_numbers(&operand.scales[group]);
                    *sum = unit.wide().multiply_add(unit.numbers(exact), unit.wide().multiply(scale, own), *sum);
                    if F::MINIMUM {
                        let whole = unit.numbers(unit.spread(&operand.sums[group]));
                        *sum = unit.wide().multiply_add(minimum, unit.wide().multiply(own, whole), *sum);
                    }
                }
            }
            for (operand, sum) in sums.into_iter().enumerate() {
                let [a, b, c, d]: [[f32; GROUP]; GROUP] = cast(unit.wide().store(sum));
                let mut results = [0.; GROUP];
                for (row, result) in results.iter_mut().enumerate() {
                    *result = a[row] + b[row] + c[row] + d[row];
                }
                // SAFETY: the rows are this share's own.
                unsafe { self.target.put(operand, &(first..self.rows.end), &results) };
            }
        }
    }

    /// For any number of rows of activations: sixteen rows of weights at a time, each in a lane of its own.
    #[inline(always)]
    fn many<U: DotUnit, F: IntegerFormat>(&self, unit: U) {
        let mut panel =
            WeightPanel { blocks: vec![[[0; BYTES]; STEPS]; self.blocks], factors: BlockFactors::new(self.blocks) };
        for first in self.rows.clone().step_by(LANES) {
            panel.fill::<U, F>(unit, self.weights(first));
            let mut at = 0;
            while at < self.operands.len() {
                let rest = &self.operands[at..];
                at += match rest.len().min(U::TILE) {
                    8.. => self.tile::<U, F, 8>(unit, &panel, at, first),
                    4.. => self.tile::<U, F, 4>(unit, &panel, at, first),
                    2.. => self.tile::<U, F, 2>(unit, &panel, at, first),
                    _ => self.tile::<U, F, 1>(unit, &panel, at, first),
                };
            }
        }
    }

    /// Where the rows behind a panel begin, and how many bytes as many of them take.
    #[inline(always)]
    fn next_panel(&self, first: usize) -> (*const u8, usize) {
        let row = self.w.row(first);
        (row.as_ptr().wrapping_add(LANES * row.len()), LANES * row.len())
    }

    /// Multiplies a panel with `N` rows of activations from `at` on; how many these were.
    #[inline(always)]
    fn tile<U: DotUnit, F: IntegerFormat, const N: usize>(
        &self,
        unit: U,
        panel: &WeightPanel,
        at: usize,
        first: usize,
    ) -> usize {
        let operands: &[RoundedOperand; N] = self.operands[at..].first_chunk().expect("there are as many");
        let wide = unit.wide();
        let mut totals = [wide.splat(0.); N];
        // The next panel comes from memory meanwhile. It need not exist.
        let (next, bytes) = self.next_panel(first);
        let ahead = if at == 0 { bytes / self.blocks } else { 0 };
        for lane in 0..GROUP {
            let mut sums = [wide.splat(0.); N];
            for block in (lane..self.blocks).step_by(GROUP) {
                for line in (0..ahead).step_by(BYTES) {
                    prefetch(next.wrapping_add(block * ahead + line));
                }
                let mut exact = [unit.splat(0); N];
                for (exact, operand) in exact.iter_mut().zip(operands) {
                    *exact = unit.splat(operand.corrections[block]);
                }
                for (step, weights) in panel.blocks[block].iter().enumerate() {
                    let weights = unit.load(weights);
                    for (exact, operand) in exact.iter_mut().zip(operands) {
                        let numbers: &[i8; 4] = part(operand.x.numbers, place(block, 4 * step));
                        *exact = unit.dot(F::SIGNED, *exact, weights, unit.splat(cast(*numbers)));
                    }
                }
                let [scale, minimum] = panel.factors.full.each_ref().map(|all| wide.load(&all[block]));
                for ((sum, exact), operand) in sums.iter_mut().zip(exact).zip(operands) {
                    let own = operand.x.scales[block];
                    *sum = wide.multiply_add(unit.numbers(exact), wide.multiply(scale, wide.splat(own)), *sum);
                    if F::MINIMUM {
                        let whole = wide.splat(own * operand.x.sums[block] as f32);
                        *sum = wide.multiply_add(minimum, whole, *sum);
                    }
                }
            }
            for (total, sum) in totals.iter_mut().zip(sums) {
                *total = if lane == 0 { sum } else { wide.add(*total, sum) };
            }
        }
        for (operand, total) in totals.into_iter().enumerate() {
            // SAFETY: the rows are this share's own.
            unsafe { self.target.put(at + operand, &(first..self.rows.end), &wide.store(total)) };
        }
        N
    }
}

/// Vectors that a block of sixteen rows takes: four numbers of each row in each.
const STEPS: usize = BLOCK / 4;

/// Sixteen rows of weights, laid beside each other.
struct WeightPanel {
    blocks: Vec<[[i8; BYTES]; STEPS]>,
    factors: BlockFactors,
}

impl WeightPanel {
    #[inline(always)]
    fn fill<U: DotUnit, F: IntegerFormat>(&mut self, unit: U, rows: [&[u8]; LANES]) {
        for (at, row) in rows.iter().enumerate() {
            for block in 0..self.blocks.len() {
                // SAFETY: a row has these blocks.
                unsafe { self.factors.note::<F>(row, block, [block, at]) };
            }
        }
        self.factors.widen::<U, F>(unit);
        for (block, out) in self.blocks.iter_mut().enumerate() {
            let mut pieces = [[unit.splat(0); GROUP]; 2];
            for (piece, vectors) in pieces.iter_mut().enumerate() {
                for (row, vector) in vectors.iter_mut().enumerate() {
                    let mut starts = [rows[row].as_ptr(); GROUP];
                    for (lane, start) in starts.iter_mut().enumerate() {
                        *start = rows[GROUP * lane + row].as_ptr().wrapping_add(F::piece(block, piece));
                    }
                    // SAFETY: the block lies in the rows.
                    *vector = unsafe { together(unit, starts) };
                }
                *vectors = transpose(unit, *vectors);
            }
            for step in 0..STEPS / 2 {
                let [low, high] = F::split(unit, [pieces[0][step], pieces[1][step]], [block as u32 % 2; GROUP]);
                [out[step], out[STEPS / 2 + step]] = [unit.store(low), unit.store(high)];
            }
        }
    }
}

/// Scales and minimums of weights, sixteen at a time.
struct BlockFactors {
    halves: [Vec<[u16; LANES]>; 2],
    full: [Vec<[f32; LANES]>; 2],
}

impl BlockFactors {
    fn new(count: usize) -> Self {
        let (halves, full) = (vec![[0; LANES]; count], vec![[0.; LANES]; count]);
        Self { halves: [halves.clone(), halves], full: [full.clone(), full] }
    }

    /// Takes those of one block, as they are stored, to a place of its own.
    ///
    /// # Safety
    /// As [`IntegerFormat::factors`].
    #[inline(always)]
    unsafe fn note<F: IntegerFormat>(&mut self, row: &[u8], block: usize, [vector, lane]: [usize; 2]) {
        // SAFETY: the caller's.
        match unsafe { F::factors(row.as_ptr(), block) } {
            BlockParameters::Halves(values) => {
                for (all, value) in self.halves.iter_mut().zip(values).take(F::COUNT) {
                    all[vector][lane] = value;
                }
            }
            BlockParameters::Full(values) => {
                for (all, value) in self.full.iter_mut().zip(values) {
                    all[vector][lane] = value;
                }
            }
        }
    }

    /// Makes full numbers of all halves.
    #[inline(always)]
    fn widen<U: DotUnit, F: IntegerFormat>(&mut self, unit: U) {
        if F::HALVES {
            for (halves, full) in self.halves.iter().zip(&mut self.full).take(F::COUNT) {
                for (halves, full) in halves.iter().zip(full) {
                    *full = unit.wide().store(unit.wide().halves(&cast(*halves)));
                }
            }
        }
    }
}

/// The sums of each lane of four vectors, beside each other in the lane.
#[inline(always)]
fn totals<U: DotUnit>(unit: U, [a, b, c, d]: [U::Whole; 4]) -> U::Whole {
    let [low, high] = unit.interleave(a, b);
    let first = unit.add(low, high);
    let [low, high] = unit.interleave(c, d);
    let [low, high] = unit.interleave_pairs(first, unit.add(low, high));
    unit.add(low, high)
}

/// In each lane, number `j` of vector `i` becomes number `i` of vector `j`.
#[inline(always)]
fn transpose<U: DotUnit>(unit: U, [a, b, c, d]: [U::Whole; 4]) -> [U::Whole; 4] {
    let ([ab, ab_high], [cd, cd_high]) = (unit.interleave(a, b), unit.interleave(c, d));
    let ([first, second], [third, fourth]) = (unit.interleave_pairs(ab, cd), unit.interleave_pairs(ab_high, cd_high));
    [first, second, third, fourth]
}

/// `N` elements from `first` on.
#[inline(always)]
fn part<T, const N: usize>(all: &[T], first: usize) -> &[T; N] {
    all[first..].first_chunk().expect("there are as many")
}

/// How blocks of 32 weights are stored: as bytes or nibbles, in pieces of sixteen bytes.
trait IntegerFormat {
    /// Whether weights are bytes with signs.
    const SIGNED: bool = false;
    /// What nibbles have too much.
    const OFFSET: i32 = 0;
    /// Whether blocks have a minimum.
    const MINIMUM: bool = false;
    /// How many parameters that makes.
    const COUNT: usize = 1 + Self::MINIMUM as usize;
    /// Whether these are stored in half precision.
    const HALVES: bool = true;

    /// Where a block begins in its row.
    fn start(block: usize) -> usize;
    /// Where its first or second piece begins. A block with a single piece has it twice.
    fn piece(block: usize, piece: usize) -> usize;
    /// The first and the second halves of blocks, of which one lies in each lane. `odd` says where the index of its block
    /// in the row is odd.
    fn split<U: DotUnit>(unit: U, pieces: [U::Whole; 2], odd: [u32; GROUP]) -> [U::Whole; 2];
    /// Scale and minimum of a block, given where its row begins.
    ///
    /// # Safety
    /// The row has the block.
    unsafe fn factors(row: *const u8, block: usize) -> BlockParameters;
}

/// Scale and minimum of a block; the latter is any number where there is none.
enum BlockParameters {
    Halves([u16; 2]),
    Full([f32; 2]),
}

impl IntegerFormat for Q8_0 {
    const SIGNED: bool = true;

    #[inline(always)]
    fn start(block: usize) -> usize {
        34 * block
    }

    #[inline(always)]
    fn piece(block: usize, piece: usize) -> usize {
        34 * block + 2 + PIECE * piece
    }

    #[inline(always)]
    fn split<U: DotUnit>(unit: U, pieces: [U::Whole; 2], _: [u32; GROUP]) -> [U::Whole; 2] {
        pieces.map(
            #[inline(always)]
            |piece| unit.lift(piece),
        )
    }

    #[inline(always)]
    unsafe fn factors(row: *const u8, block: usize) -> BlockParameters {
        // SAFETY: the caller's.
        BlockParameters::Halves(unsafe { [half_bits(row, 34 * block), 0] })
    }
}

impl IntegerFormat for Q4_0 {
    const OFFSET: i32 = 8;

    #[inline(always)]
    fn start(block: usize) -> usize {
        18 * block
    }

    #[inline(always)]
    fn piece(block: usize, _: usize) -> usize {
        18 * block + 2
    }

    #[inline(always)]
    fn split<U: DotUnit>(unit: U, [piece, _]: [U::Whole; 2], _: [u32; GROUP]) -> [U::Whole; 2] {
        [unit.nibbles(piece, [0; GROUP]), unit.nibbles(piece, [1; GROUP])]
    }

    #[inline(always)]
    unsafe fn factors(row: *const u8, block: usize) -> BlockParameters {
        // SAFETY: the caller's.
        BlockParameters::Halves(unsafe { [half_bits(row, 18 * block), 0] })
    }
}

impl IntegerFormat for Q4_1 {
    const MINIMUM: bool = true;

    #[inline(always)]
    fn start(block: usize) -> usize {
        20 * block
    }

    #[inline(always)]
    fn piece(block: usize, _: usize) -> usize {
        20 * block + 4
    }

    #[inline(always)]
    fn split<U: DotUnit>(unit: U, pieces: [U::Whole; 2], odd: [u32; GROUP]) -> [U::Whole; 2] {
        Q4_0::split(unit, pieces, odd)
    }

    #[inline(always)]
    unsafe fn factors(row: *const u8, block: usize) -> BlockParameters {
        // SAFETY: the caller's.
        BlockParameters::Halves(unsafe { [half_bits(row, 20 * block), half_bits(row, 20 * block + 2)] })
    }
}

/// The parts of a large block count as blocks. Two share 32 bytes, low bits first.
impl IntegerFormat for Q4K {
    const MINIMUM: bool = true;
    const HALVES: bool = false;

    #[inline(always)]
    fn start(block: usize) -> usize {
        144 * (block / 8)
    }

    #[inline(always)]
    fn piece(block: usize, piece: usize) -> usize {
        Self::start(block) + 16 + 32 * (block % 8 / 2) + PIECE * piece
    }

    #[inline(always)]
    fn split<U: DotUnit>(unit: U, [low, high]: [U::Whole; 2], odd: [u32; GROUP]) -> [U::Whole; 2] {
        [unit.nibbles(low, odd), unit.nibbles(high, odd)]
    }

    #[inline(always)]
    unsafe fn factors(row: *const u8, block: usize) -> BlockParameters {
        // SAFETY: the caller's; bytes need no alignment.
        let stored = unsafe { &*row.add(Self::start(block)).cast::<[u8; 144]>() };
        let [own, least] = scale_and_minimum(&stored[4..16], block % 8);
        BlockParameters::Full([half_at(stored, 0) * f32::from(own), -half_at(stored, 2) * f32::from(least)])
    }
}

/// The bits of the half-precision number `at` bytes from `row` on.
///
/// # Safety
/// They lie in valid memory.
#[inline(always)]
unsafe fn half_bits(row: *const u8, at: usize) -> u16 {
    // SAFETY: the caller's.
    u16::from_le(unsafe { row.add(at).cast::<u16>().read_unaligned() })
}

/// Four pieces, given where they begin.
///
/// # Safety
/// They lie in valid memory.
#[inline(always)]
unsafe fn together<U: DotUnit>(unit: U, [a, b, c, d]: [*const u8; GROUP]) -> U::Whole {
    // SAFETY: the caller's; vectors have no invalid bits.
    unsafe { unit.together([read(a), read(b), read(c), read(d)]) }
}

/// A piece.
///
/// # Safety
/// As [`together`].
#[inline(always)]
unsafe fn read(start: *const u8) -> __m128i {
    // SAFETY: the caller's.
    unsafe { start.cast::<__m128i>().read_unaligned() }
}

/// Vectors of 64 bytes or sixteen whole numbers, in four lanes of 128 bits.
trait DotUnit: Copy + Send + Sync {
    /// The same with numbers in f32.
    type Wide: Floats;
    type Whole: Copy;
    /// Rows of activations whose sums fit into the registers.
    const TILE: usize;
    /// What is added to bytes with signs before they are multiplied.
    const LIFT: i32;

    fn vectorize<R>(self, work: impl FnOnce() -> R) -> R;
    fn wide(self) -> Self::Wide;
    /// A piece for each lane.
    fn together(self, pieces: [__m128i; 4]) -> Self::Whole;
    fn load(self, bytes: &[i8; BYTES]) -> Self::Whole;
    fn store(self, whole: Self::Whole) -> [i8; BYTES];
    fn splat(self, number: i32) -> Self::Whole;
    /// A number for each lane.
    fn spread(self, numbers: &[i32; 4]) -> Self::Whole;
    fn add(self, a: Self::Whole, b: Self::Whole) -> Self::Whole;
    /// Bytes with signs as they are multiplied.
    fn lift(self, bytes: Self::Whole) -> Self::Whole;
    /// The upper four bits of each byte in the lanes where `upper` is 1, and the lower four where it is 0.
    fn nibbles(self, bytes: Self::Whole, upper: [u32; 4]) -> Self::Whole;
    /// Adds to each number of `sum` the products of its four bytes: of weights, which are lifted if they are `signed`, and
    /// of activations.
    fn dot(self, signed: bool, sum: Self::Whole, weights: Self::Whole, x: Self::Whole) -> Self::Whole;
    /// The numbers of both in turn, in each lane: of the lower halves, and of the upper ones.
    fn interleave(self, a: Self::Whole, b: Self::Whole) -> [Self::Whole; 2];
    /// Likewise, with two numbers of each at a time.
    fn interleave_pairs(self, a: Self::Whole, b: Self::Whole) -> [Self::Whole; 2];
    fn numbers(self, whole: Self::Whole) -> <Self::Wide as Floats>::Sixteen;
    /// The number of each lane.
    fn spread_numbers(self, numbers: &[f32; 4]) -> <Self::Wide as Floats>::Sixteen;
}

pulp::simd_type! {
    /// AVX-512 with products of bytes.
    struct Vnni {
        sse: "sse",
        sse2: "sse2",
        fxsr: "fxsr",
        sse3: "sse3",
        ssse3: "ssse3",
        sse4_1: "sse4.1",
        sse4_2: "sse4.2",
        popcnt: "popcnt",
        avx: "avx",
        avx2: "avx2",
        bmi1: "bmi1",
        bmi2: "bmi2",
        fma: "fma",
        lzcnt: "lzcnt",
        avx512f: "avx512f",
        avx512bw: "avx512bw",
        avx512cd: "avx512cd",
        avx512dq: "avx512dq",
        avx512vl: "avx512vl",
        avx512vnni: "avx512vnni",
    }
}

/// Vectors of 512 bits.
#[derive(Clone, Copy)]
struct Unit512 {
    wide: V4,
    own: Vnni,
}

impl DotUnit for Unit512 {
    type Wide = V4;
    type Whole = __m512i;
    const TILE: usize = 8;
    const LIFT: i32 = 128;

    #[inline(always)]
    fn vectorize<R>(self, work: impl FnOnce() -> R) -> R {
        self.own.vectorize(work)
    }

    #[inline(always)]
    fn wide(self) -> V4 {
        self.wide
    }

    #[inline(always)]
    fn together(self, [a, b, c, d]: [__m128i; 4]) -> __m512i {
        let (avx2, avx512f) = (self.wide.avx2, self.wide.avx512f);
        let low = avx2._mm256_inserti128_si256::<1>(self.wide.avx._mm256_castsi128_si256(a), b);
        let high = avx2._mm256_inserti128_si256::<1>(self.wide.avx._mm256_castsi128_si256(c), d);
        avx512f._mm512_inserti64x4::<1>(avx512f._mm512_castsi256_si512(low), high)
    }

    #[inline(always)]
    fn load(self, bytes: &[i8; BYTES]) -> __m512i {
        cast(*bytes)
    }

    #[inline(always)]
    fn store(self, whole: __m512i) -> [i8; BYTES] {
        cast(whole)
    }

    #[inline(always)]
    fn splat(self, number: i32) -> __m512i {
        self.wide.avx512f._mm512_set1_epi32(number)
    }

    #[inline(always)]
    fn spread(self, numbers: &[i32; 4]) -> __m512i {
        let avx512f = self.wide.avx512f;
        let lanes = cast([0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3]);
        avx512f._mm512_permutexvar_epi32(lanes, avx512f._mm512_castsi128_si512(cast(*numbers)))
    }

    #[inline(always)]
    fn add(self, a: __m512i, b: __m512i) -> __m512i {
        self.wide.avx512f._mm512_add_epi32(a, b)
    }

    #[inline(always)]
    fn lift(self, bytes: __m512i) -> __m512i {
        self.wide.avx512f._mm512_xor_si512(bytes, cast([i8::MIN; BYTES]))
    }

    #[inline(always)]
    fn nibbles(self, bytes: __m512i, upper: [u32; 4]) -> __m512i {
        let avx512f = self.wide.avx512f;
        let shifted = avx512f._mm512_srlv_epi32(bytes, cast(shifts(upper)));
        avx512f._mm512_and_si512(shifted, cast([15i8; BYTES]))
    }

    #[inline(always)]
    fn dot(self, _: bool, sum: __m512i, weights: __m512i, x: __m512i) -> __m512i {
        // SAFETY: there is a unit only if this processor has the instruction.
        unsafe { _mm512_dpbusd_epi32(sum, weights, x) }
    }

    #[inline(always)]
    fn interleave(self, a: __m512i, b: __m512i) -> [__m512i; 2] {
        let avx512f = self.wide.avx512f;
        [avx512f._mm512_unpacklo_epi32(a, b), avx512f._mm512_unpackhi_epi32(a, b)]
    }

    #[inline(always)]
    fn interleave_pairs(self, a: __m512i, b: __m512i) -> [__m512i; 2] {
        let avx512f = self.wide.avx512f;
        [avx512f._mm512_unpacklo_epi64(a, b), avx512f._mm512_unpackhi_epi64(a, b)]
    }

    #[inline(always)]
    fn numbers(self, whole: __m512i) -> __m512 {
        self.wide.avx512f._mm512_cvtepi32_ps(whole)
    }

    #[inline(always)]
    fn spread_numbers(self, numbers: &[f32; 4]) -> __m512 {
        cast(self.spread(&cast(*numbers)))
    }
}

impl DotUnit for V3 {
    type Wide = V3;
    type Whole = [__m256i; 2];
    const TILE: usize = 2;
    const LIFT: i32 = 0;

    #[inline(always)]
    fn vectorize<R>(self, work: impl FnOnce() -> R) -> R {
        pulp::x86::V3::vectorize(self, work)
    }

    #[inline(always)]
    fn wide(self) -> V3 {
        self
    }

    #[inline(always)]
    fn together(self, pieces: [__m128i; 4]) -> [__m256i; 2] {
        cast(pieces)
    }

    #[inline(always)]
    fn load(self, bytes: &[i8; BYTES]) -> [__m256i; 2] {
        cast(*bytes)
    }

    #[inline(always)]
    fn store(self, whole: [__m256i; 2]) -> [i8; BYTES] {
        cast(whole)
    }

    #[inline(always)]
    fn splat(self, number: i32) -> [__m256i; 2] {
        [self.avx._mm256_set1_epi32(number); 2]
    }

    #[inline(always)]
    fn spread(self, [a, b, c, d]: &[i32; 4]) -> [__m256i; 2] {
        cast([[*a; 4], [*b; 4], [*c; 4], [*d; 4]])
    }

    #[inline(always)]
    fn add(self, a: [__m256i; 2], b: [__m256i; 2]) -> [__m256i; 2] {
        [self.avx2._mm256_add_epi32(a[0], b[0]), self.avx2._mm256_add_epi32(a[1], b[1])]
    }

    #[inline(always)]
    fn lift(self, bytes: [__m256i; 2]) -> [__m256i; 2] {
        bytes
    }

    #[inline(always)]
    fn nibbles(self, bytes: [__m256i; 2], upper: [u32; 4]) -> [__m256i; 2] {
        let [low, high]: [__m256i; 2] = cast(shifts(upper));
        let (avx2, fifteen) = (self.avx2, self.avx._mm256_set1_epi8(15));
        let (low, high) = (avx2._mm256_srlv_epi32(bytes[0], low), avx2._mm256_srlv_epi32(bytes[1], high));
        [avx2._mm256_and_si256(low, fifteen), avx2._mm256_and_si256(high, fifteen)]
    }

    #[inline(always)]
    fn dot(self, signed: bool, sum: [__m256i; 2], weights: [__m256i; 2], x: [__m256i; 2]) -> [__m256i; 2] {
        [dot256(self, signed, sum[0], weights[0], x[0]), dot256(self, signed, sum[1], weights[1], x[1])]
    }

    #[inline(always)]
    fn interleave(self, a: [__m256i; 2], b: [__m256i; 2]) -> [[__m256i; 2]; 2] {
        let avx2 = self.avx2;
        [
            [avx2._mm256_unpacklo_epi32(a[0], b[0]), avx2._mm256_unpacklo_epi32(a[1], b[1])],
            [avx2._mm256_unpackhi_epi32(a[0], b[0]), avx2._mm256_unpackhi_epi32(a[1], b[1])],
        ]
    }

    #[inline(always)]
    fn interleave_pairs(self, a: [__m256i; 2], b: [__m256i; 2]) -> [[__m256i; 2]; 2] {
        let avx2 = self.avx2;
        [
            [avx2._mm256_unpacklo_epi64(a[0], b[0]), avx2._mm256_unpacklo_epi64(a[1], b[1])],
            [avx2._mm256_unpackhi_epi64(a[0], b[0]), avx2._mm256_unpackhi_epi64(a[1], b[1])],
        ]
    }

    #[inline(always)]
    fn numbers(self, whole: [__m256i; 2]) -> [__m256; 2] {
        [self.avx._mm256_cvtepi32_ps(whole[0]), self.avx._mm256_cvtepi32_ps(whole[1])]
    }

    #[inline(always)]
    fn spread_numbers(self, numbers: &[f32; 4]) -> [__m256; 2] {
        cast(self.spread(&cast(*numbers)))
    }
}

/// See [`DotUnit::dot`].
#[inline(always)]
fn dot256(unit: V3, signed: bool, sum: __m256i, weights: __m256i, x: __m256i) -> __m256i {
    let avx2 = unit.avx2;
    // The sign goes over to the activations. Two products fit into 16 bits: 2 · 128 · 127.
    let (weights, x) =
        if signed { (avx2._mm256_abs_epi8(weights), avx2._mm256_sign_epi8(x, weights)) } else { (weights, x) };
    let products = avx2._mm256_madd_epi16(avx2._mm256_maddubs_epi16(weights, x), unit.avx._mm256_set1_epi16(1));
    avx2._mm256_add_epi32(sum, products)
}

/// How far the numbers of each lane are shifted, so that the half in question is the lower one.
#[inline(always)]
fn shifts([a, b, c, d]: [u32; GROUP]) -> [[u32; 4]; GROUP] {
    [[4 * a; 4], [4 * b; 4], [4 * c; 4], [4 * d; 4]]
}
