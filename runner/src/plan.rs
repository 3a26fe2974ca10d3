//! The plan: which stages must run, in what order, for which cells of the table. Plain data.
//!
//! A plan is a pure function of configuration, registry and data files: no device, no weights. Each stage has a key,
//! the hash of everything that can change its result; two cells that share a prefix share its stages.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::Value;
use titer_core::optim::Schedule;
use titer_core::report::Input;
use titer_core::weights::LoraConfig;

use crate::label::Label;

/// A stage's identity: the hash of its [manifest](PlannedStage::manifest).
pub type Key = String;

/// The whole plan.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Plan {
    /// The experiment's name.
    pub experiment: String,
    /// What decides the rounding: see [`titer_core::arithmetic`].
    pub arithmetic: String,
    /// Every file that was read, with its hash.
    pub inputs: Vec<Input>,
    /// The protocols of the cells by their id.
    pub protocols: BTreeMap<String, Value>,
    /// The settings of the cells by their id.
    pub settings: BTreeMap<String, Value>,
    /// Every stage once, parents first.
    pub stages: Vec<PlannedStage>,
    /// The cells of the table.
    pub cells: Vec<Cell>,
}

/// One stage of the plan.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PlannedStage {
    /// Its identity.
    pub key: Key,
    /// What it is, for people: `align Vaccine, seed 0`.
    pub label: String,
    /// The stage whose artifact it starts from.
    pub parent: Option<Key>,
    /// What to do.
    pub spec: StageSpec,
    /// Every input that the key is the hash of: see [`crate::identity`].
    pub manifest: Value,
}

/// What a stage does.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "stage", rename_all = "snake_case")]
#[expect(clippy::large_enum_variant, reason = "a plan holds few of them")]
pub enum StageSpec {
    /// Pretrains a model from scratch.
    Pretrain(PretrainSpec),
    /// Takes a checkpoint folder as it is.
    Load(LoadSpec),
    /// Trains under a defense: alignment or fine-tuning.
    Train(TrainSpec),
    /// Applies a post-fine-tuning defense.
    Post(PostSpec),
    /// Generates answers to prompts.
    Answer(AnswerSpec),
    /// Judges or scores stored answers.
    Judge(JudgeSpec),
}

/// A plugin with its resolved settings: every default filled in.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PluginSpec {
    /// The registered name.
    pub name: String,
    /// The resolved settings.
    pub settings: Value,
    /// The plugin's version.
    pub version: u32,
    /// What identifies a plugin from elsewhere: see [`crate::plugins::identity`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub plugin: Option<String>,
}

/// Rows from a task.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RowsSpec {
    /// The task.
    pub task: PluginSpec,
    /// How many rows.
    pub rows: usize,
    /// The hash of the files the task reads; empty for generated data.
    pub content: String,
}

/// Data that a defense draws from besides the stage's own.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StreamSpec {
    /// The name that the defense asks for.
    pub name: String,
    /// The rows.
    pub rows: RowsSpec,
    /// Examples per batch, if not those of the stage.
    pub batch_size: Option<usize>,
}

/// How text becomes tokens.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct EncodingSpec {
    /// The prompt template: a built-in name or a Jinja text.
    pub template: String,
    /// Rows are cut after this many tokens.
    pub max_length: usize,
}

/// How a stage trains.
#[derive(Debug, Clone, PartialEq, Serialize)]
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

/// The length of training.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Steps {
    /// A number of updates.
    Steps(usize),
    /// A number of passes over the data.
    Epochs(usize),
}

/// Pretraining from scratch.
#[derive(Debug, Clone, PartialEq, Serialize)]
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
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LoadSpec {
    /// The model that reads it.
    pub model: String,
    /// The model's version.
    pub version: u32,
    /// What identifies a model from elsewhere: see [`crate::plugins::identity`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub plugin: Option<String>,
    /// The folder. It is not part of the key; its content is.
    pub path: std::path::PathBuf,
    /// The hash of the folder's model files.
    pub content: String,
    /// How the weights are stored once loaded.
    pub dtype: String,
}

/// Training under a defense.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TrainSpec {
    /// `align` or `fine_tune`.
    pub phase: titer_core::Stage,
    /// The defense.
    pub defense: PluginSpec,
    /// The rows to train on, concatenated.
    pub data: Vec<RowsSpec>,
    /// In fine-tuning, the harmful rows mixed in.
    pub harmful: Option<MixSpec>,
    /// The defense's extra streams.
    pub streams: Vec<StreamSpec>,
    /// Held-back harmful rows whose loss is tracked.
    pub monitor: Option<RowsSpec>,
    /// Text to tokens.
    pub encoding: EncodingSpec,
    /// How to train.
    pub optim: OptimSpec,
    /// The adapter to train.
    pub adapter: AdapterSpec,
    /// The cell's seed.
    pub seed: u64,
}

