//! Differences to plain fine-tuning: the pairs, the one family of tests of a table, and the words that they allow. The
//! rule itself is in [`crate::stats`].

use std::collections::BTreeMap;

use titer_core::report::ResultRow;

use super::table::{Block, MethodRows};
use crate::stats::{ALPHA, Difference, holm, least_p};

/// A metric that is tested.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tested {
    /// Its name.
    pub metric: &'static str,
    /// Its short form.
    pub short: &'static str,
    /// The probe that it counts.
    probe: &'static str,
    /// The outcome of a prompt that it counts: see [`ResultRow::outcomes`].
    outcome: char,
}

/// The metrics that are tested: harm, and what it costs.
pub(super) const TESTED: [Tested; 2] = [
    Tested { metric: "harmful_score", short: "HS", probe: "harmful", outcome: 'C' },
    Tested { metric: "fine_tune_accuracy", short: "FA", probe: "task", outcome: '1' },
];

/// All tests of a block, corrected together.
#[derive(Debug)]
pub struct Differences<'a> {
    /// Plain fine-tuning.
    pub reference: &'a str,
    /// The harmful ratio at which the methods are compared: of those at which someone attacks, that at which plain
    /// fine-tuning is hurt about half, so that a difference shows best. The choice looks at no other method.
    pub ratio: f64,
    /// Whether there was a choice.
    chosen: bool,
    /// One for each method and metric.
    pub tests: Vec<Test<'a>>,
}

/// One method against plain fine-tuning.
#[derive(Debug)]
pub struct Test<'a> {
    /// The method.
    pub method: &'a str,
    /// The metric.
    pub tested: Tested,
    /// The difference; below zero if the method's value is the lower one.
    pub difference: Difference,
    /// Whether the units are bases; else they are the seeds on one base.
    pub bases: bool,
    /// Whether one of the two has runs that the other one has not, and that do not count here.
    pub partial: bool,
    /// The p value after correction for all tests of the block.
    pub corrected: f64,
    /// The smallest that it can be with so many units and tests.
    pub least: f64,
}

impl<'a> Differences<'a> {
    /// Every method of the block against plain fine-tuning; `None` if that is not among them, or alone.
    pub fn of(block: &'a Block) -> Option<Self> {
        let reference = block.reference()?;
        let distance = |ratio: f64| reference.summary(ratio, "harmful_score").map_or(100., |s| (s.mean - 50.).abs());
        let attacked: Vec<f64> = block.ratios.iter().copied().filter(|ratio| *ratio > 0.).collect();
        let ratios = if attacked.is_empty() { &block.ratios } else { &attacked };
        let ratio = ratios.iter().copied().min_by(|a, b| distance(*a).total_cmp(&distance(*b)))?;
        let others = block.methods.iter().filter(|method| method.name != reference.name);
        let mut tests: Vec<Test> =
            others.flat_map(|method| TESTED.map(|tested| test(method, reference, ratio, tested))).flatten().collect();
        correct(tests.iter_mut().collect());
        let chosen = attacked.len() > 1;
        (block.methods.len() > 1).then_some(Self { reference: reference.name, ratio, chosen, tests })
    }

    /// What is said of a method, for its sentence; nothing of plain fine-tuning itself.
    pub(super) fn words(&self, method: &str) -> Option<String> {
        if method == self.reference {
            return None;
        }
        let tests: Vec<&Test> = self.tests.iter().filter(|test| test.method == method).collect();
        let mut verdicts: Vec<String> = tests.iter().map(|test| test.verdict(self.tests.len())).collect();
        verdicts.dedup();
        let shown: Vec<String> = match verdicts.as_slice() {
            [] => {
                let Self { reference, ratio, .. } = self;
                return Some(format!("not compared with {reference}: at p = {ratio} they share no seed on one base"));
            }
            // Often one reason holds for both.
            [verdict] => {
                let shown: Vec<String> = tests.iter().map(|test| test.shown()).collect();
                vec![format!("{}: {verdict}", shown.join(", "))]
            }
            _ => tests.iter().zip(&verdicts).map(|(test, verdict)| format!("{}: {verdict}", test.shown())).collect(),
        };
        let Self { reference, ratio, .. } = self;
        let why = match ratio {
            0. => ", where nobody attacks",
            _ if self.chosen => ", the p > 0 at which its HS is nearest to 50 %",
            _ => "",
        };
        Some(format!("against {reference} at p = {ratio}{why}, {}", shown.join("; ")))
    }

