//! OPT (Zhang et al. 2022): blocks of multi-head attention and a plain MLP, with learnt positions.
//!
//! Computes what Hugging Face's `OPTForCausalLM` does, the 350M model with its norms behind the residual sums and its
//! narrower embedding included. The dropout of `config.json` (`dropout`, `attention_dropout`, `layerdrop`) is not
//! applied: the only dropout of the engine is that of adapters.

use std::path::Path;

use candle_core::Tensor;
use serde_json::{Value, json};
use titer_core::bounds;
use titer_core::data::Tokens;
use titer_core::nn::layers::{Embedding, LayerNorm, Linear, Mlp, attention, deviation};
use titer_core::tensor::ops;
use titer_core::tensor::ops::{Activation, Attention, check_positions};
use titer_core::weights::{ParamId, ParamList};
use titer_core::{Forward, Model, ModelEntry, ModelSpec, Result, SettingsType, Traced, inventory};

use super::{
    all_sites, block_sites, check_count, check_deviation, check_heads, check_sizes, in_checkpoint, keys_of, model_keys,
    read_keys, refuse, require,
};

inventory::submit! {
    ModelEntry {
        name: "opt",
        summary: "OPT: multi-head attention, learnt positions, plain MLP, biases",
        model_types: &["opt"],
        settings: SettingsType::of::<OptConfig>(),
        version: 2,
        build: |settings| Ok(Box::new(Opt::new(settings.parse()?)?)),
        from_config: |config, path| Ok(Box::new(Opt::from_config(config, path)?)),
    }
}

/// The first rows of the position table belong to no position: it has so many more than there are positions.
const OFFSET: usize = 2;
/// The row of the position table that padding gets, as in the reference (`cumsum(mask) · mask − 1 + 2`).
const PADDING: u32 = 1;
/// The positions that Hugging Face's library takes where `config.json` leaves them out.
const LEFT_OUT_POSITIONS: usize = 2048;
/// ε of the norms, which `config.json` does not hold.
const EPS: f64 = 1e-5;

model_keys! {
    /// The keys of OPT's `config.json`.
    OptConfig {
        /// Inner width of the MLP.
        ffn_dim: usize = 256,
        /// Width of the embedding, which a matrix widens to the residual stream; `hidden_size` if absent.
        word_embed_proj_dim: Option<usize> = None,
        /// The activation of the MLP.
        activation_function: Activation = Activation::Relu,
        /// Whether the norms stand before attention and MLP (all but the 350M model), or after the residual sums.
        do_layer_norm_before: bool = true,
        /// Whether there is no norm after the last block.
        #[serde(rename = "_remove_final_layer_norm")]
        remove_final_layer_norm: bool = false,
        /// Whether the linear layers have biases.
        enable_bias: bool = true,
        /// Whether the head shares the embedding's matrix.
        tie_word_embeddings: bool = true,
        /// Standard deviation of fresh weights; by fan-in (`1/√in`, residual projections `1/√(2 L in)`) if absent.
        init_std: Option<f64> = None,
    }
}

impl OptConfig {
    fn heads(&self) -> Attention {
        let (heads, width) = (self.num_attention_heads, self.hidden_size / self.num_attention_heads.max(1));
        Attention { query: heads, key_value: heads, width, scale: 1. / (width as f64).sqrt(), window: None, cap: None }
    }

    fn embedding_width(&self) -> usize {
        self.word_embed_proj_dim.unwrap_or(self.hidden_size)
    }

    /// Sizes that no tensor operation should have to find out about.
    fn check(&self) -> Result<()> {
        check_sizes([
            ("vocab_size", self.vocab_size, bounds::VOCABULARY),
            ("hidden_size", self.hidden_size, bounds::WIDTH),
            ("ffn_dim", self.ffn_dim, bounds::WIDTH),
            ("num_hidden_layers", self.num_hidden_layers, bounds::LAYERS),
            ("num_attention_heads", self.num_attention_heads, bounds::WIDTH),
            ("max_position_embeddings", self.max_position_embeddings, bounds::POSITIONS),
            ("word_embed_proj_dim", self.embedding_width(), bounds::WIDTH),
        ])?;
        check_deviation("init_std", self.init_std)?;
        check_heads(self.hidden_size, self.num_attention_heads)
    }
}

