//! Means, intervals, and the one rule by which two methods are told apart.
//!
//! # The rule for a difference
//!
//! - *Pairs.* Two methods are compared on the same bases, seeds and prompts.
//! - *Units.* What is random is the base model, the seed of a run, and which prompts are asked. Seeds on one base share
//!   that base, so with several bases the base is the unit: its seeds are averaged first. With one base its seeds are the
//!   units, and what follows holds for that base only.
//! - *Test.* The p value is the larger of two. The first is that of the sign-flip test over units: exact, whatever the
//!   distribution, as long as a difference is as likely as its opposite. It cannot be below `2 / 2^units`. The second is
//!   that of a t test whose variance is the sum of the variance over units and that over prompts (Clark's min F′), with
//!   `units − 1` degrees of freedom. That over prompts is of the differences on each prompt, with half a prompt more in each
//!   cell of the fourfold table (Agresti and Min 2005). Since every unit is asked the same prompts, the first test alone would mistake what
//!   is peculiar to these prompts for an effect.
//! - *Interval.* What neither test excludes, at 95 %, or at the highest confidence that so few units can give.
//! - *Families.* The p values of one table are corrected together, by Holm's method.
//!
//! `docs/measurements/statistics.md` shows how often the rule errs, by simulation.

use statrs::distribution::{ContinuousCDF, StudentsT};
use titer_core::rng::Seed;

/// The 97.5 % point of the standard normal distribution.
const Z: f64 = 1.959_963_984_540_054;

/// A difference is detectable if its corrected p value is not above this.
pub const ALPHA: f64 = 0.05;

/// Up to so many units all sign patterns are tried; of more units, as many random ones as this many have.
const EXACT: usize = 16;

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

    /// The variance of the mean; `None` for a single value.
    pub fn variance_of_mean(&self) -> Option<f64> {
        Some(self.std?.powi(2) / self.n as f64)
    }

    /// The 95 % interval of the mean by Student's t: `mean ± t · std / √n`.
    pub fn interval(&self) -> Option<(f64, f64)> {
        let half = t_quantile(self.n, 1. - ALPHA / 2.)? * self.variance_of_mean()?.sqrt();
        Some((self.mean - half, self.mean + half))
    }
}

/// Student's t with `n − 1` degrees of freedom, if there are any.
fn student(n: usize) -> Option<StudentsT> {
    StudentsT::new(0., 1., n.checked_sub(1)? as f64).ok()
}

fn t_quantile(n: usize, probability: f64) -> Option<f64> {
    Some(student(n)?.inverse_cdf(probability))
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

/// A paired difference between two methods, by the rule of this module.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Difference {
    /// The mean over units.
    pub mean: f64,
    /// How many units.
    pub units: usize,
    /// The two-sided p value, without correction; 1 for a single unit, from which nothing follows about others.
    pub p: f64,
    /// What the test does not exclude; `None` for a single unit.
    pub interval: Option<Interval>,
}

/// A confidence interval.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Interval {
    /// Its lower end.
    pub low: f64,
    /// Its upper end.
    pub high: f64,
    /// Its confidence, in `(0, 1)`.
    pub confidence: f64,
}

impl Difference {
    /// Of the units' differences, each a mean over the same prompts, and the variance of their mean over prompts.
    /// `None` without units, or if a value is not finite.
    pub fn of(units: &[f64], prompt_variance: f64) -> Option<Self> {
        let Summary { n, mean, .. } = Summary::of(units)?;
        let Some(unit_variance) = Summary::of(units)?.variance_of_mean() else {
            return Some(Self { mean, units: n, p: 1., interval: None });
        };
        let spread = (unit_variance + prompt_variance).sqrt();
        let alpha = ALPHA.max(least_p(n));
        let subsets = Subsets::of(units);
        let by_prompts = match student(n) {
            // Without any spread, all prompts of all units changed alike.
            Some(student) if spread > 0. => 2. * student.sf(mean.abs() / spread),
            _ => 0.,
        };
        let half = t_quantile(n, 1. - alpha / 2.)? * spread;
        let (low, high) = subsets.interval(alpha);
        let interval = Interval { low: low.min(mean - half), high: high.max(mean + half), confidence: 1. - alpha };
        Some(Self { mean, units: n, p: subsets.p(mean).max(by_prompts), interval: Some(interval) })
    }
}

/// The smallest p value that a sign-flip test over so many units can have.
pub fn least_p(units: usize) -> f64 {
    // All signs as they are, or all flipped.
    (2. / 2f64.powf(units as f64)).min(1.)
}

/// Sums over sets of units: all that a sign-flip test and its interval need, since flipping the units of a set takes
/// twice their sum from the total (Hartigan 1969).
struct Subsets {
    /// Sum and size of each set but the empty one.
    sums: Vec<(f64, usize)>,
}

impl Subsets {
    fn of(units: &[f64]) -> Self {
        let sum = |contains: &mut dyn FnMut(usize) -> bool| {
            let members = units.iter().enumerate().filter(|(at, _)| contains(*at));
            members.fold((0., 0), |(sum, size), (_, unit)| (sum + unit, size + 1))
        };
        let patterns = 1..1_usize << units.len().min(EXACT);
        let sums = if units.len() <= EXACT {
            patterns.map(|pattern| sum(&mut |at| pattern >> at & 1 == 1)).collect()
        } else {
            let mut generator = Seed::new(0).named("sign-flip").generator();
            let mut draw = || sum(&mut |_| rand::RngExt::random_bool(&mut generator, 0.5));
            patterns.map(|_| draw()).filter(|(_, size)| *size > 0).collect()
        };
        Self { sums }
    }

