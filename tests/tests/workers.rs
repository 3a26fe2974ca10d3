//! Stages in processes of their own: a plan is all that a worker needs, a worker that dies fails its stage only, and a chain
//! of stages loads its model once.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use candle_core::Device;
use serde_json::Value;
use titer::execute::{Crew, InProcess};
use titer::interrupt::Interrupt;
use titer::plan::{Plan, PlannedStage};
use titer::stage::Stages;
use titer::store::Store;
use titer_core::event::{Event, Sink};
use titer_tests::cli::{answers, results, run, small, stderr, titer};

fn ended_well(output: &Output) {
    assert!(output.status.success(), "{}", stderr(output));
}

/// `titer plan --json` of a configuration.
fn plan_of(folder: &Path, config: &Path) -> (PathBuf, Plan) {
    let output = titer().arg("plan").arg(config).arg("--json").arg("--store").arg(folder.join("store")).output();
    let output = output.expect("a plan");
    ended_well(&output);
    let path = folder.join("plan.json");
    std::fs::write(&path, &output.stdout).expect("a file");
    (path, serde_json::from_slice(&output.stdout).expect("a plan"))
}

fn worker(folder: &Path, plan: &Path, key: &str) -> Output {
    let mut command = titer();
    command.arg("worker").arg(plan).args(["--stage", key, "--store"]).arg(folder.join("store"));
    // The plan says where data lies, whatever the working directory is.
    command.current_dir(std::env::temp_dir()).output().expect("a worker")
}

#[test]
fn a_plan_is_all_that_workers_need() {
    let (expected, folder) = (tempfile::tempdir().expect("a folder"), tempfile::tempdir().expect("a folder"));
    ended_well(&run(expected.path(), &small(expected.path(), &[])).output().expect("a run"));

    let config = small(folder.path(), &[]);
    let (path, plan) = plan_of(folder.path(), &config);
    assert_eq!(serde_json::from_str::<Plan>(&serde_json::to_string(&plan).expect("JSON")).expect("a plan"), plan);
    for stage in &plan.stages {
        ended_well(&worker(folder.path(), &path, &stage.key));
    }
    let output = run(folder.path(), &config).output().expect("a run");
    ended_well(&output);
    assert!(stderr(&output).contains("0 stages ran"), "{}", stderr(&output));
    assert_eq!(results(&folder.path().join("out")), results(&expected.path().join("out")));
    assert_eq!(answers(&folder.path().join("out")), answers(&expected.path().join("out")));
}

#[test]
fn a_worker_refuses_what_is_not_the_plan_or_not_ready() {
    let folder = tempfile::tempdir().expect("a folder");
    let (path, plan) = plan_of(folder.path(), &small(folder.path(), &[]));
    let refused = |text: &str, key: &str, expected: &str| {
        let edited = folder.path().join("edited.json");
        std::fs::write(&edited, text).expect("a file");
        let output = worker(folder.path(), &edited, key);
        let error = stderr(&output);
        assert!(!output.status.success() && error.contains(expected) && error.contains("help: "), "{error}");
    };
    let text = std::fs::read_to_string(&path).expect("a plan");
    let base = &plan.stages[0].key;
    refused(&text.replace("\"learning_rate\": 0.005", "\"learning_rate\": 0.006"), base, "is not what its key says");
    refused(&text.replace("portable", "native"), base, "the plan is for the arithmetic");
    refused(&text, "0000", "names no stage of the plan");
    refused("{}", base, "the plan cannot be read");
    let child = plan.stages.iter().find(|stage| stage.parent.is_some()).expect("a child");
    refused(&text, &child.key, "stages");
}

