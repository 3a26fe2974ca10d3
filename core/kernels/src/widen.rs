//! Rows in low precision, widened to f32 in registers, on processors that have the instructions for it. The numbers are
//! those of the decoders in [`low_precision`](crate::low_precision), to the last bit.

use std::arch::x86_64::{__m128i, __m256, __m512, __m512i};

use pulp::cast;
use pulp::x86::{V3, V4};

use crate::arithmetic::{LANES, Level, widest};
use crate::encoding::{Encoding, half, half_at, scale_and_minimum};
use crate::simd::prefetch;

/// Numbers that are widened at a time: a block of most formats, a part of the larger ones.
const PART: usize = 2 * LANES;
/// Parts of a large block.
const PARTS: usize = 8;
/// How many rows ahead memory is asked for where rows are decoded: they are multiplied in between, a few at a time.
const ROWS_AHEAD: usize = 4;

/// Whether rows of `columns` numbers, a whole number of blocks, can be widened so on this processor.
pub(crate) fn suits(columns: usize) -> bool {
    columns.is_multiple_of(PART) && widest() >= Level::Bits256 && V3::try_new().is_some()
}

/// Decodes a row.
///
/// # Panics
/// The row does not [suit](suits).
pub(crate) fn decode(encoding: Encoding, bytes: &[u8], out: &mut [f32]) {
    run(encoding, Decode { bytes, out });
}

/// The products of some rows with `x`, each as sixteen partial sums: number `i` is summed in lane `i` modulo 16, by one
/// chain of fused multiply-adds.
///
/// # Panics
/// The rows do not [suit](suits).
pub(crate) fn dots<const ROWS: usize>(encoding: Encoding, rows: [&[u8]; ROWS], x: &[f32]) -> [[f32; LANES]; ROWS] {
    run(encoding, LaneSums { rows, x })
}

/// Work on rows of any format, with any unit.
trait Work {
    type Output;
    fn run<U: Unit, F: BlockFormat<SIZE>, const SIZE: usize, const PARTS: usize>(self, unit: U) -> Self::Output;
}

fn run<W: Work>(encoding: Encoding, work: W) -> W::Output {
    if widest() == Level::Bits512
        && let Some(unit) = V4::try_new()
    {
        return unit.vectorize(
            #[inline(always)]
            || with_unit(unit, encoding, work),
        );
    }
    let unit = V3::try_new().expect("asked for before");
    unit.vectorize(
        #[inline(always)]
        || with_unit(unit, encoding, work),
    )
}

#[inline(always)]
fn with_unit<U: Unit, W: Work>(unit: U, encoding: Encoding, work: W) -> W::Output {
    match encoding {
        Encoding::F16 => work.run::<U, F16, 64, 1>(unit),
        Encoding::Bf16 => work.run::<U, Bf16, 64, 1>(unit),
        Encoding::Q8_0 => work.run::<U, Q8_0, 34, 1>(unit),
        Encoding::Q4_0 => work.run::<U, Q4_0, 18, 1>(unit),
        Encoding::Q4_1 => work.run::<U, Q4_1, 20, 1>(unit),
        Encoding::Q6K => work.run::<U, Q6K, 210, PARTS>(unit),
        Encoding::Q4K => work.run::<U, Q4K, 144, PARTS>(unit),
    }
}

/// Puts the numbers of one row into memory.
struct Decode<'a> {
    bytes: &'a [u8],
    out: &'a mut [f32],
}

impl Work for Decode<'_> {
    type Output = ();

    #[inline(always)]
    fn run<U: Unit, F: BlockFormat<SIZE>, const SIZE: usize, const PARTS: usize>(self, unit: U) {
        let blocks = self.bytes.as_chunks::<SIZE>().0;
        let outs = self.out.as_chunks_mut::<PART>().0.as_chunks_mut::<PARTS>().0;
        for (block, outs) in blocks.iter().zip(outs) {
            for line in (0..SIZE).step_by(64) {
                prefetch(block.as_ptr().wrapping_add(ROWS_AHEAD * self.bytes.len() + line));
            }
            for (part, out) in outs.iter_mut().enumerate() {
                for (numbers, out) in F::widen(unit, block, part).into_iter().zip(out.as_chunks_mut().0) {
                    *out = unit.store(numbers);
                }
            }
        }
    }
}

/// Multiplies some rows with `x`: see [`dots`].
struct LaneSums<'a, const ROWS: usize> {
    rows: [&'a [u8]; ROWS],
    x: &'a [f32],
}