/// One transformer block.
#[derive(Debug)]
struct OptBlock {
    sites: [String; 3],
    norm_before: bool,
    q: Linear,
    k: Linear,
    v: Linear,
    out: Linear,
    attention_norm: LayerNorm,
    mlp: Mlp,
    mlp_norm: LayerNorm,
}

impl OptBlock {
    fn new(params: &mut ParamList, config: &OptConfig, index: usize) -> Self {
        let block = format!("model.decoder.layers.{index}");
        let (width, inner, residual) = (config.hidden_size, config.ffn_dim, 2 * config.num_hidden_layers);
        let std = |input: usize, branches: usize| deviation(config.init_std, input, branches);
        let mut linear = |name: &str, branches: usize| {
            let module = format!("{block}.self_attn.{name}");
            Linear::new(params, &module, (width, width), config.enable_bias, std(width, branches))
        };
        let [q, k, v] = ["q_proj", "k_proj", "v_proj"].map(|name| linear(name, 1));
        let out = linear("out_proj", residual);
        let stds = [std(width, 1), std(inner, residual)];
        Self {
            sites: block_sites(index),
            norm_before: config.do_layer_norm_before,
            q,
            k,
            v,
            out,
            attention_norm: LayerNorm::new(params, &format!("{block}.self_attn_layer_norm"), width, EPS),
            mlp: Mlp::new(params, &block, (width, inner), config.enable_bias, stds, config.activation_function),
            mlp_norm: LayerNorm::new(params, &format!("{block}.final_layer_norm"), width, EPS),
        }
    }

    fn forward(&self, index: usize, x: &Traced, heads: Attention, pass: &mut Forward) -> Result<Traced> {
        let [attn_out, mlp_out, block_out] = &self.sites;
        let y = norm_if(self.norm_before, &self.attention_norm, x, pass)?;
        let [q, k, v] = Linear::forward_all([&self.q, &self.k, &self.v], &y, pass)?;
        let y = attention(heads, [&q, &k, &v], index, pass)?;
        let y = self.out.forward(&y, pass)?;
        let y = pass.sites.visit(attn_out, y, &mut pass.tape)?;
        // What goes on as it is, and what the MLP takes: with norms behind the branches, these are the same.
        let norm = if self.norm_before { &self.mlp_norm } else { &self.attention_norm };
        let [sum, normed] = norm.after_residual(x, &y, pass)?;
        let x = if self.norm_before { sum } else { normed.clone() };
        let y = self.mlp.forward(&normed, pass)?;
        let y = pass.sites.visit(mlp_out, y, &mut pass.tape)?;
        let x = if self.norm_before {
            ops::add(&mut pass.tape, &x, &y)?
        } else {
            let [_, normed] = self.mlp_norm.after_residual(&x, &y, pass)?;
            normed
        };
        pass.sites.visit(block_out, x, &mut pass.tape)
    }
}

/// `x` normalised if `here` is where the norm stands, else `x`.
fn norm_if(here: bool, norm: &LayerNorm, x: &Traced, pass: &mut Forward) -> Result<Traced> {
    if here { norm.forward(x, pass) } else { Ok(x.clone()) }
}

/// The architecture.
#[derive(Debug)]
pub struct Opt {
    config: OptConfig,
    /// The checkpoint's own `config.json`, written back unchanged.
    original: Option<Value>,
    spec: ModelSpec,
    params: ParamList,
    heads: Attention,
    embedding: Embedding,
    positions: Embedding,
    /// From the embedding's width to the residual stream's, and back.
    projections: Option<[Linear; 2]>,
    blocks: Vec<OptBlock>,
    norm: Option<LayerNorm>,
    head: Option<Linear>,
}

