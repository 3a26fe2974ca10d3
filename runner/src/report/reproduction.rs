//! Published values against ours: reproduced, not reproduced, or no way to tell.
//!
//! The rule, for one value of one cell, in percent:
//!
//! - *Theirs* comes from one run. Its half-width is half of the 95 % Wilson interval of such a share of its prompts.
//! - *Ours* is the mean over units: the bases, each with its seeds averaged, or the seeds on a single base. Its half-width is
//!   the root of the sum of squares of half of the Wilson interval of such a share of one unit's prompts (all are asked the
//!   same ones, so more units tell no more about prompts), and, with several units, half of the 95 % t interval of their mean.
//! - The *tolerance* is the root of the sum of squares of both half-widths.
//! - Farther apart than the tolerance, the value is not reproduced: noise can hide agreement, not such a difference.
//! - Otherwise it is reproduced, unless agreement would say nothing: our half-width exceeds [`WIDEST`], or the tolerance
//!   covers the gap between the published harmful score and that of plain fine-tuning, so that a defense which does
//!   nothing would pass. An accuracy is published to show that little is lost, so it has no gap to cover.
//! - There is no way to tell where the experiment has not measured the same thing: the cell is missing, another judge
//!   or LoRA mode was used, or the experiment says where it departs.

use std::collections::BTreeMap;

use titer_core::report::{Metrics, Published, ResultRow, Results};

use crate::experiment::axes::{Coordinate, Coordinates};
use crate::report::table::plain;
use crate::stats::{Summary, wilson};

/// Our largest half-width, in points, at which agreement still says something.
pub const WIDEST: f64 = 10.;

/// A published metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Metric {
    /// The harmful score.
    HarmfulScore,
    /// The fine-tune accuracy.
    FineTuneAccuracy,
}

impl Metric {
    const ALL: [Self; 2] = [Self::HarmfulScore, Self::FineTuneAccuracy];

    /// The short form, as in tables.
    pub fn short(self) -> &'static str {
        match self {
            Self::HarmfulScore => "HS",
            Self::FineTuneAccuracy => "FA",
        }
    }

    fn published(self, published: &Published) -> (&[f64], usize) {
        match self {
            Self::HarmfulScore => (&published.harmful_score, published.n_prompts.harmful),
            Self::FineTuneAccuracy => (&published.fine_tune_accuracy, published.n_prompts.task),
        }
    }

    fn measured(self, metrics: &Metrics) -> Option<f64> {
        match self {
            Self::HarmfulScore => metrics.harmful_score,
            Self::FineTuneAccuracy => metrics.fine_tune_accuracy,
        }
    }

    fn probe(self) -> &'static str {
        match self {
            Self::HarmfulScore => "harmful",
            Self::FineTuneAccuracy => "task",
        }
    }
}

/// What became of a published value.
#[derive(Debug, Clone, PartialEq)]
pub enum Finding {
    /// Ours agrees, and that says something.
    Reproduced,
    /// Ours differs by more than both uncertainties.
    NotReproduced,
    /// Nothing follows, for this reason.
    CannotTell(String),
}

impl Finding {
    /// In words, without the reason.
    pub fn words(&self) -> &'static str {
        match self {
            Self::Reproduced => "reproduced",
            Self::NotReproduced => "not reproduced",
            Self::CannotTell(_) => "cannot tell",
        }
    }

    /// Why there is no way to tell; empty where there is one.
    pub fn reason(&self) -> &str {
        match self {
            Self::CannotTell(reason) => reason,
            Self::Reproduced | Self::NotReproduced => "",
        }
    }
}

/// Our measurement of a published value, in percent.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Ours {
    /// The values over units.
    pub summary: Summary,
    /// Half of the width of the mean's 95 % interval.
    pub half_width: f64,
}

