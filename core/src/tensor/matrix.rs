//! A parameter as it is stored: in full, or frozen in low precision (half precision or quantized).
//!
//! The rows of a frozen matrix are dequantized a few at a time, or on a device all at once. What is computed is what a
//! dense matrix of the dequantized numbers would give, to rounding: large products are cut at other places, and what an
//! adapter merged is multiplied apart where there are few rows, or where a tile unit takes bf16 numbers as they are stored.
//! Only answers in native arithmetic are computed with blocks as they are stored: their activations are rounded to 8 bits
//! instead, and multiplied with the stored integers.

use std::sync::Arc;

use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use candle_core::{CpuStorage, DType, Device, Tensor};
use half::slice::HalfFloatSliceExt;
use titer_kernels::gemm::{few_rows_by_encoded, product, product_into, product_with_bf16_into, rounded_by_encoded};
use titer_kernels::low_precision::{EncodedMatrix, Encoding};
use titer_kernels::matrix::{View, ViewMut};

use crate::error::{Error, Result};
use crate::tensor::gemm::Gemm;
use crate::tensor::host::read_all;

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
    /// Whether what it is multiplied with may be rounded to 8 bits.
    rounds: bool,
}

#[derive(Debug)]
enum Storage {
    Half(Tensor),
    Quantized(Box<QTensor>),
}

impl Storage {
    fn device(&self) -> Device {
        match self {
            Self::Half(tensor) => tensor.device().clone(),
            Self::Quantized(quantized) => quantized.device(),
        }
    }
}

impl Matrix {
    fn low(store: Storage, computed: DType) -> Self {
        Self::LowPrecision(Arc::new(LowPrecision { store: Arc::new(store), low_rank: None, computed, rounds: false }))
    }

    /// Numbers of 16 bits that are computed with in the type `computed`.
    pub(crate) fn half(tensor: &Tensor, dtype: DType, computed: DType) -> Result<Self> {
        Ok(Self::low(Storage::Half(tensor.to_dtype(dtype)?), computed))
    }

    /// The numbers of a tensor on the host, quantized and then brought to `device`, where they are computed with in the
    /// type `computed`.
    pub(crate) fn quantized(tensor: &Tensor, kind: GgmlDType, computed: DType, device: &Device) -> Result<Self> {
        Ok(Self::low(Storage::Quantized(Box::new(QTensor::quantize_onto(tensor, kind, device)?)), computed))
    }

    /// Whether there are kernels for blocks of this kind.
    pub(crate) fn multiplies(kind: GgmlDType) -> bool {
        encoding(kind).is_ok()
    }

