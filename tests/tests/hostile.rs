//! Thousands of mutated inputs: nothing panics, hangs, or allocates by a number that a file names.

use std::path::Path;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use candle_core::{DType, Device};
use rand::RngExt;
use rand::seq::IndexedRandom;
use serde_json::{Value, json};
use titer::experiment::config::Config;
use titer::experiment::resolve;
use titer::model_folder::save;
use titer::plan::planner;
use titer_core::data::Row;
use titer_core::rng::{Generator, Seed};
use titer_core::text::{Template, Tokenizer};
use titer_core::{CausalLm, Precision, Weights};
use titer_tests::cli::SMALL;
use titer_tests::{build, variants};

/// The longest that one case may take: far above what any needs, on a machine that does other work, too.
const PATIENCE: Duration = Duration::from_secs(20);
/// The most memory that the process may ever have held.
const MOST_BYTES: u64 = 3 << 30;
/// What stands in place of a value.
const VALUES: [&str; 22] = [
    "0",
    "-1",
    "1e308",
    "nan",
    "-inf",
    "9223372036854775807",
    "9223372036854775808",
    "4611686018427387904",
    "1000000000000",
    "100000000",
    "4294967296",
    "2000000",
    "0.5",
    "1e-320",
    "true",
    "\"\"",
    "\"x\"",
    "[]",
    "{}",
    "[1]",
    "[0, 0]",
    "\"\\u0000\"",
];
/// What stands in between, once or thousands of times.
const FRAGMENTS: [&str; 18] = [
    "\0",
    "\u{feff}",
    "[",
    "{",
    "}",
    "]",
    "\"",
    "'",
    "=",
    "\n",
    "\\",
    "{{",
    "{%",
    "}}",
    "not ",
    "- ",
    "a.",
    "{% if 1 %}",
];

fn pick<'a>(of: &[&'a str], generator: &mut Generator) -> &'a str {
    of.choose(generator).expect("a choice")
}

/// A byte offset at which a character starts.
fn place(text: &str, generator: &mut Generator) -> usize {
    text.floor_char_boundary(generator.random_range(0..=text.len()))
}

/// The text with one thing changed: a piece cut out or put in, a line doubled or lost, a value replaced.
fn mutated(text: &str, generator: &mut Generator) -> String {
    let (at, lines) = (place(text, generator), text.lines().collect::<Vec<_>>());
    let (before, after) = text.split_at(at);
    let line = generator.random_range(0..lines.len().max(1));
    match generator.random_range(0..8) {
        0 => before.to_owned() + &after[after.floor_char_boundary(after.len().min(9))..],
        1 => [before, pick(&FRAGMENTS, generator), after].concat(),
        2 => {
            let count = *[10, 300, 20_000].choose(generator).expect("a count");
            [before, &pick(&FRAGMENTS, generator).repeat(count), after].concat()
        }
        3 => [&lines[..line], &lines[line..(line + 1).min(lines.len())], &lines[line..]].concat().join("\n"),
        4 => [&lines[..line], &lines[(line + 1).min(lines.len())..]].concat().join("\n"),
        _ => {
            // A value ends at a comma, a bracket or the end of the line.
            let Some(start) = after.find(['=', ':']).map(|equals| at + equals + 1) else { return text.to_owned() };
            let end = text[start..].find([',', '}', ']', '\n']).map_or(text.len(), |length| start + length);
            [&text[..start], " ", pick(&VALUES, generator), &text[end..]].concat()
        }
    }
}

fn mutated_often(text: &str, generator: &mut Generator) -> String {
    (0..generator.random_range(1..4)).fold(text.to_owned(), |text, _| mutated(&text, generator))
}

/// A template that is large in one way: loops in loops, deep expressions, texts that double.
fn template(generator: &mut Generator) -> String {
    let many = *[3, 40, 600, 20_000].choose(generator).expect("a count");
    let operators = ["not ", "-", "(", "[", "1 + ", "1 ~ ", "1 ** ", "not -", "1 if 1 else ", "x.", "x|"];
    match generator.random_range(0..6) {
        0 => {
            let loops = "{% for a in instruction ~ instruction ~ instruction %}".repeat(many.min(9));
            format!("{loops}{{{{ instruction }}}}{}", "{% endfor %}".repeat(many.min(9)))
        }
        1 => format!("{{{{ instruction }}}}{{{{ {}1 }}}}", pick(&operators, generator).repeat(many)),
        2 => format!("{{% set x = instruction %}}{}{{{{ x }}}}", "{% set x = x ~ x %}".repeat(many)),
        3 => format!("{{{{ instruction }}}}{}", "{% if 0 %}{% elif 1 %}".repeat(many)),
        4 => format!("{{{{ instruction }}}}{{% if 0 %}}{}{{% endif %}}", "{% elif 1 %}x".repeat(many)),
        _ => mutated_often("<u> {{ instruction }} {% if input %}{{ input }}{% endif %}", generator),
    }
}

