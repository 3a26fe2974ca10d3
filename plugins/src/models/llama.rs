//! Llama 1, 2 and 3 (Touvron et al. 2023; Grattafiori et al. 2024).

use serde_json::{Value, json};
use titer_core::{ModelEntry, SettingsType, inventory};

use super::decoder::{Biases, Decoder, DecoderConfig, Family, decoder_keys};

inventory::submit! {
    ModelEntry {
        name: "llama",
        summary: "Llama 1, 2 and 3: grouped-query attention, rotary positions, gated MLP",
        model_types: &["llama"],
        settings: SettingsType::of::<LlamaConfig>(),
        version: 4,
        build: Decoder::build::<LlamaConfig>,
        from_config: Decoder::from_config::<LlamaConfig>,
    }
}

decoder_keys! {
    /// The keys of Llama's `config.json`.
    LlamaConfig {
        /// Whether the attention projections have biases.
        attention_bias: bool = false,
        /// Whether the MLP's projections have biases.
        mlp_bias: bool = false,
    }
}

impl DecoderConfig for LlamaConfig {
    const FAMILY: Family = Family { name: "Llama", model_type: "llama", architecture: "LlamaForCausalLM" };

    fn left_out() -> Value {
        json!({ "max_position_embeddings": 2048, "rms_norm_eps": 1e-6 })
    }

    fn biases(&self) -> Biases {
        Biases { mlp: self.mlp_bias, ..Biases::of_attention(self.attention_bias) }
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
    fn reads_the_spellings_of_all_library_versions() -> Result<()> {
        let scaling = json!({
            "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64
        });
        let with = |key: &str, extra: Value| {
            let mut scaling = scaling.clone();
            scaling.as_object_mut().expect("a table").extend(extra.as_object().expect("a table").clone());
            read::<LlamaConfig>(json!({ key: scaling, "num_key_value_heads": null }))
        };
        let old = with("rope_scaling", json!({ "type": "llama3" }))?;
        let new = with("rope_scaling", json!({ "rope_type": "llama3" }))?;
        let newest = with("rope_parameters", json!({ "rope_type": "llama3", "rope_theta": 10000.0 }))?;
        assert_eq!(old, new);
        assert_eq!(old, newest);
        assert_eq!(load::<LlamaConfig>(json!({ "num_key_value_heads": null }))?.spec().kv_heads, 2);
        Ok(())
    }

    #[test]
    fn keys_left_out_are_the_library_s() -> Result<()> {
        for changes in [json!({}), json!({ "rms_norm_eps": null, "max_position_embeddings": null, "rope_theta": null })]
        {
            let keys = read::<LlamaConfig>(changes)?;
            assert_eq!((keys.rms_norm_eps, keys.max_position_embeddings, keys.rope_theta), (1e-6, 2048, 1e4));
        }
        survives_writing(LlamaConfig { vocab_size: 5, ..LlamaConfig::default() })
    }

    #[test]
    fn a_config_that_cannot_be_computed_is_refused_by_key() {
        let cases = [
            (json!({ "hidden_size": null }), "hidden_size"),
            (json!({ "hidden_act": "gelu" }), "hidden_act"),
            (json!({ "num_attention_heads": 3 }), "num_attention_heads"),
            (json!({ "num_key_value_heads": 3 }), "num_key_value_heads"),
            (json!({ "vocab_size": 0 }), "vocab_size"),
            (json!({ "head_dim": 3 }), "head_dim"),
        ];
        for (changes, key) in cases {
            let error = load::<LlamaConfig>(changes).expect_err(key);
            assert_eq!(error.place("key"), Some(key), "{error}");
            assert!(error.place("file").is_some(), "{error}");
        }
        let yarn = json!({ "rope_scaling": { "rope_type": "yarn", "factor": 2.0 } });
        let error = load::<LlamaConfig>(yarn).expect_err("yarn");
        assert!(error.to_string().contains("yarn"), "{error}");
    }

    #[test]
    fn names_are_those_of_the_checkpoints() -> Result<()> {
        let untied = load::<LlamaConfig>(json!({}))?;
        let names: Vec<&str> = untied.params().iter().map(|param| param.name.as_str()).collect();
        assert_eq!(names[0], "model.embed_tokens.weight");
        assert!(names.contains(&"model.layers.1.self_attn.q_proj.weight"));
        assert!(names.contains(&"model.layers.1.post_attention_layernorm.weight"));
        assert_eq!(names.last(), Some(&"lm_head.weight"));
        let tied = load::<LlamaConfig>(json!({ "tie_word_embeddings": true }))?;
        assert!(tied.params().iter().all(|param| param.name != "lm_head.weight"));
        Ok(())
    }
}