/// What a stage reads is what its key says, also if a file has changed since the plan was made.
#[test]
fn a_worker_reads_no_file_that_is_not_the_plans() {
    let folder = tempfile::tempdir().expect("a folder");
    let refused = |plan: &Path, key: &str, named: &Path| {
        let output = worker(folder.path(), plan, key);
        let error = stderr(&output);
        assert_eq!(output.status.code(), Some(3), "{error}");
        let expected = ["not that of the plan", &format!("--> {}", named.display()), "help: "];
        assert!(expected.iter().all(|text| error.contains(text)), "{error}");
    };
    let stage = |plan: &Plan, label: &str| {
        let found = plan.stages.iter().find(|stage| stage.label.starts_with(label));
        found.unwrap_or_else(|| panic!("no stage `{label}`")).key.clone()
    };

    let rows = folder.path().join("rows.jsonl");
    let write = |answer: &str| {
        let row = format!("{{\"instruction\": \"find movie\", \"output\": \"{answer}\"}}\n");
        std::fs::write(&rows, row.repeat(40)).expect("a file");
    };
    write("warm");
    let own = "{ task = \"rows\", train = \"rows.jsonl\", rows = 40 }";
    let config = small(folder.path(), &[("{ task = \"world-safe\", rows = 40 }", own)]);
    let (path, plan) = plan_of(folder.path(), &config);
    let pretrained = stage(&plan, "pretrain");
    ended_well(&worker(folder.path(), &path, &pretrained));
    let align = stage(&plan, "align");
    write("cold");
    refused(&path, &align, &rows);
    write("warm");
    ended_well(&worker(folder.path(), &path, &align));

    let model = folder.path().join("model");
    std::fs::create_dir(&model).expect("a folder");
    for name in ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"] {
        let from = folder.path().join("store/stages").join(&pretrained).join(name);
        std::fs::copy(from, model.join(name)).expect("a copy");
    }
    let text = std::fs::read_to_string(&config).expect("a configuration");
    let shape = text.find("shape = ").expect("a shape")..text.find("[encoding]").expect("the encoding");
    std::fs::write(&config, text.replace(&text[shape], "path = \"model\"\n")).expect("a file");
    let (path, plan) = plan_of(folder.path(), &config);
    let (load, align) = (stage(&plan, "load"), stage(&plan, "align"));
    let weights = model.join("model.safetensors");
    let (before, mut after) = (std::fs::read(&weights).expect("weights"), std::fs::read(&weights).expect("weights"));
    *after.last_mut().expect("a byte") ^= 1;
    std::fs::write(&weights, &after).expect("a file");
    refused(&path, &load, &model);
    std::fs::write(&weights, &before).expect("a file");
    ended_well(&worker(folder.path(), &path, &load));
    std::fs::write(&weights, &after).expect("a file");
    refused(&path, &align, &model);
}

/// The processes that `parent` has started.
fn workers(parent: u32) -> Vec<u32> {
    let path = format!("/proc/{parent}/task/{parent}/children");
    let own = std::fs::read_to_string(path).unwrap_or_default();
    // A worker is started by the thread of its job.
    let threads = std::fs::read_dir(format!("/proc/{parent}/task")).into_iter().flatten().flatten();
    let of_threads = threads.filter_map(|thread| std::fs::read_to_string(thread.path().join("children")).ok());
    let all: String = of_threads.chain([own]).collect::<Vec<_>>().join(" ");
    let mut found: Vec<u32> = all.split_whitespace().filter_map(|number| number.parse().ok()).collect();
    found.sort_unstable();
    found.dedup();
    found
}

fn kill(signal: &str, process: u32) {
    let status = Command::new("kill").args([signal, &process.to_string()]).status().expect("kill");
    assert!(status.success());
}

