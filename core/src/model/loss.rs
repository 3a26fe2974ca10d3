//! The mean cross-entropy over the labels of a batch.

use crate::data::batch::Batch;
use crate::error::Result;
use crate::model::architecture::{Model, check_id};
use crate::nn::forward::Forward;
use crate::nn::sites::Sites;
use crate::tensor::ops;
use crate::tensor::scalar::Scalar;
use crate::tensor::tape::Traced;
use crate::weights::parameters::Weights;

/// The mean cross-entropy over the labels of `batch`, in nats, without differentiating anything.
///
/// # Errors
/// A tensor operation failed.
pub fn label_loss(model: &dyn Model, weights: &Weights, batch: &Batch) -> Result<f64> {
    let (weights, mut idle) = (weights.frozen(), Sites::none());
    let mut pass = Forward::new(&weights, &mut idle);
    let hidden = model.hidden(&batch.tokens, &mut pass)?;
    Scalar::of(loss_of_hidden(model, &hidden, batch, &mut pass)?.tensor())?.value()
}

/// The mean cross-entropy over the labels of `batch` given the hidden states of its tokens. Logits are computed at the
/// label positions only.
pub(crate) fn loss_of_hidden(model: &dyn Model, hidden: &Traced, batch: &Batch, pass: &mut Forward) -> Result<Traced> {
    check_id("label", batch.largest_target, model.spec().vocab_size)?;
    let rows = ops::select_rows(&mut pass.tape, hidden, &batch.positions)?;
    match model.head() {
        Some(head) if pass.weights.adapter(head).is_none() => {
            let head = pass.matrix(head);
            ops::head_cross_entropy(&mut pass.tape, &rows, head, &batch.targets)
        }
        _ => {
            let logits = model.logits(&rows, pass)?;
            ops::cross_entropy(&mut pass.tape, &logits, &batch.targets)
        }
    }
}
