//! Sums and maxima in a fixed order, which the compiler still turns into vector instructions.

use crate::real::Real;

/// Interleaved partial sums: enough to fill the vectors and to hide the latency of addition.
const LANES: usize = 32;

/// `Σ f(a, b, …)` over the elements at one place of each of `inputs`, which have one length, in an order that is fixed and
/// still leaves room for vectors.
///
/// Blocks are arrays, so that no bound is checked between two lanes, and no lane is chosen at run time where all of a block
/// is there: either would keep the sums in memory, one number at a time.
#[inline(always)]
pub fn lanes<I: Copy, T: Real, const N: usize>(inputs: [&[I]; N], f: impl Fn([I; N]) -> T) -> T {
    const HALF: usize = LANES / 2;
    let count = inputs.first().map_or(0, |input| input.len());
    let (blocks, rest) = (
        inputs.map(|input| input[..count].as_chunks::<LANES>().0),
        inputs.map(|input| &input[count - count % LANES..count]),
    );
    let mut lanes = [T::zero(); LANES];
    for block in 0..count / LANES {
        let values = blocks.map(|blocks| &blocks[block]);
        for (lane, sum) in lanes.iter_mut().enumerate() {
            *sum += f(values.map(|values| values[lane]));
        }
    }
    // Half a block more, the width of many a head, is a vector still.
    let half = if count % LANES >= HALF { HALF } else { 0 };
    if half > 0 {
        let values = rest.map(|rest| rest.first_chunk::<HALF>().expect("half a block is there"));
        for (lane, sum) in lanes[..HALF].iter_mut().enumerate() {
            *sum += f(values.map(|values| values[lane]));
        }
    }
    if half < count % LANES {
        let mut sums = lanes;
        for at in half..count % LANES {
            sums[at] += f(rest.map(|rest| rest[at]));
        }
        lanes = sums;
    }
    let mut width = HALF;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] += lanes[lane + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// `Σ values`.
#[inline(always)]
pub fn sum<T: Real>(values: &[T]) -> T {
    lanes([values], |[value]| value)
}

/// `Σ f(value)`.
#[inline(always)]
pub fn sum_by<T: Real>(values: &[T], f: impl Fn(T) -> T) -> T {
    lanes([values], |[value]| f(value))
}

/// `Σ a b`.
#[inline(always)]
pub fn dot<T: Real>(a: &[T], b: &[T]) -> T {
    lanes([a, b], |[a, b]| a * b)
}

/// `Σ a b c`.
#[inline(always)]
pub fn dot3<T: Real>(a: &[T], b: &[T], c: &[T]) -> T {
    lanes([a, b, c], |[a, b, c]| a * b * c)
}

/// The largest of `values`, negative infinity if there is none.
#[inline(always)]
pub fn max<T: Real>(values: &[T]) -> T {
    let greater = |a: T, b: T| if b > a { b } else { a };
    let (chunks, rest) = values.as_chunks::<32>();
    let mut lanes = [T::neg_infinity(); 32];
    for chunk in chunks {
        for (lane, &value) in lanes.iter_mut().zip(chunk) {
            *lane = greater(*lane, value);
        }
    }
    lanes.into_iter().chain(rest.iter().copied()).fold(T::neg_infinity(), greater)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The order of the sum is part of the arithmetic: lane `i` sums the elements `i`, `i + 32` and so on, then halves of the
    /// lanes are added to each other.
    #[test]
    fn the_order_of_a_sum_is_fixed() {
        for count in (0..70).chain([95, 96, 100, 112, 113, 1000]) {
            let value = |at: usize| {
                ((at * 7919 % 1000) as f32 / 997. - 0.3) * 10f32.powi(i32::try_from(at % 9).expect("a digit") - 4)
            };
            let (a, b): (Vec<f32>, Vec<f32>) = (0..count).map(|at| (value(at), value(at + 31))).unzip();
            let mut lanes = [0f32; LANES];
            for at in 0..count {
                lanes[at % LANES] += a[at] * b[at];
            }
            for width in [16, 8, 4, 2, 1] {
                for lane in 0..width {
                    lanes[lane] += lanes[lane + width];
                }
            }
            assert_eq!(dot(&a, &b).to_bits(), lanes[0].to_bits(), "{count} elements");
        }
    }

    #[test]
    fn sum_and_max_see_every_value() {
        let values: Vec<f64> = (0..101).map(|i| f64::from((i * 7) % 101)).collect();
        assert_eq!(sum(&values), 100. * 101. / 2.);
        assert_eq!(dot(&values, &values), sum_by(&values, |x| x * x));
        assert_eq!(dot3(&values, &values, &values), sum_by(&values, |x| x * x * x));
        assert_eq!(max(&values), 100.);
        assert_eq!(max::<f32>(&[]), f32::NEG_INFINITY);
    }
}
