//! Normalisation of the last dimension: root mean square (Zhang and Sennrich 2019) and layer norm (Ba et al. 2016).

use candle_core::Tensor;
use titer_kernels::norm as kernels;

use super::residual::record_sum;
use crate::error::{Error, Result};
use crate::tensor::elementwise::{add_assign, same_shape, sum};
use crate::tensor::host::{Element, by_dtype, last_dim, read_all, tensor};
use crate::tensor::tape::{Tape, Traced};

/// `y = w ∘ x / √(mean(x²) + ε)` for `weight: [width]` and `x: [..., n · width]`: each piece of `width` numbers in a row
/// is normalised by itself.
///
/// # Errors
/// The rows are no whole number of pieces, or a tensor operation failed.
pub fn rms_norm(tape: &mut Tape, x: &Traced, weight: &Traced, eps: f64) -> Result<Traced> {
    let [_, y] = rms_norm_of(tape, x, None, weight, eps)?;
    Ok(y)
}

/// `x + branch`, and the same through [`rms_norm`]: what follows a residual connection.
///
/// # Errors
/// As [`rms_norm`], or the shapes of `x` and `branch` differ.
pub fn add_rms_norm(tape: &mut Tape, [x, branch]: [&Traced; 2], weight: &Traced, eps: f64) -> Result<[Traced; 2]> {
    rms_norm_of(tape, x, Some(branch), weight, eps)
}

/// What is normalised, and the result.
fn rms_norm_of(tape: &mut Tape, x: &Traced, branch: Option<&Traced>, weight: &Traced, eps: f64) -> Result<[Traced; 2]> {
    let w = weight.tensor().clone();
    if w.elem_count() == 0 || !last_dim(x.tensor()).is_multiple_of(w.elem_count()) {
        let dims = x.tensor().dims();
        return Err(Error::run(format!("rows {dims:?} cannot be normalised in pieces of {}", w.elem_count())));
    }
    let added = branch_of(x, branch)?;
    let [xs, y] = dispatch!(
        w,
        crate::tensor::cuda::rms_norm(&x.tensor().contiguous()?, added.as_ref(), &w, eps),
        sum_if(x.tensor(), added.as_ref())
            .and_then(|x| Ok([x.clone(), by_dtype!(x.dtype(), rms_forward(&x, &w, eps))?]))
    )?;
    let x = record_sum_if(tape, &xs, x, branch);
    let y = tape.record(y, &[&x, weight], move |gradient, into| {
        let (wants_weight, before) = (into.wants(1), into.take(0, xs.shape())?);
        let (dx, dw) = dispatch!(
            xs,
            crate::tensor::cuda::rms_norm_backward([&xs, &w, &gradient], before.as_ref(), eps, wants_weight),
            by_dtype!(xs.dtype(), rms_backward([&xs, &w, &gradient], before.as_ref(), eps, wants_weight))
        )?;
        into.add(0, dx)?;
        dw.map_or(Ok(()), |dw| into.add(1, dw))
    });
    Ok([x, y])
}

/// `y = w ∘ (x − mean) / √(var + ε) + b` for `x: [..., width]`, `weight: [width]` and `bias: [width]`.
///
/// # Errors
/// A tensor operation failed.
pub fn layer_norm(tape: &mut Tape, x: &Traced, weight: &Traced, bias: &Traced, eps: f64) -> Result<Traced> {
    let [_, y] = layer_norm_of(tape, x, None, [weight, bias], eps)?;
    Ok(y)
}

/// `x + branch`, and the same through [`layer_norm`]: what follows a residual connection.
///
/// # Errors
/// The shapes of `x` and `branch` differ, or a tensor operation failed.
pub fn add_layer_norm(
    tape: &mut Tape,
    [x, branch]: [&Traced; 2],
    [weight, bias]: [&Traced; 2],
    eps: f64,
) -> Result<[Traced; 2]> {
    layer_norm_of(tape, x, Some(branch), [weight, bias], eps)
}

