//! Root-mean-square normalisation: `y = w ∘ x / √(mean(x²) + ε)`.

use candle_core::{CpuStorage, CustomOp2, D, DType, Layout, Shape, Tensor};

use super::{CandleResult, Real, by_dtype, on_host, read, slice};
use crate::Result;

/// Normalises the last dimension of `x: [..., width]` by `weight: [width]`.
///
/// # Errors
/// A tensor operation failed.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    if on_host(x) {
        return Ok(x.contiguous()?.apply_op2(weight, RmsNorm { eps, trains_weight: weight.track_op() })?);
    }
    composed(x, weight, eps)
}

fn composed(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let wide = if x.dtype() == DType::F64 { x.clone() } else { x.to_dtype(DType::F32)? };
    let scale = (wide.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?;
    Ok(wide.broadcast_div(&scale)?.to_dtype(x.dtype())?.broadcast_mul(weight)?)
}

struct RmsNorm {
    eps: f64,
    trains_weight: bool,
}

/// `1 / √(mean(x²) + ε)` of one row.
fn inverse_rms<T: Real>(row: &[T], eps: f64) -> T {
    let square: T = row.iter().map(|&x| x * x).sum();
    T::one() / (square / T::of(row.len() as f64) + T::of(eps)).sqrt()
}

fn forward<T: Real>(
    x: &CpuStorage,
    lx: &Layout,
    weight: &CpuStorage,
    lw: &Layout,
    eps: f64,
) -> CandleResult<CpuStorage> {
    let (x, weight) = (slice::<T>(x, lx)?, slice::<T>(weight, lw)?);
    let mut y = Vec::with_capacity(x.len());
    for row in x.chunks_exact(weight.len()) {
        let scale = inverse_rms(row, eps);
        y.extend(row.iter().zip(weight).map(|(&x, &w)| x * scale * w));
    }
    Ok(T::to_cpu_storage_owned(y))
}

/// With `r = 1/√(mean(x²)+ε)` and `h = g ∘ w`: `dx = r h − x r³ mean(h ∘ x)`, `dw = Σ g ∘ x r`.
fn backward<T: Real>(
    x: &Tensor,
    weight: &Tensor,
    grad: &Tensor,
    op: &RmsNorm,
) -> CandleResult<(Tensor, Option<Tensor>)> {
    read(x, |xs: &[T]| {
        read(weight, |w: &[T]| {
            read(grad, |gs: &[T]| {
                let width = T::of(w.len() as f64);
                let mut dx = Vec::with_capacity(xs.len());
                let mut dw = vec![T::zero(); w.len()];
                for (row, g) in xs.chunks_exact(w.len()).zip(gs.chunks_exact(w.len())) {
                    let r = inverse_rms(row, op.eps);
                    let dot: T = row.iter().zip(g).zip(w).map(|((&x, &g), &w)| x * g * w).sum();
                    let pull = r * r * r * dot / width;
                    dx.extend(row.iter().zip(g).zip(w).map(|((&x, &g), &w)| r * g * w - x * pull));
                    if op.trains_weight {
                        for ((sum, &x), &g) in dw.iter_mut().zip(row).zip(g) {
                            *sum += g * x * r;
                        }
                    }
                }
                let dx = Tensor::from_vec(dx, x.shape(), x.device())?;
                let dw = Tensor::from_vec(dw, weight.shape(), x.device())?;
                Ok((dx, op.trains_weight.then_some(dw)))
            })
        })
    })
}

impl CustomOp2 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms-norm"
    }

    fn cpu_fwd(&self, x: &CpuStorage, lx: &Layout, w: &CpuStorage, lw: &Layout) -> CandleResult<(CpuStorage, Shape)> {
        let y = by_dtype!(x.dtype(), forward(x, lx, w, lw, self.eps))?;
        Ok((y, lx.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        _y: &Tensor,
        grad: &Tensor,
    ) -> CandleResult<(Option<Tensor>, Option<Tensor>)> {
        let (dx, dw) = by_dtype!(x.dtype(), backward(x, w, grad, self))?;
        Ok((x.track_op().then_some(dx), dw))
    }
}

use candle_core::backend::BackendStorage;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::check::{close, gradients, normal};

    #[test]
    fn gradients_equal_finite_differences() -> Result<()> {
        gradients(&[normal(&[2, 3, 5], 1)?, normal(&[5], 2)?], |inputs| rms_norm(&inputs[0], &inputs[1], 1e-5))
    }

    #[test]
    fn equals_the_composed_form() -> Result<()> {
        let (x, w) = (normal(&[3, 6], 1)?.as_detached_tensor(), normal(&[6], 2)?.as_detached_tensor());
        close(&rms_norm(&x, &w, 1e-5)?, &composed(&x, &w, 1e-5)?, 1e-12)
    }
}
