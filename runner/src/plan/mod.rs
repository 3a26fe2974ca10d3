//! The plan: which stages must run, in what order, for which cells of the table. Plain data.
//!
//! A plan is a pure function of configuration, registry and data files: no device, no weights. Each stage has a key,
//! the hash of everything that can change its result; two cells that share a prefix share its stages.

pub mod cost;
pub mod identity;
pub mod planner;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use titer_core::report::{HubFiles, Input};
use titer_core::text::Template;

use crate::experiment::axes::Coordinates;
use crate::experiment::spec::{
    AdapterSpec, EncodingSpec, LoadSpec, OptimSpec, PluginSpec, PretrainSpec, RowsSpec, Runtime, StreamSpec,
};
use crate::store::Key;

/// The whole plan.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// The experiment's name.
    pub experiment: String,
    /// What decides the rounding: see [`titer_core::arithmetic`].
    pub arithmetic: String,
    /// What running it needs besides its stages.
    pub runtime: Runtime,
    /// Every file that was read, with its hash.
    pub inputs: Vec<Input>,
    /// Data sets of the hub that were read.
    pub hub_data: Vec<HubFiles>,
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
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PlannedStage {
    /// Its identity.
    pub key: Key,
    /// What it is, for people: `align Vaccine, seed 0`.
    pub label: String,
    /// The stage whose artifact it starts from.
    pub parent: Option<Key>,
    /// What to do.
    pub spec: StageSpec,
    /// Every input that the key is the hash of: see [`crate::plan::identity`].
    pub manifest: Value,
}

/// What a stage does.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
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

/// Training under a defense.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
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

impl TrainSpec {
    /// Rows in all, harmful ones included.
    pub fn rows(&self) -> usize {
        let harmful = self.harmful.as_ref().map_or(0, |mix| mix.source.rows);
        self.data.iter().map(|rows| rows.rows).sum::<usize>() + harmful
    }
}

/// Harmful rows in a user's data.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MixSpec {
    /// Where they come from; `rows` is how many are used.
    pub source: RowsSpec,
    /// Their share of all rows.
    pub ratio: f64,
}

/// A post-fine-tuning defense.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
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
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AnswerSpec {
    /// `harmful`, `benign` or `task`.
    pub probe: String,
    /// The prompts.
    pub prompts: RowsSpec,
    /// The prompt template.
    pub template: Template,
    /// Greedy decoding, at most this many tokens.
    pub max_new_tokens: usize,
    /// Prompts per batch. Not part of the key: answers do not depend on it.
    pub batch_size: usize,
}

/// Verdicts on answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
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

impl Plan {
    /// A stage with all that it builds on: itself first, then its parent, and so on to the base; empty if the plan has no
    /// such stage.
    pub fn chain(&self, key: &str) -> Vec<PlannedStage> {
        let find = |key: &str| self.stages.iter().find(|stage| stage.key == key);
        let parent = |stage: &&PlannedStage| find(stage.parent.as_deref()?);
        // A plan from a file may have any parents.
        std::iter::successors(find(key), parent).take(self.stages.len()).cloned().collect()
    }

    /// The checkpoints that it begins with.
    pub fn checkpoints(&self) -> impl Iterator<Item = &LoadSpec> {
        self.stages.iter().filter_map(|stage| match &stage.spec {
            StageSpec::Load(spec) => Some(spec),
            _ => None,
        })
    }

    /// The checkpoint without weights that the plan was made for, if any: it must not be run.
    pub fn without_weights(&self) -> Option<&LoadSpec> {
        self.checkpoints().find(|spec| !spec.is_known())
    }
}

/// One cell of the table.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Cell {
    /// The value of each axis by its name, and what the method is.
    pub coordinates: Map<String, Value>,
    /// The alignment defense with its settings, as results.json shows it.
    pub align: Value,
    /// The fine-tuning defense with its settings.
    pub fine_tune: Value,
    /// The post-fine-tuning defense with its settings, or null.
    pub post: Value,
    /// The base model.
    pub model: String,
    /// `double`, `single` or `full`.
    pub lora: String,
    /// The id of the protocol: how it is measured.
    pub protocol: String,
    /// The id of the setting: what is attacked, and how.
    pub setting: String,
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
    /// The cell in words: see [`Coordinates::label`].
    pub fn label(&self) -> String {
        Coordinates::of(&self.coordinates).label()
    }

    /// The stages the cell is made of, parents first.
    pub fn keys(&self) -> impl Iterator<Item = &Key> {
        let judged = self.aligned_judgements.iter().chain(&self.judgements).map(|(_, _, key)| key);
        let trained =
            [Some(&self.base_key), self.align_key.as_ref(), Some(&self.fine_tune_key), self.post_key.as_ref()];
        trained.into_iter().flatten().chain(judged)
    }
}
