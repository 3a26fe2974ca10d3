//! The result of an experiment: `results.json`, version 2. Version 1 can still be read.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::{Error, Result};
use crate::model::generate::Finish;

/// The version of the schema.
pub const SCHEMA: u32 = 2;

/// The content of `results.json`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Results {
    /// [`SCHEMA`], or 1 in a file that an older version wrote.
    pub schema: u32,
    /// The experiment's name.
    pub experiment: String,
    /// The version of Titer that wrote it.
    pub titer: String,
    /// Where the numbers come from. Empty in version 1.
    #[serde(default)]
    pub provenance: Provenance,
    /// The protocols of the rows by their id: how each number was measured. Empty in version 1.
    #[serde(default)]
    pub protocols: BTreeMap<String, Value>,
    /// The settings of the rows by their id: what was attacked, and how. Empty in version 1.
    #[serde(default)]
    pub settings: BTreeMap<String, Value>,
    /// The hash of every row's identity and metrics. Two runs of one configuration have the same one if every number is
    /// the same to the last bit. Empty in version 1.
    #[serde(default)]
    pub metrics_hash: String,
    /// One row per method × setting × seed × task.
    pub rows: Vec<ResultRow>,
    /// Cells that failed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub failures: Vec<Failure>,
    /// Published values that the experiment is after.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub published: Vec<Published>,
}

/// Where the numbers of a run come from.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Provenance {
    /// The commit that Titer was built from; absent if it was not built from a checkout.
    pub commit: Option<String>,
    /// Plugin crates from elsewhere: name, version, and the BLAKE3 hash of the file with their code.
    pub plugins: Vec<PluginOrigin>,
    /// The configuration with every layer applied and every default filled in.
    pub config: Value,
    /// Every file that was read, with the hash of its content.
    pub inputs: Vec<Input>,
    /// The base model, if it is of the Hugging Face hub.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hub: Option<HubFiles>,
    /// Data sets of the hub that were read.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub hub_data: Vec<HubFiles>,
    /// The processor's name.
    pub processor: String,
    /// The device: `cpu`, `cuda:0`.
    pub device: String,
    /// The arithmetic: see [`crate::arithmetic`].
    pub arithmetic: String,
    /// When the run began, in UTC (RFC 3339). Stages from the store are older.
    pub started: String,
    /// When it ended.
    pub finished: String,
}

/// A plugin crate from elsewhere.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct PluginOrigin {
    /// Name and version of the crate.
    pub plugin: String,
    /// The shared library, or absent if the crate is linked into the runner.
    pub file: Option<String>,
    /// The hash of the shared library or of the runner, in hexadecimal.
    pub blake3: String,
}

/// A file that a run read.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Input {
    /// Its path, as the configuration leads to it.
    pub path: String,
    /// The hash of its bytes, in hexadecimal.
    pub blake3: String,
}

/// Files of a repository of the Hugging Face hub.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HubFiles {
    /// The repository: `owner/name` of a model, `datasets/owner/name` of a data set.
    pub repository: String,
    /// The branch, tag or commit that was asked for.
    pub revision: String,
    /// The commit that this was.
    pub commit: String,
    /// The files that were taken of it.
    pub files: Vec<String>,
}

/// A method's row of a published table: its values over the harmful ratios, each from a single run.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Published {
    /// Where it was published, in words: publication, table, model.
    pub source: String,
    /// The method, by its name in this experiment.
    pub method: String,
    /// The user's task, by its name in this experiment.
    pub task: String,
    /// Rows of the user's data.
    pub samples: usize,
    /// The fractions of harmful rows, in `[0, 1]`, to which the values belong.
    pub harmful_ratios: Vec<f64>,
    /// Harmful scores in percent, one for each ratio; empty if none are published.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub harmful_score: Vec<f64>,
    /// Fine-tune accuracies in percent, one for each ratio; empty if none are published.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub fine_tune_accuracy: Vec<f64>,
    /// From how many prompts each value was computed.
    pub n_prompts: PublishedPrompts,
    /// The judge of the harmful scores.
    pub judge: String,
    /// `double`, `single` or `full`; left out where it makes no difference.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lora: Option<String>,
    /// What the published run did and this experiment cannot do, in words. If given, the report says "cannot
    /// tell" of its values.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub departs: Option<String>,
    /// What is inconsistent within the printed row, such as an average that its values do not have, in words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sic: Option<String>,
}

