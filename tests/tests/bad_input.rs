//! Bad input ends in an error that names the place and the remedy: never a panic, never the wrong exit code.

use std::path::Path;
use std::process::Command;

use candle_core::{DType, Device, Tensor};
use serde_json::Value;
use titer::disk::write_tensors;
use titer_core::text::Tokenizer;
use titer_core::weights::checkpoint::Checkpoint;
use titer_core::{CausalLm, Weights, rng::Seed};
use titer_tests::cli::{PRETRAINED, run, small, stderr, titer};
use titer_tests::{build, variants};

/// Collects what went wrong over many commands, so that one run of the test shows all of it.
#[derive(Default)]
struct Checks(Vec<String>);

impl Checks {
    /// Runs the command and checks that it fails as it should.
    fn check(&mut self, what: &str, command: &mut Command, code: i32, expected: &[&str]) {
        let output = command.output().expect("a process");
        let text = stderr(&output);
        let missing: Vec<&&str> = expected.iter().filter(|expected| !text.contains(**expected)).collect();
        let found = output.status.code();
        if found != Some(code)
            || !missing.is_empty()
            || text.contains("panicked")
            || !(text.contains("help: ") || text.contains("--help"))
        {
            self.0.push(format!("{what}: exit code {found:?}, expected {code}; missing {missing:?} from\n{text}"));
        }
    }

    fn finish(self) {
        assert!(self.0.is_empty(), "{} of the messages are wrong:\n{}", self.0.len(), self.0.join("\n"));
    }
}

/// An experiment with one thing changed: what, instead, exit code, what the message holds.
type Case = (&'static str, &'static str, i32, &'static [&'static str]);

const CONFIGS: [Case; 45] = [
    ("experiment =", "experimnt =", 2, &["experimnt", "did you mean `experiment`", "small.toml:2"]),
    ("checkpoint_seconds = 0.0", "checkpoint_seconds = \"often\"", 2, &["checkpoint_seconds", "small.toml:3", "often"]),
    ("checkpoint_seconds = 0.0", "seeds = []", 2, &["seeds", "empty"]),
    ("checkpoint_seconds = 0.0", "seeds = [-1]", 2, &["seeds", "-1"]),
    ("checkpoint_seconds = 0.0", "device = \"gpu\"", 2, &["gpu", "cuda:N"]),
    ("checkpoint_seconds = 0.0", "device = \"cuda\"", 4, &["cuda", "--device cpu"]),
    ("checkpoint_seconds = 0.0", "dtype = \"f8\"", 2, &["f8", "bf16", "q4_0"]),
    ("checkpoint_seconds = 0.0", "dtype = \"q8_0\"", 2, &["q_proj", "rows of 16", "q8_0", "blocks of 32", "bf16"]),
    ("checkpoint_seconds = 0.0", "lora = { r = 0 }", 2, &["lora.r", "at least 1"]),
    ("checkpoint_seconds = 0.0", "lora = { dropout = 1.0 }", 2, &["lora.dropout", "[0, 1)"]),
    ("checkpoint_seconds = 0.0", "lora = { target_modules = [\"q_prj\"] }", 2, &["q_prj", "q_proj"]),
    ("checkpoint_seconds = 0.0", "lora = { target_modules = [] }", 2, &["target_modules", "empty"]),
    ("model = \"llama\"", "model = \"lama\"", 2, &["lama", "llama"]),
    ("hidden_size = 16", "hidden_size = 15", 2, &["hidden_size", "15"]),
    ("hidden_size = 16", "hiden_size = 16", 2, &["hiden_size", "hidden_size"]),
    ("task = \"world-text\"", "task = \"world-txt\"", 2, &["world-txt", "world-text"]),
    ("steps = 40", "steps = 40, epochs = 2", 2, &["steps", "epochs", "base.pretrain.train"]),
    ("steps = 40, ", "", 2, &["steps", "epochs", "base.pretrain.train"]),
    (
        "batch_size = 4, learning_rate = 5e-3 }\n\n[enc",
        "batch_size = 0, learning_rate = 5e-3 }\n\n[enc",
        2,
        &["batch_size", "at least 1"],
    ),
    ("learning_rate = 1e-3", "learning_rate = -1.0", 2, &["learning_rate", "-1"]),
    ("learning_rate = 1e-3", "learning_rate = nan", 2, &["learning_rate"]),
    ("learning_rate = 1e-3", "learning_rate = 1e-3, warmup = 2.0", 2, &["warmup", "[0, 1]"]),
    ("learning_rate = 1e-3", "learning_rate = 1e-3, accumulate = 0", 2, &["accumulate"]),
    ("learning_rate = 1e-3", "learning_rate = 1e-3, schedule = \"cosin\"", 2, &["schedule", "cosin"]),
    ("template = \"chat\"", "template = \"{{ input }}\"", 2, &["template", "instruction"]),
    ("template = \"chat\"", "template = \"{% if %}\"", 2, &["template"]),
    ("template = \"chat\"\nmax_length = 48", "template = \"chat\"\nmax_length = 4", 3, &["max_length", "truncated"]),
    ("rows = 40 }", "rows = 40, benign_fraction = 2.0 }", 2, &["benign_fraction", "[0, 1]"]),
    ("rows = 40 }", "rows = 40, benign = 0.3 }", 2, &["benign", "benign_fraction"]),
    ("rows = 40 }", "rows = 0 }", 2, &["rows"]),
    ("tasks = [{ name = \"agnews\", task = \"world-agnews\" }]", "tasks = []", 2, &["fine_tune.tasks"]),
    ("task = \"world-agnews\"", "task = \"world-safe\"", 2, &["world-safe", "scor"]),
    ("samples = 20", "samples = 0", 2, &["samples"]),
    ("samples = 20", "samples = \"many\"", 2, &["samples", "many"]),
    ("harmful = { task = \"world-harmful\" }\n", "", 2, &["fine_tune.harmful"]),
    ("harmful_ratios = [0.0, 0.2]", "harmful_ratios = [1.5]", 2, &["harmful_ratios", "1.5", "[0, 1]"]),
    ("harmful_ratios = [0.0, 0.2]", "harmful_ratios = [\"all\"]", 2, &["harmful_ratios", "all"]),
    (
        "harmful = { task = \"world-harmful\", rows = 6 }",
        "harmful = { task = \"world-harmful\", rows = 999999 }",
        2,
        &["999999", "rows"],
    ),
    ("judges = [\"world\"]", "judges = [\"wrld\"]", 2, &["wrld", "world"]),
    ("align = \"sft\"", "align = \"vacine\"", 2, &["vacine", "vaccine"]),
    ("align = \"sft\"", "align = \"sft\"\nfine_tune = \"vaccine\"", 2, &["vaccine", "fine_tune"]),
    ("rho = 3.0", "roh = 3.0", 2, &["roh", "rho"]),
    ("rho = 3.0", "rho = -3.0", 2, &["rho", "-3"]),
    ("rho = 3.0", "rho = 3.0, every = 0", 2, &["every", "at least 1"]),
    ("name = \"Vaccine\"", "name = \"SFT\"", 2, &["SFT", "methods"]),
];

