//! The verbs a defense works with: passes, scratch weights, streams, clock, generators.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};

use crate::data::{Batch, Stream, Tokens};
use crate::grads::Grads;
use crate::model::{Forward, Model};
use crate::ops;
use crate::rng::{Generator, Seed};
use crate::sites::Sites;
use crate::weights::Weights;
use crate::{Error, Result};

/// Where a stage stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Clock {
    /// Updates applied so far in this stage.
    pub step: usize,
    /// Updates this stage will apply in all.
    pub total: usize,
    /// Index of the micro batch within the update, under gradient accumulation.
    pub micro: usize,
}

/// The extra data streams of a defense, by name.
#[derive(Debug, Default)]
pub struct Streams(BTreeMap<String, Stream>);

impl Streams {
    /// Adds a stream.
    pub fn insert(&mut self, name: impl Into<String>, stream: Stream) {
        self.0.insert(name.into(), stream);
    }

    /// How many batches each stream has given: the state an exact resume needs.
    pub fn drawn(&self) -> BTreeMap<String, usize> {
        self.0.iter().map(|(name, stream)| (name.clone(), stream.drawn())).collect()
    }

    /// Goes on where [`Streams::drawn`] was taken.
    pub fn seek(&mut self, drawn: &BTreeMap<String, usize>) {
        for (name, stream) in &mut self.0 {
            stream.seek(drawn.get(name).copied().unwrap_or(0));
        }
    }

    /// The next batch of the stream `name`.
    ///
    /// # Errors
    /// The defense did not declare such a stream.
    pub fn next(&mut self, name: &str, device: &Device) -> Result<Batch> {
        let known: Vec<String> = self.0.keys().cloned().collect();
        let stream = self.0.get_mut(name).ok_or_else(|| {
            Error::run(format!("the defense did not declare the stream `{name}`"))
                .help(format!("declared streams: {}", known.join(", ")))
        })?;
        stream.next_batch(device)
    }
}

/// What one forward-and-backward pass gave.
#[derive(Debug)]
pub struct Pass {
    /// The mean cross-entropy over the batch's labels, in nats.
    pub loss: f64,
    /// The gradient of each trained parameter that the loss reaches.
    pub grads: Grads,
    /// The gradient at each probed site.
    pub site_grads: Grads,
    /// The activation of each observed site.
    pub observed: BTreeMap<String, Tensor>,
}

/// What a step asks the train loop to apply.
#[derive(Debug)]
pub struct Update {
    /// The gradients for the optimiser. A parameter that is absent is left alone: no decay, no moment update.
    pub grads: Grads,
    /// The loss to log.
    pub loss: f64,
    /// Further numbers to log, by name.
    pub scalars: BTreeMap<&'static str, f64>,
}

impl Update {
    /// An update without further numbers.
    pub fn new(grads: Grads, loss: f64) -> Self {
        Self { grads, loss, scalars: BTreeMap::new() }
    }

    /// Adds a number to log.
    #[must_use]
    pub fn with(mut self, name: &'static str, value: f64) -> Self {
        self.scalars.insert(name, value);
        self
    }
}

impl From<Pass> for Update {
    fn from(pass: Pass) -> Self {
        Self::new(pass.grads, pass.loss)
    }
}

/// What a defense sees in [`begin`](crate::AlignmentDefense::begin) and
/// [`finish`](crate::AlignmentDefense::finish): the weights may be changed here.
#[derive(Debug)]
pub struct StageCx<'a> {
    /// The architecture.
    pub model: &'a dyn Model,
    /// The weights under training.
    pub weights: &'a mut Weights,
    /// The declared streams.
    pub streams: &'a mut Streams,
    /// The stage's seed.
    pub seed: Seed,
    /// Where the stage stands.
    pub clock: Clock,
}

impl StageCx<'_> {
    /// The verbs of a step, for passes outside the loop.
    pub fn step(&mut self) -> StepCx<'_> {
        StepCx::new(self.model, self.weights, self.streams, self.seed.named("stage"), self.clock)
    }
}

/// What a defense sees in a [`step`](crate::AlignmentDefense::step).
#[derive(Debug)]
pub struct StepCx<'a> {
    model: &'a dyn Model,
    weights: &'a Weights,
    streams: &'a mut Streams,
    seed: Seed,
    clock: Clock,
    passes: usize,
}

