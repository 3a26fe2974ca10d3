//! Means, intervals and paired tests.

use titer_core::rng::Seed;

/// The 97.5 % point of the standard normal distribution.
const Z: f64 = 1.959_963_984_540_054;

/// The 97.5 % points of Student's t for 1 to 30 degrees of freedom.
const T: [f64; 30] = [
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
];

/// A sample in short.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Summary {
    /// How many values.
    pub n: usize,
    /// Their mean.
    pub mean: f64,
    /// Their standard deviation (with `n − 1`); `None` for a single value.
    pub std: Option<f64>,
}

impl Summary {
    /// Of finite values; `None` if there is none.
    pub fn of(values: &[f64]) -> Option<Self> {
        let n = values.len();
        if n == 0 || values.iter().any(|value| !value.is_finite()) {
            return None;
        }
        let mean = values.iter().sum::<f64>() / n as f64;
        let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
        Some(Self { n, mean, std: (n > 1).then(|| (squares / (n - 1) as f64).sqrt()) })
    }

    /// The 95 % interval of the mean by Student's t: `mean ± t · std / √n`.
    pub fn interval(&self) -> Option<(f64, f64)> {
        let half = T.get(self.n.checked_sub(2)?).copied().unwrap_or(Z) * self.std? / (self.n as f64).sqrt();
        Some((self.mean - half, self.mean + half))
    }
}

/// The 95 % Wilson score interval of `successes` out of `n`, as fractions.
pub fn wilson(successes: usize, n: usize) -> (f64, f64) {
    if n == 0 {
        return (0., 1.);
    }
    let (n, p) = (n as f64, successes as f64 / n as f64);
    let center = (p + Z * Z / (2. * n)) / (1. + Z * Z / n);
    let half = Z / (1. + Z * Z / n) * (p * (1. - p) / n + Z * Z / (4. * n * n)).sqrt();
    ((center - half).max(0.), (center + half).min(1.))
}

/// The two-sided p value of the hypothesis that paired differences are symmetric around zero: the share of sign
/// patterns whose sum is at least as far from zero as the one seen. Exact up to 16 pairs, else from 65 536 seeded draws.
pub fn sign_flip(differences: &[f64]) -> f64 {
    const EXACT: u32 = 16;
    let seen = differences.iter().sum::<f64>().abs() * (1. - 1e-12);
    let extreme = |signs: &mut dyn FnMut(usize) -> bool| {
        let flipped = differences.iter().enumerate().map(|(at, value)| if signs(at) { *value } else { -value });
        flipped.sum::<f64>().abs() >= seen
    };
    let patterns = 1_usize << differences.len().min(EXACT as usize);
    let mut generator = Seed::new(0).named("sign-flip").generator();
    let hits = (0..patterns).filter(|pattern| {
        if differences.len() <= EXACT as usize {
            extreme(&mut |at| pattern >> at & 1 == 1)
        } else {
            extreme(&mut |_| rand::RngExt::random_bool(&mut generator, 0.5))
        }
    });
    hits.count() as f64 / patterns as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(a: f64, b: f64) {
        assert!((a - b).abs() < 1e-3, "{a} and {b}");
    }

    #[test]
    fn known_values() {
        let summary = Summary::of(&[2., 4., 4., 4., 5., 5., 7., 9.]).expect("values");
        close(summary.mean, 5.);
        close(summary.std.expect("several values"), 2.138);
        let (low, high) = summary.interval().expect("several values");
        close(low, 5. - 2.365 * 2.138 / 8f64.sqrt());
        close(high, 10. - low);
        let (low, high) = wilson(8, 10);
        close(low, 0.4902);
        close(high, 0.9433);
        assert_eq!(wilson(0, 20).0, 0.);
        close(sign_flip(&[1., 2., 3.]), 0.25);
        close(sign_flip(&[1., -1.]), 1.);
        close(sign_flip(&[5.; 10]), 2. / 1024.);
        assert!(sign_flip(&[1.; 40]) < 1e-3);
    }

    #[test]
    fn a_single_value_has_no_spread_and_none_no_mean() {
        let one = Summary::of(&[3.]).expect("a value");
        assert_eq!((one.std, one.interval()), (None, None));
        assert_eq!(Summary::of(&[]), None);
        assert_eq!(Summary::of(&[1., f64::NAN]), None);
    }
}