impl<const ROWS: usize> Work for LaneSums<'_, ROWS> {
    type Output = [[f32; LANES]; ROWS];

    #[inline(always)]
    fn run<U: Unit, F: BlockFormat<SIZE>, const SIZE: usize, const PARTS: usize>(self, unit: U) -> Self::Output {
        let xs = self.x.as_chunks::<PART>().0.as_chunks::<PARTS>().0;
        let rows = self.rows.map(|row| &row.as_chunks::<SIZE>().0[..xs.len()]);
        let mut sums = [unit.splat(0.); ROWS];
        for (at, xs) in xs.iter().enumerate() {
            for (sum, row) in sums.iter_mut().zip(rows) {
                for (part, x) in xs.iter().enumerate() {
                    for (numbers, x) in F::widen(unit, &row[at], part).into_iter().zip(x.as_chunks().0) {
                        *sum = unit.multiply_add(numbers, unit.load(x), *sum);
                    }
                }
            }
        }
        let mut lanes = [[0.; LANES]; ROWS];
        for (lanes, sum) in lanes.iter_mut().zip(sums) {
            *lanes = unit.store(sum);
        }
        lanes
    }
}

/// A way of storing numbers, in blocks that take `SIZE` bytes.
trait BlockFormat<const SIZE: usize> {
    /// The 32 numbers of a part of the block, which is all of it where blocks hold 32.
    fn widen<U: Unit>(unit: U, block: &[u8; SIZE], part: usize) -> [U::Sixteen; 2];
}

struct F16;
struct Bf16;
pub(crate) struct Q8_0;
pub(crate) struct Q4_0;
pub(crate) struct Q4_1;
struct Q6K;
pub(crate) struct Q4K;

impl BlockFormat<64> for F16 {
    #[inline(always)]
    fn widen<U: Unit>(unit: U, block: &[u8; 64], _: usize) -> [U::Sixteen; 2] {
        [unit.halves(at(block, 0)), unit.halves(at(block, 32))]
    }
}

impl BlockFormat<64> for Bf16 {
    #[inline(always)]
    fn widen<U: Unit>(unit: U, block: &[u8; 64], _: usize) -> [U::Sixteen; 2] {
        [unit.upper_halves(at(block, 0)), unit.upper_halves(at(block, 32))]
    }
}

impl BlockFormat<34> for Q8_0 {
    #[inline(always)]
    fn widen<U: Unit>(unit: U, block: &[u8; 34], _: usize) -> [U::Sixteen; 2] {
        let scale = unit.half(*at(block, 0));
        let [low, high] = [unit.signed_bytes(at(block, 2)), unit.signed_bytes(at(block, 18))];
        [unit.multiply(low, scale), unit.multiply(high, scale)]
    }
}

impl BlockFormat<18> for Q4_0 {
    #[inline(always)]
    fn widen<U: Unit>(unit: U, block: &[u8; 18], _: usize) -> [U::Sixteen; 2] {
        let (scale, eight) = (unit.half(*at(block, 0)), unit.splat(8.));
        unit.nibbles(
            at(block, 2),
            #[inline(always)]
            |bits| unit.multiply(unit.subtract(bits, eight), scale),
        )
    }
}

impl BlockFormat<20> for Q4_1 {
    #[inline(always)]
    fn widen<U: Unit>(unit: U, block: &[u8; 20], _: usize) -> [U::Sixteen; 2] {
        let (scale, least) = (unit.half(*at(block, 0)), unit.half(*at(block, 2)));
        unit.nibbles(
            at(block, 4),
            #[inline(always)]
            |bits| unit.add(unit.multiply(bits, scale), least),
        )
    }
}

impl BlockFormat<210> for Q6K {
    #[inline(always)]
    fn widen<U: Unit>(unit: U, block: &[u8; 210], part: usize) -> [U::Sixteen; 2] {
        let (scale, own) = (half_at(block, 208), [block[192 + 2 * part], block[193 + 2 * part]]);
        let (low, high) = (64 * (part / 4) + 32 * (part % 2), 128 + 32 * (part / 4));
        let shifts = [(4 * (part % 4 / 2)) as u8, (2 * (part % 4)) as u8];
        let begin = unit.six_bits(at(block, low), at(block, high), shifts);
        let end = unit.six_bits(at(block, low + 16), at(block, high + 16), shifts);
        let [first, second] = [scale * f32::from(own[0].cast_signed()), scale * f32::from(own[1].cast_signed())];
        [unit.multiply(unit.splat(first), begin), unit.multiply(unit.splat(second), end)]
    }
}