impl Opt {
    /// The architecture of these sizes.
    ///
    /// # Errors
    /// The sizes contradict one another.
    pub fn new(config: OptConfig) -> Result<Self> {
        config.check()?;
        let (heads, width, narrow) = (config.heads(), config.hidden_size, config.embedding_width());
        let mut params = ParamList::default();
        let (std, table_std) = (config.init_std, config.init_std.unwrap_or(0.05));
        let module = |name: &str| format!("model.decoder.{name}");
        let rows = config.max_position_embeddings + OFFSET;
        let embedding = Embedding::new(&mut params, &module("embed_tokens"), config.vocab_size, narrow, table_std);
        let positions = Embedding::new(&mut params, &module("embed_positions"), rows, width, table_std);
        let projections = (narrow != width).then(|| {
            [("project_in", (narrow, width)), ("project_out", (width, narrow))]
                .map(|(name, sizes)| Linear::new(&mut params, &module(name), sizes, false, deviation(std, sizes.0, 1)))
        });
        let block = |index| params.block(index, |params| OptBlock::new(params, &config, index));
        let blocks = (0..config.num_hidden_layers).map(block).collect();
        let norm = (config.do_layer_norm_before && !config.remove_final_layer_norm)
            .then(|| LayerNorm::new(&mut params, &module("final_layer_norm"), width, EPS));
        let head = (!config.tie_word_embeddings)
            .then(|| Linear::head(&mut params, (narrow, config.vocab_size), deviation(std, narrow, 1)));
        check_count(&params)?;
        let spec = ModelSpec {
            vocab_size: config.vocab_size,
            hidden_size: width,
            layers: config.num_hidden_layers,
            kv_heads: heads.key_value,
            head_dim: heads.width,
            max_positions: config.max_position_embeddings,
        };
        Ok(Self { config, original: None, spec, params, heads, embedding, positions, projections, blocks, norm, head })
    }

    /// The architecture that a checkpoint's `config.json` describes.
    ///
    /// # Errors
    /// A key is missing, or asks for something this model does not compute.
    pub fn from_config(original: &Value, path: &Path) -> Result<Self> {
        let sizes = ["vocab_size", "hidden_size", "ffn_dim", "num_hidden_layers", "num_attention_heads"];
        require("OPT", &sizes, original, path)?;
        let activation = &original["activation_function"];
        if !activation.is_null() && serde_json::from_value::<Activation>(activation.clone()).is_err() {
            let message = format!("unsupported activation {activation}");
            return Err(refuse("activation_function", message, path).help("OPT models use `relu`"));
        }
        if original["layer_norm_elementwise_affine"] == false {
            let message = "norms without a learnt scale and shift are not supported".to_owned();
            return Err(refuse("layer_norm_elementwise_affine", message, path).help("OPT models have both"));
        }
        let mut keys = original.clone();
        if keys["max_position_embeddings"].is_null() {
            keys["max_position_embeddings"] = json!(LEFT_OUT_POSITIONS);
        }
        let config = read_keys("OPT", keys, path)?;
        let model = Self::new(config).map_err(|error| in_checkpoint(error, path))?;
        Ok(Self { original: Some(original.clone()), ..model })
    }

    /// The row of the position table for each token, `[tokens]`.
    fn position_rows(&self, tokens: &Tokens, pass: &Forward) -> Result<Tensor> {
        let positions = &pass.mask()?.positions;
        check_positions(positions, self.spec.max_positions)?;
        let mut rows: Vec<u32> = positions.iter().map(|position| position + OFFSET as u32).collect();
        for (range, real) in tokens.ranges().zip(&tokens.real) {
            rows[range][*real..].fill(PADDING);
        }
        Ok(Tensor::from_vec(rows, tokens.count(), tokens.ids.device())?)
    }
}

impl Model for Opt {
    fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    fn params(&self) -> &ParamList {
        &self.params
    }

    fn config(&self) -> Value {
        let built = || keys_of(&self.config, "opt", "OPTForCausalLM");
        self.original.clone().unwrap_or_else(built)
    }

    fn sites(&self) -> Vec<String> {
        all_sites(self.blocks.len())
    }

    fn embed(&self, tokens: &Tokens, pass: &mut Forward) -> Result<Traced> {
        let mut x = self.embedding.forward(&tokens.ids, pass)?;
        if let Some([widen, _]) = &self.projections {
            x = widen.forward(&x, pass)?;
        }
        let rows = self.position_rows(tokens, pass)?;
        let positions = self.positions.forward(&rows, pass)?;
        let x = ops::add(&mut pass.tape, &x, &positions)?;
        pass.sites.visit("embed", x, &mut pass.tape)
    }

    fn block(&self, index: usize, x: &Traced, pass: &mut Forward) -> Result<Traced> {
        self.blocks[index].forward(index, x, self.heads, pass)
    }

