//! What the user writes: one TOML or YAML file per experiment.
//!
//! These types hold the file as it is. [`crate::experiment::resolve`] turns them into an experiment with every name looked up and
//! every default filled in.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use schemars::{JsonSchema, Schema, schema_for};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use titer_core::arithmetic::Arithmetic;
use titer_core::optim::Schedule;
use titer_core::report::Published;
use titer_core::weights::LoraConfig;

use super::layers::Source;
use super::schema;
use crate::diagnostics::Problems;
use crate::plugins::{self, PluginFile};

/// An experiment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The experiment's name; results go to `runs/<experiment>`.
    pub experiment: String,
    /// Seeds of everything after the base model. Every cell runs once per seed.
    #[serde(default = "one_seed")]
    pub seeds: Vec<u64>,
    /// `auto`, `cpu`, `cuda` or `cuda:N`.
    #[serde(default = "auto")]
    pub device: String,
    /// How the base is stored: `f32`; `bf16` or `f16` (16 bits a weight); `q8_0`, `q6k`, `q4_1`, `q4k` or `q4_0`
    /// (linear layers in blocks of 8.5, 6.6, 5, 4.5 or 4.5 bits a weight, embedding and head in bf16). All but `f32` are frozen: adapters
    /// train on top, in f32, and nothing can be trained in full. The CPU computes in f32 on every type; CUDA devices
    /// compute in bf16 on every type but f32, and have no f16. An adapter that is merged into a frozen base, such as
    /// the alignment's under double LoRA, is kept beside it and loses nothing, but for bf16 on CUDA, where the sum is
    /// rounded to bf16.
    #[serde(default = "f32")]
    pub dtype: String,
    /// How the CPU rounds. `portable` gives the same bits on every processor and for every number of threads. `native`
    /// may use the tile unit (AMX) and blocks tuned to the caches, and answers of quantized models round activations to
    /// 8 bits; its results are of another setting than portable ones. Without effect on CUDA devices.
    #[serde(default)]
    pub arithmetic: Arithmetic,
    /// Plugins from shared libraries.
    #[serde(default, skip_serializing_if = "PluginsConfig::is_empty")]
    pub plugins: PluginsConfig,
    /// Seconds of training between two checkpoints, at which an interrupted stage resumes. Results do not depend on it.
    #[serde(default = "default_checkpoint_seconds")]
    pub checkpoint_seconds: f64,
    /// The shape of the adapters.
    #[serde(default)]
    pub lora: LoraConfig,
    /// The model that everything starts from.
    pub base: BaseConfig,
    /// How rows become tokens.
    #[serde(default)]
    pub encoding: EncodingConfig,
    /// The provider's alignment. May be left out if no method aligns.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub align: Option<AlignConfig>,
    /// The user's fine-tuning, which is the attack.
    pub fine_tune: FineTuneConfig,
    /// Data that defenses draw from besides the stage's own, by the stream's name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub streams: BTreeMap<String, StreamConfig>,
    /// What is measured.
    pub evaluate: EvaluateConfig,
    /// The rows of the table.
    pub methods: Vec<MethodConfig>,
    /// Published values that the report compares with ours. No result depends on them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub published: Vec<Published>,
}

/// Plugins from shared libraries.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct PluginsConfig {
    /// The files, loaded before any name is looked up. Loading a file runs its code.
    pub paths: Vec<PluginRef>,
}

impl PluginsConfig {
    fn is_empty(&self) -> bool {
        self.paths.is_empty()
    }
}

/// A shared library by its path, or a table with its hash: `{ path = "…", blake3 = "…" }`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged, deny_unknown_fields)]
pub enum PluginRef {
    /// Whatever is in the file.
    Path(PathBuf),
    /// Only a file with this hash.
    Pinned {
        /// The file.
        path: PathBuf,
        /// The BLAKE3 hash of its bytes, in hexadecimal.
        blake3: String,
    },
}

