//! The gate of a Llama MLP: `y = silu(gate) ∘ up`, with `silu(z) = z / (1 + e⁻ᶻ)`.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp2, Layout, Shape, Tensor};

use super::{CandleResult, Real, by_dtype, on_host, read, slice};
use crate::Result;

/// `silu(gate) ∘ up`, element by element.
///
/// # Errors
/// The shapes differ, or a tensor operation failed.
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    if on_host(gate) {
        return Ok(gate.contiguous()?.apply_op2(&up.contiguous()?, SwiGlu)?);
    }
    Ok((gate.silu()? * up)?)
}

struct SwiGlu;

fn sigmoid<T: Real>(z: T) -> T {
    T::one() / (T::one() + (-z).fast_exp())
}

fn forward<T: Real>(gate: &CpuStorage, lg: &Layout, up: &CpuStorage, lu: &Layout) -> CandleResult<CpuStorage> {
    let (gate, up) = (slice::<T>(gate, lg)?, slice::<T>(up, lu)?);
    let y = gate.iter().zip(up).map(|(&z, &u)| z * sigmoid(z) * u).collect();
    Ok(T::to_cpu_storage_owned(y))
}

fn backward<T: Real>(gate: &Tensor, up: &Tensor, grad: &Tensor) -> CandleResult<(Tensor, Tensor)> {
    read(gate, |zs: &[T]| {
        read(up, |us: &[T]| {
            read(grad, |gs: &[T]| {
                let (mut dgate, mut dup) = (vec![T::zero(); zs.len()], vec![T::zero(); zs.len()]);
                let outputs = dgate.iter_mut().zip(&mut dup);
                for (((dgate, dup), (&z, &u)), &g) in outputs.zip(zs.iter().zip(us)).zip(gs) {
                    let s = sigmoid(z);
                    *dgate = g * u * s * (T::one() + z * (T::one() - s));
                    *dup = g * z * s;
                }
                Ok((
                    Tensor::from_vec(dgate, gate.shape(), gate.device())?,
                    Tensor::from_vec(dup, up.shape(), up.device())?,
                ))
            })
        })
    })
}

impl CustomOp2 for SwiGlu {
    fn name(&self) -> &'static str {
        "swiglu"
    }

    fn cpu_fwd(&self, g: &CpuStorage, lg: &Layout, u: &CpuStorage, lu: &Layout) -> CandleResult<(CpuStorage, Shape)> {
        if lg.shape() != lu.shape() {
            candle_core::bail!("swiglu: shapes {:?} and {:?} differ", lg.shape(), lu.shape());
        }
        Ok((by_dtype!(g.dtype(), forward(g, lg, u, lu))?, lg.shape().clone()))
    }

    fn bwd(
        &self,
        g: &Tensor,
        u: &Tensor,
        _y: &Tensor,
        grad: &Tensor,
    ) -> CandleResult<(Option<Tensor>, Option<Tensor>)> {
        let (dg, du) = by_dtype!(g.dtype(), backward(g, u, grad))?;
        Ok((Some(dg), Some(du)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::check::{close, gradients, normal};

    #[test]
    fn gradients_equal_finite_differences() -> Result<()> {
        gradients(&[normal(&[3, 5], 1)?, normal(&[3, 5], 2)?], |inputs| swiglu(&inputs[0], &inputs[1]))
    }

    #[test]
    fn equals_the_composed_form() -> Result<()> {
        let (gate, up) = (normal(&[3, 6], 1)?.as_detached_tensor(), normal(&[3, 6], 2)?.as_detached_tensor());
        close(&swiglu(&gate, &up)?, &(gate.silu()? * &up)?, 1e-12)
    }
}