/// Waits until a stage begins whose label starts with `label`.
fn wait_for(folder: &Path, label: &str) {
    let until = Instant::now() + Duration::from_mins(2);
    let begun = |line: &str| {
        let event: Value = serde_json::from_str(line).unwrap_or_default();
        event["event"] == "stage_started" && event["label"].as_str().is_some_and(|found| found.starts_with(label))
    };
    while Instant::now() < until {
        let events = std::fs::read_to_string(folder.join("out/events.jsonl")).unwrap_or_default();
        if events.lines().any(begun) {
            return;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    panic!("no stage `{label}` began");
}

/// Waits until a stage has a checkpoint.
fn wait_for_checkpoint(folder: &Path) {
    let kept = |stage: std::fs::DirEntry| {
        let steps = std::fs::read_dir(stage.path()).into_iter().flatten().flatten();
        steps.into_iter().any(|step| step.file_name() != "new")
    };
    let until = Instant::now() + Duration::from_mins(1);
    while !std::fs::read_dir(folder.join("store/partial")).expect("a folder").flatten().any(kept) {
        assert!(Instant::now() < until, "no checkpoint");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A run on one worker whose attacks take a while, with a checkpoint after every step.
fn begin_slow(folder: &Path) -> (PathBuf, Child) {
    let config = small(
        folder,
        &[("steps = 8, batch_size = 4, learning_rate = 1e-3", "steps = 120, batch_size = 4, learning_rate = 1e-3")],
    );
    let child = run(folder, &config).args(["--jobs", "1"]).stderr(Stdio::piped()).stdout(Stdio::piped()).spawn();
    (config, child.expect("a run"))
}

#[test]
fn a_killed_worker_fails_its_stage_and_nothing_else() {
    let folder = tempfile::tempdir().expect("a folder");
    let (config, child) = begin_slow(folder.path());
    wait_for(folder.path(), "fine-tune");
    wait_for_checkpoint(folder.path());
    let found = workers(child.id());
    assert_eq!(found.len(), 1, "one job, one worker");
    kill("-KILL", found[0]);
    let output = child.wait_with_output().expect("the end");
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    let out = results(&folder.path().join("out"));
    let (rows, failures) = (out["rows"].as_array().expect("rows"), out["failures"].as_array().expect("failures"));
    assert_eq!((rows.len(), failures.len()), (3, 1), "{failures:?}");
    let error = failures[0]["error"].as_str().expect("an error");
    assert!(
        error.contains("was killed (signal 9)") && error.contains("help: ") && error.contains("--jobs 1"),
        "{error}"
    );
    // What the stage had done is not lost, and the same command goes on.
    let again = run(folder.path(), &config).output().expect("a run");
    ended_well(&again);
    assert!(stderr(&again).contains("resume  fine-tune"), "{}", stderr(&again));
    let undisturbed = tempfile::tempdir().expect("a folder");
    ended_well(&run(undisturbed.path(), &config).output().expect("a run"));
    assert_eq!(results(&folder.path().join("out")), results(&undisturbed.path().join("out")));
}

/// As by a time limit, which signals every process of a job.
#[test]
fn a_worker_that_is_told_to_end_keeps_a_checkpoint() {
    let folder = tempfile::tempdir().expect("a folder");
    let (config, child) = begin_slow(folder.path());
    wait_for(folder.path(), "fine-tune");
    wait_for_checkpoint(folder.path());
    let found = workers(child.id());
    kill("-TERM", found[0]);
    let output = child.wait_with_output().expect("the end");
    assert_eq!(output.status.code(), Some(130), "{}", stderr(&output));
    let again = run(folder.path(), &config).output().expect("a run");
    ended_well(&again);
    assert!(stderr(&again).contains("resume  fine-tune"), "{}", stderr(&again));
}

#[test]
fn workers_end_with_their_run() {
    let folder = tempfile::tempdir().expect("a folder");
    let (_, mut child) = begin_slow(folder.path());
    wait_for(folder.path(), "fine-tune");
    let found = workers(child.id());
    assert_eq!(found.len(), 1);
    child.kill().expect("a kill");
    child.wait().expect("the end");
    let until = Instant::now() + Duration::from_secs(20);
    while std::path::Path::new(&format!("/proc/{}", found[0])).exists() {
        assert!(Instant::now() < until, "the worker {} lives on", found[0]);
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A worker gets less memory than the larger of two attacks needs: its cells fail, with a remedy, and no others.
#[test]
fn a_stage_without_memory_is_a_failed_cell() {
    let folder = tempfile::tempdir().expect("a folder");
    // All of the user's rows in one batch.
    let large =
        ("steps = 8, batch_size = 4, learning_rate = 1e-3", "steps = 1, batch_size = 60000, learning_rate = 1e-3");
    let config = small(folder.path(), &[("samples = 20", "samples = [20, 60000]"), large]);
    let usual = run(folder.path(), &config);
    let mut limited = Command::new("sh");
    // In kilobytes of address space, of the run and of each worker.
    limited.args(["-c", "ulimit -v 2200000; exec \"$0\" \"$@\""]).arg(usual.get_program()).args(usual.get_args());
    let output = limited.args(["--jobs", "1"]).output().expect("a run");
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    let out = results(&folder.path().join("out"));
    let (rows, failures) = (out["rows"].as_array().expect("rows"), out["failures"].as_array().expect("failures"));
    assert_eq!((rows.len(), failures.len()), (4, 4), "{failures:?}");
    assert!(rows.iter().all(|row| row["samples"] == 20));
    for failure in failures {
        let error = failure["error"].as_str().expect("an error");
        assert!(error.contains("ran out of memory") && error.contains("batch_size"), "{error}");
    }
}

#[test]
fn a_chain_of_stages_loads_its_model_once() {
    let folder = tempfile::tempdir().expect("a folder");
    let config = small(folder.path(), &[]);
    let output = run(folder.path(), &config).args(["-v", "--jobs", "1"]).output().expect("a run");
    ended_well(&output);
    let loads = stderr(&output).lines().filter(|line| line.contains("loaded a model")).count();
    // Four cells, two aligned models and the base, each asked three kinds of questions.
    assert_eq!(loads, 1, "{}", stderr(&output));
}

struct Silent;

impl Sink for Silent {
    fn emit(&self, _: Event) {}
}

/// What a stage held at once is told by its own record, whatever else was loaded before it and by whom.
#[test]
fn the_peak_of_a_stage_does_not_depend_on_what_ran_before() {
    let folder = tempfile::tempdir().expect("a folder");
    // Weights that are large beside everything else.
    let changes = [
        ("hidden_size = 16, intermediate_size = 24", "hidden_size = 128, intermediate_size = 256"),
        ("[base]\n", "[base]\nseeds = [0, 1]\n"),
        ("steps = 40, batch_size = 4", "steps = 2, batch_size = 1"),
        ("steps = 12, batch_size = 4", "steps = 2, batch_size = 1"),
        ("steps = 8, batch_size = 4", "steps = 2, batch_size = 1"),
    ];
    let (_, plan) = plan_of(folder.path(), &small(folder.path(), &changes));
    let base = |stage: &PlannedStage| plan.chain(&stage.key).last().expect("a base").key.clone();
    // The stages of either base, parents first.
    let [zero, one] = [0, 1].map(|which| {
        let bases: Vec<&PlannedStage> = plan.stages.iter().filter(|stage| stage.parent.is_none()).collect();
        plan.stages.iter().filter(|stage| base(stage) == bases[which].key).collect::<Vec<_>>()
    });
    let one_after_the_other = zero.iter().chain(&one).map(|stage| (0, *stage));
    let alternating = zero.iter().zip(&one).flat_map(|(a, b)| [(0, *a), (0, *b)]);
    let by_two_jobs = zero.iter().zip(&one).enumerate().flat_map(|(at, (a, b))| [(at % 2, *a), (1 - at % 2, *b)]);
    let orders: [Vec<(usize, &PlannedStage)>; 3] =
        [one_after_the_other.collect(), alternating.collect(), by_two_jobs.collect()];
    let peaks = orders.map(|order| {
        let root = tempfile::tempdir().expect("a folder");
        let store = Store::open(root.path()).expect("a store");
        let stages = Stages::new(&plan.runtime, Device::Cpu);
        let crew = InProcess { store: &store, runner: &stages, threads: 1 };
        let mut workers = [crew.worker(), crew.worker()];
        for (job, stage) in order {
            let ran = workers[job].run(&plan.chain(&stage.key), &Silent, &Interrupt::default());
            assert!(ran.expect("a stage"));
        }
        let peak = |stage: &PlannedStage| {
            let record = std::fs::read(store.artifact(&stage.key).expect("a stage").folder().join("record.json"));
            let record: Value = serde_json::from_slice(&record.expect("a record")).expect("JSON");
            Some((stage.label.clone(), record["peak_bytes"].as_u64()?))
        };
        plan.stages.iter().filter_map(peak).collect::<Vec<_>>()
    });
    assert_eq!(peaks[0].len(), 2 * (1 + 2 + 4), "bases, alignments, attacks");
    for (at, (label, expected)) in peaks[0].iter().enumerate() {
        let others = [peaks[1][at].1, peaks[2][at].1];
        let near = others.iter().all(|other| other.abs_diff(*expected) < expected / 50);
        assert!(near, "{label}: {expected} bytes, in other orders {others:?}");
    }
}

/// What `titer pretrain` of a new store says on standard error.
fn told(arguments: &[&str], variables: &[(&str, &str)]) -> String {
    let folder = tempfile::tempdir().expect("a folder");
    let mut command = titer();
    command.arg("pretrain").arg(small(folder.path(), &[])).arg("--store").arg(folder.path().join("store"));
    command.env_remove("RUST_LOG").args(arguments).envs(variables.iter().copied());
    let output = command.output().expect("a process");
    ended_well(&output);
    let text = stderr(&output);
    assert!(!text.contains('\u{1b}'), "{text}");
    text
}

#[test]
fn log_lines_of_workers_say_stage_and_step() {
    let begins = |text: &str| text.lines().any(|line| line.contains("label=\"pretrain") && line.ends_with("begins"));
    let steps = |text: &str| text.matches("trained").count();
    let quiet = told(&[], &[]);
    assert!(!begins(&quiet) && steps(&quiet) == 0, "{quiet}");
    let verbose = told(&["-v"], &[]);
    assert!(begins(&verbose) && steps(&verbose) == 0, "{verbose}");
    let chatty = told(&["-vv"], &[]);
    assert!(begins(&chatty) && steps(&chatty) == 40 && chatty.contains("step{step=40}"), "{chatty}");
    // A filter of the environment holds for workers too.
    assert!(begins(&told(&[], &[("RUST_LOG", "titer=info")])));
    assert!(!begins(&told(&[], &[("RUST_LOG", "titer=info"), ("TITER_LOG", "warn")])));
}

#[test]
fn log_lines_are_json_on_request() {
    for (arguments, variables) in
        [(&["-v", "--log-format", "json"][..], &[][..]), (&["-v"], &[("TITER_LOG_FORMAT", "json")])]
    {
        let text = told(arguments, variables);
        let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).expect(line)).collect();
        assert!(lines.iter().all(|line| line["timestamp"].as_str().is_some_and(|time| time.ends_with('Z'))), "{text}");
        let begins = |line: &&Value| line["fields"]["message"] == "begins";
        let stage = &lines.iter().find(begins).expect("a line of the worker")["span"];
        assert!(stage["label"].as_str().is_some_and(|label| label.starts_with("pretrain")), "{text}");
        assert!(lines.iter().any(|line| line["fields"]["event"] == "stage_finished"), "{text}");
    }
}
