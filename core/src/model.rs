//! The `Model` trait: an architecture, separate from its weights.
//!
//! A model declares its parameters and says how tokens become hidden states and logits. The numbers live in
//! [`Weights`], so one model serves the weights under training, a frozen teacher and a merged copy alike, and LoRA,
//! saving, loading and generation are written once for all architectures.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::path::Path;

use candle_core::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::cache::Cache;
use crate::data::Tokens;
use crate::matrix::Matrix;
use crate::ops::{Rotation, Visibility};
use crate::registry::Entry;
use crate::rng::{Generator, dropout_mask};
use crate::sites::Sites;
use crate::tape::{Gradients, Replay, Tape, Traced};
use crate::weights::{ParamId, ParamList, Weights};
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

    /// Token ids to the residual stream, `[batch, length, hidden_size]`. What every block needs of the tokens (their
    /// positions, say) is put into `pass` here.
    ///
    /// # Errors
    /// A tensor operation failed.
    fn embed(&self, tokens: &Tokens, pass: &mut Forward) -> Result<Traced>;

    /// The residual stream through block `index`.
    ///
    /// # Errors
    /// A tensor operation failed.
    fn block(&self, index: usize, x: &Traced, pass: &mut Forward) -> Result<Traced>;

    /// The residual stream after the last block to hidden states: the final norm.
    ///
    /// # Errors
    /// A tensor operation failed.
    fn finish(&self, x: &Traced, pass: &mut Forward) -> Result<Traced>;

    /// Logits `[rows, vocab_size]` of hidden states `[rows, hidden_size]`. All have to be finite: a model with one that is not
    /// gives no answer.
    ///
    /// # Errors
    /// A tensor operation failed.
    fn logits(&self, hidden: &Traced, pass: &mut Forward) -> Result<Traced>;

    /// The matrix `[vocab_size, hidden_size]` of a head that computes `H Wᵀ` and nothing else: its loss is then taken
    /// without a tensor of all logits.
    fn head(&self) -> Option<ParamId> {
        None
    }

    /// Hidden states `[batch, length, hidden_size]`.
    ///
    /// # Errors
    /// A tensor operation failed.
    fn hidden(&self, tokens: &Tokens, pass: &mut Forward) -> Result<Traced> {
        pass.begin(tokens)?;
        let mut x = self.embed(tokens, pass)?;
        for index in 0..self.spec().layers {
            x = pass.run_block(index, &x, |x, pass| self.block(index, x, pass))?;
        }
        if let Some(cache) = pass.cache.as_deref_mut() {
            cache.advance(&tokens.lengths);
        }
        self.finish(&x, pass)
    }

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

/// What travels along with one forward pass: the weights, the tape, the sites, the key/value cache and the dropout
/// generator.
#[derive(Debug)]
pub struct Forward<'a> {
    /// The weights to compute with.
    pub weights: &'a Weights,
    /// The activation points to act on.
    pub sites: &'a mut Sites,
    /// The record that the backward pass runs over.
    pub tape: Tape,
    /// Keys and values of earlier tokens, in generation.
    pub cache: Option<&'a mut Cache>,
    /// The generator of dropout masks, in training.
    pub dropout: Option<Generator>,
    /// Whether blocks keep only their input and are run again in the backward pass.
    pub checkpointing: bool,
    /// The angles of the tokens' rotary positions, where the model has such.
    pub rotation: Option<Rotation>,
    /// Where linear layers note their inputs.
    pub(crate) input_squares: Option<&'a mut InputSquares>,
    pub(crate) visibility: Option<Visibility>,
}

impl<'a> Forward<'a> {
    /// A pass without cache or dropout.
    pub fn new(weights: &'a Weights, sites: &'a mut Sites) -> Self {
        Self {
            weights,
            sites,
            tape: Tape::default(),
            cache: None,
            dropout: None,
            checkpointing: false,
            rotation: None,
            input_squares: None,
            visibility: None,
        }
    }

    /// Which earlier tokens each token of this pass sees.
    ///
    /// # Errors
    /// The pass has not begun.
    pub fn visibility(&self) -> Result<&Visibility> {
        self.visibility.as_ref().ok_or_else(|| Error::run("the pass has not begun: call `Model::hidden`"))
    }

