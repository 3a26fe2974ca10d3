//! The `AlignmentDefense` trait: how one update is made.

use std::collections::BTreeMap;
use std::fmt::Debug;

use candle_core::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::data::Batch;
use crate::registry::Entry;
use crate::sites::Sites;
use crate::step::{StageCx, StepCx, Update};
use crate::{Result, Settings, SettingsType};

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

/// What a defense keeps between steps, for an exact resume: tensors and one JSON value.
#[derive(Debug, Clone, Default)]
pub struct State {
    /// Tensors by name.
    pub tensors: BTreeMap<String, Tensor>,
    /// Everything else.
    pub value: Value,
}

/// A defense against harmful fine-tuning.
///
/// It owns *how one update is made* and nothing else: not the loop, the optimiser, the schedule, logging or files. It
/// calls the engine through [`StepCx`]. Every method has a default, and the defaults together are plain supervised
/// fine-tuning.
pub trait AlignmentDefense: Debug + Send {
    /// Before the first step: a Fisher pass, a frozen reference, a snapshot.
    ///
    /// # Errors
    /// The preparation failed.
    fn begin(&mut self, _cx: &mut StageCx) -> Result<()> {
        Ok(())
    }

    /// One update for `batch`. It must leave the weights as it found them (law 1).
    ///
    /// # Errors
    /// A pass failed.
    fn step(&mut self, cx: &mut StepCx, batch: &Batch) -> Result<Update> {
        Ok(Update::from(cx.backward(batch, Sites::none())?))
    }

    /// After the last step: prune, project, merge. Post-fine-tuning defenses live here; they may change the weights.
    ///
    /// # Errors
    /// The work failed.
    fn finish(&mut self, _cx: &mut StageCx) -> Result<()> {
        Ok(())
    }

    /// What an exact resume needs.
    fn state(&self) -> State {
        State::default()
    }

    /// Goes on from what [`AlignmentDefense::state`] gave.
    ///
    /// # Errors
    /// The state belongs to another defense.
    fn load_state(&mut self, _state: State) -> Result<()> {
        Ok(())
    }
}

/// What a defense must know that an ordinary provider may not: declared, so that unequal comparisons show.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Privilege {
    /// Whether it sees harmful answers.
    pub harmful_answers: bool,
    /// What it needs, in words; "none" if nothing.
    pub needs: &'static str,
}

impl Privilege {
    /// Nothing beyond the data of the stage itself.
    pub const NONE: Self = Self { harmful_answers: false, needs: "none" };
}

/// Describes a defense to the registry.
#[derive(Debug)]
pub struct DefenseEntry {
    /// The name in configurations.
    pub name: &'static str,
    /// One line for `titer list`.
    pub summary: &'static str,
    /// Where it was published.
    pub paper: &'static str,
    /// The update rule in the paper's symbols.
    pub formula: &'static str,
    /// The stages it can act at.
    pub stages: &'static [Stage],
    /// The extra data streams it draws from, such as `harmful` or `safe`.
    pub streams: &'static [&'static str],
    /// The kinds of sites it acts on, such as `attn_out`.
    pub sites: &'static [&'static str],
    /// Forward-and-backward passes per step, with the settings given.
    pub passes: fn(&Value) -> f64,
    /// What it must know.
    pub privilege: Privilege,
    /// Where it deliberately differs from published code, or offers the choice.
    pub notes: &'static str,
    /// The type of its settings.
    pub settings: SettingsType,
    /// Settings at which it must equal plain fine-tuning bit for bit (law 3); `None` if it has no such settings.
    pub neutral: Option<fn() -> Value>,
    /// Changes whenever an update may.
    pub version: u32,
    /// Builds the defense.
    pub build: fn(&Settings) -> Result<Box<dyn AlignmentDefense>>,
}

inventory::collect!(DefenseEntry);

impl Entry for DefenseEntry {
    const KIND: &'static str = "defense";
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
