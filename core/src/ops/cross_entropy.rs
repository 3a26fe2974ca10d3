//! The mean cross-entropy of logits against labels, in nats.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, Layout, Shape, Tensor};

use super::{CandleResult, Real, by_dtype, exp, on_host, read, slice};
use crate::{Error, Result};

/// `−1/N Σ log softmax(logits)[target]` for `logits: [N, vocabulary]` and `targets: [N]` (u32).
///
/// # Errors
/// A label lies outside the vocabulary, or a tensor operation failed.
pub fn cross_entropy(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    let (rows, vocabulary) = logits.dims2()?;
    if rows == 0 {
        return Err(Error::run("the loss has no label: it would be 0/0"));
    }
    if !on_host(logits) {
        let logits = logits.to_dtype(candle_core::DType::F32)?;
        return Ok(candle_nn::loss::cross_entropy(&logits, targets)?);
    }
    let targets = targets.to_vec1::<u32>()?;
    match targets.iter().find(|&&target| target as usize >= vocabulary) {
        Some(target) => Err(Error::data(format!("label {target} lies outside the vocabulary of {vocabulary} tokens"))
            .help("the tokenizer does not belong to this model")),
        None => Ok(logits.contiguous()?.apply_op1(CrossEntropy { targets })?),
    }
}

struct CrossEntropy {
    targets: Vec<u32>,
}

/// `(max, Σ exp(z − max))` of one row; its terms go to `exponentials`.
fn log_sum<T: Real>(row: &[T], exponentials: &mut Vec<T>) -> (T, T) {
    let max = exp::max(row);
    exponentials.clear();
    exponentials.extend(row.iter().map(|&z| (z - max).fast_exp()));
    (max, exp::sum(exponentials))
}

fn forward<T: Real>(logits: &CpuStorage, layout: &Layout, targets: &[u32]) -> CandleResult<CpuStorage> {
    let logits = slice::<T>(logits, layout)?;
    let (mut total, mut exponentials) = (0f64, Vec::new());
    for (row, &target) in logits.chunks_exact(logits.len() / targets.len()).zip(targets) {
        let (max, sum) = log_sum(row, &mut exponentials);
        total += (max + sum.ln() - row[target as usize]).to_f64();
    }
    Ok(T::to_cpu_storage_owned(vec![T::of(total / targets.len() as f64)]))
}

fn backward<T: Real>(logits: &Tensor, targets: &[u32], grad: &Tensor) -> CandleResult<Tensor> {
    let scale = T::of(grad.to_dtype(candle_core::DType::F64)?.to_scalar::<f64>()? / targets.len() as f64);
    read(logits, |values: &[T]| {
        let (mut gradient, mut exponentials) = (Vec::with_capacity(values.len()), Vec::new());
        for (row, &target) in values.chunks_exact(values.len() / targets.len()).zip(targets) {
            let (_, sum) = log_sum(row, &mut exponentials);
            let (start, factor) = (gradient.len(), scale / sum);
            gradient.extend(exponentials.iter().map(|&e| e * factor));
            gradient[start + target as usize] += -scale;
        }
        Tensor::from_vec(gradient, logits.shape(), logits.device())
    })
}

impl CustomOp1 for CrossEntropy {
    fn name(&self) -> &'static str {
        "cross-entropy"
    }

    fn cpu_fwd(&self, logits: &CpuStorage, layout: &Layout) -> CandleResult<(CpuStorage, Shape)> {
        Ok((by_dtype!(logits.dtype(), forward(logits, layout, &self.targets))?, Shape::from(())))
    }

    fn bwd(&self, logits: &Tensor, _loss: &Tensor, grad: &Tensor) -> CandleResult<Option<Tensor>> {
        by_dtype!(logits.dtype(), backward(logits, &self.targets, grad)).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::check::{close, gradients, normal};
    use candle_core::Device;

    #[test]
    fn gradients_equal_finite_differences() -> Result<()> {
        let targets = Tensor::new(&[4u32, 0, 2], &Device::Cpu)?;
        gradients(&[normal(&[3, 5], 1)?], |inputs| cross_entropy(&inputs[0], &targets))
    }

    #[test]
    fn equals_the_composed_form() -> Result<()> {
        let (logits, targets) = (normal(&[3, 6], 1)?.as_detached_tensor(), Tensor::new(&[4u32, 0, 2], &Device::Cpu)?);
        close(&cross_entropy(&logits, &targets)?, &candle_nn::loss::cross_entropy(&logits, &targets)?, 1e-12)
    }

    #[test]
    fn a_label_outside_the_vocabulary_is_an_error() -> Result<()> {
        let (logits, targets) = (normal(&[1, 3], 1)?.as_detached_tensor(), Tensor::new(&[3u32], &Device::Cpu)?);
        assert!(cross_entropy(&logits, &targets).is_err());
        Ok(())
    }
}
