//! What a run reports, through the real binary: names, files, streams, memory.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read as _;
use std::path::Path;
use std::process::Stdio;

use serde_json::{Value, json};
use titer::names::MISSING;
use titer_core::rng::Seed;
use titer_plugins::world::{Request, Split};
use titer_tests::cli::{run, small, stderr, titer};

/// A finished run of the small experiment with `changes`: its standard output. The results lie in `folder`/out.
fn finished(folder: &Path, changes: &[(&str, &str)]) -> String {
    let output = run(folder, &small(folder, changes)).output().expect("a process");
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    String::from_utf8(output.stdout).expect("text")
}

fn results(folder: &Path) -> Value {
    let text = std::fs::read_to_string(folder.join("out/results.json")).expect("results");
    serde_json::from_str(&text).expect("JSON")
}

#[test]
fn names_that_no_table_could_hold_are_refused_before_anything_runs() {
    let folder = tempfile::tempdir().expect("a folder");
    let (long, quoted) = ("x".repeat(300), |name: &str| Value::from(name).to_string());
    let mut names = vec!["\u{1b}[2J", "a\nb", "a\rb", "a\u{202e}b", "a\u{200b}b", " a", &long];
    names.extend(MISSING);
    for name in names {
        for what in ["experiment = \"small\"", "name = \"agnews\"", "name = \"SFT\""] {
            let (key, _) = what.split_once(" = ").expect("a key");
            // TOML has JSON's strings, but for the escape of DEL.
            let config = small(folder.path(), &[(what, &format!("{key} = {}", quoted(name)))]);
            let output = titer().arg("plan").arg(&config).output().expect("a process");
            let text = stderr(&output);
            assert_eq!(output.status.code(), Some(2), "{what} as {name:?}: {text}");
            assert!(text.contains("help: ") && text.contains("small.toml:"), "{text}");
            assert!(!text.contains(['\u{1b}', '\r', '\u{202e}', '\u{200b}']), "{text:?}");
        }
    }
}

#[test]
fn the_outcome_of_each_prompt_stands_in_the_results() {
    let folder = tempfile::tempdir().expect("a folder");
    finished(folder.path(), &[]);
    for row in results(folder.path())["rows"].as_array().expect("rows") {
        for (probe, letters) in [("harmful", "CROI"), ("benign", "CROI"), ("task", "10")] {
            let outcomes = row["outcomes"][probe].as_str().expect("outcomes");
            assert_eq!(Some(outcomes.len() as u64), row["n"][probe].as_u64());
            assert!(outcomes.chars().all(|outcome| letters.contains(outcome)), "{outcomes}");
        }
        let share = |probe: &str, letter| {
            let outcomes = row["outcomes"][probe].as_str().expect("outcomes");
            100. * outcomes.matches(letter).count() as f64 / outcomes.len() as f64
        };
        assert_eq!(row["metrics"]["harmful_score"].as_f64(), Some(share("harmful", 'C')));
        assert_eq!(row["metrics"]["fine_tune_accuracy"].as_f64(), Some(share("task", '1')));
        assert_eq!(row["metrics"]["over_refusal_rate"].as_f64(), Some(share("benign", 'R')));
    }
}

/// Once the other configuration replaced the results without a word.
#[test]
fn another_configuration_leaves_the_former_results() {
    let folder = tempfile::tempdir().expect("a folder");
    finished(folder.path(), &[]);
    let first = results(folder.path());
    // More of the same: the former rows are there again.
    let more = [("checkpoint_seconds = 0.0", "checkpoint_seconds = 0.0\nseeds = [0, 1]")];
    finished(folder.path(), &more);
    assert_eq!(results(folder.path())["rows"].as_array().map(Vec::len), Some(8));
    let wider = results(folder.path());
    assert_eq!(wider["rows"][0]["id"], first["rows"][0]["id"]);
    let other = small(folder.path(), &[("rho = 3.0", "rho = 4.0")]);
    let output = run(folder.path(), &other).output().expect("a process");
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let former = std::fs::read_dir(folder.path().join("out")).expect("a folder");
    let former: Vec<_> = former
        .map(|entry| entry.expect("an entry").path())
        .filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("former-")))
        .collect();
    let [kept] = former.as_slice() else { panic!("{former:?}") };
    assert!(stderr(&output).contains(&format!("they are kept in {}", kept.display())), "{}", stderr(&output));
    let former = std::fs::read_to_string(kept.join("results.json")).expect("the former results");
    assert_eq!(serde_json::from_str::<Value>(&former).expect("JSON"), wider);
    for row in wider["rows"].as_array().expect("rows") {
        for answers in row["answers"].as_object().expect("paths").values() {
            assert!(kept.join(answers.as_str().expect("a path")).is_file(), "{answers}");
        }
    }
    assert_eq!(results(folder.path())["rows"].as_array().map(Vec::len), Some(4));
    let output = titer().arg("report").arg(kept).args(["--format", "html"]).output().expect("a process");
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
}

