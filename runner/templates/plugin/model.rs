//! A residual network without attention: each token is predicted from the one before it alone. The smallest model that
//! learns anything, and a lower bound for any other.

use std::path::Path;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use titer_core::data::Tokens;
use titer_core::nn::layers::{Embedding, GatedMlp, Linear, RmsNorm, deviation};
use titer_core::weights::{ParamId, ParamList};
use titer_core::{Error, Forward, Model, ModelEntry, ModelSpec, Result, Settings, SettingsType, Traced, inventory};
use titer_core::tensor::ops::{self, Activation};

titer_core::plugin!();

inventory::submit! {
    ModelEntry {
        name: "my-plugin",
        summary: "gated MLPs on a residual stream, no attention",
        model_types: &["my-plugin"],
        settings: SettingsType::of::<MyPluginConfig>(),
        version: 1,
        build: |settings| Ok(Box::new(MyPlugin::new(settings.parse()?)?)),
        from_config: |config: &Value, path: &Path| {
            let config = serde_json::from_value(config.clone())
                .map_err(|error| Error::data(format!("this config.json cannot be used: {error}")).file(path))?;
            Ok(Box::new(MyPlugin::new(config)?))
        },
    }
}

/// The keys of `config.json`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct MyPluginConfig {
    /// Rows of the embedding; set by the tokenizer when a model is built from scratch.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Inner width of the MLPs.
    pub intermediate_size: usize,
    /// Blocks.
    pub num_hidden_layers: usize,
    /// The longest sequence.
    pub max_position_embeddings: usize,
}

impl Default for MyPluginConfig {
    fn default() -> Self {
        Self {
            vocab_size: 0,
            hidden_size: 64,
            intermediate_size: 128,
            num_hidden_layers: 2,
            max_position_embeddings: 128,
        }
    }
}

/// The architecture.
#[derive(Debug)]
pub struct MyPlugin {
    config: MyPluginConfig,
    spec: ModelSpec,
    params: ParamList,
    embedding: Embedding,
    blocks: Vec<(RmsNorm, GatedMlp)>,
    norm: RmsNorm,
    head: Linear,
}

impl MyPlugin {
    /// The architecture of these sizes.
    ///
    /// # Errors
    /// A size is zero.
    pub fn new(config: MyPluginConfig) -> Result<Self> {
        let MyPluginConfig { vocab_size, hidden_size, intermediate_size, num_hidden_layers, max_position_embeddings } =
            config;
        for (key, size) in [
            ("vocab_size", vocab_size),
            ("hidden_size", hidden_size),
            ("intermediate_size", intermediate_size),
            ("num_hidden_layers", num_hidden_layers),
            ("max_position_embeddings", max_position_embeddings),
        ] {
            if size == 0 {
                return Err(Error::config(format!("`{key}` must be at least 1, found `0`")).key(key));
            }
        }
        let mut params = ParamList::default();
        let embedding = Embedding::new(&mut params, "model.embed_tokens", vocab_size, hidden_size, 0.05);
        let block = |index: usize| {
            let (module, sizes) = (format!("model.layers.{index}.mlp"), (hidden_size, intermediate_size));
            let stds = [deviation(None, hidden_size, 1), deviation(None, intermediate_size, num_hidden_layers)];
            params.block(index, |params| {
                let norm = RmsNorm::new(params, &format!("model.layers.{index}.norm"), hidden_size, 1e-5);
                (norm, GatedMlp::new(params, &module, sizes, (false, false), stds, Activation::Silu))
            })
        };
        let blocks = (0..num_hidden_layers).map(block).collect();
        let norm = RmsNorm::new(&mut params, "model.norm", hidden_size, 1e-5);
        let std = deviation(None, hidden_size, 1);
        let head = Linear::head(&mut params, (hidden_size, vocab_size), std);
        let spec = ModelSpec {
            vocab_size,
            hidden_size,
            layers: num_hidden_layers,
            kv_heads: 1,
            head_dim: 1,
            max_positions: max_position_embeddings,
        };
        Ok(Self { config, spec, params, embedding, blocks, norm, head })
    }
}

impl Model for MyPlugin {
    fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    fn params(&self) -> &ParamList {
        &self.params
    }

    fn config(&self) -> Value {
        let mut keys = Settings::of(&self.config).as_map().clone();
        keys.insert("model_type".into(), "my-plugin".into());
        Value::Object(keys)
    }

    fn sites(&self) -> Vec<String> {
        let blocks = (0..self.blocks.len()).map(|index| format!("layer.{index}.mlp_out"));
        std::iter::once("embed".to_owned()).chain(blocks).collect()
    }

    fn embed(&self, tokens: &Tokens, pass: &mut Forward) -> Result<Traced> {
        let embedded = self.embedding.forward(&tokens.ids, pass)?;
        pass.sites.visit("embed", embedded, &mut pass.tape)
    }

    fn block(&self, index: usize, x: &Traced, pass: &mut Forward) -> Result<Traced> {
        let (norm, mlp) = &self.blocks[index];
        let y = norm.forward(x, pass)?;
        let y = mlp.forward(&y, pass)?;
        let y = pass.sites.visit(&format!("layer.{index}.mlp_out"), y, &mut pass.tape)?;
        ops::add(&mut pass.tape, x, &y)
    }

    fn final_norm(&self, x: &Traced, pass: &mut Forward) -> Result<Traced> {
        self.norm.forward(x, pass)
    }

    fn logits(&self, hidden: &Traced, pass: &mut Forward) -> Result<Traced> {
        self.head.forward(hidden, pass)
    }

    fn head(&self) -> Option<ParamId> {
        Some(self.head.weight())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sizes_are_checked_and_written_back() {
        let config = MyPluginConfig { vocab_size: 7, ..Default::default() };
        let model = MyPlugin::new(config.clone()).expect("a model");
        assert_eq!(model.config()["vocab_size"], 7);
        assert_eq!(model.sites(), ["embed", "layer.0.mlp_out", "layer.1.mlp_out"]);
        let error = MyPlugin::new(MyPluginConfig { vocab_size: 0, ..config }).unwrap_err();
        assert_eq!(error.place("key"), Some("vocab_size"));
    }
}
