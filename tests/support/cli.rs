//! The real binary, and small experiments for it.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

/// The binary under test, which cargo built beside the tests.
pub fn titer() -> Command {
    let mut command = Command::new(assert_cmd::cargo::cargo_bin("titer"));
    // Whatever the developer has set must not reach the tests.
    for (name, _) in std::env::vars_os() {
        if ["TITER_", "HF_"].iter().any(|prefix| name.to_string_lossy().starts_with(prefix)) {
            command.env_remove(name);
        }
    }
    // Nor may they reach the network.
    command.env("HF_HUB_OFFLINE", "1");
    command
}

/// A run of `config`, with its own store and results folder under `folder`.
pub fn run(folder: &Path, config: &Path) -> Command {
    let mut command = titer();
    command.arg("run").arg(config).arg("--store").arg(folder.join("store")).arg("--out").arg(folder.join("out"));
    command
}

/// Standard error as text.
pub fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// The experiment of the fault tests: the quickstart in seconds, with a checkpoint at every step.
pub const SMALL: &str = r#"
experiment = "small"
checkpoint_seconds = 0.0

[base]
model = "llama"
shape = { hidden_size = 16, intermediate_size = 24, num_hidden_layers = 2, num_attention_heads = 2, max_position_embeddings = 64 }

[base.pretrain]
data = { task = "world-text", rows = 200 }
max_length = 48
train = { steps = 40, batch_size = 4, learning_rate = 5e-3 }

[encoding]
template = "chat"
max_length = 48

[align]
data = [{ task = "world-safe", rows = 40 }]
train = { steps = 12, batch_size = 4, learning_rate = 5e-3 }

[fine_tune]
tasks = [{ name = "agnews", task = "world-agnews" }]
samples = 20
harmful = { task = "world-harmful" }
harmful_ratios = [0.0, 0.2]
monitor = { task = "world-harmful", rows = 4 }
train = { steps = 8, batch_size = 4, learning_rate = 1e-3 }

[evaluate]
harmful = { task = "world-harmful", rows = 6 }
benign = { task = "world-benign", rows = 6 }
task_prompts = 6
judges = ["world"]

[[methods]]
name = "SFT"
align = "sft"

[[methods]]
name = "Vaccine"
align = { defense = "vaccine", rho = 3.0 }
"#;

/// The lines of [`SMALL`] that a checkpoint stands in for.
pub const PRETRAINED: &str = "shape = { hidden_size = 16, intermediate_size = 24, num_hidden_layers = 2, num_attention_heads = 2, \
                              max_position_embeddings = 64 }\n\n[base.pretrain]\ndata = { task = \"world-text\", rows = 200 }\n\
                              max_length = 48\ntrain = { steps = 40, batch_size = 4, learning_rate = 5e-3 }";

/// Writes [`SMALL`] with `(what, instead)` replaced into `folder`.
pub fn small(folder: &Path, changes: &[(&str, &str)]) -> PathBuf {
    let mut text = SMALL.to_owned();
    for (what, instead) in changes {
        assert!(text.contains(what), "the small experiment has no `{what}`");
        text = text.replacen(what, instead, 1);
    }
    let path = folder.join("small.toml");
    std::fs::write(&path, text).expect("a file");
    path
}

/// `results.json` without what is measured by the clock.
pub fn results(out: &Path) -> Value {
    let text = std::fs::read_to_string(out.join("results.json")).expect("results");
    let mut value: Value = serde_json::from_str(&text).expect("JSON");
    let provenance = value["provenance"].as_object_mut().expect("a table");
    provenance.retain(|key, _| !["started", "finished"].contains(&key.as_str()));
    for row in value["rows"].as_array_mut().expect("rows") {
        let ledger = row["ledger"].as_object_mut().expect("a ledger");
        ledger.retain(|key, _| !key.ends_with("_seconds") && !key.ends_with("peak_bytes"));
    }
    value
}

/// Every answer file by its name.
pub fn answers(out: &Path) -> Vec<(String, String)> {
    let entries = std::fs::read_dir(out.join("answers")).expect("answers");
    let mut files: Vec<(String, String)> = entries
        .map(|entry| {
            let path = entry.expect("an entry").path();
            let name = path.file_name().expect("a name").to_string_lossy().into_owned();
            (name, std::fs::read_to_string(&path).expect("text"))
        })
        .collect();
    files.sort();
    files
}
