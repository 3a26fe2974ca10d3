//! A linear layer with an optional low-rank adapter, as one operator.
//!
//! `y = x Wᵀ + b + s · (m ∘ x) Aᵀ Bᵀ`. The backward pass computes `dx`, `dA` and `dB`, each only if it is wanted, and
//! nothing for a frozen `W`: that would be a third of all work, and memory for a second model.

use candle_core::{DType, Tensor};
use titer_kernels::elementwise as kernels;

use crate::error::Result;
use crate::tensor::dropout::{Dropout, add_dropout, dropout};
use crate::tensor::gemm::Gemm;
use crate::tensor::host::{Element, by_dtype, last_dim, read, tensor, write};
use crate::tensor::matrix::Matrix;
use crate::tensor::tape::{Tape, Traced};

/// The adapter's part in a linear layer.
#[derive(Debug)]
pub struct LowRank {
    /// `A: [r, in]`.
    pub a: Traced,
    /// `B: [out, r]`.
    pub b: Traced,
    /// The scale `s = alpha / r`.
    pub scale: f64,
    /// The dropout mask `m`.
    pub mask: Option<Dropout>,
}

/// `x Wᵀ` for `x: [..., in]` and `weight: [out, in]`, plus a `bias: [out]`, plus the adapter's part. Half-precision
/// products of an f32 adapter are taken in the type of `x`; its gradients are f32.
///
/// # Errors
/// A tensor operation failed.
pub fn linear(
    tape: &mut Tape,
    x: &Traced,
    weight: impl Into<Traced<Matrix>>,
    bias: Option<&Traced>,
    low_rank: Option<LowRank>,
) -> Result<Traced> {
    let mut shape = x.tensor().dims().to_vec();
    let xs = x.tensor().contiguous()?.reshape(((), last_dim(x.tensor())))?;
    let weight = weight.into();
    let w = weight.tensor().clone();
    let y = w.product_transposed(&xs)?;
    if let Some(bias) = bias {
        add_bias(&y, bias.tensor())?;
    }
    let adapter = low_rank.as_ref().map(|low_rank| AdapterPass::forward(&xs, low_rank, &y)).transpose()?;
    if let Some(last) = shape.last_mut() {
        *last = w.dims()[0];
    }
    // Only places count from here on, not the numbers in them.
    let (weight, absent) = (weight.with_tensor(y.clone()), Traced::constant(y.clone()));
    let (a, b) = low_rank.as_ref().map_or((&absent, &absent), |low_rank| (&low_rank.a, &low_rank.b));
    let inputs = [x, &weight, bias.unwrap_or(&absent), a, b];
    // What no gradient needs is not kept.
    let kept = (weight.tracked() || a.tracked()).then_some(xs);
    Ok(tape.record(y.reshape(shape)?, &inputs, move |gradient, into| {
        let g = gradient.reshape(((), w.dims()[0]))?;
        let narrow = adapter.as_ref().map(|adapter| adapter.narrow(&g)).transpose()?;
        if into.wants(0) {
            let (dx, held) = match into.owned(0) {
                Some(sum) => {
                    let sum = sum.reshape(((), w.dims()[1]))?;
                    w.add_product(&sum, &g)?;
                    (sum, true)
                }
                None => (w.product(&g)?, false),
            };
            if let (Some(adapter), Some(narrow)) = (&adapter, &narrow) {
                adapter.add_input_gradient(&dx, narrow)?;
            }
            if !held {
                into.add(0, dx)?;
            }
        }
        if let Some(xs) = &kept {
            if into.wants(1) {
                into.add(1, Gemm::TN.product(&g, xs)?)?;
            }
            if let (true, Some(adapter), Some(narrow)) = (into.wants(3), &adapter, &narrow) {
                into.add(3, Gemm::TN.product_as(narrow, &adapter.masked(xs)?, wide(xs.dtype()))?)?;
                into.add(4, Gemm::TN.product_as(&g, &adapter.inner, wide(g.dtype()))?)?;
            }
        }
        if into.wants(2) { into.add(2, sum_rows(&g)?) } else { Ok(()) }
    }))
}

/// The type in which sums over half-precision values are kept.
fn wide(dtype: DType) -> DType {
    if matches!(dtype, DType::F16 | DType::BF16) { DType::F32 } else { dtype }
}

/// What the adapter's part of the backward pass reads again.
struct AdapterPass {
    a: Tensor,
    b: Tensor,
    scale: f64,
    mask: Option<Dropout>,
    /// `s · (m ∘ x) Aᵀ`, `[rows, r]`.
    inner: Tensor,
}

