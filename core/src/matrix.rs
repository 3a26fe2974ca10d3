//! How the numbers of a base model are stored: in full, or frozen in fewer bits.
//!
//! A frozen matrix is never computed with as it is stored. Its rows are widened a few at a time, or on a device all at
//! once, and what is computed is exactly what a dense matrix of the widened numbers would give.

use std::ops::Range;
use std::sync::Arc;

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor};

use crate::model::Model;
use crate::ops::Gemm;
use crate::weights::Param;
use crate::{Error, Result};

/// How the base of a model is stored: what `dtype` means in a configuration.
///
/// | name | linear layers | embedding, head | bits a weight | |
/// |---|---|---|--:|---|
/// | `f32` | f32 | f32 | 32 | the only one that can be trained in full |
/// | `bf16`, `f16` | half precision | half precision | 16 | frozen |
/// | `q8_0` | blocks of 32 | bf16 | 8.5 | frozen |
/// | `q6k` | blocks of 256 | bf16 | 6.6 | frozen |
/// | `q4k`, `q4_0` | blocks of 256, of 32 | bf16 | 4.5 | frozen |
///
/// The CPU computes in f32 whatever is stored, and keeps norms and biases in f32; CUDA devices compute in bf16 on every
/// type but f32. Adapters, their gradients and the optimiser's moments are f32 everywhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Precision {
    /// Numbers of their own: f64, f32, bf16 or f16.
    Plain(DType),
    /// The weights of linear layers in blocks of small integers with common scales; bf16 for the rest.
    Blocks(GgmlDType),
}

impl From<DType> for Precision {
    fn from(dtype: DType) -> Self {
        Self::Plain(dtype)
    }
}

impl Precision {
    /// What a configuration may ask for.
    const ALL: [(&'static str, Self); 7] = [
        ("f32", Self::Plain(DType::F32)),
        ("f16", Self::Plain(DType::F16)),
        ("bf16", Self::Plain(DType::BF16)),
        ("q8_0", Self::Blocks(GgmlDType::Q8_0)),
        ("q6k", Self::Blocks(GgmlDType::Q6K)),
        ("q4k", Self::Blocks(GgmlDType::Q4K)),
        ("q4_0", Self::Blocks(GgmlDType::Q4_0)),
    ];

    /// The precision called `name`.
    ///
    /// # Errors
    /// The name is unknown; the error lists the known ones.
    pub fn parse(name: &str) -> Result<Self> {
        let known = Self::ALL.into_iter().find(|(known, _)| *known == name);
        known.map(|(_, precision)| precision).ok_or_else(|| {
            let names: Vec<&str> = Self::ALL.iter().map(|(name, _)| *name).collect();
            Error::config(format!("unknown element type `{name}`"))
                .key("dtype")
                .help(format!("use one of {}", names.join(", ")))
        })
    }

    /// Whether full training is possible: a step of the optimiser is smaller than what fewer bits than 32 can tell.
    ///
    /// # Errors
    /// It is not.
    pub fn check_trainable(self) -> Result<()> {
        if matches!(self, Self::Plain(DType::F32 | DType::F64)) {
            return Ok(());
        }
        Err(Error::config(format!("weights stored as {self} are frozen: they cannot be trained in full"))
            .key("dtype")
            .help("use dtype = \"f32\", or train a LoRA adapter"))
    }

    /// Whether every linear layer of `model` can be stored so.
    ///
    /// # Errors
    /// The rows of one are no whole number of blocks.
    pub fn check_model(self, model: &dyn Model) -> Result<()> {
        model.params().iter().try_for_each(|param| self.check(param, is_head(model, param)))
    }

    fn check(self, param: &Param, head: bool) -> Result<()> {
        let Some(kind) = self.blocks_of(param, head) else { return Ok(()) };
        let (columns, block) = (param.shape.last().copied().unwrap_or(0), kind.block_size());
        if columns > 0 && columns.is_multiple_of(block) {
            return Ok(());
        }
        let message = format!("`{}` has rows of {columns} numbers, but {self} takes blocks of {block}", param.name);
        let help = if block > 32 { "use q8_0 or q4_0, which take blocks of 32, or bf16" } else { "use bf16 or f32" };
        Err(Error::config(message).key("dtype").help(help))
    }

    /// The blocks that `param` is stored in, if it is.
    fn blocks_of(self, param: &Param, head: bool) -> Option<GgmlDType> {
        match self {
            Self::Blocks(kind) if param.linear && !head => Some(kind),
            _ => None,
        }
    }

    /// The type of activations over weights of this precision on `device`.
    pub fn activation_dtype(self, device: &Device) -> DType {
        match self {
            Self::Plain(dtype) if dtype == DType::F64 || !device.is_cpu() => dtype,
            Self::Blocks(_) if !device.is_cpu() => DType::BF16,
            _ => DType::F32,
        }
    }

    /// `tensor` as the parameter `param` of `model` is stored.
    pub(crate) fn store(self, model: &dyn Model, param: &Param, tensor: &Tensor) -> Result<Matrix> {
        let (head, computed) = (is_head(model, param), self.activation_dtype(tensor.device()));
        self.check(param, head)?;
        if let Some(kind) = self.blocks_of(param, head) {
            return Matrix::blocks(tensor, kind, computed);
        }
        let dtype = if let Self::Plain(dtype) = self { dtype } else { DType::BF16 };
        if dtype == computed || param.shape.len() < 2 {
            return Ok(Matrix::Dense(tensor.to_dtype(computed)?));
        }
        Matrix::half(tensor, dtype, computed)
    }
}

impl std::fmt::Display for Precision {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match Self::ALL.iter().find(|(_, known)| known == self) {
            Some((name, _)) => f.write_str(name),
            None => write!(f, "{self:?}"),
        }
    }
}