    /// The two-sided p value of the hypothesis that the differences are symmetric around zero: the share of sign patterns
    /// whose sum is at least as far from zero as the one seen.
    fn p(&self, mean: f64) -> f64 {
        let nothing = 1e-12 * mean.abs();
        let extreme = self.sums.iter().filter(|(sum, _)| sum * mean.signum() <= nothing).count();
        (2. * (extreme + 1) as f64 / (self.sums.len() + 1) as f64).min(1.)
    }

    /// The values around which the differences may be symmetric, at the level `alpha`.
    fn interval(&self, alpha: f64) -> (f64, f64) {
        let mut means: Vec<f64> = self.sums.iter().map(|(sum, size)| sum / *size as f64).collect();
        means.sort_by(f64::total_cmp);
        let outside = (alpha / 2. * (means.len() + 1) as f64).floor() as usize;
        let cut = outside.saturating_sub(1).min(means.len() / 2);
        (means[cut], means[means.len() - 1 - cut])
    }
}

/// Holm's correction: p values such that, whichever hypotheses are true, one of them is below a level with at most that
/// probability.
pub fn holm(p: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..p.len()).collect();
    order.sort_by(|&a, &b| p[a].total_cmp(&p[b]));
    let mut corrected = vec![1.; p.len()];
    let mut largest = 0f64;
    for (rank, at) in order.into_iter().enumerate() {
        largest = largest.max((p.len() - rank) as f64 * p[at]).min(1.);
        corrected[at] = largest;
    }
    corrected
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn close(a: f64, b: f64) {
        assert!((a - b).abs() < 1e-3, "{a} and {b}");
    }

    fn p(units: &[f64]) -> f64 {
        Difference::of(units, 0.).expect("units").p
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
        // All differences on one side: the least p, and the range as the widest interval there is.
        close(p(&[1., 2., 3.]), 0.25);
        close(p(&[1., -1.]), 1.);
        close(p(&[5.; 10]), 2. / 1024.);
        assert!(p(&[1.; 40]) < 1e-3);
        // By hand: sums not above 0 are those of {}, {−1}, {−1, 1}: 3 of 8, twice.
        close(p(&[-1., 1., 3.]), 0.75);
    }

    #[test]
    fn the_interval_is_at_the_confidence_that_the_units_allow() {
        let interval = |units: &[f64]| Difference::of(units, 0.).expect("units").interval.expect("several units");
        close(interval(&[1., 2., 3.]).confidence, 0.75);
        close(interval(&[1., 2., 3., 4., 5., 6.]).confidence, 0.95);
        // The t interval at 75 % is within the range of these three; with prompts that vary, it is not.
        assert_eq!((interval(&[0., 1., 2.]).low, interval(&[0., 1., 2.]).high), (0., 2.));
        let wide = Difference::of(&[0., 1., 2.], 4.).expect("units").interval.expect("several units");
        assert!(wide.low < -2. && wide.high > 4., "{wide:?}");
    }

    #[test]
    fn prompts_count_as_drawn_too() {
        // Ten runs that agree, about prompts of which a few decide: the runs alone would prove it.
        let units = [2., 2.1, 1.9, 2., 2.2, 1.8, 2., 2.1, 1.9, 2.];
        assert!(p(&units) < 0.01);
        assert!(Difference::of(&units, 1.5 * 1.5).expect("units").p > 0.2);
    }

    #[test]
    fn a_single_value_has_no_spread_and_none_no_mean() {
        let one = Summary::of(&[3.]).expect("a value");
        assert_eq!((one.std, one.interval()), (None, None));
        assert_eq!(Summary::of(&[]), None);
        assert_eq!(Summary::of(&[1., f64::NAN]), None);
        assert_eq!(Difference::of(&[3.], 1.), Some(Difference { mean: 3., units: 1, p: 1., interval: None }));
        assert_eq!(Difference::of(&[], 1.), None);
    }

    #[test]
    fn holm_by_hand() {
        let corrected = holm(&[0.01, 0.04, 0.03, 0.005]);
        for (found, expected) in corrected.iter().zip([0.03, 0.06, 0.06, 0.02]) {
            close(*found, expected);
        }
        assert_eq!(holm(&[0.6, 0.9]), [1., 1.]);
        assert_eq!(holm(&[]), Vec::<f64>::new());
    }

    proptest! {
        #[test]
        fn the_interval_excludes_zero_exactly_if_the_test_does(
            units in prop::collection::vec(-3f64..9., 2..10),
            variance in 0f64..2.,
        ) {
            let difference = Difference::of(&units, variance).expect("units");
            let interval = difference.interval.expect("several units");
            let excluded = interval.low > 0. || interval.high < 0.;
            // At a level that few units force, the least p itself counts as small.
            let alpha = 1. - interval.confidence;
            prop_assert_eq!(excluded, difference.p <= alpha + 1e-9, "{:?}", difference);
            prop_assert!(interval.low <= difference.mean && difference.mean <= interval.high);
        }

        #[test]
        fn holm_corrects_upwards_and_keeps_the_order(p in prop::collection::vec(0f64..1., 0..12)) {
            let corrected = holm(&p);
            for (at, value) in p.iter().enumerate() {
                prop_assert!(corrected[at] >= *value && corrected[at] <= 1.);
                for (other, larger) in p.iter().enumerate() {
                    prop_assert!(value > larger || corrected[at] <= corrected[other]);
                }
            }
        }
    }
}