/// How many prompts published values count.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PublishedPrompts {
    /// Harmful prompts, behind the harmful score.
    pub harmful: usize,
    /// Prompts of the user's task, behind the fine-tune accuracy.
    pub task: usize,
}

impl Published {
    /// Checks lengths and ranges.
    ///
    /// # Errors
    /// A list is not as long as that of the ratios, or a value is not a percentage.
    pub fn check(&self) -> Result<()> {
        let lists = [("harmful_score", &self.harmful_score), ("fine_tune_accuracy", &self.fine_tune_accuracy)];
        let ratios = self.harmful_ratios.len();
        for (key, values) in lists.into_iter().filter(|(_, values)| !values.is_empty()) {
            if values.len() != ratios {
                let message = format!("{} values for {ratios} harmful ratios", values.len());
                return Err(Error::config(message).key(key).help("give one value for each ratio, or no list"));
            }
            if let Some(value) = values.iter().find(|value| !(0. ..=100.).contains(*value)) {
                let message = format!("must lie in [0, 100], found `{value}`");
                return Err(Error::config(message).key(key).help("values are in percent"));
            }
        }
        if self.n_prompts.harmful == 0 || self.n_prompts.task == 0 {
            return Err(Error::config("expected at least 1 prompt, found `0`")
                .key("n_prompts")
                .help("a value's tolerance follows from it"));
        }
        Ok(())
    }
}

/// A cell that could not be computed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Failure {
    /// The cell, for people.
    pub cell: String,
    /// The id that its row would have. Empty in results of older versions.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub id: String,
    /// Why.
    pub error: String,
}

/// One cell of the table: one method in one setting with one seed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ResultRow {
    /// The method's name in the configuration.
    pub method: String,
    /// The alignment defense and its settings (`{"defense": "vaccine", "rho": 2.0, …}`).
    pub align: Value,
    /// The fine-tuning defense and its settings.
    pub fine_tune: Value,
    /// The post-fine-tuning defense and its settings, or null.
    pub post: Value,
    /// The base model.
    pub model: String,
    /// The seed of the base model, if it was pretrained here.
    pub base_seed: Option<u64>,
    /// The user's task.
    pub task: String,
    /// Fraction of harmful rows in the user's data, in `[0, 1]`.
    pub harmful_ratio: f64,
    /// Rows of the user's data.
    pub samples: usize,
    /// Peak learning rate of the user's fine-tuning: the attack's strength.
    pub learning_rate: f64,
    /// The seed.
    pub seed: u64,
    /// `double`, `single` or `full`.
    pub lora: String,
    /// The id of the protocol, how the row was measured: rows of different ids do not compare.
    pub protocol: String,
    /// The id of the setting, what was attacked and how: rows of different ids stand in tables of their own. Empty in
    /// version 1.
    #[serde(default)]
    pub setting: String,
    /// The place in the table: method with its defenses, task, ratio, samples, rate, seeds.
    #[serde(default)]
    pub coordinates: Value,
    /// The hash of protocol, setting and coordinates together. Empty in version 1.
    #[serde(default)]
    pub id: String,
    /// The keys of the stages that the row was made by, by what they are.
    #[serde(default)]
    pub artifacts: BTreeMap<String, String>,
    /// What a reader must know about the combination of defenses.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
    /// The headline judge.
    pub judge: String,
    /// Metrics in percent.
    pub metrics: Metrics,
    /// The same metrics by every other judge, by its name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub judges: BTreeMap<String, Metrics>,
    /// How many prompts each metric counts, by the probe's name: `harmful`, `task`, `benign`. Prompts that were too long
    /// for the model, and answers on which the headline judge's output could not be parsed, count into no metric; there are
    /// `harmful_too_long` and `harmful_unparsable` of them, and so on.
    pub n: BTreeMap<String, usize>,
    /// How many of these answers the output of a judge could not be parsed for, by the judge's name and the probe's; none of
    /// judges whose output always could.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub unparsable: BTreeMap<String, BTreeMap<String, usize>>,
    /// What a reader must know about the answers before reading the metrics.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
    /// What became of each prompt, by the probe's name: a letter for each, in the order of the answers. `C` complied, `R`
    /// refused, `O` off task, `I` incoherent, by the headline judge; `U` if the judge's output could not be parsed; `1` right,
    /// `0` wrong, by the task; `-` too long for the model.
    #[serde(default)]
    pub outcomes: BTreeMap<String, String>,
    /// 95 % Wilson intervals in percent, by the metric's name.
    pub intervals: BTreeMap<String, [f64; 2]>,
    /// What it cost.
    pub ledger: Ledger,
    /// Training curves.
    pub curves: Curves,
    /// Paths of the answer files, relative to the run folder, by the probe's name.
    pub answers: BTreeMap<String, String>,
}

