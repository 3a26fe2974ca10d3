//! An update of AdamW of all parameters at once.

use candle_core::{DType, Tensor};
use titer_kernels::adamw::AdamWStep;

use super::host::{read, write};
use super::scalar::Scalar;
use crate::error::Result;

/// Updates every parameter in place from its gradient `[n]` times `factor` and its moments `[2, n]`, f32 all three:
/// `tensors` holds `[parameter, gradient, moments]`. A parameter of another type is converted to f32 and rounded back.
///
/// # Errors
/// A tensor operation failed.
pub fn adamw(tensors: &[[Tensor; 3]], factor: &Scalar, step: &AdamWStep) -> Result<()> {
    let narrow = |[parameter, ..]: &&[Tensor; 3]| parameter.dtype() != DType::F32;
    for [parameter, gradient, moments] in tensors.iter().filter(narrow) {
        let wide = parameter.to_dtype(DType::F32)?;
        let update = [wide.clone(), gradient.clone(), moments.clone()];
        adamw(&[update], factor, step)?;
        parameter.slice_set(&wide.to_dtype(parameter.dtype())?, 0, 0)?;
    }
    let tensors: Vec<&[Tensor; 3]> = tensors.iter().filter(|tensors| !narrow(tensors)).collect();
    let Some([first, ..]) = tensors.first() else { return Ok(()) };
    dispatch!(first, super::cuda::adamw(&tensors, factor, step), {
        let factor = factor.value()? as f32;
        tensors.iter().try_for_each(|tensors| update(tensors, factor, step))
    })
}

fn update([parameter, gradient, moments]: &[Tensor; 3], factor: f32, step: &AdamWStep) -> Result<()> {
    read(gradient, |gradient: &[f32]| {
        write(moments, |moments: &mut [f32]| step.update_moments(moments, gradient, factor))
    })?;
    read(moments, |moments: &[f32]| write(parameter, |parameter: &mut [f32]| step.apply(parameter, moments)))
}