/// Whether `param` is the matrix of the head, which stays in half precision: its rounding goes into every logit.
fn is_head(model: &dyn Model, param: &Param) -> bool {
    model.head().is_some_and(|head| model.params().get(head).name == param.name)
}

/// A parameter as it is stored: a matrix `[rows, columns]`, or a dense tensor of any shape.
#[derive(Debug, Clone)]
pub enum Matrix {
    /// In the type that is computed in; maybe under training.
    Dense(Tensor),
    /// Frozen, in fewer bits.
    Packed(Arc<Packed>),
}

/// A frozen matrix in fewer bits than it is computed with, plus what was merged into it since.
#[derive(Debug)]
pub struct Packed {
    store: Arc<Store>,
    /// `B: [rows, r]` and `A: [r, columns]` in f32, to be added as `B A`. Rounded onto the stored numbers, most of an
    /// adapter would vanish: its entries are smaller than half a step between two of them.
    low_rank: Option<[Tensor; 2]>,
    /// The type that widened numbers are wanted in.
    computed: DType,
}

#[derive(Debug)]
enum Store {
    Half(Tensor),
    Blocks(QTensor),
}

impl Matrix {
    fn packed(store: Store, computed: DType) -> Self {
        Self::Packed(Arc::new(Packed { store: Arc::new(store), low_rank: None, computed }))
    }

    /// Numbers of 16 bits that are computed with in the type `computed`.
    pub(crate) fn half(tensor: &Tensor, dtype: DType, computed: DType) -> Result<Self> {
        Ok(Self::packed(Store::Half(tensor.to_dtype(dtype)?), computed))
    }

    /// Blocks that are computed with in the type `computed`.
    pub(crate) fn blocks(tensor: &Tensor, kind: GgmlDType, computed: DType) -> Result<Self> {
        Ok(Self::packed(Store::Blocks(QTensor::quantize(tensor, kind)?), computed))
    }

    /// The sizes.
    pub fn dims(&self) -> &[usize] {
        match self {
            Self::Dense(tensor) => tensor.dims(),
            Self::Packed(packed) => match &*packed.store {
                Store::Half(tensor) => tensor.dims(),
                Store::Blocks(blocks) => blocks.shape().dims(),
            },
        }
    }

    /// The type that is computed in.
    pub fn dtype(&self) -> DType {
        match self {
            Self::Dense(tensor) => tensor.dtype(),
            Self::Packed(packed) => packed.computed,
        }
    }

    /// Bytes that the numbers take, with what was merged into them.
    pub fn bytes(&self) -> usize {
        let dense = |tensor: &Tensor| tensor.elem_count() * tensor.dtype().size_in_bytes();
        match self {
            Self::Dense(tensor) => dense(tensor),
            Self::Packed(packed) => {
                packed.low_rank.iter().flatten().map(dense).sum::<usize>()
                    + match &*packed.store {
                        Store::Half(tensor) => dense(tensor),
                        Store::Blocks(blocks) => blocks.storage_size_in_bytes(),
                    }
            }
        }
    }

    /// All numbers, in the type that is computed in. A packed matrix is widened anew at each call.
    ///
    /// # Errors
    /// The device failed.
    pub fn dense(&self) -> Result<Tensor> {
        match self {
            Self::Dense(tensor) => Ok(tensor.clone()),
            Self::Packed(packed) => packed.rows(0..self.dims()[0]),
        }
    }

