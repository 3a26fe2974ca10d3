//! Differentiable operators that models are built of.
//!
//! Candle's own fused operators (`ops::rms_norm`, `softmax_last_dim`, `rotary_emb::rope`) drop the gradient silently.
//! Each operator here is a candle `CustomOp` with an analytic backward pass, computed on the host for f32 and f64; on
//! any other device or type it is composed of candle's differentiable tensor operations, which are slower and equal.
//! Tests hold the two forms against each other and against finite differences.

mod attention;
mod cross_entropy;
mod exp;
mod gate;
mod linear;
mod norm;
mod rope;

use candle_core::{CpuStorage, DType, Layout, Storage, Tensor, WithDType};

pub use attention::{Visibility, causal_softmax};
pub use cross_entropy::cross_entropy;
pub use gate::swiglu;
pub use linear::{AdapterInput, linear};
pub use norm::rms_norm;
pub use rope::{Rope, rotate};

type CandleResult<T> = candle_core::Result<T>;

/// Whether the host kernels apply to `tensor`.
fn on_host(tensor: &Tensor) -> bool {
    tensor.device().is_cpu() && matches!(tensor.dtype(), DType::F32 | DType::F64)
}

/// Real numbers that the host kernels compute with.
trait Real: WithDType + num_traits::Float + std::iter::Sum + std::ops::AddAssign + std::ops::MulAssign {
    /// The number nearest to `value`.
    fn of(value: f64) -> Self {
        <Self as WithDType>::from_f64(value)
    }

    /// `eˣ`, fast where that costs no more than rounding.
    fn fast_exp(self) -> Self;
}

impl Real for f32 {
    #[inline]
    fn fast_exp(self) -> Self {
        exp::exp(self)
    }
}

impl Real for f64 {
    #[inline]
    fn fast_exp(self) -> Self {
        self.exp()
    }
}

/// The contiguous elements behind a storage and its layout.
fn slice<'a, T: Real>(storage: &'a CpuStorage, layout: &Layout) -> CandleResult<&'a [T]> {
    match layout.contiguous_offsets() {
        Some((from, to)) => Ok(&storage.as_slice::<T>()?[from..to]),
        None => candle_core::bail!("a fused operator was given a tensor that is not contiguous"),
    }
}

/// The elements of a host tensor, lent to `f` without a copy if they are contiguous.
fn read<T: Real, R>(tensor: &Tensor, f: impl FnOnce(&[T]) -> CandleResult<R>) -> CandleResult<R> {
    let tensor = tensor.contiguous()?;
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cpu(storage) => f(slice(storage, layout)?),
        _ => candle_core::bail!("a host kernel was given a tensor of another device"),
    }
}

/// Calls `$kernel::<f32>` or `$kernel::<f64>` by the element type.
macro_rules! by_dtype {
    ($dtype:expr, $kernel:ident ( $($arg:expr),* $(,)? )) => {
        match $dtype {
            candle_core::DType::F32 => $kernel::<f32>($($arg),*),
            candle_core::DType::F64 => $kernel::<f64>($($arg),*),
            other => candle_core::bail!("no host kernel for {other:?}"),
        }
    };
}
use by_dtype;

#[cfg(test)]
pub(crate) mod check {
    //! Finite differences against the analytic gradient, in f64.

    use candle_core::{Device, Tensor, Var};

    use crate::Result;
    use crate::rng::{Seed, randn};

    /// A variable of independent normal values.
    pub(crate) fn normal(shape: &[usize], seed: u64) -> Result<Var> {
        let values = randn(shape, &mut Seed::new(seed).generator(), &Device::Cpu)?;
        Ok(Var::from_tensor(&values.to_dtype(candle_core::DType::F64)?)?)
    }

    /// Asserts that the gradient of `Σ f(x)·c`, for fixed random `c`, equals central differences in every element of
    /// every variable.
    pub(crate) fn gradients(vars: &[Var], f: impl Fn(&[Tensor]) -> Result<Tensor>) -> Result<()> {
        let inputs = || vars.iter().map(|var| var.as_tensor().clone()).collect::<Vec<_>>();
        let shape = f(&inputs())?.dims().to_vec();
        let direction = normal(&shape, 99)?.as_detached_tensor();
        let value = |inputs: &[Tensor]| -> Result<Tensor> { Ok((f(inputs)? * &direction)?.sum_all()?) };
        let store = value(&inputs())?.backward()?;
        for (index, var) in vars.iter().enumerate() {
            let analytic = store.get(var).expect("every variable gets a gradient").flatten_all()?.to_vec1::<f64>()?;
            let start = var.as_detached_tensor().flatten_all()?.to_vec1::<f64>()?;
            for (at, &gradient) in analytic.iter().enumerate() {
                let moved = |by: f64| -> Result<f64> {
                    let mut values = start.clone();
                    values[at] += by;
                    let mut inputs = inputs();
                    inputs[index] = Tensor::from_vec(values, var.shape(), &Device::Cpu)?;
                    Ok(value(&inputs)?.to_scalar::<f64>()?)
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
