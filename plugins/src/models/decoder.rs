//! The decoder that most families share: pre-norm blocks of grouped-query attention with rotary positions and a gated
//! MLP. A family is a [`DecoderConfig`]: it says which keys it has, which biases and how far attention looks back.

use std::path::Path;

use schemars::JsonSchema;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use titer_core::bounds;
use titer_core::data::Tokens;
use titer_core::nn::layers::{Embedding, GatedMlp, Linear, RmsNorm, attention, deviation};
use titer_core::tensor::ops;
use titer_core::tensor::ops::{Attention, Rope};
use titer_core::weights::{ParamId, ParamList};
use titer_core::{Error, Forward, Model, ModelSpec, Result, Settings, Traced};

use super::rope_scaling::{RopeScaling, normalise};
use super::{
    all_sites, block_sites, check_count, check_deviation, check_heads, check_positive, check_sizes, in_checkpoint,
    keys_of, read_keys, refuse, require,
};

/// Declares the keys of a family of decoders: those of all families and, with a default each, those of its own.
macro_rules! decoder_keys {
    ($(#[$about:meta])* $name:ident { $($own:tt)* }) => {
        $crate::models::model_keys! {
            $(#[$about])*
            $name {
                /// Inner width of the MLP.
                intermediate_size: usize = 176,
                /// Key/value heads; as many as query heads if absent.
                num_key_value_heads: Option<usize> = None,
                /// Width of a head; `hidden_size / num_attention_heads` if absent.
                head_dim: Option<usize> = None,
                /// ε of the norms.
                rms_norm_eps: f64 = 1e-5,
                /// Base θ of the rotary frequencies.
                rope_theta: f64 = 10_000.,
                /// How the frequencies are stretched for long contexts.
                rope_scaling: Option<$crate::models::rope_scaling::RopeScaling> = None,
                /// Whether the head shares the embedding's matrix.
                tie_word_embeddings: bool = false,
                /// Standard deviation of fresh weights; by fan-in (`1/√in`, residual projections `1/√(2 L in)`) if
                /// absent.
                initializer_range: Option<f64> = None,
                $($own)*
            }
        }

        impl $crate::models::decoder::CommonKeys for $name {
            fn common(&self) -> $crate::models::decoder::DecoderKeys {
                $crate::models::decoder::DecoderKeys {
                    vocab_size: self.vocab_size,
                    hidden_size: self.hidden_size,
                    num_hidden_layers: self.num_hidden_layers,
                    num_attention_heads: self.num_attention_heads,
                    max_position_embeddings: self.max_position_embeddings,
                    intermediate_size: self.intermediate_size,
                    num_key_value_heads: self.num_key_value_heads,
                    head_dim: self.head_dim,
                    rms_norm_eps: self.rms_norm_eps,
                    rope_theta: self.rope_theta,
                    rope_scaling: self.rope_scaling.clone(),
                    tie_word_embeddings: self.tie_word_embeddings,
                    initializer_range: self.initializer_range,
                }
            }
        }
    };
}
pub(super) use decoder_keys;

decoder_keys! {
    /// The keys of `config.json` that all families have.
    DecoderKeys {}
}

/// A configuration that has the keys of all families.
pub trait CommonKeys {
    /// These keys.
    fn common(&self) -> DecoderKeys;
}

impl DecoderKeys {
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

    fn rope(&self) -> Rope {
        let scaling = self.rope_scaling.as_ref().unwrap_or(&RopeScaling::Default);
        let frequencies = Rope::frequencies(self.heads().width, self.rope_theta);
        let frequencies: Vec<f32> = frequencies.into_iter().map(|frequency| scaling.apply(frequency)).collect();
        Rope::new(&frequencies, self.max_position_embeddings)
    }

    fn spec(&self) -> ModelSpec {
        let heads = self.heads();
        ModelSpec {
            vocab_size: self.vocab_size,
            hidden_size: self.hidden_size,
            layers: self.num_hidden_layers,
            kv_heads: heads.key_value,
            head_dim: heads.width,
            max_positions: self.max_position_embeddings,
        }
    }

    /// Sizes that no tensor operation should have to find out about.
    fn check(&self) -> Result<()> {
        check_sizes([
            ("vocab_size", self.vocab_size, bounds::VOCABULARY),
            ("hidden_size", self.hidden_size, bounds::WIDTH),
            ("intermediate_size", self.intermediate_size, bounds::WIDTH),
            ("num_hidden_layers", self.num_hidden_layers, bounds::LAYERS),
            ("num_attention_heads", self.num_attention_heads, bounds::WIDTH),
            ("num_key_value_heads", self.heads().key_value, bounds::WIDTH),
            ("max_position_embeddings", self.max_position_embeddings, bounds::POSITIONS),
            ("head_dim", self.heads().width, bounds::WIDTH),
        ])?;
        check_positive("rms_norm_eps", self.rms_norm_eps, 1., "1e-5")?;
        check_positive("rope_theta", self.rope_theta, 1e12, "10000")?;
        check_deviation("initializer_range", self.initializer_range)?;
        if let Some(scaling) = &self.rope_scaling {
            scaling.check()?;
        }
        let heads = self.heads();
        if self.head_dim.is_none() {
            check_heads(self.hidden_size, heads.query)?;
        }
        if heads.width == 0 || !heads.width.is_multiple_of(2) {
            let message = format!("rotary positions need heads of even width, found {}", heads.width);
            return Err(Error::config(message).key("head_dim").help("change `head_dim`, or width and heads"));
        }
        if !heads.query.is_multiple_of(heads.key_value) {
            let message = format!("{} query heads cannot share {} key/value heads", heads.query, heads.key_value);
            let error = Error::config(message).key("num_key_value_heads");
            return Err(error.help("choose a number that divides `num_attention_heads`"));
        }
        Ok(())
    }
}

/// Which projections have biases.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Biases {
    /// Those of queries, keys and values.
    pub qkv: bool,
    /// The one behind attention.
    pub o: bool,
    /// Those of the MLP.
    pub mlp: bool,
}

/// How a family is called.
#[derive(Debug, Clone, Copy)]
pub struct Family {
    /// In messages.
    pub name: &'static str,
    /// In `model_type` of `config.json`.
    pub model_type: &'static str,
    /// In `architectures` of `config.json`.
    pub architecture: &'static str,
}

/// The configuration of a family of decoders, declared by `decoder_keys!`.
pub trait DecoderConfig: CommonKeys + Serialize + DeserializeOwned + JsonSchema {
    /// How the family is called.
    const FAMILY: Family;

    /// Whether queries and keys are normalised, each head by itself, before they are rotated.
    const HEAD_NORMS: bool = false;

    /// What Hugging Face's library takes for keys that a `config.json` leaves out, where it differs from the default
    /// here. A null is no key left out.
    fn left_out() -> Value {
        json!({})
    }

    /// Fails if the keys of the family's own contradict the others.
    ///
    /// # Errors
    /// They do.
    fn check(&self) -> Result<()> {
        Ok(())
    }

    /// Which projections have biases.
    fn biases(&self) -> Biases {
        Biases::default()
    }

    /// How many positions back the tokens see in block `index`, their own included; all of them if absent.
    fn window(&self, index: usize) -> Option<usize>;
}

/// One transformer block.
#[derive(Debug)]
struct DecoderBlock {
    sites: [String; 3],
    attention: Attention,
    input_norm: RmsNorm,
    q: Linear,
    k: Linear,
    v: Linear,
    /// Those of queries and keys.
    head_norms: Option<[RmsNorm; 2]>,
    o: Linear,
    mlp_norm: RmsNorm,
    mlp: GatedMlp,
}

impl DecoderBlock {
    fn new<C: DecoderConfig>(params: &mut ParamList, config: &C, window: Option<usize>, index: usize) -> Self {
        let (keys, biases) = (config.common(), config.biases());
        let module = |name: &str| format!("model.layers.{index}.{name}");
        let (heads, width, inner) = (keys.heads(), keys.hidden_size, keys.intermediate_size);
        let residual = 2 * keys.num_hidden_layers;
        let std = |input: usize, branches: usize| deviation(keys.initializer_range, input, branches);
        let (all, shared) = (heads.query * heads.width, heads.key_value * heads.width);
        let mut linear = |name: &str, sizes: (usize, usize), bias: bool, branches: usize| {
            Linear::new(params, &module(&format!("self_attn.{name}")), sizes, bias, std(sizes.0, branches))
        };
        let q = linear("q_proj", (width, all), biases.qkv, 1);
        let k = linear("k_proj", (width, shared), biases.qkv, 1);
        let v = linear("v_proj", (width, shared), biases.qkv, 1);
        let o = linear("o_proj", (all, width), biases.o, residual);
        let mut head_norm = |name: &str| RmsNorm::new(params, &module(name), heads.width, keys.rms_norm_eps);
        let head_norms = C::HEAD_NORMS.then(|| ["self_attn.q_norm", "self_attn.k_norm"].map(&mut head_norm));
        let stds = [std(width, 1), std(inner, residual)];
        Self {
            sites: block_sites(index),
            attention: Attention { window, ..heads },
            q,
            k,
            v,
            head_norms,
            o,
            mlp: GatedMlp::new(params, &module("mlp"), (width, inner), biases.mlp, stds),
            input_norm: RmsNorm::new(params, &module("input_layernorm"), width, keys.rms_norm_eps),
            mlp_norm: RmsNorm::new(params, &module("post_attention_layernorm"), width, keys.rms_norm_eps),
        }
    }

    fn forward(&self, index: usize, x: &Traced, pass: &mut Forward) -> Result<Traced> {
        let [attn_out, mlp_out, block_out] = &self.sites;
        let y = self.input_norm.forward(x, pass)?;
        let [q, k, v] = Linear::forward_all([&self.q, &self.k, &self.v], &y, pass)?;
        let [q, k] = match &self.head_norms {
            Some([q_norm, k_norm]) => [q_norm.forward(&q, pass)?, k_norm.forward(&k, pass)?],
            None => [q, k],
        };
        let rotation = pass.rotation.clone().ok_or_else(|| Error::run("the positions of the pass are not set"))?;
        let [q, k] = ops::rotate(&mut pass.tape, [&q, &k], &rotation)?;
        let y = attention(self.attention, [&q, &k, &v], index, pass)?;
        let y = self.o.forward(&y, pass)?;
        let y = pass.sites.visit(attn_out, y, &mut pass.tape)?;
        let [x, y] = self.mlp_norm.after_residual(x, &y, pass)?;
        let y = self.mlp.forward(&y, pass)?;
        let y = pass.sites.visit(mlp_out, y, &mut pass.tape)?;
        let x = ops::add(&mut pass.tape, &x, &y)?;
        pass.sites.visit(block_out, x, &mut pass.tape)
    }
}

/// A decoder of one of the families.
#[derive(Debug)]
pub struct Decoder {
    /// The `config.json`; a checkpoint's own is written back unchanged.
    config: Value,
    spec: ModelSpec,
    params: ParamList,
    rope: Rope,
    embedding: Embedding,
    blocks: Vec<DecoderBlock>,
    norm: RmsNorm,
    head: Option<Linear>,
}

impl Decoder {
    fn new<C: DecoderConfig>(config: &C) -> Result<Self> {
        let keys = config.common();
        keys.check()?;
        config.check()?;
        let windows: Vec<Option<usize>> = (0..keys.num_hidden_layers).map(|index| config.window(index)).collect();
        check_sizes(windows.iter().flatten().map(|&window| ("sliding_window", window, usize::MAX)))?;
        let (vocabulary, width, std) = (keys.vocab_size, keys.hidden_size, keys.initializer_range);
        let mut params = ParamList::default();
        let embedding = Embedding::new(&mut params, "model.embed_tokens", vocabulary, width, std.unwrap_or(0.05));
        let block = |(index, window)| params.block(index, |params| DecoderBlock::new(params, config, window, index));
        let blocks = windows.into_iter().enumerate().map(block).collect();
        let norm = RmsNorm::new(&mut params, "model.norm", width, keys.rms_norm_eps);
        let head = (!keys.tie_word_embeddings)
            .then(|| Linear::head(&mut params, (width, vocabulary), deviation(std, width, 1)));
        check_count(&params)?;
        let (spec, rope) = (keys.spec(), keys.rope());
        Ok(Self { config: written(config), spec, params, rope, embedding, blocks, norm, head })
    }

    /// The model of these settings, for a [`ModelEntry`](titer_core::ModelEntry).
    ///
    /// # Errors
    /// A setting is unknown, or the sizes contradict one another.
    pub fn build<C: DecoderConfig>(settings: &Settings) -> Result<Box<dyn Model>> {
        Ok(Box::new(Self::new::<C>(&settings.parse()?)?))
    }

    /// The model that a checkpoint's `config.json` describes, for a [`ModelEntry`](titer_core::ModelEntry).
    ///
    /// # Errors
    /// A key is missing, or asks for something this model does not compute.
    pub fn from_config<C: DecoderConfig>(original: &Value, path: &Path) -> Result<Box<dyn Model>> {
        let model = Self::new::<C>(&read(original, path)?).map_err(|error| in_checkpoint(error, path))?;
        Ok(Box::new(Self { config: original.clone(), ..model }))
    }
}

/// Keys that every model has a value for: a null is one left out.
const NEVER_NULL: [&str; 3] = ["max_position_embeddings", "rms_norm_eps", "rope_theta"];

/// The configuration that the `config.json` at `path` stands for.
fn read<C: DecoderConfig>(original: &Value, path: &Path) -> Result<C> {
    let family = C::FAMILY.name;
    let sizes = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"];
    require(family, &sizes, original, path)?;
    if let Some(other) = original["hidden_act"].as_str().filter(|&name| name != "silu") {
        let message = format!("unsupported activation `{other}`");
        return Err(refuse("hidden_act", message, path).help(format!("{family} models use `silu`")));
    }
    let mut keys = original.clone();
    if let Some(keys) = keys.as_object_mut() {
        keys.retain(|key, value| !(value.is_null() && NEVER_NULL.contains(&key.as_str())));
    }
    let mut keys = with_left_out(keys, C::left_out());
    normalise(&mut keys);
    read_keys(family, keys, path)
}

/// The `config.json` of a model that was built here.
fn written<C: DecoderConfig>(config: &C) -> Value {
    let mut keys = keys_of(config, C::FAMILY.model_type, C::FAMILY.architecture);
    keys["hidden_act"] = json!("silu");
    // A key that is not set would be read as one left out.
    let value = |key: &str| if key == "head_dim" { json!(config.common().heads().width) } else { Value::Null };
    let set = C::left_out().as_object().into_iter().flatten().map(|(key, _)| (key.clone(), value(key))).collect();
    with_left_out(keys, Value::Object(set))
}

/// `keys` with those of `others` that it has not.
fn with_left_out(keys: Value, others: Value) -> Value {
    match (keys, others) {
        (Value::Object(keys), Value::Object(mut all)) => {
            all.extend(keys);
            Value::Object(all)
        }
        (keys, _) => keys,
    }
}

impl Model for Decoder {
    fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    fn params(&self) -> &ParamList {
        &self.params
    }

    fn config(&self) -> Value {
        self.config.clone()
    }

    fn sites(&self) -> Vec<String> {
        all_sites(self.blocks.len())
    }

    fn embed(&self, tokens: &Tokens, pass: &mut Forward) -> Result<Traced> {
        let embedded = self.embedding.forward(&tokens.ids, pass)?;
        pass.rotation = Some(self.rope.at(pass.mask()?, embedded.tensor())?);
        pass.sites.visit("embed", embedded, &mut pass.tape)
    }

    fn block(&self, index: usize, x: &Traced, pass: &mut Forward) -> Result<Traced> {
        self.blocks[index].forward(index, x, pass)
    }

    fn final_norm(&self, x: &Traced, pass: &mut Forward) -> Result<Traced> {
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

/// What the tests of the families share.
#[cfg(test)]
pub(super) mod check {
    use super::*;

    fn config(changes: Value) -> Value {
        let sizes = json!({
            "vocab_size": 11, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2
        });
        with_left_out(changes, sizes)
    }

    /// A small configuration of the family with these keys changed.
    pub(in crate::models) fn read<C: DecoderConfig>(changes: Value) -> Result<C> {
        super::read(&config(changes), Path::new("config.json"))
    }

    /// The model of the same.
    pub(in crate::models) fn load<C: DecoderConfig>(changes: Value) -> Result<Box<dyn Model>> {
        Decoder::from_config::<C>(&config(changes), Path::new("config.json"))
    }

    /// Fails unless what is written of a model built from `config` reads as `config` again.
    pub(in crate::models) fn survives_writing<C: DecoderConfig + PartialEq + std::fmt::Debug>(config: C) -> Result<()> {
        let written = Decoder::new(&config)?.config();
        assert_eq!(super::read::<C>(&written, Path::new("config.json"))?, config, "{written}");
        Ok(())
    }
}
