//! Llama 1, 2 and 3 (Touvron et al. 2023; Grattafiori et al. 2024): pre-norm blocks of grouped-query attention with
//! rotary positions and a gated MLP.

use std::path::Path;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use titer_core::data::Tokens;
use titer_core::layers::{Embedding, GatedMlp, Linear, RmsNorm, attention, deviation};
use titer_core::ops::{self, Attention, Rope};
use titer_core::weights::{HEAD, ParamId, ParamList};
use titer_core::{Error, Forward, Model, ModelEntry, ModelSpec, Result, SettingsType, Traced, inventory};

use super::{block_sites, check_heads, check_sizes, keys_of, read_keys, refuse, require};

inventory::submit! {
    ModelEntry {
        name: "llama",
        summary: "Llama 1, 2 and 3: grouped-query attention, rotary positions, gated MLP",
        model_types: &["llama"],
        settings: SettingsType::of::<LlamaConfig>(),
        version: 3,
        build: |settings| Ok(Box::new(Llama::new(settings.parse()?)?)),
        from_config: |config, path| Ok(Box::new(Llama::from_config(config, path)?)),
    }
}

/// The keys of `config.json` that shape the computation. The defaults are the small model of the embedded world.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct LlamaConfig {
    /// Rows of the embedding; set by the tokenizer when a model is built from scratch.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Inner width of the MLP.
    pub intermediate_size: usize,
    /// Transformer blocks.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key/value heads; as many as query heads if absent.
    pub num_key_value_heads: Option<usize>,
    /// Width of a head; `hidden_size / num_attention_heads` if absent.
    pub head_dim: Option<usize>,
    /// The longest sequence.
    pub max_position_embeddings: usize,
    /// ε of the norms.
    pub rms_norm_eps: f64,
    /// Base θ of the rotary frequencies.
    pub rope_theta: f64,
    /// How the frequencies are stretched for long contexts.
    pub rope_scaling: Option<RopeScaling>,
    /// Whether the head shares the embedding's matrix.
    pub tie_word_embeddings: bool,
    /// Whether the attention projections have biases.
    pub attention_bias: bool,
    /// Whether the MLP's projections have biases.
    pub mlp_bias: bool,
    /// Standard deviation of fresh weights; by fan-in (`1/√in`, residual projections `1/√(2 L in)`) if absent.
    pub initializer_range: Option<f64>,
}

impl Default for LlamaConfig {
    fn default() -> Self {
        Self {
            vocab_size: 0,
            hidden_size: 64,
            intermediate_size: 176,
            num_hidden_layers: 3,
            num_attention_heads: 4,
            num_key_value_heads: None,
            head_dim: None,
            max_position_embeddings: 128,
            rms_norm_eps: 1e-5,
            rope_theta: 10_000.,
            rope_scaling: None,
            tie_word_embeddings: false,
            attention_bias: false,
            mlp_bias: false,
            initializer_range: None,
        }
    }
}

/// `rope_scaling` of `config.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "rope_type", rename_all = "snake_case")]
pub enum RopeScaling {
    /// None.
    Default,
    /// Every frequency divided by `factor`.
    Linear {
        /// The factor.
        factor: f64,
    },
    /// Llama 3.1: low frequencies divided by `factor`, high ones kept, a smooth change between.
    Llama3 {
        /// The factor on low frequencies.
        factor: f64,
        /// Wavelengths above `original_max_position_embeddings / low_freq_factor` are low frequencies.
        low_freq_factor: f64,
        /// Wavelengths below `original_max_position_embeddings / high_freq_factor` are high frequencies.
        high_freq_factor: f64,
        /// Context length of the pretraining.
        original_max_position_embeddings: f64,
    },
}

impl RopeScaling {
    fn apply(&self, frequency: f32) -> f32 {
        match *self {
            RopeScaling::Default => frequency,
            RopeScaling::Linear { factor } => frequency / factor as f32,
            RopeScaling::Llama3 {
                factor,
                low_freq_factor: low,
                high_freq_factor: high,
                original_max_position_embeddings: context,
            } => {
                let wavelength = std::f64::consts::TAU / f64::from(frequency);
                if wavelength < context / high {
                    frequency
                } else if wavelength > context / low {
                    frequency / factor as f32
                } else {
                    let smooth = ((context / wavelength - low) / (high - low)) as f32;
                    (1. - smooth) * frequency / factor as f32 + smooth * frequency
                }
            }
        }
    }
}

