//! The numbers of a model by name: which of them are trained, views, snapshots, and changing them in place.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor, Var};

use super::lora::{Adapter, Lora, LoraConfig};
use super::precision::Precision;
use super::schema::{Param, ParamId, ParamList, factor_names, module_of};
use crate::error::{Error, Result};
use crate::tensor::elementwise::{norm, to_bf16};
use crate::tensor::grads::Grads;
use crate::tensor::matrix::Matrix;

/// The numbers of a model: base parameters, at most one adapter, and which of them are trained.
///
/// Cloning shares storage: a clone sees later updates. A copy that does not is [`Weights::snapshot`] (of what is
/// trained) or [`Weights::merged`].
///
/// ```
/// use candle_core::{DType, Device};
/// use titer_core::Weights;
/// use titer_core::rng::Seed;
/// use titer_core::weights::{LoraConfig, ParamList};
///
/// let mut params = ParamList::default();
/// params.linear("model.proj", 3, 2, 0.1);
/// let mut weights = Weights::random(&params, Seed::new(0), DType::F32, &Device::Cpu)?;
/// assert!(weights.trainable().is_empty());
///
/// // Only the factors of the adapter are trained, and merging leaves a plain matrix.
/// weights.train_lora(&LoraConfig { r: 1, ..LoraConfig::default() }, Seed::new(1))?;
/// assert_eq!(weights.trainable().len(), 2);
/// let merged = weights.merged()?;
/// assert!(merged.trainable().is_empty() && merged.adapters().next().is_none());
/// # Ok::<(), titer_core::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Weights {
    pub(super) params: Arc<ParamList>,
    pub(super) precision: Precision,
    pub(super) device: Device,
    pub(super) base: Vec<Matrix>,
    pub(super) lora: Option<Lora>,
    pub(super) trainable: BTreeMap<String, Var>,
}

impl Weights {
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

    /// The factors of all adapters on a device in bf16, cast at once, by the weight they adapt.
    pub(crate) fn adapters_in_bf16(&self) -> Result<BTreeMap<ParamId, [Tensor; 2]>> {
        let adapters: Vec<_> = self.lora.iter().flat_map(|lora| &lora.adapters).collect();
        let factors: Vec<&Tensor> = adapters.iter().flat_map(|(_, adapter)| [&adapter.a, &adapter.b]).collect();
        let cast = to_bf16(&factors)?;
        let pairs = cast.as_chunks::<2>().0.iter().cloned();
        Ok(adapters.iter().map(|(index, _)| ParamId(**index)).zip(pairs).collect())
    }

    /// The adapters by the module they adapt, such as `model.layers.0.self_attn.q_proj`, in checkpoint order.
    pub fn adapters(&self) -> impl Iterator<Item = (&str, &Adapter)> {
        let adapters = self.lora.iter().flat_map(|lora| &lora.adapters);
        adapters.map(|(&index, adapter)| (module_of(&self.params.params[index].name), adapter))
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

    /// The transformer blocks of the parameters in them, and of their adapters' factors, by name.
    pub fn blocks(&self) -> BTreeMap<String, usize> {
        let in_blocks = self.params.iter().filter_map(|param| Some((&param.name, param.block?)));
        let named = in_blocks.flat_map(|(name, block)| {
            let [a, b] = factor_names(module_of(name));
            [name.clone(), a, b].map(|name| (name, block))
        });
        named.collect()
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

    /// The element type of adapters: f32 also beside weights in low precision, since small updates would round away.
    pub(super) fn adapter_dtype(&self) -> DType {
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
    /// The base is stored in low precision, which makes it frozen, or a tensor operation failed.
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

    /// Adds `scale · B A` to the base parameter `name`, for `b: [out, k]` and `a: [k, in]`, wherever they are computed; an
    /// adapter stays beside it.
    /// Weights in low precision keep the factors beside them, as in [`Weights::merge`].
    ///
    /// # Errors
    /// There is no such parameter, or a tensor operation failed.
    pub fn add_low_rank(&mut self, name: &str, scale: f64, b: &Tensor, a: &Tensor) -> Result<()> {
        self.change(name, |matrix| matrix.plus(scale, b, a))
    }

    /// Adds `delta`, of the parameter's shape and on any device, to the base parameter `name`; an adapter stays beside it.
    ///
    /// # Errors
    /// There is no such parameter, the base is stored in low precision, or a tensor operation failed.
    pub fn add(&mut self, name: &str, delta: &Tensor) -> Result<()> {
        self.precision.check_trainable()?;
        self.change(name, |matrix| {
            let before = matrix.dense()?;
            let sum = (before.to_device(delta.device())?.to_dtype(delta.dtype())? + delta)?;
            Ok(Matrix::Dense(sum.to_dtype(before.dtype())?.to_device(before.device())?))
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
            if norm([tensor])?.value()?.is_finite() {
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

    pub(super) fn freeze(&mut self) {
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
}
