//! What a defense sees in a step: passes, streams, clock, generators.

use std::collections::VecDeque;

use candle_core::Tensor;

use super::open_pass::OpenPass;
use crate::data::batch::Batch;
use crate::defense::stage::Clock;
use crate::defense::streams::Streams;
use crate::defense::update::Pass;
use crate::error::{Error, Result};
use crate::model::architecture::Model;
use crate::model::loss::loss_of_hidden;
use crate::model::replay::run_back;
use crate::nn::forward::Forward;
use crate::nn::input_squares::InputSquares;
use crate::nn::sites::Sites;
use crate::rng::{Generator, Seed, randn};
use crate::tensor::dropout::DropoutMasks;
use crate::tensor::grads::Grads;
use crate::tensor::scalar::Scalar;
use crate::tensor::tape::TapeGradients;
use crate::tensor::tokens::Tokens;
use crate::weights::parameters::Weights;

/// What a defense sees in a [`step`](crate::AlignmentDefense::step).
///
/// ```
/// # include!(concat!(env!("CARGO_MANIFEST_DIR"), "/doc/bigram.rs"));
/// # fn main() -> titer_core::Result<()> {
/// use candle_core::{DType, Device};
/// use titer_core::data::Batch;
/// use titer_core::defense::{Clock, StepCx, Streams};
/// use titer_core::rng::Seed;
/// use titer_core::Weights;
/// use titer_core::Sites;
///
/// let model = Bigram::new(8, 4);
/// let mut weights = Weights::random(model.params(), Seed::new(0), DType::F32, &Device::Cpu)?;
/// weights.train_full()?;
/// // One row; position 0 predicts token 5, position 1 token 2.
/// let batch = Batch::with_labels(&[[1, 5]], [(0, 0, 5), (0, 1, 2)], 0, &Device::Cpu)?;
/// let mut streams = Streams::default();
/// let mut cx = StepCx::new(&model, &weights, &mut streams, Seed::new(1), Clock::at(0, 10));
///
/// let here = cx.backward(&batch, Sites::none())?;
/// // Inside `scratch` the weights may be moved; afterwards they are as before.
/// let there = cx.scratch(|moved| {
///     moved.shift(&here.grads, -0.1)?;
///     moved.backward(&batch, Sites::none())
/// })?;
/// assert!(there.loss.value()? < here.loss.value()?);
/// assert_eq!(cx.backward(&batch, Sites::none())?.loss.value()?, here.loss.value()?);
/// assert_eq!(cx.passes(), 3);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct StepCx<'a> {
    pub(super) model: &'a dyn Model,
    pub(super) weights: &'a Weights,
    streams: &'a mut Streams,
    seed: Seed,
    pub(super) clock: Clock,
    checkpointing: bool,
    share: Share,
    pub(super) passes: usize,
    /// The cross-entropies so far.
    pub(super) losses: Vec<Scalar>,
    /// Noise to give out instead of drawing it.
    recorded: VecDeque<Tensor>,
    /// Pieces of the model whose results a defense holds, until a loss of them is differentiated.
    pub(super) open: Vec<OpenPass>,
}

/// What part of an update's micro batches the own batch of a step is.
#[derive(Debug, Clone, Copy)]
struct Share {
    /// Of their labels, by which the loop weighs the step.
    labels: f64,
    /// Of their tokens.
    tokens: f64,
}

impl<'a> StepCx<'a> {
    /// The context of one step; `seed` is the stage's.
    pub fn new(model: &'a dyn Model, weights: &'a Weights, streams: &'a mut Streams, seed: Seed, clock: Clock) -> Self {
        let seed = seed.named("step").at(clock.step).at(clock.micro);
        let (losses, recorded, open) = (Vec::new(), VecDeque::new(), Vec::new());
        let (checkpointing, share, passes) = (false, Share { labels: 1., tokens: 1. }, 0);
        Self { model, weights, streams, seed, clock, checkpointing, share, passes, losses, recorded, open }
    }

    /// Says which micro batches the update consists of; the clock says which of them the step is for. Without this all
    /// terms of a step are weighed alike.
    #[must_use]
    pub fn with_micro_batches(mut self, batches: &[Batch]) -> Self {
        let part = |count: fn(&Batch) -> usize| {
            let all: usize = batches.iter().map(count).sum();
            batches.get(self.clock.micro).map_or(1., |own| count(own) as f64 / all as f64)
        };
        self.share = Share { labels: part(Batch::labels), tokens: part(|batch| batch.tokens.count()) };
        self
    }

    /// Gives out this noise, in order, before any is drawn: how a recorded step is played again.
    #[must_use]
    pub fn with_noise(mut self, recorded: impl IntoIterator<Item = Tensor>) -> Self {
        self.recorded.extend(recorded);
        self
    }

    /// Keeps only the input of each block in the forward pass and runs the block again in the backward pass: the same
    /// numbers, bit for bit, in less memory and a third more time.
    #[must_use]
    pub fn with_checkpointing(mut self, on: bool) -> Self {
        self.checkpointing = on;
        self
    }

