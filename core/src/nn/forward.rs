//! What travels along with one forward pass.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{DType, Tensor};

use super::input_squares::InputSquares;
use crate::error::{Error, Result};
use crate::nn::cache::Cache;
use crate::nn::sites::Sites;
use crate::tensor::dropout::{Dropout, DropoutMasks};
use crate::tensor::mask::AttentionMask;
use crate::tensor::matrix::Matrix;
use crate::tensor::ops::{LowRank, Rotation};
use crate::tensor::tape::{Replay, Tape, Traced};
use crate::tensor::tokens::Tokens;
use crate::weights::parameters::Weights;
use crate::weights::schema::ParamId;

/// What travels along with one forward pass: the weights, the tape, the sites, the key/value cache and the dropout
/// masks.
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
    /// The dropout masks, in training.
    pub dropout: Option<DropoutMasks>,
    /// Whether blocks keep only their input and are run again in the backward pass.
    pub checkpointing: bool,
    /// The angles of the tokens' rotary positions, for each table of frequencies that the model has.
    pub rotations: Vec<Rotation>,
    /// Where linear layers note their inputs.
    pub(crate) input_squares: Option<&'a mut InputSquares>,
    pub(crate) mask: Option<AttentionMask>,
    /// The adapters' factors in the type that is computed in, where that is not their own; made when first asked for.
    pub(crate) factors: Option<Factors>,
}

/// The factors `A` and `B` of the adapters, by the weight they adapt.
pub(crate) type Factors = Arc<BTreeMap<ParamId, [Tensor; 2]>>;

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
            rotations: Vec::new(),
            input_squares: None,
            mask: None,
            factors: None,
        }
    }

    /// Which earlier tokens each token of this pass sees.
    ///
    /// # Errors
    /// The pass has not begun.
    pub fn mask(&self) -> Result<&AttentionMask> {
        self.mask.as_ref().ok_or_else(|| Error::run("the pass has not begun: call `Model::hidden`"))
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
            low @ Matrix::LowPrecision(_) if self.cache.is_some() => Traced::constant(low.for_answers()),
            low @ Matrix::LowPrecision(_) => Traced::constant(low.clone()),
        }
    }

    pub(crate) fn begin(&mut self, tokens: &Tokens) -> Result<()> {
        self.mask = Some(match &self.cache {
            Some(cache) => AttentionMask::after(tokens, &cache.starts(), cache.rows(), cache.slots())?,
            None => AttentionMask::new(tokens)?,
        });
        Ok(())
    }

    pub(crate) fn run_block(
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
            rotations: self.rotations.clone(),
            mask: self.mask.clone(),
            factors: self.factors.clone(),
        }
    }

    /// The adapter of a linear layer on inputs of type `dtype`, if it has one.
    ///
    /// # Errors
    /// A tensor operation failed.
    pub(crate) fn low_rank(&mut self, weight: ParamId, dtype: DType) -> Result<Option<LowRank>> {
        let Some((adapter, scale)) = self.weights.adapter(weight) else { return Ok(None) };
        let (mut a, mut b) = (self.tape.parameter(&adapter.a), self.tape.parameter(&adapter.b));
        if dtype == DType::BF16 && !adapter.a.device().is_cpu() {
            if self.factors.is_none() {
                self.factors = Some(self.weights.adapters_in_bf16()?.into());
            }
            if let Some([cast_a, cast_b]) = self.factors.as_ref().and_then(|factors| factors.get(&weight)) {
                (a, b) = (a.with_tensor(cast_a.clone()), b.with_tensor(cast_b.clone()));
            }
        }
        Ok(Some(LowRank { a, b, scale, mask: self.adapter_mask() }))
    }

    /// The dropout mask of the next adapter's input, if this pass trains with dropout.
    fn adapter_mask(&mut self) -> Option<Dropout> {
        let p = self.weights.adapter_dropout();
        self.dropout.as_mut().filter(|_| p > 0.).map(|masks| masks.next_layer(p))
    }
}

/// What all blocks of one pass share.
#[derive(Debug)]
pub(crate) struct BlockContext {
    /// A view of the pass's own weights, which need not be those under training.
    weights: Weights,
    sites: Sites,
    rotations: Vec<Rotation>,
    mask: Option<AttentionMask>,
    factors: Option<Factors>,
}

impl BlockContext {
    /// Another pass over the same weights and the same shared inputs, from the dropout mask given on.
    pub(crate) fn pass<'a>(&'a self, sites: &'a mut Sites, dropout: Option<DropoutMasks>) -> Forward<'a> {
        Forward {
            dropout,
            rotations: self.rotations.clone(),
            mask: self.mask.clone(),
            factors: self.factors.clone(),
            ..Forward::new(&self.weights, sites)
        }
    }

    /// What such a pass does at each site.
    pub(crate) fn sites(&self) -> Sites {
        self.sites.again()
    }
}
