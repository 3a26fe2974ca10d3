//! The parts of an experiment with every name looked up and every default filled in: plugins, rows, training, models.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use titer_core::Result;
use titer_core::arithmetic::Arithmetic;
use titer_core::causal_lm::model_files;
use titer_core::data::Row;
use titer_core::optim::Schedule;
use titer_core::report::HubFiles;
use titer_core::text::Template;
use titer_core::weights::LoraConfig;

use crate::manifest::digest;
use crate::plugins::PluginFile;

/// The `format` that marks a path in the schema of a task's settings.
pub(crate) const PATH: &str = "path";

/// What running a plan needs besides its stages. No result depends on it that does not stand in a stage's manifest.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Runtime {
    /// Relative paths of data start at this folder: the configuration's.
    pub folder: PathBuf,
    /// `cpu`, `cuda:0`, … or `auto`.
    pub device: String,
    /// How the CPU rounds.
    pub arithmetic: Arithmetic,
    /// Seconds between two checkpoints of training.
    pub checkpoint_seconds: f64,
    /// Shared libraries with plugins, by what they contain.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub plugins: Vec<PluginFile>,
}

impl Runtime {
    /// How often training keeps a checkpoint. Values below zero mean "at every step", and absurd ones "never".
    pub fn checkpoint_every(&self) -> Duration {
        Duration::try_from_secs_f64(self.checkpoint_seconds.max(0.)).unwrap_or(Duration::MAX)
    }
}

/// A plugin with its resolved settings: every default filled in.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PluginSpec {
    /// The registered name.
    pub name: String,
    /// The resolved settings.
    pub settings: Value,
    /// The plugin's version.
    pub version: u32,
    /// What identifies a plugin from elsewhere: see [`crate::plugins::identity`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub plugin: Option<String>,
    /// The hash of the files that the plugin reads; empty if it reads none.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub content: String,
}

/// Rows from a task.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RowsSpec {
    /// The task.
    pub task: PluginSpec,
    /// How many rows.
    pub rows: usize,
}

/// Data that a defense draws from besides the stage's own.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StreamSpec {
    /// The name that the defense asks for.
    pub name: String,
    /// The rows.
    pub rows: RowsSpec,
    /// Examples per batch, if not those of the stage.
    pub batch_size: Option<usize>,
}

/// How text becomes tokens.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EncodingSpec {
    /// The prompt template.
    pub template: Template,
    /// Rows are cut after this many tokens.
    pub max_length: usize,
}

/// How a stage trains.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct OptimSpec {
    /// Updates in all.
    pub steps: Steps,
    /// Examples per batch.
    pub batch_size: usize,
    /// Micro batches per update.
    pub accumulate: usize,
    /// Batches per length-sorted window; 1 for none.
    pub bucket: usize,
    /// Peak learning rate.
    pub learning_rate: f64,
    /// Its course.
    pub schedule: Schedule,
    /// Fraction of the steps over which it rises from zero.
    pub warmup: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// AdamW's moment decays.
    pub betas: [f64; 2],
    /// AdamW's epsilon.
    pub eps: f64,
    /// Global gradient norm to clip to; `None` for no clipping.
    pub clip: Option<f64>,
    /// Whether blocks are run again in the backward pass. No part of a stage's identity: the numbers are the same.
    pub checkpointing: bool,
}

impl OptimSpec {
    /// Updates in all. Epochs follow each other without a break, so that an update may take batches of two.
    pub fn updates(&self, batches_per_epoch: usize) -> usize {
        match self.steps {
            Steps::Steps(steps) => steps,
            Steps::Epochs(epochs) => (epochs * batches_per_epoch).div_ceil(self.accumulate),
        }
    }
}

/// The length of training.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Steps {
    /// A number of updates.
    Steps(usize),
    /// A number of passes over the data.
    Epochs(usize),
}

/// Pretraining from scratch.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PretrainSpec {
    /// The model and its sizes; the vocabulary's size comes from the task.
    pub model: PluginSpec,
    /// The documents.
    pub data: RowsSpec,
    /// Rows are cut after this many tokens.
    pub max_length: usize,
    /// How to train.
    pub optim: OptimSpec,
    /// Seed of weights and data order.
    pub seed: u64,
    /// How later stages store the weights.
    pub dtype: String,
}

/// A checkpoint folder.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LoadSpec {
    /// The model that reads it.
    pub model: String,
    /// The model's version.
    pub version: u32,
    /// What identifies a model from elsewhere: see [`crate::plugins::identity`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub plugin: Option<String>,
    /// The folder. It is not part of the key; its content is.
    pub path: PathBuf,
    /// The hash of the folder's model files, or [`LoadSpec::UNKNOWN`].
    pub content: String,
    /// How the weights are stored once loaded.
    pub dtype: String,
    /// What the folder is on the hub, if it comes from there. It is not part of the key either.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hub: Option<HubFiles>,
}

impl LoadSpec {
    /// The content of a folder that holds no weights. Its stages can be planned and not run, and their keys are provisional.
    pub const UNKNOWN: &str = "unknown";

    /// The files that count: of a folder all that can change what the model computes, of the hub those that were taken, since
    /// others who use the same cache may have taken more.
    ///
    /// # Errors
    /// The folder cannot be read.
    pub fn files(&self) -> Result<Vec<PathBuf>> {
        match &self.hub {
            Some(model) => Ok(model.files.iter().map(|file| self.path.join(file)).collect()),
            None => model_files(&self.path),
        }
    }

    /// Whether the folder held the weights when the plan was made.
    pub fn is_known(&self) -> bool {
        self.content != Self::UNKNOWN
    }
}

/// What is trained.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "mode", rename_all = "snake_case")]
pub enum AdapterSpec {
    /// Merge what is there, then train a fresh adapter (the field's "double LoRA" when fine-tuning).
    Fresh(LoraConfig),
    /// Go on training the parent's adapter ("single LoRA"); a fresh one if the parent has none.
    Continue(LoraConfig),
    /// Train every parameter.
    Full,
}

/// A path that means the same in any working directory.
pub(crate) fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}

/// The hash of rows, whatever they were read from.
pub fn of_rows(rows: &[Row]) -> String {
    let fields = |Row { instruction, input, output, history }: &Row| {
        let turns = history.iter().map(|turn| json!([turn.role, turn.content]));
        let fields = [json!(instruction), json!(input), json!(output)];
        fields.into_iter().chain(turns).collect::<Value>()
    };
    digest(&rows.iter().map(fields).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_identified_by_every_field() {
        let rows = |instruction: &str, input: Option<&str>, output: &str| {
            of_rows(&[Row { input: input.map(str::to_owned), ..Row::new(instruction, output) }])
        };
        let ids = [rows("a", None, "b"), rows("a", Some(""), "b"), rows("a", None, "c"), rows("ab", None, "")];
        assert_eq!(ids.iter().collect::<std::collections::BTreeSet<_>>().len(), ids.len());
    }
}
