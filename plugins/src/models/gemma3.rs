//! Gemma 3 for text (Gemma Team 2025): as Gemma 2 without limits on scores, with normalised queries and keys, and five
//! blocks with a window, whose rotary frequencies are others, to one without.

use serde_json::{Value, json};
use titer_core::{Error, ModelEntry, Result, SettingsType, inventory};

use super::check_positive;
use super::decoder::{Biases, Decoder, DecoderConfig, Family, Layout, SoftCaps, decoder_keys};
use super::windows::{LayerType, SlidingPattern, Windows};

inventory::submit! {
    ModelEntry {
        name: "gemma3",
        summary: "Gemma 3 for text: as Gemma 2, with normalised queries and keys, and two kinds of rotary positions",
        model_types: &["gemma3_text"],
        settings: SettingsType::of::<Gemma3Config>(),
        version: 1,
        build: Decoder::build::<Gemma3Config>,
        from_config: Decoder::from_config::<Gemma3Config>,
    }
}

decoder_keys! {
    /// The keys of Gemma 3's `config.json`, without those of its vision.
    Gemma3Config {
        /// Whether the attention projections have biases.
        attention_bias: bool = false,
        /// Scores are divided by the root of this number; the width of a head if absent.
        query_pre_attn_scalar: Option<usize> = None,
        /// How many positions back a token sees in blocks with a window, its own included.
        sliding_window: Option<usize> = Some(4096),
        /// Every so many blocks have no window.
        sliding_window_pattern: usize = 6,
        /// The attention of each block, in place of `sliding_window_pattern`.
        layer_types: Option<Vec<LayerType>> = None,
        /// Base θ of the rotary frequencies in blocks with a window.
        rope_local_base_freq: f64 = 10_000.,
        /// The limit of logits; none if absent.
        final_logit_softcapping: Option<f64> = None,
        /// Whether tokens see those that follow, which is no causal language model.
        use_bidirectional_attention: bool = false,
    }
}

impl DecoderConfig for Gemma3Config {
    const FAMILY: Family = Family { name: "Gemma 3", model_type: "gemma3_text", architecture: "Gemma3ForCausalLM" };
    const LAYOUT: Layout = Layout { head_norms: true, norms_after: true, ..Layout::GEMMA };

    fn left_out() -> Value {
        json!({
            "head_dim": 256, "max_position_embeddings": 131_072, "num_key_value_heads": 4,
            "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "sliding_window": 4096,
            "tie_word_embeddings": true
        })
    }

    fn check(&self) -> Result<()> {
        if self.use_bidirectional_attention {
            let error = Error::config("attention to later tokens is not computed").key("use_bidirectional_attention");
            return Err(error.help("take the checkpoint of a causal language model"));
        }
        if self.sliding_window_pattern == 0 {
            let error = Error::config("`sliding_window_pattern` must be at least 1, found `0`");
            return Err(error.key("sliding_window_pattern").help("6 is usual"));
        }
        check_positive("rope_local_base_freq", self.rope_local_base_freq, 1e12, "10000")?;
        self.windows().check()
    }

    fn biases(&self) -> Biases {
        Biases::of_attention(self.attention_bias)
    }

    fn query_pre_attn_scalar(&self) -> Option<usize> {
        self.query_pre_attn_scalar
    }

    fn soft_caps(&self) -> SoftCaps {
        SoftCaps { scores: None, logits: self.final_logit_softcapping }
    }

    fn local_theta(&self) -> Option<f64> {
        Some(self.rope_local_base_freq)
    }

    fn window(&self, index: usize) -> Option<usize> {
        self.windows().of_block(index)
    }
}

impl Gemma3Config {
    fn windows(&self) -> Windows<'_> {
        Windows {
            size: self.sliding_window,
            pattern: SlidingPattern::AllButEvery(self.sliding_window_pattern),
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
    fn keys_left_out_are_the_library_s() -> Result<()> {
        let keys = read::<Gemma3Config>(json!({}))?;
        assert_eq!((keys.rope_theta, keys.rope_local_base_freq, keys.sliding_window), (1e6, 1e4, Some(4096)));
        assert_eq!([keys.window(4), keys.window(5)], [Some(4096), None]);
        assert_eq!(keys.soft_caps(), SoftCaps::default());
        Ok(())
    }

    #[test]
    fn both_spellings_of_the_frequencies_read_the_same() -> Result<()> {
        let old = json!({
            "rope_theta": 5e5, "rope_local_base_freq": 2e4, "rope_scaling": { "rope_type": "linear", "factor": 8.0 }
        });
        let new = json!({ "rope_parameters": {
            "full_attention": { "rope_theta": 5e5, "rope_type": "linear", "factor": 8.0 },
            "sliding_attention": { "rope_theta": 2e4, "rope_type": "default" }
        }});
        assert_eq!(read::<Gemma3Config>(old)?, read::<Gemma3Config>(new)?);
        Ok(())
    }

    #[test]
    fn what_is_not_computed_is_refused() {
        for (changes, key) in [
            (json!({ "num_key_value_heads": 1, "use_bidirectional_attention": true }), "use_bidirectional_attention"),
            (json!({ "num_key_value_heads": 1, "sliding_window_pattern": 0 }), "sliding_window_pattern"),
        ] {
            let error = load::<Gemma3Config>(changes).expect_err(key);
            assert_eq!(error.place("key"), Some(key), "{error}");
        }
    }

    #[test]
    fn what_is_written_reads_the_same() -> Result<()> {
        let built = Gemma3Config {
            vocab_size: 5,
            head_dim: Some(16),
            num_key_value_heads: Some(1),
            query_pre_attn_scalar: Some(16),
            ..Default::default()
        };
        survives_writing(built.clone())?;
        survives_writing(Gemma3Config { sliding_window: Some(7), sliding_window_pattern: 2, ..built })
    }
}
