//! The mean cross-entropy of a model's head, without a tensor of all logits.
//!
//! Logits exist for one block of rows at a time. While they do, the gradient of the block's hidden states is taken too,
//! so that the backward pass has nothing left to do but to scale it.

use candle_core::{DType, Tensor};
use titer_kernels::cross_entropy as kernels;

use super::expression::{log_softmax, mean_all};
use crate::error::{Error, Result};
use crate::tensor::gemm::Gemm;
use crate::tensor::host::{Element, by_dtype, read, tensor};
use crate::tensor::matrix::Matrix;
use crate::tensor::product::{multiply, multiply_transposed};
use crate::tensor::tape::{Tape, Traced};

/// Logits that exist at a time.
const BLOCK: usize = 1 << 24;

/// `−1/N Σ log softmax(H Wᵀ)[target]` for hidden states `H: [N, width]`, a head `W: [vocabulary, width]` and
/// `targets: [N]` (u32), in nats; the sum is taken in f32 or wider.
///
/// # Errors
/// A label lies outside the vocabulary, or a tensor operation failed.
pub fn head_cross_entropy(
    tape: &mut Tape,
    hidden: &Traced,
    weight: impl Into<Traced<Matrix>>,
    targets: &Tensor,
) -> Result<Traced> {
    let weight = weight.into();
    let (h, w) = (hidden.tensor().contiguous()?, weight.tensor().clone());
    let (count, _) = h.dims2()?;
    if count == 0 {
        return Err(Error::run("the loss has no label: it would be 0/0"));
    }
    let vocabulary = w.dims()[0];
    check_targets(targets, vocabulary)?;
    let wants = [hidden.tracked(), weight.tracked()];
    let Parts { loss, dh, dw } = dispatch!(
        h,
        head_cuda(&h, &w.dense()?, targets, wants),
        by_dtype!(h.dtype(), head_host(&h, &w, targets, wants))
    )?;
    let weight = weight.with_tensor(loss.clone());
    Ok(tape.record(loss, &[hidden, &weight], move |gradient, into| {
        dh.map_or(Ok(()), |dh| into.add(0, scaled(dh, &gradient)?))?;
        dw.map_or(Ok(()), |dw| into.add(1, scaled(dw, &gradient)?))
    }))
}

/// The same for logits `[N, vocabulary]` that exist already.
///
/// # Errors
/// As [`head_cross_entropy`].
pub fn cross_entropy(tape: &mut Tape, logits: &Traced, targets: &Tensor) -> Result<Traced> {
    let targets = targets.clone();
    check_targets(&targets, logits.tensor().dims2()?.1)?;
    tape.composed(&[logits], |inputs| {
        let logits = inputs[0].to_dtype(wide(inputs[0].dtype()))?;
        let log_probabilities = log_softmax(&logits, 1).map_err(candle_core::Error::wrap)?;
        let correct = log_probabilities.gather(&targets.unsqueeze(1)?, 1)?;
        mean_all(&correct).map_err(candle_core::Error::wrap)?.neg()
    })
}

/// `t` times a number, which a device keeps to itself: to ask for it would wait for all earlier work.
fn scaled(t: Tensor, by: &Tensor) -> Result<Tensor> {
    dispatch!(t, crate::tensor::cuda::scale(&t, by).map(|()| t), {
        let by = by.to_dtype(DType::F64)?.to_scalar::<f64>()?;
        if by == 1. { Ok(t) } else { Ok((t * by)?) }
    })
}

fn wide(dtype: DType) -> DType {
    if dtype == DType::F64 { DType::F64 } else { DType::F32 }
}

/// A label outside the vocabulary would be read out of bounds. On a device the check would wait for all earlier work;
/// there the tokenizer's own bound has to do.
fn check_targets(targets: &Tensor, vocabulary: usize) -> Result<()> {
    if !targets.device().is_cpu() {
        return Ok(());
    }
    match targets.to_vec1::<u32>()?.into_iter().find(|&target| target as usize >= vocabulary) {
        Some(target) => Err(Error::data(format!("label {target} lies outside the vocabulary of {vocabulary} tokens"))
            .help("the tokenizer does not belong to this model")),
        None => Ok(()),
    }
}

/// The loss and, where wanted, its gradients.
struct Parts {
    loss: Tensor,
    dh: Option<Tensor>,
    dw: Option<Tensor>,
}