    /// The architecture.
    pub fn model(&self) -> &'a dyn Model {
        self.model
    }

    /// The weights under training. They are read here; only the train loop changes them.
    pub fn weights(&self) -> &'a Weights {
        self.weights
    }

    /// Where the stage stands.
    pub fn clock(&self) -> Clock {
        self.clock
    }

    /// Forward passes made so far in this step.
    pub fn passes(&self) -> usize {
        self.passes
    }

    /// The cross-entropy of each pass of this step so far.
    pub fn losses(&self) -> &[Scalar] {
        &self.losses
    }

    /// Standard normal noise of this step for `purpose`, f32: the same after a resume.
    ///
    /// # Errors
    /// A tensor operation failed.
    pub fn noise(&mut self, purpose: &str, dims: &[usize]) -> Result<Tensor> {
        match self.recorded.pop_front() {
            Some(recorded) => Ok(recorded.reshape(dims)?),
            None => randn(dims, &mut self.generator(purpose), self.weights.device()),
        }
    }

    /// This step's generator for `purpose`: the same after a resume, and independent of every other purpose.
    pub fn generator(&self, purpose: &str) -> Generator {
        self.seed.named(purpose).generator()
    }

    /// The next batch of a declared stream.
    ///
    /// # Errors
    /// The stream was not declared.
    pub fn next(&mut self, stream: &str) -> Result<Batch> {
        let device = self.weights.device().clone();
        self.streams.next(stream, &device)
    }

    /// The next batch of a declared stream, and the factor on a term that is a mean over its labels.
    ///
    /// Under gradient accumulation the loop weighs what a step gives by the labels of the stage's own batch. With the
    /// factor the term counts by its own labels instead, so that an update has the term's mean over all batches that the
    /// stream gave it. This holds if the stream gives one batch to each micro batch. Without accumulation it is 1.
    ///
    /// # Errors
    /// The stream was not declared.
    pub fn next_weighed(&mut self, stream: &str) -> Result<(Batch, f64)> {
        let batch = self.next(stream)?;
        // An own batch that is the whole update, or is taken for it, leaves nothing to weigh.
        if self.share.labels == 1. {
            return Ok((batch, 1.));
        }
        let factor = self.streams.share(stream, self.clock)? / self.share.labels;
        Ok((batch, factor))
    }

    /// The factor on a term that is a mean over the tokens of the stage's own batch, as
    /// [`StepCx::next_weighed`] gives it for a stream.
    pub fn token_weight(&self) -> f64 {
        self.share.tokens / self.share.labels
    }

    /// Loss and gradients of `batch` at the current weights.
    ///
    /// # Errors
    /// A requested site does not exist, the loss is not finite, or a tensor operation failed.
    pub fn backward(&mut self, batch: &Batch, sites: Sites) -> Result<Pass> {
        self.pass(self.weights, batch, sites)
    }

    /// Loss and site gradients only: the weights count as constants, so nothing is computed for them.
    ///
    /// # Errors
    /// As [`StepCx::backward`].
    pub fn site_gradients(&mut self, batch: &Batch, sites: Sites) -> Result<Pass> {
        self.pass(&self.weights.frozen(), batch, sites)
    }

    /// What each low-rank factor is multiplied with (the base weight of a layer without adapter), squared and summed
    /// over the tokens of all rows: `[in]` by the parameter's name. Nothing is trained, and no dropout.
    ///
    /// # Errors
    /// A tensor operation failed.
    pub fn input_squares(&mut self, tokens: &Tokens) -> Result<Grads> {
        let (frozen, mut idle) = (self.weights.frozen(), Sites::none());
        let mut squares = InputSquares::default();
        let mut pass = Forward { input_squares: Some(&mut squares), ..Forward::new(&frozen, &mut idle) };
        self.model.hidden(tokens, &mut pass)?;
        self.passes += 1;
        Ok(squares.sums.into_iter().collect())
    }

    /// A pass of this step over `weights`. All passes of a step see one dropout mask: a perturbation is found and
    /// applied in the same network.
    pub(super) fn forward<'p>(&self, weights: &'p Weights, sites: &'p mut Sites) -> Forward<'p> {
        let dropout = Some(DropoutMasks::new(self.seed.named("dropout")));
        Forward { dropout, checkpointing: self.checkpointing, ..Forward::new(weights, sites) }
    }

    fn pass(&mut self, weights: &Weights, batch: &Batch, mut sites: Sites) -> Result<Pass> {
        let mut pass = self.forward(weights, &mut sites);
        let hidden = self.model.hidden(&batch.tokens, &mut pass)?;
        let loss = loss_of_hidden(self.model, &hidden, batch, &mut pass)?;
        let (blocks, tape) = (pass.context(), pass.tape);
        self.passes += 1;
        sites.check_visited()?;
        let value = Scalar::of(loss.tensor())?;
        self.losses.push(value.clone());
        if let Scalar::Host(value) = value
            && !value.is_finite()
        {
            return Err(Error::run(format!("the loss is not finite: {value}"))
                .at("step", self.clock.step.to_string())
                .help(Error::DIVERGED));
        }
        let observed = sites.observed().iter().map(|(name, value)| (name.clone(), value.tensor().clone())).collect();
        let one = loss.tensor().ones_like()?;
        let found = run_back(self.model, tape, &blocks, vec![(loss, one)])?;
        let (grads, site_grads) = named(weights, found);
        Ok(Pass { loss: value, grads, site_grads, observed })
    }
}

/// The gradients by the names of the trained parameters, and those of the sites.
pub(super) fn named(weights: &Weights, mut found: TapeGradients) -> (Grads, Grads) {
    let trained = weights.trainable().iter();
    let grads = trained.filter_map(|(name, var)| Some((name.clone(), found.take(var.as_tensor())?))).collect();
    (grads, found.into_probes())
}