    /// What the words rest on, for the foot of the table.
    pub(super) fn note(&self) -> String {
        let units =
            |bases: bool| self.tests.iter().filter(move |test| test.bases == bases).map(|test| test.difference.units);
        let span = |units: Vec<usize>| -> Option<String> {
            let (least, most) = (units.iter().min()?, units.iter().max()?);
            Some(if least == most { most.to_string() } else { format!("{least} to {most}") })
        };
        let bases = span(units(true).collect()).map(|n| format!("the {n} bases, each with its seeds averaged"));
        let seeds = span(units(false).collect())
            .map(|n| format!("the seeds on one base ({n}), so what is said holds for that base only"));
        let units = [bases, seeds].into_iter().flatten().collect::<Vec<_>>().join("; or ");
        format!(
            "Differences to {} are paired by seed and prompt. The units are {units}. A p value is the larger one of an \
             exact sign-flip test over units and of a t test that takes the prompts for a random sample, too, corrected for the {} \
             differences of this table (Holm). CI, the confidence interval, is what this test does not exclude, of that \
             difference alone, at 95 % or at what so few units allow.",
            self.reference,
            self.tests.len()
        )
    }
}

impl Test<'_> {
    /// Whether the difference is told from chance.
    pub fn detectable(&self) -> bool {
        self.corrected <= ALPHA
    }

    /// `HS −27.1 (95 % CI −34.0 to −19.3)`.
    fn shown(&self) -> String {
        format!("{} {}", self.tested.short, self.size())
    }

    /// `−27.1 (95 % CI −34.0 to −19.3)`.
    pub(super) fn size(&self) -> String {
        let Difference { mean, interval, .. } = self.difference;
        let interval = interval.map_or_else(String::new, |interval| {
            let (low, high) = (signed(interval.low), signed(interval.high));
            format!(" ({:.0} % CI {low} to {high})", 100. * interval.confidence)
        });
        let runs = if self.partial { " over the runs that both have" } else { "" };
        format!("{}{runs}{interval}", signed(mean))
    }

    /// What follows, always with the reason; `family` is the number of tests that are corrected together.
    pub(super) fn verdict(&self, family: usize) -> String {
        let n = self.difference.units;
        let unit = match (self.bases, n) {
            (_, 1) => return "one seed says nothing about another".to_owned(),
            (true, _) => "bases",
            (false, _) => "seeds",
        };
        if self.detectable() {
            let place = if self.bases { "" } else { " on this one base" };
            return format!("detectable{place} ({})", p_value(self.corrected));
        }
        if self.least <= ALPHA {
            return format!("not detectable ({})", p_value(self.corrected));
        }
        let least = least_p(n);
        let corrected = if least > ALPHA {
            String::new()
        } else {
            format!(", {} corrected for {family} differences", rounded(self.least))
        };
        let least = rounded(least);
        format!("cannot be told from chance with n = {n} {unit}, the least possible p value is {least}{corrected}")
    }
}

/// Corrects a family of tests together.
pub(super) fn correct(tests: Vec<&mut Test>) {
    let corrected = holm(&tests.iter().map(|test| test.difference.p).collect::<Vec<_>>());
    let family = tests.len() as f64;
    for (test, corrected) in tests.into_iter().zip(corrected) {
        test.corrected = corrected;
        test.least = (family * least_p(test.difference.units)).min(1.);
    }
}

