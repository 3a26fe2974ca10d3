//! What models are built of: each layer declares its parameters and computes with whatever weights a pass brings.

use candle_core::Tensor;

use crate::Result;
use crate::model::Forward;
use crate::ops::{self, AdapterInput, Rope, Visibility};
use crate::weights::{Init, ParamId, ParamList};

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

    /// `[..., input]` to `[..., output]`.
    ///
    /// # Errors
    /// A tensor operation failed.
    pub fn forward(&self, x: &Tensor, pass: &mut Forward) -> Result<Tensor> {
        let adapter = match pass.weights.adapter(self.weight) {
            Some((adapter, scale)) => {
                let a = adapter.a.to_dtype(x.dtype())?;
                let b = adapter.b.to_dtype(x.dtype())?;
                Some(AdapterInput { a, b, scale, mask: pass.adapter_mask(x)? })
            }
            None => None,
        };
        let y = ops::linear(x, pass.weights.get(self.weight), adapter)?;
        match self.bias {
            Some(bias) => Ok(y.broadcast_add(pass.weights.get(bias))?),
            None => Ok(y),
        }
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
        Self { weight: params.tensor(format!("{module}.weight"), &[vocabulary, width], Init::Normal(std)) }
    }

    /// `[batch, length]` ids to `[batch, length, width]`.
    ///
    /// # Errors
    /// An id lies outside the vocabulary, or a tensor operation failed.
    pub fn forward(&self, ids: &Tensor, pass: &Forward) -> Result<Tensor> {
        let (batch, length) = ids.dims2()?;
        let rows = pass.weights.get(self.weight).index_select(&ids.flatten_all()?, 0)?;
        Ok(rows.reshape((batch, length, ()))?)
    }

    /// Logits `[rows, vocabulary]` of hidden states `[rows, width]`: the head of a model with tied embeddings.
    ///
    /// # Errors
    /// A tensor operation failed.
    pub fn logits(&self, hidden: &Tensor, pass: &Forward) -> Result<Tensor> {
        ops::linear(hidden, pass.weights.get(self.weight), None)
    }
}

/// Root-mean-square normalisation with a learnt scale.
#[derive(Debug, Clone)]
pub struct RmsNorm {
    weight: ParamId,
    eps: f64,
}

impl RmsNorm {
    /// Declares the scale `[width]` called `{module}.weight`.
    pub fn new(params: &mut ParamList, module: &str, width: usize, eps: f64) -> Self {
        Self { weight: params.tensor(format!("{module}.weight"), &[width], Init::Ones), eps }
    }

    /// Normalises the last dimension.
    ///
    /// # Errors
    /// A tensor operation failed.
    pub fn forward(&self, x: &Tensor, pass: &Forward) -> Result<Tensor> {
        ops::rms_norm(x, pass.weights.get(self.weight), self.eps)
    }
}

/// Heads of an attention block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heads {
    /// Query heads.
    pub query: usize,
    /// Key/value heads; divides the query heads (Ainslie et al. 2023).
    pub key_value: usize,
    /// Width of one head.
    pub width: usize,
}

/// Causal self-attention with rotary positions over projected queries `[batch, length, query · width]` and keys and
/// values `[batch, length, key_value · width]`; gives `[batch, length, query · width]`. With a cache in `pass`, the
/// layer's earlier keys and values are seen too.
///
/// # Errors
/// A tensor operation failed, or a position lies outside the rotary table.
pub fn attention(
    [q, k, v]: [&Tensor; 3],
    heads: Heads,
    rope: &Rope,
    visibility: &Visibility,
    layer: usize,
    pass: &mut Forward,
) -> Result<Tensor> {
    let (batch, length, _) = q.dims3()?;
    let split = |x: &Tensor, count: usize| x.reshape((batch, length, count, heads.width));
    let q = ops::rotate(&split(q, heads.query)?, rope, &visibility.positions)?;
    let k = ops::rotate(&split(k, heads.key_value)?, rope, &visibility.positions)?;
    let v = split(v, heads.key_value)?.transpose(1, 2)?.contiguous()?;
    let (k, v) = match pass.cache.as_deref_mut() {
        Some(cache) => cache.append(layer, &k, &v)?,
        None => (k, v),
    };
    // The query heads that share a key/value head lie side by side: one long matrix, and no copy of keys and values.
    let q = q.reshape((batch, heads.key_value, heads.query / heads.key_value * length, heads.width))?;
    let scores = q.matmul(&k.t()?)?;
    let weights = ops::causal_softmax(&scores, 1. / (heads.width as f64).sqrt(), visibility)?;
    let mixed = weights.matmul(&v)?.reshape((batch, heads.query, length, heads.width))?;
    Ok(mixed.transpose(1, 2)?.reshape((batch, length, heads.query * heads.width))?)
}

/// The gated MLP of Llama: `down(silu(gate x) ∘ up x)`.
#[derive(Debug, Clone)]
pub struct GatedMlp {
    gate: Linear,
    up: Linear,
    down: Linear,
}

impl GatedMlp {
    /// Declares `gate_proj`, `up_proj` and `down_proj` under `module`; `std` is the initial deviation of the first
    /// two and of the last.
    pub fn new(
        params: &mut ParamList,
        module: &str,
        (width, inner): (usize, usize),
        bias: bool,
        std: [f64; 2],
    ) -> Self {
        let mut linear = |name: &str, sizes, std| Linear::new(params, &format!("{module}.{name}"), sizes, bias, std);
        Self {
            gate: linear("gate_proj", (width, inner), std[0]),
            up: linear("up_proj", (width, inner), std[0]),
            down: linear("down_proj", (inner, width), std[1]),
        }
    }

    /// `[..., width]` to `[..., width]`.
    ///
    /// # Errors
    /// A tensor operation failed.
    pub fn forward(&self, x: &Tensor, pass: &mut Forward) -> Result<Tensor> {
        let (gate, up) = (self.gate.forward(x, pass)?, self.up.forward(x, pass)?);
        self.down.forward(&ops::swiglu(&gate, &up)?, pass)
    }
}
