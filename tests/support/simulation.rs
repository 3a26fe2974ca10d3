//! How often the rule for differences errs, by simulation: experiments whose truth is known, through the same code as
//! real ones.

use std::collections::BTreeMap;

use rand::RngExt as _;
use rand_distr::{Distribution as _, StandardNormal};
use serde_json::json;
use titer::report::differences::{Differences, Test};
use titer::report::table::Table;
use titer::stats::{ALPHA, Summary};
use titer_core::report::{ResultRow, Results};
use titer_core::rng::{Generator, Seed};

/// Prompts of each probe.
const PROMPTS: usize = 150;
/// Methods beside plain fine-tuning, each tested on two metrics.
const METHODS: usize = 4;

/// How many bases, and seeds on each.
pub type Design = (u64, u64);

/// The designs of the table.
pub const DESIGNS: [Design; 11] =
    [(1, 3), (1, 5), (1, 6), (1, 10), (5, 1), (5, 3), (6, 1), (6, 3), (10, 1), (10, 3), (12, 1)];

/// Where the rates lie and what varies, as standard deviations in logits.
#[derive(Debug, Clone, Copy)]
pub struct Scenario {
    /// In a word.
    pub name: &'static str,
    /// The rate of plain fine-tuning, in logits.
    level: f64,
    /// How a method's effect varies from base to base.
    base: f64,
    /// From run to run.
    run: f64,
    /// From prompt to prompt.
    prompt: f64,
}

/// Rates in the middle; near zero, where most differences are ties; and effects that are peculiar to prompts.
pub const SCENARIOS: [Scenario; 3] = [
    Scenario { name: "rates near 50 %", level: 0., base: 0.4, run: 0.3, prompt: 0.5 },
    Scenario { name: "rates near 3 %", level: -3.5, base: 0.4, run: 0.3, prompt: 0.5 },
    Scenario { name: "effects by prompt", level: 0., base: 0.1, run: 0.1, prompt: 2. },
];

/// A large effect: from 50 % to 18 %.
const EFFECT: f64 = -1.5;

/// Shares of the simulated experiments, in `[0, 1]`.
#[derive(Debug, Clone, Copy, Default)]
pub struct Rates {
    /// Of single differences with `p ≤ 0.05`, without correction.
    pub single: f64,
    /// Of tables with a detectable difference, corrected.
    pub family: f64,
    /// Of single differences whose t interval over all runs, as if they were independent, excludes zero.
    pub runs_as_units: f64,
    /// Of experiments in which the first method's harmful score has `p ≤ 0.05`, without correction.
    pub first: f64,
    /// Of those in which it is detectable in its table.
    pub first_corrected: f64,
}

/// Simulates `count` experiments in which no method has an effect, or the first one a large one on harm.
pub fn simulate((bases, seeds): Design, scenario: Scenario, effect: bool, count: usize) -> Rates {
    let mut sum = Rates::default();
    for index in 0..count {
        let seed = Seed::new(index as u64).named(scenario.name).at(bases as usize).at(seeds as usize);
        let rows = experiment((bases, seeds), scenario, effect, &mut seed.generator());
        let results = Results { rows, ..Results::default() };
        let table = Table::new(&results).expect("rows of one protocol");
        let found = Differences::of(&table.blocks[0]).expect("plain fine-tuning is among the methods");
        let share = |fits: &dyn Fn(&Test) -> bool| {
            found.tests.iter().filter(|test| fits(test)).count() as f64 / found.tests.len() as f64
        };
        let flag = |holds: bool| f64::from(u8::from(holds));
        let first = &found.tests[0];
        sum.single += share(&|test| test.difference.p <= ALPHA);
        sum.family += flag(found.tests.iter().any(Test::detectable));
        sum.runs_as_units += share(&|test| excludes_zero(&results.rows, test));
        sum.first += flag(first.difference.p <= ALPHA);
        sum.first_corrected += flag(first.detectable());
    }
    let mean = |sum: f64| sum / count as f64;
    Rates {
        single: mean(sum.single),
        family: mean(sum.family),
        runs_as_units: mean(sum.runs_as_units),
        first: mean(sum.first),
        first_corrected: mean(sum.first_corrected),
    }
}

/// The rule of many a paper: a t interval over all runs.
fn excludes_zero(rows: &[ResultRow], test: &Test) -> bool {
    let values = |method: &str| -> Vec<f64> {
        let rows = rows.iter().filter(|row| row.method == method);
        rows.filter_map(|row| row.metrics.get(test.tested.metric)).collect()
    };
    let differences: Vec<f64> = values(test.method).iter().zip(values("SFT")).map(|(a, b)| a - b).collect();
    let interval = Summary::of(&differences).and_then(|summary| summary.interval());
    interval.is_some_and(|(low, high)| low > 0. || high < 0.)
}

