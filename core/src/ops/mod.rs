//! Differentiable operators that models are built of.
//!
//! Candle's own fused operators (`ops::rms_norm`, `softmax_last_dim`, `rotary_emb::rope`) drop the gradient silently,
//! and its matrix product differentiates frozen weights. Each operator here has an analytic backward pass, computes on
//! the host (f32 and f64, vectorised, on all threads) and on CUDA devices (f32 and bf16), and records itself on a
//! [`Tape`](crate::tape::Tape). Tests hold every one against finite differences and against the same computation
//! composed of candle's tensor operations. [`fused`] makes any of them a candle custom operator, for use in a candle
//! expression such as a defense's own loss.

/// The second expression on the host, the first on a CUDA device of a build that has one.
macro_rules! dispatch {
    ($on:expr, $cuda:expr, $host:expr) => {{
        #[cfg(feature = "cuda")]
        let result = if $on.device().is_cuda() { $cuda } else { $host };
        #[cfg(not(feature = "cuda"))]
        let result = {
            let _ = &$on;
            $host
        };
        result
    }};
}

mod adamw;
#[cfg(target_arch = "x86_64")]
mod amx;
mod attention;
mod cross_entropy;
#[cfg(feature = "cuda")]
mod cuda;
mod elementwise;
mod expression;
mod fused;
mod gate;
mod gemm;
mod host;
mod linear;
mod math;
mod norm;
mod portable;
mod product;
mod rope;
mod simd;
mod skinny;

use candle_core::Tensor;

pub(crate) use adamw::{AdamWStep, adamw};
pub use attention::{Attention, Visibility};
pub use cross_entropy::{cross_entropy, head_cross_entropy};
pub use elementwise::{add, embed, select_rows};
pub(crate) use elementwise::{add_assign, cache_write, multiply, norm, sum};
pub use expression::{exp, ln, log_softmax, matmul, mean_all, sum_all, sum_last};
pub use fused::fused;
pub use gate::{Activation, swiglu};
pub use gemm::Gemm;
pub use linear::{LowRank, linear};
pub use norm::{layer_norm, rms_norm};
pub use rope::{Rope, Rotation, check_positions, rotate};

pub(crate) use simd::instructions;

type CandleResult<T> = candle_core::Result<T>;

/// The size of the last dimension.
fn last_dim(tensor: &Tensor) -> usize {
    tensor.dims().last().copied().unwrap_or(1)
}

#[cfg(test)]
pub(crate) mod check {
    //! Finite differences against the analytic gradient, in f64.

    use candle_core::{Device, Tensor, Var};

    use crate::Result;
    use crate::rng::{Seed, randn};
    use crate::tape::{Tape, Traced};

    /// A variable of independent normal values.
    pub(crate) fn normal(shape: &[usize], seed: u64) -> Result<Var> {
        let values = randn(shape, &mut Seed::new(seed).generator(), &Device::Cpu)?;
        Ok(Var::from_tensor(&values.to_dtype(candle_core::DType::F64)?)?)
    }

    /// Asserts that the gradient of `Σ f(x)·c`, for fixed random `c`, equals central differences in every element of
    /// every variable, and that values that are constants leave no trace.
    pub(crate) fn gradients(vars: &[Var], f: impl Fn(&mut Tape, &[Traced]) -> Result<Traced>) -> Result<()> {
        let constants = |vars: &[Tensor]| vars.iter().cloned().map(Traced::constant).collect::<Vec<_>>();
        let start: Vec<Tensor> = vars.iter().map(Var::as_detached_tensor).collect();
        let mut idle = Tape::default();
        let shape = f(&mut idle, &constants(&start))?.tensor().dims().to_vec();
        assert!(idle.is_empty(), "constants were recorded");
        let direction = normal(&shape, 99)?.as_detached_tensor();
        let value = |inputs: &[Tensor]| -> Result<f64> {
            let y = f(&mut Tape::default(), &constants(inputs))?;
            Ok((y.tensor() * &direction)?.sum_all()?.to_scalar::<f64>()?)
        };
        let mut tape = Tape::default();
        let inputs: Vec<Traced> = vars.iter().map(|var| tape.parameter(var.as_tensor())).collect();
        let y = f(&mut tape, &inputs)?;
        let mut found = tape.backward(vec![(y, direction.clone())])?;
        for (index, var) in vars.iter().enumerate() {
            let gradient = found.take(var.as_tensor()).expect("every variable gets a gradient");
            let analytic = gradient.flatten_all()?.to_vec1::<f64>()?;
            let values = start[index].flatten_all()?.to_vec1::<f64>()?;
            for (at, &gradient) in analytic.iter().enumerate() {
                let moved = |by: f64| -> Result<f64> {
                    let (mut values, mut inputs) = (values.clone(), start.clone());
                    values[at] += by;
                    inputs[index] = Tensor::from_vec(values, var.shape(), &Device::Cpu)?;
                    value(&inputs)
                };
                let step = 1e-5;
                let numeric = (moved(step)? - moved(-step)?) / (2. * step);
                let tolerance = 1e-6 * (1. + gradient.abs().max(numeric.abs()));
                assert!(
                    (gradient - numeric).abs() < tolerance,
                    "input {index}, element {at}: analytic {gradient}, numeric {numeric}"
                );
            }
        }
        Ok(())
    }

    /// Asserts that two tensors agree within `tolerance`, absolutely.
    pub(crate) fn close(a: &Tensor, b: &Tensor, tolerance: f64) -> Result<()> {
        assert_eq!(a.dims(), b.dims());
        let flat = |t: &Tensor| -> Result<Vec<f64>> {
            Ok(t.to_dtype(candle_core::DType::F64)?.flatten_all()?.to_vec1::<f64>()?)
        };
        for (at, (x, y)) in flat(a)?.into_iter().zip(flat(b)?).enumerate() {
            assert!((x - y).abs() <= tolerance, "element {at}: {x} and {y}");
        }
        Ok(())
    }
}
