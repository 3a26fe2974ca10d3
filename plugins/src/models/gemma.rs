//! Gemma (Gemma Team 2024): embeddings scaled by √`hidden_size`, norms whose weights hold their scale less one, and a
//! gated MLP with GELU.

use serde_json::{Value, json};
use titer_core::{ModelEntry, SettingsType, inventory};

use super::decoder::{Biases, Decoder, DecoderConfig, Family, Layout, decoder_keys};

inventory::submit! {
    ModelEntry {
        name: "gemma",
        summary: "Gemma: scaled embeddings, rotary positions, MLP gated by GELU",
        model_types: &["gemma"],
        settings: SettingsType::of::<GemmaConfig>(),
        version: 1,
        build: Decoder::build::<GemmaConfig>,
        from_config: Decoder::from_config::<GemmaConfig>,
    }
}

decoder_keys! {
    /// The keys of Gemma's `config.json`.
    GemmaConfig {
        /// Whether the attention projections have biases.
        attention_bias: bool = false,
    }
}

impl DecoderConfig for GemmaConfig {
    const FAMILY: Family = Family { name: "Gemma", model_type: "gemma", architecture: "GemmaForCausalLM" };
    const LAYOUT: Layout = Layout { activation_key: ("hidden_act", Layout::GEMMA.activation_key.1), ..Layout::GEMMA };

    fn left_out() -> Value {
        json!({
            "head_dim": 256, "max_position_embeddings": 8192, "num_key_value_heads": 16, "rms_norm_eps": 1e-6,
            "tie_word_embeddings": true
        })
    }

    fn biases(&self) -> Biases {
        Biases::of_attention(self.attention_bias)
    }

    fn window(&self, _: usize) -> Option<usize> {
        None
    }
}

#[cfg(test)]
mod tests {
    use titer_core::Result;

    use super::*;
    use crate::models::decoder::check::{load, read, survives_writing};

    #[test]
    fn keys_left_out_are_the_library_s() -> Result<()> {
        let keys = read::<GemmaConfig>(json!({}))?;
        assert_eq!((keys.head_dim, keys.num_key_value_heads, keys.rms_norm_eps), (Some(256), Some(16), 1e-6));
        assert!(keys.tie_word_embeddings && !keys.attention_bias);
        Ok(())
    }

    #[test]
    fn what_is_written_reads_the_same() -> Result<()> {
        let built = GemmaConfig { vocab_size: 5, head_dim: Some(16), ..GemmaConfig::default() };
        survives_writing(GemmaConfig { num_key_value_heads: Some(1), ..built.clone() })?;
        survives_writing(GemmaConfig { num_key_value_heads: Some(2), tie_word_embeddings: true, ..built })
    }

    /// The first checkpoints say `gelu`, which the library takes for its tanh form; silu would be another model.
    #[test]
    fn the_activation_is_gelu() -> Result<()> {
        for (key, name) in [("hidden_act", "gelu"), ("hidden_activation", "gelu_pytorch_tanh")] {
            load::<GemmaConfig>(json!({ key: name, "num_key_value_heads": 1 }))?;
        }
        let error = load::<GemmaConfig>(json!({ "hidden_act": "silu" })).expect_err("silu");
        assert_eq!(error.place("key"), Some("hidden_act"), "{error}");
        Ok(())
    }
}
