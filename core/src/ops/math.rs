//! Arithmetic of the host kernels that the compiler turns into vector instructions.

use super::host::Real;

/// `eˣ` of an f32 to within 2 units in the last place, from plain arithmetic: unlike the C library's it is the same on
/// every machine, and a loop over it is vectorised. Below −87 it is 0 to f32's precision, above 88 it saturates.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    // x = n ln 2 + r with |r| ≤ ln 2 / 2; ln 2 is split in two so that r is exact.
    const ROUND: f32 = 12_582_912.; // 1.5 · 2²³: adding it rounds to an integer
    let x = x.clamp(-87., 88.);
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (x - n * 0.693_359_4) + n * 2.121_944_4e-4;
    // Cephes' polynomial for e^r on that interval.
    let p = 1.987_569_2e-4;
    let p = p * r + 1.398_2e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 1.666_666_6e-1;
    let p = p * r + 0.5;
    let mantissa = p * r * r + r + 1.;
    // The last bits of `shifted` count n; a conversion would be made one number at a time.
    mantissa * f32::from_bits((shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127)) << 23)
}

/// Interleaved partial sums: enough to fill the vectors and to hide the latency of addition.
const LANES: usize = 32;

/// `Σ f(i)` over the indices below `count`, in an order that is fixed and still leaves room for vectors.
#[inline(always)]
pub(super) fn lanes<T: Real>(count: usize, f: impl Fn(usize) -> T) -> T {
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
pub(super) fn sum<T: Real>(values: &[T]) -> T {
    lanes(values.len(), |at| values[at])
}

/// `Σ f(value)`.
#[inline(always)]
pub(super) fn sum_by<T: Real>(values: &[T], f: impl Fn(T) -> T) -> T {
    lanes(values.len(), |at| f(values[at]))
}

/// `Σ a b`.
#[inline(always)]
pub(super) fn dot<T: Real>(a: &[T], b: &[T]) -> T {
    let b = &b[..a.len()];
    lanes(a.len(), |at| a[at] * b[at])
}

/// `Σ a b c`.
#[inline(always)]
pub(super) fn dot3<T: Real>(a: &[T], b: &[T], c: &[T]) -> T {
    let (b, c) = (&b[..a.len()], &c[..a.len()]);
    lanes(a.len(), |at| a[at] * b[at] * c[at])
}

/// The largest of `values`, negative infinity if there is none.
#[inline(always)]
pub(super) fn max<T: Real>(values: &[T]) -> T {
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
    fn exp_is_exact_to_two_units_in_the_last_place() {
        for step in 0..2_000_000 {
            let x = -87. + step as f32 * (175. / 2_000_000.);
            let (ours, exact) = (f64::from(exp(x)), f64::from(x).exp());
            assert!((ours - exact).abs() <= 2.4e-7 * exact, "exp({x}) = {ours}, not {exact}");
        }
        assert_eq!(exp(0.), 1.);
        assert!(exp(-1e30) < 1e-37);
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
