//! Whole experiments through the real binary: on the device they end as on the host.

use std::path::{Path, PathBuf};
use std::process::Output;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use titer_tests::cli::{SMALL, answers, results, run, stderr, titer};

/// How far two losses may be apart, as a share.
const LOSS: f64 = 1e-5;

/// The small experiment with fewer steps, as the stand-in is some thousand times slower than a GPU.
fn small() -> Result<toml::Table> {
    let mut config: toml::Table = toml::from_str(SMALL)?;
    reduce(&mut config)?;
    Ok(config)
}

/// Every method of `configs/defenses.toml` on as little data, in as few steps.
fn every_method() -> Result<toml::Table> {
    let mut config: toml::Table = toml::from_str(include_str!("../../../configs/defenses.toml"))?;
    config.insert("seeds".into(), vec![0].into());
    reduce(&mut config)?;
    for (_, stream) in table(&mut config, "streams")? {
        stream.as_table_mut().context("a stream")?.insert("rows".into(), 12.into());
    }
    Ok(config)
}

fn table<'a>(config: &'a mut toml::Table, key: &str) -> Result<&'a mut toml::Table> {
    config.get_mut(key).and_then(toml::Value::as_table_mut).with_context(|| format!("a table `{key}`"))
}

/// Three steps of three rows in every stage, and a handful of prompts.
fn reduce(config: &mut toml::Table) -> Result<()> {
    let shape = toml::toml! {
        hidden_size = 32
        intermediate_size = 64
        num_hidden_layers = 2
        num_attention_heads = 4
        max_position_embeddings = 64
    };
    table(config, "base")?.insert("shape".into(), shape.into());
    let stages = [&["base", "pretrain"][..], &["align"], &["fine_tune"]];
    for path in stages {
        let stage = path.iter().try_fold(&mut *config, |at, key| table(at, key))?;
        let train = table(stage, "train")?;
        train.insert("steps".into(), 3.into());
        train.insert("batch_size".into(), 3.into());
    }
    let fine_tune = table(config, "fine_tune")?;
    fine_tune.insert("samples".into(), 20.into());
    fine_tune.insert("harmful_ratios".into(), vec![0.1].into());
    table(fine_tune, "monitor")?.insert("rows".into(), 4.into());
    let evaluate = table(config, "evaluate")?;
    evaluate.insert("task_prompts".into(), 4.into());
    evaluate.insert("batch_size".into(), 3.into());
    for probe in ["harmful", "benign"] {
        table(evaluate, probe)?.insert("rows".into(), 4.into());
    }
    Ok(())
}

/// An experiment in a folder of its own.
struct Run {
    folder: tempfile::TempDir,
    config: PathBuf,
}

impl Run {
    fn new(config: &toml::Table) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("experiment.toml");
        std::fs::write(&path, toml::to_string(config)?)?;
        Ok(Self { folder, config: path })
    }

    fn out(&self) -> PathBuf {
        self.folder.path().join("out")
    }

    fn command(&self, device: &str, more: &[&str]) -> std::process::Command {
        let mut command = run(self.folder.path(), &self.config);
        command.args(["--device", device]).args(more);
        command
    }

    fn to_the_end(&self, device: &str, more: &[&str]) -> Result<Output> {
        let output = self.command(device, more).output()?;
        ensure!(output.status.success(), "{}", stderr(&output));
        Ok(output)
    }
}

/// Fails unless two runs have the same cells with the same losses, to rounding.
fn same_to_rounding(ours: &Path, host: &Path) -> Result<()> {
    let (ours, host) = (results(ours), results(host));
    ensure!(ours.get("failures").is_none(), "{:#}", ours["failures"]);
    let rows = |value: &Value| value["rows"].as_array().cloned().context("rows");
    let (ours, host) = (rows(&ours)?, rows(&host)?);
    ensure!(ours.len() == host.len() && !ours.is_empty(), "{} cells instead of {}", ours.len(), host.len());
    for (ours, host) in ours.iter().zip(&host) {
        let method = &host["method"];
        ensure!(&ours["method"] == method && ours["n"] == host["n"], "another cell than {method}");
        for (name, curve) in host["curves"].as_object().context("curves")? {
            let expected = numbers(curve);
            let found = numbers(&ours["curves"][name]);
            ensure!(found.len() == expected.len(), "{method}: {name} of {} points", found.len());
            let mut pairs = found.iter().zip(&expected);
            let near = pairs.all(|(x, y)| (x - y).abs() <= LOSS * y.abs());
            ensure!(near, "{method}: {name} is {found:?} instead of {expected:?}");
        }
    }
    Ok(())
}

