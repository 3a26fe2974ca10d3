//! Parameters by name: loading, saving, training them in full or through LoRA, snapshots.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor, Var};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::bounds::{self, at_most};
use crate::checkpoint::Checkpoint;
use crate::grads::Grads;
use crate::matrix::{Matrix, Precision};
use crate::model::Model;
use crate::ops;
use crate::registry::nearest;
use crate::rng::{Seed, randn, uniform};
use crate::{Error, Result};

/// How a parameter starts when a model is built from scratch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Init {
    /// Normal with this standard deviation.
    Normal(f64),
    /// All ones.
    Ones,
    /// All zeros.
    Zeros,
}

/// The module of an untied output head, as Hugging Face's causal language models call it.
pub const HEAD: &str = "lm_head";

/// One declared parameter.
#[derive(Debug, Clone, PartialEq)]
pub struct Param {
    /// The Hugging Face name, such as `model.layers.0.self_attn.q_proj.weight`.
    pub name: String,
    /// The shape, as in the checkpoint.
    pub shape: Vec<usize>,
    /// How it starts in a model built from scratch.
    pub init: Init,
    /// Whether it is the weight `[out, in]` of a linear layer, which LoRA may adapt.
    pub linear: bool,
}

/// The handle of a parameter within its model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ParamId(usize);

/// The parameters of a model in checkpoint order.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ParamList(Vec<Param>);

impl ParamList {
    /// Declares a parameter that LoRA does not adapt.
    pub fn tensor(&mut self, name: impl Into<String>, shape: &[usize], init: Init) -> ParamId {
        self.push(Param { name: name.into(), shape: shape.to_vec(), init, linear: false })
    }

    /// Declares the weight `[output, input]` of the linear layer `module`.
    pub fn linear(&mut self, module: &str, output: usize, input: usize, std: f64) -> ParamId {
        let (name, init) = (format!("{module}.weight"), Init::Normal(std));
        self.push(Param { name, shape: vec![output, input], init, linear: true })
    }

    /// The parameters in order.
    pub fn iter(&self) -> impl Iterator<Item = &Param> {
        self.0.iter()
    }

    /// The last parts of the names of all linear layers, each once, in checkpoint order: what LoRA may target.
    pub fn linear_names(&self) -> Vec<&str> {
        let modules = self.iter().filter(|param| param.linear).map(|param| module_of(&param.name));
        let mut names = Vec::new();
        for name in modules.filter_map(|module| module.rsplit('.').next()) {
            if !names.contains(&name) {
                names.push(name);
            }
        }
        names
    }

    /// The parameter of this handle.
    pub fn get(&self, id: ParamId) -> &Param {
        &self.0[id.0]
    }

    /// How many numbers there are in all.
    pub fn count(&self) -> usize {
        let size = |param: &Param| param.shape.iter().fold(1usize, |product, &size| product.saturating_mul(size));
        self.0.iter().map(size).fold(0, usize::saturating_add)
    }

    fn push(&mut self, param: Param) -> ParamId {
        self.0.push(param);
        ParamId(self.0.len() - 1)
    }
}

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
        let all = || params.linear_names().into_iter().filter(|&name| name != HEAD).map(str::to_owned).collect();
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

#[derive(Debug, Clone)]
struct Lora {
    config: LoraConfig,
    adapters: BTreeMap<usize, Adapter>,
}

/// The numbers of a model: base parameters, at most one adapter, and which of them are trained.
///
/// Cloning shares storage: a clone sees later updates. A copy that does not is [`Weights::snapshot`] (of what is
/// trained) or [`Weights::merged`].
#[derive(Debug, Clone)]
pub struct Weights {
    params: Arc<ParamList>,
    precision: Precision,
    device: Device,
    base: Vec<Matrix>,
    lora: Option<Lora>,
    trainable: BTreeMap<String, Var>,
}

