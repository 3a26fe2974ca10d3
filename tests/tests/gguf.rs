//! GGUF files: the same model as the folder, with its tokenizer and chat template, and an error for what is damaged.

use std::fs;
use std::io::Cursor;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor};
use serde_json::json;
use titer_core::causal_lm::read_config;
use titer_core::data::Tokens;
use titer_core::rng::Seed;
use titer_core::text::ChatTemplate;
use titer_core::weights::Precision;
use titer_core::{CausalLm, Forward, Model, Row, Sites, Weights};
use titer_tests::{build, values};

const WORDS: [&str; 12] = ["<unk>", "<s>", "</s>", "<|eot|>", "a", "b", "Ġ", "Ġa", "ab", "1", "2", "\u{10a}"];

/// Hugging Face's names and llama.cpp's, block by block.
const NAMES: [(&str, &str); 9] = [
    ("input_layernorm", "attn_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("post_attention_layernorm", "ffn_norm"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
];

fn config() -> serde_json::Value {
    json!({
        "model_type": "llama", "vocab_size": WORDS.len(), "hidden_size": 64, "intermediate_size": 32,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32,
        "rms_norm_eps": 1e-5, "rope_theta": 5e5
    })
}

/// What the file says beside its tensors.
fn metadata() -> Vec<(&'static str, Value)> {
    let texts = |texts: &[&str]| Value::Array(texts.iter().map(|text| Value::String((*text).to_owned())).collect());
    let kinds = [2, 3, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1].map(Value::I32).to_vec();
    vec![
        ("general.architecture", Value::String("llama".into())),
        ("llama.embedding_length", Value::U32(64)),
        ("llama.feed_forward_length", Value::U32(32)),
        ("llama.block_count", Value::U32(2)),
        ("llama.attention.head_count", Value::U32(4)),
        ("llama.attention.head_count_kv", Value::U32(2)),
        ("llama.context_length", Value::U32(32)),
        ("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5)),
        ("llama.rope.freq_base", Value::F32(5e5)),
        ("tokenizer.ggml.model", Value::String("gpt2".into())),
        ("tokenizer.ggml.pre", Value::String("smollm".into())),
        ("tokenizer.ggml.tokens", texts(&WORDS)),
        ("tokenizer.ggml.token_type", Value::Array(kinds)),
        ("tokenizer.ggml.merges", texts(&["Ġ a", "a b"])),
        ("tokenizer.ggml.bos_token_id", Value::U32(1)),
        ("tokenizer.ggml.eos_token_id", Value::U32(2)),
        ("tokenizer.ggml.eot_token_id", Value::U32(3)),
        ("tokenizer.ggml.add_bos_token", Value::Bool(true)),
        ("tokenizer.chat_template", Value::String("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}".into())),
    ]
}

/// Rows as llama.cpp has them: of each head, pairs that rotary positions turn stand side by side.
fn side_by_side(x: &Tensor, heads: usize) -> Result<Tensor> {
    let (rows, columns) = x.dims2()?;
    let split = x.reshape((heads, 2, rows / heads / 2, columns))?;
    Ok(split.transpose(1, 2)?.contiguous()?.reshape((rows, columns))?)
}

/// The bytes of a file with these weights; linear layers as `kind`.
fn file(weights: &Weights, kind: GgmlDType, metadata: &[(&str, Value)]) -> Result<Vec<u8>> {
    let mut tensors = Vec::new();
    for (name, matrix) in weights.named() {
        let tensor = matrix.dense()?;
        let own = match name {
            "model.embed_tokens.weight" => "token_embd.weight".to_owned(),
            "model.norm.weight" => "output_norm.weight".to_owned(),
            "lm_head.weight" => "output.weight".to_owned(),
            _ => {
                let (block, rest) =
                    name.strip_prefix("model.layers.").context(name.to_owned())?.split_once('.').context("a block")?;
                let (_, own) =
                    NAMES.iter().find(|(known, _)| rest == format!("{known}.weight")).context(rest.to_owned())?;
                format!("blk.{block}.{own}.weight")
            }
        };
        let tensor = match own.split('.').nth(2) {
            Some("attn_q") => side_by_side(&tensor, 4)?,
            Some("attn_k") => side_by_side(&tensor, 2)?,
            _ => tensor,
        };
        let kind = if tensor.rank() == 2 && own.starts_with("blk.") { kind } else { GgmlDType::F32 };
        tensors.push((own, QTensor::quantize(&tensor, kind)?));
    }
    let tensors: Vec<(&str, &QTensor)> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    let metadata: Vec<(&str, &Value)> = metadata.iter().map(|(name, value)| (*name, value)).collect();
    let mut bytes = Cursor::new(Vec::new());
    gguf_file::write(&mut bytes, &metadata, &tensors)?;
    Ok(bytes.into_inner())
}

fn written(folder: &Path, bytes: &[u8]) -> Result<PathBuf> {
    let path = folder.join("model.gguf");
    fs::write(&path, bytes)?;
    Ok(path)
}

fn logits(model: &dyn Model, weights: &Weights) -> Result<Vec<f64>> {
    let mut sites = Sites::none();
    let mut pass = Forward::new(weights, &mut sites);
    let hidden = model.hidden(&Tokens::new(&[[4u32, 5, 7, 8, 9]], &Device::Cpu)?, &mut pass)?;
    Ok(values(model.logits(&hidden, &mut pass)?.tensor())?)
}

#[test]
fn a_file_is_the_same_model_as_its_folder() -> Result<()> {
    let (device, folder) = (&Device::Cpu, tempfile::tempdir()?);
    let model = build(&config())?;
    for (kind, name) in
        [(GgmlDType::F32, "f32"), (GgmlDType::Q8_0, "q8_0"), (GgmlDType::Q4_0, "q4_0"), (GgmlDType::Q4_1, "q4_1")]
    {
        let full = Weights::random(model.params(), Seed::new(1), DType::F32, device)?;
        let path = written(folder.path(), &file(&full, kind, &metadata())?)?;
        let opened = CausalLm::open(&path, Precision::Stored, device)?;
        assert_eq!(opened.model.params(), model.params());
        // Blocks of the file are those that Titer makes itself: quantization works along rows.
        let mut own = Weights::random(model.params(), Seed::new(1), Precision::parse(name)?, device)?;
        if kind != GgmlDType::F32 {
            // The embedding and the head, which the file has in f32.
            let wide = CausalLm::open(&path, DType::F32.into(), device)?;
            own = wide.weights;
        }
        let (ours, expected) = (logits(opened.model.as_ref(), &opened.weights)?, logits(model.as_ref(), &own)?);
        let gap = ours.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0., f64::max);
        assert!(gap < 2e-5, "{name}: logits differ by {gap:.1e}");
        if kind == GgmlDType::F32 {
            assert_eq!(ours, expected);
        }
        let linear = "model.layers.0.mlp.up_proj.weight";
        let stored =
            |weights: &Weights| weights.named().find(|(name, _)| *name == linear).map(|(_, matrix)| matrix.bytes());
        let blocks = Weights::random(model.params(), Seed::new(1), Precision::parse(name)?, device)?;
        assert_eq!(stored(&opened.weights), stored(&blocks), "{name} is kept as the file has it");
    }
    Ok(())
}

#[test]
fn text_is_read_as_the_file_says() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let weights = Weights::random(build(&config())?.params(), Seed::new(1), DType::F32, &Device::Cpu)?;
    let path = written(folder.path(), &file(&weights, GgmlDType::F32, &metadata())?)?;
    let tokenizer = CausalLm::open(&path, DType::F32.into(), &Device::Cpu)?.tokenizer;
    assert_eq!(tokenizer.encode("ab a12</s>", true)?, [1, 8, 7, 9, 10, 2]);
    assert_eq!(tokenizer.decode(&[1, 8, 7, 9, 10, 2])?, "ab a12");
    assert_eq!((tokenizer.eos, tokenizer.ends.as_slice()), (2, &[2, 3][..]));
    assert_eq!(tokenizer.decode(&[11])?, "\n");
    let chat = ChatTemplate::of_folder(&path)?.context("a chat template")?;
    assert_eq!(titer_core::text::Template::from(chat).render(&Row::new("hi", ""))?, "<s>hi</s>");
    assert_eq!(read_config(&path)?["rms_norm_eps"], 1e-5);
    Ok(())
}

