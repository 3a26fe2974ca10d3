//! The verbs a defense works with: passes, scratch weights, streams, clock, generators.

use std::collections::{BTreeMap, VecDeque};
use std::fmt::Debug;
use std::ops::{Deref, DerefMut};

use candle_core::backprop::GradStore;
use candle_core::{Device, Tensor, Var};

use crate::data::{Batch, Stream, Tokens};
use crate::grads::Grads;
use crate::model::{BlockContext, Forward, InputSquares, Model};
use crate::ops;
use crate::rng::{Generator, Seed, randn};
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
    /// Micro batches per update: 1 without gradient accumulation.
    pub micros: usize,
}

impl Clock {
    /// The first micro batch of update `step` out of `total`, without gradient accumulation.
    pub const fn at(step: usize, total: usize) -> Self {
        Self { step, total, micro: 0, micros: 1 }
    }

    /// Whether this is the last micro batch of its update.
    pub const fn last_micro(self) -> bool {
        self.micro + 1 == self.micros
    }
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

    /// The stream `name`.
    ///
    /// # Errors
    /// The defense did not declare such a stream.
    pub fn get(&self, name: &str) -> Result<&Stream> {
        self.0.get(name).ok_or_else(|| self.undeclared(name))
    }

    /// The next batch of the stream `name`.
    ///
    /// # Errors
    /// The defense did not declare such a stream.
    pub fn next(&mut self, name: &str, device: &Device) -> Result<Batch> {
        if !self.0.contains_key(name) {
            return Err(self.undeclared(name));
        }
        self.0.get_mut(name).expect("looked up above").next_batch(device)
    }

    /// The part of the last batch of the stream `name` in what the stream gives this update, by labels.
    fn share(&mut self, name: &str, clock: Clock) -> Result<f64> {
        match self.0.get_mut(name) {
            Some(stream) => Ok(stream.share(clock.micro, clock.micros)),
            None => Err(self.undeclared(name)),
        }
    }

    fn undeclared(&self, name: &str) -> Error {
        let known: Vec<&str> = self.0.keys().map(String::as_str).collect();
        Error::run(format!("the defense did not declare the stream `{name}`"))
            .help(format!("declared streams: {}", known.join(", ")))
    }
}

/// The models that a stage's weights come from.
pub trait Ancestry: Debug {
    /// The base model, before any alignment.
    ///
    /// # Errors
    /// It cannot be loaded.
    fn base(&self) -> Result<Weights>;

    /// The model after alignment, with the alignment's adapter still attached if it has one.
    ///
    /// # Errors
    /// The model was not aligned, or cannot be loaded.
    fn aligned(&self) -> Result<Weights>;
}

/// The ancestry of weights that have none.
#[derive(Debug, Clone, Copy, Default)]
pub struct Orphan;

impl Ancestry for Orphan {
    fn base(&self) -> Result<Weights> {
        Err(Error::run("there is no base model to compare these weights with"))
    }