/// `+1.2` or `−1.2`, with a minus sign that lines up.
pub(super) fn signed(value: f64) -> String {
    format!("{}{:.1}", if value < 0. { '−' } else { '+' }, value.abs())
}

fn p_value(p: f64) -> String {
    if p < 0.001 { "p < 0.001".to_owned() } else { format!("p = {}", rounded(p)) }
}

fn rounded(p: f64) -> String {
    if p < 0.0995 { format!("{p:.3}") } else { format!("{p:.2}") }
}

/// One test, not yet corrected; `None` if no pair of runs has the metric.
pub(super) fn test<'a>(
    method: &MethodRows<'a>,
    reference: &MethodRows,
    ratio: f64,
    tested: Tested,
) -> Option<Test<'a>> {
    let theirs: BTreeMap<_, &ResultRow> = reference.at(ratio).map(|row| ((row.base_seed, row.seed), row)).collect();
    let pair = |row: &ResultRow| {
        let pair = Pair::of(row, theirs.get(&(row.base_seed, row.seed))?, tested)?;
        Some((row.base_seed, row.seed, pair))
    };
    let pairs: Vec<(Option<u64>, u64, Pair)> = method.at(ratio).filter_map(pair).collect();
    let first = pairs.first()?.0;
    let bases = pairs.iter().any(|(base, ..)| *base != first);
    let mut units: BTreeMap<_, Vec<&Pair>> = BTreeMap::new();
    for (base, seed, pair) in &pairs {
        units.entry((*base, (!bases).then_some(*seed))).or_default().push(pair);
    }
    let units: Vec<Pair> = units.into_values().map(Pair::mean).collect();
    let differences: Vec<f64> = units.iter().map(|unit| unit.difference).collect();
    let prompts = Pair::mean(units.iter().collect()).variance_over_prompts();
    let difference = Difference::of(&differences, prompts)?;
    let partial = pairs.len() < method.at(ratio).count().max(theirs.len());
    Some(Test { method: method.name, tested, difference, bases, partial, corrected: 1., least: 1. })
}

/// Two runs of the same seed, or the mean of several such pairs, in percent.
struct Pair {
    difference: f64,
    prompts: Prompts,
}

/// How the difference varies over prompts.
enum Prompts {
    /// The difference on each prompt, in their order; none where one of the runs has no outcome.
    Paired(Vec<Option<f64>>),
    /// Of results without outcomes: the variance as if each run had its own prompts, which is too large rather than too
    /// small.
    Unpaired(f64),
}

impl Pair {
    fn of(ours: &ResultRow, theirs: &ResultRow, tested: Tested) -> Option<Self> {
        let value = |row: &ResultRow| row.metrics.get(tested.metric);
        // Prompts that were too long for the model have no outcome, and neither have those that the judge was not clear
        // about.
        let counted = |row: &ResultRow| -> Option<Vec<Option<f64>>> {
            let outcomes = row.outcomes.get(tested.probe)?;
            let value = |outcome: char| {
                (!['-', 'U'].contains(&outcome)).then_some(if outcome == tested.outcome { 100. } else { 0. })
            };
            Some(outcomes.chars().map(value).collect())
        };
        let (our_value, their_value) = (value(ours)?, value(theirs)?);
        let prompts = match (counted(ours), counted(theirs)) {
            (Some(ours), Some(theirs)) if ours.len() == theirs.len() => {
                Prompts::Paired(ours.iter().zip(&theirs).map(|(ours, theirs)| Some((*ours)? - (*theirs)?)).collect())
            }
            _ => {
                let variance = |row: &ResultRow, value: f64| {
                    value * (100. - value) / row.n.get(tested.probe).copied().unwrap_or(1).max(1) as f64
                };
                Prompts::Unpaired(variance(ours, our_value) + variance(theirs, their_value))
            }
        };
        Some(Self { difference: our_value - their_value, prompts })
    }

