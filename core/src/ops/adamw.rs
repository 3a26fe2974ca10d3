//! The arithmetic of AdamW over all parameters at once.

use candle_core::{DType, Tensor};

use super::host::{read, rows, rows2, write};
use crate::{Result, Scalar};

/// The numbers of one update, bias corrections included.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct AdamWStep {
    /// `1 − lr λ`.
    pub decay: f32,
    /// `lr / (1 − β₁ᵗ)`.
    pub rate: f32,
    /// `√(1 − β₂ᵗ)`.
    pub root: f32,
    /// `β₁` and `β₂`.
    pub betas: [f32; 2],
    /// `ε`.
    pub eps: f32,
}

/// Updates every parameter in place from its gradient `[n]` times `factor` and its moments `[2, n]`, f32 all three:
/// `tensors` holds `[parameter, gradient, moments]`. A parameter of another type is widened and rounded back.
///
/// # Errors
/// A tensor operation failed.
pub(crate) fn adamw(tensors: &[[Tensor; 3]], factor: &Scalar, step: &AdamWStep) -> Result<()> {
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
    let AdamWStep { decay, rate, root, betas: [beta1, beta2], eps } = *step;
    read(gradient, |gradient: &[f32]| {
        write(moments, |moments: &mut [f32]| {
            let (first, second) = moments.split_at_mut(gradient.len());
            rows2(
                first,
                second,
                1,
                #[inline(always)]
                |at, first, second| {
                    for ((m, v), &g) in first.iter_mut().zip(second).zip(&gradient[at..]) {
                        let g = g * factor;
                        *m += (g - *m) * (1. - beta1);
                        *v = *v * beta2 + g * g * (1. - beta2);
                    }
                },
            );
        })
    })?;
    read(moments, |moments: &[f32]| {
        let (first, second) = moments.split_at(moments.len() / 2);
        write(parameter, |parameter: &mut [f32]| {
            rows(
                parameter,
                1,
                #[inline(always)]
                |at, parameter| {
                    for ((w, &m), &v) in parameter.iter_mut().zip(&first[at..]).zip(&second[at..]) {
                        *w = *w * decay - rate * (m / (v.sqrt() / root + eps));
                    }
                },
            );
        })
    })
}
