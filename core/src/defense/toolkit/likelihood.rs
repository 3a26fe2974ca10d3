//! Log-probabilities as candle expressions, for losses of a defense's own.

use candle_core::{DType, Tensor};

use crate::data::Batch;
use crate::error::Result;
use crate::tensor::ops;

/// The hidden states that predict a label, `[labels, width]`, out of `[batch, length, width]`.
///
/// # Errors
/// A tensor operation failed.
pub fn label_rows(hidden: &Tensor, batch: &Batch) -> Result<Tensor> {
    Ok(hidden.flatten(0, 1)?.index_select(&batch.positions, 0)?)
}

/// `x` in at least 32 bits, in which sums over many elements are taken.
///
/// # Errors
/// A tensor operation failed.
pub fn wide(x: &Tensor) -> Result<Tensor> {
    Ok(if x.dtype() == DType::F64 { x.clone() } else { x.to_dtype(DType::F32)? })
}

/// `x − log Σ exp x` over dimension `dim`, in at least 32 bits.
///
/// # Errors
/// A tensor operation failed.
pub fn log_softmax(x: &Tensor, dim: usize) -> Result<Tensor> {
    ops::log_softmax(&wide(x)?, dim)
}
