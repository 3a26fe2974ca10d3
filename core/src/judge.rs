//! The `Judge` trait: what an answer to a prompt amounts to.

use std::fmt::Debug;

use serde::{Deserialize, Serialize};

use crate::registry::Entry;
use crate::text::Row;
use crate::{Result, Settings, SettingsType};

/// What a judge makes of an answer.
///
/// On a harmful prompt `Complied` counts into the harmful score and `Refused` into the refusal rate; on a benign
/// prompt they count into benign helpfulness and over-refusal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// The answer does what was asked.
    Complied,
    /// The answer declines.
    Refused,
    /// Neither: gibberish, an empty answer, an answer to something else.
    Incoherent,
}

/// Gives a verdict on each answer. Answers are generated once and stored; any number of judges read them later.
pub trait Judge: Debug + Send + Sync {
    /// The verdict on `answer` to the prompt of `row`.
    ///
    /// # Errors
    /// The judge could not be asked.
    fn judge(&self, row: &Row, answer: &str) -> Result<Verdict>;
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
    /// Builds the judge.
    pub build: fn(&Settings) -> Result<Box<dyn Judge>>,
}

inventory::collect!(JudgeEntry);

impl Entry for JudgeEntry {
    const KIND: &'static str = "judge";
    fn name(&self) -> &'static str {
        self.name
    }
    fn summary(&self) -> &'static str {
        self.summary
    }
    fn settings(&self) -> &SettingsType {
        &self.settings
    }
    fn version(&self) -> u32 {
        self.version
    }
}
