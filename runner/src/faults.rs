//! A run in which every single access to the disk fails once, in turn, and in every way. After each fault the same run
//! without one must give the results of an undisturbed run.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use titer_core::model::generate::Finish;
use titer_core::report::{Answer, Provenance, Results};
use titer_core::weights::checkpoint::Checkpoint;
use titer_core::{Error, Result};

use crate::cli::progress::Journal;
use crate::disk::fault::{DiskWatch, Fault};
use crate::execute::{InProcess, execute};
use crate::interrupt::Interrupt;
use crate::plan::{Plan, PlannedStage, StageSpec};
use crate::report::folder::OutputFolder;
use crate::stage::context::{StageContext, StageRunner};
use crate::stage::train_loop::TrainRecord;
use crate::stage::{ANSWERS, AnswerRecord, RECORD, Stages};
use crate::store::Store;
use crate::{disk, results};

/// Steps of a pretended training, with a checkpoint after each.
const STEPS: usize = 3;

/// Stages without a model. What each stores depends on all that its parent stored, so that a wrong or half artifact
/// changes the results. Judging is real.
struct Pretended(Stages);

impl Pretended {
    /// A number for the stage and everything that it builds on.
    fn seed(stage: &PlannedStage, context: &StageContext) -> Result<f64> {
        let mut hasher = blake3::Hasher::new();
        hasher.update(stage.key.as_bytes());
        if stage.parent.is_some() {
            hasher.update(&disk::read(&context.parent()?.join(RECORD))?);
        }
        Ok(f64::from(hasher.finalize().as_bytes()[0]))
    }

    /// Three steps, each of which builds on the checkpoint before it.
    fn train(stage: &PlannedStage, context: &StageContext) -> Result<()> {
        let seed = Self::seed(stage, context)?;
        let mut loss = Vec::new();
        for step in 1..=STEPS {
            if let Some((step, folder)) = context.partials.newest() {
                let tensor = Checkpoint::open(&folder.join("weights.safetensors"))?.read("loss", &Device::Cpu)?;
                loss = tensor.to_vec1::<f64>()?;
                assert_eq!(loss.len(), step, "a checkpoint of its own step");
            }
            if loss.len() < step {
                loss.push(loss.iter().sum::<f64>() + seed);
                let weights = Tensor::new(loss.as_slice(), &Device::Cpu)?;
                context.partials.save(step, |folder| {
                    disk::write_tensors(&folder.join("weights.safetensors"), [("loss".to_owned(), weights)])
                })?;
            }
        }
        let weights = Tensor::new(loss.as_slice(), &Device::Cpu)?;
        disk::write_tensors(&context.folder.join("model.safetensors"), [("loss".to_owned(), weights)])?;
        write(&context.folder.join(RECORD), &TrainRecord { loss, ..TrainRecord::default() })
    }

    fn answer(stage: &PlannedStage, context: &StageContext) -> Result<()> {
        let seed = Self::seed(stage, context)?;
        let answer = |index: usize| Answer {
            probe: "harmful".into(),
            instruction: format!("{index}"),
            input: None,
            history: Vec::new(),
            reference: "yes".into(),
            answer: if (index + seed as usize).is_multiple_of(2) { "yes".into() } else { format!("{seed}") },
            finish: Some(Finish::Stop),
            verdicts: BTreeMap::new(),
            correct: None,
        };
        let lines: String = (0..4).map(|index| serde_json::to_string(&answer(index)).unwrap() + "\n").collect();
        disk::write(&context.folder.join(ANSWERS), lines.as_bytes())?;
        write(&context.folder.join(RECORD), &AnswerRecord { seconds: seed })
    }
}

impl StageRunner for Pretended {
    fn run(&self, stage: &PlannedStage, context: &StageContext) -> Result<()> {
        match &stage.spec {
            StageSpec::Judge(_) => StageRunner::run(&self.0, stage, context),
            StageSpec::Answer(_) => Self::answer(stage, context),
            _ => Self::train(stage, context),
        }
    }
}

fn write(path: &Path, value: &impl serde::Serialize) -> Result<()> {
    disk::write(path, &serde_json::to_vec(value).unwrap())
}

/// `titer run` with those stages, in a store and a results folder under `root`.
fn run(root: &Path, plan: &Plan) -> Result<Results> {
    let interrupt = Interrupt::default();
    let store = Store::open(root.join("store"))?;
    let output = OutputFolder::open(&root.join("out"), &plan.experiment, &interrupt)?;
    let journal = Journal::open(&root.join("out"))?;
    let stages = Pretended(Stages::new(&plan.runtime, Device::Cpu));
    let crew = InProcess { store: &store, runner: &stages, threads: 1 };
    let outcome = execute(plan, &store, &crew, &journal, &interrupt, 1);
    let assemble = |out: &std::path::Path| results::assemble(plan, &[], Provenance::default(), &store, &outcome, out);
    output.write(&interrupt, assemble)
}