/// Harmful rows in a user's data.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct MixSpec {
    /// Where they come from; `rows` is how many are used.
    pub source: RowsSpec,
    /// Their share of all rows.
    pub ratio: f64,
}

/// What is trained.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "mode", rename_all = "snake_case")]
pub enum AdapterSpec {
    /// Merge what is there, then train a fresh adapter (the field's "double LoRA" when fine-tuning).
    Fresh(LoraConfig),
    /// Go on training the parent's adapter ("single LoRA"); a fresh one if the parent has none.
    Continue(LoraConfig),
    /// Train every parameter.
    Full,
}

/// A post-fine-tuning defense.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PostSpec {
    /// The defense.
    pub defense: PluginSpec,
    /// Its extra streams.
    pub streams: Vec<StreamSpec>,
    /// Text to tokens.
    pub encoding: EncodingSpec,
    /// Examples per batch of the streams.
    pub batch_size: usize,
    /// The cell's seed.
    pub seed: u64,
}

/// Answers to prompts.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct AnswerSpec {
    /// `harmful`, `benign` or `task`.
    pub probe: String,
    /// The prompts.
    pub prompts: RowsSpec,
    /// The prompt template.
    pub template: String,
    /// Greedy decoding, at most this many tokens.
    pub max_new_tokens: usize,
    /// Prompts per batch. Not part of the key: answers do not depend on it.
    pub batch_size: usize,
}

/// Verdicts on answers.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct JudgeSpec {
    /// `harmful`, `benign` or `task`.
    pub probe: String,
    /// The judge, or for the `task` probe `None`: the task's own scoring.
    pub judge: Option<PluginSpec>,
    /// The prompts' task, which scores the `task` probe.
    pub prompts: RowsSpec,
    /// What the user's task is answered with, for a judge to know it from an answer; empty for open answers.
    pub labels: Vec<String>,
}

/// One cell of the table.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Cell {
    /// The method's name.
    pub method: String,
    /// The alignment defense with its settings, as results.json shows it.
    pub align: Value,
    /// The fine-tuning defense with its settings.
    pub fine_tune: Value,
    /// The post-fine-tuning defense with its settings, or null.
    pub post: Value,
    /// The base model.
    pub model: String,
    /// The base's seed.
    pub base_seed: Option<u64>,
    /// The user's task, by its name in the configuration.
    pub task: String,
    /// Share of harmful rows.
    pub harmful_ratio: f64,
    /// Rows of user data.
    pub samples: usize,
    /// Peak learning rate of fine-tuning.
    pub learning_rate: f64,
    /// The seed.
    pub seed: u64,
    /// `double`, `single` or `full`.
    pub lora: String,
    /// The id of the protocol: how it is measured.
    pub protocol: String,
    /// The id of the setting: what is attacked, and how.
    pub setting: String,
    /// Method, task, ratio, samples, rate and seeds.
    pub coordinates: Value,
    /// The hash of protocol, setting and coordinates.
    pub id: String,
    /// What a reader must know about the combination of defenses.
    pub notes: Vec<String>,
    /// The base stage.
    pub base_key: Key,
    /// The alignment stage; `None` for the method without alignment.
    pub align_key: Option<Key>,
    /// The fine-tuning stage.
    pub fine_tune_key: Key,
    /// The post stage.
    pub post_key: Option<Key>,
    /// Judge stages of the aligned model: `(probe, judge's name, key)`; the name is empty for the task's own scoring.
    pub aligned_judgements: Vec<(String, String, Key)>,
    /// Judge stages of the final model.
    pub judgements: Vec<(String, String, Key)>,
}

impl Cell {
    /// The cell in words: see [`Label`].
    pub fn label(&self) -> String {
        Label::from(self).to_string()
    }

    /// The stages the cell is made of, parents first.
    pub fn keys(&self) -> impl Iterator<Item = &Key> {
        let judged = self.aligned_judgements.iter().chain(&self.judgements).map(|(_, _, key)| key);
        let trained =
            [Some(&self.base_key), self.align_key.as_ref(), Some(&self.fine_tune_key), self.post_key.as_ref()];
        trained.into_iter().flatten().chain(judged)
    }
}
