//! Exponentials, logarithms and products of matrices in candle expressions, such as a defense's own loss. Candle's own
//! depend on the processor on the host: they come from the C library, and from blocks tuned to the caches.

use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Shape, Tensor, WithDType};

use super::host::Real;
use super::{CandleResult, Gemm};
use crate::Result;

/// `eˣ` of every element, differentiable.
///
/// # Errors
/// A tensor operation failed.
pub fn exp(x: &Tensor) -> Result<Tensor> {
    host_or(x, Function::Exp, Tensor::exp)
}

/// `ln x` of every element, differentiable.
///
/// # Errors
/// A tensor operation failed.
pub fn ln(x: &Tensor) -> Result<Tensor> {
    host_or(x, Function::Ln, Tensor::log)
}

/// `x − ln Σ eˣ` over dimension `dim`, differentiable.
///
/// # Errors
/// A tensor operation failed.
pub fn log_softmax(x: &Tensor, dim: usize) -> Result<Tensor> {
    let shifted = x.broadcast_sub(&x.max_keepdim(dim)?.detach())?;
    Ok(shifted.broadcast_sub(&ln(&exp(&shifted)?.sum_keepdim(dim)?)?)?)
}

/// `A B` for matrices of f32 or f64, differentiable.
///
/// # Errors
/// The inner sizes differ, or a tensor operation failed.
pub fn matmul(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    Ok(if a.device().is_cpu() { a.contiguous()?.apply_op2(&b.contiguous()?, MatMul)? } else { a.matmul(b)? })
}

struct MatMul;

impl CustomOp2 for MatMul {
    fn name(&self) -> &'static str {
        "matmul"
    }

    fn cpu_fwd(
        &self,
        a: &CpuStorage,
        a_layout: &Layout,
        b: &CpuStorage,
        b_layout: &Layout,
    ) -> CandleResult<(CpuStorage, Shape)> {
        let shape = |layout: &Layout| layout.shape().clone();
        match (a, b) {
            (CpuStorage::F32(a), CpuStorage::F32(b)) => {
                let of =
                    |values: &[f32], layout: &Layout| Tensor::from_slice(part(values, layout)?, shape(layout), CPU);
                product(&of(a, a_layout)?, &of(b, b_layout)?, |c| {
                    Ok(f32::to_cpu_storage_owned(c.flatten_all()?.to_vec1()?))
                })
            }
            (CpuStorage::F64(a), CpuStorage::F64(b)) => {
                let of =
                    |values: &[f64], layout: &Layout| Tensor::from_slice(part(values, layout)?, shape(layout), CPU);
                product(&of(a, a_layout)?, &of(b, b_layout)?, |c| {
                    Ok(f64::to_cpu_storage_owned(c.flatten_all()?.to_vec1()?))
                })
            }
            _ => candle_core::bail!("matmul takes two matrices of f32 or of f64 on the host"),
        }
    }

    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        _: &Tensor,
        gradient: &Tensor,
    ) -> CandleResult<(Option<Tensor>, Option<Tensor>)> {
        let (da, db) = (Gemm::NT.product(gradient, b), Gemm::TN.product(a, gradient));
        Ok((Some(da.map_err(candle_core::Error::wrap)?), Some(db.map_err(candle_core::Error::wrap)?)))
    }
}

const CPU: &candle_core::Device = &candle_core::Device::Cpu;

fn part<'a, T>(values: &'a [T], layout: &Layout) -> CandleResult<&'a [T]> {
    match layout.contiguous_offsets() {
        Some((from, to)) => Ok(&values[from..to]),
        None => candle_core::bail!("matmul takes contiguous matrices"),
    }
}

fn product(
    a: &Tensor,
    b: &Tensor,
    storage: impl FnOnce(&Tensor) -> CandleResult<CpuStorage>,
) -> CandleResult<(CpuStorage, Shape)> {
    let c = Gemm::NN.product(a, b).map_err(candle_core::Error::wrap)?;
    Ok((storage(&c)?, c.shape().clone()))
}

fn host_or(x: &Tensor, function: Function, device: fn(&Tensor) -> CandleResult<Tensor>) -> Result<Tensor> {
    Ok(if x.device().is_cpu() { x.contiguous()?.apply_op1(function)? } else { device(x)? })
}

#[derive(Debug, Clone, Copy)]
enum Function {
    Exp,
    Ln,
}

impl Function {
    fn of<T: Real>(self, values: &[T]) -> Vec<T> {
        match self {
            Self::Exp => values.iter().map(|x| x.fast_exp()).collect(),
            Self::Ln => values.iter().map(|x| x.portable_ln()).collect(),
        }
    }
}

impl CustomOp1 for Function {
    fn name(&self) -> &'static str {
        match self {
            Self::Exp => "exp",
            Self::Ln => "ln",
        }
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> CandleResult<(CpuStorage, Shape)> {
        let Some((from, to)) = layout.contiguous_offsets() else {
            candle_core::bail!("{} takes contiguous tensors", self.name())
        };
        let values = match storage {
            CpuStorage::F32(values) => f32::to_cpu_storage_owned(self.of(&values[from..to])),
            CpuStorage::F64(values) => f64::to_cpu_storage_owned(self.of(&values[from..to])),
            _ => candle_core::bail!("{} takes f32 or f64 on the host", self.name()),
        };
        Ok((values, layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, y: &Tensor, gradient: &Tensor) -> CandleResult<Option<Tensor>> {
        Ok(Some(match self {
            Self::Exp => (gradient * y)?,
            Self::Ln => (gradient / x)?,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::check::{close, normal};

    #[test]
    fn values_and_gradients_equal_candles() -> Result<()> {
        let x = normal(&[3, 5], 1)?;
        let wide = normal(&[5, 4], 2)?;
        for (ours, theirs) in [
            (exp(&x)?, x.exp()?),
            (ln(&exp(&x)?)?, x.exp()?.log()?),
            (log_softmax(&x, 1)?, candle_nn::ops::log_softmax(&x, 1)?),
            (matmul(&x, &wide)?, x.matmul(&wide)?),
            (matmul(&x, &x.t()?)?, x.matmul(&x.t()?)?),
        ] {
            close(&ours, &theirs, 1e-12)?;
            let of = |y: &Tensor| -> Result<Tensor> {
                Ok(y.sqr()?.sum_all()?.backward()?.get(&x).expect("a gradient").clone())
            };
            close(&of(&ours)?, &of(&theirs)?, 1e-10)?;
        }
        Ok(())
    }
}
