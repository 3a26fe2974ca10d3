//! The `Model` trait: an architecture, separate from its weights.
//!
//! A model declares its parameters and says how tokens become hidden states and logits. The numbers live in
//! [`Weights`](crate::Weights), so one model serves the weights under training, a frozen teacher and a merged copy alike,
//! and LoRA, saving, loading and generation are written once for all architectures.

use std::fmt::Debug;

use serde_json::Value;

use crate::error::{Error, Result};
use crate::nn::forward::Forward;
use crate::nn::spec::ModelSpec;
use crate::tensor::tape::Traced;
use crate::tensor::tokens::Tokens;
use crate::weights::schema::{ParamId, ParamList};

/// An architecture.
///
/// Implementations hold no tensors. They are built from their configuration, which they also write back, so that a
/// saved folder loads in Hugging Face's library.
///
/// The smallest one:
///
/// ```
#[doc = include_str!("../../doc/bigram.rs")]
/// ```
pub trait Model: Debug + Send + Sync {
    /// The sizes.
    fn spec(&self) -> &ModelSpec;

    /// Every parameter: Hugging Face name, shape and initialisation, in checkpoint order.
    fn params(&self) -> &ParamList;

    /// The `config.json` of this model.
    fn config(&self) -> Value;

    /// The names of the points at which [`Sites`](crate::Sites) can act, in order of computation.
    fn sites(&self) -> Vec<String>;

    /// Token ids to the residual stream, `[tokens, hidden_size]`. What every block needs of the tokens (their
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
    fn final_norm(&self, x: &Traced, pass: &mut Forward) -> Result<Traced>;

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

    /// Hidden states `[tokens, hidden_size]`.
    ///
    /// # Errors
    /// A tensor operation failed.
    fn hidden(&self, tokens: &Tokens, pass: &mut Forward) -> Result<Traced> {
        check_id("token", tokens.largest, self.spec().vocab_size)?;
        pass.begin(tokens)?;
        let mut x = self.embed(tokens, pass)?;
        for index in 0..self.spec().layers {
            x = pass.run_block(index, &x, |x, pass| self.block(index, x, pass))?;
        }
        if let Some(cache) = pass.cache.as_deref_mut() {
            cache.advance(&tokens.real);
        }
        self.final_norm(&x, pass)
    }

    /// Parameters that no loss gradient reaches, each with the reason. Almost always empty.
    fn without_gradient(&self) -> Vec<(String, &'static str)> {
        Vec::new()
    }
}

/// Fails on an id outside the vocabulary, before anything reads by it.
pub(crate) fn check_id(what: &str, id: u32, vocabulary: usize) -> Result<()> {
    if (id as usize) < vocabulary {
        return Ok(());
    }
    Err(Error::data(format!("the {what} {id} lies outside of the model's vocabulary of {vocabulary}"))
        .help("the tokenizer is another model's: use the one of this checkpoint"))
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
