//! `titer compare`, `explain RUN CELL` and `diff` on real runs: no row is dropped, and what differs is named.

use std::path::{Path, PathBuf};

use titer::report::compare::merged;
use titer::report::table::Table;
use titer_core::report::Results;
use titer_tests::cli::{SMALL, stderr, titer};

/// Runs the small experiment with some assignments; the folder of its results.
fn run(folder: &Path, name: &str, assignments: &[&str]) -> PathBuf {
    let config = folder.join("small.toml");
    std::fs::write(&config, SMALL).expect("the configuration can be written");
    let out = folder.join(name);
    let mut command = titer();
    command.arg("run").arg(&config).arg("--store").arg(folder.join("store")).arg("--out").arg(&out);
    for assignment in ["checkpoint_seconds=1000.0"].iter().chain(assignments) {
        command.args(["--set", assignment]);
    }
    let output = command.output().expect("titer runs");
    assert!(output.status.success(), "{assignments:?}: {}", stderr(&output));
    out
}

fn titles(results: &Results) -> Vec<String> {
    let table = Table::new(results).expect("one table");
    table.blocks.into_iter().map(|block| block.title).collect()
}

fn text(arguments: &[&std::ffi::OsStr]) -> String {
    let output = titer().args(arguments).output().expect("titer runs");
    assert!(output.status.success(), "{}", stderr(&output));
    String::from_utf8(output.stdout).expect("text")
}

/// Each of these once gave rows that one of two runs lost without a word.
#[test]
fn a_run_in_another_setting_keeps_all_its_rows() {
    let folder = tempfile::tempdir().expect("a folder");
    let first = run(folder.path(), "first", &[]);
    let rows = merged(std::slice::from_ref(&first)).expect("results").rows.len();
    for (name, assignment, key) in [
        ("steps", "base.pretrain.train.steps=30", "base.train.steps = 30"),
        ("documents", "base.pretrain.data.rows=150", "base.data.rows = 150"),
        ("rate", "base.pretrain.train.learning_rate=4e-3", "base.train.learning_rate = 0.004"),
        ("shape", "base.shape.intermediate_size=32", "base.model.settings.intermediate_size = 32"),
        ("layers", "base.shape.num_hidden_layers=1", "base.model.settings.num_hidden_layers = 1"),
        ("dtype", "dtype=bf16", "base.dtype = \"bf16\""),
        ("align-rows", "align.data.0.rows=30", "align.data.0.rows = 30"),
        ("align-steps", "align.train.steps=10", "align.train.steps = 10"),
        ("align-rate", "align.train.learning_rate=4e-3", "align.train.learning_rate = 0.004"),
        ("rank", "lora.r=4", "align.adapter.lora.r = 4"),
        ("adapter", "align.adapter=full", "align.adapter.mode = \"full\""),
    ] {
        let second = run(folder.path(), name, &[assignment]);
        let both = merged(&[first.clone(), second.clone()]).expect("results");
        assert_eq!(both.rows.len(), 2 * rows, "{assignment}");
        let titles = titles(&both);
        assert_eq!(titles.len(), 2, "{assignment}: {titles:?}");
        assert!(titles[1].contains(key), "{assignment} is not named in {titles:?}");
        let numbers = |results: Results| {
            let mut rows: Vec<_> =
                results.rows.into_iter().map(|row| format!("{} {:?}", row.id, row.metrics)).collect();
            rows.sort();
            rows
        };
        let turned = merged(&[second, first.clone()]).expect("results");
        assert_eq!(numbers(turned), numbers(both), "{assignment}: the order of the runs");
    }
}

#[test]
fn the_same_run_counts_once_and_shards_merge() {
    let folder = tempfile::tempdir().expect("a folder");
    let (whole, again) =
        (run(folder.path(), "whole", &["seeds=[0, 1]"]), run(folder.path(), "again", &["seeds=[0, 1]"]));
    let shards = [run(folder.path(), "seed-0", &["seeds=[0]"]), run(folder.path(), "seed-1", &["seeds=[1]"])];
    let ids = |results: &Results| {
        let mut ids: Vec<String> = results.rows.iter().map(|row| format!("{} {}", row.id, row.method)).collect();
        ids.sort();
        ids
    };
    let whole = merged(&[whole, again]).expect("results");
    let sharded = merged(&shards).expect("results");
    assert_eq!(ids(&sharded), ids(&whole));
    assert_eq!(titles(&sharded), titles(&whole));
    assert_eq!(titles(&sharded).len(), 1);
}

#[test]
fn another_protocol_is_refused_by_the_keys_that_differ() {
    let folder = tempfile::tempdir().expect("a folder");
    let (first, second) =
        (run(folder.path(), "first", &[]), run(folder.path(), "second", &["evaluate.task_prompts=7"]));
    let output = titer().arg("compare").arg(first).arg(second).output().expect("titer runs");
    assert_eq!(output.status.code(), Some(3));
    let error = stderr(&output);
    assert!(error.contains("probes.task.rows is ") && error.contains(" and 7"), "{error}");
}

