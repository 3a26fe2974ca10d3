//! One defense under one set of circumstances, and the small training loop that runs it.

use candle_core::{DType, Device};
use serde_json::Value;

use super::Fixture;
use super::fixture::{Adapted, Ancestors, SEED, shift, stream, weights};
use super::numbers::Numbers;
use crate::data::batch::Batch;
use crate::data::stream::Stream;
use crate::defense::alignment_defense::{AlignmentDefense, State};
use crate::defense::entry::{DefenseEntry, Limits};
use crate::defense::stage::{Clock, Stage};
use crate::defense::stage_context::StageCx;
use crate::defense::step_context::StepCx;
use crate::defense::streams::Streams;
use crate::defense::update::Update;
use crate::error::{Error, Result};
use crate::model::architecture::Model;
use crate::optim::{AdamW, AdamWConfig};
use crate::registry::entry::Entry;
use crate::registry::settings::Settings;
use crate::rng::Seed;
use crate::tensor::scalar::Scalar;
use crate::text::Template;
use crate::weights::parameters::Weights;
use crate::weights::precision::Precision;

/// Updates of a stage.
pub(super) const STEPS: usize = 5;
/// Updates of a stage on another device than the host, whose kernels may be executed by a stand-in.
const STEPS_ELSEWHERE: usize = 3;
/// The learning rate of that loop.
const LEARNING_RATE: f64 = 0.01;

/// A defense and the circumstances that it runs under.
#[derive(Debug, Clone)]
pub(super) struct Case<'a> {
    pub(super) entry: &'a DefenseEntry,
    pub(super) settings: Settings,
    pub(super) stage: Stage,
    pub(super) model: &'a dyn Model,
    /// The same architecture with one layer.
    pub(super) shallow: Option<&'a dyn Model>,
    pub(super) device: &'a Device,
    pub(super) precision: Precision,
    pub(super) trained: Adapted,
    /// Updates of the stage; none after fine-tuning.
    pub(super) total: usize,
    /// Micro batches per update.
    pub(super) micros: usize,
    /// Rows per batch.
    pub(super) batch_size: usize,
    /// Whether blocks are run again in the backward pass.
    pub(super) checkpointing: bool,
}

impl<'a> Case<'a> {
    /// The default settings in ordinary circumstances.
    pub(super) fn new(entry: &'a DefenseEntry, world: &'a Fixture, stage: Stage) -> Self {
        Self {
            entry,
            settings: Settings::empty(),
            stage,
            model: world.model(),
            shallow: world.shallow(),
            device: world.device(),
            precision: DType::F32.into(),
            trained: Adapted::Lora { dropout: 0.2 },
            total: match stage {
                Stage::Post => 0,
                _ if world.device().is_cpu() => STEPS,
                _ => STEPS_ELSEWHERE,
            },
            micros: 1,
            batch_size: 3,
            checkpointing: false,
        }
    }

    /// The same in the host's double precision and without dropout, where numbers agree to rounding. Devices compute in
    /// single precision at most.
    pub(super) fn precise(&self) -> Self {
        let dtype = if self.device.is_cpu() { DType::F64 } else { DType::F32 };
        Self { precision: dtype.into(), trained: Adapted::Lora { dropout: 0. }, ..self.clone() }
    }

    /// How far numbers of [`Case::precise`] may be apart, as a share, given how far on the host.
    pub(super) fn tolerance(&self, host: f64) -> f64 {
        if self.device.is_cpu() { host } else { 1e-4 }
    }

    /// The same with the neutral settings, if it has such.
    pub(super) fn neutral(&self) -> Result<Option<Self>> {
        let Some(neutral) = self.entry.neutral else { return Ok(None) };
        Ok(Some(Self { settings: table(neutral())?, ..self.clone() }))
    }

    /// The settings in full.
    pub(super) fn resolved(&self) -> Result<Value> {
        self.entry.resolve(&self.settings)
    }

    /// What it declares not to go with in training.
    pub(super) fn limits(&self) -> Result<Limits> {
        Ok((self.entry.limits)(&self.resolved()?))
    }

    /// A fresh defense.
    pub(super) fn defense(&self) -> Result<Box<dyn AlignmentDefense>> {
        (self.entry.build)(&table(self.resolved()?)?)
    }

    /// The declared passes per step.
    pub(super) fn declared_passes(&self) -> Result<f64> {
        Ok((self.entry.passes)(&self.resolved()?))
    }

