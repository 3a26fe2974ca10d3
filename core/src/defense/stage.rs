//! The stages of a run, and where one stands.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The stages at which a defense can act.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// The provider aligns the base model on safe data, before any user comes.
    Align,
    /// The provider fine-tunes on the user's data.
    FineTune,
    /// After fine-tuning, before the model is served.
    Post,
}

impl Stage {
    /// The name in configurations and results.
    pub const fn name(self) -> &'static str {
        match self {
            Stage::Align => "align",
            Stage::FineTune => "fine_tune",
            Stage::Post => "post",
        }
    }
}

/// Where a stage stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Clock {
    /// Updates applied so far in this stage.
    pub step: usize,
    /// Updates this stage will apply in all.
    pub total: usize,
    /// Index of the micro batch within the update, under gradient accumulation.
    pub micro: usize,
    /// Micro batches per update: 1 without gradient accumulation.
    pub micros: usize,
}

impl Clock {
    /// The first micro batch of update `step` out of `total`, without gradient accumulation.
    pub const fn at(step: usize, total: usize) -> Self {
        Self { step, total, micro: 0, micros: 1 }
    }

    /// Whether this is the last micro batch of its update.
    pub const fn last_micro(self) -> bool {
        self.micro + 1 == self.micros
    }
}
