//! Activations: the gate of a Llama MLP, `silu(gate) ∘ up`, and plain ones.

use candle_core::Tensor;
use titer_kernels::activation::{self as kernels, Activation};

use crate::error::{Error, Result};
use crate::tensor::host::{Element, by_dtype, read, read_all, tensor};
use crate::tensor::tape::{Tape, Traced};

/// `silu(gate) ∘ up`, element by element.
///
/// # Errors
/// The shapes differ, or a tensor operation failed.
pub fn swiglu(tape: &mut Tape, gate: &Traced, up: &Traced) -> Result<Traced> {
    let (g, u) = (gate.tensor().contiguous()?, up.tensor().contiguous()?);
    if g.dims() != u.dims() {
        return Err(Error::run(format!("swiglu: shapes {:?} and {:?} differ", g.dims(), u.dims())));
    }
    let y = dispatch!(g, crate::tensor::cuda::swiglu(&g, &u), by_dtype!(g.dtype(), gate_forward(&g, &u)))?;
    Ok(tape.record(y, &[gate, up], move |gradient, into| {
        let (dgate, dup) = dispatch!(
            g,
            crate::tensor::cuda::swiglu_backward(&g, &u, &gradient),
            by_dtype!(g.dtype(), gate_backward(&g, &u, &gradient))
        )?;
        into.add(0, dgate)?;
        into.add(1, dup)
    }))
}

/// The activation of every element.
///
/// # Errors
/// A tensor operation failed.
pub fn activate(tape: &mut Tape, activation: Activation, x: &Traced) -> Result<Traced> {
    let xs = x.tensor().contiguous()?;
    let y = dispatch!(
        xs,
        crate::tensor::cuda::activation(activation, &xs),
        by_dtype!(xs.dtype(), forward(activation, &xs))
    )?;
    Ok(tape.record(y, &[x], move |gradient, into| {
        let dx = dispatch!(
            xs,
            crate::tensor::cuda::activation_backward(activation, &xs, &gradient),
            by_dtype!(xs.dtype(), backward(activation, &xs, &gradient))
        )?;
        into.add(0, dx)
    }))
}

fn forward<T: Element>(activation: Activation, x: &Tensor) -> Result<Tensor> {
    read(x, |xs: &[T]| tensor(activation.forward(xs), x.dims()))
}

fn backward<T: Element>(activation: Activation, x: &Tensor, gradient: &Tensor) -> Result<Tensor> {
    read_all([x, gradient], |[xs, gs]: [&[T]; 2]| tensor(activation.backward(xs, gs), x.dims()))
}

fn gate_forward<T: Element>(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    read_all([gate, up], |[zs, us]: [&[T]; 2]| tensor(kernels::swiglu(zs, us), gate.dims()))
}

fn gate_backward<T: Element>(gate: &Tensor, up: &Tensor, gradient: &Tensor) -> Result<(Tensor, Tensor)> {
    read_all([gate, up, gradient], |[zs, us, gs]: [&[T]; 3]| {
        let (dgate, dup) = kernels::swiglu_backward(zs, us, gs);
        Ok((tensor(dgate, gate.dims())?, tensor(dup, up.dims())?))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::check::{close, gradients, normal};

    const ALL: [Activation; 4] = [Activation::Relu, Activation::GeluTanh, Activation::Gelu, Activation::Silu];

    #[test]
    fn gradients_equal_finite_differences() -> Result<()> {
        gradients(&[normal(&[3, 5], 1)?, normal(&[3, 5], 2)?], |tape, inputs| swiglu(tape, &inputs[0], &inputs[1]))?;
        ALL.into_iter().try_for_each(|activation| {
            gradients(&[normal(&[3, 5], 1)?], |tape, inputs| activate(tape, activation, &inputs[0]))
        })
    }

    #[test]
    fn equal_the_composed_forms() -> Result<()> {
        let (gate, up) = (normal(&[3, 6], 1)?.as_detached_tensor(), normal(&[3, 6], 2)?.as_detached_tensor());
        let tape = &mut Tape::default();
        let (g, u) = (Traced::constant(gate.clone()), Traced::constant(up.clone()));
        close(swiglu(tape, &g, &u)?.tensor(), &(gate.silu()? * &up)?, 1e-12)?;
        let composed = [gate.relu()?, gate.gelu()?, gate.gelu_erf()?, gate.silu()?];
        ALL.into_iter()
            .zip(composed)
            .try_for_each(|(activation, composed)| close(activate(tape, activation, &g)?.tensor(), &composed, 1e-9))
    }
}