#[test]
fn a_cell_is_explained_and_two_are_held_against_each_other() {
    let folder = tempfile::tempdir().expect("a folder");
    let (first, second) = (run(folder.path(), "first", &[]), run(folder.path(), "second", &["align.train.steps=10"]));
    let cell = "vaccine, p=0.2".as_ref();
    let explained = text(&["explain".as_ref(), first.as_ref(), cell]);
    for part in
        ["coordinates ", "setting ", "protocol ", "artifacts", "processor", "align.train.steps", "probes.harmful.rows"]
    {
        assert!(explained.contains(part), "{part} is not in\n{explained}");
    }
    let difference = text(&["diff".as_ref(), first.as_ref(), cell, second.as_ref(), cell]);
    assert!(difference.contains("align.train.steps\n    a 12\n    b 10"), "{difference}");
    assert!(difference.contains("protocol: the same"), "{difference}");
    let output = titer().arg("explain").arg(&first).arg("vaccine").output().expect("titer runs");
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("`vaccine` names 2 cells"), "{}", stderr(&output));
}

#[test]
fn cells_are_named_by_whole_labels_and_by_numbers_however_written_and_a_run_alone_lists_them() {
    let folder = tempfile::tempdir().expect("a folder");
    let out = run(folder.path(), "first", &["methods.1.name=\"Vaccine, strong\""]);
    let list = text(&["explain".as_ref(), out.as_ref()]);
    let lines: Vec<&str> = list.lines().filter(|line| line.contains("seed 0")).collect();
    assert_eq!(lines.len(), 4, "{list}");
    let (id, label) = lines[3].trim().split_once("  ").expect("an id and a label");
    assert!(label.starts_with("Vaccine, strong, agnews, p=0.2"), "{list}");
    assert!(list.contains(&format!("titer explain {} ", out.display())), "{list}");
    for cell in [id, label, "vaccine, strong, p=0.20", "p = .2, Vaccine, strong"] {
        let explained = text(&["explain".as_ref(), out.as_ref(), cell.as_ref()]);
        assert!(explained.starts_with(id) && explained.contains("95 % Wilson interval"), "{cell}: {explained}");
    }
}

/// Once such runs gave two tables, and nothing held one run's numbers against the other's.
#[test]
fn runs_in_two_settings_are_compared_cell_by_cell() {
    let folder = tempfile::tempdir().expect("a folder");
    let (first, second) = (run(folder.path(), "first", &[]), run(folder.path(), "second", &["align.train.steps=10"]));
    let compared = text(&["compare".as_ref(), first.as_ref(), second.as_ref()]);
    let (_, between) = compared.split_once("Between settings: agnews · n = 20").expect("a section");
    for part in ["A: align.train.steps = 12", "B: align.train.steps = 10", "B − A"] {
        assert!(between.contains(part), "no `{part}` in\n{compared}");
    }
    let lines = between.lines().filter(|line| line.contains("one seed says nothing about another"));
    assert_eq!(lines.count(), 2 * 2 * 2, "methods, ratios, metrics\n{compared}");
    assert!(!text(&["compare".as_ref(), first.as_ref(), first.as_ref()]).contains("Between settings"));
}

/// Once one caption counted the bases of all rows together.
#[test]
fn a_mean_over_fewer_bases_is_told_from_one_over_more() {
    let folder = tempfile::tempdir().expect("a folder");
    let wide = run(folder.path(), "wide", &["base.seeds=[0, 1]"]);
    let narrow = run(folder.path(), "narrow", &["base.seeds=[0]", "methods.1.name=\"Alone\""]);
    let compared = text(&["compare".as_ref(), wide.as_ref(), narrow.as_ref()]);
    assert!(
        compared.contains("means over 2 bases with one seed each, or over those that stand behind the number"),
        "{compared}"
    );
    let lines = |name: &str| compared.lines().filter(|line| line.trim_start().starts_with(name)).collect::<Vec<_>>();
    assert!(lines("Alone")[0].matches("(1 base)").count() == 6, "{compared}");
    assert!(!lines("Vaccine")[0].contains("(1 base)"), "{compared}");
}

/// Written by a version that had neither settings nor artifacts.
#[test]
fn results_of_schema_1_can_still_be_read() {
    let folder = tempfile::tempdir().expect("a folder");
    let out = run(folder.path(), "first", &[]);
    let path = out.join("results.json");
    let mut value: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(&path).expect("results")).expect("JSON");
    value["schema"] = 1.into();
    for name in ["provenance", "protocols", "settings"] {
        value.as_object_mut().expect("a table").remove(name);
    }
    for row in value["rows"].as_array_mut().expect("rows") {
        for name in ["setting", "coordinates", "id", "artifacts"] {
            row.as_object_mut().expect("a table").remove(name);
        }
    }
    let old = folder.path().join("old");
    std::fs::create_dir(&old).expect("a folder");
    std::fs::write(old.join("results.json"), value.to_string()).expect("a file");
    let rows = merged(std::slice::from_ref(&out)).expect("results").rows.len();
    assert_eq!(merged(&[old.clone(), old.clone()]).expect("results").rows.len(), rows);
    // The same protocol, but the setting is not known: both are shown.
    let both = merged(&[out, old]).expect("results");
    assert_eq!(both.rows.len(), 2 * rows);
    assert!(titles(&both)[1].contains("setting unknown"), "{:?}", titles(&both));
}