    fn aligned(&self) -> Result<Weights> {
        Err(Error::run("there is no aligned model to compare these weights with"))
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

    /// The update over the micro batches `batches`: the mean of their updates, each weighed by the labels of its batch.
    /// `step` makes that of the micro batch of this index. Numbers to log are the first one's.
    ///
    /// # Errors
    /// `step` failed, there is no batch, or two gradients of one name differ in shape.
    pub fn over(batches: &[Batch], mut step: impl FnMut(usize) -> Result<Self>) -> Result<Self> {
        let labels: usize = batches.iter().map(Batch::labels).sum();
        let mut sum: Option<Self> = None;
        for (micro, batch) in batches.iter().enumerate() {
            let update = step(micro)?.weighed(batch.labels() as f64 / labels as f64)?;
            sum = Some(match sum {
                None => update,
                Some(sum) => {
                    Self { grads: sum.grads.add_scaled(1., &update.grads)?, loss: sum.loss.plus(&update.loss)?, ..sum }
                }
            });
        }
        sum.ok_or_else(|| Error::config("`accumulate` must be at least 1").key("accumulate"))
    }

    /// The update with its gradients and its loss times `factor`.
    ///
    /// # Errors
    /// A tensor operation failed.
    pub fn weighed(self, factor: f64) -> Result<Self> {
        if factor == 1. {
            return Ok(self);
        }
        Ok(Self { grads: self.grads.scale(factor)?, loss: self.loss.affine(factor, 0.)?, ..self })
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
    /// The models that the weights come from.
    pub ancestry: &'a dyn Ancestry,
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
    share: Share,
    passes: usize,
    /// The cross-entropies so far.
    losses: Vec<Scalar>,
    /// Noise to give out instead of drawing it.
    recorded: VecDeque<Tensor>,
    /// The shapes of the noise so far.
    noise_shapes: Vec<Vec<usize>>,
    /// Pieces of the model whose results a defense holds, until a loss of them is differentiated.
    open: Vec<OpenPass>,
}

/// What part of an update's micro batches the own batch of a step is.
#[derive(Debug, Clone, Copy)]
struct Share {
    /// Of their labels, by which the loop weighs the step.
    labels: f64,
    /// Of their tokens.
    tokens: f64,
}

/// A piece of the model that ran forward, and whose backward pass waits for the gradients of some of its values.
#[derive(Debug)]
struct OpenPass {
    tape: Tape,
    blocks: BlockContext,
    /// The candle tensor that it started from, if a gradient flows into that.
    input: Option<Tensor>,
    /// Values that a defense holds as variables of a candle expression.
    lent: Vec<(Var, Traced)>,
}

impl OpenPass {
    /// `value` as a candle tensor. Candle's gradient of it is where the backward pass of this piece starts.
    fn lend(&mut self, value: &Traced) -> Result<Tensor> {
        if !value.tracked() {
            return Ok(value.tensor().clone());
        }
        let variable = Var::from_tensor(value.tensor())?;
        let tensor = variable.as_tensor().clone();
        self.lent.push((variable, value.clone()));
        Ok(tensor)
    }
}

impl<'a> StepCx<'a> {
    /// The context of one step; `seed` is the stage's.
    pub fn new(model: &'a dyn Model, weights: &'a Weights, streams: &'a mut Streams, seed: Seed, clock: Clock) -> Self {
        let seed = seed.named("step").at(clock.step).at(clock.micro);
        let (losses, recorded, noise_shapes, open) = (Vec::new(), VecDeque::new(), Vec::new(), Vec::new());
        let (checkpointing, share, passes) = (false, Share { labels: 1., tokens: 1. }, 0);
        Self {
            model,
            weights,
            streams,
            seed,
            clock,
            checkpointing,
            share,
            passes,
            losses,
            recorded,
            noise_shapes,
            open,
        }
    }

    /// Says which micro batches the update consists of; the clock says which of them the step is for. Without this all
    /// terms of a step are weighed alike.
    #[must_use]
    pub fn with_micro_batches(mut self, batches: &[Batch]) -> Self {
        let part = |count: fn(&Batch) -> usize| {
            let all: usize = batches.iter().map(count).sum();
            batches.get(self.clock.micro).map_or(1., |own| count(own) as f64 / all as f64)
        };
        self.share = Share { labels: part(Batch::labels), tokens: part(|batch| batch.tokens.lengths.iter().sum()) };
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

    /// The shapes of the noise of this step so far, in order: what a replay must bring.
    pub fn noise_shapes(&self) -> &[Vec<usize>] {
        &self.noise_shapes
    }

    /// Standard normal noise of this step for `purpose`, f32: the same after a resume.
    ///
    /// # Errors
    /// A tensor operation failed.
    pub fn noise(&mut self, purpose: &str, dims: &[usize]) -> Result<Tensor> {
        self.noise_shapes.push(dims.to_vec());
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

    /// The factor on a term that is a mean over the real tokens of the stage's own batch, as
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
        let mut open = OpenPass { blocks: pass.context(), tape: pass.tape, input: None, lent: Vec::new() };
        self.passes += 1;
        sites.check_visited()?;
        let observed = sites.observed().iter().map(|(name, value)| Ok((name.clone(), open.lend(value)?)));
        let observed = observed.collect::<Result<_>>()?;
        let hidden = open.lend(&hidden)?;
        self.keep(open);
        Ok((hidden, observed))
    }

    /// The model's final norm of `x`, `[batch, length, hidden_size]`, as an operation of a candle expression: what makes
    /// hidden states of the residual stream after any block.
    ///
    /// # Errors
    /// A tensor operation failed.
    pub fn finish(&mut self, x: &Tensor) -> Result<Tensor> {
        let model = self.model;
        self.apply(self.weights, x, |x, pass| model.finish(x, pass))
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
        let mut open = OpenPass { blocks: pass.context(), tape: pass.tape, input, lent: Vec::new() };
        let result = open.lend(&result)?;
        self.keep(open);
        Ok(result)
    }

    /// Remembers a piece of the model if any gradient can come back to it.
    fn keep(&mut self, open: OpenPass) {
        if !open.lent.is_empty() {
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
            let mut seeds = Vec::new();
            for (var, value) in &pass.lent {
                seeds.extend(gradient(&stores, var)?.map(|gradient| (value.clone(), gradient)));
            }
            if seeds.is_empty() {
                self.open.push(pass);
                continue;
            }
            let mut found = run_back(self.model, pass.tape, &pass.blocks, seeds)?;
            if let Some(input) = pass.input
                && let Some(gradient) = found.take(&input)
            {
                stores.push((input * gradient.detach())?.sum_all()?.backward()?);
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

    /// What each low-rank factor is multiplied with (the base weight of a layer without adapter), squared and summed
    /// over the real tokens of all rows: `[in]` by the parameter's name. Nothing is trained, and no dropout.
    ///
    /// # Errors
    /// A tensor operation failed.
    pub fn input_squares(&mut self, tokens: &Tokens) -> Result<Grads> {
        let (frozen, mut idle) = (self.weights.frozen(), Sites::none());
        let mut squares = InputSquares::new(tokens)?;
        let mut pass = Forward { input_squares: Some(&mut squares), ..Forward::new(&frozen, &mut idle) };
        self.model.hidden(tokens, &mut pass)?;
        self.passes += 1;
        Ok(squares.sums.into_iter().collect())
    }

    /// Runs `work` with weights that it may move; afterwards they are as before, bit for bit, also after an error.
    ///
    /// # Errors
    /// What `work` returned, or the weights could not be restored.
    pub fn scratch<T>(&mut self, work: impl FnOnce(&mut Scratch<'_, 'a>) -> Result<T>) -> Result<T> {
        let mut scratch = Scratch { before: self.weights.snapshot()?, cx: self };
        let result = work(&mut scratch);
        scratch.restore()?;
        result
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

/// The gradient of `var` over several backward passes of candle, if any reaches it.
fn gradient(stores: &[GradStore], var: &Var) -> Result<Option<Tensor>> {
    let mut found = stores.iter().filter_map(|store| store.get(var));
    let Some(first) = found.next() else { return Ok(None) };
    found.try_fold(first.clone(), |sum, more| Ok((sum + more)?)).map(Some)
}

/// The backward pass of one forward pass.
fn run_back(model: &dyn Model, tape: Tape, blocks: &BlockContext, seeds: Vec<(Traced, Tensor)>) -> Result<Gradients> {
    tape.backward_with(seeds, &mut |replay, gradient| blocks.replay(model, replay, gradient))
}

/// The gradients by the names of the trained parameters, and those of the sites.
fn named(weights: &Weights, mut found: Gradients) -> (Grads, Grads) {
    let trained = weights.trainable().iter();
    let grads = trained.filter_map(|(name, var)| Some((name.clone(), found.take(var.as_tensor())?))).collect();
    (grads, found.into_probes())
}

/// Weights that may be moved for a while, inside [`StepCx::scratch`]; all the verbs of a step are at hand.
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

    /// Puts the weights back. Training must not go on from moved ones, so a failure here outweighs all others.
    fn restore(&self) -> Result<()> {
        self.cx.weights.set(&self.before).map_err(|error| {
            Error::run("the weights could not be put back after a scratch pass")
                .at("step", self.cx.clock.step.to_string())
                .source(error)
                .help("start the stage anew; its last checkpoint is sound")
        })
    }
}

impl<'a> Deref for Scratch<'_, 'a> {
    type Target = StepCx<'a>;

    fn deref(&self) -> &StepCx<'a> {
        self.cx
    }
}

impl<'a> DerefMut for Scratch<'_, 'a> {
    fn deref_mut(&mut self) -> &mut StepCx<'a> {
        self.cx
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

#[cfg(test)]
mod tests {
    use candle_core::DType;

    use super::*;
    use crate::model::ModelSpec;
    use crate::weights::{Init, ParamList};

    /// One parameter and no computation.
    #[derive(Debug)]
    struct Parameter(ParamList, ModelSpec);

    impl Parameter {
        fn new() -> Self {
            let mut params = ParamList::default();
            params.tensor("w", &[2], Init::Ones);
            let (vocab_size, hidden_size, layers, kv_heads, head_dim, max_positions) = (1, 1, 0, 1, 1, 1);
            Self(params, ModelSpec { vocab_size, hidden_size, layers, kv_heads, head_dim, max_positions })
        }
    }

    impl Model for Parameter {
        fn spec(&self) -> &ModelSpec {
            &self.1
        }
        fn params(&self) -> &ParamList {
            &self.0
        }
        fn config(&self) -> serde_json::Value {
            serde_json::Value::Null
        }
        fn sites(&self) -> Vec<String> {
            Vec::new()
        }
        fn embed(&self, _: &Tokens, _: &mut Forward) -> Result<Traced> {
            Err(Error::run("it computes nothing"))
        }
        fn block(&self, _: usize, x: &Traced, _: &mut Forward) -> Result<Traced> {
            Ok(x.clone())
        }
        fn finish(&self, x: &Traced, _: &mut Forward) -> Result<Traced> {
            Ok(x.clone())
        }
        fn logits(&self, x: &Traced, _: &mut Forward) -> Result<Traced> {
            Ok(x.clone())
        }
    }

    #[test]
    fn a_step_fails_if_the_weights_cannot_be_put_back() -> Result<()> {
        let (model, mut streams) = (Parameter::new(), Streams::default());
        let mut weights = Weights::random(&model, Seed::new(0), DType::F32, &Device::Cpu)?;
        weights.train_full()?;
        let mut cx = StepCx::new(&model, &weights, &mut streams, Seed::new(0), Clock::at(3, 9));
        let moved = cx.weights().snapshot()?;
        for outcome in [Ok(1), Err(Error::run("the work failed"))] {
            let result = cx.scratch(|scratch| {
                scratch.shift(&moved, 1.)?;
                // A snapshot that does not fit stands for a device that fails.
                scratch.before = Grads::from_iter([("w".to_owned(), Tensor::zeros(3, DType::F32, &Device::Cpu)?)]);
                outcome
            });
            let error = result.expect_err("the weights stay moved").to_string();
            assert!(error.contains("could not be put back") && error.contains("step: 3"), "{error}");
        }
        Ok(())
    }
}
