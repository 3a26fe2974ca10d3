//! Exponentials, logarithms, sums and products of matrices in candle expressions, such as a defense's own loss. Candle's
//! own depend on the processor on the host: on its C library, its caches and the width of its vectors.

use candle_core::{D, Tensor};
use titer_kernels::cross_entropy as softmax;
use titer_kernels::elementwise as kernels;

use crate::error::Result;
use crate::tensor::bridge::computed;
use crate::tensor::gemm::Gemm;
use crate::tensor::host::{Element, by_dtype, last_dim, read, read_all, tensor};

/// `eˣ` of every element, differentiable.
///
/// # Errors
/// A tensor operation failed.
pub fn exp(x: &Tensor) -> Result<Tensor> {
    if !x.device().is_cpu() {
        return Ok(x.exp()?);
    }
    let y = by_dtype!(x.dtype(), exponentials(x))?;
    computed("exp", &[x], &y, |_, y, gradient| Ok(vec![Some((gradient * y)?)]))
}

/// `ln x` of every element, differentiable.
///
/// # Errors
/// A tensor operation failed.
pub fn ln(x: &Tensor) -> Result<Tensor> {
    if !x.device().is_cpu() {
        return Ok(x.log()?);
    }
    let y = by_dtype!(x.dtype(), logarithms(x))?;
    computed("ln", &[x], &y, |x, _, gradient| Ok(vec![Some((gradient / x[0])?)]))
}

/// The sum over the last dimension, which stays with size 1, differentiable.
///
/// # Errors
/// A tensor operation failed.
pub fn sum_last(x: &Tensor) -> Result<Tensor> {
    if !x.device().is_cpu() {
        return Ok(x.sum_keepdim(D::Minus1)?);
    }
    let y = by_dtype!(x.dtype(), sums(x))?;
    computed("sum", &[x], &y, |x, _, gradient| Ok(vec![Some(gradient.broadcast_as(x[0].shape())?)]))
}

/// The sum of all elements, a scalar, differentiable.
///
/// # Errors
/// A tensor operation failed.
pub fn sum_all(x: &Tensor) -> Result<Tensor> {
    Ok(sum_last(&x.flatten_all()?)?.squeeze(0)?)
}

/// The mean of all elements, a scalar, differentiable.
///
/// # Errors
/// A tensor operation failed.
pub fn mean_all(x: &Tensor) -> Result<Tensor> {
    Ok((sum_all(x)? / x.elem_count() as f64)?)
}

/// `x − ln Σ eˣ` over dimension `dim`, differentiable.
///
/// # Errors
/// There is no such dimension, or a tensor operation failed.
pub fn log_softmax(x: &Tensor, dim: usize) -> Result<Tensor> {
    if !x.device().is_cpu() {
        let shifted = x.broadcast_sub(&x.max_keepdim(dim)?.detach())?;
        return Ok(shifted.broadcast_sub(&shifted.exp()?.sum_keepdim(dim)?.log()?)?);
    }
    if dim + 1 != x.rank() {
        return Ok(log_softmax(&x.transpose(dim, D::Minus1)?, x.rank() - 1)?.transpose(dim, D::Minus1)?);
    }
    let y = by_dtype!(x.dtype(), log_probabilities(x))?;
    computed("log_softmax", &[x], &y, |_, y, gradient| {
        Ok(vec![Some(by_dtype!(y.dtype(), log_probabilities_backward(y, gradient))?)])
    })
}

/// `A B` for matrices of f32 or f64, differentiable.
///
/// # Errors
/// The inner sizes differ, or a tensor operation failed.
pub fn matmul(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    if !a.device().is_cpu() {
        return Ok(a.matmul(b)?);
    }
    computed("matmul", &[a, b], &Gemm::NN.product(a, b)?, |inputs, _, gradient| {
        let [a, b] = inputs else { unreachable!("a product has two factors") };
        Ok(vec![Some(Gemm::NT.product(gradient, b)?), Some(Gemm::TN.product(a, gradient)?)])
    })
}

fn exponentials<T: Element>(x: &Tensor) -> Result<Tensor> {
    read(x, |values: &[T]| tensor(kernels::exp(values), x.dims()))
}

fn logarithms<T: Element>(x: &Tensor) -> Result<Tensor> {
    read(x, |values: &[T]| tensor(kernels::ln(values), x.dims()))
}

fn sums<T: Element>(x: &Tensor) -> Result<Tensor> {
    let width = last_dim(x);
    let mut shape = x.dims().to_vec();
    shape.pop();
    shape.push(1);
    read(x, |x: &[T]| tensor(kernels::sum_columns(x, shape.iter().product(), width), &shape))
}

fn log_probabilities<T: Element>(x: &Tensor) -> Result<Tensor> {
    read(x, |values: &[T]| tensor(softmax::log_softmax(values, last_dim(x).max(1)), x.dims()))
}

