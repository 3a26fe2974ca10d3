//! Norms, clipping and AdamW, over many f32 tensors at once.

use candle_core::DType::{F32, I64};
use candle_core::Tensor;
use titer_kernels::adamw::AdamWStep;

use super::launch::{Arg, address, at, fresh, launch_grid, upload};
use crate::error::Result;
use crate::tensor::scalar::Scalar;

/// Chunks that a sum over one tensor is split into.
const CHUNKS: u32 = 32;

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
    let pointers = wide.iter().map(|t| address(t, F32).map(|address| address as i64)).collect::<Result<Vec<i64>>>()?;
    let lengths = wide.iter().map(|t| t.elem_count() as i64).collect();
    let (pointers, lengths) = (upload(first, pointers)?, upload(first, lengths)?);
    let partials = fresh(first, wide.len() * CHUNKS as usize, F32)?;
    let arguments = [at(&pointers, I64)?, at(&lengths, I64)?, at(&partials, F32)?];
    launch_grid(first, "sum_squares_many", [CHUNKS, wide.len() as u32], &arguments)?;
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
    let mut table = Vec::with_capacity(4 * tensors.len());
    for [parameter, gradient, moments] in tensors {
        let second = (parameter.elem_count() * size_of::<f32>()) as u64;
        let first = address(moments, F32)?;
        table
            .extend([address(parameter, F32)?, address(gradient, F32)?, first, first + second].map(|word| word as i64));
    }
    let lengths = tensors.iter().map(|[parameter, ..]| parameter.elem_count() as i64).collect();
    let (table, lengths) = (upload(first, table)?, upload(first, lengths)?);
    let arguments = [
        at(&table, I64)?,
        at(&lengths, I64)?,
        at(&factor, F32)?,
        Arg::F32(step.decay),
        Arg::F32(step.rate),
        Arg::F32(step.root),
        Arg::F32(step.betas[0]),
        Arg::F32(step.betas[1]),
        Arg::F32(step.eps),
    ];
    launch_grid(first, "adamw_many", [CHUNKS, tensors.len() as u32], &arguments)
}
