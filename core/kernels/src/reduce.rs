//! Sums and maxima in a fixed order, which the compiler still turns into vector instructions.

use crate::real::Real;

/// Interleaved partial sums: enough to fill the vectors and to hide the latency of addition.
const LANES: usize = 32;

/// `Σ f(i)` over the indices below `count`, in an order that is fixed and still leaves room for vectors.
#[inline(always)]
pub fn lanes<T: Real>(count: usize, f: impl Fn(usize) -> T) -> T {
    let mut lanes = [T::zero(); LANES];
    let whole = count - count % LANES;
    for base in (0..whole).step_by(LANES) {
        for (lane, sum) in lanes.iter_mut().enumerate() {
            *sum += f(base + lane);
        }
    }
    // Half a block more, the width of many a head, is a vector still.
    let half = if count - whole >= LANES / 2 { LANES / 2 } else { 0 };
    if half > 0 {
        for (lane, sum) in lanes[..LANES / 2].iter_mut().enumerate() {
            *sum += f(whole + lane);
        }
    }
    for at in whole + half..count {
        lanes[at - whole] += f(at);
    }
    let mut width = LANES / 2;
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
    lanes(values.len(), |at| values[at])
}

/// `Σ f(value)`.
#[inline(always)]
pub fn sum_by<T: Real>(values: &[T], f: impl Fn(T) -> T) -> T {
    lanes(values.len(), |at| f(values[at]))
}

/// `Σ a b`.
#[inline(always)]
pub fn dot<T: Real>(a: &[T], b: &[T]) -> T {
    let b = &b[..a.len()];
    lanes(a.len(), |at| a[at] * b[at])
}

/// `Σ a b c`.
#[inline(always)]
pub fn dot3<T: Real>(a: &[T], b: &[T], c: &[T]) -> T {
    let (b, c) = (&b[..a.len()], &c[..a.len()]);
    lanes(a.len(), |at| a[at] * b[at] * c[at])
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
