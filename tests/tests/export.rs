//! Models taken out of the store answer as they did in the run.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::Value;
use titer_core::report::Answer;
use titer_tests::cli::{results, run, small, stderr, titer};

/// A run of the small experiment in `folder`: its results folder.
fn finished(folder: &Path, changes: &[(&str, &str)]) -> PathBuf {
    let output = run(folder, &small(folder, changes)).output().expect("it runs");
    assert!(output.status.success(), "{}", stderr(&output));
    folder.join("out")
}

/// `titer export` of a cell of the run in `folder`, into `folder/{name}`.
fn export(folder: &Path, cell: &str, form: &str, name: &str) -> std::process::Output {
    let mut command = titer();
    command.arg("export").arg(folder.join("out")).arg(cell).args(["--to", form]);
    command.arg("--out").arg(folder.join(name)).arg("--store").arg(folder.join("store")).output().expect("it runs")
}

/// What the cell answered to the harmful prompts in the run.
fn answered(out: &Path, method: &str) -> Result<Vec<Answer>> {
    let results = results(out);
    let rows = results["rows"].as_array().context("rows")?;
    let row =
        rows.iter().find(|row| row["coordinates"]["method"] == method && row["coordinates"]["harmful_ratio"] == 0.2);
    let row = row.with_context(|| format!("no row of {method}: {rows:?}"))?;
    let file = row["answers"]["harmful"].as_str().context("a file")?;
    let text = std::fs::read_to_string(out.join(file))?;
    Ok(text.lines().map(serde_json::from_str).collect::<Result<_, _>>()?)
}

/// Fails unless `titer generate` with these arguments gives these answers.
fn answers_alike(expected: &[Answer], arguments: &[&Path]) {
    for answer in expected {
        let mut command = titer();
        command.arg("generate").arg("--model").args(arguments).args(["--template", "chat", "--max-new-tokens", "12"]);
        let output = command.arg("--prompt").arg(&answer.instruction).output().expect("it runs");
        assert!(output.status.success(), "{}", stderr(&output));
        let found = String::from_utf8_lossy(&output.stdout);
        assert_eq!(found.strip_suffix('\n'), Some(answer.answer.as_str()), "{}", answer.instruction);
    }
}

#[test]
fn an_exported_model_and_an_exported_adapter_answer_as_the_cell_did() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let folder = folder.path();
    let short = ("[evaluate]", "[evaluate]\nmax_new_tokens = 12");
    let single = ("samples = 20", "mode = \"single\"\nsamples = 20");
    for (changes, rank) in [(&[short][..], 16), (&[short, single], 8)] {
        let _ = std::fs::remove_dir_all(folder.join("out"));
        let out = finished(folder, changes);
        let answers = answered(&out, "Vaccine")?;
        assert_eq!(answers.len(), 6);
        let [hf, peft] = ["hf", "peft"].map(|form| format!("{form}-{rank}"));
        for (form, name) in [("hf", &hf), ("peft", &peft)] {
            let output = export(folder, "Vaccine, p=0.2", form, name);
            assert!(output.status.success(), "{}", stderr(&output));
        }
        let config: Value = serde_json::from_slice(&std::fs::read(folder.join(&peft).join("adapter_config.json"))?)?;
        assert_eq!(config["r"], rank, "{config}");
        let base = PathBuf::from(config["base_model_name_or_path"].as_str().context("the base")?);
        answers_alike(&answers, &[&folder.join(&hf)]);
        answers_alike(&answers, &[&base, Path::new("--adapter"), &folder.join(&peft)]);
    }
    Ok(())
}

#[test]
fn what_cannot_be_exported_says_why() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let folder = folder.path();
    let out = finished(folder, &[("harmful_ratios = [0.0, 0.2]", "harmful_ratios = [0.2]")]);
    let cell = "SFT, p=0.2";
    let refused = |output: std::process::Output, parts: &[&str]| {
        let text = stderr(&output);
        assert!(!output.status.success() && parts.iter().all(|part| text.contains(part)), "{text}");
    };
    refused(export(folder, "Booster", "hf", "a"), &["names no cell"]);
    std::fs::create_dir(folder.join("full"))?;
    std::fs::write(folder.join("full/notes.txt"), "mine")?;
    refused(export(folder, cell, "hf", "full"), &["not empty", "--out"]);
    let with = |more: &[&str]| {
        let mut command = titer();
        command.arg("export").arg("--out").arg(folder.join("a")).arg("--store").arg(folder.join("store")).args(more);
        command.output().expect("it runs")
    };
    let out = out.to_str().context("a name")?;
    refused(with(&[out, cell, "--to", "peft", "--stage", "base"]), &["no adapter", "--to hf"]);
    refused(
        with(&[out, cell, "--to", "hf", "--stage", "post"]),
        &["no model of the stage `post`", "base, align, fine_tune"],
    );
    let results = results(Path::new(out));
    let judge = results["rows"][0]["artifacts"]["judge harmful by world"].as_str().context("a key")?.to_owned();
    refused(with(&["--key", &judge, "--to", "hf"]), &["holds no model"]);
    refused(export(folder, cell, "hf", "new/.."), &["has no name", "--out"]);
    refused(export(folder, cell, "hf", "full/notes.txt"), &["no folder"]);
    let mut names = std::fs::read_dir(folder)?.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    assert!(!names.any(|name| name.contains("unfinished")), "an export left something behind");
    assert!(!folder.join("a").exists() && folder.join("full/notes.txt").exists());
    Ok(())
}
