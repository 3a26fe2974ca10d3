//! Normalisation of the last dimension: root mean square (Zhang and Sennrich 2019) and layer norm (Ba et al. 2016).

use candle_core::Tensor;
use titer_kernels::norm as kernels;

use crate::error::{Error, Result};
use crate::tensor::host::{Element, by_dtype, last_dim, read_all, tensor};
use crate::tensor::tape::{Tape, Traced};

/// `y = w ∘ x / √(mean(x²) + ε)` for `weight: [width]` and `x: [..., n · width]`: each piece of `width` numbers in a row
/// is normalised by itself.
///
/// # Errors
/// The rows are no whole number of pieces, or a tensor operation failed.
pub fn rms_norm(tape: &mut Tape, x: &Traced, weight: &Traced, eps: f64) -> Result<Traced> {
    let (xs, w) = (x.tensor().contiguous()?, weight.tensor().clone());
    if w.elem_count() == 0 || !last_dim(&xs).is_multiple_of(w.elem_count()) {
        return Err(Error::run(format!("rows {:?} cannot be normalised in pieces of {}", xs.dims(), w.elem_count())));
    }
    let y =
        dispatch!(xs, crate::tensor::cuda::rms_norm(&xs, &w, eps), by_dtype!(xs.dtype(), rms_forward(&xs, &w, eps)))?;
    Ok(tape.record(y, &[x, weight], move |gradient, into| {
        let wants_weight = into.wants(1);
        let (dx, dw) = dispatch!(
            xs,
            crate::tensor::cuda::rms_norm_backward(&xs, &w, &gradient, eps, wants_weight),
            by_dtype!(xs.dtype(), rms_backward(&xs, &w, &gradient, eps, wants_weight))
        )?;
        into.add(0, dx)?;
        dw.map_or(Ok(()), |dw| into.add(1, dw))
    }))
}

/// `y = w ∘ (x − mean) / √(var + ε) + b` for `x: [..., width]`, `weight: [width]` and `bias: [width]`.
///
/// # Errors
/// A tensor operation failed.
pub fn layer_norm(tape: &mut Tape, x: &Traced, weight: &Traced, bias: &Traced, eps: f64) -> Result<Traced> {
    let (xs, w, b) = (x.tensor().contiguous()?, weight.tensor().clone(), bias.tensor().clone());
    let y = dispatch!(
        xs,
        crate::tensor::cuda::layer_norm(&xs, &w, &b, eps),
        by_dtype!(xs.dtype(), layer_forward(&xs, &w, &b, eps))
    )?;
    Ok(tape.record(y, &[x, weight, bias], move |gradient, into| {
        let wants_weight = into.wants(1) || into.wants(2);
        let (dx, dw) = dispatch!(
            xs,
            crate::tensor::cuda::layer_norm_backward(&xs, &w, &gradient, eps, wants_weight),
            by_dtype!(xs.dtype(), layer_backward(&xs, &w, &gradient, eps, wants_weight))
        )?;
        into.add(0, dx)?;
        let Some((dw, db)) = dw else { return Ok(()) };
        into.add(1, dw)?;
        into.add(2, db)
    }))
}

fn rms_forward<T: Element>(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    read_all([x, weight], |[xs, w]: [&[T]; 2]| tensor(kernels::rms(xs, w, eps), x.dims()))
}

fn rms_backward<T: Element>(
    x: &Tensor,
    weight: &Tensor,
    gradient: &Tensor,
    eps: f64,
    wants_weight: bool,
) -> Result<(Tensor, Option<Tensor>)> {
    read_all([x, weight, gradient], |[xs, w, gs]: [&[T]; 3]| {
        let dx = tensor(kernels::rms_backward(xs, w, gs, eps), x.dims())?;
        let dw = wants_weight.then(|| tensor(kernels::rms_weight_gradient(xs, gs, w.len(), eps), &[w.len()]));
        Ok((dx, dw.transpose()?))
    })
}

fn layer_forward<T: Element>(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    read_all([x, weight, bias], |[xs, w, b]: [&[T]; 3]| tensor(kernels::layer(xs, w, b, eps), x.dims()))
}

/// Gradients of weight and bias.
type WeightAndBias = (Tensor, Tensor);

fn layer_backward<T: Element>(
    x: &Tensor,
    weight: &Tensor,
    gradient: &Tensor,
    eps: f64,
    wants_weight: bool,
) -> Result<(Tensor, Option<WeightAndBias>)> {
    read_all([x, weight, gradient], |[xs, w, gs]: [&[T]; 3]| {
        let dx = tensor(kernels::layer_backward(xs, w, gs, eps), x.dims())?;
        if !wants_weight {
            return Ok((dx, None));
        }
        let sums = kernels::layer_weight_gradients(xs, gs, w.len(), eps);
        let (dw, db) = sums.split_at(w.len());
        Ok((dx, Some((tensor(dw.to_vec(), &[w.len()])?, tensor(db.to_vec(), &[w.len()])?))))
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
