//! Log-probabilities as candle expressions, for losses of a defense's own.

use candle_core::{DType, Tensor};

use crate::data::Batch;
use crate::error::Result;
use crate::model::architecture::check_id;
use crate::tensor::ops;

/// The hidden states that predict a label, `[labels, width]`, out of `[tokens, width]`.
///
/// # Errors
/// A tensor operation failed.
pub fn label_rows(hidden: &Tensor, batch: &Batch) -> Result<Tensor> {
    Ok(hidden.index_select(&batch.positions, 0)?)
}

/// The log-probability of each of `labels: [labels]`, of which `largest` is the largest, given the logits of the rows that
/// predict them, `[labels, vocabulary]`.
///
/// # Errors
/// A label lies outside of the vocabulary, or a tensor operation failed.
pub fn label_log_probabilities(logits: &Tensor, labels: &Tensor, largest: u32) -> Result<Tensor> {
    check_id("label", largest, logits.dims2()?.1)?;
    Ok(log_softmax(logits, 1)?.gather(&labels.unsqueeze(1)?, 1)?.squeeze(1)?)
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