/// The base model: a checkpoint (`path`) or one pretrained here (`pretrain`).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct BaseConfig {
    /// The architecture: the name of a model, as `titer list models` shows it.
    pub model: String,
    /// A checkpoint: a folder in the Hugging Face layout. Or a model of the Hugging Face hub, `owner/name`, if there is no such
    /// folder; `hf://owner/name@revision` is always one. Either this or `pretrain`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// The branch, tag or commit of a model of the hub; without it, `main`. A commit never changes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
    /// Pretraining from scratch, instead of a checkpoint.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pretrain: Option<PretrainConfig>,
    /// Seeds of the pretrained bases; every cell runs once per base.
    #[serde(default = "one_seed")]
    pub seeds: Vec<u64>,
    /// Sizes of a model that is pretrained here.
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub shape: Map<String, Value>,
}

/// Pretraining from scratch.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PretrainConfig {
    /// The documents.
    pub data: TaskRef,
    /// Rows are cut after this many tokens.
    #[serde(default = "default_max_length")]
    pub max_length: usize,
    /// How to train.
    pub train: TrainConfig,
}

/// How rows become tokens.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct EncodingConfig {
    /// `alpaca`, `alpaca-newline`, `chat` (the embedded world's), a Jinja text over `instruction` and `input`, or `model`:
    /// the chat template of the checkpoint, which writes special tokens itself.
    pub template: String,
    /// The system prompt that the chat template is given where a conversation brings none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub system: Option<String>,
    /// Rows are cut after this many tokens.
    pub max_length: usize,
}

impl Default for EncodingConfig {
    fn default() -> Self {
        Self { template: "alpaca".into(), system: None, max_length: default_max_length() }
    }
}

/// The alignment stage.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AlignConfig {
    /// The alignment data, concatenated.
    pub data: Vec<TaskRef>,
    /// What is trained: `lora`, an adapter, or `full`, every parameter.
    #[serde(default)]
    pub adapter: AlignAdapter,
    /// How to train.
    pub train: TrainConfig,
}

/// What alignment trains.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum AlignAdapter {
    /// A LoRA adapter.
    #[default]
    Lora,
    /// Every parameter.
    Full,
}

/// The user's fine-tuning.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FineTuneConfig {
    /// The users' tasks. The report has a table for each.
    pub tasks: Vec<UserTaskConfig>,
    /// Rows of user data, harmful ones included; a list sweeps over it.
    pub samples: OneOrMany,
    /// Where the harmful rows come from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub harmful: Option<TaskRef>,
    /// Fractions p of harmful rows, each in `[0, 1]`: the columns of the table.
    #[serde(default = "no_harm")]
    pub harmful_ratios: Vec<f64>,
    /// Peak learning rates to sweep over; by default only the one of `train`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub learning_rates: Vec<f64>,
    /// What the user trains: `double`, a fresh adapter after the alignment's was merged into the base; `single`, the
    /// alignment's adapter; `full`, every parameter.
    #[serde(default)]
    pub mode: FineTuneMode,
    /// The shape of the user's adapter, if it differs from the alignment's (`[lora]`); with `mode = "double"` only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lora: Option<LoraConfig>,
    /// Harmful rows that are not trained on and whose loss is tracked during fine-tuning.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub monitor: Option<TaskRef>,
    /// How to train.
    pub train: TrainConfig,
}

/// What fine-tuning trains.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum FineTuneMode {
    /// A fresh adapter on top of the merged alignment; `dtype` says how exactly it is merged.
    #[default]
    Double,
    /// The adapter of the alignment, trained on.
    Single,
    /// Every parameter.
    Full,
}

impl FineTuneMode {
    /// The name in configurations and results.
    pub const fn name(self) -> &'static str {
        match self {
            FineTuneMode::Double => "double",
            FineTuneMode::Single => "single",
            FineTuneMode::Full => "full",
        }
    }
}

/// One number or a list of them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum OneOrMany {
    /// One number.
    One(usize),
    /// A list to sweep over.
    Many(Vec<usize>),
}

impl OneOrMany {
    /// The numbers.
    pub fn as_slice(&self) -> &[usize] {
        match self {
            OneOrMany::One(number) => std::slice::from_ref(number),
            OneOrMany::Many(numbers) => numbers,
        }
    }
}