fn log_probabilities_backward<T: Element>(y: &Tensor, gradient: &Tensor) -> Result<Tensor> {
    read_all([y, gradient], |[values, gradient]: [&[T]; 2]| {
        tensor(softmax::log_softmax_backward(values, gradient, last_dim(y).max(1)), y.dims())
    })
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Var};

    use titer_kernels::real::Real;

    use super::*;
    use crate::tensor::check::{close, normal};

    fn gradient(y: &Tensor, x: &Var) -> Result<Tensor> {
        Ok(y.sqr()?.sum_all()?.backward()?.get(x).expect("a gradient").clone())
    }

    #[test]
    fn values_and_gradients_equal_candles() -> Result<()> {
        for (dtype, value, slope) in [(DType::F64, 1e-12, 1e-10), (DType::F32, 2e-4, 5e-3)] {
            let of = |shape: &[usize], seed| Var::from_tensor(&normal(shape, seed)?.to_dtype(dtype)?);
            // Rows that are longer than a block of a product and no multiple of the lanes.
            let (x, wide) = (of(&[3, 301], 1)?, of(&[301, 4], 2)?);
            for (ours, theirs) in [
                (exp(&x)?, x.exp()?),
                (ln(&exp(&x)?)?, x.exp()?.log()?),
                (sum_last(&x)?, x.sum_keepdim(1)?),
                (sum_last(&x.t()?)?, x.t()?.sum_keepdim(1)?),
                (sum_all(&x)?, x.sum_all()?),
                (mean_all(&x)?, x.mean_all()?),
                (log_softmax(&x, 1)?, candle_nn::ops::log_softmax(&x, 1)?),
                (log_softmax(&x, 0)?, candle_nn::ops::log_softmax(&x, 0)?),
                (matmul(&x, &wide)?, x.matmul(&wide)?),
                (matmul(&x, &x.t()?)?, x.matmul(&x.t()?)?),
            ] {
                close(&ours, &theirs, value)?;
                close(&gradient(&ours, &x)?, &gradient(&theirs, &x)?, slope)?;
            }
        }
        Ok(())
    }

    /// The documented order: lane `i` sums the elements `i`, `i + 32`, …, and the lanes are summed by halves.
    #[test]
    fn sums_have_one_order() -> Result<()> {
        let x = normal(&[2, 1003], 1)?.to_dtype(DType::F32)?;
        let by_hand = |row: &[f32]| {
            let mut lanes = [0f32; 32];
            let (whole, rest) = row.split_at(row.len() / 32 * 32);
            for chunk in whole.chunks(32) {
                lanes.iter_mut().zip(chunk).for_each(|(lane, x)| *lane += x);
            }
            // The last elements are fewer than half of the lanes.
            assert!(rest.len() < 16);
            lanes.iter_mut().zip(rest).for_each(|(lane, x)| *lane += x);
            for width in [16, 8, 4, 2, 1] {
                for lane in 0..width {
                    lanes[lane] += lanes[lane + width];
                }
            }
            lanes[0]
        };
        let expected: Vec<f32> = x.to_vec2::<f32>()?.iter().map(|row| by_hand(row)).collect();
        assert_eq!(sum_last(&x)?.flatten_all()?.to_vec1::<f32>()?, expected);
        // The gradient of a softmax sums over the row as well.
        let x = Var::from_tensor(&x)?;
        let y = log_softmax(&x, 1)?;
        let weights = normal(&[2, 1003], 2)?.to_dtype(DType::F32)?;
        let found = (&y * &weights)?.sum_all()?.backward()?.get(&x).expect("a gradient").to_vec2::<f32>()?;
        for ((found, y), weights) in found.iter().zip(y.to_vec2::<f32>()?).zip(weights.to_vec2::<f32>()?) {
            let total = by_hand(&weights);
            let expected: Vec<f32> =
                weights.iter().zip(y).map(|(weight, y)| weight - f32::fast_exp(y) * total).collect();
            assert_eq!(found, &expected);
        }
        Ok(())
    }

    #[test]
    fn exp_ends_in_zero_and_infinity() -> Result<()> {
        let x = Tensor::new(&[f32::NEG_INFINITY, -1e4, -100., 0., 88.5, 1e4, f32::NAN], &candle_core::Device::Cpu)?;
        let y = exp(&x)?.to_vec1::<f32>()?;
        let exact = |x: f64| x.exp() as f32;
        assert_eq!(y[..5], [0., 0., exact(-100.), 1., exact(88.5)]);
        assert!(y[5] == f32::INFINITY && y[6].is_nan());
        Ok(())
    }

    #[test]
    fn nothing_sums_to_zero() -> Result<()> {
        for shape in [[0, 3], [3, 0]] {
            let x = Tensor::zeros(&shape, DType::F32, &candle_core::Device::Cpu)?;
            assert_eq!(sum_last(&x)?.dims(), [shape[0], 1]);
            assert_eq!(sum_all(&x)?.to_scalar::<f32>()?, 0.);
            assert_eq!(log_softmax(&x, 1)?.dims(), shape);
        }
        Ok(())
    }
}