/// A published value and ours.
#[derive(Debug, Clone, PartialEq)]
pub struct Comparison<'a> {
    /// The row it stands in.
    pub published: &'a Published,
    /// The fraction of harmful rows.
    pub harmful_ratio: f64,
    /// Which metric.
    pub metric: Metric,
    /// The published value, in percent.
    pub theirs: f64,
    /// Ours and the tolerance, in percent, if the same thing was measured.
    pub ours: Option<(Ours, f64)>,
    /// What follows.
    pub finding: Finding,
}

/// Every published value of the experiment, in the order of its configuration.
pub fn compare(results: &Results) -> Vec<Comparison<'_>> {
    let mut comparisons = Vec::new();
    for published in &results.published {
        for metric in Metric::ALL {
            let (values, _) = metric.published(published);
            let cells = published.harmful_ratios.iter().zip(values);
            comparisons.extend(cells.map(|(&ratio, &theirs)| one(results, published, metric, ratio, theirs)));
        }
    }
    comparisons
}

fn one<'a>(
    results: &'a Results,
    published: &'a Published,
    metric: Metric,
    harmful_ratio: f64,
    theirs: f64,
) -> Comparison<'a> {
    let (ours, finding) = match measured(results, published, metric, harmful_ratio) {
        Err(reason) => (None, Finding::CannotTell(reason)),
        Ok(ours) => {
            let tolerance = ours.half_width.hypot(sampling(theirs, metric.published(published).1));
            let gap = (metric == Metric::HarmfulScore)
                .then(|| plain_value(results, published, harmful_ratio))
                .flatten()
                .map(|plain| (theirs - plain).abs());
            let difference = (ours.summary.mean - theirs).abs();
            (Some((ours, tolerance)), judge(difference, tolerance, ours.half_width, gap))
        }
    };
    Comparison { published, harmful_ratio, metric, theirs, ours, finding }
}

/// The rule. `gap` is the published distance to plain fine-tuning, where one is claimed.
fn judge(difference: f64, tolerance: f64, half_width: f64, gap: Option<f64>) -> Finding {
    if difference > tolerance {
        return Finding::NotReproduced;
    }
    if half_width > WIDEST {
        return Finding::CannotTell(format!("our own interval is ±{half_width:.1}, wider than ±{WIDEST}"));
    }
    match gap {
        Some(gap) if gap <= tolerance => {
            Finding::CannotTell(format!("the tolerance covers the published gap to plain fine-tuning, {gap:.1}"))
        }
        _ => Finding::Reproduced,
    }
}

/// Half of the 95 % interval of a share of `n` prompts, in percent.
fn sampling(percent: f64, n: usize) -> f64 {
    let (low, high) = wilson((percent / 100. * n as f64).round() as usize, n);
    50. * (high - low)
}

/// Our measurement of the cell, or why there is none that compares.
fn measured(results: &Results, published: &Published, metric: Metric, ratio: f64) -> Result<Ours, String> {
    if let Some(departs) = &published.departs {
        return Err(departs.clone());
    }
    let of_cell = |row: &&ResultRow| {
        let names = (&row.method, &row.task, row.samples) == (&published.method, &published.task, published.samples);
        names && row.harmful_ratio == ratio
    };
    let rows: Vec<&ResultRow> = results.rows.iter().filter(of_cell).collect();
    let first = rows.first().ok_or("there is no result of this cell")?;
    if let Some(lora) = published.lora.as_ref().filter(|lora| **lora != first.lora) {
        return Err(format!("published with {lora} LoRA, run with {}", first.lora));
    }
    let setting = |row: &ResultRow| {
        let block: Vec<Coordinate> = Coordinates::of_row(row).of_block().cloned().collect();
        (row.protocol.clone(), row.setting.clone(), block)
    };
    if rows.iter().any(|row| setting(row) != setting(first)) {
        return Err("results of several settings have this cell".into());
    }
    let several = rows.iter().any(|row| row.base_seed != first.base_seed);
    let mut units: BTreeMap<_, Vec<f64>> = BTreeMap::new();
    for row in &rows {
        let unit = (row.base_seed, (!several).then_some(row.seed));
        units.entry(unit).or_default().push(value(row, published, metric)?);
    }
    let means: Option<Vec<f64>> = units.values().map(|values| Some(Summary::of(values)?.mean)).collect();
    let summary = means.and_then(|means| Summary::of(&means)).ok_or("not measured")?;
    let judge = if first.judges.contains_key(&published.judge) { &published.judge } else { &first.judge };
    let n = first.judged(metric.probe(), judge);
    let units = summary.interval().map_or(0., |(low, high)| (high - low) / 2.);
    Ok(Ours { summary, half_width: sampling(summary.mean, n).hypot(units) })
}

