//! The `Model` trait: an architecture, separate from its weights.
//!
//! A model declares its parameters and says how tokens become hidden states and logits. The numbers live in
//! [`Weights`], so one model serves the weights under training, a frozen teacher and a merged copy alike, and LoRA,
//! saving, loading and generation are written once for all architectures.

use std::fmt::Debug;
use std::path::Path;

use candle_core::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::cache::Cache;
use crate::data::Tokens;
use crate::registry::Entry;
use crate::rng::{Generator, dropout_mask};
use crate::sites::Sites;
use crate::weights::{ParamList, Weights};
use crate::{Error, Result, Settings, SettingsType};

/// Sizes that the engine needs to know about a model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ModelSpec {
    /// Rows of the embedding and of the head.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Transformer blocks.
    pub layers: usize,
    /// Key/value heads per block.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// The longest sequence the positions allow.
    pub max_positions: usize,
}

/// An architecture.
///
/// Implementations hold no tensors. They are built from their configuration, which they also write back, so that a
/// saved folder loads in Hugging Face's library.
pub trait Model: Debug + Send + Sync {
    /// The sizes.
    fn spec(&self) -> &ModelSpec;

    /// Every parameter: Hugging Face name, shape and initialisation, in checkpoint order.
    fn params(&self) -> &ParamList;

    /// The `config.json` of this model.
    fn config(&self) -> Value;

    /// The names of the points at which [`Sites`] can act, in order of computation.
    fn sites(&self) -> Vec<String>;

    /// Hidden states after the final norm, `[batch, length, hidden_size]`.
    ///
    /// # Errors
    /// A tensor operation failed.
    fn hidden(&self, tokens: &Tokens, pass: &mut Forward) -> Result<Tensor>;

    /// Logits `[rows, vocab_size]` of hidden states `[rows, hidden_size]`.
    ///
    /// # Errors
    /// A tensor operation failed.
    fn logits(&self, hidden: &Tensor, pass: &mut Forward) -> Result<Tensor>;

    /// Parameters that no loss gradient reaches, each with the reason. Almost always empty.
    fn without_gradient(&self) -> Vec<(String, &'static str)> {
        Vec::new()
    }
}

/// The sites of `model` of one kind, such as `attn_out`, over all layers.
///
/// # Errors
/// The model has no such site: a defense that acts nowhere must not pass for one that does.
pub fn sites_of_kind(model: &dyn Model, kind: &str) -> Result<Vec<String>> {
    let suffix = format!(".{kind}");
    let (found, others): (Vec<_>, Vec<_>) =
        model.sites().into_iter().partition(|site| site.ends_with(&suffix) || site == kind);
    if found.is_empty() {
        return Err(Error::run(format!("the model has no `{kind}` site"))
            .help(format!("sites of this model: {}", others.join(", "))));
    }
    Ok(found)
}

/// What travels along with one forward pass: the weights, the sites, the key/value cache and the dropout generator.
#[derive(Debug)]
pub struct Forward<'a> {
    /// The weights to compute with.
    pub weights: &'a Weights,
    /// The activation points to act on.
    pub sites: &'a mut Sites,
    /// Keys and values of earlier tokens, in generation.
    pub cache: Option<&'a mut Cache>,
    /// The generator of dropout masks, in training.
    pub dropout: Option<Generator>,
}

impl<'a> Forward<'a> {
    /// A pass without cache or dropout.
    pub fn new(weights: &'a Weights, sites: &'a mut Sites) -> Self {
        Self { weights, sites, cache: None, dropout: None }
    }

    /// A dropout mask for the adapter's input `x`, if this pass trains with dropout.
    pub(crate) fn adapter_mask(&mut self, x: &Tensor) -> Result<Option<Tensor>> {
        let p = self.weights.adapter_dropout();
        match &mut self.dropout {
            Some(generator) if p > 0. => {
                Ok(Some(dropout_mask(x.dims(), p, generator, x.device())?.to_dtype(x.dtype())?))
            }
            _ => Ok(None),
        }
    }
}

/// Builds an architecture from its settings (the keys of `config.json`).
pub type BuildModel = fn(&Settings) -> Result<Box<dyn Model>>;

/// Describes a model to the registry.
#[derive(Debug)]
pub struct ModelEntry {
    /// The name in configurations.
    pub name: &'static str,
    /// One line for `titer list`.
    pub summary: &'static str,
    /// The `model_type` values of `config.json` that this model reads.
    pub model_types: &'static [&'static str],
    /// The type of its settings: the sizes of a model built from scratch.
    pub settings: SettingsType,
    /// Changes whenever the computation does.
    pub version: u32,
    /// Builds the model from settings.
    pub build: BuildModel,
    /// Builds the model from a checkpoint's `config.json`.
    pub from_config: fn(&Value, &Path) -> Result<Box<dyn Model>>,
}

inventory::collect!(ModelEntry);

impl Entry for ModelEntry {
    const KIND: &'static str = "model";
    fn name(&self) -> &'static str {
        self.name
    }
    fn summary(&self) -> &'static str {
        self.summary
    }
    fn settings(&self) -> &SettingsType {
        &self.settings
    }
    fn version(&self) -> u32 {
        self.version
    }
}
