//! The verbs a defense works with: passes, scratch weights, streams, clock, generators.

use std::collections::BTreeMap;

use candle_core::{Device, Tensor, Var};

use crate::data::{Batch, Stream, Tokens};
use crate::grads::Grads;
use crate::matrix::Matrix;
use crate::model::{BlockContext, Forward, Model};
use crate::ops;
use crate::rng::{Generator, Seed};
use crate::sites::Sites;
use crate::tape::{Gradients, Tape, Traced};
use crate::weights::Weights;
use crate::{Error, Result, Scalar};

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
    pub loss: Scalar,
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
    pub loss: Scalar,
    /// Further numbers to log, by name.
    pub scalars: BTreeMap<&'static str, Scalar>,
}

impl Update {
    /// An update without further numbers.
    pub fn new(grads: Grads, loss: impl Into<Scalar>) -> Self {
        Self { grads, loss: loss.into(), scalars: BTreeMap::new() }
    }

    /// Adds a number to log.
    #[must_use]
    pub fn with(mut self, name: &'static str, value: impl Into<Scalar>) -> Self {
        self.scalars.insert(name, value.into());
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
    checkpointing: bool,
    passes: usize,
    /// Passes whose activations a defense holds, until a loss of them is differentiated.
    open: Vec<OpenPass>,
}

/// A forward pass whose backward pass waits for the gradients of some of its values.
#[derive(Debug)]
struct OpenPass {
    tape: Tape,
    blocks: BlockContext,
    /// Values that a defense holds as variables of a candle expression.
    lent: Vec<(Var, Traced)>,
}

impl<'a> StepCx<'a> {
    /// The context of one step; `seed` is the stage's.
    pub fn new(model: &'a dyn Model, weights: &'a Weights, streams: &'a mut Streams, seed: Seed, clock: Clock) -> Self {
        let seed = seed.named("step").at(clock.step).at(clock.micro);
        Self { model, weights, streams, seed, clock, checkpointing: false, passes: 0, open: Vec::new() }
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

    /// Hidden states `[batch, length, hidden_size]` for a loss of one's own, to be differentiated by
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
        let (blocks, tape) = (pass.context(), pass.tape);
        self.passes += 1;
        sites.check_visited()?;
        let mut lent = Vec::new();
        let mut lend = |value: &Traced| -> Result<Tensor> {
            if !value.tracked() {
                return Ok(value.tensor().clone());
            }
            let variable = Var::from_tensor(value.tensor())?;
            let tensor = variable.as_tensor().clone();
            lent.push((variable, value.clone()));
            Ok(tensor)
        };
        let observed = sites.observed().iter().map(|(name, value)| Ok((name.clone(), lend(value)?)));
        let observed = observed.collect::<Result<_>>()?;
        let hidden = lend(&hidden)?;
        self.open.push(OpenPass { tape, blocks, lent });
        Ok((hidden, observed))
    }

    /// The mean cross-entropy over the labels of `batch`, as a candle tensor, given the hidden states of its tokens.
    ///
    /// # Errors
    /// A tensor operation failed.
    pub fn cross_entropy(&self, weights: &Weights, hidden: &Tensor, batch: &Batch) -> Result<Tensor> {
        let head = self.model.head().filter(|&head| weights.adapter(head).is_none());
        let head = head.ok_or_else(|| {
            Error::run("the cross-entropy over a head that is more than a matrix has no candle form")
                .help("use `cx.backward`, or leave `lm_head` out of the adapter's targets")
        })?;
        let rows = hidden.flatten(0, 1)?.index_select(&batch.positions, 0)?;
        match weights.get(head) {
            Matrix::Dense(head) => ops::fused(&[&rows, head], |tape, inputs| {
                ops::head_cross_entropy(tape, &inputs[0], &inputs[1], &batch.targets)
            }),
            packed @ Matrix::Packed(_) => ops::fused(&[&rows], |tape, inputs| {
                ops::head_cross_entropy(tape, &inputs[0], Traced::constant(packed.clone()), &batch.targets)
            }),
        }
    }