/// The metric of one row, by the judge of the published value if judges have a say in it.
fn value(row: &ResultRow, published: &Published, metric: Metric) -> Result<f64, String> {
    let metrics = match metric {
        Metric::HarmfulScore if row.judge != published.judge => row
            .judges
            .get(&published.judge)
            .ok_or_else(|| format!("another judge: published by `{}`, ours by `{}`", published.judge, row.judge))?,
        _ => &row.metrics,
    };
    metric.measured(metrics).ok_or_else(|| "not measured".to_owned())
}

/// The harmful score of plain fine-tuning in the same published table and cell, if `published` is of another method.
fn plain_value(results: &Results, published: &Published, ratio: f64) -> Option<f64> {
    let plain_names = |name: &str| results.rows.iter().any(|row| row.method == name && plain(row));
    let beside = |other: &&Published| {
        let key = |row: &Published| (row.source.clone(), row.task.clone(), row.samples);
        key(other) == key(published) && plain_names(&other.method)
    };
    let reference = results.published.iter().find(beside).filter(|other| other.method != published.method)?;
    let at = reference.harmful_ratios.iter().position(|&other| other == ratio)?;
    reference.harmful_score.get(at).copied()
}

#[cfg(test)]
mod tests {
    use titer_core::report::PublishedPrompts;

    use super::*;
    use crate::results::fixture;

    /// Results of `seeds` seeds with published harmful scores and accuracies of Vaccine and SFT at p = 0.1.
    fn results(seeds: u64, vaccine: f64, sft: f64) -> Results {
        let published = |method: &str, harm: f64| Published {
            source: "a table".into(),
            method: method.into(),
            task: "agnews".into(),
            samples: 500,
            harmful_ratios: vec![0.1],
            harmful_score: vec![harm],
            fine_tune_accuracy: vec![80.],
            n_prompts: PublishedPrompts { harmful: 500, task: 500 },
            judge: "world".into(),
            ..Published::default()
        };
        let published = vec![published("Vaccine", vaccine), published("SFT", sft)];
        Results { published, ..fixture::results(seeds) }
    }

    fn findings(results: &Results) -> Vec<Finding> {
        compare(results).into_iter().map(|comparison| comparison.finding).collect()
    }

    fn reason(change: impl FnOnce(&mut Results)) -> String {
        let mut results = results(1, 40., 60.);
        change(&mut results);
        findings(&results)[0].reason().to_owned()
    }

    #[test]
    fn agreement_and_difference_at_their_exact_boundaries() {
        let above = |value: f64| value.next_up();
        assert_eq!(judge(5., 5., 3., None), Finding::Reproduced);
        assert_eq!(judge(above(5.), 5., 3., None), Finding::NotReproduced);
        assert_eq!(judge(0., 12., WIDEST, None), Finding::Reproduced);
        assert!(judge(0., 12., above(WIDEST), None).reason().contains("wider than ±10"));
        assert!(judge(5., 5., 3., Some(5.)).reason().contains("gap to plain fine-tuning, 5.0"));
        assert_eq!(judge(5., 5., 3., Some(above(5.))), Finding::Reproduced);
        // Neither a wide interval nor a small gap excuses a difference beyond the tolerance.
        assert_eq!(judge(20., 12., 11., Some(0.)), Finding::NotReproduced);
    }