/// Loads and plans the experiment; whatever is wrong must be said.
fn plan(path: &Path, sets: &[String]) -> Option<String> {
    let planned = Config::load(path, sets).and_then(|loaded| resolve::resolve(&loaded));
    match planned {
        Ok(experiment) => {
            planner::plan(&experiment);
            None
        }
        Err(problems) => problems.errors().iter().find(|error| error.remedy().is_none()).map(ToString::to_string),
    }
}

/// A model folder in Hugging Face's layout.
struct Folder {
    config: String,
    tokenizer: String,
    weights: Vec<u8>,
}

impl Folder {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let model = build(&variants()[0].1).expect("a model");
        let weights = Weights::random(model.params(), Seed::new(1), DType::F32, &Device::Cpu).expect("weights");
        let words = ["<pad>", "<bos>", "<user>", "<asst>", "<eos>", "a", "b"].map(str::to_owned);
        let tokenizer = Tokenizer::word_level(&words).expect("a tokenizer");
        save(&CausalLm { model: model.into(), tokenizer, weights }, folder.path()).expect("a folder");
        let read = |name: &str| std::fs::read(folder.path().join(name)).expect("a file");
        let text = |name: &str| String::from_utf8(read(name)).expect("text");
        Self { config: text("config.json"), tokenizer: text("tokenizer.json"), weights: read("model.safetensors") }
    }

    /// Writes the folder with one of its three files changed.
    fn write(&self, folder: &Path, generator: &mut Generator) {
        let which = generator.random_range(0..4);
        let text = |changed: bool, text: &str, generator: &mut Generator| match (changed, generator.random_bool(0.3)) {
            (false, _) => text.to_owned(),
            (true, false) => changed_json(text, generator),
            (true, true) => mutated_often(text, generator),
        };
        let config = text(which <= 1, &self.config, generator);
        let tokenizer = text(which == 2, &self.tokenizer, generator);
        let mut weights = self.weights.clone();
        for _ in 0..if which == 3 { generator.random_range(1..10) } else { 0 } {
            let at = generator.random_range(0..weights.len().min(2500));
            weights[at] = generator.random();
        }
        for (name, bytes) in [
            ("config.json", config.as_bytes()),
            ("tokenizer.json", tokenizer.as_bytes()),
            ("model.safetensors", &weights),
        ] {
            std::fs::write(folder.join(name), bytes).expect("written");
        }
    }
}

/// The JSON text with a few values replaced, at any depth.
fn changed_json(text: &str, generator: &mut Generator) -> String {
    fn change(value: &mut Value, left: &mut usize, generator: &mut Generator) {
        if *left > 0 && generator.random_bool(0.1) {
            let numbers = [json!(0), json!(-1), json!(1e308), json!(u64::MAX), json!(1u64 << 40), json!(1e-320)];
            let others =
                [json!(null), json!(""), json!([]), json!({}), json!(true), json!({ "type": "linear", "factor": 0 })];
            *value = numbers.iter().chain(&others).cloned().collect::<Vec<_>>().choose(generator).expect("one").clone();
            *left -= 1;
        }
        match value {
            Value::Object(map) => map.values_mut().for_each(|value| change(value, left, generator)),
            Value::Array(list) => list.iter_mut().take(9).for_each(|value| change(value, left, generator)),
            _ => {}
        }
    }
    let mut value: Value = serde_json::from_str(text).expect("JSON");
    let mut left = generator.random_range(1..4);
    if let Value::Object(map) = &mut value {
        map.values_mut().for_each(|value| change(value, &mut left, generator));
    }
    value.to_string()
}

/// Sizes and lists that an experiment may be given from the command line.
const KEYS: [&str; 30] = [
    "base.shape.hidden_size",
    "base.shape.num_hidden_layers",
    "base.shape.max_position_embeddings",
    "base.shape.intermediate_size",
    "base.shape.head_dim",
    "base.shape.rope_theta",
    "base.shape.rms_norm_eps",
    "base.shape.rope_scaling",
    "base.pretrain.data.rows",
    "base.pretrain.train.steps",
    "base.pretrain.max_length",
    "encoding.max_length",
    "align.data.0.rows",
    "align.train.batch_size",
    "align.train.accumulate",
    "align.train.bucket",
    "fine_tune.samples",
    "fine_tune.monitor.rows",
    "fine_tune.harmful_ratios",
    "fine_tune.learning_rates",
    "evaluate.harmful.rows",
    "evaluate.task_prompts",
    "evaluate.batch_size",
    "evaluate.max_new_tokens",
    "lora.r",
    "lora.alpha",
    "seeds",
    "base.seeds",
    "methods.1.align.rho",
    "checkpoint_seconds",
];