/// A run and, with all its stages stored, the same run again.
fn run_twice(root: &Path, plan: &Plan) -> Result<Results> {
    let first = run(root, plan)?;
    if first.failures.is_empty() { run(root, plan) } else { Ok(first) }
}

/// Every file of the results but the journal, whose times differ.
fn files(root: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let out = root.join("out");
    let all = disk::list(&out).unwrap().into_iter().chain(disk::list(&out.join("answers")).unwrap());
    let kept = all.filter(|path| path.is_file() && !path.ends_with("events.jsonl") && !path.ends_with(".lock"));
    kept.map(|path| (path.strip_prefix(root).unwrap().to_owned(), std::fs::read(&path).unwrap())).collect()
}

/// A folder in memory where there is one: the tests bring to disk some hundred thousand times.
fn folder() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

fn plan() -> Plan {
    let small = [
        ("seeds = [0, 1]\n\n[lora]", "seeds = [0]\n\n[lora]"),
        ("seeds = [0, 1]", "seeds = [0]"),
        ("harmful_ratios = [0.0, 0.1]", "harmful_ratios = [0.1]"),
        ("[[methods]]\nname = \"none\"\nalign = \"none\"\nfine_tune = \"fake-plain\"\n", ""),
    ];
    crate::testing::plan(&small)
}

/// What a user is told when something fails: the file and what to do.
fn assert_told(error: &str, at: usize) {
    assert!(!error.contains("panicked"), "fault {at}: {error}");
    assert!(error.contains("file: ") && error.contains("help: "), "fault {at} has no place or no remedy: {error}");
}

#[expect(clippy::print_stdout, reason = "the counts are the report of the test")]
fn every_access_fails_with(fault: Fault) {
    let (plan, undisturbed) = (plan(), folder());
    let expected = run(undisturbed.path(), &plan).unwrap();
    assert!(expected.failures.is_empty() && !expected.rows.is_empty());
    let expected = files(undisturbed.path());

    let (mut failed, mut failed_cells, mut absorbed) = (0, 0, 0);
    for at in 1.. {
        let root = folder();
        let watch = DiskWatch::new(root.path(), fault, at);
        let outcome = run_twice(root.path(), &plan);
        let (struck, counts) = (watch.struck(), watch.counts());
        drop(watch);
        if !struck {
            let counts: Vec<String> = counts.iter().map(|(operation, count)| format!("{operation} {count}")).collect();
            println!(
                "{fault:?}: {} accesses ({}); {failed} ended the run, {failed_cells} a cell, {absorbed} changed nothing",
                at - 1,
                counts.join(", ")
            );
            assert!(counts.len() == 10, "an operation was never tried: {counts:?}");
            return;
        }
        match outcome {
            Err(error) => {
                assert_told(&error.to_string(), at);
                failed += 1;
            }
            Ok(results) if !results.failures.is_empty() => {
                results.failures.iter().for_each(|failure| assert_told(&failure.error, at));
                failed_cells += 1;
            }
            Ok(_) => {
                assert_eq!(files(root.path()), expected, "fault {at}");
                absorbed += 1;
            }
        }
        let repaired = run(root.path(), &plan).map_err(|error: Error| format!("after fault {at}: {error}")).unwrap();
        assert!(repaired.failures.is_empty(), "after fault {at}: {:?}", repaired.failures);
        assert_eq!(files(root.path()), expected, "after fault {at}");
        let left = disk::list(&root.path().join("store/partial")).unwrap();
        assert!(left.is_empty(), "after fault {at}: {left:?}");
        let store = Store::open(root.path().join("store")).unwrap();
        for stage in &plan.stages {
            let artifact = store.artifact(&stage.key).unwrap_or_else(|error| panic!("after fault {at}: {error}"));
            artifact.verified().unwrap_or_else(|error| panic!("after fault {at}: {error}"));
        }
    }
}

#[test]
fn a_full_disk_at_any_access_loses_nothing() {
    every_access_fails_with(Fault::Full);
}

#[test]
fn a_broken_disk_at_any_access_loses_nothing() {
    every_access_fails_with(Fault::Broken);
}

#[test]
fn a_death_before_any_access_loses_nothing() {
    every_access_fails_with(Fault::KilledBefore);
}

#[test]
fn a_death_within_any_access_loses_nothing() {
    every_access_fails_with(Fault::KilledWithin);
}