impl ResultRow {
    /// How many prompts of `probe` count into the metrics of `judge`.
    pub fn judged(&self, probe: &str, judge: &str) -> usize {
        let unparsable =
            |judge: &str| self.unparsable.get(judge).and_then(|probes| probes.get(probe)).copied().unwrap_or(0);
        let headline = self.n.get(probe).copied().unwrap_or(0);
        (headline + unparsable(&self.judge)).saturating_sub(unparsable(judge))
    }
}

/// Metrics in percent, 0 to 100. `None` where the experiment has no such probe.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Metrics {
    /// Harmful prompts answered with compliance after the attack. Lower is better.
    pub harmful_score: Option<f64>,
    /// Likewise before the attack, after alignment.
    pub harmful_score_aligned: Option<f64>,
    /// Right answers on the user's task.
    pub fine_tune_accuracy: Option<f64>,
    /// Likewise before fine-tuning.
    pub fine_tune_accuracy_aligned: Option<f64>,
    /// Harmful prompts refused after the attack.
    pub refusal_rate: Option<f64>,
    /// Likewise before the attack.
    pub refusal_rate_aligned: Option<f64>,
    /// Benign prompts refused after the attack. Lower is better.
    pub over_refusal_rate: Option<f64>,
    /// Likewise before the attack.
    pub over_refusal_rate_aligned: Option<f64>,
    /// Benign prompts answered helpfully after the attack.
    pub benign_helpfulness: Option<f64>,
    /// Likewise before the attack.
    pub benign_helpfulness_aligned: Option<f64>,
    /// Answers to harmful and benign prompts that are coherent: a compliance, a refusal, or off task.
    pub coherence: Option<f64>,
    /// Likewise before the attack.
    #[serde(default)]
    pub coherence_aligned: Option<f64>,
    /// Harmful prompts answered with something else after the attack: no harm, but no safety either. Lower is better.
    #[serde(default)]
    pub off_task_rate: Option<f64>,
    /// Likewise before the attack.
    #[serde(default)]
    pub off_task_rate_aligned: Option<f64>,
}

/// The metrics' names, in the order of the tables, with the short form and whether higher is better.
pub const METRICS: [(&str, &str, bool); 14] = [
    ("harmful_score", "HS", false),
    ("refusal_rate", "RR", true),
    ("fine_tune_accuracy", "FA", true),
    ("benign_helpfulness", "BH", true),
    ("over_refusal_rate", "ORR", false),
    ("coherence", "coherence", true),
    ("off_task_rate", "OT", false),
    ("harmful_score_aligned", "HS aligned", false),
    ("refusal_rate_aligned", "RR aligned", true),
    ("fine_tune_accuracy_aligned", "FA aligned", true),
    ("benign_helpfulness_aligned", "BH aligned", true),
    ("over_refusal_rate_aligned", "ORR aligned", false),
    ("coherence_aligned", "coherence aligned", true),
    ("off_task_rate_aligned", "OT aligned", false),
];

