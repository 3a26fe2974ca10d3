//! Activations, plain and of a gate: `activation(gate) ∘ up`, as in the MLPs of Llama and Gemma.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::parallel::{rows, rows2};
use crate::real::Real;

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
    /// `tanh z`.
    Tanh,
}

impl Activation {
    /// The activation of every element.
    pub fn forward<T: Real>(self, x: &[T]) -> Vec<T> {
        let mut y = vec![T::zero(); x.len()];
        rows(
            &mut y,
            1,
            #[inline(always)]
            |first, part| {
                for (y, &x) in part.iter_mut().zip(&x[first..]) {
                    *y = self.at(x).0;
                }
            },
        );
        y
    }

    /// The gradient of the input `x`, given that of the result.
    pub fn backward<T: Real>(self, x: &[T], gradient: &[T]) -> Vec<T> {
        let mut dx = vec![T::zero(); x.len()];
        rows(
            &mut dx,
            1,
            #[inline(always)]
            |first, part| {
                for ((dx, &x), &g) in part.iter_mut().zip(&x[first..]).zip(&gradient[first..]) {
                    *dx = g * self.at(x).1;
                }
            },
        );
        dx
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
                let tanh = tanh(a * (z + b * z * z * z));
                let slope = a * (T::one() + T::of(3.) * b * z * z) * (T::one() - tanh * tanh);
                (half * z * (T::one() + tanh), half * (T::one() + tanh) + half * z * slope)
            }
            Activation::Gelu => {
                let erf = T::of(libm::erf(z.wide() * std::f64::consts::FRAC_1_SQRT_2));
                let density = (-half * z * z).fast_exp() * T::of(1. / (2. * std::f64::consts::PI).sqrt());
                let mass = half * (T::one() + erf);
                (z * mass, mass + z * density)
            }
            Activation::Silu => {
                let s = sigmoid(z);
                (z * s, s * (T::one() + z * (T::one() - s)))
            }
            Activation::Tanh => {
                let tanh = tanh(z);
                (tanh, T::one() - tanh * tanh)
            }
        }
    }

    /// `activation(gate) ∘ up`, element by element.
    pub fn gated<T: Real>(self, gate: &[T], up: &[T]) -> Vec<T> {
        match self {
            // By itself, so that its loop is free of the others' branches.
            Activation::Silu => product(gate, up, |z| z * sigmoid(z)),
            other => product(gate, up, |z| other.at(z).0),
        }
    }

    /// The gradients of `gate` and `up`, given that of the result.
    pub fn gated_backward<T: Real>(self, gate: &[T], up: &[T], gradient: &[T]) -> (Vec<T>, Vec<T>) {
        match self {
            // In an order of its own, on which the recorded results of Llama's family rest.
            Activation::Silu => product_backward(gate, up, gradient, |z, u, g| {
                let s = sigmoid(z);
                (g * u * s * (T::one() + z * (T::one() - s)), g * z * s)
            }),
            other => product_backward(gate, up, gradient, |z, u, g| {
                let (value, slope) = other.at(z);
                (g * u * slope, g * value)
            }),
        }
    }
}

/// `f(gate) ∘ up`.
fn product<T: Real>(gate: &[T], up: &[T], f: impl Fn(T) -> T + Sync) -> Vec<T> {
    let mut y = vec![T::zero(); gate.len()];
    rows(
        &mut y,
        1,
        #[inline(always)]
        |first, part| {
            for ((y, &z), &u) in part.iter_mut().zip(&gate[first..]).zip(&up[first..]) {
                *y = f(z) * u;
            }
        },
    );
    y
}

/// Both gradients of each element, which `f` makes of gate, up and gradient.
fn product_backward<T: Real>(
    gate: &[T],
    up: &[T],
    gradient: &[T],
    f: impl Fn(T, T, T) -> (T, T) + Sync,
) -> (Vec<T>, Vec<T>) {
    let (mut dgate, mut dup) = (vec![T::zero(); gate.len()], vec![T::zero(); gate.len()]);
    rows2(
        &mut dgate,
        &mut dup,
        1,
        #[inline(always)]
        |first, dgate, dup| {
            let inputs = gate[first..].iter().zip(&up[first..]).zip(&gradient[first..]);
            for ((dgate, dup), ((&z, &u), &g)) in dgate.iter_mut().zip(dup).zip(inputs) {
                (*dgate, *dup) = f(z, u, g);
            }
        },
    );
    (dgate, dup)
}

#[inline(always)]
fn sigmoid<T: Real>(z: T) -> T {
    T::one() / (T::one() + (-z).fast_exp())
}

/// `tanh z`, as `2 σ(2z) − 1`.
#[inline(always)]
pub(crate) fn tanh<T: Real>(z: T) -> T {
    (sigmoid(T::of(2.) * z) - T::of(0.5)) * T::of(2.)
}