    /// Blocks of the host, brought to `device` as they are.
    pub(crate) fn blocks(blocks: QTensor, computed: DType, device: &Device) -> Result<Self> {
        if device.is_cpu() {
            return Ok(Self::low(Storage::Quantized(Box::new(blocks)), computed));
        }
        let storage = QStorage::from_data(blocks.data()?, device, blocks.dtype())?;
        Ok(Self::low(Storage::Quantized(Box::new(QTensor::new(storage, blocks.shape())?)), computed))
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
            Self::LowPrecision(low) if low.low_rank.is_none() => low.stored(low.computed),
            Self::LowPrecision(low) => Ok(low.wide()?.to_dtype(low.computed)?),
        }
    }

    /// All numbers in a type of which nothing is lost: as stored, or f32 for blocks and for what was merged.
    pub(crate) fn exact(&self) -> Result<Tensor> {
        match self {
            Self::LowPrecision(low) => match (&*low.store, &low.low_rank) {
                (Storage::Half(tensor), None) => Ok(tensor.clone()),
                _ => low.wide(),
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
                low.add_low_rank(&rows, |b| b.index_select(ids, 0))?;
                Ok(rows.to_dtype(low.computed)?)
            }
        }
    }

    /// The matrix plus `scale · B A` for `a: [r, columns]` and `b: [rows, r]`. A dense one is rounded to its type; a
    /// low one keeps the factors beside the stored numbers, and nothing is rounded.
    pub(crate) fn plus(&self, scale: f64, b: &Tensor, a: &Tensor) -> Result<Self> {
        match self {
            Self::Dense(tensor) => {
                let delta = Gemm::NN.times(scale).product(b, a)?;
                let sum = (tensor.to_device(delta.device())?.to_dtype(delta.dtype())? + delta)?;
                Ok(Self::Dense(sum.to_dtype(tensor.dtype())?.to_device(tensor.device())?))
            }
            Self::LowPrecision(low) => {
                let placed = |factor: &Tensor| factor.to_dtype(DType::F32)?.to_device(&low.store.device());
                let (b, a) = ((placed(b)? * scale)?, placed(a)?);
                let low_rank = match &low.low_rank {
                    None => [b.contiguous()?, a.copy()?],
                    Some([before, earlier]) => [Tensor::cat(&[before, &b], 1)?, Tensor::cat(&[earlier, &a], 0)?],
                };
                Ok(low.with(Some(low_rank), low.rounds))
            }
        }
    }

    /// The same numbers, to be multiplied in answers: in native arithmetic, blocks are multiplied with activations that are
    /// rounded to 8 bits.
    pub(crate) fn for_answers(&self) -> Self {
        match self {
            Self::Dense(_) => self.clone(),
            Self::LowPrecision(low) => low.with(low.low_rank.clone(), true),
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
    /// The same stored numbers, with these merged.
    fn with(&self, low_rank: Option<[Tensor; 2]>, rounds: bool) -> Matrix {
        let (store, computed) = (self.store.clone(), self.computed);
        Matrix::LowPrecision(Arc::new(Self { store, low_rank, computed, rounds }))
    }

    /// All numbers in f32.
    fn wide(&self) -> Result<Tensor> {
        let rows = self.stored(DType::F32)?;
        self.add_low_rank(&rows, |b| Ok(b.clone()))?;
        Ok(rows)
    }

    /// All numbers as they are stored, in the type `dtype`.
    fn stored(&self, dtype: DType) -> Result<Tensor> {
        match &*self.store {
            Storage::Half(tensor) => Ok(tensor.to_dtype(dtype)?),
            Storage::Quantized(quantized) => dispatch!(
                quantized,
                super::cuda::decode(quantized, dtype),
                Ok(quantized.dequantize(&Device::Cpu)?.to_dtype(dtype)?)
            ),
        }
    }

    /// Fills `out` with the rows from `first` on, of a matrix on the host.
    pub(super) fn decode(&self, first: usize, out: &mut [f32]) -> Result<()> {
        let columns = self.read_encoded(|matrix| {
            matrix.decode(first, out);
            Ok(matrix.size()[1])
        })?;
        self.with_low_rank(|b, a, rank| {
            let rows = out.len() / columns;
            let b = View::of(&b[first * rank..][..rows * rank], rows, rank);
            product_into(ViewMut::new(out, [rows, columns], columns), true, 1., b, View::of(a, rank, columns));
        })
    }

    /// `Y = X Wᵀ` for rows `x: [n, columns]` that are few or may be rounded, without a dense matrix; says whether it did.
    /// What was merged is multiplied apart.
    pub(super) fn product_as_stored(&self, y: &mut [f32], x: &[f32]) -> Result<bool> {
        let done = self.read_encoded(|matrix| {
            let done = self.rounds && rounded_by_encoded(y, x, matrix) || few_rows_by_encoded(y, x, matrix);
            Ok(done.then(|| matrix.size()))
        })?;
        let Some([rows, columns]) = done else { return Ok(false) };
        let n = x.len() / columns;
        self.add_low_rank_product(ViewMut::new(y, [n, rows], rows), View::of(x, n, columns), true)?;
        Ok(true)
    }

    /// `C = A W` or, if it `accumulate`s, `C += A W`; with the transpose of `W` if `transpose`d; if it is stored in bf16 and a
    /// kernel takes it so. Says whether it did. What was merged is multiplied apart.
    pub(super) fn product_of_bf16(&self, c: &mut [f32], accumulate: bool, a: &[f32], transpose: bool) -> Result<bool> {
        let done = self.read_encoded(|matrix| {
            let [rows, columns] = matrix.size();
            let (inner, width) = if transpose { (columns, rows) } else { (rows, columns) };
            let n = a.len() / inner;
            let (target, a) = (ViewMut::new(c, [n, width], width), View::of(a, n, inner));
            Ok(product_with_bf16_into(target, accumulate, a, matrix, transpose).then_some([n, inner, width]))
        })?;
        let Some([n, inner, width]) = done else { return Ok(false) };
        self.add_low_rank_product(ViewMut::new(c, [n, width], width), View::of(a, n, inner), transpose)?;
        Ok(true)
    }

    /// Adds the product of `x` with what was merged, or with its transpose, to `c`.
    fn add_low_rank_product(&self, c: ViewMut<f32>, x: View<f32>, transpose: bool) -> Result<()> {
        self.with_low_rank(|b, a, rank| {
            let b = View::of(b, b.len() / rank, rank);
            let a = View::of(a, rank, a.len() / rank);
            let (first, second) = if transpose { (a.t(), b.t()) } else { (b, a) };
            let n = x.size()[0];
            let inner = product(1., x, first);
            product_into(c, true, 1., View::of(&inner, n, rank), second);
        })
    }

    /// Calls `f` with `B`, `A` and their rank if something was merged.
    fn with_low_rank(&self, f: impl FnOnce(&[f32], &[f32], usize)) -> Result<()> {
        let Some(factors) = &self.low_rank else { return Ok(()) };
        let rank = factors[1].dims()[0];
        read_all(factors.each_ref(), |[b, a]: [&[f32]; 2]| {
            f(b, a, rank);
            Ok(())
        })
    }

    /// The stored numbers of a matrix on the host, lent to `f`.
    fn read_encoded<R>(&self, f: impl FnOnce(EncodedMatrix) -> Result<R>) -> Result<R> {
        let elsewhere = || Error::run("a host kernel was given a matrix of another device");
        match &*self.store {
            Storage::Half(tensor) => {
                let (rows, columns) = tensor.dims2()?;
                let (storage, layout) = tensor.storage_and_layout();
                let (from, to) = layout.contiguous_offsets().ok_or_else(|| Error::run("a matrix with gaps"))?;
                let candle_core::Storage::Cpu(storage) = &*storage else { return Err(elsewhere()) };
                let (encoding, bits) = match storage {
                    CpuStorage::F16(numbers) => (Encoding::F16, numbers.reinterpret_cast()),
                    CpuStorage::BF16(numbers) => (Encoding::Bf16, numbers.reinterpret_cast()),
                    _ => return Err(Error::run(format!("{:?} is not of half precision", tensor.dtype()))),
                };
                f(EncodedMatrix::of_bits(encoding, &bits[from..to], [rows, columns]))
            }
            Storage::Quantized(quantized) => {
                if !quantized.device().is_cpu() {
                    return Err(elsewhere());
                }
                let (rows, columns) = quantized.shape().dims2()?;
                f(EncodedMatrix::new(encoding(quantized.dtype())?, &quantized.data()?, [rows, columns]))
            }
        }
    }

    /// Adds what was merged to freshly dequantized f32 rows, given how to choose the same rows of `B`.
    fn add_low_rank(&self, rows: &Tensor, select: impl FnOnce(&Tensor) -> candle_core::Result<Tensor>) -> Result<()> {
        match &self.low_rank {
            None => Ok(()),
            Some([b, a]) => Gemm::NN.add_to(rows, &select(b)?.contiguous()?, a),
        }
    }
}

/// How blocks of this kind are stored.
fn encoding(kind: GgmlDType) -> Result<Encoding> {
    match kind {
        GgmlDType::Q8_0 => Ok(Encoding::Q8_0),
        GgmlDType::Q4_0 => Ok(Encoding::Q4_0),
        GgmlDType::Q4_1 => Ok(Encoding::Q4_1),
        GgmlDType::Q6K => Ok(Encoding::Q6K),
        GgmlDType::Q4K => Ok(Encoding::Q4K),
        other => Err(Error::run(format!("no host kernel for {other:?}"))),
    }
}