/// The scores of `SentencePiece` decide what is merged; a space stands before the text; bytes that are no token stand for themselves.
#[test]
fn sentence_pieces_are_merged_by_score() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let words = ["<unk>", "<s>", "</s>", "<0xC3>", "<0xBC>", "▁", "a", "b", "ab", "▁a", "ba", "▁ab"];
    let texts = Value::Array(words.iter().map(|text| Value::String((*text).to_owned())).collect());
    let scores = [0., 0., 0., 0., 0., -9., -9., -9., -2., -1., -3., -5.].map(Value::F32).to_vec();
    let kinds = [2, 3, 3, 6, 6, 1, 1, 1, 1, 1, 1, 1].map(Value::I32).to_vec();
    let mut metadata = metadata();
    metadata.retain(|(name, _)| {
        !["tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.model"].contains(name)
    });
    metadata.extend([
        ("tokenizer.ggml.model", Value::String("llama".into())),
        ("tokenizer.ggml.tokens", texts),
        ("tokenizer.ggml.token_type", Value::Array(kinds)),
        ("tokenizer.ggml.scores", Value::Array(scores)),
        ("tokenizer.ggml.unknown_token_id", Value::U32(0)),
    ]);
    let weights = Weights::random(build(&config())?.params(), Seed::new(1), DType::F32, &Device::Cpu)?;
    let path = written(folder.path(), &file(&weights, GgmlDType::F32, &metadata)?)?;
    let tokenizer = CausalLm::open(&path, DType::F32.into(), &Device::Cpu)?.tokenizer;
    // `▁a` has the best score, so `▁ab` is `▁a` and `b`, which then become `▁ab`.
    assert_eq!(tokenizer.encode("ab ba", true)?, [1, 11, 5, 10]);
    assert_eq!(tokenizer.encode("ü", false)?, [5, 3, 4]);
    assert_eq!(tokenizer.decode(&[11, 5, 10])?, "ab ba");
    Ok(())
}