/// One case. `Some` is an error without a remedy.
fn case(number: u64, model: &Folder) -> Option<String> {
    let generator = &mut Seed::new(number).named("hostile").generator();
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("small.toml");
    let write = |text: String| std::fs::write(&path, text).expect("a file");
    match number % 6 {
        0 => {
            write(mutated_often(SMALL, generator));
            plan(&path, &[])
        }
        1 => {
            write(SMALL.to_owned());
            let long = format!("[{}]", (0..20_000).map(|n| n.to_string()).collect::<Vec<_>>().join(","));
            let values = [&VALUES[..], &[&long, "{ rope_type = \"linear\", factor = 0 }"]].concat();
            let deep = "a.".repeat(5_000) + "b";
            let keys = [&KEYS[..], &[&deep]].concat();
            let set = |generator: &mut Generator| format!("{}={}", pick(&keys, generator), pick(&values, generator));
            let sets: Vec<String> = (0..generator.random_range(1..3)).map(|_| set(generator)).collect();
            plan(&path, &sets)
        }
        2 => {
            let template = Template::new(template(generator));
            let error = template.check().and_then(|()| template.render(&Row::new("a b c ".repeat(99), ""))).err()?;
            error.remedy().is_none().then(|| error.to_string())
        }
        3 | 4 => {
            model.write(folder.path(), generator);
            let opened = CausalLm::open(folder.path(), Precision::from(DType::F32), &Device::Cpu);
            let error = opened.and_then(|base| base.tokenizer.decode(&base.tokenizer.encode("a b", true)?)).err()?;
            error.remedy().is_none().then(|| error.to_string())
        }
        _ => {
            let kind = pick(&["json", "jsonl", "csv", "tsv"], generator);
            let row = json!({ "instruction": "a b", "input": "c", "output": "d" });
            let table = |separator: &str| {
                let rows = std::iter::repeat_n(["a b", "c", "d"], 50);
                let rows = std::iter::once(["instruction", "input", "output"]).chain(rows);
                rows.map(|row| row.join(separator)).collect::<Vec<_>>().join("\n")
            };
            let text = match kind {
                "json" => format!("{:#}", json!(vec![row; 50])),
                "jsonl" => vec![row.to_string(); 50].join("\n"),
                "csv" => table(","),
                _ => table("\t"),
            };
            let data = format!("rows.{kind}");
            std::fs::write(folder.path().join(&data), mutated_often(&text, generator)).expect("a file");
            write(SMALL.replace("\"world-safe\", rows = 40", &format!("\"rows\", train = \"{data}\", rows = 40")));
            plan(&path, &[])
        }
    }
}

/// Runs the cases on a thread of its own, so that one that hangs is told by its number.
fn run(cases: std::ops::Range<u64>) {
    let model = Folder::new();
    let (sender, receiver) = channel();
    let numbers = cases.clone();
    let worker = std::thread::spawn(move || {
        for number in numbers {
            let started = Instant::now();
            let wrong = case(number, &model);
            if sender.send((number, wrong, started.elapsed())).is_err() {
                return;
            }
        }
    });
    let mut wrong = Vec::new();
    for expected in cases {
        match receiver.recv_timeout(PATIENCE) {
            Ok((number, error, elapsed)) => {
                wrong.extend(error.map(|error| format!("case {number}: no remedy for {error}")));
                assert!(elapsed < PATIENCE, "case {number} took {elapsed:?}");
            }
            Err(RecvTimeoutError::Timeout) => panic!("case {expected} hangs"),
            Err(RecvTimeoutError::Disconnected) => panic!("case {expected} panicked: {:?}", worker.join()),
        }
    }
    assert!(wrong.is_empty(), "{} of the errors are wrong:\n{}", wrong.len(), wrong.join("\n"));
    let peak = titer::memory::process_peak().unwrap_or(0);
    assert!(peak < MOST_BYTES, "the cases took {peak} bytes of memory");
}

#[test]
fn mutated_input_ends_in_errors_with_remedies() {
    run(0..2_000);
}

/// The same for minutes: `cargo test --release --workspace --test hostile -- --ignored`.
#[test]
#[ignore = "takes minutes"]
fn much_mutated_input_ends_in_errors_with_remedies() {
    run(2_000..60_000);
}
