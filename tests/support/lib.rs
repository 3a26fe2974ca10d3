//! What several test files share: tiny models and random batches.

pub mod cli;
pub mod in_process;
pub mod judges;
pub mod own_defense;
pub mod simulation;

use anyhow::Result;
// The registry knows a plugin only if it is linked.
use candle_core::{DType, Device, Tensor};
use serde_json::{Value, json};
use titer_core::data::Batch;
use titer_core::defense::{Clock, StepCx, Streams};
use titer_core::rng::{Generator, Seed};
use titer_core::{AlignmentDefense, DefenseEntry, Model, ModelEntry, Settings, Sites, Update, Weights, registry};
use titer_plugins as _;

/// The architectures that the tests go through, each in its variants: `config.json` keys by a name to show.
pub fn variants() -> Vec<(&'static str, Value)> {
    let with = |mut config: Value, changes: Value| {
        config.as_object_mut().expect("a table").extend(changes.as_object().expect("a table").clone());
        config
    };
    let decoder = |family: &str, changes: Value| {
        let config = json!({
            "model_type": family, "vocab_size": 23, "hidden_size": 16, "intermediate_size": 20,
            "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 32,
            "initializer_range": 0.3, "rms_norm_eps": 1e-5
        });
        with(config, changes)
    };
    let llama = |changes: Value| decoder("llama", changes);
    let opt = |changes: Value| {
        let config = json!({
            "model_type": "opt", "vocab_size": 23, "hidden_size": 16, "ffn_dim": 20, "num_hidden_layers": 2,
            "num_attention_heads": 4, "max_position_embeddings": 32, "init_std": 0.3
        });
        with(config, changes)
    };
    let llama3 = json!({
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16
    });
    let sliding = json!({
        "num_key_value_heads": 4, "use_sliding_window": true, "sliding_window": 3, "max_window_layers": 1
    });
    vec![
        ("llama", llama(json!({}))),
        ("llama, grouped queries", llama(json!({ "num_key_value_heads": 2 }))),
        ("llama 3", llama(json!({ "num_key_value_heads": 1, "rope_scaling": llama3, "rope_theta": 5e5 }))),
        ("llama, tied", llama(json!({ "tie_word_embeddings": true }))),
        ("llama, biases", llama(json!({ "attention_bias": true, "mlp_bias": true }))),
        ("mistral", decoder("mistral", json!({ "num_key_value_heads": 2, "head_dim": 6, "sliding_window": 3 }))),
        ("qwen2", decoder("qwen2", json!({ "num_key_value_heads": 2, "tie_word_embeddings": true }))),
        ("qwen2, window in the upper block", decoder("qwen2", sliding)),
        ("opt", opt(json!({}))),
        ("opt, untied", opt(json!({ "tie_word_embeddings": false, "enable_bias": false }))),
        ("opt, gelu", opt(json!({ "activation_function": "gelu" }))),
        ("opt, as the 350M model", opt(json!({ "do_layer_norm_before": false, "word_embed_proj_dim": 12 }))),
    ]
}

/// The model that reads this `config.json`.
pub fn build(config: &Value) -> Result<Box<dyn Model>> {
    let kind = config["model_type"].as_str().unwrap_or_default();
    let entry = registry::all::<ModelEntry>()?.into_iter().find(|entry| entry.model_types.contains(&kind));
    let entry = entry.ok_or_else(|| anyhow::anyhow!("no model reads {kind}"))?;
    Ok((entry.from_config)(config, std::path::Path::new("config.json"))?)
}

/// A small Llama with seeded weights and an adapter that is not the identity.
pub fn tiny(dtype: DType, dropout: f32) -> Result<(Box<dyn Model>, Weights)> {
    adapted(&variants()[1].1, dtype, dropout)
}

/// The same of every variant.
pub fn all_tiny(dtype: DType, dropout: f32) -> Result<Vec<(Box<dyn Model>, Weights)>> {
    variants().iter().map(|(_, config)| adapted(config, dtype, dropout)).collect()
}

