//! Activations, plain and of a gate, and what is made of them.

use candle_core::Tensor;
use titer_kernels::activation::Activation;

use crate::error::{Error, Result};
use crate::tensor::host::{Element, by_dtype, read, read_all, tensor};
use crate::tensor::tape::{Tape, Traced};

/// `activation(gate) ∘ up`, element by element.
///
/// # Errors
/// The shapes differ, or a tensor operation failed.
pub fn gated(tape: &mut Tape, activation: Activation, [gate, up]: [&Traced; 2]) -> Result<Traced> {
    let (g, u) = (gate.tensor().contiguous()?, up.tensor().contiguous()?);
    if g.dims() != u.dims() {
        return Err(Error::run(format!("a gate of shape {:?} for {:?}", g.dims(), u.dims())));
    }
    let y = dispatch!(
        g,
        crate::tensor::cuda::gated(activation, &g, &u),
        by_dtype!(g.dtype(), gate_forward(activation, &g, &u))
    )?;
    Ok(tape.record(y, &[gate, up], move |gradient, into| {
        let (dgate, dup) = dispatch!(
            g,
            crate::tensor::cuda::gated_backward(activation, &g, &u, &gradient),
            by_dtype!(g.dtype(), gate_backward(activation, &g, &u, &gradient))
        )?;
        into.add(0, dgate)?;
        into.add(1, dup)
    }))
}

/// `silu(gate) ∘ up`: the gate of Llama.
///
/// # Errors
/// As [`gated`].
pub fn swiglu(tape: &mut Tape, gate: &Traced, up: &Traced) -> Result<Traced> {
    gated(tape, Activation::Silu, [gate, up])
}

/// `cap · tanh(x / cap)`, element by element: numbers beyond ±`cap` are bent towards it (Gemma Team 2024).
///
/// # Errors
/// A tensor operation failed.
pub fn soft_cap(tape: &mut Tape, cap: f64, x: &Traced) -> Result<Traced> {
    let bent = scale(tape, cap.recip(), x)?;
    let bent = activate(tape, Activation::Tanh, &bent)?;
    scale(tape, cap, &bent)
}

/// `factor · x`.
///
/// # Errors
/// A tensor operation failed.
pub fn scale(tape: &mut Tape, factor: f64, x: &Traced) -> Result<Traced> {
    let y = (x.tensor() * factor)?;
    Ok(tape.record(y, &[x], move |gradient, into| into.add(0, (gradient * factor)?)))
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

fn gate_forward<T: Element>(activation: Activation, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    read_all([gate, up], |[zs, us]: [&[T]; 2]| tensor(activation.gated(zs, us), gate.dims()))
}

fn gate_backward<T: Element>(
    activation: Activation,
    gate: &Tensor,
    up: &Tensor,
    gradient: &Tensor,
) -> Result<(Tensor, Tensor)> {
    read_all([gate, up, gradient], |[zs, us, gs]: [&[T]; 3]| {
        let (dgate, dup) = activation.gated_backward(zs, us, gs);
        Ok((tensor(dgate, gate.dims())?, tensor(dup, up.dims())?))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::check::{close, gradients, normal};

    const ALL: [Activation; 5] =
        [Activation::Relu, Activation::GeluTanh, Activation::Gelu, Activation::Silu, Activation::Tanh];

    #[test]
    fn gradients_equal_finite_differences() -> Result<()> {
        gradients(&[normal(&[3, 5], 1)?], |tape, x| soft_cap(tape, 0.7, &x[0]))?;
        ALL.into_iter().try_for_each(|activation| {
            gradients(&[normal(&[3, 5], 1)?, normal(&[3, 5], 2)?], |tape, x| gated(tape, activation, [&x[0], &x[1]]))?;
            gradients(&[normal(&[3, 5], 1)?], |tape, inputs| activate(tape, activation, &inputs[0]))
        })
    }

    #[test]
    fn equal_the_composed_forms() -> Result<()> {
        let (gate, up) = (normal(&[3, 6], 1)?.as_detached_tensor(), normal(&[3, 6], 2)?.as_detached_tensor());
        let tape = &mut Tape::default();
        let (g, u) = (Traced::constant(gate.clone()), Traced::constant(up.clone()));
        close(swiglu(tape, &g, &u)?.tensor(), &(gate.silu()? * &up)?, 1e-12)?;
        close(soft_cap(tape, 0.7, &g)?.tensor(), &((&gate / 0.7)?.tanh()? * 0.7)?, 1e-12)?;
        let composed = [gate.relu()?, gate.gelu()?, gate.gelu_erf()?, gate.silu()?, gate.tanh()?];
        ALL.into_iter().zip(composed).try_for_each(|(activation, composed)| {
            close(activate(tape, activation, &g)?.tensor(), &composed, 1e-9)?;
            close(gated(tape, activation, [&g, &u])?.tensor(), &(composed * &up)?, 1e-9)
        })
    }
}