#[test]
fn malformed_experiments() {
    let mut checks = Checks::default();
    for (what, instead, code, expected) in CONFIGS {
        let folder = tempfile::tempdir().expect("a folder");
        let config = small(folder.path(), &[(what, instead)]);
        checks.check(instead, &mut run(folder.path(), &config), code, expected);
    }
    checks.finish();
}

#[test]
fn malformed_files_and_arguments() {
    let mut checks = Checks::default();
    let folder = tempfile::tempdir().expect("a folder");
    let write = |name: &str, content: &[u8]| {
        let path = folder.path().join(name);
        std::fs::write(&path, content).expect("a file");
        path
    };
    let config = small(folder.path(), &[]);
    let of = |path: &Path| run(folder.path(), path);
    checks.check("no file", &mut of(Path::new("no/such.toml")), 3, &["no/such.toml"]);
    checks.check("a folder", &mut of(folder.path()), 3, &[]);
    checks.check("not TOML", &mut of(&write("a.toml", b"experiment = \n")), 2, &["a.toml:1", "TOML"]);
    checks.check("not YAML", &mut of(&write("a.yaml", b"a: [1\nb: }")), 2, &["a.yaml", "YAML"]);
    checks.check("not a known type", &mut of(&write("a.ini", b"")), 2, &["a.ini", ".toml"]);
    checks.check("empty", &mut of(&write("b.toml", b"")), 2, &["b.toml", "experiment"]);
    checks.check("not UTF-8", &mut of(&write("c.toml", b"experiment = \"\xff\"")), 3, &["c.toml"]);
    checks.check("--set without =", of(&config).args(["--set", "samples"]), 2, &["--set", "key=value"]);
    checks.check(
        "--set of nothing known",
        of(&config).args(["--set", "fine_tune.sample=3"]),
        2,
        &["sample", "samples"],
    );
    checks.check("--set through a number", of(&config).args(["--set", "experiment.x=3"]), 2, &["experiment.x"]);
    checks.check(
        "environment",
        of(&config).env("TITER_FINE_TUNE__SAMPLES", "x"),
        2,
        &["TITER_FINE_TUNE__SAMPLES", "samples"],
    );
    checks.check("unwritable", of(&config).arg("--out").arg(config.join("out")), 2, &[]);
    checks.check("no results", titer().arg("report").arg(folder.path()), 3, &["results.json", "titer run"]);
    write("results.json", b"{\"schema\": 1, ");
    checks.check("damaged results", titer().arg("report").arg(folder.path()), 3, &["results.json", "damaged"]);
    checks.check("unknown plugin", titer().args(["explain", "vacine"]), 2, &["vacine", "vaccine"]);
    checks.check("unknown kind", titer().args(["list", "defences"]), 2, &["defences", "defenses"]);
    checks.check("unknown command", titer().arg("rnu"), 2, &["rnu"]);
    checks.check("one folder", titer().arg("compare").arg(folder.path()), 2, &[]);
    checks.finish();
}

