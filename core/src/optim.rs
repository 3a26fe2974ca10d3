//! AdamW with decoupled weight decay, and learning-rate schedules.

use std::collections::BTreeMap;
use std::f64::consts::PI;

use candle_core::{DType, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use titer_kernels::adamw::AdamWStep;

use crate::error::{Error, Result};
use crate::tensor::adamw::adamw;
use crate::tensor::grads::Grads;
use crate::tensor::scalar::Scalar;
use crate::weights::parameters::Weights;

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
            Schedule::Cosine => (0.5 * (1. + libm::cos(PI * progress))).max(0.),
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

    /// Applies one update to the trained parameters: `factor` times `grads`, at this learning rate.
    ///
    /// # Errors
    /// A gradient belongs to no trained parameter, or a tensor operation failed.
    pub fn step(&mut self, weights: &Weights, grads: &Grads, factor: &Scalar, learning_rate: f64) -> Result<()> {
        let mut updates = Vec::with_capacity(grads.len());
        for (name, grad) in grads.iter() {
            let var = weights.trainable().get(name);
            let var = var.ok_or_else(|| Error::run(format!("`{name}` is not a parameter under training")))?;
            if !self.moments.contains_key(name) {
                let tensor = Tensor::zeros((2, var.elem_count()), DType::F32, var.device())?;
                self.moments.insert(name.to_owned(), Moments { tensor, step: 0 });
            }
            let moments = self.moments.get_mut(name).expect("inserted above");
            moments.step += 1;
            let grad = grad.detach().to_dtype(DType::F32)?.flatten_all()?;
            updates.push((moments.step, var.as_tensor().clone(), grad, moments.tensor.clone()));
        }
        // Parameters of one age share their numbers, and on a device one launch.
        while let Some(&(age, ..)) = updates.first() {
            let (same, rest) = updates.into_iter().partition(|update| update.0 == age);
            updates = rest;
            let same: Vec<[Tensor; 3]> = same.into_iter().map(|(_, w, g, m): (i32, _, _, _)| [w, g, m]).collect();
            adamw(&same, factor, &self.numbers(age, learning_rate))?;
        }
        Ok(())
    }

    /// The numbers of a parameter's `age`-th update.
    fn numbers(&self, age: i32, learning_rate: f64) -> AdamWStep {
        let [beta1, beta2] = self.config.betas;
        AdamWStep {
            decay: (1. - learning_rate * self.config.weight_decay) as f32,
            rate: (learning_rate / (1. - libm::pow(beta1, age.into()))) as f32,
            root: (1. - libm::pow(beta2, age.into())).sqrt() as f32,
            beta2: beta2 as f32,
            shares: [(1. - beta1) as f32, (1. - beta2) as f32],
            eps: self.config.eps as f32,
        }
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
            let step = *steps.get(&name).ok_or_else(|| {
                Error::data(format!("the optimiser state lacks the step count of `{name}`"))
                    .help("the checkpoint is damaged: run the same command again")
            })?;
            self.moments.insert(name, Moments { tensor: tensor.copy()?, step });
        }
        Ok(())
    }
}
