//! A frozen linear layer with an optional low-rank adapter, as one operator.
//!
//! `y = x Wᵀ + s · (m ∘ x) Aᵀ Bᵀ`. Candle's own matmul computes the gradient of both operands, also of a frozen `W`:
//! a third of all work, and memory for a second model. Here the backward pass gives `dx`, `dA` and `dB` only.

use candle_core::backend::BackendStorage;
use candle_core::op::{Add, Mul};
use candle_core::{CpuStorage, CudaStorage, CustomOp1, CustomOp3, Layout, Shape, Storage, Tensor};

use super::CandleResult;
use crate::Result;

/// The adapter's part in a linear layer.
#[derive(Debug, Clone)]
pub struct AdapterInput {
    /// `A: [r, in]`, in the type of `x`.
    pub a: Tensor,
    /// `B: [out, r]`, in the type of `x`.
    pub b: Tensor,
    /// The scale `s = alpha / r`.
    pub scale: f64,
    /// The dropout mask `m`, of the shape of `x`.
    pub mask: Option<Tensor>,
}

/// `x Wᵀ` for `x: [..., in]` and `W: [out, in]`, plus the adapter's part. A `weight` under training is differentiated
/// too; a frozen one costs nothing in the backward pass.
///
/// # Errors
/// A tensor operation failed.
pub fn linear(x: &Tensor, weight: &Tensor, adapter: Option<AdapterInput>) -> Result<Tensor> {
    let x = x.contiguous()?;
    if weight.track_op() {
        let mut shape = x.dims().to_vec();
        let (input, output) = (shape.pop().unwrap_or(1), weight.dim(0)?);
        let y = x.reshape(((), input))?.matmul(&weight.t()?)?;
        shape.push(output);
        return Ok(y.reshape(shape)?);
    }
    let frozen = Frozen { weight: weight.clone() };
    Ok(match adapter {
        None => x.apply_op1(frozen)?,
        Some(AdapterInput { a, b, scale, mask }) => {
            let (a, b) = (a.contiguous()?, b.contiguous()?);
            let op = Adapted { frozen, scale, mask, trains_x: x.track_op(), trains_adapter: a.track_op() };
            x.apply_op3(&a, &b, op)?
        }
    })
}

struct Frozen {
    weight: Tensor,
}

/// Rows, inputs and outputs of `x Wᵀ`, the layout of `x` as a matrix, and the shape of the result.
fn as_matrix(x: &Layout, output: usize) -> (usize, usize, Layout, Shape) {
    let mut shape = x.dims().to_vec();
    let input = shape.pop().unwrap_or(1);
    let rows = shape.iter().product();
    shape.push(output);
    (rows, input, Layout::contiguous_with_offset((rows, input), x.start_offset()), shape.into())
}

impl Frozen {
    /// `x Wᵀ` on any backend.
    fn apply<S: BackendStorage>(
        &self,
        x: &S,
        layout: &Layout,
        weight: &S,
        weight_layout: &Layout,
    ) -> CandleResult<(S, Shape)> {
        let output = self.weight.dim(0)?;
        let (rows, input, matrix, shape) = as_matrix(layout, output);
        let y = x.matmul(weight, (1, rows, output, input), &matrix, &weight_layout.transpose(0, 1)?)?;
        Ok((y, shape))
    }

    fn gradient(&self, grad: &Tensor) -> CandleResult<Tensor> {
        let (output, input) = self.weight.dims2()?;
        let mut shape = grad.dims().to_vec();
        shape.pop();
        shape.push(input);
        grad.contiguous()?.reshape(((), output))?.matmul(&self.weight)?.reshape(shape)
    }
}

impl CustomOp1 for Frozen {
    fn name(&self) -> &'static str {
        "frozen-linear"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> CandleResult<(CpuStorage, Shape)> {
        let (storage, weight_layout) = self.weight.storage_and_layout();
        match &*storage {
            Storage::Cpu(weight) => self.apply(x, layout, weight, weight_layout),
            _ => candle_core::bail!("input and weight are on different devices"),
        }
    }

    fn cuda_fwd(&self, x: &CudaStorage, layout: &Layout) -> CandleResult<(CudaStorage, Shape)> {
        let (storage, weight_layout) = self.weight.storage_and_layout();
        match &*storage {
            Storage::Cuda(weight) => self.apply(x, layout, weight, weight_layout),
            _ => candle_core::bail!("input and weight are on different devices"),
        }
    }

    fn bwd(&self, _x: &Tensor, _y: &Tensor, grad: &Tensor) -> CandleResult<Option<Tensor>> {
        self.gradient(grad).map(Some)
    }
}

struct Adapted {
    frozen: Frozen,
    scale: f64,
    mask: Option<Tensor>,
    trains_x: bool,
    trains_adapter: bool,
}

