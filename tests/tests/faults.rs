//! Nothing is lost and nothing half-written is read: kills, interrupts, damage, company.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use rand::RngExt;
use titer_core::rng::Seed;
use titer_tests::cli::{answers, results, run, small, stderr, titer};

/// The finished experiment of an undisturbed run, in a folder of its own.
fn undisturbed() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().expect("a folder");
    let config = small(folder.path(), &[]);
    let output = run(folder.path(), &config).output().expect("a run");
    assert!(output.status.success(), "{}", stderr(&output));
    (folder, config)
}

fn assert_same(folder: &Path, expected: &Path) {
    assert_eq!(results(&folder.join("out")), results(&expected.join("out")));
    assert_eq!(answers(&folder.join("out")), answers(&expected.join("out")));
}

#[test]
fn ten_kills_change_nothing() {
    let (expected, config) = undisturbed();
    let folder = tempfile::tempdir().expect("a folder");
    let mut generator = Seed::new(1).generator();
    for _ in 0..10 {
        let mut child = run(folder.path(), &config).stderr(Stdio::null()).stdout(Stdio::null()).spawn().expect("a run");
        std::thread::sleep(Duration::from_millis(generator.random_range(20..700)));
        // SIGKILL: no handler, no clean-up. A run that was quicker than that is killed in vain.
        child.kill().expect("a kill");
        child.wait().expect("the end");
    }
    let output = run(folder.path(), &config).output().expect("a run");
    assert!(output.status.success(), "{}", stderr(&output));
    assert_same(folder.path(), expected.path());
    assert!(names(&folder.path().join("store/partial")).is_empty(), "checkpoints of finished stages stay");
}

#[test]
fn an_interrupt_ends_with_130_and_is_resumed() {
    let (expected, config) = undisturbed();
    let folder = tempfile::tempdir().expect("a folder");
    let child = run(folder.path(), &config).stderr(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("a run");
    std::thread::sleep(Duration::from_millis(400));
    let killed = std::process::Command::new("kill").args(["-INT", &child.id().to_string()]).status().expect("kill");
    assert!(killed.success());
    let output = child.wait_with_output().expect("the end");
    assert_eq!(output.status.code(), Some(130), "{}", stderr(&output));
    let output = run(folder.path(), &config).output().expect("a run");
    assert!(output.status.success(), "{}", stderr(&output));
    assert_same(folder.path(), expected.path());
}

/// Starts a run and interrupts it in its first stage. What it says.
fn interrupted(folder: &Path, command: &mut std::process::Command) -> String {
    let journal = folder.join("out/events.jsonl");
    let started = || std::fs::read_to_string(&journal).unwrap_or_default().matches("stage_started").count();
    let before = started();
    let child = command.stderr(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("a run");
    let until = std::time::Instant::now() + Duration::from_mins(1);
    while started() == before {
        assert!(std::time::Instant::now() < until, "no stage began");
        std::thread::sleep(Duration::from_millis(1));
    }
    let killed = std::process::Command::new("kill").args(["-INT", &child.id().to_string()]).status().expect("kill");
    assert!(killed.success());
    let output = child.wait_with_output().expect("the end");
    assert_eq!(output.status.code(), Some(130), "{}", stderr(&output));
    stderr(&output)
}

#[test]
fn an_interrupted_run_reports_the_cells_that_are_complete() {
    let (folder, config) = undisturbed();
    let (folder, out) = (folder.path(), folder.path().join("out"));
    let more = || {
        let mut command = run(folder, &config);
        command.args(["--jobs", "1", "--set", "seeds=[0, 1]"]);
        command
    };
    let said = interrupted(folder, &mut more());
    assert!(said.contains("report: 4 of 8 cells"), "{said}");
    let partial = results(&out);
    let failures = partial["failures"].as_array().expect("failures");
    assert_eq!((partial["rows"].as_array().expect("rows").len(), failures.len()), (4, 4));
    assert!(failures.iter().all(|failure| failure["error"].as_str().expect("text").contains("not run yet")));
    let report = titer().arg("report").arg(&out).output().expect("a report");
    let text = String::from_utf8_lossy(&report.stdout).into_owned();
    assert!(report.status.success() && text.contains("## Not run yet") && !text.contains("## Failed"), "{text}");
    // The next run goes over it.
    let output = more().output().expect("a run");
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(results(&out)["rows"].as_array().expect("rows").len(), 8);
    assert!(results(&out).get("failures").is_none());
    // Results whose rows would have to be made again stay until they are.
    let complete = std::fs::read(out.join("results.json")).expect("results");
    std::fs::remove_dir_all(folder.join("store")).expect("gone");
    let said = interrupted(folder, &mut more());
    assert!(said.contains("report: the former one is kept"), "{said}");
    assert_eq!(std::fs::read(out.join("results.json")).expect("results"), complete);
    assert!(names(&out).iter().all(|name| !name.starts_with("former-")));
}

/// What a run stored may become unreadable while it is extended. The rows that were there are kept then.
#[test]
fn a_cell_that_cannot_be_read_any_more_displaces_no_former_row() {
    let (folder, config) = undisturbed();
    let (folder, out) = (folder.path(), folder.path().join("out"));
    let (former, given) = (results(&out), answers(&out));
    let started = || {
        let events = std::fs::read_to_string(out.join("events.jsonl")).expect("events");
        events.matches("stage_started").count()
    };
    let before = started();
    let mut command = run(folder, &config);
    command.args(["--jobs", "1", "--set", "seeds=[0, 1]"]).stderr(Stdio::piped()).stdout(Stdio::piped());
    let child = command.spawn().expect("a run");
    let until = std::time::Instant::now() + Duration::from_mins(1);
    while started() == before {
        assert!(std::time::Instant::now() < until, "no stage began");
        std::thread::sleep(Duration::from_millis(1));
    }
    let key = former["rows"][0]["artifacts"]["judge harmful by world"].as_str().expect("a key");
    let record = folder.join("store/stages").join(key).join("record.json");
    let size = std::fs::metadata(&record).expect("a record").len();
    std::fs::write(&record, "x".repeat(usize::try_from(size).expect("a size"))).expect("a file");
    let output = child.wait_with_output().expect("the end");
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    let now = results(&out);
    assert_eq!(
        (now["rows"].as_array().expect("rows").len(), now["failures"].as_array().expect("failures").len()),
        (7, 1)
    );
    let kept = names(&out).into_iter().find(|name| name.starts_with("former-")).expect("the former results");
    assert!(stderr(&output).contains(&kept), "{}", stderr(&output));
    assert_eq!((results(&out.join(&kept)), answers(&out.join(&kept))), (former, given));
}

/// Every file of every finished stage.
fn stored_files(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    let mut folders = vec![folder.join("store")];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).expect("a folder") {
            let path = entry.expect("an entry").path();
            if path.is_dir() { folders.push(path) } else { files.push(path) }
        }
    }
    files.sort();
    files
}

