//! Norms, clipping, AdamW and casts, over many f32 tensors at once.

use candle_core::DType::{BF16, F32};
use candle_core::Tensor;
use titer_kernels::adamw::AdamWStep;

use super::launch::{Arg, CHUNKS, address, at, fresh, launch_grid, launch_tables, upload};
use crate::error::Result;
use crate::tensor::scalar::Scalar;

/// The norm of all tensors together.
pub(in crate::tensor) fn norm(tensors: &[&Tensor]) -> Result<Scalar> {
    Ok(Scalar::Device(norm_and_factor(tensors, 0.)?.get(0)?))
}

/// `min(1, max_norm / (norm + 1e-6))` for the norm of all tensors together.
pub(in crate::tensor) fn clip_factor(tensors: &[&Tensor], max_norm: f64) -> Result<Scalar> {
    Ok(Scalar::Device(norm_and_factor(tensors, max_norm)?.get(1)?))
}

/// The norm of all tensors together, and the factor that clips it to `max_norm`: `[2]`.
fn norm_and_factor(tensors: &[&Tensor], max_norm: f64) -> Result<Tensor> {
    let wide = tensors.iter().map(|t| t.contiguous()?.to_dtype(F32)).collect::<candle_core::Result<Vec<_>>>()?;
    let first = &wide[0];
    let rows = wide.iter().map(|t| Ok([address(t, F32)?, t.elem_count() as u64])).collect::<Result<Vec<_>>>()?;
    let partials = fresh(first, wide.len() * CHUNKS as usize, F32)?;
    let start = address(&partials, F32)?;
    launch_tables(first, "sum_squares_many", &rows, |at| {
        vec![Arg::U64(start + (at * CHUNKS as usize * size_of::<f32>()) as u64)]
    })?;
    let result = fresh(first, 2, F32)?;
    let count = partials.elem_count() as u64;
    let arguments = [at(&partials, F32)?, Arg::U64(count), Arg::F32(max_norm as f32), at(&result, F32)?];
    launch_grid(first, "norm_finish", [1, 1], &arguments)?;
    Ok(result)
}

/// `min(x, limit)` of a number that keeps one that is not a number.
pub(in crate::tensor) fn at_most(x: &Tensor, limit: f64) -> Result<Tensor> {
    let y = fresh(x, x.shape(), F32)?;
    launch_grid(x, "at_most", [1, 1], &[at(x, F32)?, at(&y, F32)?, Arg::F32(limit as f32)])?;
    Ok(y)
}

pub(in crate::tensor) fn adamw(tensors: &[&[Tensor; 3]], factor: &Scalar, step: &AdamWStep) -> Result<()> {
    let first = &tensors[0][0];
    let factor = match factor {
        Scalar::Host(value) => upload(first, vec![*value as f32])?,
        Scalar::Device(tensor) => tensor.reshape(1)?,
    };
    let row = |[parameter, gradient, moments]: &[Tensor; 3]| {
        let count = parameter.elem_count();
        let mean = address(moments, F32)?;
        let square = mean + (count * size_of::<f32>()) as u64;
        Ok([address(parameter, F32)?, address(gradient, F32)?, mean, square, count as u64])
    };
    let rows = tensors.iter().map(|tensors| row(tensors)).collect::<Result<Vec<_>>>()?;
    let factor = address(&factor, F32)?;
    launch_tables(first, "adamw_many", &rows, |_| {
        let [share1, share2] = step.shares;
        let step = [step.decay, step.rate, step.root, step.beta2, share1, share2, step.eps];
        [Arg::U64(factor)].into_iter().chain(step.map(Arg::F32)).collect()
    })
}

/// The tensors in bf16, by one launch.
pub(crate) fn to_bf16_many(tensors: &[&Tensor]) -> Result<Vec<Tensor>> {
    // cuBLAS reads 16 bytes at a time from where it may.
    let room = |tensor: &Tensor| tensor.elem_count().next_multiple_of(8);
    let whole = fresh(tensors[0], tensors.iter().map(|tensor| room(tensor)).sum::<usize>(), BF16)?;
    let (mut cast, mut rows, mut at) = (Vec::with_capacity(tensors.len()), Vec::with_capacity(tensors.len()), 0);
    for tensor in tensors {
        let to = whole.narrow(0, at, tensor.elem_count())?;
        rows.push([address(tensor, F32)?, address(&to, BF16)?, tensor.elem_count() as u64]);
        cast.push(to.reshape(tensor.shape())?);
        at += room(tensor);
    }
    launch_tables(tensors[0], "to_bf16_many", &rows, |_| Vec::new())?;
    Ok(cast)
}
