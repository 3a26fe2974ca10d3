//! A small model, random rows and batches, and weights as they stand at each stage.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use rand::RngExt;
use serde_json::Value;

use crate::data::batch::Batch;
use crate::data::example::Example;
use crate::data::stream::Stream;
use crate::defense::ancestry::Ancestry;
use crate::defense::stage::Stage;
use crate::error::{Error, Result};
use crate::model::architecture::Model;
use crate::model::entry::ModelEntry;
use crate::registry::settings::Settings;
use crate::rng::{Seed, randn};
use crate::weights::lora::LoraConfig;
use crate::weights::parameters::Weights;
use crate::weights::precision::Precision;

/// The seed of all that is random here.
pub(super) const SEED: u64 = 11;
/// The token that fills short rows where padding is asked for.
const PAD: u32 = 0;
/// The sizes that most architectures call by these names; block formats take rows of 32.
const SIZES: [(&str, usize); 6] = [
    ("vocab_size", 32),
    ("hidden_size", 32),
    ("intermediate_size", 32),
    ("ffn_dim", 32),
    ("num_attention_heads", 4),
    ("num_key_value_heads", 2),
];
/// How most architectures call the number of their blocks.
const LAYERS: &str = "num_hidden_layers";

/// A small model that checks run on, with another of one layer if there is such, and the device that they run on.
#[derive(Debug)]
pub struct Fixture {
    model: Box<dyn Model>,
    shallow: Option<Box<dyn Model>>,
    device: Device,
}

impl Fixture {
    /// A model of two layers, and one of one layer. Sizes that the architecture calls by other names than most keep
    /// its defaults.
    ///
    /// # Errors
    /// The architecture refuses the sizes.
    pub fn small(architecture: &ModelEntry) -> Result<Self> {
        let build = |layers| (architecture.build)(&sizes(architecture, layers));
        let shallow = build(1)?;
        Ok(Self::new(build(2)?, (shallow.spec().layers == 1).then_some(shallow)))
    }

    /// A world of models built elsewhere; `shallow` has one layer.
    pub fn new(model: Box<dyn Model>, shallow: Option<Box<dyn Model>>) -> Self {
        Self { model, shallow, device: Device::Cpu }
    }

    /// The same on another device, where what asks for double precision is checked in single precision.
    #[must_use]
    pub fn on(self, device: Device) -> Self {
        Self { device, ..self }
    }

    /// The model.
    pub fn model(&self) -> &dyn Model {
        self.model.as_ref()
    }

    /// The model of one layer.
    pub fn shallow(&self) -> Option<&dyn Model> {
        self.shallow.as_deref()
    }

    /// The device.
    pub fn device(&self) -> &Device {
        &self.device
    }
}

/// The default settings of `architecture` with small sizes.
pub(super) fn sizes(architecture: &ModelEntry, layers: usize) -> Settings {
    let Value::Object(mut settings) = (architecture.settings.defaults)() else { return Settings::empty() };
    for (key, size) in SIZES.into_iter().chain([(LAYERS, layers)]) {
        if let Some(value) = settings.get_mut(key) {
            *value = size.into();
        }
    }
    settings.into()
}

/// `count` random rows of unequal lengths, each with at least one label.
pub(super) fn rows(model: &dyn Model, name: &str, count: usize) -> Vec<Example> {
    let vocabulary = model.spec().vocab_size as u32;
    let mut generator = Seed::new(SEED).named("rows").named(name).generator();
    let row = |_| {
        let length = generator.random_range(3..9);
        let tokens = (0..length).map(|_| generator.random_range(0..vocabulary)).collect();
        Example { tokens, first_label: generator.random_range(1..length) }
    };
    (0..count).map(row).collect()
}

/// Shuffled batches of `size` of such rows, with a smaller last one.
pub(super) fn stream(model: &dyn Model, name: &str, size: usize) -> Result<Stream> {
    let rows = rows(model, name, 3 * size - 1);
    Stream::new(Arc::new(rows), size, 1, Seed::new(SEED).named(name), PAD)
}

/// The rows of several batches as one batch.
pub(super) fn joined(parts: &[Batch], device: &Device) -> Result<Batch> {
    let (mut rows, mut labels) = (Vec::new(), Vec::new());
    for row in parts.iter().map(Batch::rows).collect::<Result<Vec<_>>>()?.concat() {
        let own = row.positions.to_vec1::<u32>()?.into_iter().zip(row.targets.to_vec1::<u32>()?);
        labels.extend(own.map(|(position, target)| (rows.len(), position as usize, target)));
        rows.push(row.tokens.ids.flatten_all()?.to_vec1::<u32>()?);
    }
    Batch::with_labels(&rows, labels, PAD, device)
}

/// What is trained.
#[derive(Debug, Clone, Copy)]
pub(super) enum Adapted {
    /// The factors of an adapter with this dropout.
    Lora { dropout: f32 },
    /// All parameters.
    Full,
}

/// The models before a stage.
#[derive(Debug)]
pub(super) struct Ancestors {
    base: Weights,
    /// Before alignment there is none.
    aligned: Option<Weights>,
}

impl Ancestry for Ancestors {
    fn base(&self) -> Result<Weights> {
        Ok(self.base.clone())
    }

    fn aligned(&self) -> Result<Weights> {
        self.aligned.clone().ok_or_else(|| Error::run("the model is not aligned yet"))
    }
}

/// Weights at the start of `stage` (after it, for [`Stage::Post`]), under training in full or by an adapter whose factors
/// are both random, and the models that they come from.
pub(super) fn weights(
    model: &dyn Model,
    stage: Stage,
    precision: Precision,
    trained: Adapted,
    device: &Device,
) -> Result<(Weights, Ancestors)> {
    let base = Weights::random(model.params(), Seed::new(SEED).named("base"), precision, device)?;
    if stage == Stage::Align {
        let weights = adapted(base.merged()?, trained, "align")?;
        return Ok((weights, Ancestors { base, aligned: None }));
    }
    let aligned = adapted(base.merged()?, trained, "align")?;
    let weights = adapted(aligned.merged()?, trained, "fine_tune")?;
    Ok((weights, Ancestors { base, aligned: Some(aligned.frozen()) }))
}

/// `weights` as if trained for a while.
pub(super) fn adapted(mut weights: Weights, trained: Adapted, name: &str) -> Result<Weights> {
    let seed = Seed::new(SEED).named(name);
    match trained {
        Adapted::Lora { dropout } => {
            weights
                .train_lora(&LoraConfig { r: 4, alpha: 8., dropout, ..LoraConfig::default() }, seed.named("lora"))?;
            shift(&weights, 0.1, seed)?;
        }
        Adapted::Full => {
            weights.train_full()?;
            shift(&weights, 0.02, seed)?;
        }
    }
    Ok(weights)
}

/// Moves every trained number by normal noise of this standard deviation.
pub(super) fn shift(weights: &Weights, deviation: f64, seed: Seed) -> Result<()> {
    weights.shift(&noise_like(weights, seed)?, deviation)
}

/// Standard normal noise shaped as the trained parameters.
pub(super) fn noise_like(weights: &Weights, seed: Seed) -> Result<crate::Grads> {
    let noise = weights.trainable().iter().map(|(name, var)| {
        Ok((name.clone(), normal(var.dims(), seed.named(name), var.device())?.to_dtype(var.dtype())?))
    });
    noise.collect()
}

/// Standard normal noise, f32.
pub(super) fn normal(dims: &[usize], seed: Seed, device: &Device) -> Result<Tensor> {
    Ok(randn(dims, &mut seed.generator(), device)?.to_dtype(DType::F32)?)
}