    fn final_norm(&self, x: &Traced, pass: &mut Forward) -> Result<Traced> {
        self.norm.as_ref().map_or_else(|| Ok(x.clone()), |norm| norm.forward(x, pass))
    }

    fn logits(&self, hidden: &Traced, pass: &mut Forward) -> Result<Traced> {
        let hidden = match &self.projections {
            Some([_, narrow]) => &narrow.forward(hidden, pass)?,
            None => hidden,
        };
        match &self.head {
            Some(head) => head.forward(hidden, pass),
            None => self.embedding.logits(hidden, pass),
        }
    }

    fn head(&self) -> Option<ParamId> {
        let head = self.head.as_ref().map_or(self.embedding.weight(), Linear::weight);
        self.projections.is_none().then_some(head)
    }

    /// Adding one vector to all keys adds the same number to all scores of a query, which softmax does not see.
    fn without_gradient(&self) -> Vec<(String, &'static str)> {
        let keys = self.params.iter().filter(|param| param.name.ends_with(".k_proj.bias"));
        keys.map(|param| (param.name.clone(), "softmax does not see what all keys have in common")).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(changes: Value) -> Result<Opt> {
        let mut config = json!({
            "model_type": "opt", "vocab_size": 11, "hidden_size": 8, "ffn_dim": 12, "num_hidden_layers": 2,
            "num_attention_heads": 2, "max_position_embeddings": 16, "word_embed_proj_dim": 8, "dropout": 0.1
        });
        config.as_object_mut().expect("a table").extend(changes.as_object().expect("a table").clone());
        Opt::from_config(&config, Path::new("config.json"))
    }

    #[test]
    fn a_config_that_cannot_be_computed_is_refused_by_key() {
        let cases = [
            (json!({ "ffn_dim": null }), "ffn_dim"),
            (json!({ "max_position_embeddings": 0 }), "max_position_embeddings"),
            (json!({ "activation_function": "swish9" }), "activation_function"),
            (json!({ "layer_norm_elementwise_affine": false }), "layer_norm_elementwise_affine"),
            (json!({ "num_attention_heads": 3 }), "num_attention_heads"),
            (json!({ "word_embed_proj_dim": 0 }), "word_embed_proj_dim"),
            (json!({ "vocab_size": 0 }), "vocab_size"),
        ];
        for (changes, key) in cases {
            let error = load(changes).expect_err(key);
            assert_eq!(error.place("key"), Some(key), "{error}");
            assert!(error.place("file").is_some(), "{error}");
        }
    }

    #[test]
    fn positions_left_out_are_the_library_s() -> Result<()> {
        assert_eq!(load(json!({ "max_position_embeddings": null }))?.spec().max_positions, 2048);
        Ok(())
    }

    #[test]
    fn names_and_shapes_are_those_of_the_checkpoints() -> Result<()> {
        let names = |model: &Opt| model.params().iter().map(|param| param.name.clone()).collect::<Vec<_>>();
        let shape = |model: &Opt, name: &str| {
            model.params().iter().find(|param| param.name == name).map(|param| param.shape.clone())
        };
        let usual = load(json!({}))?;
        assert_eq!(shape(&usual, "model.decoder.embed_positions.weight"), Some(vec![18, 8]));
        assert_eq!(shape(&usual, "model.decoder.layers.1.fc1.bias"), Some(vec![12]));
        assert_eq!(names(&usual).last().map(String::as_str), Some("model.decoder.final_layer_norm.bias"));
        assert_eq!(usual.params().linear_names(), ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]);
        // As the 350M model is.
        let small = load(json!({ "word_embed_proj_dim": 4, "do_layer_norm_before": false }))?;
        assert_eq!(shape(&small, "model.decoder.embed_tokens.weight"), Some(vec![11, 4]));
        assert_eq!(shape(&small, "model.decoder.project_in.weight"), Some(vec![8, 4]));
        assert_eq!(shape(&small, "model.decoder.project_out.weight"), Some(vec![4, 8]));
        assert_eq!(names(&small).last().map(String::as_str), Some("model.decoder.layers.1.final_layer_norm.bias"));
        let untied = load(json!({ "tie_word_embeddings": false }))?;
        assert_eq!(names(&untied).last().map(String::as_str), Some("lm_head.weight"));
        Ok(())
    }
}
