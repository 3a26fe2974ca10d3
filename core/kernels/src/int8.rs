//! Products of quantized matrices and activations in whole numbers.
//!
//! Activations are rounded to 8 bits in blocks of 32. The products of a block with a block of 32 weights are summed
//! exactly, as whole numbers; the sums of blocks, each times both scales, are added in f32: by four chains of fused
//! multiply-adds, of every fourth block each, and these four in their order. So a result depends on no other row, on no
//! width of vectors and on no number of threads.
//!
//! A product is off by at most half the scale of each block of activations, times the magnitudes of the weights they meet.
//!
//! The plain code here says what the results are; where the processor has instructions for it, `int8_vectors` makes the
//! same ones.

use crate::encoding::{Encoding, half_at, scale_and_minimum};
#[cfg(target_arch = "x86_64")]
use crate::int8_vectors;
use crate::low_precision::EncodedMatrix;
use crate::parallel::{Shared, tasks};
use crate::rounded::{BLOCK, GROUP, RoundedRow, RoundedRows, place};
use crate::simd::simd;

/// Whether matrices in this encoding are made of whole numbers in blocks of 32.
pub(crate) fn suits(encoding: Encoding) -> bool {
    match encoding {
        Encoding::Q8_0 | Encoding::Q4_0 | Encoding::Q4_1 | Encoding::Q4K => true,
        Encoding::F16 | Encoding::Bf16 | Encoding::Q6K => false,
    }
}

/// `Y = X Wᵀ`, row-major, with the rows of `X` rounded; on all threads.
///
/// # Panics
/// The encoding of `W` does not [suit](suits).
pub(crate) fn multiply(y: &mut [f32], x: &[f32], w: EncodedMatrix) {
    let [count, columns] = w.size();
    debug_assert_eq!((x.len() % columns, y.len()), (0, x.len() / columns * count));
    let x = RoundedRows::of(x, columns);
    #[cfg(target_arch = "x86_64")]
    if int8_vectors::multiply(y, &x, w) {
        return;
    }
    plain(y, &x, w);
}

fn plain(y: &mut [f32], x: &RoundedRows, w: EncodedMatrix) {
    let [count, columns] = w.size();
    let target = Shared::new(y.as_mut_ptr());
    tasks(count, x.count() * count * columns, |row| {
        simd(
            #[inline(always)]
            || {
                for at in 0..x.count() {
                    let sum = dot(w.encoding(), w.row(row), columns / BLOCK, x.row(at));
                    // SAFETY: every task writes its own column of `Y`, which has one for each row of `W`.
                    unsafe { *target.at(at * count + row) = sum };
                }
            },
        );
    });
}

/// The product of a row of weights with one of activations.
#[inline(always)]
fn dot(encoding: Encoding, row: &[u8], blocks: usize, x: RoundedRow) -> f32 {
    let mut sums = [0f32; GROUP];
    for block in 0..blocks {
        let WholeBlock { numbers, scale, minimum } = WholeBlock::of(encoding, row, block);
        let product = |(index, &number): (usize, &i8)| i32::from(number) * i32::from(x.numbers[place(block, index)]);
        let exact: i32 = numbers.iter().enumerate().map(product).sum();
        let sum = &mut sums[block % GROUP];
        *sum = (exact as f32).mul_add(scale * x.scales[block], *sum);
        if let Some(minimum) = minimum {
            *sum = minimum.mul_add(x.scales[block] * x.sums[block] as f32, *sum);
        }
    }
    sums[0] + sums[1] + sums[2] + sums[3]
}

/// 32 weights: `scale · number + minimum`.
struct WholeBlock {
    numbers: [i8; BLOCK],
    scale: f32,
    minimum: Option<f32>,
}

