//! Finite differences against the analytic gradient, in f64.

use candle_core::{Device, Tensor, Var};

use crate::error::Result;
use crate::rng::{Seed, randn};
use crate::tensor::tape::{Tape, Traced};

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
    let flat =
        |t: &Tensor| -> Result<Vec<f64>> { Ok(t.to_dtype(candle_core::DType::F64)?.flatten_all()?.to_vec1::<f64>()?) };
    for (at, (x, y)) in flat(a)?.into_iter().zip(flat(b)?).enumerate() {
        assert!((x - y).abs() <= tolerance, "element {at}: {x} and {y}");
    }
    Ok(())
}