/// A checkpoint folder in Hugging Face's layout.
fn model_folder(folder: &Path) {
    let model = build(&variants()[0].1).expect("a model");
    let weights = Weights::random(model.params(), Seed::new(1), DType::F32, &Device::Cpu).expect("weights");
    let words = ["<pad>", "<bos>", "<user>", "<asst>", "<eos>", "a", "b"].map(str::to_owned);
    let tokenizer = Tokenizer::word_level(&words).expect("a tokenizer");
    titer::model_folder::save(&CausalLm { model: model.into(), tokenizer, weights }, folder).expect("a folder");
}

/// What is broken, how, exit code, what the message holds.
type Break = (&'static str, fn(&Path), i32, &'static [&'static str]);

#[test]
fn malformed_checkpoints() {
    let mut checks = Checks::default();
    let breaks: [Break; 13] = [
        ("config", |f| std::fs::remove_file(f.join("config.json")).expect("gone"), 3, &["config.json"]),
        ("config", |f| std::fs::write(f.join("config.json"), "{").expect("written"), 3, &["config.json", "JSON"]),
        ("type", |f| edit(f, "\"llama\"", "\"bert\""), 3, &["bert", "llama", "config.json"]),
        (
            "activation",
            |f| edit(f, "\"model_type\"", "\"hidden_act\": \"relu\", \"model_type\""),
            3,
            &["relu", "hidden_act"],
        ),
        ("eos", without_end, 3, &["eos_token_id"]),
        ("size", |f| edit(f, "\"hidden_size\": 16", "\"hidden_size\": 32"), 3, &["shape"]),
        ("vocabulary", |f| edit(f, "\"vocab_size\": 23", "\"vocab_size\": 5"), 3, &["tokenizer.json", "5 tokens"]),
        ("tokenizer", |f| std::fs::remove_file(f.join("tokenizer.json")).expect("gone"), 3, &["tokenizer.json"]),
        ("tokenizer", |f| std::fs::write(f.join("tokenizer.json"), "[]").expect("written"), 3, &["tokenizer.json"]),
        ("weights", |f| std::fs::remove_file(f.join("model.safetensors")).expect("gone"), 3, &["model.safetensors"]),
        ("truncated", |f| truncate(&f.join("model.safetensors")), 3, &["model.safetensors", "truncated"]),
        ("NaN", |f| change(f, |_, t| (t * f64::NAN).expect("a tensor")), 3, &["not finite", "q_proj"]),
        ("missing", |f| rename(f), 3, &["missing", "q_proj"]),
    ];
    for (what, damage, code, expected) in breaks {
        let folder = tempfile::tempdir().expect("a folder");
        let model = folder.path().join("model");
        std::fs::create_dir(&model).expect("a folder");
        model_folder(&model);
        damage(&model);
        let config = small(folder.path(), &[(PRETRAINED, "path = \"model\"")]);
        checks.check(what, &mut run(folder.path(), &config), code, expected);
    }
    checks.finish();
}

#[test]
fn a_checkpoint_without_weights_can_be_planned_but_not_run() {
    let folder = tempfile::tempdir().expect("a folder");
    let model = folder.path().join("model");
    std::fs::create_dir(&model).expect("a folder");
    model_folder(&model);
    let config = small(folder.path(), &[(PRETRAINED, "path = \"model\"")]);
    let store = folder.path().join("store");
    let plan = |arguments: &[&str]| {
        let output = titer().arg("plan").arg(&config).args(arguments).arg("--store").arg(&store).output();
        let output = output.expect("a process");
        assert!(output.status.success(), "{}", stderr(&output));
        String::from_utf8(output.stdout).expect("text")
    };
    let with_weights = plan(&[]);
    std::fs::remove_file(model.join("model.safetensors")).expect("gone");
    std::fs::remove_file(model.join("tokenizer.json")).expect("gone");
    let without = plan(&[]);
    assert!(without.contains("holds no weights") && without.contains("provisional"), "{without}");
    let work = |text: &str| text.lines().find(|line| line.starts_with("work left")).map(str::to_owned);
    assert_eq!(work(&without), work(&with_weights));

    let json = plan(&["--json"]);
    let value: Value = serde_json::from_str(&json).expect("JSON");
    let stages = value["stages"].as_array().expect("stages");
    assert_eq!(stages[0]["spec"]["content"], "unknown");
    let path = folder.path().join("plan.json");
    std::fs::write(&path, &json).expect("a file");
    let mut checks = Checks::default();
    for stage in [&stages[0], &stages[1]] {
        let mut worker = titer();
        worker.arg("worker").arg(&path).args(["--stage", stage["key"].as_str().expect("a key"), "--store"]).arg(&store);
        checks.check("worker", &mut worker, 3, &["made without the weights", "anew"]);
    }
    checks.check("run", &mut run(folder.path(), &config), 3, &["model.safetensors", "base.path"]);
    // Without sizes there is no plan.
    std::fs::remove_file(model.join("config.json")).expect("gone");
    let mut planned = titer();
    planned.arg("plan").arg(&config).arg("--store").arg(&store);
    checks.check("plan", &mut planned, 3, &["config.json", "base.path"]);
    checks.finish();
}

#[test]
fn a_plan_is_short_unless_stages_are_asked_for() {
    let folder = tempfile::tempdir().expect("a folder");
    let config = small(folder.path(), &[]);
    let lines = |arguments: &[&str]| {
        let output = titer().arg("plan").arg(&config).args(arguments).arg("--store").arg(folder.path()).output();
        String::from_utf8(output.expect("a process").stdout).expect("text")
    };
    let (short, long, verbose) = (lines(&[]), lines(&["--stages"]), lines(&["-v"]));
    assert!(!short.contains("to run") && short.contains("stages, 0 cached") && short.contains("store: "), "{short}");
    assert!(long.contains("to run") && long.contains("fine-tune"), "{long}");
    assert_eq!(long, verbose);
}

/// A plan of the small experiment with assignments.
fn plan_with(folder: &Path, sets: &[&str]) -> Command {
    let mut command = titer();
    command.arg("plan").arg(small(folder, &[])).arg("--store").arg(folder.join("store"));
    for set in sets {
        command.args(["--set", set]);
    }
    command
}

/// Numbers that nothing may be allocated or drawn by, with what the message must hold.
const SIZES: [(&str, &[&str]); 29] = [
    ("base.pretrain.data.rows=1000000000000", &["base.pretrain.data.rows", "at most 1000000"]),
    ("base.shape.hidden_size=1099511627776", &["base.shape.hidden_size", "at most 1048576"]),
    ("base.shape.hidden_size=1048576", &["base.shape", "parameters", "at most"]),
    ("base.shape.num_hidden_layers=1000000000", &["base.shape.num_hidden_layers", "at most 4096"]),
    ("base.shape.max_position_embeddings=1000000000000", &["max_position_embeddings", "at most 16777216"]),
    ("base.shape.intermediate_size=4611686018427387904", &["intermediate_size", "at most 1048576"]),
    ("base.shape.head_dim=1099511627776", &["head_dim", "at most"]),
    ("base.shape.rms_norm_eps=-1.0", &["rms_norm_eps", "(0, 1]", "-1"]),
    ("base.shape.rope_theta=0.0", &["rope_theta", "(0, "]),
    ("base.shape.rope_scaling={rope_type=\"linear\",factor=0.0}", &["rope_scaling.factor", "found `0`"]),
    ("base.pretrain.train.steps=1000000000000", &["base.pretrain.train.steps", "at most 100000000"]),
    ("base.pretrain.train.batch_size=1000000000", &["base.pretrain.train.batch_size", "at most 65536"]),
    ("base.pretrain.max_length=1000000000000", &["base.pretrain.max_length", "at most 1048576"]),
    ("encoding.max_length=1000000000000", &["encoding.max_length", "at most 1048576"]),
    ("align.data.0.rows=9223372036854775807", &["align.data.0.rows", "at most 1000000"]),
    ("align.train.accumulate=1000000000000", &["align.train.accumulate", "at most 65536"]),
    ("align.train.bucket=1000000000000", &["align.train.bucket", "at most 65536"]),
    ("fine_tune.samples=1000000000000", &["fine_tune.samples", "at most 1000000"]),
    ("fine_tune.monitor.rows=1000000000000", &["fine_tune.monitor.rows", "at most 1000000"]),
    ("evaluate.harmful.rows=1000000000000", &["evaluate.harmful.rows", "at most 1000000"]),
    ("evaluate.task_prompts=9223372036854775807", &["evaluate.task_prompts", "at most 1000000"]),
    ("evaluate.batch_size=1000000000", &["evaluate.batch_size", "at most 65536"]),
    ("evaluate.max_new_tokens=1000000000000", &["evaluate.max_new_tokens", "at most 1048576"]),
    ("fine_tune.tasks.0.max_new_tokens=1000000000000", &["max_new_tokens", "at most 1048576"]),
    ("methods.0.align_steps=1000000000000", &["methods.0.align_steps", "at most 100000000"]),
    ("lora.r=1000000000000", &["lora.r", "at most 65536"]),
    ("lora.alpha=1e999", &["lora.alpha"]),
    (
        "encoding.template={% for a in instruction %}{% for b in instruction %}{% for c in instruction %}{% for d in instruction %}{% for e in instruction %}{{ instruction }}{% endfor %}{% endfor %}{% endfor %}{% endfor %}{% endfor %}{% for a in instruction ~ instruction %}{% for b in instruction ~ instruction %}{% for c in instruction ~ instruction %}{% for d in instruction ~ instruction %}{% for e in instruction ~ instruction %}{% endfor %}{% endfor %}{% endfor %}{% endfor %}{% endfor %}",
        &["encoding.template", "more than 2000000 steps"],
    ),
    (
        "encoding.template={% set x = instruction %}{% for a in 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaa' %}{{ x * 9000000 }}{% endfor %}",
        &["encoding.template"],
    ),
];

#[test]
fn sizes_are_held_against_limits_before_anything_is_made() {
    let mut checks = Checks::default();
    for (set, expected) in SIZES {
        let folder = tempfile::tempdir().expect("a folder");
        let started = std::time::Instant::now();
        checks.check(set, &mut plan_with(folder.path(), &[set]), 2, expected);
        assert!(started.elapsed().as_secs() < 20, "{set} took {:?}", started.elapsed());
    }
    let folder = tempfile::tempdir().expect("a folder");
    let list = |count: usize| format!("[{}]", (0..count).map(|n| n.to_string()).collect::<Vec<_>>().join(","));
    let seeds = format!("seeds={}", list(15_000));
    checks.check("cells", &mut plan_with(folder.path(), &[&seeds]), 2, &["60000 cells", "at most 20000", "seeds"]);
    for (what, expected) in [("not ", "too many"), ("-", "too many"), ("1 + ", "too many"), ("x.", "too many")] {
        let set = format!("encoding.template={{{{ instruction }}}}{{{{ {}1 }}}}", what.repeat(10_000));
        checks.check(what, &mut plan_with(folder.path(), &[&set]), 2, &["encoding.template", expected]);
    }
    let set = format!("encoding.template={}{{{{ instruction }}}}", "a".repeat(70_000));
    checks.check("a long template", &mut plan_with(folder.path(), &[&set]), 2, &["70017 bytes", "at most 65536"]);
    let deep = format!("{}b=1", "a.".repeat(20_000));
    checks.check("a deep key", &mut plan_with(folder.path(), &[&deep]), 2, &["is not a key", "at most 16"]);
    checks.check("an empty key", &mut plan_with(folder.path(), &["=1"]), 2, &["is not a key"]);
    checks.finish();
}

/// Files that are no table of rows: name, bytes, what the message must hold.
const DATA_FILES: [(&str, &[u8], &[&str]); 26] = [
    ("a.jsonl", b"PAR1\x15\x04\x00", &["Parquet", "JSON lines"]),
    ("a.json", b"\x1f\x8b\x08\x00", &["gzip", "cannot be unpacked", "again"]),
    ("a.csv", b"PK\x03\x04\x14\x00", &["ZIP", "unpack"]),
    ("a.tsv", b"\x28\xb5\x2f\xfd\x00", &["zstd", "cannot be unpacked"]),
    ("a.json", b"\xfd7zXZ\x00", &["xz", "cannot be unpacked"]),
    ("a.csv", b"BZh91AY", &["bzip2", "unpack"]),
    ("a.json", b"ARROW1\x00\x00", &["Arrow", "JSON lines"]),
    ("a.json", b"SQLite format 3\x00", &["SQLite"]),
    ("a.json", b"\x80\x02}q\x00", &["pickle"]),
    ("a.csv", b"\xff\xfea\x00,\x00", &["UTF-16", "iconv"]),
    ("a.csv", b"a,b\ncaf\xe9,1\n", &["UTF-8", ":2\n", "iconv"]),
    ("a.csv", b"a,b\n1,\x002\n", &["NUL", ":2\n"]),
    ("a.json", b"version https://git-lfs.github.com/spec/v1\n", &["Git LFS", "git lfs pull"]),
    ("a.json", b"<!DOCTYPE html><html></html>", &["HTML"]),
    ("a.json", b"{\"a\": 1}\n{\"a\": 2}\n", &["no column `instruction`", ":1\n"]),
    ("a.jsonl", b"[\n{\"a\": 1}\n]\n", &[":1\n", ".json"]),
    ("a.json", b"", &["not valid JSON"]),
    ("a.csv", b"", &["no row"]),
    ("a.jsonl", b"\n\n", &["no row"]),
    ("a.json", b"[1, 2]", &["row must be an object"]),
    ("a.json", b"{\"a\": 1}", &["no array of rows"]),
    ("a.csv", b"instruction,output\n1,2,3\n", &[":2\n", "regular table"]),
    ("a.csv", b"output,output\n1,2\n", &["occurs twice"]),
    ("a.csv", b"question,output\n1,2\n", &["no column `instruction`", "question"]),
    ("a.parquet", b"PAR1", &["Parquet", "JSON lines"]),
    ("a", b"[]", &["extension", ".jsonl"]),
];

#[test]
fn data_files_that_are_something_else() {
    let mut checks = Checks::default();
    let safe = "task = \"world-safe\", rows = 40";
    let planned = |folder: &Path, name: &str| {
        let config = small(folder, &[(safe, &format!("task = \"rows\", train = \"{name}\", rows = 1"))]);
        let mut command = titer();
        command.arg("plan").arg(config).arg("--store").arg(folder.join("store"));
        command
    };
    for (name, content, expected) in DATA_FILES {
        let folder = tempfile::tempdir().expect("a folder");
        std::fs::write(folder.path().join(name), content).expect("a file");
        let expected = [&[name, "align.data.0"], expected].concat();
        checks.check(&format!("{name} {}", content.escape_ascii()), &mut planned(folder.path(), name), 3, &expected);
    }
    let folder = tempfile::tempdir().expect("a folder");
    checks.check("no file", &mut planned(folder.path(), "no.json"), 3, &["no.json", "align.data.0"]);
    std::fs::create_dir(folder.path().join("f.json")).expect("a folder");
    checks.check("a folder", &mut planned(folder.path(), "f.json"), 3, &["f.json", "folder"]);
    #[cfg(unix)]
    checks.check("a device", &mut planned(folder.path(), "/dev/zero"), 3, &["/dev/zero", "device"]);
    std::fs::write(folder.path().join("few.json"), "[{\"instruction\": \"a\", \"output\": \"\"}]").expect("a file");
    checks.check("an empty answer", &mut planned(folder.path(), "few.json"), 3, &["answer is empty", ":1\n"]);
    checks.finish();
}

#[test]
fn folders_that_hold_no_run() {
    let mut checks = Checks::default();
    let contents: [(&[u8], &str); 7] = [
        (b"", "damaged"),
        (b"{\"schema\": 2, \"rows\": ", "damaged"),
        (b"{\"schema\": 2}", "damaged"),
        (b"{\"schema\": 2, \"rows\": 3}", "damaged"),
        (b"[]", "schema"),
        (b"{\"schema\": 99}", "schema `99`"),
        (b"\x1f\x8b", "damaged"),
    ];
    let folder = tempfile::tempdir().expect("a folder");
    let dir = folder.path();
    let mut check_all = |what: &str, expected: &str| {
        let expected = ["results.json", expected];
        checks.check(what, titer().arg("report").arg(dir), 3, &expected);
        checks.check(what, titer().arg("compare").args([dir, dir]), 3, &expected);
        checks.check(what, titer().arg("explain").arg(dir).arg("SFT"), 3, &expected);
        checks.check(what, titer().arg("diff").arg(dir).arg("SFT").arg(dir).arg("SFT"), 3, &expected);
    };
    for (content, expected) in contents {
        std::fs::write(dir.join("results.json"), content).expect("a file");
        check_all(&content.escape_ascii().to_string(), expected);
    }
    std::fs::remove_file(dir.join("results.json")).expect("gone");
    check_all("nothing", "cannot read");
    std::fs::create_dir(dir.join("results.json")).expect("a folder");
    check_all("a folder", "is a folder");
    checks.finish();
}

#[test]
fn arguments_out_of_range() {
    let mut checks = Checks::default();
    let cases: [(&[&str], &[&str]); 16] = [
        (&["generate", "--model", "m", "--prompt", "a", "--temperature", "nan"], &["--temperature", "[0, 1e6]"]),
        (&["generate", "--model", "m", "--prompt", "a", "--top-p", "2"], &["--top-p", "(0, 1]"]),
        (&["generate", "--model", "m", "--prompt", "a", "--max-new-tokens", "9999999999"], &["at most 1048576"]),
        (&["generate", "--model", "m", "--prompt", "a", "--dtype", "f9"], &["f9", "bf16"]),
        (&["generate", "--model", "m", "--prompt", "a", "--device", "x"], &["cuda:N"]),
        (&["bench", "step", "--batch", "999999999999"], &["--batch", "at most 65536"]),
        (&["bench", "step", "--length", "999999999999"], &["--length", "at most 1048576"]),
        (&["bench", "step", "--layers", "999999"], &["--layers", "at most 4096"]),
        (&["bench", "step", "--threads", "999999"], &["--threads", "at most 1024"]),
        (&["bench", "generate", "--new", "999999999999"], &["--new", "at most 1048576"]),
        (&["bench", "generate", "--new", "0"], &["--new", "1 or more"]),
        (&["bench", "step", "--batch", "0"], &["--batch", "1 or more"]),
        (&["bench", "step", "--model", "quickstart", "--length", "1"], &["no label", "2 or more"]),
        (
            &["bench", "generate", "--model", "quickstart", "--length", "4096", "--new", "2"],
            &["4097", "lower --length"],
        ),
        (&["bench", "step", "--set", "x"], &["KEY=VALUE"]),
        (&["report", "x", "--format", "xls"], &["xls", "latex"]),
    ];
    for (arguments, expected) in cases {
        checks.check(&arguments.join(" "), titer().args(arguments), 2, expected);
    }
    checks.finish();
}

#[test]
fn configurations_that_are_no_text_or_too_deep() {
    let mut checks = Checks::default();
    let folder = tempfile::tempdir().expect("a folder");
    let small = std::fs::read(small(folder.path(), &[])).expect("bytes");
    let twice = [b"experiment = \"a\"".as_slice(), &small].concat();
    let many = (0..60_000).map(|n| format!("k{n} = 1\n")).collect::<String>().into_bytes();
    let cases: [(&str, Vec<u8>, i32, &[&str]); 14] = [
        ("nul.toml", [&small[..], b"\0"].concat(), 3, &["NUL"]),
        ("wide.toml", [b"\xff\xfe".as_slice(), &small].concat(), 3, &["UTF-16", "iconv"]),
        ("packed.toml", b"\x1f\x8b\x08".to_vec(), 3, &["gzip"]),
        ("latin.toml", b"experiment = \"caf\xe9\"".to_vec(), 3, &["UTF-8", "latin.toml:1"]),
        ("large.toml", vec![b'#'; 2 << 20], 3, &["1048576 bytes"]),
        ("twice.toml", twice, 2, &["duplicate key"]),
        ("many.toml", many, 2, &["unknown key `k0`", "known keys"]),
        ("dots.toml", format!("{}b = 1", "a.".repeat(50_000)).into_bytes(), 2, &["recursion"]),
        ("lists.toml", format!("a = {}", "[".repeat(50_000)).into_bytes(), 2, &["recurse"]),
        ("tables.toml", format!("a = {}", "{a=".repeat(50_000)).into_bytes(), 2, &["recurse"]),
        ("lists.yaml", format!("a: {}", "[".repeat(50_000)).into_bytes(), 2, &["not valid YAML"]),
        ("items.yaml", format!("a:\n {}", "- ".repeat(50_000)).into_bytes(), 2, &["not valid YAML"]),
        ("empty.yaml", Vec::new(), 2, &["table"]),
        ("list.yaml", b"- 1".to_vec(), 2, &["table"]),
    ];
    for (name, content, code, expected) in cases {
        let path = folder.path().join(name);
        std::fs::write(&path, content).expect("a file");
        let mut plan = titer();
        plan.arg("plan").arg(path).arg("--store").arg(folder.path().join("store"));
        checks.check(name, &mut plan, code, &[&[name], expected].concat());
    }
    checks.finish();
}

/// Values of a Llama `config.json` that no model can have.
const MODEL_KEYS: [(&str, &str); 22] = [
    ("vocab_size", "0"),
    ("vocab_size", "-5"),
    ("hidden_size", "\"16\""),
    ("hidden_size", "1e30"),
    ("hidden_size", "1099511627776"),
    ("intermediate_size", "[]"),
    ("num_hidden_layers", "0"),
    ("num_hidden_layers", "1000000000"),
    ("num_attention_heads", "0"),
    ("num_attention_heads", "5"),
    ("num_key_value_heads", "3"),
    ("num_key_value_heads", "0"),
    ("max_position_embeddings", "0"),
    ("max_position_embeddings", "4611686018427387904"),
    ("head_dim", "3"),
    ("head_dim", "-2"),
    ("rms_norm_eps", "-1e-5"),
    ("rms_norm_eps", "0"),
    ("rope_theta", "0"),
    ("rope_theta", "-10000.0"),
    ("rope_scaling", "{ \"type\": \"linear\", \"factor\": 0 }"),
    ("tie_word_embeddings", "\"yes\""),
];

#[test]
fn a_wrong_key_of_a_checkpoint_is_damaged_data() {
    let mut checks = Checks::default();
    for (key, value) in MODEL_KEYS {
        let folder = tempfile::tempdir().expect("a folder");
        let model = folder.path().join("model");
        std::fs::create_dir(&model).expect("a folder");
        model_folder(&model);
        let path = model.join("config.json");
        let text = std::fs::read_to_string(&path).expect("text");
        let mut keys: serde_json::Map<_, _> = serde_json::from_str(&text).expect("a table");
        keys.insert(key.to_owned(), serde_json::from_str(value).expect("JSON"));
        std::fs::write(&path, serde_json::to_string(&keys).expect("JSON")).expect("written");
        let mut generate = titer();
        generate.args(["generate", "--prompt", "a", "--device", "cpu", "--model"]).arg(&model);
        let what = format!("{key} = {value}");
        checks.check(&what, &mut generate, 3, &["config.json", key]);
        let config = small(folder.path(), &[(PRETRAINED, "path = \"model\"")]);
        let mut plan = titer();
        plan.arg("plan").arg(config).arg("--store").arg(folder.path().join("store"));
        checks.check(&format!("{what}, planned"), &mut plan, 3, &["config.json", key]);
    }
    checks.finish();
}

#[test]
fn a_tokenizer_that_panics_in_its_library_is_an_error() {
    let mut checks = Checks::default();
    for (what, tokenizer) in [
        (
            "a precompiled map of nothing",
            "{\"version\":\"1.0\",\"truncation\":null,\"padding\":null,\"added_tokens\":[],\"normalizer\":{\"type\":\"Precompiled\",\"precompiled_charsmap\":\"\"},\"pre_tokenizer\":null,\"post_processor\":null,\"decoder\":null,\"model\":{\"type\":\"WordLevel\",\"vocab\":{\"a\":0},\"unk_token\":\"a\"}}",
        ),
        ("an array", "[]"),
        ("nothing", ""),
        ("a number", "3"),
    ] {
        let folder = tempfile::tempdir().expect("a folder");
        model_folder(folder.path());
        std::fs::write(folder.path().join("tokenizer.json"), tokenizer).expect("written");
        let mut generate = titer();
        generate.args(["generate", "--prompt", "a", "--device", "cpu", "--model"]).arg(folder.path());
        checks.check(what, &mut generate, 3, &["tokenizer.json"]);
    }
    checks.finish();
}

fn edit(folder: &Path, what: &str, instead: &str) {
    let path = folder.join("config.json");
    let text = std::fs::read_to_string(&path).expect("text");
    assert!(text.contains(what), "{text}");
    std::fs::write(path, text.replace(what, instead)).expect("written");
}

fn truncate(path: &Path) {
    let bytes = std::fs::read(path).expect("bytes");
    std::fs::write(path, &bytes[..bytes.len() - 100]).expect("written");
}

fn tensors(folder: &Path) -> Vec<(String, Tensor)> {
    let mut file = Checkpoint::open(folder).expect("a checkpoint");
    let names: Vec<String> = file.names().map(str::to_owned).collect();
    names.into_iter().map(|name| (name.clone(), file.read(&name, &Device::Cpu).expect("a tensor"))).collect()
}

fn change(folder: &Path, f: impl Fn(&str, Tensor) -> Tensor) {
    let changed = tensors(folder).into_iter().map(|(name, tensor)| {
        let tensor = if name.contains("0.self_attn.q_proj") { f(&name, tensor) } else { tensor };
        (name, tensor)
    });
    write_tensors(&folder.join("model.safetensors"), changed.collect::<Vec<_>>()).expect("written");
}

fn rename(folder: &Path) {
    let renamed =
        tensors(folder).into_iter().map(|(name, tensor)| (name.replace("0.self_attn.q_proj", "0.attn.q"), tensor));
    write_tensors(&folder.join("model.safetensors"), renamed.collect::<Vec<_>>()).expect("written");
}

/// Neither the model's configuration nor the tokenizer's says what ends an answer.
fn without_end(folder: &Path) {
    edit(folder, "\"eos_token_id\": 4", "\"other\": 4");
    std::fs::remove_file(folder.join("tokenizer_config.json")).expect("gone");
}

#[test]
fn paths_of_the_command_line_start_at_the_working_directory() {
    let root = tempfile::tempdir().expect("a folder");
    for folder in ["configs", "data"] {
        std::fs::create_dir(root.path().join(folder)).expect("a folder");
    }
    let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/sst2.toml");
    let text = std::fs::read_to_string(&shipped).expect("the configuration");
    // As it stands at its head.
    let command = text.lines().find_map(|line| line.strip_prefix("#   titer run ")).expect("a command");
    std::fs::write(root.path().join("configs/sst2.toml"), &text).expect("written");
    let row = r#"{"instruction": "a", "output": "b"}"#;
    std::fs::write(root.path().join("data/safe.json"), format!("[{}]", vec![row; 2000].join(","))).expect("written");
    let plan = |arguments: &str| {
        let mut command = titer();
        command.arg("plan").args(arguments.split_whitespace()).arg("--store").arg(root.path().join("store"));
        let output = command.current_dir(root.path()).output().expect("a plan");
        assert_eq!(output.status.code(), Some(3), "{}", stderr(&output));
        stderr(&output)
    };
    let told = plan(command);
    assert!(
        told.contains("models/tiny: there is none") && !told.contains("cannot read `configs/data/safe.json`"),
        "{told}"
    );
    assert!(!told.contains("cannot read `data/safe.json`"), "{told}");
    assert!(told.contains("`configs/harmful.jsonl`") && told.contains("the configuration's folder"), "{told}");
    // Each cause once; a path that could be a name of the hub has another one.
    assert!(told.contains("repository: models/tiny"), "{told}");
    assert_eq!(told.matches("error: ").count(), told.matches("os error 2").count() + 1, "{told}");
    let told = plan("configs/sst2.toml");
    assert!(told.contains("folder `configs/model`") && told.contains("`configs/safe.json`"), "{told}");
}
