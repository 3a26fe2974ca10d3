//! Low-rank adapters: what they are, and attaching, merging and dropping them.

use std::collections::BTreeMap;

use candle_core::{Tensor, Var};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::checkpoint::Checkpoint;
use super::parameters::Weights;
use super::schema::{ParamList, Role, factor_names, module_of};
use crate::bounds;
use crate::bounds::at_most;
use crate::error::{Error, Result};
use crate::registry::nearest;
use crate::rng::{Seed, uniform};
use crate::tensor::matrix::Matrix;

/// A low-rank adapter: `W + (alpha / r) · B A` with `A: [r, in]`, `B: [out, r]` (Hu et al. 2021).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct LoraConfig {
    /// The rank `r`.
    pub r: usize,
    /// The numerator of the scale `alpha / r`.
    pub alpha: f64,
    /// Probability of dropping an input of the adapter in training.
    pub dropout: f32,
    /// The linear layers to adapt, by the last part of their name; all of the model's but its head if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target_modules: Option<Vec<String>>,
}

impl Default for LoraConfig {
    /// The Vaccine repository's shape (r = 8 on every linear layer but the head), with the customary `alpha = 2 r`.
    fn default() -> Self {
        Self { r: 8, alpha: 16., dropout: 0., target_modules: None }
    }
}

impl LoraConfig {
    /// The factor on `B A`.
    pub fn scale(&self) -> f64 {
        self.alpha / self.r as f64
    }

    /// The same, its targets spelled out: those that were left to the model are the model's own. Published code has
    /// one list for all architectures, and on most of them trains less than it says.
    #[must_use]
    pub fn for_params(&self, params: &ParamList) -> Self {
        let all = || params.names_of(&[Role::Linear]).into_iter().map(str::to_owned).collect();
        Self { target_modules: Some(self.target_modules.clone().unwrap_or_else(all)), ..self.clone() }
    }

    /// Checks ranges.
    ///
    /// # Errors
    /// A rank of zero, a dropout outside `[0, 1)`, or no target.
    pub fn check(&self) -> Result<()> {
        if self.r == 0 {
            return Err(Error::config("`r` must be at least 1, found `0`").key("lora.r").help("8 is customary"));
        }
        at_most("lora.r", self.r, bounds::RANK)?;
        if !self.alpha.is_finite() {
            let message = format!("`alpha` must be a finite number, found `{}`", self.alpha);
            return Err(Error::config(message).key("lora.alpha").help("twice the rank is customary"));
        }
        if !(0. ..1.).contains(&self.dropout) {
            let message = format!("`dropout` must lie in [0, 1), found `{}`", self.dropout);
            return Err(Error::config(message).key("lora.dropout").help("0 for none"));
        }
        if self.target_modules.as_ref().is_some_and(Vec::is_empty) {
            return Err(Error::config("`target_modules` is empty: LoRA would train nothing")
                .key("lora.target_modules")
                .help("name layers such as `q_proj`, or leave the key out"));
        }
        Ok(())
    }
}

/// The two factors of one adapted layer.
#[derive(Debug, Clone)]
pub struct Adapter {
    /// `A: [r, in]`.
    pub a: Tensor,
    /// `B: [out, r]`.
    pub b: Tensor,
}

/// An attached adapter: the factors by the index of the parameter that they adapt.
#[derive(Debug, Clone)]
pub(super) struct Lora {
    pub(super) config: LoraConfig,
    pub(super) adapters: BTreeMap<usize, Adapter>,
}

impl Weights {
    /// Attaches a fresh adapter and trains it: `A` uniform in `±1/√in` (PEFT's Kaiming uniform), `B` zero, so the
    /// model computes what it did before.
    ///
    /// # Errors
    /// An adapter is already attached, or a target matches no linear layer.
    pub fn train_lora(&mut self, config: &LoraConfig, seed: Seed) -> Result<()> {
        let (device, dtype) = (self.device().clone(), self.adapter_dtype());
        self.attach(config, |module, output, input| {
            let bound = 1. / (input as f32).sqrt();
            let a = uniform(&[config.r, input], bound, &mut seed.named(module).generator(), &device)?;
            Ok(Adapter { a: a.to_dtype(dtype)?, b: Tensor::zeros((output, config.r), dtype, &device)? })
        })
    }