fn head_host<T: Element>(h: &Tensor, w: &Matrix, targets: &Tensor, [wants_h, wants_w]: [bool; 2]) -> Result<Parts> {
    let ((count, width), vocabulary) = (h.dims2()?, w.dims()[0]);
    if w.dims() != [vocabulary, width] {
        return Err(Error::run(format!("hidden states {:?} do not fit a head {:?}", h.dims(), w.dims())));
    }
    let labels = targets.to_vec1::<u32>()?;
    // Equal blocks: a short last one would read the whole head for a few rows.
    let block = count.div_ceil(count.div_ceil((BLOCK / vocabulary).max(64)));
    let mut logits = vec![T::zero(); block * vocabulary];
    let mut losses = Vec::with_capacity(count);
    let dw = wants_w.then(|| Tensor::zeros(w.dims(), h.dtype(), h.device())).transpose()?;
    let scale = T::of(1. / count as f64);
    let mut dh = vec![T::zero(); if wants_h { count * width } else { 0 }];
    read(h, |hs: &[T]| {
        for first in (0..count).step_by(block) {
            let size = block.min(count - first);
            let logits = &mut logits[..size * vocabulary];
            multiply_transposed(w, logits, &hs[first * width..][..size * width])?;
            losses.extend(kernels::losses(logits, vocabulary, &labels[first..][..size], scale));
            if wants_h {
                multiply(w, &mut dh[first * width..][..size * width], false, logits)?;
            }
            if let Some(dw) = &dw {
                // One copy of the block's gradients, so that the product is the common one.
                let gradient = tensor(logits.to_vec(), &[size, vocabulary])?;
                Gemm::TN.add_to(dw, &gradient, &h.narrow(0, first, size)?.contiguous()?)?;
            }
        }
        Ok(())
    })?;
    let total: f64 = losses.iter().map(|&loss| loss.wide()).sum();
    Ok(Parts {
        loss: tensor(vec![T::of(total / count as f64)], &[])?,
        dh: wants_h.then(|| tensor(dh, &[count, width])).transpose()?,
        dw,
    })
}

#[cfg(feature = "cuda")]
fn head_cuda(h: &Tensor, w: &Tensor, targets: &Tensor, [wants_h, wants_w]: [bool; 2]) -> Result<Parts> {
    use crate::tensor::cuda;
    let ((count, width), vocabulary) = (h.dims2()?, w.dims()[0]);
    let block = (BLOCK / vocabulary).max(64);
    let losses = cuda::fresh(h, count, DType::F32)?;
    let dw = wants_w.then(|| w.zeros_like()).transpose()?;
    let mut parts = Vec::new();
    for first in (0..count).step_by(block) {
        let size = block.min(count - first);
        let rows = h.narrow(0, first, size)?;
        let logits = Gemm::NT.product(&rows, w)?;
        let (targets, losses) = (targets.narrow(0, first, size)?, losses.narrow(0, first, size)?);
        cuda::cross_entropy(&logits, &targets, &losses, 1. / count as f32, wants_h || wants_w)?;
        if wants_h {
            parts.push(Gemm::NN.product(&logits, w)?);
        }
        if let Some(dw) = &dw {
            Gemm::TN.add_to(dw, &logits, &rows)?;
        }
    }
    let dh = wants_h.then(|| Tensor::cat(&parts, 0)?.reshape((count, width))).transpose()?;
    Ok(Parts { loss: cuda::mean(&losses)?, dh, dw })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::check::{close, gradients, normal};
    use candle_core::Device;

    #[test]
    fn gradients_equal_finite_differences() -> Result<()> {
        let targets = Tensor::new(&[4u32, 0, 2], &Device::Cpu)?;
        let (hidden, head) = (normal(&[3, 6], 1)?, normal(&[5, 6], 2)?);
        gradients(&[hidden, head], |tape, x| head_cross_entropy(tape, &x[0], &x[1], &targets))?;
        gradients(&[normal(&[3, 5], 1)?], |tape, x| cross_entropy(tape, &x[0], &targets))
    }

    #[test]
    fn equals_the_composed_form_over_several_blocks() -> Result<()> {
        let (count, vocabulary) = (150, BLOCK / 64);
        let labels: Vec<u32> = (0..count).map(|at| at * 7 % 1000).collect();
        let targets = Tensor::new(labels, &Device::Cpu)?;
        let hidden = normal(&[count as usize, 2], 1)?.as_detached_tensor();
        let head = normal(&[vocabulary, 2], 2)?.as_detached_tensor();
        let composed = candle_nn::loss::cross_entropy(&hidden.matmul(&head.t()?)?, &targets)?;
        let [hidden, head] = [hidden, head].map(Traced::constant);
        close(head_cross_entropy(&mut Tape::default(), &hidden, &head, &targets)?.tensor(), &composed, 1e-12)
    }

    #[test]
    fn a_label_outside_the_vocabulary_is_an_error() -> Result<()> {
        let targets = Tensor::new(&[3u32], &Device::Cpu)?;
        let [hidden, head] = [&[1, 2], &[3, 2]].map(|shape| normal(shape, 1).expect("a tensor").as_detached_tensor());
        let tape = &mut Tape::default();
        assert!(head_cross_entropy(tape, &Traced::constant(hidden), &Traced::constant(head), &targets).is_err());
        Ok(())
    }
}