/// What is normalised, and the result.
fn layer_norm_of(
    tape: &mut Tape,
    x: &Traced,
    branch: Option<&Traced>,
    [weight, bias]: [&Traced; 2],
    eps: f64,
) -> Result<[Traced; 2]> {
    let (w, b) = (weight.tensor().clone(), bias.tensor().clone());
    let added = branch_of(x, branch)?;
    let [xs, y] = dispatch!(
        w,
        crate::tensor::cuda::layer_norm(&x.tensor().contiguous()?, added.as_ref(), [&w, &b], eps),
        sum_if(x.tensor(), added.as_ref())
            .and_then(|x| Ok([x.clone(), by_dtype!(x.dtype(), layer_forward(&x, &w, &b, eps))?]))
    )?;
    let x = record_sum_if(tape, &xs, x, branch);
    let y = tape.record(y, &[&x, weight, bias], move |gradient, into| {
        let (wants_weight, before) = (into.wants(1) || into.wants(2), into.take(0, xs.shape())?);
        let (dx, dw) = dispatch!(
            xs,
            crate::tensor::cuda::layer_norm_backward([&xs, &w, &gradient], before.as_ref(), eps, wants_weight),
            by_dtype!(xs.dtype(), layer_backward([&xs, &w, &gradient], before.as_ref(), eps, wants_weight))
        )?;
        into.add(0, dx)?;
        let Some([dw, db]) = dw else { return Ok(()) };
        into.add(1, dw)?;
        into.add(2, db)
    });
    Ok([x, y])
}

/// What is added to `x`, if anything.
fn branch_of(x: &Traced, branch: Option<&Traced>) -> Result<Option<Tensor>> {
    let Some(branch) = branch else { return Ok(None) };
    same_shape(x.tensor(), branch.tensor())?;
    Ok(Some(branch.tensor().contiguous()?))
}

/// The residual connection, where there is one.
fn sum_if(x: &Tensor, branch: Option<&Tensor>) -> Result<Tensor> {
    branch.map_or_else(|| Ok(x.contiguous()?), |branch| sum(x, branch))
}

/// `sum` as the tape knows it: that of `x` and `branch`, or `x` itself.
fn record_sum_if(tape: &mut Tape, sum: &Tensor, x: &Traced, branch: Option<&Traced>) -> Traced {
    branch.map_or_else(|| x.with_tensor(sum.clone()), |branch| record_sum(tape, sum.clone(), [x, branch]))
}

/// Adds `before` to a gradient, where there is one.
fn add_before(dx: &Tensor, before: Option<&Tensor>) -> Result<()> {
    before.map_or(Ok(()), |before| add_assign(dx, before))
}

fn rms_forward<T: Element>(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    read_all([x, weight], |[xs, w]: [&[T]; 2]| tensor(kernels::rms(xs, w, eps), x.dims()))
}

fn rms_backward<T: Element>(
    [x, weight, gradient]: [&Tensor; 3],
    before: Option<&Tensor>,
    eps: f64,
    wants_weight: bool,
) -> Result<(Tensor, Option<Tensor>)> {
    read_all([x, weight, gradient], |[xs, w, gs]: [&[T]; 3]| {
        let dx = tensor(kernels::rms_backward(xs, w, gs, eps), x.dims())?;
        add_before(&dx, before)?;
        let dw = wants_weight.then(|| tensor(kernels::rms_weight_gradient(xs, gs, w.len(), eps), &[w.len()]));
        Ok((dx, dw.transpose()?))
    })
}

fn layer_forward<T: Element>(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    read_all([x, weight, bias], |[xs, w, b]: [&[T]; 3]| tensor(kernels::layer(xs, w, b, eps), x.dims()))
}