impl Weights {
    /// Seeded random weights for `model`, stored as `precision` says (an element type will do). One parameter at a time
    /// exists in f32.
    ///
    /// # Errors
    /// The precision does not fit the model, or a tensor operation failed.
    pub fn random(model: &dyn Model, seed: Seed, precision: impl Into<Precision>, device: &Device) -> Result<Self> {
        let init = |param: &Param| -> Result<Tensor> {
            Ok(match param.init {
                Init::Ones => Tensor::ones(param.shape.as_slice(), DType::F32, device)?,
                Init::Zeros => Tensor::zeros(param.shape.as_slice(), DType::F32, device)?,
                Init::Normal(std) => (randn(&param.shape, &mut seed.named(&param.name).generator(), device)? * std)?,
            })
        };
        Self::build(model, precision.into(), device, init)
    }

    /// The weights of `model` out of a checkpoint, which must hold every declared parameter in the declared shape. They
    /// are stored as `precision` says (an element type will do), one parameter after the other. A checkpoint of the model
    /// without its head leaves out the leading `model.` of all names (OPT's own are such).
    ///
    /// # Errors
    /// A parameter is missing, of another shape, or not finite, or the precision does not fit the model.
    pub fn load(
        model: &dyn Model,
        checkpoint: &mut Checkpoint,
        precision: impl Into<Precision>,
        device: &Device,
    ) -> Result<Self> {
        let load = |param: &Param| -> Result<Tensor> {
            let bare =
                param.name.strip_prefix("model.").filter(|bare| !checkpoint.has(&param.name) && checkpoint.has(bare));
            let name = bare.map_or_else(|| param.name.clone(), str::to_owned);
            let tensor = checkpoint.read(&name, device)?;
            if tensor.dims() != param.shape {
                return Err(Error::data(format!(
                    "`{}` has shape {:?}, but the configuration asks for {:?}",
                    param.name,
                    tensor.dims(),
                    param.shape
                ))
                .file(checkpoint.path())
                .help("config.json and the weights belong to different models"));
            }
            if !ops::norm([&tensor])?.value()?.is_finite() {
                return Err(Error::data(format!("`{}` holds a value that is not finite", param.name))
                    .file(checkpoint.path())
                    .help("the checkpoint is damaged: download or train it again"));
            }
            Ok(tensor)
        };
        Self::build(model, precision.into(), device, load)
    }

    fn build(
        model: &dyn Model,
        precision: Precision,
        device: &Device,
        mut make: impl FnMut(&Param) -> Result<Tensor>,
    ) -> Result<Self> {
        precision.check_model(model)?;
        let base = model.params().iter().map(|param| precision.store(model, param, &make(param)?));
        let (base, device, params) = (base.collect::<Result<_>>()?, device.clone(), Arc::new(model.params().clone()));
        Ok(Self { params, precision, device, base, lora: None, trainable: BTreeMap::new() })
    }

    /// A parameter as it is stored, without its adapter.
    pub fn get(&self, id: ParamId) -> &Matrix {
        &self.base[id.0]
    }

    /// What the model declared about a parameter.
    pub fn param(&self, id: ParamId) -> &Param {
        self.params.get(id)
    }

    /// The adapter of a linear layer's weight, with its scale.
    pub fn adapter(&self, id: ParamId) -> Option<(&Adapter, f64)> {
        let lora = self.lora.as_ref()?;
        Some((lora.adapters.get(&id.0)?, lora.config.scale()))
    }

    /// The adapters by the module they adapt, such as `model.layers.0.self_attn.q_proj`, in checkpoint order.
    pub fn adapters(&self) -> impl Iterator<Item = (&str, &Adapter)> {
        let adapters = self.lora.iter().flat_map(|lora| &lora.adapters);
        adapters.map(|(&index, adapter)| (module_of(&self.params.0[index].name), adapter))
    }

    /// The adapters' dropout probability; zero without adapters.
    pub fn adapter_dropout(&self) -> f32 {
        self.lora.as_ref().map_or(0., |lora| lora.config.dropout)
    }

    /// The configuration of the attached adapter.
    pub fn lora(&self) -> Option<&LoraConfig> {
        self.lora.as_ref().map(|lora| &lora.config)
    }

    /// The parameters under training, by name.
    pub fn trainable(&self) -> &BTreeMap<String, Var> {
        &self.trainable
    }

    /// How the base parameters are stored.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// The bytes that the base parameters take, without adapters.
    pub fn bytes(&self) -> usize {
        self.base.iter().map(Matrix::bytes).sum()
    }

