//! Small plugins and a configuration for the runner's own tests.
//!
//! Their names start with `fake-`, so that they never meet a real plugin.

use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use titer_core::data::Tokens;
use titer_core::rng::Seed;
use titer_core::weights::{Init, ParamList};
use titer_core::{
    AlignmentDefense, Answers, DefenseEntry, Error, Forward, Judge, JudgeCx, JudgeEntry, Label, Limits, Model,
    ModelEntry, ModelSpec, Privilege, Result, Row, Settings, SettingsType, Stage, Task, TaskEntry, Traced, inventory,
    no_conflict, no_limits,
};

use crate::diagnostics::Problems;
use crate::experiment::config::{Config, LoadedConfig};
use crate::experiment::layers::Source;
use crate::plan::Plan;

/// Two methods, two ratios, two seeds, two bases.
pub(crate) const CONFIG: &str = r#"
experiment = "demo"
seeds = [0, 1]

[lora]
target_modules = ["q_proj"]

[base]
model = "fake-model"
seeds = [0, 1]

[base.pretrain]
data = { task = "fake-rows", rows = 100 }
train = { steps = 10, batch_size = 4, learning_rate = 1e-3 }

[align]
data = [{ task = "fake-rows", rows = 50 }]
train = { epochs = 2, batch_size = 4, learning_rate = 1e-3 }

[fine_tune]
tasks = [{ name = "chat", task = "fake-rows", word = "hello" }]
samples = 40
harmful = { task = "fake-rows", word = "bad" }
harmful_ratios = [0.0, 0.1]
train = { steps = 10, batch_size = 4, learning_rate = 1e-3 }

[streams]
harmful = { task = "fake-rows", word = "bad", rows = 20 }

[evaluate]
harmful = { task = "fake-rows", word = "bad", rows = 10 }
task_prompts = 5
judges = ["fake-judge"]

[[methods]]
name = "none"
align = "none"
fine_tune = "fake-plain"

[[methods]]
name = "Shield"
align = { defense = "fake-shield", rho = 2.0 }
fine_tune = "fake-plain"
"#;

/// The configuration above with some texts replaced, and assignments as after `--set`.
pub(crate) fn load(replacements: &[(&str, &str)], overrides: &[&str]) -> Result<LoadedConfig, Problems> {
    let text = replacements.iter().fold(CONFIG.to_owned(), |text, (from, to)| {
        assert!(text.contains(from), "`{from}` is not in the sample");
        text.replacen(from, to, 1)
    });
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("demo.toml");
    std::fs::write(&path, text).expect("the sample can be written");
    let overrides: Vec<String> = overrides.iter().map(|&assignment| assignment.to_owned()).collect();
    Config::from_source(Source::read(&path, [], &overrides)?)
}

/// The plan of that configuration.
pub(crate) fn plan(replacements: &[(&str, &str)]) -> Plan {
    let loaded = load(replacements, &[]).unwrap_or_else(|problems| panic!("{problems}"));
    crate::plan::planner::plan(
        &crate::experiment::resolve::resolve(&loaded).unwrap_or_else(|problems| panic!("{problems}")),
    )
}

/// Everything that is wrong with that configuration, as the user sees it.
pub(crate) fn problems(replacements: &[(&str, &str)]) -> String {
    let resolved = load(replacements, &[]).and_then(|loaded| crate::experiment::resolve::resolve(&loaded).map(drop));
    resolved.expect_err("the configuration is wrong").to_string()
}

#[derive(Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
struct RowsSettings {
    word: String,
    #[schemars(extend("format" = "path"))]
    file: Option<PathBuf>,
}

#[derive(Debug)]
struct FakeRows {
    settings: RowsSettings,
    folder: PathBuf,
}

impl Task for FakeRows {
    fn train(&self, count: usize, _seed: Seed) -> Result<Vec<Row>> {
        Ok(vec![Row::new(&self.settings.word, "yes"); count])
    }
    fn test(&self, count: usize) -> Result<Vec<Row>> {
        self.train(count, Seed::new(0))
    }
    fn score(&self, row: &Row, answer: &str) -> Option<bool> {
        Some(row.output == answer)
    }
    fn max_new_tokens(&self) -> usize {
        12
    }
    fn files(&self) -> Vec<PathBuf> {
        self.settings.file.iter().map(|file| self.folder.join(file)).collect()
    }
}

fn build_rows(settings: &Settings, folder: &Path) -> Result<Box<dyn Task>> {
    Ok(Box::new(FakeRows { settings: settings.parse()?, folder: folder.to_owned() }))
}

