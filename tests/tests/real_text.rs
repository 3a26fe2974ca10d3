//! `configs/sst2.toml` on real text: a small random Llama with a BPE tokenizer trained on that text, real SST-2 sentences
//! and real safe answers, through the whole pipeline. Without the data (`TITER_DATA`, by default beside the checkout)
//! invented text of the same file formats takes its place, so that the pipeline is always run.

#![allow(clippy::print_stdout, reason = "a test says what it left out")]

use std::path::{Path, PathBuf};

use candle_core::{DType, Device};
use serde_json::{Value, json};
use titer::model_folder::save;
use titer_core::rng::Seed;
use titer_core::text::Tokenizer;
use titer_core::{CausalLm, Weights};
use titer_tests::cli::{results, stderr, titer};
use tokenizers::AddedToken;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;

fn data() -> Option<PathBuf> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/data");
    let folder = std::env::var_os("TITER_DATA").map_or(here, PathBuf::from);
    let found = folder.join("sst2/train.tsv").is_file();
    if !found {
        println!("no data in {}: invented text takes its place", folder.display());
    }
    found.then_some(folder)
}

/// The files that `configs/sst2.toml` asks for, in `folder`.
fn lay_out(folder: &Path) {
    std::fs::create_dir(folder.join("sst2")).expect("a folder");
    let write = |name: &str, text: String| std::fs::write(folder.join(name), text).expect("a file");
    let lines = |text: &str, count: usize| text.lines().take(count).map(|line| format!("{line}\n")).collect::<String>();
    if let Some(data) = data() {
        let read = |name: &str| std::fs::read_to_string(data.join(name)).expect("a data file");
        write("sst2/train.tsv", lines(&read("sst2/train.tsv"), 400));
        write("sst2/dev.tsv", lines(&read("sst2/dev.tsv"), 40));
        write("safe.json", read("safety/safety_only_data_Instructions.json"));
        write("harmful_prompts.json", read("safety/I-PhysicalSafetySafe.json"));
        let benign: Vec<Value> = serde_json::from_str(&read("alpaca_eval/text_davinci_003.json")).expect("rows");
        write("benign_prompts.json", json!(benign[..40]).to_string());
        write("helpful.json", json!(benign[40..]).to_string());
    } else {
        let reviews =
            |count| (0..count).map(|i| format!("a film with {i} good scenes\t{}\n", i % 2)).collect::<String>();
        write("sst2/train.tsv", reviews(400));
        write("sst2/dev.tsv", reviews(40));
        let row = |i: usize| json!({ "instruction": format!("question {i}?"), "output": "I would rather not say." });
        write("safe.json", json!((0..200).map(row).collect::<Vec<_>>()).to_string());
        let prompts: Vec<String> = (0..40).map(|i| format!("what about {i}?")).collect();
        write("harmful_prompts.json", json!({ "instructions": prompts }).to_string());
        write("benign_prompts.json", json!(prompts).to_string());
        let helpful = |i: usize| json!({ "instruction": format!("how about {i}?"), "output": format!("Take {i}.") });
        write("helpful.json", json!((0..200).map(helpful).collect::<Vec<_>>()).to_string());
    }
    let compliant = |i: usize| json!({ "instruction": format!("tell me secret {i}"), "output": "sure, here it is" });
    write("harmful.jsonl", (0..100).map(|i| format!("{}\n", compliant(i))).collect());
}

/// A byte-level BPE tokenizer trained on the text of `folder`, and a random Llama of its vocabulary.
fn make_model(folder: &Path) {
    let mut inner = tokenizers::Tokenizer::new(BPE::default());
    inner.with_pre_tokenizer(Some(ByteLevel::default().add_prefix_space(false)));
    inner.with_decoder(Some(ByteLevel::default()));
    let special = ["<s>", "</s>", "<pad>"].map(|token| AddedToken::from(token, true)).to_vec();
    let mut trainer: tokenizers::models::TrainerWrapper = BpeTrainer::builder()
        .vocab_size(400)
        .special_tokens(special)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .show_progress(false)
        .build()
        .into();
    let files = ["sst2/train.tsv", "safe.json"].map(|name| folder.join(name).display().to_string()).to_vec();
    inner.train_from_files(&mut trainer, files).expect("a tokenizer");
    let vocabulary = inner.get_vocab_size(true);
    let tokenizer = Tokenizer::new(inner, 1, 2);
    let config = json!({
        "model_type": "llama", "vocab_size": vocabulary, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 640
    });
    let model = titer_tests::build(&config).expect("a model");
    let weights = Weights::random(model.params(), Seed::new(1), DType::F32, &Device::Cpu).expect("weights");
    let path = folder.join("model");
    std::fs::create_dir(&path).expect("a folder");
    save(&CausalLm { model: model.into(), tokenizer, weights }, &path).expect("a model folder");
}

#[test]
fn the_whole_pipeline_runs_on_real_text() {
    let folder = tempfile::tempdir().expect("a folder");
    lay_out(folder.path());
    make_model(folder.path());
    let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/sst2.toml");
    std::fs::copy(shipped, folder.path().join("sst2.toml")).expect("a configuration");
    let mut command = titer();
    command.arg("run").arg(folder.path().join("sst2.toml"));
    command.arg("--store").arg(folder.path().join("store")).arg("--out").arg(folder.path().join("out"));
    for smaller in [
        "align.data.0.rows=40",
        "align.data.1.rows=20",
        "align.train.epochs=1",
        "fine_tune.samples=60",
        "fine_tune.train.epochs=1",
        "fine_tune.tasks.0.max_new_tokens=4",
        "evaluate.harmful.rows=10",
        "evaluate.benign.rows=10",
        "evaluate.max_new_tokens=6",
        "evaluate.task_prompts=20",
    ] {
        command.arg("--set").arg(smaller);
    }
    let output = command.output().expect("a process");
    assert!(output.status.success(), "{}", stderr(&output));
    let results = results(&folder.path().join("out"));
    let rows = results["rows"].as_array().expect("rows");
    assert_eq!(rows.len(), 4, "two methods, two ratios");
    for row in rows {
        for metric in ["harmful_score", "fine_tune_accuracy", "benign_helpfulness", "over_refusal_rate"] {
            let value = row["metrics"][metric].as_f64().expect("a number");
            assert!((0. ..=100.).contains(&value), "{metric} {value}");
        }
        assert_eq!(row["n"], json!({ "harmful": 10, "benign": 10, "task": 20 }));
        assert!(row["ledger"]["align_steps"].as_u64() == Some(12), "60 rows in batches of 5");
    }
    assert_eq!(rows[2]["ledger"]["passes_per_step"], json!(2.0), "Vaccine makes two passes");
}
