//! A parameter as it is stored: in full, or frozen in low precision (half precision or quantized).
//!
//! A frozen matrix is never computed with as it is stored. Its rows are dequantized a few at a time, or on a device all at
//! once, and what is computed is exactly what a dense matrix of the dequantized numbers would give.

use std::ops::Range;
use std::sync::Arc;

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Tensor};

use crate::error::Result;
use crate::tensor::gemm::Gemm;

/// A parameter as it is stored: a matrix `[rows, columns]`, or a dense tensor of any shape.
#[derive(Debug, Clone)]
pub enum Matrix {
    /// In the type that is computed in; maybe under training.
    Dense(Tensor),
    /// Frozen, in low precision: half precision or quantized.
    LowPrecision(Arc<LowPrecision>),
}

/// A frozen matrix in half precision or quantized, plus what was merged into it since.
#[derive(Debug)]
pub struct LowPrecision {
    store: Arc<Storage>,
    /// `B: [rows, r]` and `A: [r, columns]` in f32, to be added as `B A`. Rounded onto the stored numbers, most of an
    /// adapter would vanish: its entries are smaller than half a step between two of them.
    low_rank: Option<[Tensor; 2]>,
    /// The type that dequantized numbers are wanted in.
    computed: DType,
}

#[derive(Debug)]
enum Storage {
    Half(Tensor),
    Quantized(QTensor),
}

impl Matrix {
    fn low(store: Storage, computed: DType) -> Self {
        Self::LowPrecision(Arc::new(LowPrecision { store: Arc::new(store), low_rank: None, computed }))
    }

    /// Numbers of 16 bits that are computed with in the type `computed`.
    pub(crate) fn half(tensor: &Tensor, dtype: DType, computed: DType) -> Result<Self> {
        Ok(Self::low(Storage::Half(tensor.to_dtype(dtype)?), computed))
    }

    /// Quantized numbers that are computed with in the type `computed`.
    pub(crate) fn quantized(tensor: &Tensor, kind: GgmlDType, computed: DType) -> Result<Self> {
        Ok(Self::low(Storage::Quantized(QTensor::quantize(tensor, kind)?), computed))
    }

    /// The sizes.
    pub fn dims(&self) -> &[usize] {
        match self {
            Self::Dense(tensor) => tensor.dims(),
            Self::LowPrecision(low) => match &*low.store {
                Storage::Half(tensor) => tensor.dims(),
                Storage::Quantized(quantized) => quantized.shape().dims(),
            },
        }
    }

    /// The type that is computed in.
    pub fn dtype(&self) -> DType {
        match self {
            Self::Dense(tensor) => tensor.dtype(),
            Self::LowPrecision(low) => low.computed,
        }
    }

    /// Bytes that the numbers take, with what was merged into them.
    pub fn bytes(&self) -> usize {
        let dense = |tensor: &Tensor| tensor.elem_count() * tensor.dtype().size_in_bytes();
        match self {
            Self::Dense(tensor) => dense(tensor),
            Self::LowPrecision(low) => {
                low.low_rank.iter().flatten().map(dense).sum::<usize>()
                    + match &*low.store {
                        Storage::Half(tensor) => dense(tensor),
                        Storage::Quantized(quantized) => quantized.storage_size_in_bytes(),
                    }
            }
        }
    }

    /// All numbers, in the type that is computed in. A matrix in low precision is dequantized anew at each call.
    ///
    /// # Errors
    /// The device failed.
    pub fn dense(&self) -> Result<Tensor> {
        match self {
            Self::Dense(tensor) => Ok(tensor.clone()),
            Self::LowPrecision(low) => low.rows(0..self.dims()[0]),
        }
    }

