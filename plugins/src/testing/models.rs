//! Small models of every architecture.

use std::path::Path;

use candle_core::{DType, Device};
use serde_json::{Value, json};
use titer_core::rng::{Seed, randn};
use titer_core::weights::LoraConfig;
use titer_core::{Error, Model, ModelEntry, Result, Weights, registry};

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
    let gemma2 = |window: Value, scalar: usize| {
        let caps = json!({
            "num_key_value_heads": 2, "head_dim": 6, "query_pre_attn_scalar": scalar, "attn_logit_softcapping": 0.7,
            "final_logit_softcapping": 0.9, "sliding_window": window
        });
        decoder("gemma2", caps)
    };
    let gemma3 = json!({
        "num_key_value_heads": 2, "head_dim": 6, "query_pre_attn_scalar": 6, "sliding_window": 3,
        "sliding_window_pattern": 2, "rope_local_base_freq": 100.0, "rope_theta": 1e4
    });
    let gemma3 = decoder("gemma3_text", gemma3);
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
        ("qwen3", decoder("qwen3", json!({ "num_key_value_heads": 2, "head_dim": 6 }))),
        ("gemma", decoder("gemma", json!({ "num_key_value_heads": 1, "head_dim": 6 }))),
        ("gemma 2", gemma2(Value::Null, 6)),
        ("gemma 2, windows", gemma2(json!(3), 9)),
        ("gemma 3", gemma3),
        ("phi 3", decoder("phi3", json!({ "num_key_value_heads": 2 }))),
        ("phi 3, window", decoder("phi3", json!({ "num_key_value_heads": 2, "sliding_window": 3 }))),
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
    let entry = entry.ok_or_else(|| Error::run(format!("no model reads {kind}")))?;
    (entry.from_config)(config, Path::new("config.json"))
}

/// A small Llama.
pub fn small() -> Result<Box<dyn Model>> {
    build(&variants()[1].1)
}

/// A small Llama with seeded weights and an adapter that is not the identity.
pub fn tiny(dtype: DType, dropout: f32) -> Result<(Box<dyn Model>, Weights)> {
    adapted(&variants()[1].1, dtype, dropout)
}

/// The same of every variant of [`variants`].
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
    let lora = LoraConfig { r: 3, alpha: 6., dropout, ..Default::default() };
    weights.train_lora(&lora, Seed::new(2))?;
    for (name, var) in weights.trainable() {
        let noise = randn(var.dims(), &mut Seed::new(3).named(name).generator(), &Device::Cpu)?;
        var.set(&(noise.to_dtype(var.dtype())? * 0.1)?)?;
    }
    Ok(())
}