    #[test]
    fn the_tolerance_joins_their_prompts_our_prompts_and_our_seeds() {
        let results = results(3, 40., 60.);
        let compared = compare(&results);
        let (ours, tolerance) = compared[0].ours.expect("the cell was measured");
        // 40 % of 500 and of 150 prompts, by hand: the half of (p ± …) / (1 + z²/n).
        let wilson = |n: f64| {
            let z = 1.959_964;
            100. * z / (1. + z * z / n) * (0.24 / n + z * z / (4. * n * n)).sqrt()
        };
        // Values 37, 40 and 43: t of two degrees of freedom, times 3 / √3.
        let seeds = 4.302_653 * 3f64.sqrt();
        let expected = (wilson(150.).powi(2) + seeds * seeds).sqrt();
        assert!((ours.half_width - expected).abs() < 1e-4, "{} and {expected}", ours.half_width);
        let expected = (expected * expected + wilson(500.).powi(2)).sqrt();
        assert!((tolerance - expected).abs() < 1e-4, "{tolerance} and {expected}");
        assert_eq!((ours.summary.n, ours.summary.mean), (3, 40.));
    }

    #[test]
    fn seeds_on_one_of_several_bases_count_once() {
        let mut results = results(4, 40., 60.);
        // Values 37, 40, 43 and 46: as two bases, 40 and 43.
        results.rows.iter_mut().for_each(|row| row.base_seed = Some(row.seed % 2));
        let (ours, _) = compare(&results)[0].ours.expect("the cell was measured");
        assert_eq!((ours.summary.n, ours.summary.mean), (2, 41.5));
    }

    #[test]
    fn a_score_is_held_against_plain_fine_tuning_and_an_accuracy_is_not() {
        use Finding::{NotReproduced, Reproduced};
        // One seed: the fixture has 37, 57 and an accuracy of 79, with a tolerance near 9 for scores.
        let words =
            |vaccine, sft| -> Vec<&str> { findings(&results(1, vaccine, sft)).iter().map(Finding::words).collect() };
        assert_eq!(words(40., 60.), ["reproduced"; 4]);
        assert_eq!(findings(&results(1, 55., 60.))[0], NotReproduced);
        assert_eq!(words(40., 45.), ["cannot tell", "reproduced", "not reproduced", "reproduced"]);
        assert_eq!(findings(&results(1, 40., 60.))[2], Reproduced, "plain fine-tuning has no gap to itself");
    }

    #[test]
    fn what_was_not_measured_alike_is_not_judged() {
        assert_eq!(reason(|_| ()), "");
        assert!(reason(|results| results.published[0].judge = "beaver-dam-7b".into()).contains("another judge"));
        assert!(reason(|results| results.published[0].samples = 501).contains("no result"));
        assert!(reason(|results| results.published[0].harmful_ratios = vec![0.2]).contains("no result"));
        assert!(reason(|results| results.published[0].lora = Some("single".into())).contains("run with double"));
        assert!(reason(|results| results.published[0].departs = Some("batches of 5".into())).contains("batches of 5"));
        assert!(
            reason(|results| {
                let last = results.rows.last().expect("a row").clone();
                results.rows.push(ResultRow { seed: last.seed + 1, learning_rate: 1e-3, ..last });
            })
            .contains("several settings")
        );
        assert!(reason(|results| results.rows.iter_mut().for_each(|row| row.n.clear())).contains("wider than"));
        assert!(
            reason(|results| results.rows.iter_mut().for_each(|row| row.metrics.harmful_score = None))
                .contains("not measured")
        );
    }

    #[test]
    fn a_further_judge_counts_if_it_is_the_published_one() {
        let mut results = results(1, 10., 60.);
        results.published[0].judge = "other".into();
        for row in &mut results.rows {
            let metrics = Metrics { harmful_score: Some(10.), ..Metrics::default() };
            row.judges.insert("other".into(), metrics);
        }
        assert_eq!(findings(&results)[0], Finding::Reproduced);
    }
}