impl LlamaConfig {
    fn heads(&self) -> Attention {
        let width = self.head_dim.unwrap_or(self.hidden_size / self.num_attention_heads.max(1));
        Attention {
            query: self.num_attention_heads,
            key_value: self.num_key_value_heads.unwrap_or(self.num_attention_heads),
            width,
            scale: 1. / (width as f64).sqrt(),
            window: None,
        }
    }

    /// Sizes that no tensor operation should have to find out about.
    fn check(&self) -> Result<()> {
        check_sizes([
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.heads().key_value),
            ("max_position_embeddings", self.max_position_embeddings),
        ])?;
        let heads = self.heads();
        if self.head_dim.is_none() {
            check_heads(self.hidden_size, heads.query)?;
        }
        if heads.width == 0 || !heads.width.is_multiple_of(2) {
            let message = format!("rotary positions need heads of even width, found {}", heads.width);
            return Err(Error::config(message).key("head_dim"));
        }
        if !heads.query.is_multiple_of(heads.key_value) {
            let message = format!("{} query heads cannot share {} key/value heads", heads.query, heads.key_value);
            return Err(Error::config(message).key("num_key_value_heads"));
        }
        Ok(())
    }
}

/// One transformer block.
#[derive(Debug)]
struct Block {
    sites: [String; 3],
    input_norm: RmsNorm,
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    mlp_norm: RmsNorm,
    mlp: GatedMlp,
}

impl Block {
    fn new(params: &mut ParamList, config: &LlamaConfig, index: usize) -> Self {
        let module = |name: &str| format!("model.layers.{index}.{name}");
        let (heads, width, inner) = (config.heads(), config.hidden_size, config.intermediate_size);
        let residual = 2 * config.num_hidden_layers;
        let std = |input: usize, branches: usize| deviation(config.initializer_range, input, branches);
        let (all, shared) = (heads.query * heads.width, heads.key_value * heads.width);
        let mut linear = |name: &str, sizes: (usize, usize), branches: usize| {
            let module = module(&format!("self_attn.{name}"));
            Linear::new(params, &module, sizes, config.attention_bias, std(sizes.0, branches))
        };
        let q = linear("q_proj", (width, all), 1);
        let k = linear("k_proj", (width, shared), 1);
        let v = linear("v_proj", (width, shared), 1);
        let o = linear("o_proj", (all, width), residual);
        let stds = [std(width, 1), std(inner, residual)];
        Self {
            sites: block_sites(index),
            q,
            k,
            v,
            o,
            mlp: GatedMlp::new(params, &module("mlp"), (width, inner), config.mlp_bias, stds),
            input_norm: RmsNorm::new(params, &module("input_layernorm"), width, config.rms_norm_eps),
            mlp_norm: RmsNorm::new(params, &module("post_attention_layernorm"), width, config.rms_norm_eps),
        }
    }

    fn forward(&self, index: usize, x: &Traced, heads: Attention, pass: &mut Forward) -> Result<Traced> {
        let [attn_out, mlp_out, block_out] = &self.sites;
        let y = self.input_norm.forward(x, pass)?;
        let [q, k, v] = [self.q.forward(&y, pass)?, self.k.forward(&y, pass)?, self.v.forward(&y, pass)?];
        let rotation = pass.rotation.clone().ok_or_else(|| Error::run("the positions of the pass are not set"))?;
        let [q, k] = [ops::rotate(&mut pass.tape, &q, &rotation)?, ops::rotate(&mut pass.tape, &k, &rotation)?];
        let y = attention(heads, [&q, &k, &v], index, pass)?;
        let y = self.o.forward(&y, pass)?;
        let y = pass.sites.visit(attn_out, y, &mut pass.tape)?;
        let x = ops::add(&mut pass.tape, x, &y)?;
        let y = self.mlp_norm.forward(&x, pass)?;
        let y = self.mlp.forward(&y, pass)?;
        let y = pass.sites.visit(mlp_out, y, &mut pass.tape)?;
        let x = ops::add(&mut pass.tape, &x, &y)?;
        pass.sites.visit(block_out, x, &mut pass.tape)
    }
}