#[test]
fn a_finished_run_is_reused_and_damage_is_repaired() {
    let (folder, config) = undisturbed();
    let expected = results(&folder.path().join("out"));
    let again = run(folder.path(), &config).output().expect("a run");
    assert!(again.status.success(), "{}", stderr(&again));
    assert_eq!(results(&folder.path().join("out")), expected, "all stages come from the store");

    let mut generator = Seed::new(2).generator();
    let files = stored_files(folder.path());
    let weights = files.iter().filter(|path| path.extension().is_some_and(|e| e == "safetensors"));
    let records = files.iter().filter(|path| path.extension().is_some_and(|e| e == "json" || e == "jsonl"));
    for victim in weights.step_by(2).chain(records.step_by(9)) {
        let mut bytes = std::fs::read(victim).expect("a file");
        if generator.random_bool(0.5) {
            bytes.truncate(bytes.len() / 2);
        } else if let Some(byte) = bytes.last_mut() {
            *byte ^= 1;
        }
        std::fs::write(victim, bytes).expect("a file");
    }
    let repaired = run(folder.path(), &config).output().expect("a run");
    assert!(repaired.status.success(), "{}", stderr(&repaired));
    assert_eq!(results(&folder.path().join("out")), expected);
}

/// A process killed between the commit of a stage and the removal of its checkpoints, and while it wrote an event.
#[test]
fn what_a_kill_at_the_end_leaves_is_cleared() {
    let (folder, config) = undisturbed();
    let expected = results(&folder.path().join("out"));
    let (stages, partial) = (folder.path().join("store/stages"), folder.path().join("store/partial"));
    let journal = folder.path().join("out/events.jsonl");
    let left = partial.join(&names(&stages)[0]).join("000000000007");
    std::fs::create_dir_all(&left).expect("a folder");
    std::fs::write(left.join("weights.safetensors"), "left").expect("a file");
    let mut events = std::fs::read_to_string(&journal).expect("events");
    let (whole, torn) = (events.lines().count(), "{\"event\":\"step\",\"key");
    events += torn;
    std::fs::write(&journal, events).expect("a file");

    let output = run(folder.path(), &config).output().expect("a run");
    assert!(output.status.success() && stderr(&output).contains("] 0 stages ran"), "{}", stderr(&output));
    assert_eq!(results(&folder.path().join("out")), expected);
    assert!(names(&partial).is_empty(), "{:?}", names(&partial));
    let text = std::fs::read_to_string(&journal).expect("events");
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines[whole], torn);
    let next: serde_json::Value = serde_json::from_str(lines[whole + 1]).expect("an event on a line of its own");
    assert_eq!(next["event"], "run_started");
}

