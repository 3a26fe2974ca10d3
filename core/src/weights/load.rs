//! Weights from a seed or from a checkpoint, and the tensors to be written to one.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};

use super::checkpoint::Checkpoint;
use super::parameters::Weights;
use super::precision::Precision;
use super::schema::{Init, Param, ParamList, factor_names, module_of};
use crate::error::{Error, Result};
use crate::gguf::StoredTensor;
use crate::rng::{Seed, randn};
use crate::tensor::elementwise::norm;
use crate::tensor::matrix::Matrix;

impl Weights {
    /// Seeded random weights of a model with these parameters, stored as `precision` says (an element type will do). One parameter at a time
    /// exists in f32.
    ///
    /// # Errors
    /// The precision does not fit the model, or a tensor operation failed.
    pub fn random(params: &ParamList, seed: Seed, precision: impl Into<Precision>, device: &Device) -> Result<Self> {
        let init = |param: &Param, device: &Device| -> Result<Tensor> {
            Ok(match param.init {
                Init::Ones => Tensor::ones(param.shape.as_slice(), DType::F32, device)?,
                Init::Zeros => Tensor::zeros(param.shape.as_slice(), DType::F32, device)?,
                Init::Normal(std) => (randn(&param.shape, &mut seed.named(&param.name).generator(), device)? * std)?,
            })
        };
        let precision = precision.into();
        Self::build(params, precision, device, |param| precision.store(param, device, |device| init(param, device)))
    }

    /// The weights of a model with these parameters out of a checkpoint, which must hold every declared parameter in the declared shape. They
    /// are stored as `precision` says (an element type will do), one parameter after the other. A checkpoint of the model
    /// without its head leaves out the leading `model.` of all names (OPT's own are such).
    ///
    /// # Errors
    /// A parameter is missing, of another shape, or not finite, or the precision does not fit the model.
    pub fn load(
        params: &ParamList,
        checkpoint: &mut Checkpoint,
        precision: impl Into<Precision>,
        device: &Device,
    ) -> Result<Self> {
        let precision = precision.into();
        Self::build(params, precision, device, |param| {
            let bare =
                param.name.strip_prefix("model.").filter(|bare| !checkpoint.has(&param.name) && checkpoint.has(bare));
            let name = bare.map_or_else(|| param.name.clone(), str::to_owned);
            if precision != Precision::Stored {
                // Blocks are made on the host, so the tensor is read where it is wanted.
                return precision
                    .store(param, device, |device| checked(param, checkpoint.read(&name, device)?, checkpoint.path()));
            }
            match checkpoint.read_stored(&name, device)? {
                StoredTensor::Plain(tensor) => {
                    let tensor = checked(param, tensor, checkpoint.path())?;
                    precision.store(param, device, |_| Ok(tensor))
                }
                StoredTensor::Blocks(blocks) => {
                    checked(param, blocks.dequantize(&Device::Cpu)?, checkpoint.path())?;
                    precision.store_blocks(param, blocks, device)
                }
            }
        })
    }

    fn build(
        params: &ParamList,
        precision: Precision,
        device: &Device,
        make: impl FnMut(&Param) -> Result<Matrix>,
    ) -> Result<Self> {
        precision.check(params)?;
        let base = params.iter().map(make);
        let (base, device, params) = (base.collect::<Result<_>>()?, device.clone(), Arc::new(params.clone()));
        Ok(Self { params, precision, device, base, lora: None, trainable: BTreeMap::new() })
    }

    /// The base parameters by name: as they are stored, or in f32 where they are quantized or an adapter was merged
    /// into low precision.
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
            let [a, b] =
                factor_names(module_of(&self.params.params[index].name)).map(|n| format!("base_model.model.{n}"));
            [(a, adapter.a.clone()), (b, adapter.b.clone())]
        });
        Ok(tensors.collect())
    }
}

/// The tensor, if it is one that the parameter can be.
fn checked(param: &Param, tensor: Tensor, path: &Path) -> Result<Tensor> {
    if tensor.dims() != param.shape {
        return Err(Error::data(format!(
            "`{}` has shape {:?}, but the configuration asks for {:?}",
            param.name,
            tensor.dims(),
            param.shape
        ))
        .file(path)
        .help("config.json and the weights belong to different models"));
    }
    if !norm([&tensor])?.value()?.is_finite() {
        return Err(Error::data(format!("`{}` holds a value that is not finite", param.name))
            .file(path)
            .help("the checkpoint is damaged: download or train it again"));
    }
    Ok(tensor)
}
