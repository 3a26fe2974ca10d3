//! What models are built of: each layer declares its parameters and computes with whatever weights a pass brings.

use candle_core::Tensor;

use crate::error::{Error, Result};
use crate::nn::forward::Forward;
use crate::tensor::ops;
use crate::tensor::ops::{Activation, Attention, LinearLayer};
use crate::tensor::tape::Traced;
use crate::weights::schema::{Init, ParamId, ParamList, factor_names, module_of};

/// The standard deviation that a linear layer's fresh weights have: as `given`, or by fan-in, `1/√(input · branches)`
/// with `branches` the number of results that add up in the residual stream (1 for a layer that does not write to it).
pub fn deviation(given: Option<f64>, input: usize, branches: usize) -> f64 {
    given.unwrap_or_else(|| ((input * branches) as f64).sqrt().recip())
}

/// `y = x Wᵀ + b`, with a low-rank adapter where the weights have one.
#[derive(Debug, Clone)]
pub struct Linear {
    weight: ParamId,
    bias: Option<ParamId>,
}

impl Linear {
    /// Declares the layer `module` from `input` to `output` features; weights start normal with deviation `std`.
    pub fn new(params: &mut ParamList, module: &str, (input, output): (usize, usize), bias: bool, std: f64) -> Self {
        let weight = params.linear(module, output, input, std);
        Self { weight, bias: bias.then(|| params.tensor(format!("{module}.bias"), &[output], Init::Zeros)) }
    }

    /// Declares an output head of its own, from `width` features to the logits of `vocabulary` tokens.
    pub fn head(params: &mut ParamList, (width, vocabulary): (usize, usize), std: f64) -> Self {
        Self { weight: params.head(vocabulary, width, std), bias: None }
    }

    /// The parameter that holds the weight.
    pub fn weight(&self) -> ParamId {
        self.weight
    }

    /// `[..., input]` to `[..., output]`.
    ///
    /// # Errors
    /// A tensor operation failed.
    pub fn forward(&self, x: &Traced, pass: &mut Forward) -> Result<Traced> {
        let [y] = Self::forward_all([self], x, pass)?;
        Ok(y)
    }

    /// Several layers of one input, such as queries, keys and values, which is faster on a device than each by itself.
    ///
    /// # Errors
    /// A tensor operation failed.
    pub fn forward_all<const N: usize>(layers: [&Self; N], x: &Traced, pass: &mut Forward) -> Result<[Traced; N]> {
        let layers: Vec<_> = layers.iter().map(|layer| layer.with_weights(x.tensor(), pass)).collect::<Result<_>>()?;
        let layers = layers.try_into().map_err(|_| Error::run("a linear layer was lost"))?;
        ops::linears(&mut pass.tape, x, layers)
    }

    /// The layer as the operator takes it.
    fn with_weights(&self, x: &Tensor, pass: &mut Forward) -> Result<LinearLayer> {
        self.note_inputs(x, pass)?;
        let bias = self.bias.map(|bias| pass.parameter(bias)).transpose()?;
        let low_rank = pass.low_rank(self.weight, x.dtype())?;
        Ok(LinearLayer { weight: pass.matrix(self.weight), bias, low_rank })
    }

    /// Notes what the layer's factors (or its weight, if it has none) are multiplied with, if this pass asks for it.
    fn note_inputs(&self, x: &Tensor, pass: &mut Forward) -> Result<()> {
        let Some(squares) = pass.input_squares.as_deref_mut() else { return Ok(()) };
        let name = &pass.weights.param(self.weight).name;
        let Some((adapter, _)) = pass.weights.adapter(self.weight) else { return squares.note(name.clone(), x) };
        let [a, b] = factor_names(module_of(name));
        squares.note(b, &ops::Gemm::NT.product(x, &adapter.a.to_dtype(x.dtype())?)?)?;
        squares.note(a, x)
    }
}

/// Token ids to vectors; the same matrix can serve as the head.
#[derive(Debug, Clone)]
pub struct Embedding {
    weight: ParamId,
}

impl Embedding {
    /// Declares the matrix `[vocabulary, width]` called `{module}.weight`.
    pub fn new(params: &mut ParamList, module: &str, vocabulary: usize, width: usize, std: f64) -> Self {
        Self { weight: params.embedding(module, vocabulary, width, std) }
    }