    /// A parameter's value in full: tracked if it is under training.
    ///
    /// # Errors
    /// The device failed.
    pub fn parameter(&mut self, id: ParamId) -> Result<Traced> {
        Ok(self.tape.parameter(&self.weights.get(id).dense()?))
    }

    /// A matrix as it is stored, for a product: tracked if it is under training.
    pub fn matrix(&mut self, id: ParamId) -> Traced<Matrix> {
        match self.weights.get(id) {
            Matrix::Dense(tensor) => (&self.tape.parameter(tensor)).into(),
            packed @ Matrix::Packed(_) => Traced::constant(packed.clone()),
        }
    }

    fn begin(&mut self, tokens: &Tokens) -> Result<()> {
        self.visibility = Some(match &self.cache {
            Some(cache) => Visibility::after(tokens, &cache.starts(), cache.rows())?,
            None => Visibility::new(tokens)?,
        });
        Ok(())
    }

    fn run_block(
        &mut self,
        index: usize,
        x: &Traced,
        block: impl FnOnce(&Traced, &mut Self) -> Result<Traced>,
    ) -> Result<Traced> {
        // A pass that differentiates nothing, such as a teacher's, keeps nothing either way.
        let differentiates = x.tracked() || self.sites.probes() || !self.weights.trainable().is_empty();
        if !self.checkpointing || !differentiates {
            return block(x, self);
        }
        if self.sites.observes() {
            return Err(Error::run("activations cannot be observed under gradient checkpointing")
                .help("leave `checkpointing` out for this defense"));
        }
        let replay = Replay { index, input: x.tensor().clone(), dropout: self.dropout.clone() };
        let tape = std::mem::replace(&mut self.tape, Tape::off());
        let result = block(&Traced::constant(x.tensor().clone()), self);
        self.tape = tape;
        Ok(self.tape.record_block(result?.tensor().clone(), x, replay))
    }

    /// What a block needs to run again: the weights and its shared inputs, without the tape.
    pub(crate) fn context(&self) -> BlockContext {
        BlockContext {
            weights: self.weights.clone(),
            sites: self.sites.again(),
            rotation: self.rotation.clone(),
            visibility: self.visibility.clone(),
        }
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

/// Sums of squares of what parameters are multiplied with.
#[derive(Debug)]
pub(crate) struct InputSquares {
    /// One at real tokens, `[batch, length, 1]`.
    mask: Tensor,
    /// `[in]` by the parameter's name.
    pub sums: BTreeMap<String, Tensor>,
}

impl InputSquares {
    pub(crate) fn new(tokens: &Tokens) -> Result<Self> {
        Ok(Self { mask: tokens.mask()?, sums: BTreeMap::new() })
    }

    /// Notes the input `x` `[batch, length, in]` of the parameter `name`.
    pub(crate) fn note(&mut self, name: String, x: &Tensor) -> Result<()> {
        let squares = x.sqr()?.broadcast_mul(&self.mask.to_dtype(x.dtype())?)?.sum((0, 1))?;
        let sum = match self.sums.remove(&name) {
            Some(sum) => (sum + squares)?,
            None => squares,
        };
        self.sums.insert(name, sum);
        Ok(())
    }
}

/// What all blocks of one pass share.
#[derive(Debug)]
pub(crate) struct BlockContext {
    /// A view of the pass's own weights, which need not be those under training.
    weights: Weights,
    sites: Sites,
    rotation: Option<Rotation>,
    visibility: Option<Visibility>,
}

impl BlockContext {
    /// Runs a block again and then backwards.
    pub(crate) fn replay(&self, model: &dyn Model, replay: &Replay, gradient: Tensor) -> Result<Gradients> {
        let mut sites = self.sites.again();
        let mut pass = Forward {
            dropout: replay.dropout.clone(),
            rotation: self.rotation.clone(),
            visibility: self.visibility.clone(),
            ..Forward::new(&self.weights, &mut sites)
        };
        let x = pass.tape.source(&replay.input);
        let y = model.block(replay.index, &x, &mut pass)?;
        pass.tape.backward(vec![(y, gradient)])
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