    /// All pairs count alike.
    fn mean(pairs: Vec<&Self>) -> Self {
        let n = pairs.len() as f64;
        let difference = pairs.iter().map(|pair| pair.difference).sum::<f64>() / n;
        let paired: Option<Vec<&Vec<Option<f64>>>> = pairs
            .iter()
            .map(|pair| match &pair.prompts {
                Prompts::Paired(prompts) => Some(prompts),
                Prompts::Unpaired(_) => None,
            })
            .collect();
        let prompts = match paired.filter(|all| all.iter().all(|prompts| prompts.len() == all[0].len())) {
            Some(all) => {
                // A prompt counts if every pair has it.
                let at = |prompt: usize| {
                    let on: Option<Vec<f64>> = all.iter().map(|prompts| prompts[prompt]).collect();
                    Some(on?.iter().sum::<f64>() / n)
                };
                Prompts::Paired((0..all[0].len()).map(at).collect())
            }
            // The same prompts again tell no more about prompts.
            None => Prompts::Unpaired(pairs.iter().map(|pair| pair.variance_over_prompts()).sum::<f64>() / n),
        };
        Self { difference, prompts }
    }

    /// The variance of the difference over prompts.
    fn variance_over_prompts(&self) -> f64 {
        match &self.prompts {
            Prompts::Paired(prompts) => {
                // Half a prompt more in each cell of the fourfold table (Agresti and Min 2005): prompts that all agree do not
                // prove that the next one would.
                let prompts = || prompts.iter().flatten();
                let n = prompts().count() as f64 + 2.;
                let sum = prompts().sum::<f64>();
                let squares = prompts().map(|difference| difference * difference).sum::<f64>() + 100. * 100.;
                (squares - sum * sum / n) / (n * n)
            }
            Prompts::Unpaired(variance) => *variance,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::table::Table;
    use crate::results::fixture;

    /// The words on Vaccine, from results with something changed.
    fn words(seeds: u64, change: impl Fn(&mut ResultRow)) -> String {
        let mut results = fixture::results(seeds);
        results.rows.iter_mut().for_each(change);
        let table = Table::new(&results).expect("a table");
        Differences::of(&table.blocks[0]).expect("a reference").words("Vaccine").expect("the method")
    }

    #[test]
    fn few_units_are_said_to_be_few() {
        let text = words(3, |_| ());
        assert!(text.contains("HS −20.0 (75 % CI"), "{text}");
        assert!(
            text.ends_with("cannot be told from chance with n = 3 seeds, the least possible p value is 0.25"),
            "{text}"
        );
        // Four differences: six seeds could show a single one, and eight can show this one.
        let text = words(6, |_| ());
        assert!(text.contains("the least possible p value is 0.031, 0.12 corrected for 4 differences"), "{text}");
        assert!(words(1, |_| ()).ends_with("one seed says nothing about another"));
    }

    #[test]
    fn enough_units_tell_a_large_difference_and_say_why_a_small_one_is_not() {
        let text = words(8, |row| {
            // Opposite differences in accuracy from seed to seed.
            if row.method == "Vaccine" {
                row.metrics.fine_tune_accuracy =
                    row.metrics.fine_tune_accuracy.map(|value| value + [-1., 1.][row.seed as usize % 2]);
            }
        });
        assert!(
            text.contains("HS −20.0 (95 % CI") && text.contains("): detectable on this one base (p = 0.031)"),
            "{text}"
        );
        assert!(text.contains("FA +0.0 (95 % CI") && text.ends_with("not detectable (p = 1.00)"), "{text}");
    }

    #[test]
    fn methods_are_compared_where_someone_attacks() {
        // At p = 0 plain fine-tuning is nearest to one half, but nobody attacks there.
        let harm = |row: &mut ResultRow, attacked: f64| {
            row.metrics.harmful_score = Some(if row.harmful_ratio > 0. { attacked } else { 45. });
        };
        let text = words(3, |row| harm(row, 90.));
        assert!(text.starts_with("against SFT at p = 0.1, HS"), "{text}");
        // With a choice, the rule is said.
        let mut results = fixture::results(3);
        let mut more: Vec<ResultRow> = results.rows.iter().filter(|row| row.harmful_ratio > 0.).cloned().collect();
        for row in &mut more {
            row.harmful_ratio = 0.2;
        }
        results.rows.extend(more);
        results.rows.iter_mut().for_each(|row| harm(row, if row.harmful_ratio == 0.2 { 70. } else { 10. }));
        let words = |results: &titer_core::report::Results| {
            let table = Table::new(results).expect("a table");
            Differences::of(&table.blocks[0]).expect("a reference").words("Vaccine").expect("the method")
        };
        let text = words(&results);
        assert!(text.starts_with("against SFT at p = 0.2, the p > 0 at which its HS is nearest to 50 %, HS"), "{text}");
        results.rows.retain(|row| row.harmful_ratio == 0.);
        let text = words(&results);
        assert!(text.starts_with("against SFT at p = 0, where nobody attacks, HS"), "{text}");
    }

    #[test]
    fn seeds_on_several_bases_are_no_further_units() {
        // Eight rows for each cell, on two bases.
        let text = words(8, |row| row.base_seed = Some(row.seed % 2));
        assert!(
            text.ends_with("cannot be told from chance with n = 2 bases, the least possible p value is 0.50"),
            "{text}"
        );
        let mut results = fixture::results(8);
        results.rows.iter_mut().for_each(|row| row.base_seed = Some(row.seed % 2));
        let table = Table::new(&results).expect("a table");
        let note = Differences::of(&table.blocks[0]).expect("a reference").note();
        assert!(note.contains("the 2 bases, each with its seeds averaged"), "{note}");
    }

    #[test]
    fn outcomes_pair_the_prompts() {
        // Every run of a method gives the same verdicts, and Vaccine refuses one prompt in five that SFT complies with.
        let outcomes = |row: &mut ResultRow, first: &str| {
            let rest = if row.method == "Vaccine" { "R" } else { "C" };
            row.outcomes.insert("harmful".into(), first.repeat(12) + &rest.repeat(3));
            row.metrics.harmful_score = Some(if row.method == "Vaccine" { 40. } else { 60. });
            row.n.insert("harmful".into(), 15);
        };
        let detected = |first: &'static str| {
            let mut results = fixture::results(8);
            results.rows.iter_mut().for_each(|row| outcomes(row, first));
            let table = Table::new(&results).expect("a table");
            let family = Differences::of(&table.blocks[0]).expect("a reference");
            family.tests.iter().find(|test| test.method == "Vaccine").map(|test| test.difference.p)
        };
        // The same prompts agree everywhere: three prompts carry the difference, and that is little.
        let p = detected("R").expect("a test");
        assert!((0.05..0.2).contains(&p), "{p}");
    }

    #[test]
    fn a_prompt_without_an_outcome_moves_no_other() {
        let results = fixture::results(1);
        let pair = |ours: &str, theirs: &str| {
            let row = |outcomes: &str| {
                let mut row = results.rows[0].clone();
                row.outcomes.insert("harmful".into(), outcomes.into());
                row
            };
            Pair::of(&row(ours), &row(theirs), TESTED[0]).expect("a pair")
        };
        let prompts = |pair: Pair| match pair.prompts {
            Prompts::Paired(prompts) => prompts,
            Prompts::Unpaired(variance) => panic!("unpaired, {variance}"),
        };
        let (one, other) = (pair("UCCR", "CCRR"), pair("CCC-", "CCRR"));
        assert_eq!(prompts(Pair::mean(vec![&one, &other])), [None, Some(0.), Some(100.), None]);
        assert_eq!(prompts(one), [None, Some(0.), Some(100.), Some(0.)]);
    }
}
