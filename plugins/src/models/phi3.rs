//! Phi-3 (Abdin et al. 2024): Llama with fused projections. Adapters target these as they are stored, `qkv_proj` and
//! `gate_up_proj`.

use serde_json::{Value, json};
use titer_core::{Error, ModelEntry, Result, SettingsType, inventory};

use super::decoder::{Decoder, DecoderConfig, Family, Layout, decoder_keys};

inventory::submit! {
    ModelEntry {
        name: "phi3",
        summary: "Phi-3: fused projections, grouped-query attention within a window, rotary positions, gated MLP",
        model_types: &["phi3"],
        settings: SettingsType::of::<Phi3Config>(),
        version: 1,
        build: Decoder::build::<Phi3Config>,
        from_config: Decoder::from_config::<Phi3Config>,
    }
}

decoder_keys! {
    /// The keys of Phi-3's `config.json`.
    Phi3Config {
        /// How many positions back a token sees, its own included; all of them if absent.
        sliding_window: Option<usize> = None,
        /// The part of a head that is rotated; only all of it is computed.
        partial_rotary_factor: f64 = 1.,
    }
}

impl DecoderConfig for Phi3Config {
    const FAMILY: Family = Family { name: "Phi-3", model_type: "phi3", architecture: "Phi3ForCausalLM" };
    const LAYOUT: Layout = Layout { fused: true, ..Layout::LLAMA };

    fn left_out() -> Value {
        json!({ "max_position_embeddings": 4096, "rms_norm_eps": 1e-5 })
    }

    fn check(&self) -> Result<()> {
        if self.partial_rotary_factor == 1. {
            return Ok(());
        }
        let message = format!("heads that are rotated in part ({}) are not computed", self.partial_rotary_factor);
        let help = "take a checkpoint that rotates whole heads, such as Phi-3-mini-4k-instruct";
        Err(Error::config(message).key("partial_rotary_factor").help(help))
    }

    fn window(&self, _: usize) -> Option<usize> {
        self.sliding_window
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::decoder::check::{load, survives_writing};

    #[test]
    fn projections_are_stored_as_one() -> Result<()> {
        let model = load::<Phi3Config>(json!({ "num_key_value_heads": 1 }))?;
        assert_eq!(model.params().linear_names(), ["qkv_proj", "o_proj", "gate_up_proj", "down_proj", "lm_head"]);
        let shape = |name: &str| model.params().iter().find(|param| param.name.contains(name)).map(|p| p.shape.clone());
        assert_eq!((shape("qkv_proj"), shape("gate_up_proj")), (Some(vec![16, 8]), Some(vec![24, 8])));
        Ok(())
    }

    #[test]
    fn what_is_not_computed_is_refused() {
        for (changes, expected) in [
            (json!({ "partial_rotary_factor": 0.75 }), "partial_rotary_factor"),
            (
                json!({ "rope_parameters": { "partial_rotary_factor": 0.75, "rope_type": "default" } }),
                "partial_rotary_factor",
            ),
            (
                json!({ "rope_scaling": { "type": "longrope", "short_factor": [1.0], "long_factor": [1.0] } }),
                "longrope",
            ),
        ] {
            let error = load::<Phi3Config>(changes).expect_err(expected).to_string();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn what_is_written_reads_the_same() -> Result<()> {
        let built = Phi3Config { vocab_size: 5, ..Phi3Config::default() };
        survives_writing(built.clone())?;
        survives_writing(Phi3Config { sliding_window: Some(7), num_key_value_heads: Some(1), ..built })
    }
}
