//! The number types that kernels compute with.

use pulp::Simd;

/// A real number in vectors of any width.
pub trait Lanes: num_traits::Float + Send + Sync + 'static {
    /// A vector of them.
    type Vector<S: Simd>: Copy;
    /// How many there are in a vector.
    fn lanes<S: Simd>() -> usize {
        size_of::<Self::Vector<S>>() / size_of::<Self>()
    }
    /// A vector of one number.
    fn splat<S: Simd>(simd: S, value: Self) -> Self::Vector<S>;
    /// `a b + c`, rounded once.
    fn multiply_add<S: Simd>(simd: S, a: Self::Vector<S>, b: Self::Vector<S>, c: Self::Vector<S>) -> Self::Vector<S>;
    /// `a b`.
    fn multiply<S: Simd>(simd: S, a: Self::Vector<S>, b: Self::Vector<S>) -> Self::Vector<S>;
}

impl Lanes for f32 {
    type Vector<S: Simd> = S::f32s;
    #[inline(always)]
    fn splat<S: Simd>(simd: S, value: Self) -> S::f32s {
        simd.splat_f32s(value)
    }
    #[inline(always)]
    fn multiply_add<S: Simd>(simd: S, a: S::f32s, b: S::f32s, c: S::f32s) -> S::f32s {
        simd.mul_add_f32s(a, b, c)
    }
    #[inline(always)]
    fn multiply<S: Simd>(simd: S, a: S::f32s, b: S::f32s) -> S::f32s {
        simd.mul_f32s(a, b)
    }
}

impl Lanes for f64 {
    type Vector<S: Simd> = S::f64s;
    #[inline(always)]
    fn splat<S: Simd>(simd: S, value: Self) -> S::f64s {
        simd.splat_f64s(value)
    }
    #[inline(always)]
    fn multiply_add<S: Simd>(simd: S, a: S::f64s, b: S::f64s, c: S::f64s) -> S::f64s {
        simd.mul_add_f64s(a, b, c)
    }
    #[inline(always)]
    fn multiply<S: Simd>(simd: S, a: S::f64s, b: S::f64s) -> S::f64s {
        simd.mul_f64s(a, b)
    }
}

/// Real numbers that the kernels compute with.
pub trait Real: Lanes + std::iter::Sum + std::ops::AddAssign + std::ops::SubAssign + std::ops::MulAssign {
    /// The number nearest to `value`.
    fn of(value: f64) -> Self;

    /// The same number in double precision.
    fn wide(self) -> f64;

    /// `eˣ`, fast where that costs no more than rounding; the same bits on every processor.
    #[must_use]
    fn fast_exp(self) -> Self;

    /// Likewise, also where it is nearly zero or infinite.
    #[must_use]
    fn portable_exp(self) -> Self;

    /// `ln x`, the same bits on every processor, unlike the C library's.
    #[inline]
    #[must_use]
    fn portable_ln(self) -> Self {
        Self::of(libm::log(self.wide()))
    }
}

impl Real for f32 {
    #[inline(always)]
    fn of(value: f64) -> Self {
        value as f32
    }

    #[inline(always)]
    fn wide(self) -> f64 {
        f64::from(self)
    }

    #[inline(always)]
    fn fast_exp(self) -> Self {
        exp(self)
    }

    #[inline]
    fn portable_exp(self) -> Self {
        if (-87. ..=88.).contains(&self) { exp(self) } else { libm::expf(self) }
    }
}

impl Real for f64 {
    #[inline(always)]
    fn of(value: f64) -> Self {
        value
    }

    #[inline(always)]
    fn wide(self) -> f64 {
        self
    }

    #[inline(always)]
    fn fast_exp(self) -> Self {
        libm::exp(self)
    }

    #[inline(always)]
    fn portable_exp(self) -> Self {
        libm::exp(self)
    }
}

/// `eˣ` of an f32 to within 2 units in the last place, from plain arithmetic: unlike the C library's it is the same on
/// every machine, and a loop over it is vectorised. Below −87 it is 0 to f32's precision, above 88 it saturates.
#[inline(always)]
fn exp(x: f32) -> f32 {
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
}
