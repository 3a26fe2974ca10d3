//! AdamW with decoupled weight decay, and learning-rate schedules.

use std::collections::BTreeMap;
use std::f64::consts::PI;

use candle_core::{CpuStorage, DType, InplaceOp2, Layout, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::grads::Grads;
use crate::weights::Weights;
use crate::{Error, Result};

/// The course of the learning rate after the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Schedule {
    /// Stays at the peak. Like the Hugging Face schedule of that name it has no warm-up.
    Constant,
    /// Stays at the peak after the warm-up.
    ConstantWithWarmup,
    /// Falls to zero in a straight line.
    Linear,
    /// Falls to zero along half a cosine.
    Cosine,
}

impl Schedule {
    /// The factor on the peak learning rate at `step` of `total`, with `warmup` steps of linear rise from zero, as
    /// the Hugging Face schedules.
    pub fn factor(self, step: usize, warmup: usize, total: usize) -> f64 {
        if self == Schedule::Constant {
            return 1.;
        }
        if step < warmup {
            return step as f64 / warmup.max(1) as f64;
        }
        let progress = (step - warmup) as f64 / total.saturating_sub(warmup).max(1) as f64;
        match self {
            Schedule::Constant | Schedule::ConstantWithWarmup => 1.,
            Schedule::Linear => (1. - progress).max(0.),
            Schedule::Cosine => (0.5 * (1. + (PI * progress).cos())).max(0.),
        }
    }
}

/// Settings of [`AdamW`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWConfig {
    /// Decays of the first and second moment.
    pub betas: [f64; 2],
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled decay: `w ← w − lr · weight_decay · w`.
    pub weight_decay: f64,
}

impl Default for AdamWConfig {
    fn default() -> Self {
        Self { betas: [0.9, 0.999], eps: 1e-8, weight_decay: 0.1 }
    }
}

/// AdamW (Loshchilov and Hutter 2019) in the arithmetic of `torch.optim.AdamW`:
///
/// `w ← w (1 − lr λ)`, `m ← β₁ m + (1 − β₁) g`, `v ← β₂ v + (1 − β₂) g²`,
/// `w ← w − lr/(1 − β₁ᵗ) · m / (√v / √(1 − β₂ᵗ) + ε)`.
///
/// Moments are f32. A parameter without a gradient is skipped: no decay, and its own `t` does not advance.
#[derive(Debug)]
pub struct AdamW {
    config: AdamWConfig,
    moments: BTreeMap<String, Moments>,
}

/// `[2, n]`: first and second moment of one parameter, with its step count.
#[derive(Debug)]
struct Moments {
    tensor: Tensor,
    step: i32,
}

impl AdamW {
    /// An optimiser that has seen nothing.
    pub fn new(config: AdamWConfig) -> Self {
        Self { config, moments: BTreeMap::new() }
    }

    /// Applies one update to the trained parameters.
    ///
    /// # Errors
    /// A gradient belongs to no trained parameter, or a tensor operation failed.
    pub fn step(&mut self, weights: &Weights, grads: &Grads, learning_rate: f64) -> Result<()> {
        for (name, grad) in grads.iter() {
            let var = weights.trainable().get(name);
            let var = var.ok_or_else(|| Error::run(format!("`{name}` is not a parameter under training")))?;
            if !self.moments.contains_key(name) {
                let tensor = Tensor::zeros((2, var.elem_count()), DType::F32, var.device())?;
                self.moments.insert(name.to_owned(), Moments { tensor, step: 0 });
            }
            let moments = self.moments.get_mut(name).expect("inserted above");
            moments.step += 1;
            let [beta1, beta2] = self.config.betas;
            let grad = grad.detach().to_dtype(DType::F32)?.flatten_all()?;
            let update = Parameters {
                decay: 1. - learning_rate * self.config.weight_decay,
                rate: learning_rate / (1. - beta1.powi(moments.step)),
                root: (1. - beta2.powi(moments.step)).sqrt(),
                eps: self.config.eps,
            };
            if var.device().is_cpu() && var.dtype() == DType::F32 {
                moments.tensor.inplace_op2(&grad, &MomentsOp { beta1, beta2 })?;
                var.as_tensor().inplace_op2(&moments.tensor, &update)?;
            } else {
                let (m, v) = (moments.tensor.get(0)?, moments.tensor.get(1)?);
                let m = ((m * beta1)? + (&grad * (1. - beta1))?)?;
                let v = ((v * beta2)? + (grad.sqr()? * (1. - beta2))?)?;
                let shift = (&m / ((v.sqrt()? / update.root)? + update.eps)?)?;
                let shift = (shift * update.rate)?.reshape(var.shape())?;
                let moved = ((var.as_detached_tensor().to_dtype(DType::F32)? * update.decay)? - shift)?;
                var.set(&moved.to_dtype(var.dtype())?)?;
                moments.tensor = Tensor::stack(&[m, v], 0)?;
            }
        }
        Ok(())
    }