    /// The stage under the defense, not begun.
    pub(super) fn run(&self) -> Result<Run<'_>> {
        Run::open(self, self.defense()?)
    }

    /// The stage under plain fine-tuning, not begun.
    pub(super) fn plain(&self) -> Result<Run<'_>> {
        Run::open(self, Box::new(Plain))
    }

    /// A stage well under way: a step is made, the weights have moved, and the clock stands in the middle.
    pub(super) fn under_way(&self) -> Result<Run<'_>> {
        let mut run = self.run()?;
        run.begin()?;
        run.update()?;
        shift(&run.weights, 0.02, seed().named("under way"))?;
        run.step = self.total / 2 + 1;
        Ok(run)
    }

    /// The declared streams, as ready-made batches.
    pub(super) fn streams(&self) -> Result<Streams> {
        let mut streams = Streams::default();
        for &name in (self.entry.streams)(&self.resolved()?) {
            let mut shuffled = stream(self.model, name, self.batch_size)?;
            let epoch = (0..shuffled.batches_per_epoch()).map(|_| shuffled.next_batch(self.device));
            streams.insert(name, Stream::of_batches(epoch.collect::<Result<_>>()?)?);
        }
        Ok(streams)
    }

    /// The rows that the stage trains on under `defense`.
    fn data(&self, defense: &dyn AlignmentDefense) -> Result<Stream> {
        let mut streams = Streams::default();
        for &name in (self.entry.streams)(&self.resolved()?) {
            streams.insert(name, stream(self.model, name, self.batch_size)?);
        }
        defense.data(stream(self.model, "own", self.batch_size)?, &streams)
    }
}

/// The seed of every stage.
pub(super) fn seed() -> Seed {
    Seed::new(SEED).named("stage")
}

/// Settings out of JSON.
pub(super) fn table(value: Value) -> Result<Settings> {
    match value {
        Value::Object(map) => Ok(map.into()),
        other => Err(Error::config(format!("settings are a table, found `{other}`"))),
    }
}

/// What every defense is compared with.
#[derive(Debug)]
struct Plain;

impl AlignmentDefense for Plain {}

/// A stage under way.
#[derive(Debug)]
pub(super) struct Run<'a> {
    pub(super) case: &'a Case<'a>,
    pub(super) defense: Box<dyn AlignmentDefense>,
    pub(super) weights: Weights,
    pub(super) streams: Streams,
    pub(super) data: Stream,
    pub(super) losses: Vec<f64>,
    pub(super) passes: usize,
    pub(super) step: usize,
    optimizer: AdamW,
    ancestors: Ancestors,
}

impl<'a> Run<'a> {
    fn open(case: &'a Case<'a>, defense: Box<dyn AlignmentDefense>) -> Result<Self> {
        let (weights, ancestors) = weights(case.model, case.stage, case.precision, case.trained, case.device)?;
        Ok(Self {
            case,
            weights,
            streams: case.streams()?,
            data: case.data(defense.as_ref())?,
            defense,
            losses: Vec::new(),
            passes: 0,
            step: 0,
            optimizer: AdamW::new(AdamWConfig::default()),
            ancestors,
        })
    }

    fn stage(&mut self, work: impl FnOnce(&mut dyn AlignmentDefense, &mut StageCx) -> Result<()>) -> Result<()> {
        let clock = Clock::at(self.step, self.case.total);
        let (model, weights, streams) = (self.case.model, &mut self.weights, &mut self.streams);
        let mut cx = StageCx { model, weights, streams, seed: seed(), clock, ancestry: &self.ancestors };
        work(self.defense.as_mut(), &mut cx)
    }

    pub(super) fn begin(&mut self) -> Result<()> {
        self.stage(|defense, cx| defense.begin(cx))
    }

    pub(super) fn finish(&mut self) -> Result<()> {
        self.stage(|defense, cx| defense.finish(cx))
    }

    /// The next batch of the stage's own data.
    pub(super) fn draw(&mut self) -> Result<Batch> {
        self.data.next_batch(self.weights.device())
    }

    /// The update of the micro batch `micro` of `batches`.
    pub(super) fn micro(&mut self, batches: &[Batch], micro: usize) -> Result<Update> {
        let clock = Clock { step: self.step, total: self.case.total, micro, micros: batches.len() };
        let cx = StepCx::new(self.case.model, &self.weights, &mut self.streams, seed(), clock);
        let mut cx = cx.with_checkpointing(self.case.checkpointing).with_micro_batches(batches);
        let update = self.defense.step(&mut cx, &batches[micro])?;
        self.passes += cx.passes();
        Ok(update)
    }