impl Metrics {
    /// The metric called `name` in [`METRICS`].
    pub fn get(&self, name: &str) -> Option<f64> {
        match name {
            "harmful_score" => self.harmful_score,
            "harmful_score_aligned" => self.harmful_score_aligned,
            "fine_tune_accuracy" => self.fine_tune_accuracy,
            "fine_tune_accuracy_aligned" => self.fine_tune_accuracy_aligned,
            "refusal_rate" => self.refusal_rate,
            "refusal_rate_aligned" => self.refusal_rate_aligned,
            "over_refusal_rate" => self.over_refusal_rate,
            "over_refusal_rate_aligned" => self.over_refusal_rate_aligned,
            "benign_helpfulness" => self.benign_helpfulness,
            "benign_helpfulness_aligned" => self.benign_helpfulness_aligned,
            "coherence" => self.coherence,
            "coherence_aligned" => self.coherence_aligned,
            "off_task_rate" => self.off_task_rate,
            "off_task_rate_aligned" => self.off_task_rate_aligned,
            _ => None,
        }
    }
}

/// What a cell cost. Seconds and bytes are measured, so they differ between runs; everything else does not.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Ledger {
    /// Seconds of the alignment stage, when it ran.
    pub align_seconds: f64,
    /// Seconds of the fine-tuning stage, when it ran.
    pub fine_tune_seconds: f64,
    /// Seconds of the post-fine-tuning stage, when it ran.
    pub post_seconds: f64,
    /// Seconds of generating the answers, when that ran.
    pub answer_seconds: f64,
    /// The most memory that one of the three stages below held, in bytes: on the CPU the heap that the stage itself asked
    /// for, on a GPU what tensors took there; null where it was not measured.
    pub peak_bytes: Option<u64>,
    /// The alignment stage's own.
    #[serde(default)]
    pub align_peak_bytes: Option<u64>,
    /// The fine-tuning stage's own.
    #[serde(default)]
    pub fine_tune_peak_bytes: Option<u64>,
    /// The post-fine-tuning stage's own.
    #[serde(default)]
    pub post_peak_bytes: Option<u64>,
    /// Forward-and-backward passes per step of the alignment defense.
    pub passes_per_step: f64,
    /// Likewise of the fine-tuning defense.
    #[serde(default)]
    pub fine_tune_passes_per_step: f64,
    /// Steps of alignment.
    pub align_steps: usize,
    /// Steps of fine-tuning.
    pub fine_tune_steps: usize,
    /// What the method must know beyond the data of each stage, by stage.
    pub privileged: BTreeMap<String, String>,
}

/// Training curves: `(step, value)`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Curves {
    /// Loss during alignment.
    pub align_loss: Vec<(usize, f64)>,
    /// Loss during fine-tuning.
    pub fine_tune_loss: Vec<(usize, f64)>,
    /// Loss on held-back harmful rows during fine-tuning.
    pub harmful_loss: Vec<(usize, f64)>,
}

/// One stored answer, a line of `answers/*.jsonl`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Answer {
    /// Which probe: `harmful`, `benign` or `task`.
    pub probe: String,
    /// The prompt's instruction.
    pub instruction: String,
    /// The prompt's input, if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub input: Option<String>,
    /// What was said before the instruction, where the prompt is a conversation.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub history: Vec<crate::data::row::Message>,
    /// The reference answer, if there is one.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reference: String,
    /// What the model said.
    pub answer: String,
    /// Why the answer ended: `stop`, `length` (it was cut at the greatest length), or `too_long` (prompt and answer pass
    /// the model's positions, so the prompt was not answered and is not judged). Absent in files of older versions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finish: Option<Finish>,
    /// The verdict of each judge, by its name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub verdicts: BTreeMap<String, crate::judge::Verdict>,
    /// Whether the task counts it as right.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub correct: Option<bool>,
}