    /// Attaches a stored adapter (PEFT's names) and trains it.
    ///
    /// # Errors
    /// An adapter is already attached, a target matches nothing, or a tensor is missing or of another shape.
    pub fn continue_lora(&mut self, config: &LoraConfig, checkpoint: &mut Checkpoint) -> Result<()> {
        let (device, dtype) = (self.device().clone(), self.adapter_dtype());
        self.attach(config, |module, output, input| {
            let mut read = |factor: &str, shape: [usize; 2]| -> Result<Tensor> {
                let name = format!("base_model.model.{module}.{factor}.weight");
                let tensor = checkpoint.read(&name, &device)?.to_dtype(dtype)?;
                if tensor.dims() == shape {
                    return Ok(tensor);
                }
                Err(Error::data(format!("`{name}` has shape {:?}, expected {shape:?}", tensor.dims()))
                    .file(checkpoint.path())
                    .help("the adapter belongs to another model, or was trained with another rank"))
            };
            Ok(Adapter { a: read("lora_A", [config.r, input])?, b: read("lora_B", [output, config.r])? })
        })
    }

    fn attach(
        &mut self,
        config: &LoraConfig,
        mut make: impl FnMut(&str, usize, usize) -> Result<Adapter>,
    ) -> Result<()> {
        config.check()?;
        if self.lora.is_some() {
            return Err(Error::run("an adapter is already attached: merge it first"));
        }
        let config = config.for_params(&self.params);
        let targets = config.target_modules.as_deref().unwrap_or_default();
        self.check_targets(targets)?;
        self.freeze();
        let mut adapters = BTreeMap::new();
        for (index, param) in self.params.iter().enumerate().filter(|(_, param)| param.is_linear()) {
            let module = module_of(&param.name);
            if !targets.iter().any(|target| matches(module, target)) {
                continue;
            }
            let adapter = make(module, param.shape[0], param.shape[1])?;
            let mut train = |name: String, tensor: &Tensor| -> Result<Tensor> {
                let var = Var::from_tensor(&tensor.copy()?)?;
                let tensor = var.as_tensor().clone();
                self.trainable.insert(name, var);
                Ok(tensor)
            };
            let [a, b] = factor_names(module);
            let adapter = Adapter { a: train(a, &adapter.a)?, b: train(b, &adapter.b)? };
            adapters.insert(index, adapter);
        }
        self.lora = Some(Lora { config, adapters });
        Ok(())
    }

    /// Every target must name at least one layer; published code skips such targets without a word.
    fn check_targets(&self, targets: &[String]) -> Result<()> {
        let modules: Vec<&str> =
            self.params.iter().filter(|param| param.is_linear()).map(|param| module_of(&param.name)).collect();
        let unmatched = targets.iter().find(|target| !modules.iter().any(|m| matches(m, target)));
        let Some(target) = unmatched else { return Ok(()) };
        let names = self.params.linear_names();
        let hint =
            nearest(target, names.iter().copied()).map_or_else(String::new, |n| format!("; did you mean `{n}`?"));
        Err(Error::config(format!("LoRA target `{target}` matches no linear layer of this model{hint}"))
            .key("lora.target_modules")
            .help(format!("layers of this model: {}", names.join(", "))))
    }

    /// Adds the adapter into the base parameters, `W += (alpha / r) · B A`, and drops it. Weights in fewer bits than are
    /// computed with keep the factors beside them, in f32, so that nothing is rounded; bf16 weights on a CUDA device are
    /// rounded to bf16.
    ///
    /// # Errors
    /// A tensor operation failed.
    pub fn merge(&mut self) -> Result<()> {
        self.freeze();
        let Some(lora) = self.lora.take() else { return Ok(()) };
        for (index, adapter) in lora.adapters {
            let weight = &mut self.base[index];
            *weight = weight.plus(lora.config.scale(), &adapter.b.detach(), &adapter.a.detach())?;
        }
        Ok(())
    }

    /// Drops the adapter: the base parameters as they were before it.
    pub fn discard_adapter(&mut self) {
        self.freeze();
        self.lora = None;
    }

    /// A copy with the adapter merged, which later updates do not change.
    ///
    /// # Errors
    /// A tensor operation failed.
    pub fn merged(&self) -> Result<Self> {
        let mut copy = self.frozen();
        copy.base = copy.base.iter().map(Matrix::copy).collect::<Result<_>>()?;
        copy.merge()?;
        Ok(copy)
    }
}

fn matches(module: &str, target: &str) -> bool {
    module == target || module.strip_suffix(target).is_some_and(|front| front.ends_with('.'))
}
