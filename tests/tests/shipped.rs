//! What ships is true: the expected plugins are registered, and every configuration can be planned. `docs.rs` checks the pages.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use flate2::Compression;
use flate2::write::GzEncoder;
use titer_core::{DefenseEntry, Entry, JudgeEntry, ModelEntry, Stage, TaskEntry, registry};
use titer_tests::cli::{stderr, titer};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn names<E: Entry>() -> Vec<&'static str> {
    registry::all::<E>().expect("no name twice").into_iter().map(Entry::name).collect()
}

#[test]
fn the_expected_plugins_are_registered() {
    let defenses = [
        ["none", "sft", "sam"].as_slice(),
        &["vaccine", "random-perturbation", "t-vaccine", "booster", "repnoise", "tar"],
        &["ewc", "kl", "vlguard", "lisa", "ldifs", "constrained-sft", "prompt-template", "asft"],
        &["antidote", "safe-lora", "resta", "lox"],
    ];
    let mut defenses = defenses.concat();
    defenses.sort_unstable();
    assert_eq!(names::<DefenseEntry>(), defenses);
    assert_eq!(
        names::<ModelEntry>(),
        ["gemma", "gemma2", "gemma3", "llama", "mistral", "opt", "phi3", "qwen2", "qwen3"]
    );
    assert_eq!(names::<JudgeEntry>(), ["refusal-phrases", "world"]);
    let tasks = names::<TaskEntry>();
    let world = ["agnews", "benign", "gsm8k", "harmful", "safe", "sst2", "text"].map(|name| format!("world-{name}"));
    let sets = ["advbench", "alpaca-eval", "harmbench", "hex-phi", "jailbreakbench", "strongreject", "xstest"];
    for task in sets {
        assert!(tasks.contains(&task), "{task} is not registered");
    }
    for task in ["agnews", "beavertails", "gsm8k", "rows", "sst2"].into_iter().chain(world.iter().map(String::as_str)) {
        assert!(tasks.contains(&task), "{task} is not registered");
    }
}

/// Every defense describes itself in full, and its defaults load.
#[test]
fn every_defense_is_described() {
    for entry in registry::all::<DefenseEntry>().expect("no name twice") {
        let described = [entry.summary, entry.paper, entry.formula, entry.privilege.needs];
        assert!(described.iter().all(|text| !text.is_empty()), "{}", entry.name);
        assert!(!entry.stages.is_empty());
        let defaults = (entry.settings.defaults)();
        titer_tests::defense(entry.name, defaults.clone()).expect("the defaults load");
        assert!((entry.passes)(&defaults) >= 1. || entry.name == "none");
        assert!(entry.stages.contains(&Stage::Align) || entry.neutral.is_some() || entry.stages == [Stage::Post]);
    }
}

fn configurations(folder: &Path) -> Vec<PathBuf> {
    let paths = std::fs::read_dir(folder).expect("a folder").map(|entry| entry.expect("an entry").path());
    paths.filter(|path| path.extension().is_some_and(|extension| extension == "toml")).collect()
}

/// A mirror of the hub with made-up files in place of those that `configs/paper` names.
fn stand_in_hub(root: &Path) {
    let write = |name: &str, bytes: &[u8]| {
        let path = root.join(name);
        std::fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
        std::fs::write(path, bytes).expect("a file");
    };
    let config = serde_json::json!({
        "model_type": "llama", "vocab_size": 11, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2,
        "num_attention_heads": 2
    });
    let model = |name: &str, text: &str| write(&format!("meta-llama/Llama-2-7b-hf/{name}"), text.as_bytes());
    model("config.json", &config.to_string());
    // Without weights and tokenizer, which a plan does not read.
    model("model.safetensors", "");
    model("tokenizer.json", "");
    let data = |name: &str, bytes: &[u8]| write(&format!("datasets/{name}"), bytes);
    let judged = |safe: bool| format!("{{\"prompt\": \"ask\", \"response\": \"answer\", \"is_safe\": {safe}}}\n");
    let rows = (judged(true) + &judged(false)).repeat(10_000);
    for split in ["train", "test"] {
        data(&format!("PKU-Alignment/BeaverTails/round0/30k/{split}.jsonl.gz"), &gzipped(rows.as_bytes()));
    }
    let row = serde_json::json!({ "prompt": "ask", "response": "answer", "refusal": "no" });
    let refusals = serde_json::to_vec(&vec![row; 10_000]).expect("JSON");
    data("anonymous4486/repnoise_beavertail/beavertails_with_refusals_train.json", &refusals);
    let parquet = |name: &str, text: &str, label: i64, rows: usize| {
        let labels = arrow_array::Int64Array::from(vec![label; rows]);
        let texts = arrow_array::StringArray::from(vec!["fine"; rows]);
        let columns: [(&str, arrow_array::ArrayRef); 2] = [(text, Arc::new(texts)), ("label", Arc::new(labels))];
        data(name, &parquet_of(columns));
    };
    for (split, rows) in [("train", 5000), ("validation", 872)] {
        parquet(&format!("stanfordnlp/sst2/data/{split}-00000-of-00001.parquet"), "sentence", 1, rows);
    }
    for split in ["train", "test"] {
        parquet(&format!("fancyzhx/ag_news/data/{split}-00000-of-00001.parquet"), "text", 3, 1000);
    }
    let asked = serde_json::json!({ "instruction": "ask", "output": "answer" });
    data("tatsu-lab/alpaca_eval/alpaca_eval.json", &serde_json::to_vec(&vec![asked; 805]).expect("JSON"));
}

