//! Losses of a defense's own: pieces of the model as operations of a candle expression.

use std::collections::BTreeMap;

use candle_core::Tensor;

use super::open_pass::OpenPass;
use super::step_context::{StepCx, named};
use crate::data::batch::Batch;
use crate::error::{Error, Result};
use crate::model::loss::loss_of_hidden;
use crate::model::replay::run_back;
use crate::nn::forward::Forward;
use crate::nn::sites::Sites;
use crate::tensor::bridge::{Piece, backward_from, gradient};
use crate::tensor::grads::Grads;
use crate::tensor::scalar::Scalar;
use crate::tensor::tape::Traced;
use crate::tensor::tokens::Tokens;
use crate::weights::parameters::Weights;

impl StepCx<'_> {
    /// Hidden states `[tokens, hidden_size]` for a loss of one's own, to be differentiated by
    /// [`StepCx::backward_loss`]. Activations that `sites` observes come along.
    ///
    /// # Errors
    /// A tensor operation failed.
    pub fn hidden(&mut self, tokens: &Tokens, sites: Sites) -> Result<(Tensor, BTreeMap<String, Tensor>)> {
        self.hidden_with(self.weights, tokens, sites)
    }

    /// The same with other weights, such as a frozen teacher's.
    ///
    /// # Errors
    /// A tensor operation failed.
    pub fn hidden_with(
        &mut self,
        weights: &Weights,
        tokens: &Tokens,
        mut sites: Sites,
    ) -> Result<(Tensor, BTreeMap<String, Tensor>)> {
        let mut pass = self.forward(weights, &mut sites);
        let hidden = self.model.hidden(tokens, &mut pass)?;
        let mut open = OpenPass { blocks: pass.context(), piece: Piece::new(pass.tape, None) };
        self.passes += 1;
        sites.check_visited()?;
        let observed = sites.observed().iter().map(|(name, value)| Ok((name.clone(), open.piece.lend(value)?)));
        let observed = observed.collect::<Result<_>>()?;
        let hidden = open.piece.lend(&hidden)?;
        self.keep(open);
        Ok((hidden, observed))
    }

    /// The model's final norm of `x`, `[tokens, hidden_size]`, as an operation of a candle expression: what makes
    /// hidden states of the residual stream after any block.
    ///
    /// # Errors
    /// A tensor operation failed.
    pub fn final_norm(&mut self, x: &Tensor) -> Result<Tensor> {
        let model = self.model;
        self.apply(self.weights, x, |x, pass| model.final_norm(x, pass))
    }

    /// Logits `[rows, vocab_size]` of hidden states `[rows, hidden_size]`, as an operation of a candle expression.
    ///
    /// # Errors
    /// A tensor operation failed.
    pub fn logits(&mut self, hidden: &Tensor) -> Result<Tensor> {
        self.logits_with(self.weights, hidden)
    }

    /// The same with other weights, such as a frozen teacher's.
    ///
    /// # Errors
    /// A tensor operation failed.
    pub fn logits_with(&mut self, weights: &Weights, hidden: &Tensor) -> Result<Tensor> {
        let model = self.model;
        self.apply(weights, hidden, |hidden, pass| model.logits(hidden, pass))
    }

    /// The mean cross-entropy over the labels of `batch`, given the hidden states of its tokens, as an operation of a
    /// candle expression.
    ///
    /// # Errors
    /// A tensor operation failed.
    pub fn cross_entropy(&mut self, hidden: &Tensor, batch: &Batch) -> Result<Tensor> {
        let model = self.model;
        let loss = self.apply(self.weights, hidden, |hidden, pass| loss_of_hidden(model, hidden, batch, pass))?;
        self.losses.push(Scalar::of(&loss)?);
        Ok(loss)
    }

    /// Runs a piece of the model on a candle tensor.
    fn apply(
        &mut self,
        weights: &Weights,
        input: &Tensor,
        piece: impl FnOnce(&Traced, &mut Forward) -> Result<Traced>,
    ) -> Result<Tensor> {
        let mut idle = Sites::none();
        let mut pass = self.forward(weights, &mut idle);
        let tracked = input.track_op();
        let x = if tracked { pass.tape.source(input) } else { Traced::constant(input.clone()) };
        let result = piece(&x, &mut pass)?;
        let input = tracked.then(|| input.clone());
        let mut open = OpenPass { blocks: pass.context(), piece: Piece::new(pass.tape, input) };
        let result = open.piece.lend(&result)?;
        self.keep(open);
        Ok(result)
    }

    /// Remembers a piece of the model if any gradient can come back to it.
    fn keep(&mut self, open: OpenPass) {
        if open.piece.is_differentiable() {
            self.open.push(open);
        }
    }

    /// The gradients of a loss of one's own with respect to the trained parameters. The passes that the loss was made
    /// of are used up.
    ///
    /// # Errors
    /// The loss depends on no pass and no trained parameter, or a tensor operation failed.
    pub fn backward_loss(&mut self, loss: &Tensor) -> Result<Grads> {
        let mut stores = vec![loss.backward()?];
        let mut grads = Grads::default();
        // A piece was made of the results of earlier ones, so the last goes first.
        for pass in std::mem::take(&mut self.open).into_iter().rev() {
            let seeds = pass.piece.seeds(&stores)?;
            if seeds.is_empty() {
                self.open.push(pass);
                continue;
            }
            let (tape, input) = pass.piece.into_parts();
            let mut found = run_back(self.model, tape, &pass.blocks, seeds)?;
            if let Some(input) = input
                && let Some(gradient) = found.take(&input)
            {
                stores.push(backward_from(&input, &gradient)?);
            }
            grads = grads.add_scaled(1., &named(self.weights, found).0)?;
        }
        self.open.reverse();
        for (name, var) in self.weights.trainable() {
            if let Some(direct) = gradient(&stores, var)? {
                grads = grads.add_scaled(1., &Grads::from_iter([(name.clone(), direct)]))?;
            }
        }
        if !grads.is_empty() {
            return Ok(grads);
        }
        Err(Error::run("the loss depends on no pass of this step and on no parameter under training")
            .help("compute it from `cx.hidden`, and differentiate each pass once"))
    }
}
