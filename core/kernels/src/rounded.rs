//! Activations rounded to 8 bits, for products in whole numbers.
//!
//! Each block of 32 has a scale, the largest magnitude over 127, so a number is off by at most half a scale.

use crate::parallel::{Shared, tasks};
use crate::simd::simd;

/// Numbers that share a scale: a block of the formats that they are multiplied with.
pub(crate) const BLOCK: usize = 32;
/// Blocks that lie beside each other in memory, and whose products are summed beside each other.
pub(crate) const GROUP: usize = 4;
/// Numbers of a group.
const NUMBERS: usize = GROUP * BLOCK;
/// Half a block, which is what a lane of a vector holds.
const HALF: usize = BLOCK / 2;
/// Blocks without a larger magnitude count as zero: the inverse of their scale might overflow.
const SMALLEST: f32 = 1e-30;
/// The largest rounded number.
const LARGEST: f32 = 127.;

/// Where number `index` of a block lies among the numbers of a row: the first halves of a group come before the second.
#[inline(always)]
pub(crate) const fn place(block: usize, index: usize) -> usize {
    block / GROUP * NUMBERS + index / HALF * (NUMBERS / 2) + block % GROUP * HALF + index % HALF
}

/// Rows of rounded activations, filled up with zeros to whole groups.
pub(crate) struct RoundedRows {
    numbers: Vec<i8>,
    scales: Vec<f32>,
    sums: Vec<i32>,
    /// Of a row.
    blocks: usize,
}

/// One of them.
#[derive(Clone, Copy)]
pub(crate) struct RoundedRow<'a> {
    /// In the order of [`place`].
    pub(crate) numbers: &'a [i8],
    /// Of each block.
    pub(crate) scales: &'a [f32],
    /// The sum of the numbers of each block.
    pub(crate) sums: &'a [i32],
}

impl RoundedRows {
    /// Rounds rows of `columns` numbers, which is a whole number of blocks; on all threads.
    pub(crate) fn of(x: &[f32], columns: usize) -> Self {
        let (count, blocks) = (x.len() / columns, columns.div_ceil(NUMBERS) * GROUP);
        let mut rows = Self {
            numbers: vec![0; count * blocks * BLOCK],
            scales: vec![0.; count * blocks],
            sums: vec![0; count * blocks],
            blocks,
        };
        let numbers = Shared::new(rows.numbers.as_mut_ptr());
        let (scales, sums) = (Shared::new(rows.scales.as_mut_ptr()), Shared::new(rows.sums.as_mut_ptr()));
        tasks(count, x.len(), |row| {
            // SAFETY: every task writes its own row.
            let (numbers, scales, sums) = unsafe {
                (
                    std::slice::from_raw_parts_mut(numbers.at(row * blocks * BLOCK), blocks * BLOCK),
                    std::slice::from_raw_parts_mut(scales.at(row * blocks), blocks),
                    std::slice::from_raw_parts_mut(sums.at(row * blocks), blocks),
                )
            };
            simd(
                #[inline(always)]
                || {
                    for (block, x) in x[row * columns..][..columns].as_chunks().0.iter().enumerate() {
                        let rounded;
                        (scales[block], sums[block], rounded) = round(x);
                        for (half, rounded) in rounded.as_chunks::<HALF>().0.iter().enumerate() {
                            numbers[place(block, half * HALF)..][..HALF].copy_from_slice(rounded);
                        }
                    }
                },
            );
        });
        rows
    }

    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        self.scales.len() / self.blocks
    }

    /// How many blocks a row has, with those of zeros.
    pub(crate) fn blocks(&self) -> usize {
        self.blocks
    }

    /// The sums of all blocks of all rows.
    pub(crate) fn sums(&self) -> &[i32] {
        &self.sums
    }

    pub(crate) fn row(&self, row: usize) -> RoundedRow<'_> {
        RoundedRow {
            numbers: &self.numbers[row * self.blocks * BLOCK..][..self.blocks * BLOCK],
            scales: &self.scales[row * self.blocks..][..self.blocks],
            sums: &self.sums[row * self.blocks..][..self.blocks],
        }
    }
}

/// The scale of a block, the sum of its rounded numbers, and these.
#[inline(always)]
fn round(x: &[f32; BLOCK]) -> (f32, i32, [i8; BLOCK]) {
    const ROUND: f32 = 12_582_912.; // 1.5 · 2²³: adding it rounds to an integer, which the last bits then hold
    // Compared by their bits, what is not a number is the largest, and becomes the scale.
    let largest = f32::from_bits(x.iter().map(|x| x.abs().to_bits()).fold(0, u32::max));
    let (scale, inverse) = if largest < SMALLEST { (0., 0.) } else { (largest / LARGEST, LARGEST / largest) };
    let (mut numbers, mut sum) = ([0; BLOCK], 0);
    for (number, x) in numbers.iter_mut().zip(x) {
        *number = (x * inverse + ROUND).to_bits() as i8;
        sum += i32::from(*number);
    }
    (scale, sum, numbers)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_off_by_half_a_scale_at_most() {
        for exponent in [-29, -3, 0, 5, 38] {
            let size = 10f32.powi(exponent);
            let x: [f32; BLOCK] = std::array::from_fn(|index| ((index * 37 + 5) as f32).sin() * size);
            let (scale, sum, numbers) = round(&x);
            assert_eq!(sum, numbers.iter().map(|&number| i32::from(number)).sum::<i32>());
            assert_eq!(numbers.iter().map(|number| number.unsigned_abs()).max(), Some(127));
            for (x, number) in x.iter().zip(numbers) {
                let off = (x - f32::from(number) * scale).abs();
                assert!(off <= 0.5001 * scale, "{x} became {number} · {scale}");
            }
        }
    }

    #[test]
    fn ties_go_to_the_even_number() {
        let mut x = [0.; BLOCK];
        x[..5].copy_from_slice(&[127., 0.5, 1.5, -2.5, -127.]);
        assert_eq!(round(&x).2[..5], [127, 0, 2, -2, -127]);
    }

    #[test]
    fn what_is_not_finite_stays_so_and_what_is_tiny_is_zero() {
        for (value, finite) in [(f32::NAN, false), (f32::NEG_INFINITY, false), (1e-31, true), (0., true)] {
            let mut x = [0.; BLOCK];
            x[7] = value;
            let scale = round(&x).0;
            assert!(if finite { scale == 0. } else { !scale.is_finite() }, "{value} has the scale {scale}");
        }
    }

    #[test]
    fn every_number_has_its_own_place() {
        let columns = 5 * BLOCK;
        let x: Vec<f32> =
            (0..2 * columns).map(|at| if at / BLOCK % 5 == 4 { 127. } else { (at % 127) as f32 }).collect();
        let rows = RoundedRows::of(&x, columns);
        assert_eq!(rows.count(), 2);
        for row in 0..2 {
            let rounded = rows.row(row);
            let (scales, sums) = (rounded.scales, rounded.sums);
            assert_eq!((scales.len(), &scales[5..], &sums[5..]), (2 * GROUP, &[0.; 3][..], &[0; 3][..]));
            for (block, x) in x[row * columns..][..columns].as_chunks().0.iter().enumerate() {
                let (scale, sum, numbers) = round(x);
                assert_eq!((scales[block], sums[block]), (scale, sum));
                for (index, number) in numbers.into_iter().enumerate() {
                    assert_eq!(rounded.numbers[place(block, index)], number);
                }
            }
        }
    }
}