/// The architecture.
#[derive(Debug)]
pub struct Llama {
    config: LlamaConfig,
    /// The checkpoint's own `config.json`, written back unchanged.
    original: Option<Value>,
    spec: ModelSpec,
    params: ParamList,
    heads: Attention,
    rope: Rope,
    embedding: Embedding,
    blocks: Vec<Block>,
    norm: RmsNorm,
    head: Option<Linear>,
}

impl Llama {
    /// The architecture of these sizes.
    ///
    /// # Errors
    /// The sizes contradict one another.
    pub fn new(config: LlamaConfig) -> Result<Self> {
        config.check()?;
        let (heads, width) = (config.heads(), config.hidden_size);
        let mut params = ParamList::default();
        let std = config.initializer_range;
        let embedding =
            Embedding::new(&mut params, "model.embed_tokens", config.vocab_size, width, std.unwrap_or(0.05));
        let blocks = (0..config.num_hidden_layers).map(|index| Block::new(&mut params, &config, index)).collect();
        let norm = RmsNorm::new(&mut params, "model.norm", width, config.rms_norm_eps);
        let head = (!config.tie_word_embeddings)
            .then(|| Linear::new(&mut params, HEAD, (width, config.vocab_size), false, deviation(std, width, 1)));
        let scaling = config.rope_scaling.clone().unwrap_or(RopeScaling::Default);
        let frequencies = Rope::frequencies(heads.width, config.rope_theta);
        let frequencies: Vec<f32> = frequencies.into_iter().map(|frequency| scaling.apply(frequency)).collect();
        let spec = ModelSpec {
            vocab_size: config.vocab_size,
            hidden_size: width,
            layers: config.num_hidden_layers,
            kv_heads: heads.key_value,
            head_dim: heads.width,
            max_positions: config.max_position_embeddings,
        };
        let rope = Rope::new(&frequencies, config.max_position_embeddings);
        Ok(Self { config, original: None, spec, params, heads, rope, embedding, blocks, norm, head })
    }

    /// The architecture that a checkpoint's `config.json` describes.
    ///
    /// # Errors
    /// A key is missing, or asks for something this model does not compute.
    pub fn from_config(original: &Value, path: &Path) -> Result<Self> {
        let sizes = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"];
        require("Llama", &sizes, original, path)?;
        match original["hidden_act"].as_str() {
            None | Some("silu") => {}
            Some(other) => {
                let message = format!("unsupported activation `{other}`");
                return Err(refuse("hidden_act", message, path).help("Llama models use `silu`"));
            }
        }
        let mut keys = original.clone();
        normalise(&mut keys);
        let model = Self::new(read_keys("Llama", keys, path)?).map_err(|error| error.file(path))?;
        Ok(Self { original: Some(original.clone()), ..model })
    }
}

/// Brings the spellings of different library versions to one: `rope_parameters` (newer) to `rope_theta` and
/// `rope_scaling`, `type` (older) to `rope_type`; a null is a key left out.
fn normalise(config: &mut Value) {
    let Some(map) = config.as_object_mut() else { return };
    map.retain(|_, value| !value.is_null());
    if let Some(mut rope) = map.remove("rope_parameters") {
        if let Some(theta) = rope.as_object_mut().and_then(|rope| rope.remove("rope_theta")) {
            map.insert("rope_theta".into(), theta);
        }
        map.insert("rope_scaling".into(), rope);
    }
    if let Some(rope) = map.get_mut("rope_scaling").and_then(Value::as_object_mut)
        && let Some(kind) = rope.remove("type")
    {
        rope.entry("rope_type").or_insert(kind);
    }
}

impl Model for Llama {
    fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    fn params(&self) -> &ParamList {
        &self.params
    }

    fn config(&self) -> Value {
        if let Some(original) = &self.original {
            return original.clone();
        }
        let mut config = keys_of(&self.config, "llama", "LlamaForCausalLM");
        config["hidden_act"] = json!("silu");
        config
    }