inventory::submit! {
    TaskEntry {
        name: "fake-rows",
        summary: "The same row again and again.",
        settings: SettingsType::of::<RowsSettings>(),
        version: 1,
        build: build_rows,
    }
}

#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
struct ShieldSettings {
    /// Radius of the perturbation.
    rho: f64,
}

impl Default for ShieldSettings {
    fn default() -> Self {
        Self { rho: 1. }
    }
}

#[derive(Debug)]
struct Fake;

impl AlignmentDefense for Fake {}

const PLAIN: DefenseEntry = DefenseEntry {
    name: "fake-plain",
    summary: "Plain fine-tuning.",
    paper: "",
    formula: "w ← w − η g",
    stages: &[Stage::Align, Stage::FineTune],
    streams: |_| &[],
    sites: &[],
    passes: |_| 1.,
    privilege: Privilege::NONE,
    notes: "",
    quirks: &[],
    conflicts: no_conflict,
    limits: no_limits,
    settings: SettingsType::of::<NoSettings>(),
    neutral: None,
    version: 1,
    build: |_| Ok(Box::new(Fake)),
};

inventory::submit! { PLAIN }

inventory::submit! {
    DefenseEntry {
        name: "fake-shield",
        summary: "Perturbs.",
        stages: &[Stage::Align],
        streams: |_| &["harmful"],
        sites: &["attn_out"],
        passes: |_| 2.,
        limits: |_| Limits { checkpointing: Some("it looks inside"), accumulation: Some("it sees batches") },
        settings: SettingsType::of::<ShieldSettings>(),
        build: |settings| {
            let rho = settings.parse::<ShieldSettings>()?.rho;
            if rho < 0. {
                return Err(Error::config(format!("`rho` must be at least 0, found `{rho}`")).key("rho"));
            }
            Ok(Box::new(Fake))
        },
        ..PLAIN
    }
}

inventory::submit! {
    DefenseEntry {
        name: "fake-elsewhere",
        summary: "Acts on sites that the model lacks.",
        sites: &["expert_out"],
        ..PLAIN
    }
}

#[derive(Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
struct NoSettings {}

impl Judge for Fake {
    fn judge(&self, _answers: &Answers, cx: &mut JudgeCx) -> Result<()> {
        cx.give(cx.pending().into_iter().map(|place| (place, Label::Refused.into())))
    }
}

inventory::submit! {
    JudgeEntry {
        name: "fake-judge",
        summary: "Sees refusals everywhere.",
        settings: SettingsType::of::<NoSettings>(),
        version: 1,
        build: |_, _| Ok(Box::new(Fake)),
    }
}

#[derive(Debug)]
struct Net {
    spec: ModelSpec,
    params: ParamList,
}

impl Model for Net {
    fn spec(&self) -> &ModelSpec {
        &self.spec
    }
    fn params(&self) -> &ParamList {
        &self.params
    }
    fn config(&self) -> Value {
        json!({})
    }
    fn sites(&self) -> Vec<String> {
        vec!["layer.0.attn_out".into()]
    }
    fn embed(&self, _tokens: &Tokens, _pass: &mut Forward) -> Result<Traced> {
        Err(Error::run("a fake model computes nothing"))
    }
    fn block(&self, _index: usize, _x: &Traced, _pass: &mut Forward) -> Result<Traced> {
        Err(Error::run("a fake model computes nothing"))
    }
    fn final_norm(&self, _x: &Traced, _pass: &mut Forward) -> Result<Traced> {
        Err(Error::run("a fake model computes nothing"))
    }
    fn logits(&self, _hidden: &Traced, _pass: &mut Forward) -> Result<Traced> {
        Err(Error::run("a fake model computes nothing"))
    }
}

fn build_net() -> Box<dyn Model> {
    let spec = ModelSpec { vocab_size: 8, hidden_size: 4, layers: 1, kv_heads: 1, head_dim: 4, max_positions: 64 };
    let mut params = ParamList::default();
    params.linear("model.layers.0.q_proj", 4, 4, 0.02);
    params.tensor("model.norm.weight", &[4], Init::Ones);
    Box::new(Net { spec, params })
}

inventory::submit! {
    ModelEntry {
        name: "fake-model",
        summary: "Computes nothing.",
        model_types: &[],
        settings: SettingsType::of::<NoSettings>(),
        version: 1,
        build: |_| Ok(build_net()),
        from_config: |_, _| Ok(build_net()),
    }
}
