//! The decoder that most families share: pre-norm blocks of grouped-query attention with rotary positions and a gated
//! MLP. A family is a [`DecoderConfig`]: it says which keys it has, which biases, how far attention looks back, and what else
//! it does differently from Llama.

use std::path::Path;

use schemars::JsonSchema;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use titer_core::bounds;
use titer_core::data::Tokens;
use titer_core::nn::layers::{Embedding, GatedMlp, Linear, Linears, RmsNorm, attention, deviation};
use titer_core::tensor::ops;
use titer_core::tensor::ops::{Activation, Attention, Rope};
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
            cap: None,
        }
    }

    /// The table of frequencies on the base `theta`.
    fn rope(&self, theta: f64, scaling: &RopeScaling) -> Rope {
        let frequencies = Rope::frequencies(self.heads().width, theta);
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

impl Biases {
    /// All of attention's, or none.
    pub fn of_attention(biased: bool) -> Self {
        Self { qkv: biased, o: biased, mlp: false }
    }
}

/// How a family computes, where families differ.
#[expect(clippy::struct_excessive_bools, reason = "families differ in these ways independently")]
#[derive(Debug, Clone, Copy)]
pub struct Layout {
    /// Whether queries and keys are normalised, each head by itself, before they are rotated.
    pub head_norms: bool,
    /// Whether what attention and the MLP give is normalised before it is added to the residual stream.
    pub norms_after: bool,
    /// Whether the weights of norms hold their scale less one.
    pub norms_above_one: bool,
    /// Whether embeddings are multiplied by √`hidden_size`.
    pub scaled_embedding: bool,
    /// Whether queries, keys and values are one matrix, `qkv_proj`, and the gated MLP's two likewise, `gate_up_proj`.
    pub fused: bool,
    /// The activation of the MLP's gate.
    pub activation: Activation,
    /// The key of `config.json` that names the activation, and the names that stand for it.
    pub activation_key: (&'static str, &'static [&'static str]),
}

impl Layout {
    /// Llama's.
    pub const LLAMA: Self = Self {
        head_norms: false,
        norms_after: false,
        norms_above_one: false,
        scaled_embedding: false,
        fused: false,
        activation: Activation::Silu,
        activation_key: ("hidden_act", &["silu"]),
    };

    /// That of the first Gemma. Its `gelu` was meant to be the tanh form, which is what the library computes.
    pub const GEMMA: Self = Self {
        norms_above_one: true,
        scaled_embedding: true,
        activation: Activation::GeluTanh,
        activation_key: ("hidden_activation", &["gelu_pytorch_tanh", "gelu"]),
        ..Self::LLAMA
    };

    fn norm(&self, params: &mut ParamList, module: &str, width: usize, eps: f64) -> RmsNorm {
        let new = if self.norms_above_one { RmsNorm::above_one } else { RmsNorm::new };
        new(params, module, width, eps)
    }
}

/// Where a family bends numbers towards a limit.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct SoftCaps {
    /// The scores of attention.
    pub scores: Option<f64>,
    /// The logits.
    pub logits: Option<f64>,
}

impl SoftCaps {
    fn check(self) -> Result<()> {
        for (key, cap, usual) in
            [("attn_logit_softcapping", self.scores, "50"), ("final_logit_softcapping", self.logits, "30")]
        {
            cap.map_or(Ok(()), |cap| check_positive(key, cap, 1e6, usual))?;
        }
        Ok(())
    }
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

    /// How it computes.
    const LAYOUT: Layout = Layout::LLAMA;

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

    /// The number whose inverse root scales the scores of attention; the width of a head if absent.
    fn query_pre_attn_scalar(&self) -> Option<usize> {
        None
    }

    /// Where numbers are bent towards a limit.
    fn soft_caps(&self) -> SoftCaps {
        SoftCaps::default()
    }

    /// Base θ of the rotary frequencies in blocks with a window, where these have frequencies of their own.
    fn local_theta(&self) -> Option<f64> {
        None
    }

    /// How many positions back the tokens see in block `index`, their own included; all of them if absent.
    fn window(&self, index: usize) -> Option<usize>;
}

/// One transformer block.
#[derive(Debug)]
struct DecoderBlock {
    sites: [String; 3],
    attention: Attention,
    /// Which of the model's tables of rotary frequencies it uses.
    rope: usize,
    input_norm: RmsNorm,
    qkv: Linears<3>,
    /// Those of queries and keys.
    head_norms: Option<[RmsNorm; 2]>,
    o: Linear,
    mlp_norm: RmsNorm,
    mlp: GatedMlp,
    /// Those of what attention and the MLP give.
    norms_after: Option<[RmsNorm; 2]>,
}

impl DecoderBlock {
    fn new<C: DecoderConfig>(params: &mut ParamList, config: &C, window: Option<usize>, index: usize) -> Self {
        let (keys, biases, layout) = (config.common(), config.biases(), C::LAYOUT);
        let module = |name: &str| format!("model.layers.{index}.{name}");
        let (heads, width, inner) = (keys.heads(), keys.hidden_size, keys.intermediate_size);
        let residual = 2 * keys.num_hidden_layers;
        let std = |input: usize, branches: usize| deviation(keys.initializer_range, input, branches);
        let (all, shared) = (heads.query * heads.width, heads.key_value * heads.width);
        let mut linear = |name: &str, sizes: (usize, usize), bias: bool, branches: usize| {
            Linear::new(params, &module(&format!("self_attn.{name}")), sizes, bias, std(sizes.0, branches))
        };
        let qkv = if layout.fused {
            Linears::Fused(linear("qkv_proj", (width, all + 2 * shared), biases.qkv, 1), [all, shared, shared])
        } else {
            let sizes = [("q_proj", all), ("k_proj", shared), ("v_proj", shared)];
            Linears::Apart(sizes.map(|(name, size)| linear(name, (width, size), biases.qkv, 1)))
        };
        let o = linear("o_proj", (all, width), biases.o, residual);
        let mut norm = |name: &str, width: usize| layout.norm(params, &module(name), width, keys.rms_norm_eps);
        let head_norms =
            layout.head_norms.then(|| ["q_norm", "k_norm"].map(|name| norm(&format!("self_attn.{name}"), heads.width)));
        let stds = [std(width, 1), std(inner, residual)];
        let mlp =
            GatedMlp::new(params, &module("mlp"), (width, inner), (biases.mlp, layout.fused), stds, layout.activation);
        let mut norm = |name: &str| layout.norm(params, &module(name), width, keys.rms_norm_eps);
        let input_norm = norm("input_layernorm");
        // The library gives the norm before the MLP another name where one follows attention.
        let (mlp_norm, norms_after) = if layout.norms_after {
            let after_attention = norm("post_attention_layernorm");
            (norm("pre_feedforward_layernorm"), Some([after_attention, norm("post_feedforward_layernorm")]))
        } else {
            (norm("post_attention_layernorm"), None)
        };
        let scale = config.query_pre_attn_scalar().map_or(heads.scale, |scalar| (scalar as f64).sqrt().recip());
        Self {
            sites: block_sites(index),
            attention: Attention { window, scale, cap: config.soft_caps().scores, ..heads },
            rope: usize::from(window.is_some() && config.local_theta().is_some()),
            input_norm,
            qkv,
            head_norms,
            o,
            mlp_norm,
            mlp,
            norms_after,
        }
    }

    fn forward(&self, index: usize, x: &Traced, pass: &mut Forward) -> Result<Traced> {
        let [attn_out, mlp_out, block_out] = &self.sites;
        let y = self.input_norm.forward(x, pass)?;
        let [q, k, v] = self.qkv.forward(&y, pass)?;
        let [q, k] = match &self.head_norms {
            Some([q_norm, k_norm]) => [q_norm.forward(&q, pass)?, k_norm.forward(&k, pass)?],
            None => [q, k],
        };
        let rotation = pass.rotations.get(self.rope).cloned();
        let rotation = rotation.ok_or_else(|| Error::run("the positions of the pass are not set"))?;
        let [q, k] = ops::rotate(&mut pass.tape, [&q, &k], &rotation)?;
        let y = attention(self.attention, [&q, &k, &v], index, pass)?;
        let y = self.o.forward(&y, pass)?;
        let y = self.after(0, y, pass)?;
        let y = pass.sites.visit(attn_out, y, &mut pass.tape)?;
        let [x, y] = self.mlp_norm.after_residual(x, &y, pass)?;
        let y = self.mlp.forward(&y, pass)?;
        let y = self.after(1, y, pass)?;
        let y = pass.sites.visit(mlp_out, y, &mut pass.tape)?;
        let x = ops::add(&mut pass.tape, &x, &y)?;
        pass.sites.visit(block_out, x, &mut pass.tape)
    }

    /// What attention (0) or the MLP (1) gives, as it is added to the residual stream.
    fn after(&self, branch: usize, y: Traced, pass: &mut Forward) -> Result<Traced> {
        match &self.norms_after {
            Some(norms) => norms[branch].forward(&y, pass),
            None => Ok(y),
        }
    }
}

/// A decoder of one of the families.
#[derive(Debug)]
pub struct Decoder {
    /// The `config.json`; a checkpoint's own is written back unchanged.
    config: Value,
    spec: ModelSpec,
    params: ParamList,
    /// That of all blocks, or of those without a window; then that of the others, if it is another.
    ropes: Vec<Rope>,
    embedding: Embedding,
    /// The factor on embeddings.
    embedding_scale: Option<f64>,
    blocks: Vec<DecoderBlock>,
    norm: RmsNorm,
    head: Option<Linear>,
    logits_cap: Option<f64>,
}

impl Decoder {
    fn new<C: DecoderConfig>(config: &C) -> Result<Self> {
        let keys = config.common();
        keys.check()?;
        config.check()?;
        check_sizes(config.query_pre_attn_scalar().map(|scalar| ("query_pre_attn_scalar", scalar, bounds::WIDTH)))?;
        config.soft_caps().check()?;
        let windows: Vec<Option<usize>> = (0..keys.num_hidden_layers).map(|index| config.window(index)).collect();
        check_sizes(windows.iter().flatten().map(|&window| ("sliding_window", window, usize::MAX)))?;
        let (vocabulary, width, std) = (keys.vocab_size, keys.hidden_size, keys.initializer_range);
        let mut params = ParamList::default();
        let embedding = Embedding::new(&mut params, "model.embed_tokens", vocabulary, width, std.unwrap_or(0.05));
        let block = |(index, window)| params.block(index, |params| DecoderBlock::new(params, config, window, index));
        let blocks = windows.into_iter().enumerate().map(block).collect();
        let norm = C::LAYOUT.norm(&mut params, "model.norm", width, keys.rms_norm_eps);
        let head = (!keys.tie_word_embeddings)
            .then(|| Linear::head(&mut params, (width, vocabulary), deviation(std, width, 1)));
        check_count(&params)?;
        let scaling = keys.rope_scaling.as_ref().unwrap_or(&RopeScaling::Default);
        let local = config.local_theta().map(|theta| keys.rope(theta, &RopeScaling::Default));
        Ok(Self {
            config: written(config),
            spec: keys.spec(),
            ropes: std::iter::once(keys.rope(keys.rope_theta, scaling)).chain(local).collect(),
            params,
            embedding,
            embedding_scale: C::LAYOUT.scaled_embedding.then(|| (width as f64).sqrt()),
            blocks,
            norm,
            head,
            logits_cap: config.soft_caps().logits,
        })
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
    let (_, known) = C::LAYOUT.activation_key;
    for key in ["hidden_act", "hidden_activation"] {
        if let Some(other) = original[key].as_str().filter(|name| !known.contains(name)) {
            let message = format!("unsupported activation `{other}`");
            return Err(refuse(key, message, path).help(format!("{family} models use `{}`", known.join("` or `"))));
        }
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
    let (key, names) = C::LAYOUT.activation_key;
    keys[key] = json!(names[0]);
    // A key that is not set would be read as one left out.
    let heads = config.common().heads();
    let value = |key: &str| match key {
        "head_dim" | "query_pre_attn_scalar" => json!(heads.width),
        // The library refuses a null here, and above.
        "num_key_value_heads" => json!(heads.key_value),
        _ => Value::Null,
    };
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
        let mut embedded = self.embedding.forward(&tokens.ids, pass)?;
        if let Some(factor) = self.embedding_scale {
            embedded = ops::scale(&mut pass.tape, factor, &embedded)?;
        }
        let (mask, like) = (pass.mask()?, embedded.tensor());
        pass.rotations = self.ropes.iter().map(|rope| rope.at(mask, like)).collect::<Result<_>>()?;
        pass.sites.visit("embed", embedded, &mut pass.tape)
    }

    fn block(&self, index: usize, x: &Traced, pass: &mut Forward) -> Result<Traced> {
        self.blocks[index].forward(index, x, pass)
    }

    fn final_norm(&self, x: &Traced, pass: &mut Forward) -> Result<Traced> {
        self.norm.forward(x, pass)
    }

    fn logits(&self, hidden: &Traced, pass: &mut Forward) -> Result<Traced> {
        let logits = match &self.head {
            Some(head) => head.forward(hidden, pass),
            None => self.embedding.logits(hidden, pass),
        }?;
        match self.logits_cap {
            Some(cap) => ops::soft_cap(&mut pass.tape, cap, &logits),
            None => Ok(logits),
        }
    }

    fn head(&self) -> Option<ParamId> {
        let weight = self.head.as_ref().map_or(self.embedding.weight(), Linear::weight);
        self.logits_cap.is_none().then_some(weight)
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