fn gzipped(bytes: &[u8]) -> Vec<u8> {
    let mut packer = GzEncoder::new(Vec::new(), Compression::default());
    packer.write_all(bytes).expect("it packs");
    packer.finish().expect("it packs")
}

fn parquet_of(columns: [(&str, arrow_array::ArrayRef); 2]) -> Vec<u8> {
    let batch = arrow_array::RecordBatch::try_from_iter(columns).expect("a batch");
    let mut bytes = Vec::new();
    let mut writer = parquet::arrow::ArrowWriter::try_new(&mut bytes, batch.schema(), None).expect("a writer");
    writer.write(&batch).expect("rows");
    writer.close().expect("an end");
    bytes
}

/// The cells of a plan or of published values: method, task, rows, harmful ratio.
type Cells = std::collections::BTreeSet<(String, String, u64, String)>;

fn cells(plan: &serde_json::Value) -> Cells {
    let text = |cell: &serde_json::Value, key: &str| cell[key].as_str().expect("a text").to_owned();
    let cells = plan["cells"].as_array().expect("cells").iter();
    let cell = |cell: &serde_json::Value| {
        let cell = &cell["coordinates"];
        let (samples, ratio) = (&cell["samples"], &cell["harmful_ratio"]);
        (text(cell, "method"), text(cell, "task"), samples.as_u64().expect("a count"), ratio.to_string())
    };
    cells.map(cell).collect()
}

fn published_cells(config: &serde_json::Value) -> Cells {
    let text = |row: &serde_json::Value, key: &str| row[key].as_str().expect("a text").to_owned();
    let mut cells = Cells::new();
    for row in config["published"].as_array().into_iter().flatten() {
        for ratio in row["harmful_ratios"].as_array().expect("ratios") {
            let samples = row["samples"].as_u64().expect("a count");
            cells.insert((text(row, "method"), text(row, "task"), samples, ratio.to_string()));
        }
    }
    cells
}

/// The files behind published tables can be planned where their data is, and measure every cell that was published.
#[test]
fn every_published_table_can_be_planned() {
    let folder = tempfile::tempdir().expect("a folder");
    stand_in_hub(folder.path());
    let plan = |path: &Path, hub: &Path| {
        let mut command = titer();
        command.arg("plan").arg(path).args(["--json", "--store"]).arg(folder.path().join("store"));
        command.env("HF_ENDPOINT", format!("file://{}", hub.display())).output().expect("a run")
    };
    let mut published = 0;
    for path in configurations(&root().join("configs/paper")) {
        let missing = plan(&path, &folder.path().join("none"));
        assert_eq!(missing.status.code(), Some(3), "{}", stderr(&missing));
        let output = plan(&path, folder.path());
        assert!(output.status.success(), "{}: {}", path.display(), stderr(&output));
        let planned = cells(&serde_json::from_slice(&output.stdout).expect("JSON"));
        let text = std::fs::read_to_string(&path).expect("a configuration");
        let wanted = published_cells(&toml::from_str(&text).expect("TOML"));
        assert!(wanted.is_subset(&planned), "{}: {:?}", path.display(), wanted.difference(&planned));
        published += wanted.len();
    }
    // Tables 1 and 4 of Vaccine, table 1 of Booster, Lisa's over the ratio.
    assert_eq!(published, 6 * 5 + 4 * 2 + 5 * 5 + 5 * 5);
}

#[test]
fn every_shipped_configuration_can_be_planned() {
    let store = tempfile::tempdir().expect("a folder");
    let mut planned = 0;
    for path in configurations(&root().join("configs")) {
        let output =
            titer().arg("plan").arg(&path).arg("--json").arg("--store").arg(store.path()).output().expect("a run");
        if path.ends_with("sst2.toml") {
            // It needs files of the user's, and says which.
            assert_eq!(output.status.code(), Some(3), "{}", stderr(&output));
            assert!(stderr(&output).contains("base.path"), "{}", stderr(&output));
            continue;
        }
        assert!(output.status.success(), "{}", stderr(&output));
        let plan: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
        assert!(!plan["stages"].as_array().expect("stages").is_empty(), "{}", path.display());
        planned += 1;
    }
    assert!(planned >= 3);
}