/// All numbers in a value, in order.
fn numbers(value: &Value) -> Vec<f64> {
    match value {
        Value::Array(values) => values.iter().flat_map(numbers).collect(),
        Value::Object(values) => values.values().flat_map(numbers).collect(),
        other => other.as_f64().into_iter().collect(),
    }
}

#[test]
#[ignore = "needs a device: see .ci/device"]
fn a_small_experiment_ends_as_on_the_host() -> Result<()> {
    let (ours, host) = (Run::new(&small()?)?, Run::new(&small()?)?);
    ours.to_the_end("cuda", &[])?;
    host.to_the_end("cpu", &[])?;
    same_to_rounding(&ours.out(), &host.out())
}

#[test]
#[ignore = "needs a device: see .ci/device"]
fn every_method_ends_as_on_the_host() -> Result<()> {
    let (ours, host) = (Run::new(&every_method()?)?, Run::new(&every_method()?)?);
    ours.to_the_end("cuda", &[])?;
    host.to_the_end("cpu", &[])?;
    same_to_rounding(&ours.out(), &host.out())
}

/// Killed while it trains and started again, and by two workers, a run ends in the same bits.
#[test]
#[ignore = "needs a device: see .ci/device"]
fn runs_that_are_killed_or_shared_end_in_the_same_bits() -> Result<()> {
    let whole = Run::new(&small()?)?;
    whole.to_the_end("cuda", &[])?;
    let same = |other: &Run| -> Result<()> {
        ensure!(results(&other.out()) == results(&whole.out()), "{:#}", results(&other.out()));
        ensure!(answers(&other.out()) == answers(&whole.out()));
        Ok(())
    };
    let killed = Run::new(&small()?)?;
    let checkpoints = killed.folder.path().join("store/partial");
    let mut child = killed.command("cuda", &[]).stderr(std::process::Stdio::null()).spawn()?;
    while std::fs::read_dir(&checkpoints).map_or(true, |mut files| files.next().is_none()) {
        ensure!(child.try_wait()?.is_none(), "the run ended without a checkpoint");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    // SIGKILL: no handler, no clean-up.
    child.kill()?;
    child.wait()?;
    killed.to_the_end("cuda", &[])?;
    same(&killed)?;
    let shared = Run::new(&small()?)?;
    shared.to_the_end("cuda", &["--jobs", "2"])?;
    same(&shared)
}

/// An error of the device is for good in its process: the stage that met it fails, all others run in another process.
#[test]
#[ignore = "needs a device: see .ci/device"]
fn a_worker_that_lost_its_device_is_replaced() -> Result<()> {
    let run = Run::new(&small()?)?;
    let pretrain = ["--device", "cuda", "--store"];
    let mut command = titer();
    command.arg("pretrain").args(pretrain).arg(run.folder.path().join("store")).arg(&run.config);
    ensure!(command.status()?.success());
    let lose = format!("lose cross_entropy {}", run.folder.path().join("lost").display());
    let output = run.command("cuda", &["--jobs", "1"]).env("STANDIN_PLANT", lose).output()?;
    let results = results(&run.out());
    let count = |key: &str| results[key].as_array().map_or(0, Vec::len);
    let said = stderr(&output);
    ensure!(said.contains("device is lost") && count("failures") > 0 && count("rows") > 0, "{said}\n{results:#}");
    Ok(())
}

/// A stage tells what its tensors took on the device.
#[test]
#[ignore = "needs a device: see .ci/device"]
fn the_ledger_has_the_memory_of_the_device() -> Result<()> {
    let run = Run::new(&small()?)?;
    run.to_the_end("cuda", &[])?;
    let text = std::fs::read_to_string(run.out().join("results.json"))?;
    let results: Value = serde_json::from_str(&text)?;
    for row in results["rows"].as_array().context("rows")? {
        let peak = |stage: &str| row["ledger"][stage].as_u64().with_context(|| format!("no {stage} in {row:#}"));
        // Two blocks of 32 wide with some hundred tokens: less than the process, more than the weights.
        for bytes in [peak("align_peak_bytes")?, peak("fine_tune_peak_bytes")?] {
            ensure!((1 << 17..64 << 20).contains(&bytes), "{bytes} bytes");
        }
    }
    Ok(())
}

/// The loss of the only step is finite, and what its update leaves is not.
#[test]
#[ignore = "needs a device: see .ci/device"]
fn a_stage_that_diverges_in_its_last_step_fails() -> Result<()> {
    let mut config = small()?;
    let train = table(table(table(&mut config, "base")?, "pretrain")?, "train")?;
    train.insert("steps".into(), 1.into());
    train.insert("learning_rate".into(), 1e38.into());
    let run = Run::new(&config)?;
    let output = run.command("cuda", &[]).output()?;
    let said = stderr(&output);
    ensure!(!output.status.success() && said.contains("not finite"), "{said}");
    Ok(())
}
