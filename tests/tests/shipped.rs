//! What ships is true: the expected plugins are registered, and every configuration can be planned. `docs.rs` checks the pages.

use std::path::{Path, PathBuf};

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
    for task in ["agnews", "gsm8k", "rows", "sst2"].into_iter().chain(world.iter().map(String::as_str)) {
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

/// Made-up files in place of those that `configs/paper` asks its users for.
fn stand_in_data(folder: &Path) {
    let write = |name: &str, text: &str| {
        let path = folder.join(name);
        std::fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
        std::fs::write(path, text).expect("a file");
    };
    let config = serde_json::json!({
        "model_type": "llama", "vocab_size": 11, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2,
        "num_attention_heads": 2
    });
    write("llama-2-7b/config.json", &config.to_string());
    let row = "{\"prompt\": \"ask\", \"response\": \"answer\", \"refusal\": \"no\"}\n";
    for name in ["beavertails/safe", "beavertails/harmful", "beavertails/harmful_test", "benign_prompts"] {
        write(&format!("{name}.jsonl"), &row.repeat(10_000));
    }
    for name in ["refusals/from_1", "refusals/from_5001"] {
        write(&format!("{name}.jsonl"), &row.repeat(4999));
    }
    write("refusals/from_9001.jsonl", &row.repeat(999));
    for (name, rows) in [("train", 5000), ("dev", 872)] {
        write(&format!("sst2/{name}.tsv"), &("sentence\tlabel\n".to_owned() + &"fine\t1\n".repeat(rows)));
    }
    for name in ["train", "test"] {
        write(&format!("ag_news/{name}.csv"), &"1,title,text\n".repeat(1000));
    }
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
    stand_in_data(folder.path());
    let mut published = 0;
    for shipped in configurations(&root().join("configs/paper")) {
        let missing = titer().arg("plan").arg(&shipped).output().expect("a run");
        assert_eq!(missing.status.code(), Some(3), "{}", stderr(&missing));
        let path = folder.path().join(shipped.file_name().expect("a name"));
        std::fs::copy(&shipped, &path).expect("a copy");
        let store = folder.path().join("store");
        let output = titer().arg("plan").arg(&path).args(["--json", "--store"]).arg(store).output().expect("a run");
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