fn layer_backward<T: Element>(
    [x, weight, gradient]: [&Tensor; 3],
    before: Option<&Tensor>,
    eps: f64,
    wants_weight: bool,
) -> Result<(Tensor, Option<[Tensor; 2]>)> {
    read_all([x, weight, gradient], |[xs, w, gs]: [&[T]; 3]| {
        let dx = tensor(kernels::layer_backward(xs, w, gs, eps), x.dims())?;
        add_before(&dx, before)?;
        if !wants_weight {
            return Ok((dx, None));
        }
        let sums = kernels::layer_weight_gradients(xs, gs, w.len(), eps);
        let (dw, db) = sums.split_at(w.len());
        Ok((dx, Some([tensor(dw.to_vec(), &[w.len()])?, tensor(db.to_vec(), &[w.len()])?])))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::check::{close, gradients, normal};
    use candle_core::D;

    #[test]
    fn gradients_equal_finite_differences() -> Result<()> {
        let (x, w, b) = (normal(&[2, 3, 5], 1)?, normal(&[5], 2)?, normal(&[5], 3)?);
        gradients(&[x.clone(), w.clone()], |tape, inputs| rms_norm(tape, &inputs[0], &inputs[1], 1e-5))?;
        gradients(&[x, w, b], |tape, inputs| layer_norm(tape, &inputs[0], &inputs[1], &inputs[2], 1e-5))
    }

    /// The sum goes on beside what is normalised, so two gradients meet in it.
    #[test]
    fn gradients_after_a_residual_connection_equal_finite_differences() -> Result<()> {
        let vars = [normal(&[3, 5], 1)?, normal(&[3, 5], 2)?, normal(&[5], 3)?, normal(&[5], 4)?];
        gradients(&vars[..3], |tape, x| {
            let [sum, y] = add_rms_norm(tape, [&x[0], &x[1]], &x[2], 1e-5)?;
            super::super::swiglu(tape, &sum, &y)
        })?;
        gradients(&vars, |tape, x| {
            let [sum, y] = add_layer_norm(tape, [&x[0], &x[1]], [&x[2], &x[3]], 1e-5)?;
            super::super::swiglu(tape, &y, &sum)
        })
    }

    #[test]
    fn after_a_residual_connection_they_are_those_of_the_sum() -> Result<()> {
        let inputs = [normal(&[3, 6], 1)?, normal(&[3, 6], 2)?, normal(&[6], 3)?, normal(&[6], 4)?];
        let [x, branch, w, b] = inputs.map(|var| Traced::constant(var.as_detached_tensor()));
        let tape = &mut Tape::default();
        let whole = super::super::add(tape, &x, &branch)?;
        for ([sum, y], apart) in [
            (add_rms_norm(tape, [&x, &branch], &w, 1e-5)?, rms_norm(tape, &whole, &w, 1e-5)?),
            (add_layer_norm(tape, [&x, &branch], [&w, &b], 1e-5)?, layer_norm(tape, &whole, &w, &b, 1e-5)?),
        ] {
            close(sum.tensor(), whole.tensor(), 0.)?;
            close(y.tensor(), apart.tensor(), 0.)?;
        }
        let short = Traced::constant(x.tensor().narrow(0, 0, 2)?);
        assert!(add_rms_norm(tape, [&x, &short], &w, 1e-5).is_err());
        Ok(())
    }

    /// As for the heads of queries and keys.
    #[test]
    fn pieces_of_a_row_are_normalised_each_by_itself() -> Result<()> {
        let (x, w) = (normal(&[2, 3, 10], 1)?, normal(&[5], 2)?);
        gradients(&[x.clone(), w.clone()], |tape, inputs| rms_norm(tape, &inputs[0], &inputs[1], 1e-5))?;
        let [wide, w] = [x.as_detached_tensor(), w.as_detached_tensor()];
        let apart = Traced::constant(wide.reshape((2, 3, 2, 5))?);
        let [wide, w] = [wide, w].map(Traced::constant);
        let together = rms_norm(&mut Tape::default(), &wide, &w, 1e-5)?;
        let apart = rms_norm(&mut Tape::default(), &apart, &w, 1e-5)?;
        close(&together.tensor().reshape((2, 3, 2, 5))?, apart.tensor(), 0.)?;
        let odd = Traced::constant(Tensor::zeros((2, 7), candle_core::DType::F64, &candle_core::Device::Cpu)?);
        assert!(rms_norm(&mut Tape::default(), &odd, &w, 1e-5).is_err());
        Ok(())
    }

    #[test]
    fn equal_the_composed_forms() -> Result<()> {
        let constant = |shape: &[usize], seed| Ok::<_, crate::Error>(normal(shape, seed)?.as_detached_tensor());
        let (x, w, b) = (constant(&[3, 6], 1)?, constant(&[6], 2)?, constant(&[6], 3)?);
        let [vx, vw, vb] = [&x, &w, &b].map(|t| Traced::constant(t.clone()));
        let scale = (x.sqr()?.mean_keepdim(D::Minus1)? + 1e-5)?.sqrt()?;
        let composed = x.broadcast_div(&scale)?.broadcast_mul(&w)?;
        close(rms_norm(&mut Tape::default(), &vx, &vw, 1e-5)?.tensor(), &composed, 1e-12)?;
        let centred = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
        let scale = (centred.sqr()?.mean_keepdim(D::Minus1)? + 1e-5)?.sqrt()?;
        let composed = centred.broadcast_div(&scale)?.broadcast_mul(&w)?.broadcast_add(&b)?;
        close(layer_norm(&mut Tape::default(), &vx, &vw, &vb, 1e-5)?.tensor(), &composed, 1e-12)
    }
}