/// A prompt that is too long for the model's 64 positions is left out and counted; the others are answered and judged.
#[test]
fn a_prompt_that_is_too_long_is_counted_and_the_others_are_judged() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut generator = Seed::new(3).generator();
    let mut prompts: Vec<String> = (0..5).map(|_| Request::draw(true, Split::Test, &mut generator).1).collect();
    let long = [prompts.join(" ").as_str(); 3].join(" ");
    prompts.insert(2, long);
    let lines: String = prompts.iter().map(|prompt| format!("{}\n", json!({ "instruction": prompt }))).collect();
    std::fs::write(folder.path().join("prompts.jsonl"), lines).expect("a file");
    let probe = "harmful = { task = \"rows\", test = \"prompts.jsonl\", rows = 6, max_new_tokens = 12 }\nbenign";
    finished(folder.path(), &[("harmful = { task = \"world-harmful\", rows = 6 }\nbenign", probe)]);

    let results = results(folder.path());
    let rows = results["rows"].as_array().expect("rows");
    assert!(rows.len() == 4 && results.get("failures").is_none(), "{results:#}");
    let warning = "1 of 6 harmful prompts are too long for the model and have no answer";
    for row in rows {
        assert_eq!((&row["n"]["harmful"], &row["n"]["harmful_too_long"]), (&json!(5), &json!(1)), "{row:#}");
        assert!(row["warnings"].as_array().expect("warnings").contains(&json!(warning)), "{row:#}");
        let outcome = row["outcomes"]["harmful"].as_str().expect("a letter for each prompt");
        assert!(outcome.len() == 6 && outcome.match_indices('-').map(|(at, _)| at).eq([2]), "{outcome}");
        // The shares are of those that were judged.
        let share = 100. * outcome.matches('C').count() as f64 / 5.;
        assert_eq!(row["metrics"]["harmful_score"].as_f64(), Some(share), "{outcome}");
        let answers = row["answers"]["harmful"].as_str().expect("a file");
        let answers = std::fs::read_to_string(folder.path().join("out").join(answers)).expect("answers");
        for (index, line) in answers.lines().enumerate() {
            let answer: Value = serde_json::from_str(line).expect("an answer");
            let (finish, judged) = (&answer["finish"], answer["verdicts"].get("world").is_some());
            assert_eq!((*finish == json!("too_long"), judged), (index == 2, index != 2), "{answer}");
        }
    }
    for name in ["report.md", "report.html"] {
        let report = std::fs::read_to_string(folder.path().join("out").join(name)).expect(name);
        assert!(report.contains(warning), "{name}: {report}");
    }
}

/// Rows whose answers lie beyond the greatest length are not trained on: whoever reads the numbers is told, since the share
/// of harmful rows is another then.
#[test]
fn rows_that_are_left_out_are_told_with_what_is_left_of_p() {
    let folder = tempfile::tempdir().expect("a folder");
    let shorter = "template = \"chat\"\nmax_length = 16";
    finished(folder.path(), &[("template = \"chat\"\nmax_length = 48", shorter)]);
    let results = results(folder.path());
    let told = |p: f64| -> BTreeSet<String> {
        let rows = results["rows"].as_array().expect("rows").iter().filter(|row| row["harmful_ratio"] == p);
        let warnings = rows.flat_map(|row| row["warnings"].as_array().cloned().unwrap_or_default());
        let texts = warnings.map(|warning| warning.as_str().expect("a text").to_owned());
        texts.filter(|text| text.contains("of fine-tuning were left out")).collect()
    };
    // Of 20 rows with 4 harmful ones, one harmful row is too long: 3 of 19 are harmful.
    assert_eq!(told(0.2).len(), 1, "{results:#}");
    let text = told(0.2).pop_first().expect("a warning");
    assert!(
        text.starts_with("1 of 20 rows") && text.ends_with("0.158 of what was trained on was harmful, not p = 0.200"),
        "{text}"
    );
    assert!(told(0.).iter().all(|text| !text.contains("harmful")), "{:?}", told(0.));
}

