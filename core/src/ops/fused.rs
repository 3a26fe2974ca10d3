//! Results that are computed before candle is told of them, with a backward pass of their own.

use std::sync::Mutex;

use candle_core::{CpuStorage, CudaStorage, CustomOp1, CustomOp2, CustomOp3, Layout, Shape, Storage, Tensor};

use super::CandleResult;
use crate::tape::{Tape, Traced};
use crate::{Error, Result};

/// Runs operators of the tape on up to three candle tensors, as one candle custom operator whose backward pass is the
/// tape's. This is how a defense uses a fused operator inside a candle expression.
///
/// # Errors
/// More than three inputs, or an operator failed.
pub fn fused(inputs: &[&Tensor], f: impl FnOnce(&mut Tape, &[Traced]) -> Result<Traced>) -> Result<Tensor> {
    let mut tape = Tape::default();
    let value = |input: &&Tensor, tape: &mut Tape| {
        if input.track_op() { tape.source(input) } else { Traced::constant((*input).clone()) }
    };
    let values: Vec<Traced> = inputs.iter().map(|input| value(input, &mut tape)).collect();
    let result = f(&mut tape, &values)?;
    let tensor = result.tensor().clone();
    let ran = Mutex::new(Some((tape, result)));
    computed("fused", inputs, &tensor, move |inputs, _, gradient| {
        // Once, since the tape is used up.
        let Some((tape, result)) = ran.lock().ok().and_then(|mut ran| ran.take()) else {
            return Err(Error::run("the backward pass of a fused operator runs once: compute its result again"));
        };
        let mut found = tape.backward(vec![(result, gradient.clone())])?;
        Ok(inputs.iter().map(|input| found.take(input)).collect())
    })
}

/// Makes `result` a function of one to three `inputs` in candle's eyes: `backward(inputs, result, gradient)` gives the
/// gradient of each input, given that of the result.
///
/// # Errors
/// More than three inputs.
pub(super) fn computed<F>(name: &'static str, inputs: &[&Tensor], result: &Tensor, backward: F) -> Result<Tensor>
where
    F: Fn(&[&Tensor], &Tensor, &Tensor) -> Result<Vec<Option<Tensor>>> + Send + Sync + 'static,
{
    // Candle copies a whole storage, wherever the tensor begins in it.
    let result = result.force_contiguous()?;
    if !inputs.iter().any(|input| input.track_op()) {
        return Ok(result);
    }
    let op = Computed { name, result, backward };
    Ok(match inputs {
        [a] => a.apply_op1(op)?,
        [a, b] => a.apply_op2(b, op)?,
        [a, b, c] => a.apply_op3(b, c, op)?,
        _ => return Err(Error::run(format!("a custom operator has one to three inputs, not {}", inputs.len()))),
    })
}

struct Computed<F> {
    name: &'static str,
    result: Tensor,
    backward: F,
}

impl<F> Computed<F>
where
    F: Fn(&[&Tensor], &Tensor, &Tensor) -> Result<Vec<Option<Tensor>>>,
{
    fn cpu(&self) -> CandleResult<(CpuStorage, Shape)> {
        let (storage, layout) = self.result.storage_and_layout();
        match &*storage {
            Storage::Cpu(storage) => {
                use candle_core::backend::BackendStorage;
                Ok((storage.try_clone(layout)?, layout.shape().clone()))
            }
            _ => candle_core::bail!("the result lies on another device"),
        }
    }

    fn cuda(&self) -> CandleResult<(CudaStorage, Shape)> {
        let (storage, layout) = self.result.storage_and_layout();
        match &*storage {
            Storage::Cuda(storage) => {
                use candle_core::backend::BackendStorage;
                Ok((storage.try_clone(layout)?, layout.shape().clone()))
            }
            _ => candle_core::bail!("the result lies on another device"),
        }
    }

    fn gradients<const N: usize>(
        &self,
        inputs: [&Tensor; N],
        result: &Tensor,
        gradient: &Tensor,
    ) -> CandleResult<[Option<Tensor>; N]> {
        let found = (self.backward)(&inputs, result, gradient).map_err(candle_core::Error::wrap)?;
        let mut found = found.into_iter();
        Ok(std::array::from_fn(|_| found.next().flatten()))
    }
}

impl<F> CustomOp1 for Computed<F>
where
    F: Fn(&[&Tensor], &Tensor, &Tensor) -> Result<Vec<Option<Tensor>>>,
{
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> CandleResult<(CpuStorage, Shape)> {
        self.cpu()
    }

    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> CandleResult<(CudaStorage, Shape)> {
        self.cuda()
    }

    fn bwd(&self, a: &Tensor, result: &Tensor, gradient: &Tensor) -> CandleResult<Option<Tensor>> {
        self.gradients([a], result, gradient).map(|[a]| a)
    }
}

impl<F> CustomOp2 for Computed<F>
where
    F: Fn(&[&Tensor], &Tensor, &Tensor) -> Result<Vec<Option<Tensor>>>,
{
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> CandleResult<(CpuStorage, Shape)> {
        self.cpu()
    }

    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout, _: &CudaStorage, _: &Layout) -> CandleResult<(CudaStorage, Shape)> {
        self.cuda()
    }

    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        result: &Tensor,
        gradient: &Tensor,
    ) -> CandleResult<(Option<Tensor>, Option<Tensor>)> {
        self.gradients([a, b], result, gradient).map(|[a, b]| (a, b))
    }
}

impl<F> CustomOp3 for Computed<F>
where
    F: Fn(&[&Tensor], &Tensor, &Tensor) -> Result<Vec<Option<Tensor>>>,
{
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> CandleResult<(CpuStorage, Shape)> {
        self.cpu()
    }

    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> CandleResult<(CudaStorage, Shape)> {
        self.cuda()
    }

    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        c: &Tensor,
        result: &Tensor,
        gradient: &Tensor,
    ) -> CandleResult<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        self.gradients([a, b, c], result, gradient).map(|[a, b, c]| (a, b, c))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::check::{close, normal};
    use crate::ops::{Activation, rms_norm, swiglu};

    /// Candle's autograd through a fused operator in the middle of an expression gives the gradients of the same
    /// expression composed of candle's own operations.
    #[test]
    fn candle_differentiates_through_fused_operators() -> Result<()> {
        let (x, w) = (normal(&[3, 4], 1)?, normal(&[4], 2)?);
        let inner = x.sqr()?;
        let fused = [
            fused(&[&inner], |tape, x| Activation::Silu.apply(tape, &x[0]))?,
            fused(&[&inner, x.as_tensor()], |tape, x| swiglu(tape, &x[0], &x[1]))?,
            fused(&[&inner, w.as_tensor()], |tape, x| rms_norm(tape, &x[0], &x[1], 1e-5))?,
        ];
        let scale = (inner.sqr()?.mean_keepdim(1)? + 1e-5)?.sqrt()?;
        let composed = [
            inner.silu()?,
            (inner.silu()? * x.as_tensor())?,
            inner.broadcast_div(&scale)?.broadcast_mul(w.as_tensor())?,
        ];
        for (fused, composed) in fused.iter().zip(&composed) {
            let (ours, theirs) = (fused.exp()?.sum_all()?.backward()?, composed.exp()?.sum_all()?.backward()?);
            for var in [&x, &w] {
                match (ours.get(var), theirs.get(var)) {
                    (Some(ours), Some(theirs)) => close(ours, theirs, 1e-10)?,
                    (None, None) => {}
                    _ => panic!("only one of the two gives a gradient"),
                }
            }
        }
        Ok(())
    }
}