impl<'a> StepCx<'a> {
    /// The context of one step; `seed` is the stage's.
    pub fn new(model: &'a dyn Model, weights: &'a Weights, streams: &'a mut Streams, seed: Seed, clock: Clock) -> Self {
        let seed = seed.named("step").at(clock.step).at(clock.micro);
        Self { model, weights, streams, seed, clock, passes: 0 }
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

    /// Hidden states `[batch, length, hidden_size]`, attached to the graph, for a loss of one's own.
    ///
    /// # Errors
    /// A tensor operation failed.
    pub fn hidden(&mut self, tokens: &Tokens, sites: &mut Sites) -> Result<Tensor> {
        self.hidden_with(self.weights, tokens, sites)
    }

    /// The same with other weights, such as a frozen teacher's.
    ///
    /// # Errors
    /// A tensor operation failed.
    pub fn hidden_with(&mut self, weights: &Weights, tokens: &Tokens, sites: &mut Sites) -> Result<Tensor> {
        // All passes of a step see one dropout mask: a perturbation is found and applied in the same network.
        let dropout = self.seed.named("dropout").generator();
        self.passes += 1;
        let mut pass = Forward { dropout: Some(dropout), ..Forward::new(weights, sites) };
        let hidden = self.model.hidden(tokens, &mut pass)?;
        sites.check_visited()?;
        Ok(hidden)
    }

    /// The mean cross-entropy over the labels of `batch`, as a tensor, given the hidden states of its tokens.
    ///
    /// # Errors
    /// A tensor operation failed.
    pub fn cross_entropy(&self, weights: &Weights, hidden: &Tensor, batch: &Batch) -> Result<Tensor> {
        label_loss(self.model, weights, hidden, batch)
    }

    /// The gradients of a loss of one's own with respect to the trained parameters.
    ///
    /// # Errors
    /// A tensor operation failed.
    pub fn backward_loss(&self, loss: &Tensor) -> Result<Grads> {
        let store = loss.backward()?;
        let vars = self.weights.trainable().iter();
        Ok(vars.filter_map(|(name, var)| Some((name.clone(), store.get(var)?.clone()))).collect())
    }

    /// Runs `work` with weights that it may move; afterwards they are as before, bit for bit, also after an error or
    /// a panic.
    ///
    /// # Errors
    /// What `work` returned.
    pub fn scratch<T>(&mut self, work: impl FnOnce(&mut Scratch<'_, 'a>) -> Result<T>) -> Result<T> {
        let mut scratch = Scratch { before: self.weights.snapshot()?, cx: self };
        work(&mut scratch)
    }

    fn pass(&mut self, weights: &Weights, batch: &Batch, mut sites: Sites) -> Result<Pass> {
        let hidden = self.hidden_with(weights, &batch.tokens, &mut sites)?;
        let loss = label_loss(self.model, weights, &hidden, batch)?;
        let value = loss.to_dtype(DType::F64)?.to_scalar::<f64>()?;
        if !value.is_finite() {
            return Err(Error::run(format!("the loss is not finite: {value}"))
                .at("step", self.clock.step.to_string())
                .help("lower the learning rate or the perturbation"));
        }
        let store = loss.backward()?;
        let pick = |vars: &BTreeMap<String, candle_core::Var>| -> Grads {
            vars.iter().filter_map(|(name, var)| Some((name.clone(), store.get(var)?.clone()))).collect()
        };
        let (grads, site_grads) = (pick(weights.trainable()), pick(sites.probes()));
        Ok(Pass { loss: value, grads, site_grads, observed: sites.into_observed() })
    }
}

/// Weights that may be moved for a while, inside [`StepCx::scratch`].
#[derive(Debug)]
pub struct Scratch<'s, 'a> {
    cx: &'s mut StepCx<'a>,
    before: Grads,
}

impl Scratch<'_, '_> {
    /// Moves the weights by `scale * direction`.
    ///
    /// # Errors
    /// The direction names a parameter that is not under training.
    pub fn shift(&mut self, direction: &Grads, scale: f64) -> Result<()> {
        self.cx.weights.shift(direction, scale)
    }

    /// Loss and gradients at the moved weights.
    ///
    /// # Errors
    /// As [`StepCx::backward`].
    pub fn backward(&mut self, batch: &Batch, sites: Sites) -> Result<Pass> {
        self.cx.backward(batch, sites)
    }

    /// The next batch of a declared stream.
    ///
    /// # Errors
    /// The stream was not declared.
    pub fn next(&mut self, stream: &str) -> Result<Batch> {
        self.cx.next(stream)
    }
}

impl Drop for Scratch<'_, '_> {
    fn drop(&mut self) {
        // The snapshot has the names and shapes of the very weights it goes back to.
        if let Err(error) = self.cx.weights.set(&self.before) {
            tracing::error!(%error, "scratch weights could not be restored");
        }
    }
}

/// The mean cross-entropy over the labels of `batch`. Logits are computed at the label positions only.
///
/// # Errors
/// A tensor operation failed.
pub fn label_loss(model: &dyn Model, weights: &Weights, hidden: &Tensor, batch: &Batch) -> Result<Tensor> {
    let rows = hidden.flatten(0, 1)?.index_select(&batch.positions, 0)?;
    let mut idle = Sites::none();
    let logits = model.logits(&rows, &mut Forward::new(weights, &mut idle))?;
    ops::cross_entropy(&logits, &batch.targets)
}