/// The rows of one experiment. A prompt of a run is answered harmfully, or right, with the probability of a sum of
/// effects in logits: of base and prompt, which all methods share, and of base, run and prompt by method.
fn experiment((bases, seeds): Design, scenario: Scenario, effect: bool, generator: &mut Generator) -> Vec<ResultRow> {
    let mut rows = rows((bases, seeds));
    for (probe, letters) in [("harmful", ['C', 'R']), ("task", ['1', '0'])] {
        let shared = normals(bases as usize, 0.5, generator);
        let prompts = normals(PROMPTS, 1., generator);
        for (method, rows) in rows.chunks_mut((bases * seeds) as usize).enumerate() {
            // With one base, what it does to a method is no chance: the statement is about that base.
            let by_base = normals(bases as usize, if bases > 1 { scenario.base } else { 0. }, generator);
            let by_prompt = normals(PROMPTS, scenario.prompt, generator);
            let effect = if effect && method == 1 && probe == "harmful" { EFFECT } else { 0. };
            for row in rows {
                let base = row.base_seed.expect("a base") as usize;
                let run =
                    scenario.level + effect + shared[base] + by_base[base] + normals(1, scenario.run, generator)[0];
                let mut outcome = |prompt: usize| {
                    let logit = run + prompts[prompt] + by_prompt[prompt];
                    letters[usize::from(generator.random::<f64>() > 1. / (1. + (-logit).exp()))]
                };
                let outcomes: String = (0..PROMPTS).map(&mut outcome).collect();
                let rate = 100. * outcomes.matches(letters[0]).count() as f64 / PROMPTS as f64;
                match probe {
                    "harmful" => row.metrics.harmful_score = Some(rate),
                    _ => row.metrics.fine_tune_accuracy = Some(rate),
                }
                row.outcomes.insert(probe.to_owned(), outcomes);
            }
        }
    }
    rows
}

fn normals(count: usize, deviation: f64, generator: &mut Generator) -> Vec<f64> {
    let mut draw = || -> f64 { StandardNormal.sample(generator) };
    (0..count).map(|_| deviation * draw()).collect()
}

/// Rows without numbers: plain fine-tuning first, then the methods, each with every seed on every base.
fn rows((bases, seeds): Design) -> Vec<ResultRow> {
    let row: ResultRow = serde_json::from_value(json!({
        "method": "SFT", "align": { "defense": "sft" }, "fine_tune": { "defense": "sft" }, "post": null, "model": "llama",
        "base_seed": 0, "task": "agnews", "harmful_ratio": 0.1, "samples": 500, "learning_rate": 3e-4, "seed": 0,
        "lora": "double", "protocol": "simulated", "judge": "world", "metrics": {}, "n": {}, "intervals": {},
        "ledger": {
            "align_seconds": 0.0, "fine_tune_seconds": 0.0, "post_seconds": 0.0, "answer_seconds": 0.0, "passes_per_step": 0.0,
            "align_steps": 0, "fine_tune_steps": 0, "privileged": {}
        },
        "curves": { "align_loss": [], "fine_tune_loss": [], "harmful_loss": [] }, "answers": {}
    }))
    .expect("a row");
    let method = |method: usize| {
        let (name, defense) = if method == 0 { ("SFT".to_owned(), "sft") } else { (format!("M{method}"), "vaccine") };
        ResultRow { method: name, align: json!({ "defense": defense }), ..row.clone() }
    };
    let n = BTreeMap::from([("harmful".to_owned(), PROMPTS), ("task".to_owned(), PROMPTS)]);
    let mut rows = Vec::new();
    for method in (0..=METHODS).map(method) {
        for base in 0..bases {
            rows.extend((0..seeds).map(|seed| ResultRow {
                base_seed: Some(base),
                seed,
                n: n.clone(),
                ..method.clone()
            }));
        }
    }
    rows
}

/// The page of the figures, from `count` experiments for each.
pub fn page(count: usize) -> String {
    let percent = |share: f64| format!("{:.1}", 100. * share);
    let mut errors = String::new();
    let mut power = String::new();
    for design @ (bases, seeds) in DESIGNS {
        let cells: String = SCENARIOS
            .map(|scenario| simulate(design, scenario, false, count))
            .map(|rates| [rates.runs_as_units, rates.single, rates.family].map(percent).join(" | "))
            .map(|cells| format!(" {cells} |"))
            .concat();
        errors += &format!("| {bases} × {seeds} |{cells}\n");
        let rates = simulate(design, SCENARIOS[0], true, count);
        power += &format!("| {bases} × {seeds} | {} | {} |\n", percent(rates.first), percent(rates.first_corrected));
    }
    let deviation = 100. * (ALPHA * (1. - ALPHA) / count as f64).sqrt();
    let (tests, effect) = (2 * METHODS, 100. / (1. + (-EFFECT).exp()));
    let names = SCENARIOS.map(|scenario| format!("{}: runs as units | single | table", scenario.name)).join(" | ");
    format!(
        "# How often the rule for differences errs\n\n\
         Written by `cargo run --release -p titer-tests --example statistics`; the rule is at the head of \
         `runner/src/stats/mod.rs`. {count} simulated experiments for each figure, in percent of them: {METHODS} methods and \
         plain fine-tuning, two metrics of {PROMPTS} prompts each, so {tests} differences in a table. The effects of base, run \
         and prompt on each method are random, with mean zero; with one base, the base's effect is none, since what is said \
         holds for that base only. By chance alone a figure of 5 has a standard deviation of {deviation:.1}.\n\n\
         ## False alarms, where no method has an effect\n\n\
         *Runs as units* is a t interval over all seeds of all bases, as if they were independent, without correction. \
         *Single* is the rule's p value at 5 %, without correction. *Table* is a table with any difference called \
         detectable.\n\n\
         | bases × seeds | {names} |\n|---|{}\n{errors}\n\
         ## Power, where one method lowers the harmful score from 50 % to {effect:.0} %\n\n\
         With fewer than six units the exact test cannot reach 5 %, and the reports say so instead of \"not detectable\"; with \
         {tests} differences in a table it takes nine.\n\n\
         | bases × seeds | found, as the only difference | found, corrected for {tests} |\n|---|--:|--:|\n{power}",
        "--:|".repeat(3 * SCENARIOS.len())
    )
}