    /// The update of the next step, which is not applied.
    pub(super) fn update(&mut self) -> Result<Update> {
        let batches = (0..self.case.micros).map(|_| self.draw()).collect::<Result<Vec<_>>>()?;
        let update = Update::over(&batches, |micro| self.micro(&batches, micro));
        self.step += 1;
        update
    }

    /// The update that a fresh defense in this one's state makes of these micro batches and streams.
    pub(super) fn update_of(&self, batches: &[Batch], streams: Streams) -> Result<Update> {
        let mut trial = Self { streams, step: self.step, ..Self::open(self.case, self.restored_defense()?)? };
        trial.weights.set(&self.weights.snapshot()?)?;
        Update::over(batches, |micro| trial.micro(batches, micro))
    }

    /// Makes and applies updates until `step` are done.
    pub(super) fn train_to(&mut self, step: usize) -> Result<()> {
        while self.step < step {
            let update = self.update()?;
            self.losses.push(update.loss.value()?);
            self.optimizer.step(&self.weights, &update.grads, &Scalar::from(1.), LEARNING_RATE)?;
        }
        Ok(())
    }

    /// The whole stage, from its begin to its end.
    pub(super) fn whole(mut self) -> Result<Self> {
        self.begin()?;
        self.finished()
    }

    /// The rest of the stage.
    pub(super) fn finished(mut self) -> Result<Self> {
        self.train_to(self.case.total)?;
        self.finish()?;
        Ok(self)
    }

    /// A step at this point of the stage without consequences.
    pub(super) fn attempt(&self, batch: &Batch) -> Result<Update> {
        let (mut defense, mut streams) = (self.restored_defense()?, self.case.streams()?);
        streams.seek(&self.streams.drawn());
        let clock = Clock::at(self.step, self.case.total);
        defense.step(&mut StepCx::new(self.case.model, &self.weights, &mut streams, seed(), clock), batch)
    }

    /// A fresh defense that goes on from the state of this one, as out of a file.
    fn restored_defense(&self) -> Result<Box<dyn AlignmentDefense>> {
        let State { tensors, value } = self.defense.state();
        let tensors = tensors.into_iter().map(|(name, tensor)| Ok((name, tensor.copy()?.detach())));
        let value = serde_json::from_str(&value.to_string())
            .map_err(|error| Error::run("the state does not survive JSON").source(error))?;
        let mut defense = self.case.defense()?;
        defense.load_state(State { tensors: tensors.collect::<Result<_>>()?, value })?;
        Ok(defense)
    }

    /// The stage as a new process takes it up: begun long ago, and put together from what is stored.
    pub(super) fn resumed(&self) -> Result<Run<'a>> {
        let mut fresh = Self::open(self.case, self.restored_defense()?)?;
        fresh.weights.set(&self.weights.snapshot()?)?;
        let (moments, steps) = self.optimizer.state();
        fresh.optimizer.load_state(moments, &steps)?;
        fresh.data.seek(self.data.drawn());
        fresh.streams.seek(&self.streams.drawn());
        (fresh.step, fresh.losses) = (self.step, self.losses.clone());
        Ok(fresh)
    }

    /// In what this run ended otherwise than `other`, bit for bit.
    pub(super) fn difference(&self, other: &Self) -> Result<Option<String>> {
        let (own, others) = (Numbers::of(&self.weights)?, Numbers::of(&other.weights)?);
        if let Some(name) = own.first_difference(&others) {
            return Ok(Some(format!("`{name}` differs, all weights by {:.1e}", own.distance(&others))));
        }
        if let Some(step) =
            (0..self.losses.len()).find(|&step| self.losses[step].to_bits() != other.losses[step].to_bits())
        {
            return Ok(Some(format!("the loss of step {step} differs")));
        }
        if self.data.batches_per_epoch() != other.data.batches_per_epoch() {
            return Ok(Some("the data differ".to_owned()));
        }
        let template = |run: &Self| run.defense.serving_template(&Template::new("{{ instruction }}"));
        Ok((template(self) != template(other)).then(|| "the prompt at inference differs".to_owned()))
    }
}