#[test]
fn two_runs_on_one_store_share_the_work() {
    let (expected, config) = undisturbed();
    let folder = tempfile::tempdir().expect("a folder");
    let start = |out: &str| {
        let mut command = run(folder.path(), &config);
        command.arg("--jobs").arg("1").stderr(Stdio::piped()).stdout(Stdio::piped());
        // The second results folder takes the place of the first one's option.
        let mut arguments: Vec<_> = command.get_args().map(ToOwned::to_owned).collect();
        let at = arguments.iter().position(|argument| argument == "--out").expect("an option") + 1;
        arguments[at] = folder.path().join(out).into();
        titer_tests::cli::titer().args(arguments).stderr(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("a run")
    };
    let children = [start("a"), start("b")];
    for child in children {
        let output = child.wait_with_output().expect("the end");
        assert!(output.status.success(), "{}", stderr(&output));
    }
    for out in ["a", "b"] {
        assert_eq!(results(&folder.path().join(out)), results(&expected.path().join("out")), "one job or many");
    }
}

/// What does not stay finite, be it only after the last update or after fine-tuning, fails its cells and no others, and
/// nothing of it is stored.
#[test]
fn numbers_that_are_not_finite_fail_their_own_cells() {
    let folder = tempfile::tempdir().expect("a folder");
    let methods = "[[methods]]\nname = \"RESTA\"\nalign = \"sft\"\npost = { defense = \"resta\", gamma = 1e38 }\n\n";
    for monitor in ["monitor = { task = \"world-harmful\", rows = 4 }\n", ""] {
        let config = small(
            folder.path(),
            &[
                ("harmful_ratios = [0.0, 0.2]", "harmful_ratios = [0.2]\nlearning_rates = [1e-3, 1e20]"),
                ("monitor = { task = \"world-harmful\", rows = 4 }\n", monitor),
                ("train = { steps = 8, batch_size = 4", "train = { steps = 1, batch_size = 4"),
                ("[[methods]]\nname = \"Vaccine\"", &format!("{methods}[[methods]]\nname = \"Vaccine\"")),
            ],
        );
        let output = run(folder.path(), &config).output().expect("a run");
        assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
        let results = results(&folder.path().join("out"));
        let rows = results["rows"].as_array().expect("rows");
        let good: Vec<(&str, f64)> =
            rows.iter().filter_map(|row| Some((row["method"].as_str()?, row["learning_rate"].as_f64()?))).collect();
        assert_eq!(good, [("SFT", 1e-3), ("Vaccine", 1e-3)], "{results:#}");
        let failures = results["failures"].as_array().expect("failures");
        let why = |cell: &str| {
            let found =
                failures.iter().find(|failure| failure["cell"].as_str().is_some_and(|name| name.starts_with(cell)));
            found.and_then(|failure| failure["error"].as_str()).unwrap_or_default().to_owned()
        };
        assert_eq!(failures.len(), 4, "{failures:#?}");
        for part in ["not finite", "step: 1", "learning rate: 100000000000000000000", "help: lower the learning rate"] {
            assert!(why("SFT").contains(part), "{}", why("SFT"));
        }
        assert!(why("RESTA, agnews, p=0.2, n=20, lr=0.001").contains("finite"), "{failures:#?}");
        for path in stored_files(folder.path()).iter().filter(|path| path.ends_with("record.json")) {
            let text = std::fs::read_to_string(path).expect("a record");
            assert!(!text.contains("null"), "{}: {text}", path.display());
        }
    }
}

#[test]
fn two_runs_into_one_folder_both_end_well() {
    let (expected, config) = undisturbed();
    for _ in 0..3 {
        let folder = tempfile::tempdir().expect("a folder");
        let start =
            || run(folder.path(), &config).stderr(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("a run");
        for child in [start(), start()] {
            let output = child.wait_with_output().expect("the end");
            assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        }
        assert_same(folder.path(), expected.path());
    }
}

#[test]
fn two_experiments_do_not_mix_in_one_folder() {
    let (folder, other) = (tempfile::tempdir().expect("a folder"), tempfile::tempdir().expect("a folder"));
    let configs =
        [small(folder.path(), &[]), small(other.path(), &[("\"small\"", "\"other\""), ("rows = 6", "rows = 5")])];
    let children = configs
        .each_ref()
        .map(|config| run(folder.path(), config).stderr(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("a run"));
    let outputs = children.map(|child| child.wait_with_output().expect("the end"));
    let mut codes = outputs.each_ref().map(|output| output.status.code());
    codes.sort();
    assert_eq!(codes, [Some(0), Some(2)], "{}{}", stderr(&outputs[0]), stderr(&outputs[1]));
    let refused = outputs.iter().find(|output| !output.status.success()).expect("one is refused");
    let text = stderr(refused);
    assert!(text.contains("holds results of the experiment") && text.contains("--out"), "{text}");
    let results = results(&folder.path().join("out"));
    let named: usize = results["rows"]
        .as_array()
        .expect("rows")
        .iter()
        .map(|row| row["answers"].as_object().map_or(0, serde_json::Map::len))
        .sum();
    assert_eq!(answers(&folder.path().join("out")).len(), named);
}

/// The names of the files in a folder.
fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).expect("a folder");
    let mut names: Vec<String> =
        entries.map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

#[test]
fn swapped_stages_are_computed_again() {
    let (folder, config) = undisturbed();
    let expected = results(&folder.path().join("out"));
    let stages = folder.path().join("store/stages");
    // Stages of one kind, by the files that they store.
    let mut kinds: std::collections::BTreeMap<_, Vec<PathBuf>> = std::collections::BTreeMap::new();
    for name in names(&stages) {
        kinds.entry(names(&stages.join(&name))).or_default().push(stages.join(&name));
    }
    let mut swapped = 0;
    for [a, b] in kinds.values().flat_map(|kind| kind.as_chunks().0) {
        let aside = folder.path().join("aside");
        for (from, to) in [(a, &aside), (b, a), (&aside, b)] {
            std::fs::rename(from, to).expect("renamed");
        }
        swapped += 2;
    }
    assert!(swapped > 10);
    let output = run(folder.path(), &config).output().expect("a run");
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(results(&folder.path().join("out")), expected);
    assert!(stderr(&output).contains(&format!(" {swapped} stages ran")), "{}", stderr(&output));
}

#[cfg(unix)]
#[test]
fn files_have_the_modes_that_the_umask_leaves() {
    use std::os::unix::fs::PermissionsExt;
    for (umask, file, directory) in [("0002", 0o664, 0o775), ("0022", 0o644, 0o755)] {
        let folder = tempfile::tempdir().expect("a folder");
        let config = small(folder.path(), &[("steps = 40", "steps = 2")]);
        let command = run(folder.path(), &config);
        let output = std::process::Command::new("sh")
            .args(["-c", &format!("umask {umask}; exec \"$0\" \"$@\"")])
            .arg(command.get_program())
            .args(command.get_args())
            .output()
            .expect("a run");
        assert!(output.status.success(), "{}", stderr(&output));
        let mut paths = vec![folder.path().join("store"), folder.path().join("out")];
        let mut weights = 0;
        while let Some(path) = paths.pop() {
            let metadata = std::fs::metadata(&path).expect("a file");
            let expected = if metadata.is_dir() { directory } else { file };
            assert_eq!(metadata.permissions().mode() & 0o777, expected, "{} with {umask}", path.display());
            weights += usize::from(path.extension().is_some_and(|extension| extension == "safetensors"));
            if metadata.is_dir() {
                paths.extend(names(&path).iter().map(|name| path.join(name)));
            }
        }
        assert!(weights > 0);
    }
}
