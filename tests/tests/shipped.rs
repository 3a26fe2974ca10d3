//! What ships is true: the expected plugins are registered, every configuration can be planned, the README's example is
//! the code that is tested, and its table of defenses is up to date.

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
        &["ewc", "kl", "vlguard", "lisa", "ldifs", "constrained-sft", "prompt-template"],
        &["antidote", "safe-lora", "resta", "lox"],
    ];
    let mut defenses = defenses.concat();
    defenses.sort_unstable();
    assert_eq!(names::<DefenseEntry>(), defenses);
    assert_eq!(names::<ModelEntry>(), ["llama", "mistral", "opt", "qwen2"]);
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

#[test]
fn every_shipped_configuration_can_be_planned() {
    let store = tempfile::tempdir().expect("a folder");
    let mut planned = 0;
    for entry in std::fs::read_dir(root().join("configs")).expect("a folder") {
        let path = entry.expect("an entry").path();
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

#[test]
fn the_readme_shows_the_tested_example_and_all_defenses() {
    let readme = std::fs::read_to_string(root().join("README.md")).expect("the README");
    let source = std::fs::read_to_string(root().join("tests/support/own_defense.rs")).expect("the example");
    let (_, code) = source.split_once("\n\n").expect("a module comment");
    assert!(readme.contains(code.trim()), "copy tests/support/own_defense.rs into the README");
    for entry in registry::all::<DefenseEntry>().expect("no name twice") {
        assert!(readme.contains(entry.summary), "run the docs example: `{}` is missing from the README", entry.name);
    }
}
