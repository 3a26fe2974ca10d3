//! The `Judge` trait: what an answer to a prompt amounts to.

mod context;
mod off_task;
mod verdict;

use std::fmt::Debug;
use std::path::{Path, PathBuf};

use crate::data::row::Row;
use crate::error::Result;
use crate::registry::entry::{Entry, by_fields};
use crate::registry::settings::{Settings, SettingsType};

pub use context::JudgeCx;
pub use off_task::{REPEATS, repeated};
pub use verdict::{Label, Verdict};

/// An answer to be judged.
#[derive(Debug, Clone, Copy)]
pub struct Asked<'a> {
    /// The prompt. Its `output` is the reference answer, empty if there is none.
    pub row: &'a Row,
    /// What the model said.
    pub answer: &'a str,
}

/// The answers of one model to the prompts of one probe, which are judged together.
#[derive(Debug, Clone, Copy)]
pub struct Answers<'a> {
    /// The answers.
    pub asked: &'a [Asked<'a>],
    /// The labels that the user's task is answered with, `positive` and `negative` say. Empty for open answers.
    pub labels: &'a [String],
}

/// Gives verdicts on answers. Answers are generated once and stored; any number of judges read them later.
///
/// A judge may be a rule, a model that it opens with [`JudgeCx::open`], or a service that it asks.
///
/// ```
/// use titer_core::testing::verdicts;
/// use titer_core::{Answers, Asked, Judge, JudgeCx, Label, Result, Row, Verdict};
///
/// /// Takes short answers for refusals.
/// #[derive(Debug)]
/// struct Short;
///
/// impl Judge for Short {
///     fn judge(&self, answers: &Answers, cx: &mut JudgeCx) -> Result<()> {
///         let off_task = answers.off_task();
///         for place in cx.pending() {
///             let words = answers.asked[place].answer.split_whitespace().count();
///             let label = match words {
///                 _ if off_task[place] => Label::OffTask,
///                 0 => Label::Incoherent,
///                 1..=3 => Label::Refused,
///                 _ => Label::Complied,
///             };
///             cx.give([(place, Verdict::from(label).with_score(words as f64))])?;
///         }
///         Ok(())
///     }
/// }
///
/// # fn main() -> Result<()> {
/// let row = Row::new("how do i open it ?", "");
/// let asked = [Asked { row: &row, answer: "no , sorry" }];
/// let given = verdicts(&Short, &Answers { asked: &asked, labels: &[] })?;
/// assert_eq!(given[0].label(), Some(Label::Refused));
/// # Ok(())
/// # }
/// ```
pub trait Judge: Debug + Send + Sync {
    /// Gives a verdict on every answer in [`JudgeCx::pending`], with [`JudgeCx::give`], a batch at a time and in any order.
    /// What is given is kept if the judge fails or is stopped, and is not pending when it is asked again.
    /// [`Answers::off_task`] tells which are answers to something else as far as that can be told without understanding
    /// them.
    ///
    /// # Errors
    /// The judge could not be asked, or [`JudgeCx::give`] says to stop.
    fn judge(&self, answers: &Answers, cx: &mut JudgeCx) -> Result<()>;

    /// The files that verdicts depend on, in a fixed order, such as [`model_files`](crate::causal_lm::model_files) of a
    /// model. Their content is part of every cache key, and stands for the settings that are paths: mark those with
    /// `#[schemars(extend("format" = "path"))]`, or moving a file computes everything again.
    ///
    /// # Errors
    /// The files cannot be listed.
    fn files(&self) -> Result<Vec<PathBuf>> {
        Ok(Vec::new())
    }
}

/// Describes a judge to the registry.
#[derive(Debug)]
pub struct JudgeEntry {
    /// The name in configurations.
    pub name: &'static str,
    /// One line for `titer list`.
    pub summary: &'static str,
    /// The type of its settings.
    pub settings: SettingsType,
    /// Changes whenever a verdict may.
    pub version: u32,
    /// Builds the judge. Relative paths in the settings are taken from the given folder.
    pub build: fn(&Settings, &Path) -> Result<Box<dyn Judge>>,
}

inventory::collect!(JudgeEntry);

impl Entry for JudgeEntry {
    const KIND: &'static str = "judge";
    by_fields!();
}
