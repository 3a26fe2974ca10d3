//! Dropout whose random numbers are computed where they are used. Whether a number of a layer's input is kept follows
//! from a key, the layer and the number's place, by Philox4x32-10 (Salmon, Moraes, Dror and Shaw 2011, "Parallel random
//! numbers: as easy as 1, 2, 3"). So nothing is drawn in order, nothing is stored for the backward pass, and a device
//! computes the same bits.

use crate::parallel::rows;
use crate::real::Real;

/// How many words of 32 bits there are.
const WORDS: f64 = 4_294_967_296.;

/// The dropout mask `m` of one layer's input: 0 with probability `p`, else `1 / (1 - p)`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Dropout {
    /// The key of the generator.
    pub key: [u32; 2],
    /// Tells the layers of one pass apart.
    pub layer: u32,
    /// The probability of a zero, in `[0, 1)`.
    pub p: f32,
}

impl Dropout {
    /// A number is zeroed if its 32 random bits are less than this.
    pub fn threshold(self) -> u32 {
        (f64::from(self.p) * WORDS).round() as u32
    }

    /// What the numbers that are kept are multiplied with.
    pub fn factor(self) -> f64 {
        1. / (1. - f64::from(self.p))
    }
}

/// `m ∘ x`.
pub fn dropout<T: Real>(x: &[T], mask: Dropout) -> Vec<T> {
    let mut out = vec![T::zero(); x.len()];
    each(
        &mut out,
        x,
        mask,
        #[inline(always)]
        |out, kept| *out = kept,
    );
    out
}

/// `y += m ∘ x`.
pub fn add_dropout<T: Real>(y: &mut [T], x: &[T], mask: Dropout) {
    each(
        y,
        x,
        mask,
        #[inline(always)]
        |y, kept| *y += kept,
    );
}

/// Calls `f` with each number of `y` and that of `m ∘ x`.
#[inline(always)]
fn each<T: Real>(y: &mut [T], x: &[T], mask: Dropout, f: impl Fn(&mut T, T) + Sync) {
    let (threshold, factor) = (mask.threshold(), T::of(mask.factor()));
    rows(
        y,
        COUNTERS * 4,
        #[inline(always)]
        |first, part| {
            let x = &x[first * COUNTERS * 4..];
            for (index, (y, x)) in part.chunks_mut(COUNTERS * 4).zip(x.chunks(COUNTERS * 4)).enumerate() {
                let words = philox(mask.key, mask.layer.into(), ((first + index) * COUNTERS) as u64);
                for (place, (y, &x)) in y.iter_mut().zip(x).enumerate() {
                    let random = words[place % 4][place / 4];
                    f(y, if random < threshold { T::zero() } else { x * factor });
                }
            }
        },
    );
}

/// Counters that are worked on at once, in vectors.
const COUNTERS: usize = 16;

/// The four words of each of the counters `first..` of a layer: word `w` of counter `c` belongs to number `4 c + w`.
#[inline(always)]
fn philox(key: [u32; 2], layer: u64, first: u64) -> [[u32; COUNTERS]; 4] {
    let mut state = [[0; COUNTERS]; 4];
    for lane in 0..COUNTERS {
        let counter = first.wrapping_add(lane as u64);
        let words = [counter as u32, (counter >> 32) as u32, layer as u32, (layer >> 32) as u32];
        for (word, given) in state.iter_mut().zip(words) {
            word[lane] = given;
        }
    }
    let mut key = key;
    for _ in 0..10 {
        for lane in 0..COUNTERS {
            let [a, b, c, d] = state.map(|word| word[lane]);
            let (even, odd) = (u64::from(a) * 0xd251_1f53, u64::from(c) * 0xcd9e_8d57);
            let next = [(odd >> 32) as u32 ^ b ^ key[0], odd as u32, (even >> 32) as u32 ^ d ^ key[1], even as u32];
            for (word, next) in state.iter_mut().zip(next) {
                word[lane] = next;
            }
        }
        key = [key[0].wrapping_add(0x9e37_79b9), key[1].wrapping_add(0xbb67_ae85)];
    }
    state
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The known answers of the authors' library, Random123.
    #[test]
    fn its_words_are_those_of_the_reference() {
        let pi = ([0xa409_3822, 0x299f_31d0], 0x0370_7344_1319_8a2e, 0x85a3_08d3_243f_6a88);
        for ((key, layer, counter), expected) in [
            (([0; 2], 0, 0), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
            (([u32::MAX; 2], u64::MAX, u64::MAX), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
            (pi, [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]),
        ] {
            assert_eq!(philox(key, layer, counter).map(|word| word[0]), expected);
        }
    }

    #[test]
    fn it_zeroes_a_share_of_p_and_keeps_the_mean() {
        let ones = vec![1f32; 100_003];
        for p in [0., 0.1, 0.5] {
            let kept = dropout(&ones, Dropout { key: [3, 4], layer: 5, p });
            let zeros = kept.iter().filter(|&&x| x == 0.).count() as f64 / ones.len() as f64;
            assert!((zeros - f64::from(p)).abs() < 0.005, "{zeros} of the numbers are zero at p = {p}");
            assert!(kept.iter().all(|&x| x == 0. || x == 1. / (1. - p)));
        }
    }

    #[test]
    fn a_number_s_fate_depends_on_key_layer_and_place_alone() {
        let mask = Dropout { key: [3, 4], layer: 5, p: 0.5 };
        let ones = vec![1f32; 70_001];
        let all = dropout(&ones, mask);
        assert_eq!(dropout(&ones[..1003], mask), all[..1003]);
        let mut sum = ones.clone();
        add_dropout(&mut sum, &ones, mask);
        assert!(sum.iter().zip(&all).all(|(sum, kept)| *sum == 1. + kept));
        for other in [Dropout { key: [3, 5], ..mask }, Dropout { key: [2, 4], ..mask }, Dropout { layer: 6, ..mask }] {
            let equal = dropout(&ones, other).iter().zip(&all).filter(|(a, b)| a == b).count() as f64;
            assert!((equal / ones.len() as f64 - 0.5).abs() < 0.01, "{other:?} agrees in {equal} numbers");
        }
    }
}