impl Adapted {
    /// Adds `s · x Aᵀ Bᵀ` to `y`, on any backend; `x` is masked already.
    #[expect(clippy::too_many_arguments, reason = "candle hands a storage and a layout per operand")]
    fn add_low_rank<S: BackendStorage>(
        &self,
        (y, shape): (S, Shape),
        x: &S,
        lx: &Layout,
        a: &S,
        la: &Layout,
        b: &S,
        lb: &Layout,
    ) -> CandleResult<(S, Shape)> {
        let ((rank, input), output) = (la.shape().dims2()?, lb.dims()[0]);
        let (rows, _, matrix, _) = as_matrix(lx, output);
        let narrow = x.matmul(a, (1, rows, rank, input), &matrix, &la.transpose(0, 1)?)?;
        let narrow_layout = Layout::contiguous((rows, rank));
        let narrow = narrow.affine(&narrow_layout, self.scale, 0.)?;
        let wide = narrow.matmul(b, (1, rows, output, rank), &narrow_layout, &lb.transpose(0, 1)?)?;
        let layout = Layout::contiguous((rows, output));
        Ok((y.binary_impl::<Add>(&wide, &layout, &layout)?, shape))
    }

    fn masked<S: BackendStorage>(x: &S, lx: &Layout, mask: &S, lm: &Layout) -> CandleResult<S> {
        x.binary_impl::<Mul>(mask, lx, lm)
    }
}

impl CustomOp3 for Adapted {
    fn name(&self) -> &'static str {
        "adapted-linear"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        a: &CpuStorage,
        la: &Layout,
        b: &CpuStorage,
        lb: &Layout,
    ) -> CandleResult<(CpuStorage, Shape)> {
        let y = self.frozen.cpu_fwd(x, lx)?;
        let Some(mask) = &self.mask else { return self.add_low_rank(y, x, lx, a, la, b, lb) };
        let (storage, lm) = mask.storage_and_layout();
        let Storage::Cpu(mask) = &*storage else { candle_core::bail!("input and mask are on different devices") };
        self.add_low_rank(y, &Self::masked(x, lx, mask, lm)?, &Layout::contiguous(lx.shape()), a, la, b, lb)
    }

    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        lx: &Layout,
        a: &CudaStorage,
        la: &Layout,
        b: &CudaStorage,
        lb: &Layout,
    ) -> CandleResult<(CudaStorage, Shape)> {
        let y = self.frozen.cuda_fwd(x, lx)?;
        let Some(mask) = &self.mask else { return self.add_low_rank(y, x, lx, a, la, b, lb) };
        let (storage, lm) = mask.storage_and_layout();
        let Storage::Cuda(mask) = &*storage else { candle_core::bail!("input and mask are on different devices") };
        self.add_low_rank(y, &Self::masked(x, lx, mask, lm)?, &Layout::contiguous(lx.shape()), a, la, b, lb)
    }

    fn bwd(
        &self,
        x: &Tensor,
        a: &Tensor,
        b: &Tensor,
        _y: &Tensor,
        grad: &Tensor,
    ) -> CandleResult<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (a, b) = (a.detach(), b.detach());
        let grad = grad.contiguous()?.reshape(((), b.dim(0)?))?;
        let narrow_grad = (grad.matmul(&b)? * self.scale)?;
        let dx = if self.trains_x {
            let low_rank = narrow_grad.matmul(&a)?.reshape(x.shape())?;
            let low_rank = match &self.mask {
                Some(mask) => (low_rank * mask)?,
                None => low_rank,
            };
            Some((self.frozen.gradient(&grad)?.reshape(x.shape())? + low_rank)?)
        } else {
            None
        };
        if !self.trains_adapter {
            return Ok((dx, None, None));
        }
        let masked = match &self.mask {
            Some(mask) => (x.detach() * mask)?,
            None => x.detach(),
        };
        let masked = masked.reshape(((), a.dim(1)?))?;
        let da = narrow_grad.t()?.matmul(&masked)?;
        let narrow = masked.matmul(&a.t()?)?;
        let db = (grad.t()?.matmul(&narrow)? * self.scale)?;
        Ok((dx, Some(da), Some(db)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::check::{close, gradients, normal};
    use crate::rng::{Seed, dropout_mask};

    #[test]
    fn gradients_equal_finite_differences() -> Result<()> {
        let weight = normal(&[5, 4], 1)?.as_detached_tensor();
        let vars = [normal(&[2, 3, 4], 2)?, normal(&[2, 4], 3)?, normal(&[5, 2], 4)?];
        let mask = dropout_mask(&[2, 3, 4], 0.4, &mut Seed::new(5).generator(), weight.device())?;
        for mask in [None, Some(mask.to_dtype(weight.dtype())?)] {
            gradients(&vars, |inputs| {
                let (a, b) = (inputs[1].clone(), inputs[2].clone());
                linear(&inputs[0], &weight, Some(AdapterInput { a, b, scale: 0.5, mask: mask.clone() }))
            })?;
        }
        gradients(&vars[..1], |inputs| linear(&inputs[0], &weight, None))
    }

    #[test]
    fn a_trained_weight_gets_its_gradient() -> Result<()> {
        let vars = [normal(&[2, 3, 4], 2)?, normal(&[5, 4], 3)?];
        gradients(&vars, |inputs| linear(&inputs[0], &inputs[1], None))
    }

    #[test]
    fn equals_the_composed_form() -> Result<()> {
        let [x, weight, a, b] = [&[3usize, 4][..], &[5, 4], &[2, 4], &[5, 2]]
            .map(|shape| normal(shape, shape.len() as u64).expect("a tensor").as_detached_tensor());
        let composed = (x.matmul(&weight.t()?)? + (x.matmul(&a.t()?)?.matmul(&b.t()?)? * 2.)?)?;
        let fused = linear(&x, &weight, Some(AdapterInput { a, b, scale: 2., mask: None }))?;
        close(&fused, &composed, 1e-12)
    }
}
