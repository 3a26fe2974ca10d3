//! Attaching adapters to weights, merging and dropping them.

use std::collections::BTreeMap;

use candle_core::{Tensor, Var};

use super::checkpoint::Checkpoint;
use super::lora::{Adapter, Lora, LoraConfig};
use super::parameters::Weights;
use super::schema::{factor_names, module_of};
use crate::error::{Error, Result};
use crate::registry::did_you_mean;
use crate::rng::{Seed, uniform};
use crate::tensor::matrix::Matrix;

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
        let hint = did_you_mean(target, names.iter().copied());
        Err(Error::config(format!("LoRA target `{target}` matches no linear layer of this model{hint}"))
            .key("lora.target_modules")
            .help(format!("layers of this model: {}", names.join(", "))))
    }

    /// Adds the adapter into the base parameters, `W += (alpha / r) · B A`, and drops it. Weights in low precision
    /// keep the factors beside them, in f32, so that nothing is rounded; bf16 weights on a CUDA device are
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

/// Whether a layer is what a target names: by the last parts of its name.
pub(super) fn matches(module: &str, target: &str) -> bool {
    module == target || module.strip_suffix(target).is_some_and(|front| front.ends_with('.'))
}
