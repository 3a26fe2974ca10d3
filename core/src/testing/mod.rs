//! What every defense and every model is checked for: the conformance suite.
//!
//! [`check_defense`] goes through the laws that a defense owes, on a small model of any architecture; [`check_model`]
//! through those of an architecture. Nothing has to be told about the plugin: settings, streams, sites and passes are
//! taken from its entry. [`Fixture::on`] puts all of it on another device. A plugin's own test is
//!
//! ```ignore
//! let fixture = Fixture::small(registry::find::<ModelEntry>("llama")?)?;
//! for check in check_defense(registry::find::<DefenseEntry>("mine")?, &fixture) {
//!     assert!(!check.outcome.failed(), "{check}");
//! }
//! ```
//!
//! | check of a defense | what holds |
//! |---|---|
//! | `defaults` | the default settings build, and survive being written and read |
//! | `unknown setting` | a misspelt setting is refused, and the nearest one named |
//! | `published form` | `fidelity = "code-exact"` builds, and every quirk is a setting that it changes |
//! | `runs` | a stage runs to its end on the declared streams alone, and all numbers stay finite |
//! | `sites` | declared sites exist, and no other kind is touched |
//! | `passes` | a step makes as many passes as declared |
//! | `neutral` | with the neutral settings the stage equals plain fine-tuning bit for bit |
//! | `active` | with the default settings it does not |
//! | `untouched` | a step leaves the weights as it found them, bit for bit |
//! | `failure` | so does a step in which a pass fails, and the failure is not hidden |
//! | `gradient` | the gradients are the slope of the logged loss, where that is the objective |
//! | `resume` | stopped and resumed, the stage ends in the same bits |
//! | `accumulation` | every micro batch counts, and accumulated batches are one large batch, unless the entry says why not |
//! | `checkpointing` | gradient checkpointing changes no bit, unless the entry says why the two do not go together |
//! | `one row`, `one layer` | a batch of one row; a model of one layer |
//! | `full`, `bf16`, `q8_0` | training of all parameters; bases in low precision |
//!
//! | check of an architecture | what holds |
//! |---|---|
//! | `defaults`, `unknown setting` | as above |
//! | `config.json` | the configuration that a model writes builds the same model |
//! | `blocks` | every block declares parameters of its own |
//! | `parameters`, `sites` | every one gets a gradient, and it is the slope of the loss |
//! | `padding`, `causality` | padding changes nothing; a token changes no earlier state |
//! | `decoding` | token by token with a cache, hidden states are those of one pass |
//! | `adapter` | every factor gets a gradient; merged, the adapter computes the same |
//! | `checkpointing` | running blocks again changes no bit |
//! | `bf16`, `q8_0` | a base in low precision computes nearly the same |

mod batches;
mod case;
mod entries;
mod fixture;
mod judge;
mod laws;
mod model;
mod numbers;
mod objective;
mod resume;
mod watched;

use std::fmt;

pub use fixture::Fixture;
pub use judge::verdicts;
pub use numbers::{difference, dot, values};

use crate::defense::entry::DefenseEntry;
use crate::defense::stage::Stage;
use crate::error::{Error, Result};
use crate::model::entry::ModelEntry;
use case::Case;

/// What one check found.
#[derive(Debug, Clone)]
pub struct Check {
    /// Which check, as in the table of this module.
    pub name: &'static str,
    /// The stage that the defense acted at, if it was run.
    pub stage: Option<Stage>,
    /// What was found.
    pub outcome: CheckOutcome,
}

/// How a check went.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CheckOutcome {
    /// It holds: what was measured.
    Passed(String),
    /// It does not hold: why.
    Failed(String),
    /// It does not apply: why.
    NotApplicable(&'static str),
}

impl CheckOutcome {
    /// Whether the check was made and does not hold.
    pub fn failed(&self) -> bool {
        matches!(self, Self::Failed(_))
    }

    /// Passed if `holds`; either way, the finding.
    fn judge(holds: bool, finding: impl Into<String>) -> Self {
        if holds { Self::Passed(finding.into()) } else { Self::Failed(finding.into()) }
    }
}

impl From<Result<CheckOutcome>> for CheckOutcome {
    fn from(result: Result<CheckOutcome>) -> Self {
        result.unwrap_or_else(|error| Self::Failed(told(&error)))
    }
}

/// An error on one line.
fn told(error: &Error) -> String {
    error.to_string().replace("\n  ", "; ")
}

impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (state, finding) = match &self.outcome {
            CheckOutcome::Passed(finding) => ("ok", finding.as_str()),
            CheckOutcome::Failed(finding) => ("FAILED", finding.as_str()),
            CheckOutcome::NotApplicable(why) => ("-", *why),
        };
        let stage = self.stage.map_or("", Stage::name);
        write!(f, "{state:<6}  {:<15}  {stage:<9}  {finding}", self.name)
    }
}