    /// All numbers in a type of which nothing is lost: as stored, or f32 for blocks and for what was merged.
    pub(crate) fn exact(&self) -> Result<Tensor> {
        match self {
            Self::LowPrecision(low) => match (&*low.store, &low.low_rank) {
                (Storage::Half(tensor), None) => Ok(tensor.clone()),
                _ => low.wide_rows(0..self.dims()[0]),
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
            Self::LowPrecision(low) => {
                let rows = match &*low.store {
                    Storage::Half(tensor) => tensor.index_select(ids, 0)?.to_dtype(DType::F32)?,
                    Storage::Quantized(quantized) => quantized.embedding(ids)?,
                };
                low.computed(rows, |b| b.index_select(ids, 0))
            }
        }
    }

    /// The matrix plus `scale · B A` for `a: [r, columns]` and `b: [rows, r]`. A dense one is rounded to its type; a
    /// low one keeps the factors beside the stored numbers, and nothing is rounded.
    pub(crate) fn plus(&self, scale: f64, b: &Tensor, a: &Tensor) -> Result<Self> {
        match self {
            Self::Dense(tensor) => {
                let delta = Gemm::NN.times(scale).product(b, a)?;
                Ok(Self::Dense((tensor.to_dtype(delta.dtype())? + delta)?.to_dtype(tensor.dtype())?))
            }
            Self::LowPrecision(low) => {
                let b = (b.to_dtype(DType::F32)? * scale)?;
                let a = a.to_dtype(DType::F32)?;
                let low_rank = match &low.low_rank {
                    None => [b.contiguous()?, a.copy()?],
                    Some([before, earlier]) => [Tensor::cat(&[before, &b], 1)?, Tensor::cat(&[earlier, &a], 0)?],
                };
                let (store, computed) = (low.store.clone(), low.computed);
                Ok(Self::LowPrecision(Arc::new(LowPrecision { store, low_rank: Some(low_rank), computed })))
            }
        }
    }

    /// The same numbers as constants.
    pub(crate) fn detach(&self) -> Self {
        match self {
            Self::Dense(tensor) => Self::Dense(tensor.detach()),
            low @ Self::LowPrecision(_) => low.clone(),
        }
    }

    /// The same numbers in memory of their own, where anybody could change them.
    pub(crate) fn copy(&self) -> Result<Self> {
        match self {
            Self::Dense(tensor) => Ok(Self::Dense(tensor.copy()?)),
            low @ Self::LowPrecision(_) => Ok(low.clone()),
        }
    }
}

impl LowPrecision {
    /// The rows `range` as they are computed with, `[n, columns]`.
    pub(crate) fn rows(&self, range: Range<usize>) -> Result<Tensor> {
        Ok(self.wide_rows(range)?.to_dtype(self.computed)?)
    }

    /// The rows `range` in f32.
    fn wide_rows(&self, range: Range<usize>) -> Result<Tensor> {
        let rows = match &*self.store {
            Storage::Half(tensor) => tensor.narrow(0, range.start, range.len())?.to_dtype(DType::F32)?,
            Storage::Quantized(quantized) if range.len() == quantized.shape().dims()[0] => {
                quantized.dequantize(&quantized.device())?
            }
            Storage::Quantized(quantized) => {
                quantized.embedding(&Tensor::arange(range.start as u32, range.end as u32, &quantized.device())?)?
            }
        };
        self.add_low_rank(&rows, |b| b.narrow(0, range.start, range.len()))?;
        Ok(rows)
    }

    fn computed(&self, rows: Tensor, select: impl FnOnce(&Tensor) -> candle_core::Result<Tensor>) -> Result<Tensor> {
        self.add_low_rank(&rows, select)?;
        Ok(rows.to_dtype(self.computed)?)
    }

    /// Adds what was merged to freshly dequantized f32 rows, given how to choose the same rows of `B`.
    fn add_low_rank(&self, rows: &Tensor, select: impl FnOnce(&Tensor) -> candle_core::Result<Tensor>) -> Result<()> {
        match &self.low_rank {
            None => Ok(()),
            Some([b, a]) => Gemm::NN.add_to(rows, &select(b)?.contiguous()?, a),
        }
    }
}