    /// The parameter that holds the matrix.
    pub fn weight(&self) -> ParamId {
        self.weight
    }

    /// `[tokens]` ids to `[tokens, width]`.
    ///
    /// # Errors
    /// An id lies outside the vocabulary, or a tensor operation failed.
    pub fn forward(&self, ids: &Tensor, pass: &mut Forward) -> Result<Traced> {
        let table = pass.matrix(self.weight);
        ops::embed(&mut pass.tape, table, ids)
    }

    /// Logits `[rows, vocabulary]` of hidden states `[rows, width]`: the head of a model with tied embeddings.
    ///
    /// # Errors
    /// A tensor operation failed.
    pub fn logits(&self, hidden: &Traced, pass: &mut Forward) -> Result<Traced> {
        let weight = pass.matrix(self.weight);
        ops::linear(&mut pass.tape, hidden, weight, None, None)
    }
}

/// Root-mean-square normalisation with a learnt scale.
#[derive(Debug, Clone)]
pub struct RmsNorm {
    weight: ParamId,
    eps: f64,
    /// Whether the weight is what the scale is above one.
    above_one: bool,
}

impl RmsNorm {
    /// Declares the scale `[width]` called `{module}.weight`.
    pub fn new(params: &mut ParamList, module: &str, width: usize, eps: f64) -> Self {
        Self { weight: params.tensor(format!("{module}.weight"), &[width], Init::Ones), eps, above_one: false }
    }

    /// Likewise with a weight that holds the scale less one, as Gemma's.
    pub fn above_one(params: &mut ParamList, module: &str, width: usize, eps: f64) -> Self {
        Self { weight: params.tensor(format!("{module}.weight"), &[width], Init::Zeros), eps, above_one: true }
    }

    fn scale(&self, pass: &mut Forward) -> Result<Traced> {
        let weight = pass.parameter(self.weight)?;
        if !self.above_one {
            return Ok(weight);
        }
        let one = Traced::constant(weight.tensor().ones_like()?);
        ops::add(&mut pass.tape, &one, &weight)
    }

    /// Normalises the last dimension.
    ///
    /// # Errors
    /// A tensor operation failed.
    pub fn forward(&self, x: &Traced, pass: &mut Forward) -> Result<Traced> {
        let weight = self.scale(pass)?;
        ops::rms_norm(&mut pass.tape, x, &weight, self.eps)
    }

    /// The residual connection `x + branch`, and its normalised form.
    ///
    /// # Errors
    /// The shapes differ, or a tensor operation failed.
    pub fn after_residual(&self, x: &Traced, branch: &Traced, pass: &mut Forward) -> Result<[Traced; 2]> {
        let weight = self.scale(pass)?;
        ops::add_rms_norm(&mut pass.tape, [x, branch], &weight, self.eps)
    }
}

/// Layer normalisation with a learnt scale and shift (Ba et al. 2016).
#[derive(Debug, Clone)]
pub struct LayerNorm {
    weight: ParamId,
    bias: ParamId,
    eps: f64,
}

impl LayerNorm {
    /// Declares the scale and the shift `[width]`, called `{module}.weight` and `{module}.bias`.
    pub fn new(params: &mut ParamList, module: &str, width: usize, eps: f64) -> Self {
        let mut vector = |name: &str, init| params.tensor(format!("{module}.{name}"), &[width], init);
        Self { weight: vector("weight", Init::Ones), bias: vector("bias", Init::Zeros), eps }
    }

    /// Normalises the last dimension.
    ///
    /// # Errors
    /// A tensor operation failed.
    pub fn forward(&self, x: &Traced, pass: &mut Forward) -> Result<Traced> {
        let (weight, bias) = (pass.parameter(self.weight)?, pass.parameter(self.bias)?);
        ops::layer_norm(&mut pass.tape, x, &weight, &bias, self.eps)
    }

    /// The residual connection `x + branch`, and its normalised form.
    ///
    /// # Errors
    /// The shapes differ, or a tensor operation failed.
    pub fn after_residual(&self, x: &Traced, branch: &Traced, pass: &mut Forward) -> Result<[Traced; 2]> {
        let (weight, bias) = (pass.parameter(self.weight)?, pass.parameter(self.bias)?);
        ops::add_layer_norm(&mut pass.tape, [x, branch], [&weight, &bias], self.eps)
    }
}

