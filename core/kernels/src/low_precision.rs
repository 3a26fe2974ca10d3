//! Matrices in low precision: half precision, or quantized in blocks of small integers with a common scale. The formats
//! of quantized blocks are those of the GGML library.
//!
//! Numbers are decoded right before they are multiplied, a few rows at a time or in the registers that multiply them, so
//! that they pass through memory as they are stored. The plain code here says what they are; where the processor has
//! instructions for it, `widen` makes the same numbers.

use std::fmt::Debug;

use crate::arithmetic::LANES;
pub use crate::encoding::Encoding;
use crate::encoding::{half, half_at, scale_and_minimum, upper_half};
#[cfg(target_arch = "x86_64")]
use crate::matrix::RawMatrix;
use crate::parallel::rows;
use crate::simd::simd;
#[cfg(target_arch = "x86_64")]
use crate::widen;

/// Decodes a row block by block. It is a macro, since a function that takes `decode` as an argument would call it, and what is
/// called is compiled without the vectors of the caller.
macro_rules! each_block {
    ($bytes:expr, $out:expr, $decode:ident) => {
        for (block, out) in $bytes.as_chunks().0.iter().zip($out.as_chunks_mut().0) {
            $decode(apart(block), out);
        }
    };
}

/// Decodes a row of 16-bit numbers.
macro_rules! decode_bits {
    ($bytes:expr, $out:expr, $number:ident) => {
        for (bytes, out) in $bytes.as_chunks::<2>().0.iter().zip($out) {
            *out = $number(u16::from_ne_bytes(*bytes));
        }
    };
}

/// A matrix of encoded rows.
#[derive(Clone, Copy)]
pub struct EncodedMatrix<'a> {
    encoding: Encoding,
    bytes: &'a [u8],
    rows: usize,
    columns: usize,
}

impl Debug for EncodedMatrix<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} × {} in {:?}", self.rows, self.columns, self.encoding)
    }
}

impl<'a> EncodedMatrix<'a> {
    /// `rows × columns` in row-major order.
    ///
    /// # Panics
    /// `columns` is no whole number of blocks or zero, or `bytes` has another size.
    pub fn new(encoding: Encoding, bytes: &'a [u8], [rows, columns]: [usize; 2]) -> Self {
        let (numbers, size) = encoding.block();
        assert!(columns > 0 && columns.is_multiple_of(numbers), "rows of {columns} numbers in blocks of {numbers}");
        assert_eq!(bytes.len(), rows * (columns / numbers) * size, "a matrix of another size");
        Self { encoding, bytes, rows, columns }
    }

    /// The same of 16-bit numbers, given their bits.
    ///
    /// # Panics
    /// `encoding` is not one of 16 bits, or `bits` has another size.
    pub fn of_bits(encoding: Encoding, bits: &'a [u16], size: [usize; 2]) -> Self {
        assert_eq!(encoding.block(), (1, 2), "{encoding:?} does not have 16 bits");
        // SAFETY: two bytes for each element, and any byte is valid.
        let bytes = unsafe { std::slice::from_raw_parts(bits.as_ptr().cast(), size_of_val(bits)) };
        Self::new(encoding, bytes, size)
    }

    /// `[rows, columns]`.
    pub fn size(&self) -> [usize; 2] {
        [self.rows, self.columns]
    }

    /// The bits of bf16 numbers, of which nothing says that they are aligned.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn bf16_bits(&self) -> Option<RawMatrix<*const u16>> {
        let bits = RawMatrix::row_major(self.bytes.as_ptr().cast(), self.size(), self.columns);
        (self.encoding == Encoding::Bf16).then_some(bits)
    }

    /// Decodes the rows from `first` on into `out`, on all threads.
    ///
    /// # Panics
    /// `out` is no whole number of rows, or there are not so many.
    pub fn decode(&self, first: usize, out: &mut [f32]) {
        assert!(out.len().is_multiple_of(self.columns), "a part of a row");
        rows(out, self.columns, |at, part| {
            for (index, out) in part.chunks_exact_mut(self.columns).enumerate() {
                self.decode_row(first + at + index, out);
            }
        });
    }

    /// Decodes one row.
    pub(crate) fn decode_row(&self, row: usize, out: &mut [f32]) {
        let bytes = self.row(row);
        #[cfg(target_arch = "x86_64")]
        if self.has_dots() {
            return widen::decode(self.encoding, bytes, out);
        }
        simd(
            #[inline(always)]
            || self.decode_bytes(bytes, out),
        );
    }

    /// As [`Self::decode_row`], given its bytes, by plain code.
    #[inline(always)]
    pub(crate) fn decode_bytes(&self, bytes: &[u8], out: &mut [f32]) {
        match self.encoding {
            Encoding::F16 => decode_bits!(bytes, out, half),
            Encoding::Bf16 => decode_bits!(bytes, out, upper_half),
            Encoding::Q8_0 => each_block!(bytes, out, decode_q8_0),
            Encoding::Q4_0 => each_block!(bytes, out, decode_q4_0),
            Encoding::Q4_1 => each_block!(bytes, out, decode_q4_1),
            Encoding::Q6K => each_block!(bytes, out, decode_q6k),
            Encoding::Q4K => each_block!(bytes, out, decode_q4k),
        }
    }

    /// Whether this processor can multiply rows without decoding them to memory.
    pub(crate) fn has_dots(&self) -> bool {
        #[cfg(target_arch = "x86_64")]
        {
            widen::suits(self.columns)
        }
        #[cfg(not(target_arch = "x86_64"))]
        false
    }

    /// The products of some rows with `x`, as partial sums in lanes.
    ///
    /// # Panics
    /// The processor cannot: see [`Self::has_dots`].
    #[cfg_attr(not(target_arch = "x86_64"), expect(unused_variables, reason = "other processors do not widen so"))]
    pub(crate) fn dots<const N: usize>(&self, rows: [usize; N], x: &[f32]) -> [[f32; LANES]; N] {
        #[cfg(target_arch = "x86_64")]
        {
            widen::dots(self.encoding, rows.map(|row| self.row(row)), x)
        }
        #[cfg(not(target_arch = "x86_64"))]
        unreachable!("asked for before")
    }

    /// How the numbers are stored.
    pub(crate) fn encoding(&self) -> Encoding {
        self.encoding
    }

    /// The bytes of a row.
    pub(crate) fn row(&self, row: usize) -> &'a [u8] {
        let (numbers, size) = self.encoding.block();
        let length = self.columns / numbers * size;
        &self.bytes[row * length..][..length]
    }
}