    /// The element type that passes compute in.
    pub fn activation_dtype(&self) -> DType {
        self.precision.activation_dtype(&self.device)
    }

    /// The element type of adapters: f32 also beside weights in fewer bits, since small updates would round away.
    fn adapter_dtype(&self) -> DType {
        if self.activation_dtype() == DType::F64 { DType::F64 } else { DType::F32 }
    }

    /// Where the weights live.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The base parameters by name, as they are stored, without adapters.
    pub fn named(&self) -> impl Iterator<Item = (&str, &Matrix)> {
        self.params.iter().map(|param| param.name.as_str()).zip(&self.base)
    }

    /// Trains every base parameter.
    ///
    /// # Errors
    /// The base is stored in fewer bits than f32, which makes it frozen, or a tensor operation failed.
    pub fn train_full(&mut self) -> Result<()> {
        self.precision.check_trainable()?;
        self.merge()?;
        for (param, matrix) in self.params.iter().zip(&mut self.base) {
            let var = Var::from_tensor(&matrix.dense()?.copy()?)?;
            *matrix = Matrix::Dense(var.as_tensor().clone());
            self.trainable.insert(param.name.clone(), var);
        }
        Ok(())
    }

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
        for (index, param) in self.params.iter().enumerate().filter(|(_, param)| param.linear) {
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
            self.params.iter().filter(|param| param.linear).map(|param| module_of(&param.name)).collect();
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

    /// Adds `scale · B A` to the base parameter `name`, for `b: [out, k]` and `a: [k, in]`; an adapter stays beside it.
    /// Weights in fewer bits than are computed with keep the factors beside them, as in [`Weights::merge`].
    ///
    /// # Errors
    /// There is no such parameter, or a tensor operation failed.
    pub fn add_low_rank(&mut self, name: &str, scale: f64, b: &Tensor, a: &Tensor) -> Result<()> {
        self.change(name, |matrix| matrix.plus(scale, b, a))
    }

    /// Adds `delta`, of the parameter's shape, to the base parameter `name`; an adapter stays beside it.
    ///
    /// # Errors
    /// There is no such parameter, the base is stored in fewer bits than f32, or a tensor operation failed.
    pub fn add(&mut self, name: &str, delta: &Tensor) -> Result<()> {
        self.precision.check_trainable()?;
        self.change(name, |matrix| {
            let before = matrix.dense()?;
            Ok(Matrix::Dense((before.to_dtype(delta.dtype())? + delta)?.to_dtype(before.dtype())?))
        })
    }

    /// Changes a base parameter, whether it is under training or not.
    fn change(&mut self, name: &str, change: impl FnOnce(&Matrix) -> Result<Matrix>) -> Result<()> {
        let index = self.params.iter().position(|param| param.name == name);
        let index = index.ok_or_else(|| Error::run(format!("the model has no parameter `{name}`")))?;
        let changed = change(&self.base[index].detach())?;
        match self.trainable.get(name) {
            Some(var) => var.set(&changed.dense()?)?,
            None => self.base[index] = changed,
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

    /// A view of the same numbers in which nothing is trained: passes through it build no graph for the weights.
    #[must_use]
    pub fn frozen(&self) -> Self {
        let mut view = self.clone();
        view.freeze();
        view
    }

    /// A frozen view of the same model in which the parameters under training have `values`, as a snapshot gave them: a
    /// teacher, or a reference. The rest is shared.
    #[must_use]
    pub fn at(&self, values: &Grads) -> Self {
        let mut view = self.frozen();
        for (index, param) in self.params.iter().enumerate() {
            let value = |name: &str| values.get(name).cloned();
            if let Some(tensor) = value(&param.name) {
                view.base[index] = Matrix::Dense(tensor);
            }
            if let Some(adapter) = view.lora.as_mut().and_then(|lora| lora.adapters.get_mut(&index)) {
                let [a, b] = factor_names(module_of(&param.name));
                adapter.a = value(&a).unwrap_or_else(|| adapter.a.clone());
                adapter.b = value(&b).unwrap_or_else(|| adapter.b.clone());
            }
        }
        view
    }

    /// Fails, naming the parameter, if a number that training or a defense may have changed is infinite or not a number:
    /// the adapter's, or without one the base's.
    ///
    /// # Errors
    /// There is such a number, or a tensor operation failed.
    pub fn check_finite(&self) -> Result<()> {
        let check = |name: &str, tensor: &Tensor| -> Result<()> {
            if ops::norm([tensor])?.value()?.is_finite() {
                return Ok(());
            }
            Err(Error::run(format!("`{name}` holds a value that is not finite")))
        };
        for (module, adapter) in self.adapters() {
            let [a, b] = factor_names(module);
            check(&a, &adapter.a)?;
            check(&b, &adapter.b)?;
        }
        if self.lora.is_some() {
            return Ok(());
        }
        self.named().try_for_each(|(name, matrix)| check(name, &matrix.dense()?))
    }

    fn freeze(&mut self) {
        for matrix in &mut self.base {
            *matrix = matrix.detach();
        }
        for adapter in self.lora.iter_mut().flat_map(|lora| lora.adapters.values_mut()) {
            *adapter = Adapter { a: adapter.a.detach(), b: adapter.b.detach() };
        }
        self.trainable.clear();
    }

    /// A copy of the trained parameters.
    ///
    /// # Errors
    /// A tensor operation failed.
    pub fn snapshot(&self) -> Result<Grads> {
        self.trainable.iter().map(|(name, var)| Ok((name.clone(), var.as_tensor().copy()?.detach()))).collect()
    }

    /// Sets the trained parameters to `values`; the others stay.
    ///
    /// # Errors
    /// A name is not under training or a shape differs.
    pub fn set(&self, values: &Grads) -> Result<()> {
        for (name, tensor) in values.iter() {
            self.var(name)?.set(tensor)?;
        }
        Ok(())
    }

    /// Moves the trained parameters by `scale * direction`.
    ///
    /// # Errors
    /// A name is not under training or a shape differs.
    pub(crate) fn shift(&self, direction: &Grads, scale: f64) -> Result<()> {
        for (name, tensor) in direction.iter() {
            let var = self.var(name)?;
            var.set(&(var.as_detached_tensor() + (tensor * scale)?)?)?;
        }
        Ok(())
    }

    fn var(&self, name: &str) -> Result<&Var> {
        self.trainable.get(name).ok_or_else(|| Error::run(format!("`{name}` is not a parameter under training")))
    }

    /// The base parameters by name: as they are stored, or in f32 where they are stored in blocks or an adapter was
    /// merged into fewer bits.
    ///
    /// # Errors
    /// A tensor operation failed.
    pub fn base_tensors(&self) -> Result<Vec<(String, Tensor)>> {
        self.named().map(|(name, matrix)| Ok((name.to_owned(), matrix.exact()?))).collect()
    }

    /// The adapter's factors under PEFT's names.
    ///
    /// # Errors
    /// There is no adapter.
    pub fn adapter_tensors(&self) -> Result<Vec<(String, Tensor)>> {
        let lora = self.lora.as_ref().ok_or_else(|| Error::run("there is no adapter to save"))?;
        let tensors = lora.adapters.iter().flat_map(|(&index, adapter)| {
            let [a, b] = factor_names(module_of(&self.params.0[index].name)).map(|n| format!("base_model.model.{n}"));
            [(a, adapter.a.clone()), (b, adapter.b.clone())]
        });
        Ok(tensors.collect())
    }
}

/// The names of the factors `A` and `B` of the adapter of `module`.
pub fn factor_names(module: &str) -> [String; 2] {
    ["lora_A", "lora_B"].map(|factor| format!("{module}.{factor}.weight"))
}

/// The index of the transformer block that a parameter belongs to: 3 for `model.layers.3.mlp.up_proj.weight`.
pub fn layer_of(parameter: &str) -> Option<usize> {
    let (_, rest) = parameter.split_once("layers.")?;
    rest.split('.').next()?.parse().ok()
}

/// `model.layers.0.self_attn.q_proj` of `model.layers.0.self_attn.q_proj.weight`.
pub(crate) fn module_of(name: &str) -> &str {
    name.strip_suffix(".weight").unwrap_or(name)
}

fn matches(module: &str, target: &str) -> bool {
    module == target || module.strip_suffix(target).is_some_and(|front| front.ends_with('.'))
}