    fn sites(&self) -> Vec<String> {
        std::iter::once("embed".to_owned()).chain(self.blocks.iter().flat_map(|block| block.sites.clone())).collect()
    }

    fn embed(&self, tokens: &Tokens, pass: &mut Forward) -> Result<Traced> {
        let embedded = self.embedding.forward(&tokens.ids, pass)?;
        pass.rotation = Some(self.rope.at(&pass.visibility()?.positions, embedded.tensor())?);
        pass.sites.visit("embed", embedded, &mut pass.tape)
    }

    fn block(&self, index: usize, x: &Traced, pass: &mut Forward) -> Result<Traced> {
        self.blocks[index].forward(index, x, self.heads, pass)
    }

    fn finish(&self, x: &Traced, pass: &mut Forward) -> Result<Traced> {
        self.norm.forward(x, pass)
    }

    fn logits(&self, hidden: &Traced, pass: &mut Forward) -> Result<Traced> {
        match &self.head {
            Some(head) => head.forward(hidden, pass),
            None => self.embedding.logits(hidden, pass),
        }
    }

    fn head(&self) -> Option<ParamId> {
        Some(self.head.as_ref().map_or(self.embedding.weight(), Linear::weight))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(changes: Value) -> Value {
        let mut config = json!({
            "model_type": "llama", "vocab_size": 11, "hidden_size": 8, "intermediate_size": 12,
            "num_hidden_layers": 2, "num_attention_heads": 2
        });
        config.as_object_mut().expect("a table").extend(changes.as_object().expect("a table").clone());
        config
    }

    fn load(changes: Value) -> Result<Llama> {
        Llama::from_config(&config(changes), Path::new("config.json"))
    }

    #[test]
    fn reads_the_spellings_of_all_library_versions() -> Result<()> {
        let scaling = json!({
            "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64
        });
        let with = |key: &str, extra: Value| {
            let mut scaling = scaling.clone();
            scaling.as_object_mut().expect("a table").extend(extra.as_object().expect("a table").clone());
            load(json!({ key: scaling, "num_key_value_heads": null }))
        };
        let old = with("rope_scaling", json!({ "type": "llama3" }))?;
        let new = with("rope_scaling", json!({ "rope_type": "llama3" }))?;
        let newest = with("rope_parameters", json!({ "rope_type": "llama3", "rope_theta": 10000.0 }))?;
        assert_eq!(old.config, new.config);
        assert_eq!(old.config, newest.config);
        assert_eq!(old.heads.key_value, 2);
        Ok(())
    }

    #[test]
    fn llama_3_scaling_keeps_high_frequencies_and_stretches_low_ones() {
        let scaling = RopeScaling::Llama3 {
            factor: 8.,
            low_freq_factor: 1.,
            high_freq_factor: 4.,
            original_max_position_embeddings: 8192.,
        };
        assert_eq!(scaling.apply(1.), 1.);
        assert_eq!(scaling.apply(1e-5), 1e-5 / 8.);
        let between = scaling.apply(0.0015);
        assert!(between < 0.0015 && between > 0.0015 / 8., "{between}");
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
            let error = load(changes).expect_err(key);
            assert_eq!(error.place("key"), Some(key), "{error}");
            assert!(error.place("file").is_some(), "{error}");
        }
        let error = load(json!({ "rope_scaling": { "rope_type": "yarn", "factor": 2.0 } })).expect_err("yarn");
        assert!(error.to_string().contains("yarn"), "{error}");
    }

    #[test]
    fn names_are_those_of_the_checkpoints() -> Result<()> {
        let untied = load(json!({}))?;
        let names: Vec<&str> = untied.params().iter().map(|param| param.name.as_str()).collect();
        assert_eq!(names[0], "model.embed_tokens.weight");
        assert!(names.contains(&"model.layers.1.self_attn.q_proj.weight"));
        assert!(names.contains(&"model.layers.1.post_attention_layernorm.weight"));
        assert_eq!(names.last(), Some(&"lm_head.weight"));
        assert!(
            load(json!({ "tie_word_embeddings": true }))?.params().iter().all(|param| param.name != "lm_head.weight")
        );
        Ok(())
    }
}