impl AdapterPass {
    /// Adds the adapter's part to `y`.
    fn forward(x: &Tensor, low_rank: &LowRank, y: &Tensor) -> Result<Self> {
        let cast = |factor: &Traced| factor.tensor().to_dtype(x.dtype());
        let (a, b, scale) = (cast(&low_rank.a)?, cast(&low_rank.b)?, low_rank.scale);
        let mut adapted = Self { inner: a.clone(), a, b, scale, mask: low_rank.mask };
        adapted.inner = dispatch!(
            x,
            crate::tensor::cuda::adapter_inner(x, &adapted.a, scale, adapted.mask),
            Gemm::NT.times(scale).product(&adapted.masked(x)?, &adapted.a)
        )?;
        Gemm::NT.add_to(y, &adapted.inner, &adapted.b)?;
        Ok(adapted)
    }

    fn masked(&self, x: &Tensor) -> Result<Tensor> {
        self.mask.map_or_else(|| Ok(x.clone()), |mask| dropout(x, mask))
    }

    /// `s · g B`, `[rows, r]`.
    fn narrow(&self, g: &Tensor) -> Result<Tensor> {
        Gemm::NN.times(self.scale).product(g, &self.b)
    }

    /// Adds `m ∘ (narrow A)` to `dx`.
    fn add_input_gradient(&self, dx: &Tensor, narrow: &Tensor) -> Result<()> {
        dispatch!(
            dx,
            crate::tensor::cuda::adapter_dx(dx, narrow, &self.a, self.mask),
            match self.mask {
                None => Gemm::NN.add_to(dx, narrow, &self.a),
                Some(mask) => add_dropout(dx, &Gemm::NN.product(narrow, &self.a)?, mask),
            }
        )
    }
}

/// Adds `bias: [width]` to every row of `y`, in place.
fn add_bias(y: &Tensor, bias: &Tensor) -> Result<()> {
    dispatch!(y, crate::tensor::cuda::add_bias(y, bias), by_dtype!(y.dtype(), add_bias_host(y, bias)))
}

fn add_bias_host<T: Element>(y: &Tensor, bias: &Tensor) -> Result<()> {
    read(bias, |bias: &[T]| write(y, |y: &mut [T]| kernels::add_bias(y, bias)))
}

/// The sum over all rows, `[width]`.
fn sum_rows(g: &Tensor) -> Result<Tensor> {
    dispatch!(g, crate::tensor::cuda::sum_rows(g), by_dtype!(g.dtype(), sum_rows_host(g)))
}

fn sum_rows_host<T: Element>(g: &Tensor) -> Result<Tensor> {
    let width = last_dim(g);
    read(g, |gs: &[T]| tensor(kernels::sum_rows(gs, width), &[width]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::check::{close, gradients, normal};

    fn low_rank(a: &Traced, b: &Traced, mask: Option<Dropout>) -> LowRank {
        LowRank { a: a.clone(), b: b.clone(), scale: 0.5, mask }
    }

    #[test]
    fn gradients_equal_finite_differences() -> Result<()> {
        let weight = Traced::constant(normal(&[5, 4], 1)?.as_detached_tensor());
        let vars = [normal(&[2, 3, 4], 2)?, normal(&[2, 4], 3)?, normal(&[5, 2], 4)?];
        for mask in [None, Some(Dropout { key: [5, 6], layer: 7, p: 0.4 })] {
            gradients(&vars, |tape, x| linear(tape, &x[0], &weight, None, Some(low_rank(&x[1], &x[2], mask))))?;
        }
        gradients(&vars[..1], |tape, x| linear(tape, &x[0], &weight, None, None))
    }

    #[test]
    fn a_trained_weight_and_bias_get_their_gradients() -> Result<()> {
        let vars = [normal(&[2, 3, 4], 2)?, normal(&[5, 4], 3)?, normal(&[5], 4)?];
        gradients(&vars, |tape, x| linear(tape, &x[0], &x[1], Some(&x[2]), None))
    }

    #[test]
    fn an_input_of_two_layers_gets_the_sum() -> Result<()> {
        let vars = [normal(&[3, 4], 2)?, normal(&[4, 4], 3)?, normal(&[4, 4], 4)?];
        gradients(&vars, |tape, x| {
            let (left, right) = (linear(tape, &x[0], &x[1], None, None)?, linear(tape, &x[0], &x[2], None, None)?);
            super::super::swiglu(tape, &left, &right)
        })
    }

    #[test]
    fn equals_the_composed_form() -> Result<()> {
        let [x, weight, a, b, bias] = [&[3usize, 4][..], &[5, 4], &[2, 4], &[5, 2], &[5]]
            .map(|shape| normal(shape, shape.len() as u64).expect("a tensor").as_detached_tensor());
        let composed = (x.matmul(&weight.t()?)? + (x.matmul(&a.t()?)?.matmul(&b.t()?)? * 0.5)?)?;
        let composed = composed.broadcast_add(&bias)?;
        let [x, weight, a, b, bias] = [x, weight, a, b, bias].map(Traced::constant);
        let fused = linear(&mut Tape::default(), &x, &weight, Some(&bias), Some(low_rank(&a, &b, None)))?;
        close(fused.tensor(), &composed, 1e-12)
    }
}
