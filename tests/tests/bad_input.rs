//! Bad input ends in an error that names the place and the remedy: never a panic, never the wrong exit code.

use std::path::Path;
use std::process::Command;

use candle_core::{DType, Device, Tensor};
use titer::disk::write_tensors;
use titer_core::checkpoint::Checkpoint;
use titer_core::text::Tokenizer;
use titer_core::{Weights, rng::Seed};
use titer_tests::cli::{run, small, stderr, titer};
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
    let weights = Weights::random(model.as_ref(), Seed::new(1), DType::F32, &Device::Cpu).expect("weights");
    let words = ["<pad>", "<bos>", "<user>", "<asst>", "<eos>", "a", "b"].map(str::to_owned);
    let tokenizer = Tokenizer::word_level(&words).expect("a tokenizer");
    titer::base_model::BaseModel { model, tokenizer, weights }.save(folder).expect("a folder");
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
        ("eos", |f| edit(f, "\"eos_token_id\": 4", "\"other\": 4"), 3, &["eos_token_id"]),
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
        let base = "shape = { hidden_size = 16, intermediate_size = 24, num_hidden_layers = 2, num_attention_heads = 2, \
                    max_position_embeddings = 64 }\n\n[base.pretrain]\ndata = { task = \"world-text\", rows = 200 }\n\
                    max_length = 48\ntrain = { steps = 40, batch_size = 4, learning_rate = 5e-3 }";
        let config = small(folder.path(), &[(base, "path = \"model\"")]);
        checks.check(what, &mut run(folder.path(), &config), code, expected);
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
    std::fs::write(root.path().join("data/safe.json"), r#"[{"instruction": "a", "output": "b"}]"#).expect("written");
    let plan = |arguments: &str| {
        let mut command = titer();
        command.arg("plan").args(arguments.split_whitespace()).arg("--store").arg(root.path().join("store"));
        let output = command.current_dir(root.path()).output().expect("a plan");
        assert_eq!(output.status.code(), Some(3), "{}", stderr(&output));
        stderr(&output)
    };
    let told = plan(command);
    assert!(told.contains("folder `models/tiny`") && !told.contains("cannot read `configs/data/safe.json`"), "{told}");
    assert!(!told.contains("cannot read `data/safe.json`"), "{told}");
    assert!(told.contains("`configs/harmful.jsonl`") && told.contains("paths start at its folder"), "{told}");
    // Each cause once.
    assert_eq!(told.matches("error: ").count(), told.matches("os error 2").count(), "{told}");
    let told = plan("configs/sst2.toml");
    assert!(told.contains("folder `configs/model`") && told.contains("`configs/safe.json`"), "{told}");
}