/// A check, and the name it goes by.
type Listed<T> = (&'static str, fn(&T) -> Result<CheckOutcome>);

/// A check of a defense at one stage, and the name it goes by.
type CaseCheck = (&'static str, fn(&Case) -> Result<CheckOutcome>);

/// What a stage of training is checked for once it runs at all.
const TRAINING: &[CaseCheck] = &[
    ("sites", laws::sites),
    ("passes", laws::passes),
    ("neutral", laws::neutral),
    ("active", laws::active),
    ("untouched", laws::untouched),
    ("failure", laws::failure),
    ("gradient", objective::gradient),
    ("resume", resume::resume),
    ("accumulation", batches::accumulation),
    ("checkpointing", laws::checkpointing),
    ("one row", batches::one_row),
    ("one layer", batches::one_layer),
    ("full", batches::full),
    ("bf16", batches::bf16),
    ("q8_0", batches::q8_0),
];

/// The same of what happens after the user's fine-tuning, without steps.
const POST: &[CaseCheck] = &[
    ("sites", laws::sites),
    ("neutral", laws::neutral),
    ("active", laws::active),
    ("one row", batches::one_row),
    ("one layer", batches::one_layer),
    ("full", batches::full),
    ("bf16", batches::bf16),
    ("q8_0", batches::q8_0),
];

/// Checks a defense on a model of any architecture.
pub fn check_defense(entry: &DefenseEntry, world: &Fixture) -> Vec<Check> {
    let mut checks = listed(entries::CHECKS, entry, None);
    // Alignment and fine-tuning are the same work to a defense; one of the two is gone through.
    let training = entry.stages.iter().copied().find(|stage| *stage != Stage::Post);
    let post = entry.stages.iter().copied().find(|stage| *stage == Stage::Post);
    for (stage, list) in [(training, TRAINING), (post, POST)] {
        if let Some(stage) = stage {
            checks.extend(at_stage(&Case::new(entry, world, stage), list));
        }
    }
    checks
}

/// Checks an architecture.
pub fn check_model(entry: &ModelEntry) -> Vec<Check> {
    let built = Fixture::small(entry);
    let mut checks = listed(model::ENTRY_CHECKS, entry, None);
    match built {
        Ok(world) => checks.extend(listed(model::CHECKS, world.model(), None)),
        Err(error) => {
            checks.push(Check { name: "builds", stage: None, outcome: CheckOutcome::Failed(told(&error)) });
        }
    }
    checks
}

fn listed<T: ?Sized>(list: &[Listed<T>], subject: &T, stage: Option<Stage>) -> Vec<Check> {
    list.iter().map(|(name, check)| Check { name, stage, outcome: check(subject).into() }).collect()
}

/// The checks of one stage. What does not run, or trains nothing, is not checked for how it runs.
fn at_stage(case: &Case, list: &[CaseCheck]) -> Vec<Check> {
    let (name, stage) = ("runs", Some(case.stage));
    let outcome = CheckOutcome::from(laws::runs(case));
    let why = match &outcome {
        CheckOutcome::Passed(_) => None,
        CheckOutcome::Failed(_) => Some("it does not run"),
        CheckOutcome::NotApplicable(why) => Some(*why),
    };
    let mut checks = vec![Check { name, stage, outcome }];
    match why {
        None => checks.extend(listed(list, case, stage)),
        Some(why) => checks.extend(list.iter().map(|(name, _)| {
            let outcome = CheckOutcome::NotApplicable(why);
            Check { name, stage, outcome }
        })),
    }
    checks
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// The table in the documentation of this module names every check, and no other.
    #[test]
    fn the_tables_are_those_of_the_checks() {
        let first = |line: &'static str| line.strip_prefix("//! |").and_then(|line| line.split('|').next());
        let cells = include_str!("mod.rs").lines().filter_map(first);
        let told: BTreeSet<&str> = cells.flat_map(|cell| cell.split('`').skip(1).step_by(2)).collect();
        let of_cases = TRAINING.iter().chain(POST).map(|(name, _)| *name);
        let of_entries = entries::CHECKS.iter().map(|(name, _)| *name);
        let of_models = model::CHECKS.iter().map(|(name, _)| *name);
        let of_model_entries = model::ENTRY_CHECKS.iter().map(|(name, _)| *name);
        let made = of_cases.chain(of_entries).chain(of_models).chain(of_model_entries).chain(["runs"]);
        assert_eq!(told, made.collect());
    }
}
