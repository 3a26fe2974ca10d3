//! Intervals and tests.

/// The 95 % Wilson score interval of `successes` out of `n`, as fractions.
pub fn wilson(successes: usize, n: usize) -> (f64, f64) {
    const Z: f64 = 1.959_963_984_540_054;
    if n == 0 {
        return (0., 1.);
    }
    let (n, p) = (n as f64, successes as f64 / n as f64);
    let center = (p + Z * Z / (2. * n)) / (1. + Z * Z / n);
    let half = Z / (1. + Z * Z / n) * (p * (1. - p) / n + Z * Z / (4. * n * n)).sqrt();
    ((center - half).max(0.), (center + half).min(1.))
}