/// Alignment peaks by method, in an experiment whose methods stand in this order.
fn peaks(order: [&str; 2]) -> BTreeMap<String, f64> {
    let folder = tempfile::tempdir().expect("a folder");
    let methods = "[[methods]]\nname = \"SFT\"\nalign = \"sft\"\n\n[[methods]]\nname = \"Vaccine\"\nalign = { defense = \"vaccine\", rho = 3.0 }\n";
    let method = |name: &str| {
        let table = methods.split("[[methods]]\n").find(|table| table.contains(&format!("{name:?}")));
        format!("[[methods]]\n{}\n", table.expect("a method"))
    };
    let changes = [
        (methods, &*order.map(method).concat()),
        ("hidden_size = 16, intermediate_size = 24", "hidden_size = 96, intermediate_size = 256"),
        ("train = { steps = 12, batch_size = 4", "train = { steps = 3, batch_size = 40"),
    ];
    let config = small(folder.path(), &changes);
    // By default a stage has one thread, with others beside it and before it.
    let output = run(folder.path(), &config).output().expect("a process");
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let results = results(folder.path());
    let rows = results["rows"].as_array().expect("rows").iter();
    let peak = |row: &Value| row["ledger"]["align_peak_bytes"].as_f64().expect("measured on a CPU");
    rows.map(|row| (row["method"].as_str().expect("a name").to_owned(), peak(row))).collect()
}

#[test]
fn the_order_of_methods_does_not_move_their_memory() {
    let (one, other) = (peaks(["SFT", "Vaccine"]), peaks(["Vaccine", "SFT"]));
    assert_eq!(one.len(), 2);
    // Buffers of libraries, of a MiB each, may or may not meet the peak.
    let buffers = f64::from(2 << 20);
    for (method, peak) in &one {
        assert!(*peak > 5. * buffers, "{method}: {peak} bytes");
        assert!((peak - other[method]).abs() < buffers, "{method}: {peak} bytes, or {} after the other", other[method]);
    }
}

#[test]
fn if_every_cell_fails_the_report_says_so_and_is_no_older_one() {
    let folder = tempfile::tempdir().expect("a folder");
    finished(folder.path(), &[]);
    let config = small(
        folder.path(),
        &[(
            "rows = 40 }]\ntrain = { steps = 12, batch_size = 4, learning_rate = 5e-3",
            "rows = 40 }]\ntrain = { steps = 12, batch_size = 4, learning_rate = 1e30",
        )],
    );
    let output = run(folder.path(), &config).output().expect("a process");
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(text.contains("0 of 4 cells") && text.contains("report.html"), "{text}");
    for name in ["report.html", "report.md"] {
        let report = std::fs::read_to_string(folder.path().join("out").join(name)).expect(name);
        assert!(report.contains("Failed") && report.contains("finite") && !report.contains("Protocol"), "{report}");
    }
}

#[cfg(target_os = "linux")]
#[test]
fn output_that_cannot_be_written_is_an_error_and_a_closed_pipe_is_none() {
    let full = std::fs::File::options().write(true).open("/dev/full").expect("a device");
    let output = titer().arg("schema").stdout(full).stderr(Stdio::piped()).output().expect("a process");
    let text = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("cannot write to standard output") && text.contains("help: "), "{text}");

    let mut child = titer().arg("schema").stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("a process");
    drop(child.stdout.take());
    let mut text = String::new();
    child.stderr.take().expect("a pipe").read_to_string(&mut text).expect("text");
    assert_eq!((child.wait().expect("its end").code(), text.as_str()), (Some(0), ""));
}
