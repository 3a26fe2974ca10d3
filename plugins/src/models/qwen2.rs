//! Qwen2 and Qwen2.5 (Yang et al. 2024): grouped-query attention whose queries, keys and values have biases, and in some
//! models a sliding window in the upper blocks.

use serde_json::{Value, json};
use titer_core::{ModelEntry, Result, SettingsType, inventory};

use super::decoder::{Biases, Decoder, DecoderConfig, Family, decoder_keys};
use super::windows::{LayerType, SlidingPattern, Windows};

inventory::submit! {
    ModelEntry {
        name: "qwen2",
        summary: "Qwen2 and Qwen2.5: grouped-query attention with biases, rotary positions, gated MLP",
        model_types: &["qwen2"],
        settings: SettingsType::of::<Qwen2Config>(),
        version: 1,
        build: Decoder::build::<Qwen2Config>,
        from_config: Decoder::from_config::<Qwen2Config>,
    }
}

decoder_keys! {
    /// The keys of Qwen2's `config.json`.
    Qwen2Config {
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

impl DecoderConfig for Qwen2Config {
    const FAMILY: Family = Family { name: "Qwen2", model_type: "qwen2", architecture: "Qwen2ForCausalLM" };

    fn left_out() -> Value {
        json!({
            "max_position_embeddings": 32_768, "num_key_value_heads": 32, "rms_norm_eps": 1e-6, "sliding_window": 4096
        })
    }

    fn check(&self) -> Result<()> {
        self.windows().check()
    }

    fn biases(&self) -> Biases {
        Biases { qkv: true, ..Biases::default() }
    }

    fn window(&self, index: usize) -> Option<usize> {
        self.windows().of_block(index)
    }
}

impl Qwen2Config {
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

    fn windows(changes: Value) -> Result<[Option<usize>; 2]> {
        let config = read::<Qwen2Config>(changes)?;
        config.check()?;
        Ok([config.window(0), config.window(1)])
    }

    #[test]
    fn the_upper_blocks_slide_if_that_is_asked_for() -> Result<()> {
        let base = json!({ "use_sliding_window": true, "sliding_window": 3, "max_window_layers": 1 });
        let with = |key: &str, value: Value| {
            let mut changes = base.clone();
            changes[key] = value;
            windows(changes)
        };
        assert_eq!(windows(base.clone())?, [None, Some(3)]);
        assert_eq!(with("max_window_layers", json!(0))?, [Some(3), Some(3)]);
        assert_eq!(with("max_window_layers", json!(2))?, [None, None]);
        assert_eq!(with("use_sliding_window", json!(false))?, [None, None]);
        assert_eq!(with("sliding_window", Value::Null)?, [None, None]);
        let upside_down = json!(["sliding_attention", "full_attention"]);
        assert_eq!(with("layer_types", upside_down.clone())?, [Some(3), None]);
        for changes in [json!({ "layer_types": ["full_attention"] }), json!({ "layer_types": upside_down })] {
            let error = windows(changes).expect_err("layer types that do not fit");
            assert_eq!(error.place("key"), Some("layer_types"), "{error}");
        }
        Ok(())
    }

    #[test]
    fn queries_keys_and_values_have_biases_and_nothing_else() -> Result<()> {
        let model = load::<Qwen2Config>(json!({ "num_key_value_heads": 1 }))?;
        let biases = model.params().iter().filter_map(|param| param.name.strip_suffix("_proj.bias"));
        let biases: Vec<&str> = biases.collect();
        let of = |block: usize| ["q", "k", "v"].map(|name| format!("model.layers.{block}.self_attn.{name}"));
        assert_eq!(biases, [of(0), of(1)].concat());
        Ok(())
    }

    #[test]
    fn what_is_written_reads_the_same() -> Result<()> {
        let built = Qwen2Config { vocab_size: 5, num_key_value_heads: Some(4), ..Qwen2Config::default() };
        survives_writing(built.clone())?;
        let layer_types = Some(vec![LayerType::FullAttention, LayerType::SlidingAttention, LayerType::FullAttention]);
        survives_writing(Qwen2Config { use_sliding_window: true, sliding_window: Some(9), layer_types, ..built })
    }
}