    /// All numbers in a type of which nothing is lost: as stored, or f32 for blocks and for what was merged.
    pub(crate) fn exact(&self) -> Result<Tensor> {
        match self {
            Self::Packed(packed) => match (&*packed.store, &packed.low_rank) {
                (Store::Half(tensor), None) => Ok(tensor.clone()),
                _ => packed.wide_rows(0..self.dims()[0]),
            },
            Self::Dense(tensor) => Ok(tensor.clone()),
        }
    }

    /// The rows `ids: [n]` (u32), `[n, columns]`.
    ///
    /// # Errors
    /// An id lies outside, or the device failed.
    pub fn gather(&self, ids: &Tensor) -> Result<Tensor> {
        match self {
            Self::Dense(tensor) => Ok(tensor.index_select(ids, 0)?),
            Self::Packed(packed) => {
                let rows = match &*packed.store {
                    Store::Half(tensor) => tensor.index_select(ids, 0)?.to_dtype(DType::F32)?,
                    Store::Blocks(blocks) => blocks.embedding(ids)?,
                };
                packed.finish(rows, |b| b.index_select(ids, 0))
            }
        }
    }

    /// The matrix plus `scale · B A` for `a: [r, columns]` and `b: [rows, r]`. A dense one is rounded to its type; a
    /// packed one keeps the factors beside the stored numbers, and nothing is rounded.
    pub(crate) fn plus(&self, scale: f64, b: &Tensor, a: &Tensor) -> Result<Self> {
        match self {
            Self::Dense(tensor) => {
                let delta = Gemm::NN.times(scale).product(b, a)?;
                Ok(Self::Dense((tensor.to_dtype(delta.dtype())? + delta)?.to_dtype(tensor.dtype())?))
            }
            Self::Packed(packed) => {
                let b = (b.to_dtype(DType::F32)? * scale)?;
                let a = a.to_dtype(DType::F32)?;
                let low_rank = match &packed.low_rank {
                    None => [b.contiguous()?, a.copy()?],
                    Some([before, earlier]) => [Tensor::cat(&[before, &b], 1)?, Tensor::cat(&[earlier, &a], 0)?],
                };
                let (store, computed) = (packed.store.clone(), packed.computed);
                Ok(Self::Packed(Arc::new(Packed { store, low_rank: Some(low_rank), computed })))
            }
        }
    }

    /// The same numbers as constants.
    pub(crate) fn detach(&self) -> Self {
        match self {
            Self::Dense(tensor) => Self::Dense(tensor.detach()),
            packed @ Self::Packed(_) => packed.clone(),
        }
    }

    /// The same numbers in memory of their own, where anybody could change them.
    pub(crate) fn copy(&self) -> Result<Self> {
        match self {
            Self::Dense(tensor) => Ok(Self::Dense(tensor.copy()?)),
            packed @ Self::Packed(_) => Ok(packed.clone()),
        }
    }
}

impl Packed {
    /// The rows `range` as they are computed with, `[n, columns]`.
    pub(crate) fn rows(&self, range: Range<usize>) -> Result<Tensor> {
        Ok(self.wide_rows(range)?.to_dtype(self.computed)?)
    }

    /// The rows `range` in f32.
    fn wide_rows(&self, range: Range<usize>) -> Result<Tensor> {
        let rows = match &*self.store {
            Store::Half(tensor) => tensor.narrow(0, range.start, range.len())?.to_dtype(DType::F32)?,
            Store::Blocks(blocks) if range.len() == blocks.shape().dims()[0] => blocks.dequantize(&blocks.device())?,
            Store::Blocks(blocks) => {
                blocks.embedding(&Tensor::arange(range.start as u32, range.end as u32, &blocks.device())?)?
            }
        };
        self.add_low_rank(&rows, |b| b.narrow(0, range.start, range.len()))?;
        Ok(rows)
    }

    fn finish(&self, rows: Tensor, select: impl FnOnce(&Tensor) -> candle_core::Result<Tensor>) -> Result<Tensor> {
        self.add_low_rank(&rows, select)?;
        Ok(rows.to_dtype(self.computed)?)
    }

    /// Adds what was merged to freshly widened f32 rows, given how to choose the same rows of `B`.
    fn add_low_rank(&self, rows: &Tensor, select: impl FnOnce(&Tensor) -> candle_core::Result<Tensor>) -> Result<()> {
        match &self.low_rank {
            None => Ok(()),
            Some([b, a]) => Gemm::NN.add_to(rows, &select(b)?.contiguous()?, a),
        }
    }
}
