//! Activations: the gate of a Llama MLP, `silu(gate) ∘ up` with `silu(z) = z / (1 + e⁻ᶻ)`, and plain ones.

use candle_core::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::host::{Real, by_dtype, read, rows, rows2, tensor};
use crate::tape::{Tape, Traced};
use crate::{Error, Result};

/// `silu(gate) ∘ up`, element by element.
///
/// # Errors
/// The shapes differ, or a tensor operation failed.
pub fn swiglu(tape: &mut Tape, gate: &Traced, up: &Traced) -> Result<Traced> {
    let (g, u) = (gate.tensor().contiguous()?, up.tensor().contiguous()?);
    if g.dims() != u.dims() {
        return Err(Error::run(format!("swiglu: shapes {:?} and {:?} differ", g.dims(), u.dims())));
    }
    let y = dispatch!(g, super::cuda::swiglu(&g, &u), by_dtype!(g.dtype(), gate_forward(&g, &u)))?;
    Ok(tape.record(y, &[gate, up], move |gradient, into| {
        let (dgate, dup) = dispatch!(
            g,
            super::cuda::swiglu_backward(&g, &u, &gradient),
            by_dtype!(g.dtype(), gate_backward(&g, &u, &gradient))
        )?;
        into.add(0, dgate)?;
        into.add(1, dup)
    }))
}

/// An activation function of one argument; in text by Hugging Face's name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// `max(z, 0)`.
    Relu,
    /// `z Φ(z)` by its tanh approximation.
    #[serde(rename = "gelu_pytorch_tanh", alias = "gelu_new")]
    GeluTanh,
    /// `z Φ(z)`.
    Gelu,
    /// `z / (1 + e⁻ᶻ)`.
    Silu,
}

impl Activation {
    /// The activation of every element.
    ///
    /// # Errors
    /// A tensor operation failed.
    pub fn apply(self, tape: &mut Tape, x: &Traced) -> Result<Traced> {
        let xs = x.tensor().contiguous()?;
        let y = dispatch!(xs, super::cuda::activation(self, &xs), by_dtype!(xs.dtype(), forward(self, &xs)))?;
        Ok(tape.record(y, &[x], move |gradient, into| {
            let dx = dispatch!(
                xs,
                super::cuda::activation_backward(self, &xs, &gradient),
                by_dtype!(xs.dtype(), backward(self, &xs, &gradient))
            )?;
            into.add(0, dx)
        }))
    }

    /// The value and the slope at `z`.
    #[inline(always)]
    fn at<T: Real>(self, z: T) -> (T, T) {
        let half = T::of(0.5);
        match self {
            Activation::Relu => {
                if z > T::zero() {
                    (z, T::one())
                } else {
                    (T::zero(), T::zero())
                }
            }
            Activation::GeluTanh => {
                let (a, b) = (T::of((2. / std::f64::consts::PI).sqrt()), T::of(0.044_715));
                // tanh u = 2 σ(2u) − 1
                let tanh = (sigmoid(T::of(2.) * a * (z + b * z * z * z)) - half) * T::of(2.);
                let slope = a * (T::one() + T::of(3.) * b * z * z) * (T::one() - tanh * tanh);
                (half * z * (T::one() + tanh), half * (T::one() + tanh) + half * z * slope)
            }
            Activation::Gelu => {
                let erf = T::of(libm::erf(z.to_f64() * std::f64::consts::FRAC_1_SQRT_2));
                let density = (-half * z * z).fast_exp() * T::of(1. / (2. * std::f64::consts::PI).sqrt());
                let mass = half * (T::one() + erf);
                (z * mass, mass + z * density)
            }
            Activation::Silu => {
                let s = sigmoid(z);
                (z * s, s * (T::one() + z * (T::one() - s)))
            }
        }
    }
}

#[inline(always)]
fn sigmoid<T: Real>(z: T) -> T {
    T::one() / (T::one() + (-z).fast_exp())
}

fn forward<T: Real>(activation: Activation, x: &Tensor) -> Result<Tensor> {
    read(x, |xs: &[T]| {
        let mut y = vec![T::zero(); xs.len()];
        rows(
            &mut y,
            1,
            #[inline(always)]
            |first, part| {
                for (y, &x) in part.iter_mut().zip(&xs[first..]) {
                    *y = activation.at(x).0;
                }
            },
        );
        tensor(y, x.dims())
    })
}

fn backward<T: Real>(activation: Activation, x: &Tensor, gradient: &Tensor) -> Result<Tensor> {
    read(x, |xs: &[T]| {
        read(gradient, |gs: &[T]| {
            let mut dx = vec![T::zero(); xs.len()];
            rows(
                &mut dx,
                1,
                #[inline(always)]
                |first, part| {
                    for ((dx, &x), &g) in part.iter_mut().zip(&xs[first..]).zip(&gs[first..]) {
                        *dx = g * activation.at(x).1;
                    }
                },
            );
            tensor(dx, x.dims())
        })
    })
}

fn gate_forward<T: Real>(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    read(gate, |zs: &[T]| {
        read(up, |us: &[T]| {
            let mut y = vec![T::zero(); zs.len()];
            rows(
                &mut y,
                1,
                #[inline(always)]
                |first, part| {
                    for ((y, &z), &u) in part.iter_mut().zip(&zs[first..]).zip(&us[first..]) {
                        *y = z * sigmoid(z) * u;
                    }
                },
            );
            tensor(y, gate.dims())
        })
    })
}

fn gate_backward<T: Real>(gate: &Tensor, up: &Tensor, gradient: &Tensor) -> Result<(Tensor, Tensor)> {
    read(gate, |zs: &[T]| {
        read(up, |us: &[T]| {
            read(gradient, |gs: &[T]| {
                let (mut dgate, mut dup) = (vec![T::zero(); zs.len()], vec![T::zero(); zs.len()]);
                rows2(
                    &mut dgate,
                    &mut dup,
                    1,
                    #[inline(always)]
                    |first, dgate, dup| {
                        let inputs = zs[first..].iter().zip(&us[first..]).zip(&gs[first..]);
                        for ((dgate, dup), ((&z, &u), &g)) in dgate.iter_mut().zip(dup).zip(inputs) {
                            let s = sigmoid(z);
                            *dgate = g * u * s * (T::one() + z * (T::one() - s));
                            *dup = g * z * s;
                        }
                    },
                );
                Ok((tensor(dgate, gate.dims())?, tensor(dup, up.dims())?))
            })
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::check::{close, gradients, normal};

    const ALL: [Activation; 4] = [Activation::Relu, Activation::GeluTanh, Activation::Gelu, Activation::Silu];

    #[test]
    fn gradients_equal_finite_differences() -> Result<()> {
        gradients(&[normal(&[3, 5], 1)?, normal(&[3, 5], 2)?], |tape, inputs| swiglu(tape, &inputs[0], &inputs[1]))?;
        ALL.into_iter().try_for_each(|activation| {
            gradients(&[normal(&[3, 5], 1)?], |tape, inputs| activation.apply(tape, &inputs[0]))
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
            .try_for_each(|(activation, composed)| close(activation.apply(tape, &g)?.tensor(), &composed, 1e-9))
    }
}