    /// The gradients of a loss of one's own with respect to the trained parameters. The passes that the loss was made
    /// of are used up.
    ///
    /// # Errors
    /// The loss depends on no pass and no trained parameter, or a tensor operation failed.
    pub fn backward_loss(&mut self, loss: &Tensor) -> Result<Grads> {
        let store = loss.backward()?;
        let direct = self.weights.trainable().iter();
        let mut grads: Grads = direct.filter_map(|(name, var)| Some((name.clone(), store.get(var)?.clone()))).collect();
        let mut reached = !grads.is_empty();
        for pass in std::mem::take(&mut self.open) {
            let seeds: Vec<(Traced, Tensor)> =
                pass.lent.iter().filter_map(|(var, value)| Some((value.clone(), store.get(var)?.clone()))).collect();
            if seeds.is_empty() {
                self.open.push(pass);
                continue;
            }
            reached = true;
            let found = run_back(self.model, self.weights, pass.tape, &pass.blocks, seeds)?;
            grads = grads.add_scaled(1., &named(self.weights, found).0)?;
        }
        if reached {
            return Ok(grads);
        }
        Err(Error::run("the loss depends on no pass of this step and on no parameter under training")
            .help("compute it from `cx.hidden`, and differentiate each pass once"))
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

    /// A pass of this step over `weights`. All passes of a step see one dropout mask: a perturbation is found and
    /// applied in the same network.
    fn forward<'p>(&self, weights: &'p Weights, sites: &'p mut Sites) -> Forward<'p> {
        let dropout = Some(self.seed.named("dropout").generator());
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
        if let Scalar::Host(value) = value
            && !value.is_finite()
        {
            return Err(Error::run(format!("the loss is not finite: {value}"))
                .at("step", self.clock.step.to_string())
                .help("lower the learning rate or the perturbation"));
        }
        let observed = sites.observed().iter().map(|(name, value)| (name.clone(), value.tensor().clone())).collect();
        let one = loss.tensor().ones_like()?;
        let found = run_back(self.model, weights, tape, &blocks, vec![(loss, one)])?;
        let (grads, site_grads) = named(weights, found);
        Ok(Pass { loss: value, grads, site_grads, observed })
    }
}

/// The backward pass of one forward pass.
fn run_back(
    model: &dyn Model,
    weights: &Weights,
    tape: Tape,
    blocks: &BlockContext,
    seeds: Vec<(Traced, Tensor)>,
) -> Result<Gradients> {
    tape.backward_with(seeds, &mut |replay, gradient| blocks.replay(model, weights, replay, gradient))
}

/// The gradients by the names of the trained parameters, and those of the sites.
fn named(weights: &Weights, mut found: Gradients) -> (Grads, Grads) {
    let trained = weights.trainable().iter();
    let grads = trained.filter_map(|(name, var)| Some((name.clone(), found.take(var.as_tensor())?))).collect();
    (grads, found.into_probes())
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

/// The mean cross-entropy over the labels of `batch`, in nats, without differentiating anything.
///
/// # Errors
/// A tensor operation failed.
pub fn label_loss(model: &dyn Model, weights: &Weights, batch: &Batch) -> Result<f64> {
    let (weights, mut idle) = (weights.frozen(), Sites::none());
    let mut pass = Forward::new(&weights, &mut idle);
    let hidden = model.hidden(&batch.tokens, &mut pass)?;
    Scalar::of(loss_of_hidden(model, &hidden, batch, &mut pass)?.tensor())?.value()
}

/// The mean cross-entropy over the labels of `batch` given the hidden states of its tokens. Logits are computed at the
/// label positions only.
fn loss_of_hidden(model: &dyn Model, hidden: &Traced, batch: &Batch, pass: &mut Forward) -> Result<Traced> {
    let width = model.spec().hidden_size;
    let rows = ops::select_rows(&mut pass.tape, &hidden.reshape(((), width))?, &batch.positions)?;
    match model.head() {
        Some(head) if pass.weights.adapter(head).is_none() => {
            let head = pass.matrix(head);
            ops::head_cross_entropy(&mut pass.tape, &rows, head, &batch.targets)
        }
        _ => {
            let logits = model.logits(&rows, pass)?;
            ops::cross_entropy(&mut pass.tape, &logits, &batch.targets)
        }
    }
}