impl BlockFormat<144> for Q4K {
    #[inline(always)]
    fn widen<U: Unit>(unit: U, block: &[u8; 144], part: usize) -> [U::Sixteen; 2] {
        let [own, least] = scale_and_minimum(&block[4..16], part);
        let scale = unit.splat(half_at(block, 0) * f32::from(own));
        let minimum = unit.splat(half_at(block, 2) * f32::from(least));
        let first = 16 + 32 * (part / 2);
        let mut numbers = [scale; 2];
        for (numbers, first) in numbers.iter_mut().zip([first, first + 16]) {
            // Two parts share their bytes. What is made for the other one is not needed, and the compiler leaves it out.
            let [lower, upper] = unit.nibbles(
                at(block, first),
                #[inline(always)]
                |bits| unit.subtract(unit.multiply(scale, bits), minimum),
            );
            *numbers = if part.is_multiple_of(2) { lower } else { upper };
        }
        numbers
    }
}

/// `N` bytes from `first` on.
#[inline(always)]
fn at<const N: usize>(bytes: &[u8], first: usize) -> &[u8; N] {
    bytes[first..].first_chunk().expect("the block has them")
}

/// Vectors of sixteen numbers.
pub(crate) trait Unit: Copy {
    type Sixteen: Copy;
    fn load(self, numbers: &[f32; LANES]) -> Self::Sixteen;
    fn store(self, numbers: Self::Sixteen) -> [f32; LANES];
    fn splat(self, number: f32) -> Self::Sixteen;
    fn add(self, a: Self::Sixteen, b: Self::Sixteen) -> Self::Sixteen;
    fn subtract(self, a: Self::Sixteen, b: Self::Sixteen) -> Self::Sixteen;
    fn multiply(self, a: Self::Sixteen, b: Self::Sixteen) -> Self::Sixteen;
    /// `a b + c`, rounded once.
    fn multiply_add(self, a: Self::Sixteen, b: Self::Sixteen, c: Self::Sixteen) -> Self::Sixteen;
    /// Sixteen times one number of half precision.
    fn half(self, bits: [u8; 2]) -> Self::Sixteen;
    /// Numbers of half precision.
    fn halves(self, bits: &[u8; 32]) -> Self::Sixteen;
    /// Numbers of which the upper halves are given.
    fn upper_halves(self, bits: &[u8; 32]) -> Self::Sixteen;
    /// Bytes with signs.
    fn signed_bytes(self, bytes: &[u8; 16]) -> Self::Sixteen;
    /// What `value` makes of the lower four bits of each byte, and of the upper four.
    fn nibbles(self, bytes: &[u8; 16], value: impl Fn(Self::Sixteen) -> Self::Sixteen) -> [Self::Sixteen; 2];
    /// Numbers of six bits less 32, of which four are the lower ones of `low` and two those of `high`, each shifted down.
    fn six_bits(self, low: &[u8; 16], high: &[u8; 16], shifts: [u8; 2]) -> Self::Sixteen;
}

impl Unit for V4 {
    type Sixteen = __m512;

    #[inline(always)]
    fn load(self, numbers: &[f32; LANES]) -> __m512 {
        cast(*numbers)
    }

    #[inline(always)]
    fn store(self, numbers: __m512) -> [f32; LANES] {
        cast(numbers)
    }