/// The same place. It keeps the compiler from making one vector of numbers of several blocks, which it would have to
/// collect byte by byte: several times slower than one vector of neighbours.
#[inline(always)]
fn apart<T: ?Sized>(place: &T) -> &T {
    std::hint::black_box(place)
}

/// Fills sixteen numbers from `at` on by their index. They are put into an array of their own first, which nothing else
/// can point into: else the compiler works number by number.
#[inline(always)]
fn put(out: &mut [f32], at: usize, number: impl Fn(usize) -> f32) {
    let mut numbers = [0.; 16];
    for (index, place) in numbers.iter_mut().enumerate() {
        *place = number(index);
    }
    out[at..at + 16].copy_from_slice(&numbers);
}

#[inline(always)]
fn decode_q8_0(block: &[u8; 34], out: &mut [f32; 32]) {
    let (scale, bytes) = (half_at(block, 0), &block[2..]);
    for at in [0, 16] {
        put(out, at, |index| f32::from(bytes[at + index].cast_signed()) * scale);
    }
}

#[inline(always)]
fn decode_q4_0(block: &[u8; 18], out: &mut [f32; 32]) {
    let (scale, bits) = (half_at(block, 0), &block[2..]);
    put(out, 0, |index| (i32::from(bits[index] & 15) - 8) as f32 * scale);
    put(out, 16, |index| (i32::from(bits[index] >> 4) - 8) as f32 * scale);
}

#[inline(always)]
fn decode_q4_1(block: &[u8; 20], out: &mut [f32; 32]) {
    let (scale, minimum, bits) = (half_at(block, 0), half_at(block, 2), &block[4..]);
    put(out, 0, |index| f32::from(bits[index] & 15) * scale + minimum);
    put(out, 16, |index| f32::from(bits[index] >> 4) * scale + minimum);
}

#[inline(always)]
fn decode_q6k(block: &[u8; 210], out: &mut [f32; 256]) {
    let scale = half_at(block, 208);
    // Sixteen numbers share a scale. Their low bits are in the first 128 bytes, 4 each, and their high bits in the next
    // 64, 2 each.
    for part in 0..16 {
        let (half, quarter, at) = (part / 8, part % 8 / 2, 16 * (part % 2));
        let low = sixteen(block, 64 * half + 32 * (quarter % 2) + at);
        let high = sixteen(block, 128 + 32 * half + at);
        let (low_shift, high_shift) = (4 * (quarter / 2), 2 * quarter);
        let scale = scale * f32::from(block[192 + part].cast_signed());
        put(out, 16 * part, |index| {
            let bits = i32::from(low[index]) >> low_shift & 15 | (i32::from(high[index]) >> high_shift & 3) << 4;
            scale * (bits - 32) as f32
        });
    }
}

#[inline(always)]
fn decode_q4k(block: &[u8; 144], out: &mut [f32; 256]) {
    let (scale, minimum, scales) = (half_at(block, 0), half_at(block, 2), &block[4..16]);
    for part in 0..8 {
        let [own, least] = scale_and_minimum(scales, part);
        let (scale, minimum) = (scale * f32::from(own), minimum * f32::from(least));
        // Two parts share 32 bytes, low bits first.
        let shift = 4 * (part % 2);
        for at in [0, 16] {
            let bits = sixteen(block, 16 + 32 * (part / 2) + at);
            put(out, 32 * part + at, |index| scale * (i32::from(bits[index]) >> shift & 15) as f32 - minimum);
        }
    }
}

/// Sixteen bytes from `at` on.
#[inline(always)]
fn sixteen(block: &[u8], at: usize) -> &[u8; 16] {
    apart(block[at..].first_chunk().expect("the block has them"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_has_the_size_that_is_declared() {
        for encoding in Encoding::ALL {
            let (numbers, bytes) = encoding.block();
            let stored = vec![0; 6 * bytes];
            let matrix = EncodedMatrix::new(encoding, &stored, [3, 2 * numbers]);
            let mut out = vec![1.; 4 * numbers];
            matrix.decode(1, &mut out);
            assert!(out.iter().all(|&x| x == 0. || encoding == Encoding::Q4_0), "{encoding:?}: {out:?}");
        }
    }
}