/// Causal self-attention of layer `layer` over projected queries `[tokens, query · width]` and keys and values
/// `[tokens, key_value · width]`; gives the queries' shape. With a cache in `pass`, the layer's earlier keys and
/// values are seen too.
///
/// # Errors
/// A tensor operation failed, or the cache is full.
pub fn attention(shape: Attention, [q, k, v]: [&Traced; 3], layer: usize, pass: &mut Forward) -> Result<Traced> {
    let mask = pass.mask()?.clone();
    let Some(cache) = pass.cache.as_deref_mut() else {
        return ops::attention(&mut pass.tape, shape, [q, k, v], &mask);
    };
    let [k, v] = cache.append(layer, k.tensor(), v.tensor(), &mask)?.map(Traced::constant);
    ops::attention(&mut pass.tape, shape, [q, &k, &v], &mask)
}

/// Several linear layers of one input: apart, or stored as one.
#[derive(Debug, Clone)]
pub enum Linears<const N: usize> {
    /// A matrix each.
    Apart([Linear; N]),
    /// One matrix, whose results are as wide as said.
    Fused(Linear, [usize; N]),
}

impl<const N: usize> Linears<N> {
    /// `[..., input]` to the result of each, `[..., output]`.
    ///
    /// # Errors
    /// A tensor operation failed.
    pub fn forward(&self, x: &Traced, pass: &mut Forward) -> Result<[Traced; N]> {
        match self {
            Self::Apart(layers) => Linear::forward_all(layers.each_ref(), x, pass),
            Self::Fused(layer, widths) => {
                let all = layer.forward(x, pass)?;
                ops::split_columns(&mut pass.tape, &all, *widths)
            }
        }
    }
}

/// The gated MLP of Llama and Gemma: `down(activation(gate x) ∘ up x)`.
#[derive(Debug, Clone)]
pub struct GatedMlp {
    gate_up: Linears<2>,
    down: Linear,
    activation: Activation,
}

impl GatedMlp {
    /// Declares `gate_proj` and `up_proj`, or `gate_up_proj` if they are `fused`, and `down_proj` under `module`; `std` is
    /// the initial deviation of the first two and of the last.
    pub fn new(
        params: &mut ParamList,
        module: &str,
        (width, inner): (usize, usize),
        (bias, fused): (bool, bool),
        std: [f64; 2],
        activation: Activation,
    ) -> Self {
        let mut linear = |name: &str, sizes, std| Linear::new(params, &format!("{module}.{name}"), sizes, bias, std);
        let gate_up = if fused {
            Linears::Fused(linear("gate_up_proj", (width, 2 * inner), std[0]), [inner; 2])
        } else {
            Linears::Apart(["gate_proj", "up_proj"].map(|name| linear(name, (width, inner), std[0])))
        };
        Self { gate_up, down: linear("down_proj", (inner, width), std[1]), activation }
    }

    /// `[..., width]` to `[..., width]`.
    ///
    /// # Errors
    /// A tensor operation failed.
    pub fn forward(&self, x: &Traced, pass: &mut Forward) -> Result<Traced> {
        let [gate, up] = self.gate_up.forward(x, pass)?;
        let y = ops::gated(&mut pass.tape, self.activation, [&gate, &up])?;
        self.down.forward(&y, pass)
    }
}

/// The plain MLP: `fc2(activation(fc1 x))`.
#[derive(Debug, Clone)]
pub struct Mlp {
    up: Linear,
    down: Linear,
    activation: Activation,
}

impl Mlp {
    /// Declares `fc1` and `fc2` under `module`; `std` is their initial deviation.
    pub fn new(
        params: &mut ParamList,
        module: &str,
        (width, inner): (usize, usize),
        bias: bool,
        std: [f64; 2],
        activation: Activation,
    ) -> Self {
        let mut linear = |name: &str, sizes, std| Linear::new(params, &format!("{module}.{name}"), sizes, bias, std);
        Self { up: linear("fc1", (width, inner), std[0]), down: linear("fc2", (inner, width), std[1]), activation }
    }

    /// `[..., width]` to `[..., width]`.
    ///
    /// # Errors
    /// A tensor operation failed.
    pub fn forward(&self, x: &Traced, pass: &mut Forward) -> Result<Traced> {
        let y = self.up.forward(x, pass)?;
        let y = ops::activate(&mut pass.tape, self.activation, &y)?;
        self.down.forward(&y, pass)
    }
}