    #[inline(always)]
    fn splat(self, number: f32) -> __m512 {
        self.avx512f._mm512_set1_ps(number)
    }

    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        self.avx512f._mm512_add_ps(a, b)
    }

    #[inline(always)]
    fn subtract(self, a: __m512, b: __m512) -> __m512 {
        self.avx512f._mm512_sub_ps(a, b)
    }

    #[inline(always)]
    fn multiply(self, a: __m512, b: __m512) -> __m512 {
        self.avx512f._mm512_mul_ps(a, b)
    }

    #[inline(always)]
    fn multiply_add(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        self.avx512f._mm512_fmadd_ps(a, b, c)
    }

    #[inline(always)]
    fn half(self, bits: [u8; 2]) -> __m512 {
        self.avx512f._mm512_cvtph_ps(self.avx._mm256_set1_epi16(i16::from_le_bytes(bits)))
    }

    #[inline(always)]
    fn halves(self, bits: &[u8; 32]) -> __m512 {
        self.avx512f._mm512_cvtph_ps(cast(*bits))
    }

    #[inline(always)]
    fn upper_halves(self, bits: &[u8; 32]) -> __m512 {
        let bits: __m512i = self.avx512f._mm512_cvtepu16_epi32(cast(*bits));
        cast(self.avx512f._mm512_slli_epi32::<16>(bits))
    }

    #[inline(always)]
    fn signed_bytes(self, bytes: &[u8; 16]) -> __m512 {
        self.avx512f._mm512_cvtepi32_ps(self.avx512f._mm512_cvtepi8_epi32(cast(*bytes)))
    }

    /// All sixteen values are made once and then looked up, by the lower four bits of each index.
    #[inline(always)]
    fn nibbles(self, bytes: &[u8; 16], value: impl Fn(__m512) -> __m512) -> [__m512; 2] {
        let values = value(cast([0f32, 1., 2., 3., 4., 5., 6., 7., 8., 9., 10., 11., 12., 13., 14., 15.]));
        let low = self.avx512f._mm512_cvtepu8_epi32(cast(*bytes));
        let high = self.avx512f._mm512_srli_epi32::<4>(low);
        [self.avx512f._mm512_permutexvar_ps(low, values), self.avx512f._mm512_permutexvar_ps(high, values)]
    }

    #[inline(always)]
    fn six_bits(self, low: &[u8; 16], high: &[u8; 16], shifts: [u8; 2]) -> __m512 {
        self.signed_bytes(&six_bits(*self, low, high, shifts))
    }
}

impl Unit for V3 {
    type Sixteen = [__m256; 2];

    #[inline(always)]
    fn load(self, numbers: &[f32; LANES]) -> [__m256; 2] {
        cast(*numbers)
    }

    #[inline(always)]
    fn store(self, numbers: [__m256; 2]) -> [f32; LANES] {
        cast(numbers)
    }

    #[inline(always)]
    fn splat(self, number: f32) -> [__m256; 2] {
        [self.avx._mm256_set1_ps(number); 2]
    }

    #[inline(always)]
    fn add(self, a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
        [self.avx._mm256_add_ps(a[0], b[0]), self.avx._mm256_add_ps(a[1], b[1])]
    }

    #[inline(always)]
    fn subtract(self, a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
        [self.avx._mm256_sub_ps(a[0], b[0]), self.avx._mm256_sub_ps(a[1], b[1])]
    }

    #[inline(always)]
    fn multiply(self, a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
        [self.avx._mm256_mul_ps(a[0], b[0]), self.avx._mm256_mul_ps(a[1], b[1])]
    }

    #[inline(always)]
    fn multiply_add(self, a: [__m256; 2], b: [__m256; 2], c: [__m256; 2]) -> [__m256; 2] {
        [self.fma._mm256_fmadd_ps(a[0], b[0], c[0]), self.fma._mm256_fmadd_ps(a[1], b[1], c[1])]
    }

    #[inline(always)]
    fn half(self, bits: [u8; 2]) -> [__m256; 2] {
        self.splat(half(u16::from_le_bytes(bits)))
    }

    #[inline(always)]
    fn halves(self, bits: &[u8; 32]) -> [__m256; 2] {
        let bits: [u16; LANES] = cast(*bits);
        let mut numbers = [0.; LANES];
        for (number, bits) in numbers.iter_mut().zip(bits) {
            *number = half(bits);
        }
        cast(numbers)
    }

    #[inline(always)]
    fn upper_halves(self, bits: &[u8; 32]) -> [__m256; 2] {
        let [low, high] = cast(*bits);
        let [low, high] = [self.avx2._mm256_cvtepu16_epi32(low), self.avx2._mm256_cvtepu16_epi32(high)];
        [cast(self.avx2._mm256_slli_epi32::<16>(low)), cast(self.avx2._mm256_slli_epi32::<16>(high))]
    }

    #[inline(always)]
    fn signed_bytes(self, bytes: &[u8; 16]) -> [__m256; 2] {
        let [low, high] = eights(bytes);
        let [low, high] = [self.avx2._mm256_cvtepi8_epi32(low), self.avx2._mm256_cvtepi8_epi32(high)];
        [self.avx._mm256_cvtepi32_ps(low), self.avx._mm256_cvtepi32_ps(high)]
    }

