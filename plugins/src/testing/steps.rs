//! Random batches, and single steps of a defense on them.

use candle_core::{Device, Tensor};
use rand::RngExt;
use serde_json::Value;
use titer_core::data::{Batch, Stream, Tokens};
use titer_core::defense::{Clock, Orphan, StepCx, Streams};
use titer_core::rng::{Generator, Seed, randn};
use titer_core::testing::values;
use titer_core::{
    AlignmentDefense, DefenseEntry, Entry, Grads, Model, Result, Settings, Sites, StageCx, Update, Weights, registry,
};

/// The seed of every stage.
const SEED: u64 = 4;

/// Random rows of the given lengths, with a label on every token but the first.
pub fn batch(vocabulary: u32, lengths: &[usize], generator: &mut Generator) -> Result<Batch> {
    let mut token = || generator.random_range(0..vocabulary);
    let rows: Vec<Vec<u32>> = lengths.iter().map(|&length| (0..=length).map(|_| token()).collect()).collect();
    let labels = rows
        .iter()
        .enumerate()
        .flat_map(|(row, tokens)| tokens.iter().enumerate().skip(1).map(move |(at, &label)| (row, at - 1, label)));
    let inputs: Vec<&[u32]> = rows.iter().map(|row| &row[..row.len() - 1]).collect();
    Batch::with_labels(&inputs, labels.collect::<Vec<_>>(), 0, &Device::Cpu)
}

/// Three rows of seven, four and nine tokens.
pub fn three_rows(seed: u64) -> Result<Batch> {
    batch(23, &[7, 4, 9], &mut Seed::new(seed).generator())
}

/// The user's batch, that of seed 5, and a stream `safe` of those of seeds 6 and 7.
pub fn data() -> Result<(Batch, Streams)> {
    let mut streams = Streams::default();
    streams.insert("safe", Stream::of_batches(vec![three_rows(6)?, three_rows(7)?])?);
    Ok((three_rows(5)?, streams))
}

/// A context for passes of step 0.
pub fn context<'a>(model: &'a dyn Model, weights: &'a Weights, streams: &'a mut Streams) -> StepCx<'a> {
    StepCx::new(model, weights, streams, Seed::new(SEED), Clock::at(0, 10))
}

/// Logits of every token, `[tokens][vocabulary]`.
pub fn logits(model: &dyn Model, weights: &Weights, tokens: &Tokens) -> Result<Vec<Vec<f64>>> {
    let mut streams = Streams::default();
    let mut cx = context(model, weights, &mut streams);
    let (hidden, _) = cx.hidden(tokens, Sites::none())?;
    Ok(cx.logits(&hidden)?.detach().to_vec2()?)
}

/// The logarithms of the softmax, in plain arithmetic.
pub fn log_softmax(logits: &[f64]) -> Vec<f64> {
    let total = logits.iter().map(|x| x.exp()).sum::<f64>().ln();
    logits.iter().map(|x| x - total).collect()
}

/// The registered defense with `given`, resolved as a plan resolves it.
pub fn defense(name: &str, given: Value) -> Result<Box<dyn AlignmentDefense>> {
    let entry = registry::find::<DefenseEntry>(name)?;
    (entry.build)(&settings(&entry.resolve(&settings(&given))?))
}

pub(super) fn settings(given: &Value) -> Settings {
    given.as_object().cloned().unwrap_or_default().into()
}

/// Begins a stage of ten steps.
pub fn begin(
    defense: &mut dyn AlignmentDefense,
    model: &dyn Model,
    weights: &mut Weights,
    streams: &mut Streams,
) -> Result<()> {
    let (seed, clock) = (Seed::new(SEED), Clock::at(0, 10));
    defense.begin(&mut StageCx { model, weights, streams, seed, clock, ancestry: &Orphan })
}

/// The update of one micro batch.
pub fn update(
    defense: &mut dyn AlignmentDefense,
    model: &dyn Model,
    weights: &Weights,
    streams: &mut Streams,
    batch: &Batch,
    clock: Clock,
) -> Result<Update> {
    defense.step(&mut StepCx::new(model, weights, streams, Seed::new(SEED), clock), batch)
}

/// One step of a defense without streams at step `step`, micro batch 0.
pub fn step(
    model: &dyn Model,
    weights: &Weights,
    defense: &mut dyn AlignmentDefense,
    batch: &Batch,
    step: usize,
) -> Result<Update> {
    update(defense, model, weights, &mut Streams::default(), batch, Clock::at(step, 10))
}

/// Plain fine-tuning at the same place.
pub fn plain(model: &dyn Model, weights: &Weights, batch: &Batch, clock: Clock) -> Result<Update> {
    update(defense("sft", Value::Null)?.as_mut(), model, weights, &mut Streams::default(), batch, clock)
}

/// Standard normal numbers in the shapes of `like`.
pub(super) fn noise(like: &Grads, seed: u64) -> Result<Grads> {
    let draw = |(name, tensor): (&str, &Tensor)| {
        let z = randn(tensor.dims(), &mut Seed::new(seed).named(name).generator(), &Device::Cpu)?;
        Ok((name.to_owned(), z.to_dtype(tensor.dtype())?))
    };
    like.iter().map(draw).collect()
}

/// Moves the weights away from where they are, as training would.
pub fn moved(weights: &Weights) -> Result<()> {
    let here = weights.snapshot()?;
    weights.set(&here.clone().add_scaled(0.05, &noise(&here, 11)?)?)
}

/// The largest difference of two gradients; a tensor that one side lacks is zero there.
pub fn gap(a: &Grads, b: &Grads) -> Result<f64> {
    let difference = a.clone().add_scaled(-1., b)?;
    let largest = |(_, tensor): (&str, &Tensor)| -> Result<f64> {
        Ok(values(tensor)?.into_iter().fold(0., |max, x| if x.is_nan() { f64::INFINITY } else { x.abs().max(max) }))
    };
    difference.iter().map(largest).try_fold(0f64, |max, gap| Ok(gap?.max(max)))
}

/// Whether two updates have the same gradients and the same loss.
pub fn same(a: &Update, b: &Update) -> Result<bool> {
    Ok(a.grads.len() == b.grads.len() && gap(&a.grads, &b.grads)? == 0. && a.loss.value()? == b.loss.value()?)
}
