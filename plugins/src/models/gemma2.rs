//! Gemma 2 (Gemma Team 2024): as Gemma, with norms behind attention and MLP too, a window in every other block, and
//! scores and logits bent towards a limit.

use serde_json::{Value, json};
use titer_core::{ModelEntry, Result, SettingsType, inventory};

use super::decoder::{Biases, Decoder, DecoderConfig, Family, Layout, SoftCaps, decoder_keys};
use super::windows::{LayerType, SlidingPattern, Windows};

inventory::submit! {
    ModelEntry {
        name: "gemma2",
        summary: "Gemma 2: as Gemma, with norms behind each part, alternating windows, soft-capped scores and logits",
        model_types: &["gemma2"],
        settings: SettingsType::of::<Gemma2Config>(),
        version: 1,
        build: Decoder::build::<Gemma2Config>,
        from_config: Decoder::from_config::<Gemma2Config>,
    }
}

decoder_keys! {
    /// The keys of Gemma 2's `config.json`.
    Gemma2Config {
        /// Whether the attention projections have biases.
        attention_bias: bool = false,
        /// Scores are divided by the root of this number; the width of a head if absent.
        query_pre_attn_scalar: Option<usize> = None,
        /// How many positions back a token sees in every other block, its own included.
        sliding_window: Option<usize> = Some(4096),
        /// The attention of each block, in place of every other one.
        layer_types: Option<Vec<LayerType>> = None,
        /// The limit of scores; none if absent.
        attn_logit_softcapping: Option<f64> = None,
        /// The limit of logits; none if absent.
        final_logit_softcapping: Option<f64> = None,
    }
}

impl DecoderConfig for Gemma2Config {
    const FAMILY: Family = Family { name: "Gemma 2", model_type: "gemma2", architecture: "Gemma2ForCausalLM" };
    const LAYOUT: Layout = Layout { norms_after: true, ..Layout::GEMMA };

    fn left_out() -> Value {
        json!({
            "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "head_dim": 256,
            "max_position_embeddings": 8192, "num_key_value_heads": 4, "query_pre_attn_scalar": 256,
            "rms_norm_eps": 1e-6, "sliding_window": 4096, "tie_word_embeddings": true
        })
    }

    fn check(&self) -> Result<()> {
        self.windows().check()
    }

    fn biases(&self) -> Biases {
        Biases::of_attention(self.attention_bias)
    }

    fn query_pre_attn_scalar(&self) -> Option<usize> {
        self.query_pre_attn_scalar
    }

    fn soft_caps(&self) -> SoftCaps {
        SoftCaps { scores: self.attn_logit_softcapping, logits: self.final_logit_softcapping }
    }

    fn window(&self, index: usize) -> Option<usize> {
        self.windows().of_block(index)
    }
}

impl Gemma2Config {
    fn windows(&self) -> Windows<'_> {
        Windows {
            size: self.sliding_window,
            pattern: SlidingPattern::AllButEvery(2),
            types: self.layer_types.as_deref(),
            blocks: self.num_hidden_layers,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::decoder::check::{load, read, survives_writing};

    #[test]
    fn keys_left_out_are_the_library_s_and_a_null_is_none() -> Result<()> {
        let keys = read::<Gemma2Config>(json!({}))?;
        assert_eq!(keys.soft_caps(), SoftCaps { scores: Some(50.), logits: Some(30.) });
        assert_eq!([keys.window(0), keys.window(1)], [Some(4096), None]);
        let keys = read::<Gemma2Config>(json!({ "attn_logit_softcapping": null, "sliding_window": 3 }))?;
        assert_eq!(keys.soft_caps(), SoftCaps { scores: None, logits: Some(30.) });
        assert_eq!(keys.window(0), Some(3));
        let error = load::<Gemma2Config>(json!({ "final_logit_softcapping": 0.0, "num_key_value_heads": 1 }))
            .expect_err("zero");
        assert_eq!(error.place("key"), Some("final_logit_softcapping"), "{error}");
        Ok(())
    }

    #[test]
    fn what_is_written_reads_the_same() -> Result<()> {
        let built = Gemma2Config {
            vocab_size: 5,
            head_dim: Some(16),
            num_key_value_heads: Some(1),
            query_pre_attn_scalar: Some(16),
            ..Default::default()
        };
        survives_writing(built.clone())?;
        survives_writing(Gemma2Config { final_logit_softcapping: Some(30.), sliding_window: Some(7), ..built })
    }

    #[test]
    fn a_block_has_four_norms() -> Result<()> {
        let model = load::<Gemma2Config>(json!({ "num_key_value_heads": 1, "head_dim": 6 }))?;
        let norms =
            model.params().iter().filter(|param| param.name.starts_with("model.layers.0") && param.shape.len() == 1);
        let mut names: Vec<_> = norms.filter_map(|param| param.name.split('.').nth(3)).collect();
        names.sort_unstable();
        assert_eq!(
            names,
            ["input_layernorm", "post_attention_layernorm", "post_feedforward_layernorm", "pre_feedforward_layernorm"]
        );
        // The loss needs the bent logits, so there is no head that gives them by a product alone.
        assert!(model.head().is_none());
        Ok(())
    }
}
