//! Portable arithmetic: the same bits on every processor, for vectors of any width and any number of threads (law 2).
//!
//! The hashes below are those of every machine. They change with the arithmetic, the models, the training or the data, and
//! then the test prints the new ones.

use std::path::Path;

use titer::plan::planner;
use titer::store::Store;
use titer_core::arithmetic::{Level, limit};
use titer_tests::in_process;

/// Alignment, attack, repair and answers, with matrices that are large enough for blocks and threads but fill neither.
const CONFIG: &str = r#"
experiment = "portable"
checkpoint_seconds = 1000.0

[base]
model = "MODEL"
shape = { hidden_size = 72, FEED = 150, num_hidden_layers = 2, num_attention_heads = 4, max_position_embeddings = 64 }

[base.pretrain]
data = { task = "world-text", rows = 60 }
max_length = 48
train = { steps = 2, batch_size = 7, learning_rate = 5e-3 }

[encoding]
template = "chat"
max_length = 48

[align]
data = [{ task = "world-safe", rows = 40 }]
adapter = "ADAPTER"
train = { steps = 2, batch_size = 9, learning_rate = 5e-3 }

[fine_tune]
tasks = [{ name = "agnews", task = "world-agnews" }]
samples = 20
harmful = { task = "world-harmful" }
harmful_ratios = [0.2]
monitor = { task = "world-harmful", rows = 4 }
train = { steps = 2, batch_size = 5, learning_rate = 1e-3 }

[streams]
harmful = { task = "world-harmful", rows = 20 }

[evaluate]
harmful = { task = "world-harmful", rows = 6 }
task_prompts = 3
judges = ["world"]

[[methods]]
name = "Vaccine, KL, Safe LoRA"
align = { defense = "vaccine", rho = 3.0 }
fine_tune = { defense = "kl" }
post = { defense = "POST" }

[[methods]]
name = "Random perturbation"
align = { defense = "random-perturbation", rho = 1.0 }
"#;

/// The hash over everything that a run of the configuration in `folder` computed: weights, answers, verdicts, metrics.
fn hash(folder: &Path, text: &str, threads: usize) -> String {
    let plan = planner::plan(&in_process::experiment(folder, text));
    let store = tempfile::tempdir().expect("a folder");
    let opened = Store::open(store.path()).expect("a store");
    let outcome = in_process::run(&plan, &opened, threads, 1);
    assert!(outcome.failed.is_empty(), "{:?}", outcome.failed);
    let results = in_process::assemble(&plan, &opened, &outcome, &folder.join("out"));
    assert_eq!(results.rows.len(), plan.cells.len());
    // Records hold seconds; weights and answers hold only what was computed. Their places are keys, which say more.
    let mut contents = Vec::new();
    collect(store.path(), &mut contents);
    assert!(contents.len() > 10, "{contents:?}");
    contents.sort();
    let metrics: Vec<_> = results.rows.iter().map(|row| serde_json::json!(row.metrics).to_string()).collect();
    blake3::hash((contents.concat() + &metrics.concat()).as_bytes()).to_hex()[..32].to_owned()
}

/// The hashes of all weights and answers below `folder`.
fn collect(folder: &Path, contents: &mut Vec<String>) {
    for entry in std::fs::read_dir(folder).expect("a folder") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            collect(&path, contents);
        } else if path.extension().is_some_and(|extension| extension == "safetensors" || extension == "jsonl") {
            contents.push(blake3::hash(&std::fs::read(&path).expect("a file")).to_hex().to_string());
        }
    }
}

/// In one test, since the width of vectors is one for the process.
#[test]
fn every_width_of_vectors_and_number_of_threads_gives_the_same_bits() {
    let with = |model: &str, feed: &str, adapter: &str, post: &str| {
        let text = CONFIG.replace("MODEL", model).replace("FEED", feed);
        text.replace("ADAPTER", adapter).replace("POST", post)
    };
    let mut wrong = Vec::new();
    for (name, expected, text) in [
        ("llama, LoRA", LLAMA, with("llama", "intermediate_size", "lora", "safe-lora")),
        ("opt, all parameters", OPT, with("opt", "ffn_dim", "full", "resta")),
    ] {
        for level in Level::ALL {
            // Without vectors a step takes long, and threads divide the same outputs.
            let threads: &[usize] = if level >= Level::Bits256 { &[1, 2, 3] } else { &[2] };
            for &threads in threads {
                limit(level);
                let folder = tempfile::tempdir().expect("a folder");
                let found = hash(folder.path(), &text, threads);
                if found != expected {
                    wrong.push(format!("{name}, {level:?}, {threads} threads: {found}"));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "other bits: {wrong:#?}");
}

const LLAMA: &str = "7f91dae732d912de6ca3cfc9ababff8f";
const OPT: &str = "c85a1a22452ca1b3b601955b70af954b";

/// Functions of the C library and candle's products and sums depend on the processor, so that no code outside the tests
/// may use them: `titer_core::tensor::ops` has others.
#[test]
fn nothing_outside_the_kernels_depends_on_the_processor() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let functions =
        [".exp()", ".log()", ".ln()", ".powf(", ".powi(", ".sin()", ".cos()", ".tanh()", ".gelu()", ".silu()"];
    let sums =
        [".matmul(", "softmax(", ".sum_all()", ".sum_keepdim(", ".mean_all()", ".mean_keepdim(", "candle_nn::loss"];
    // Over dimensions before the last, candle sums one after another.
    let over = [".sum(1", ".sum(2", ".sum(D::", ".mean("];
    let banned = [&functions[..], &sums, &over].concat();
    // Whole powers of two are exact; the gradient of a sum is not summed; candle sums f64 one after another.
    let allowed =
        ["2f64.powi(power)", "log_softmax(", ".sum_all()?.backward()", "to_dtype(DType::F64)?.sqr()?.sum_all()"];
    let mut found = Vec::new();
    for folder in ["core/kernels/src", "core/src", "plugins/src"] {
        scan(&root.join(folder), &mut |path, line| {
            let code = line.split("//").next().unwrap_or_default();
            let rest = allowed.iter().fold(code.to_owned(), |code, word| code.replace(word, ""));
            if banned.iter().any(|word| rest.contains(word)) && !path.to_string_lossy().contains("testing") {
                found.push(format!("{}: {}", path.display(), code.trim()));
            }
        });
    }
    // What devices compute with, and what tests of the operators share.
    let others = ["ops/expression.rs", "tensor/cuda/", "tensor/check.rs"];
    found.retain(|line| !others.iter().any(|file| line.contains(file)));
    assert!(found.is_empty(), "{found:#?}");
}

/// Calls `f` for every line above the tests of each file.
fn scan(folder: &Path, f: &mut impl FnMut(&Path, &str)) {
    for entry in std::fs::read_dir(folder).expect("a folder") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            scan(&path, f);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = std::fs::read_to_string(&path).expect("a file");
            let code = text.split("#[cfg(test)]").next().unwrap_or_default();
            code.lines().for_each(|line| f(&path, line));
        }
    }
}