    /// The moments by parameter name, for an exact resume: tensors `[2, n]` and step counts.
    pub fn state(&self) -> (BTreeMap<String, Tensor>, BTreeMap<String, i32>) {
        let tensors = self.moments.iter().map(|(name, moments)| (name.clone(), moments.tensor.clone())).collect();
        (tensors, self.moments.iter().map(|(name, moments)| (name.clone(), moments.step)).collect())
    }

    /// Goes on from [`AdamW::state`].
    ///
    /// # Errors
    /// A moment lacks its step count.
    pub fn load_state(&mut self, tensors: BTreeMap<String, Tensor>, steps: &BTreeMap<String, i32>) -> Result<()> {
        self.moments.clear();
        for (name, tensor) in tensors {
            let step = *steps
                .get(&name)
                .ok_or_else(|| Error::data(format!("the optimiser state lacks the step count of `{name}`")))?;
            self.moments.insert(name, Moments { tensor: tensor.copy()?, step });
        }
        Ok(())
    }
}

/// First pass: moments `[2, n]` from the gradient `[n]`.
struct MomentsOp {
    beta1: f64,
    beta2: f64,
}

impl InplaceOp2 for MomentsOp {
    fn name(&self) -> &'static str {
        "adamw-moments"
    }

    fn cpu_fwd(
        &self,
        moments: &mut CpuStorage,
        _: &Layout,
        grad: &CpuStorage,
        layout: &Layout,
    ) -> candle_core::Result<()> {
        let (moments, grad) = host_slices(moments, grad, layout)?;
        let (first, second) = moments.split_at_mut(grad.len());
        let (beta1, beta2) = (self.beta1 as f32, self.beta2 as f32);
        for ((m, v), &g) in first.iter_mut().zip(second).zip(grad) {
            *m += (g - *m) * (1. - beta1);
            *v = *v * beta2 + g * g * (1. - beta2);
        }
        Ok(())
    }
}

/// Second pass: the parameter `[n]` from its moments `[2, n]`.
struct Parameters {
    decay: f64,
    rate: f64,
    root: f64,
    eps: f64,
}

impl InplaceOp2 for Parameters {
    fn name(&self) -> &'static str {
        "adamw-parameters"
    }

    fn cpu_fwd(
        &self,
        param: &mut CpuStorage,
        _: &Layout,
        moments: &CpuStorage,
        layout: &Layout,
    ) -> candle_core::Result<()> {
        let (param, moments) = host_slices(param, moments, layout)?;
        let (first, second) = moments.split_at(param.len());
        let (decay, rate, root, eps) = (self.decay as f32, self.rate as f32, self.root as f32, self.eps as f32);
        for ((w, &m), &v) in param.iter_mut().zip(first).zip(second) {
            *w = *w * decay - rate * (m / (v.sqrt() / root + eps));
        }
        Ok(())
    }
}

fn host_slices<'a>(
    target: &'a mut CpuStorage,
    source: &'a CpuStorage,
    layout: &Layout,
) -> candle_core::Result<(&'a mut [f32], &'a [f32])> {
    match (target, source, layout.contiguous_offsets()) {
        (CpuStorage::F32(target), CpuStorage::F32(source), Some((from, to))) => {
            Ok((target.as_mut_slice(), &source[from..to]))
        }
        _ => candle_core::bail!("the optimiser works on contiguous f32 tensors"),
    }
}
