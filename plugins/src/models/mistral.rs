//! Mistral (Jiang et al. 2023): grouped-query attention that looks back no further than a window.

use serde_json::{Value, json};
use titer_core::{ModelEntry, SettingsType, inventory};

use super::decoder::{Decoder, DecoderConfig, Family, decoder_keys};

inventory::submit! {
    ModelEntry {
        name: "mistral",
        summary: "Mistral: grouped-query attention within a sliding window, rotary positions, gated MLP",
        model_types: &["mistral"],
        settings: SettingsType::of::<MistralConfig>(),
        version: 1,
        build: Decoder::build::<MistralConfig>,
        from_config: Decoder::from_config::<MistralConfig>,
    }
}

decoder_keys! {
    /// The keys of Mistral's `config.json`.
    MistralConfig {
        /// How many positions back a token sees, its own included; all of them if absent.
        sliding_window: Option<usize> = None,
    }
}

impl DecoderConfig for MistralConfig {
    const FAMILY: Family = Family { name: "Mistral", model_type: "mistral", architecture: "MistralForCausalLM" };

    fn left_out() -> Value {
        json!({
            "max_position_embeddings": 131_072, "num_key_value_heads": 8, "rms_norm_eps": 1e-6, "sliding_window": 4096
        })
    }

    fn window(&self, _: usize) -> Option<usize> {
        self.sliding_window
    }
}

#[cfg(test)]
mod tests {
    use titer_core::Result;

    use super::*;
    use crate::models::decoder::check::{load, read, survives_writing};

    #[test]
    fn a_null_is_no_window_and_a_key_left_out_is_the_library_s() -> Result<()> {
        let window = |changes: Value| -> Result<_> { Ok(read::<MistralConfig>(changes)?.window(0)) };
        assert_eq!(window(json!({}))?, Some(4096));
        assert_eq!(window(json!({ "sliding_window": null }))?, None);
        assert_eq!(window(json!({ "sliding_window": 3 }))?, Some(3));
        let error = load::<MistralConfig>(json!({ "sliding_window": 0, "num_key_value_heads": 2 })).expect_err("zero");
        assert_eq!(error.place("key"), Some("sliding_window"), "{error}");
        Ok(())
    }

    #[test]
    fn what_is_written_reads_the_same() -> Result<()> {
        let built = MistralConfig { vocab_size: 5, num_key_value_heads: Some(4), ..MistralConfig::default() };
        survives_writing(built.clone())?;
        survives_writing(MistralConfig { sliding_window: Some(7), num_key_value_heads: Some(1), ..built })
    }
}