fn adapted(config: &Value, dtype: DType, dropout: f32) -> Result<(Box<dyn Model>, Weights)> {
    let model = build(config)?;
    let mut weights = Weights::random(model.params(), Seed::new(1), dtype, &Device::Cpu)?;
    adapt(&mut weights, dropout)?;
    Ok((model, weights))
}

/// Attaches an adapter with both factors random, as after some training.
pub fn adapt(weights: &mut Weights, dropout: f32) -> Result<()> {
    let lora = titer_core::weights::LoraConfig { r: 3, alpha: 6., dropout, ..Default::default() };
    weights.train_lora(&lora, Seed::new(2))?;
    for (name, var) in weights.trainable() {
        let noise = titer_core::rng::randn(var.dims(), &mut Seed::new(3).named(name).generator(), &Device::Cpu)?;
        var.set(&(noise.to_dtype(var.dtype())? * 0.1)?)?;
    }
    Ok(())
}

/// Random rows of the given lengths, with a label on every token but the first.
pub fn batch(vocabulary: u32, lengths: &[usize], generator: &mut Generator) -> Result<Batch> {
    let mut token = || {
        use rand::RngExt;
        generator.random_range(0..vocabulary)
    };
    let rows: Vec<Vec<u32>> = lengths.iter().map(|&length| (0..=length).map(|_| token()).collect()).collect();
    let labels = rows
        .iter()
        .enumerate()
        .flat_map(|(row, tokens)| tokens.iter().enumerate().skip(1).map(move |(at, &label)| (row, at - 1, label)));
    let inputs: Vec<&[u32]> = rows.iter().map(|row| &row[..row.len() - 1]).collect();
    Ok(Batch::with_labels(&inputs, labels.collect::<Vec<_>>(), 0, &Device::Cpu)?)
}

/// A context for passes of step 0.
pub fn context<'a>(model: &'a dyn Model, weights: &'a Weights, streams: &'a mut Streams) -> StepCx<'a> {
    StepCx::new(model, weights, streams, Seed::new(4), Clock::at(0, 10))
}

/// The loss of `batch` with these sites, and nothing differentiated but them.
pub fn loss(model: &dyn Model, weights: &Weights, batch: &Batch, sites: Sites) -> Result<f64> {
    Ok(context(model, weights, &mut Streams::default()).site_gradients(batch, sites)?.loss.value()?)
}

/// A registered defense with these settings.
pub fn defense(name: &str, settings: Value) -> Result<Box<dyn AlignmentDefense>> {
    let settings = Settings::from(settings.as_object().cloned().unwrap_or_default());
    Ok((registry::find::<DefenseEntry>(name)?.build)(&settings)?)
}

/// One step of a defense at step `step`, micro batch 0.
pub fn step(
    model: &dyn Model,
    weights: &Weights,
    defense: &mut dyn AlignmentDefense,
    batch: &Batch,
    step: usize,
) -> Result<Update> {
    let mut streams = Streams::default();
    let clock = Clock::at(step, 10);
    Ok(defense.step(&mut StepCx::new(model, weights, &mut streams, Seed::new(4), clock), batch)?)
}

/// The elements of a tensor in f64.
pub fn values(tensor: &Tensor) -> Result<Vec<f64>> {
    Ok(tensor.to_dtype(DType::F64)?.flatten_all()?.to_vec1()?)
}

/// The largest absolute difference of two tensors; infinite if one holds a value that is not a number.
pub fn difference(a: &Tensor, b: &Tensor) -> Result<f64> {
    anyhow::ensure!(a.dims() == b.dims(), "shapes {:?} and {:?}", a.dims(), b.dims());
    let gaps = values(a)?.into_iter().zip(values(b)?).map(|(x, y)| (x - y).abs());
    Ok(gaps.fold(0., |max, gap| if gap.is_nan() { f64::INFINITY } else { max.max(gap) }))
}