/// Rows of a task: `{ task = "…", rows = 500, … }`. The other keys are the task's own settings.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct TaskRef {
    /// The name of a task, as `titer list tasks` shows it.
    pub task: String,
    /// How many rows. Must be given, but for `fine_tune.harmful`: there the harmful ratio decides, and this is only an upper
    /// bound.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rows: Option<usize>,
    /// The task's settings.
    #[serde(flatten)]
    pub settings: Map<String, Value>,
}

/// A defense's extra data: `{ task = "…", rows = 500, … }`. The other keys are the task's own settings.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct StreamConfig {
    /// Examples per batch; by default as many as the stage's own batches have.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub batch_size: Option<usize>,
    /// The rows.
    #[serde(flatten)]
    pub rows: TaskRef,
}

/// A user's task. The other keys are the task's own settings.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct UserTaskConfig {
    /// The name in the table; by default the task's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The name of a task, as `titer list tasks` shows it.
    pub task: String,
    /// Longest answer in tokens; by default what the task says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_new_tokens: Option<usize>,
    /// The task's settings.
    #[serde(flatten)]
    pub settings: Map<String, Value>,
}

/// What is measured on the aligned and on the final model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct EvaluateConfig {
    /// Harmful prompts: harmful score and refusal rate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub harmful: Option<TaskRef>,
    /// Benign prompts: helpfulness and over-refusal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub benign: Option<TaskRef>,
    /// Prompts of the user's task: fine-tune accuracy.
    #[serde(default = "default_task_prompts")]
    pub task_prompts: usize,
    /// Longest answer to harmful and benign prompts in tokens; by default what each task says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_new_tokens: Option<usize>,
    /// The judges of harmful and benign answers; the first one gives the headline numbers.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub judges: Vec<JudgeRef>,
    /// Prompts per batch of generation; results do not depend on it.
    #[serde(default = "default_batch")]
    pub batch_size: usize,
}

/// A judge by name, or a table with its settings: `{ judge = "…", … }`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum JudgeRef {
    /// With default settings.
    Name(String),
    /// With settings.
    Table {
        /// The name of a judge, as `titer list judges` shows it.
        judge: String,
        /// Its settings.
        #[serde(flatten)]
        settings: Map<String, Value>,
    },
}

/// A method: at most one defense per stage.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MethodConfig {
    /// The name in the table.
    pub name: String,
    /// `align = "sft"` for plain alignment, `align = "none"` for none (an attack straight on the base model), or another
    /// alignment defense. It has no default: without alignment every harmful score is that of the base.
    pub align: DefenseRef,
    /// Updates of alignment, instead of those of `align.train`: for controls of equal compute.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub align_steps: Option<usize>,
    /// The fine-tuning defense; plain fine-tuning (`sft`) if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fine_tune: Option<DefenseRef>,
    /// The post-fine-tuning defense; `none` or absent for none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub post: Option<DefenseRef>,
}

/// A defense by name, or a table with its settings: `{ defense = "vaccine", rho = 2.0 }`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum DefenseRef {
    /// With default settings.
    Name(String),
    /// With settings.
    Table {
        /// The name of a defense, as `titer list defenses` shows it.
        defense: String,
        /// Its settings.
        #[serde(flatten)]
        settings: Map<String, Value>,
    },
}

/// How a stage trains. Give either `steps` or `epochs`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TrainConfig {
    /// Updates in all. Either this or `epochs`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub steps: Option<usize>,
    /// Passes over the data. Either this or `steps`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub epochs: Option<usize>,
    /// Examples per batch.
    pub batch_size: usize,
    /// Batches per update: gradient accumulation.
    #[serde(default = "one")]
    pub accumulate: usize,
    /// So many batches at a time are drawn and sorted by length before they are cut into batches, so that rows of similar
    /// length meet, as with `group_by_length` of transformers; 1 for no sorting.
    #[serde(default = "one")]
    pub bucket: usize,
    /// Peak learning rate.
    pub learning_rate: f64,
    /// The course of the learning rate after the warm-up.
    #[serde(default = "cosine")]
    pub schedule: Schedule,
    /// Fraction of the steps over which the learning rate rises from zero, in `[0, 1]`.
    #[serde(default)]
    pub warmup: f64,
    /// AdamW's weight decay.
    #[serde(default)]
    pub weight_decay: f64,
    /// AdamW's β₁ and β₂.
    #[serde(default = "default_betas")]
    pub betas: [f64; 2],
    /// AdamW's ε.
    #[serde(default = "default_eps")]
    pub eps: f64,
    /// The L2 norm that the gradient of all parameters is clipped to; 0 for no clipping.
    #[serde(default = "default_clip")]
    pub clip: f64,
    /// Keeps only the inputs of transformer blocks and runs the blocks again in the backward pass: the same numbers in
    /// less memory and a third more time.
    #[serde(default)]
    pub checkpointing: bool,
}