impl WholeBlock {
    #[inline(always)]
    fn of(encoding: Encoding, row: &[u8], block: usize) -> Self {
        let (in_block, size) = encoding.block();
        let stored = &row[block * BLOCK / in_block * size..][..size];
        let nibble = |index: usize, first: usize| stored[first + index % 16] >> (index / 16 * 4) & 15;
        match encoding {
            Encoding::Q8_0 => Self {
                numbers: std::array::from_fn(|index| stored[2 + index].cast_signed()),
                scale: half_at(stored, 0),
                minimum: None,
            },
            Encoding::Q4_0 => Self {
                numbers: std::array::from_fn(|index| nibble(index, 2).cast_signed() - 8),
                scale: half_at(stored, 0),
                minimum: None,
            },
            Encoding::Q4_1 => Self {
                numbers: std::array::from_fn(|index| nibble(index, 4).cast_signed()),
                scale: half_at(stored, 0),
                minimum: Some(half_at(stored, 2)),
            },
            Encoding::Q4K => {
                let part = block % (in_block / BLOCK);
                let [own, least] = scale_and_minimum(&stored[4..16], part);
                let bits = &stored[16 + part / 2 * BLOCK..][..BLOCK];
                Self {
                    numbers: std::array::from_fn(|index| (bits[index] >> (part % 2 * 4) & 15).cast_signed()),
                    scale: half_at(stored, 0) * f32::from(own),
                    minimum: Some(-half_at(stored, 2) * f32::from(least)),
                }
            }
            Encoding::F16 | Encoding::Bf16 | Encoding::Q6K => unreachable!("asked for before"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arithmetic::{Level, limit};

    const ENCODINGS: [Encoding; 4] = [Encoding::Q8_0, Encoding::Q4_0, Encoding::Q4_1, Encoding::Q4K];

    /// Numbers that look random.
    struct Bytes(u64);

    impl Bytes {
        fn next(&mut self) -> u8 {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (self.0 >> 56) as u8
        }

        fn activations(&mut self, count: usize) -> Vec<f32> {
            (0..count).map(|_| f32::from(self.next()) / 64. - 2.).collect()
        }

        /// Any bytes, but scales and minimums of a size that weights have.
        fn weights(&mut self, encoding: Encoding, rows: usize, columns: usize) -> Vec<u8> {
            let (numbers, size) = encoding.block();
            let mut stored: Vec<u8> = (0..rows * columns / numbers * size).map(|_| self.next()).collect();
            for block in stored.chunks_exact_mut(size) {
                for at in if matches!(encoding, Encoding::Q4_1 | Encoding::Q4K) { [1, 3] } else { [1, 1] } {
                    block[at] = block[at] & 0x83 | 0x20;
                }
            }
            stored
        }
    }

    fn decoded(matrix: &EncodedMatrix) -> Vec<f32> {
        let [rows, columns] = matrix.size();
        let mut all = vec![0.; rows * columns];
        matrix.decode(0, &mut all);
        all
    }

    /// Sizes: whole groups and parts of them, rows that are not as many as are taken at a time.
    fn sizes(encoding: Encoding) -> [[usize; 2]; 3] {
        let (numbers, _) = encoding.block();
        [[70, 2 * numbers], [16, 18 * numbers], [3, 5 * numbers]]
    }

    #[test]
    fn every_level_and_number_of_threads_gives_the_bits_of_the_plain_code() {
        let mut bytes = Bytes(1);
        for encoding in ENCODINGS {
            for [rows, columns] in sizes(encoding) {
                let stored = bytes.weights(encoding, rows, columns);
                let w = EncodedMatrix::new(encoding, &stored, [rows, columns]);
                for count in [1, 2, 3, 5, 8, 17] {
                    let x = bytes.activations(count * columns);
                    let mut expected = vec![0.; count * rows];
                    plain(&mut expected, &RoundedRows::of(&x, columns), w);
                    for threads in [1, 3] {
                        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads");
                        for level in Level::ALL {
                            limit(level);
                            let mut found = vec![f32::NAN; count * rows];
                            pool.install(|| multiply(&mut found, &x, w));
                            let same = found.iter().zip(&expected).all(|(a, b)| a.to_bits() == b.to_bits());
                            assert!(same, "{encoding:?}, {count} rows, {threads} threads, {level:?}");
                        }
                    }
                }
            }
        }
        limit(Level::Bits512);
    }

    /// Every integer that the formats can hold meets the largest activations, of either sign.
    #[test]
    fn sums_of_a_block_are_exact() {
        let mut bytes = Bytes(2);
        for encoding in ENCODINGS {
            let columns = encoding.block().0;
            for round in 0..200 {
                let mut stored = bytes.weights(encoding, 1, columns);
                if round < 4 {
                    let first = if encoding == Encoding::Q4K { 16 } else { stored.len() % 16 };
                    stored[first..].fill([0x80, 0x7f, 0xff, 0x00][round]);
                }
                let mut x = bytes.activations(columns);
                if round < 8 {
                    x.fill([127., -127.][round % 2]);
                }
                let (rounded, blocks) = (RoundedRows::of(&x, columns), columns / BLOCK);
                let mut sums = [0f32; GROUP];
                for block in 0..blocks {
                    let weights = WholeBlock::of(encoding, &stored, block);
                    let numbers = &rounded.row(0);
                    let exact: i64 = (0..BLOCK)
                        .map(|index| {
                            i64::from(weights.numbers[index]) * i64::from(numbers.numbers[place(block, index)])
                        })
                        .sum();
                    assert!(exact.abs() < 1 << 24, "an f32 holds it");
                    let sum = &mut sums[block % GROUP];
                    *sum = (exact as f32).mul_add(weights.scale * numbers.scales[block], *sum);
                    if let Some(minimum) = weights.minimum {
                        *sum = minimum.mul_add(numbers.scales[block] * numbers.sums[block] as f32, *sum);
                    }
                }
                let mut found = [0.];
                multiply(&mut found, &x, EncodedMatrix::new(encoding, &stored, [1, columns]));
                assert_eq!(
                    found[0].to_bits(),
                    (sums[0] + sums[1] + sums[2] + sums[3]).to_bits(),
                    "{encoding:?}, {round}"
                );
            }
        }
    }

    #[test]
    fn whole_numbers_times_scales_are_the_weights() {
        let mut bytes = Bytes(3);
        for encoding in ENCODINGS {
            let columns = 2 * encoding.block().0;
            let stored = bytes.weights(encoding, 1, columns);
            let expected = decoded(&EncodedMatrix::new(encoding, &stored, [1, columns]));
            for (block, expected) in expected.chunks_exact(BLOCK).enumerate() {
                let WholeBlock { numbers, scale, minimum } = WholeBlock::of(encoding, &stored, block);
                for (number, expected) in numbers.into_iter().zip(expected) {
                    assert_eq!(f32::from(number) * scale + minimum.unwrap_or(0.), *expected, "{encoding:?}");
                }
            }
        }
    }

    /// At most half a scale of each block, times the magnitudes of its weights, and the rounding of the sums.
    #[test]
    fn a_product_is_off_by_what_rounding_the_activations_may_cost() {
        let mut bytes = Bytes(4);
        for encoding in ENCODINGS {
            let (rows, columns, count) = (20, 1024, 3);
            let stored = bytes.weights(encoding, rows, columns);
            let w = EncodedMatrix::new(encoding, &stored, [rows, columns]);
            let x = bytes.activations(count * columns);
            let (rounded, weights, mut found) = (RoundedRows::of(&x, columns), decoded(&w), vec![0.; count * rows]);
            multiply(&mut found, &x, w);
            for (index, found) in found.into_iter().enumerate() {
                let (x, w) = (&x[index / rows * columns..][..columns], &weights[index % rows * columns..][..columns]);
                let (mut exact, mut allowed) = (0f64, 0f64);
                for (at, (x, w)) in x.iter().zip(w).enumerate() {
                    let scale = f64::from(rounded.row(index / rows).scales[at / BLOCK]);
                    exact += f64::from(*x) * f64::from(*w);
                    // The minimum is added apart, so its magnitude counts as well in the rounding of the sums.
                    allowed += f64::from(w.abs()) * 0.5001 * scale + 1e-4 * f64::from(x.abs() * w.abs());
                }
                let off = (f64::from(found) - exact).abs();
                assert!(off <= allowed, "{encoding:?}: {found}, not {exact}: off by {off}, not {allowed}");
            }
        }
    }
}