#[test]
fn files_that_are_damaged_or_of_another_kind_say_so() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let weights = Weights::random(build(&config())?.params(), Seed::new(1), DType::F32, &Device::Cpu)?;
    let open = |bytes: &[u8]| -> Result<String> {
        let path = written(folder.path(), bytes)?;
        let error = CausalLm::open(&path, Precision::Stored, &Device::Cpu).err().context("it was read")?;
        assert!(error.place("file").is_some() && error.remedy().is_some(), "{error}");
        Ok(error.to_string())
    };
    let whole = file(&weights, GgmlDType::Q8_0, &metadata())?;
    for length in [0, 3, 4, 20, 60, 200, 700, whole.len() / 2, whole.len() - 1] {
        open(&whole[..length])?;
    }
    let with = |name: &'static str, value: Option<Value>| {
        let mut changed = metadata();
        changed.retain(|(known, _)| *known != name);
        changed.extend(value.map(|value| (name, value)));
        file(&weights, GgmlDType::F32, &changed)
    };
    let text = |text: &str| Some(Value::String(text.to_owned()));
    for (name, value, expected) in [
        ("general.architecture", text("mamba"), "`mamba`, which is not read"),
        ("llama.block_count", None, "llama.block_count"),
        ("llama.attention.head_count", Some(Value::U32(0)), "num_attention_heads"),
        ("tokenizer.ggml.pre", text("secret"), "`secret`"),
        ("tokenizer.ggml.model", text("bert"), "`bert`"),
        ("tokenizer.ggml.eos_token_id", None, "eos_token_id"),
        ("general.alignment", Some(Value::U32(0)), "cannot be read"),
    ] {
        let said = open(&with(name, value)?)?;
        assert!(said.contains(expected), "{said}");
    }
    Ok(())
}