fn one_seed() -> Vec<u64> {
    vec![0]
}

fn auto() -> String {
    "auto".into()
}

fn f32() -> String {
    "f32".into()
}

const fn default_checkpoint_seconds() -> f64 {
    10.
}

fn no_harm() -> Vec<f64> {
    vec![0.]
}

const fn one() -> usize {
    1
}

const fn default_max_length() -> usize {
    256
}

const fn default_task_prompts() -> usize {
    200
}

const fn default_batch() -> usize {
    32
}

const fn cosine() -> Schedule {
    Schedule::Cosine
}

const fn default_betas() -> [f64; 2] {
    [0.9, 0.999]
}

const fn default_eps() -> f64 {
    1e-8
}

const fn default_clip() -> f64 {
    1.
}

/// A configuration and where each of its values came from.
#[derive(Debug, Clone)]
pub struct LoadedConfig {
    /// The configuration.
    pub config: Config,
    /// Its origin, for error messages and relative paths.
    pub source: Source,
}

impl LoadedConfig {
    /// Loads the plugins that the configuration names, which runs their code.
    ///
    /// # Errors
    /// One does not fit this runner, or is not what its hash says.
    pub fn load_plugins(&self) -> Result<(), Problems> {
        for (index, plugin) in self.config.plugins.paths.iter().enumerate() {
            let (path, blake3) = match plugin {
                PluginRef::Path(path) => (path, None),
                PluginRef::Pinned { path, blake3 } => (path, Some(blake3.clone())),
            };
            let file = PluginFile { path: self.source.folder_of(&format!("plugins.paths.{index}")).join(path), blake3 };
            let located = |error| self.source.locate(&format!("plugins.paths.{index}"), error);
            plugins::load(&file).map_err(located)?;
        }
        Ok(())
    }
}

/// Who has more mistakes than these to mend has given another file.
const MOST_PROBLEMS: usize = 200;

impl Config {
    /// The JSON schema, as `titer schema` prints it.
    pub fn schema() -> Schema {
        schema_for!(Config)
    }

    /// Reads `path` and lays the environment (`TITER_FINE_TUNE__MODE=full`) and then `overrides`
    /// (`fine_tune.mode=full`) over it.
    ///
    /// # Errors
    /// The file cannot be read or parsed, or its shape is wrong: every mistake at once.
    pub fn load(path: &Path, overrides: &[String]) -> Result<LoadedConfig, Problems> {
        // A variable that is not Unicode cannot be one of ours.
        let environment = std::env::vars_os().filter_map(|(k, v)| Some((k.into_string().ok()?, v.into_string().ok()?)));
        Self::from_source(Source::read(path, environment, overrides)?)
    }

    /// Checks the merged values against the schema and takes them over.
    ///
    /// # Errors
    /// Unknown keys, missing keys, wrong types: every mistake at once.
    pub fn from_source(source: Source) -> Result<LoadedConfig, Problems> {
        let schema = Self::schema().to_value();
        let errors = schema::check(&schema, source.value()).into_iter().take(MOST_PROBLEMS);
        errors.map(|error| source.locate("", error)).collect::<Problems>().into_result(())?;
        // The schema has vouched for the shape; what serde still refuses it names itself.
        let config = serde_json::from_value(source.value().clone())
            .map_err(|error| titer_core::Error::config(error.to_string()).help("`titer schema` describes every key"))
            .map_err(|error| source.locate("", error))?;
        Ok(LoadedConfig { config, source })
    }
}

#[cfg(test)]
mod tests;
