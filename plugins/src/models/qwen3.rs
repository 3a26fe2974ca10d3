//! Qwen3 (Yang et al. 2025): as Qwen2 without its biases, but queries and keys are normalised head by head, and heads
//! have a width of their own.

use serde_json::{Value, json};
use titer_core::{ModelEntry, Result, SettingsType, inventory};

use super::decoder::{Biases, Decoder, DecoderConfig, Family, Layout, decoder_keys};
use super::windows::{LayerType, SlidingPattern, Windows};

inventory::submit! {
    ModelEntry {
        name: "qwen3",
        summary: "Qwen3: grouped-query attention with normalised queries and keys, rotary positions, gated MLP",
        model_types: &["qwen3"],
        settings: SettingsType::of::<Qwen3Config>(),
        version: 1,
        build: Decoder::build::<Qwen3Config>,
        from_config: Decoder::from_config::<Qwen3Config>,
    }
}

decoder_keys! {
    /// The keys of Qwen3's `config.json`.
    Qwen3Config {
        /// Whether the attention projections have biases.
        attention_bias: bool = false,
        /// Whether the blocks from `max_window_layers` on look back no further than `sliding_window`.
        use_sliding_window: bool = false,
        /// How many positions back a token sees in these blocks, its own included; all of them if absent.
        sliding_window: Option<usize> = None,
        /// The first blocks, which have no window.
        max_window_layers: usize = 28,
        /// The attention of each block, in place of `max_window_layers`.
        layer_types: Option<Vec<LayerType>> = None,
    }
}

impl DecoderConfig for Qwen3Config {
    const FAMILY: Family = Family { name: "Qwen3", model_type: "qwen3", architecture: "Qwen3ForCausalLM" };
    const LAYOUT: Layout = Layout { head_norms: true, ..Layout::LLAMA };

    fn left_out() -> Value {
        json!({
            "head_dim": 128, "max_position_embeddings": 32_768, "num_key_value_heads": 32, "rms_norm_eps": 1e-6,
            "sliding_window": 4096
        })
    }

    fn check(&self) -> Result<()> {
        self.windows().check()
    }

    fn biases(&self) -> Biases {
        Biases::of_attention(self.attention_bias)
    }

    fn window(&self, index: usize) -> Option<usize> {
        self.windows().of_block(index)
    }
}

impl Qwen3Config {
    fn windows(&self) -> Windows<'_> {
        Windows {
            size: self.sliding_window.filter(|_| self.use_sliding_window),
            pattern: SlidingPattern::From(self.max_window_layers),
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
    fn each_block_normalises_the_heads_of_queries_and_keys() -> Result<()> {
        let model = load::<Qwen3Config>(json!({ "num_key_value_heads": 1, "head_dim": 6 }))?;
        let norms = model.params().iter().filter(|param| param.name.contains("self_attn") && param.shape.len() == 1);
        let norms: Vec<_> = norms.map(|param| (param.name.clone(), param.shape.clone())).collect();
        let of = |block: usize| {
            ["q", "k"].map(|name| (format!("model.layers.{block}.self_attn.{name}_norm.weight"), vec![6]))
        };
        assert_eq!(norms, [of(0), of(1)].concat());
        Ok(())
    }

    #[test]
    fn keys_left_out_are_the_library_s() -> Result<()> {
        let keys = read::<Qwen3Config>(json!({}))?;
        assert_eq!((keys.head_dim, keys.num_key_value_heads, keys.rms_norm_eps), (Some(128), Some(32), 1e-6));
        assert_eq!((keys.attention_bias, keys.window(30)), (false, None));
        let slides = json!({ "use_sliding_window": true, "max_window_layers": 1 });
        assert_eq!(read::<Qwen3Config>(slides)?.window(1), Some(4096));
        Ok(())
    }

    #[test]
    fn what_is_written_reads_the_same() -> Result<()> {
        let built =
            Qwen3Config { vocab_size: 5, head_dim: Some(16), num_key_value_heads: Some(4), ..Qwen3Config::default() };
        survives_writing(built.clone())?;
        survives_writing(Qwen3Config { attention_bias: true, num_key_value_heads: Some(1), ..built })
    }

    /// Hugging Face's library has no width for heads whose width is null.
    #[test]
    fn the_width_of_heads_is_written() -> Result<()> {
        let settings = json!({ "vocab_size": 5 }).as_object().cloned().unwrap_or_default();
        let built = Decoder::build::<Qwen3Config>(&settings.into())?;
        assert_eq!(built.config()["head_dim"], 16);
        assert_eq!(built.config()["num_key_value_heads"], 4);
        Ok(())
    }
}