    #[inline(always)]
    fn nibbles(self, bytes: &[u8; 16], value: impl Fn([__m256; 2]) -> [__m256; 2]) -> [[__m256; 2]; 2] {
        let (low, fifteen) = (cast(*bytes), self.sse2._mm_set1_epi8(15));
        let high = self.sse2._mm_srli_epi16::<4>(low);
        let [low, high] = [self.sse2._mm_and_si128(low, fifteen), self.sse2._mm_and_si128(high, fifteen)];
        [value(self.signed_bytes(&cast(low))), value(self.signed_bytes(&cast(high)))]
    }

    #[inline(always)]
    fn six_bits(self, low: &[u8; 16], high: &[u8; 16], shifts: [u8; 2]) -> [__m256; 2] {
        self.signed_bytes(&six_bits(self, low, high, shifts))
    }
}

/// See [`Unit::six_bits`].
#[inline(always)]
fn six_bits(unit: V3, low: &[u8; 16], high: &[u8; 16], shifts: [u8; 2]) -> [u8; 16] {
    let sse2 = unit.sse2;
    let low = sse2._mm_srl_epi16(cast(*low), sse2._mm_cvtsi32_si128(i32::from(shifts[0])));
    let high = sse2._mm_srl_epi16(cast(*high), sse2._mm_cvtsi32_si128(i32::from(shifts[1])));
    let low = sse2._mm_and_si128(low, sse2._mm_set1_epi8(15));
    let high = sse2._mm_slli_epi16::<4>(sse2._mm_and_si128(high, sse2._mm_set1_epi8(3)));
    cast(sse2._mm_sub_epi8(sse2._mm_or_si128(low, high), sse2._mm_set1_epi8(32)))
}

/// Both halves of sixteen bytes, in the lower half of a register each.
#[inline(always)]
fn eights(bytes: &[u8; 16]) -> [__m128i; 2] {
    let [low, high]: [u64; 2] = cast(*bytes);
    [cast([low, 0]), cast([high, 0])]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::low_precision::EncodedMatrix;

    /// Work, by the widest unit or by AVX2 alone.
    fn by<W: Work>(wide: bool, encoding: Encoding, work: W) -> Option<W::Output> {
        if wide {
            let unit = V4::try_new()?;
            return Some(unit.vectorize(|| with_unit(unit, encoding, work)));
        }
        let unit = V3::try_new()?;
        Some(unit.vectorize(|| with_unit(unit, encoding, work)))
    }

    /// Any bytes at all, so scales that are subnormal and infinite as well: either unit that this processor has widens to the
    /// bits of the plain decoders, and its sums are those of the plain numbers.
    #[test]
    fn numbers_and_sums_have_the_bits_of_the_plain_decoders() {
        const WIDTH: usize = 3 * 256;
        const ROWS: usize = 4;
        let mut state = 1u64;
        let mut byte = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 56) as u8
        };
        let x: Vec<f32> = (0..WIDTH).map(|_| f32::from(byte()) / 64. - 2.).collect();
        let same = |found: &[f32], expected: &[f32]| {
            let equal = |(a, b): (&f32, &f32)| a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan();
            found.len() == expected.len() && found.iter().zip(expected).all(equal)
        };
        for encoding in Encoding::ALL {
            let (numbers, size) = encoding.block();
            let length = WIDTH / numbers * size;
            for _ in 0..200 {
                let stored: Vec<u8> = (0..ROWS * length).map(|_| byte()).collect();
                let matrix = EncodedMatrix::new(encoding, &stored, [ROWS, WIDTH]);
                let rows: [&[u8]; ROWS] = std::array::from_fn(|row| &stored[row * length..][..length]);
                let mut expected = vec![0.; WIDTH];
                for wide in [false, true] {
                    let Some(sums) = by(wide, encoding, LaneSums { rows, x: &x }) else { continue };
                    for (row, sums) in rows.into_iter().zip(sums) {
                        matrix.decode_bytes(row, &mut expected);
                        let mut found = vec![0.; WIDTH];
                        by(wide, encoding, Decode { bytes: row, out: &mut found });
                        assert!(same(&found, &expected), "{encoding:?}, wide {wide}: {found:?}, not {expected:?}");
                        let mut lanes = [0f32; LANES];
                        for (at, (number, x)) in expected.iter().zip(&x).enumerate() {
                            lanes[at % LANES] = number.mul_add(*x, lanes[at % LANES]);
                        }
                        assert!(same(&sums, &lanes), "{encoding:?}, wide {wide}: {sums:?}, not {lanes:?}");
                    }
                }
            }
        }
    }
}
