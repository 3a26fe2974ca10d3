//! The training loop: the only place that applies an update to the weights.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use titer_core::data::{Batch, Stream};
use titer_core::defense::{Ancestry, Clock, StepCx, Streams};
use titer_core::model::label_loss;
use titer_core::optim::{AdamW, AdamWConfig};
use titer_core::rng::Seed;
use titer_core::weights::checkpoint::Checkpoint;
use titer_core::{AlignmentDefense, Error, Grads, Kind, Model, Result, Scalar, StageCx, State, Update, Weights};

use crate::disk;
use crate::disk::write_tensors;
use crate::experiment::spec::OptimSpec;
use crate::memory::stage_peak;

/// How often the loss on held-back rows is measured, over the whole stage.
const MONITOR_POINTS: usize = 12;

/// After how many steps the losses are read from a device: reading waits for all work before it.
const READ_EVERY: usize = 10;

/// What the loop tells, and asks, the world around it.
pub trait Watch {
    /// The loop begins, or goes on after `resumed` steps.
    fn started(&mut self, total: usize, resumed: usize);
    /// A step is done; the loss is the last one known.
    fn step(&mut self, step: usize, loss: Option<f64>);
    /// So many prompts are answered.
    fn answered(&mut self, done: usize);
    /// Whether the user asked to stop.
    fn must_stop(&self) -> bool;
    /// Whether it is time for a checkpoint.
    fn checkpoint_due(&self) -> bool;
    /// Stores what `write` puts into a folder, atomically.
    ///
    /// # Errors
    /// The checkpoint cannot be written.
    fn save(&mut self, step: usize, write: &dyn Fn(&Path) -> Result<()>) -> Result<()>;
    /// The folder of the newest checkpoint.
    fn resume(&self) -> Option<PathBuf>;
}

/// What a stage of training leaves behind beside the weights: `record.json`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct TrainRecord {
    /// The training loss of each step.
    pub loss: Vec<f64>,
    /// The loss on held-back harmful rows: `(steps done, loss)`.
    pub monitor: Vec<(usize, f64)>,
    /// The defense's own numbers, one per step that gave them.
    pub scalars: BTreeMap<String, Vec<(usize, f64)>>,
    /// Rows that were left out, because no part of their answers lies within the greatest length; absent if there are none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub left_out: Option<LeftOut>,
    /// Forward-and-backward passes in all.
    pub passes: usize,
    /// Seconds of training, over all runs that took part.
    pub seconds: f64,
    /// The most memory that the stage held where its tensors are, over all runs that took part; absent if not measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peak_bytes: Option<u64>,
}

/// Rows of a stage that have no label within the greatest length.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeftOut {
    /// All rows of the stage, these included.
    pub rows: usize,
    /// How many are left out.
    pub lost: usize,
    /// The harmful ones among all rows.
    pub harmful: usize,
    /// How many of those are left out.
    pub harmful_lost: usize,
}

/// One stage of training.
#[derive(Debug)]
pub struct Training<'a> {
    /// The architecture.
    pub model: &'a dyn Model,
    /// The weights, with what is trained marked.
    pub weights: &'a mut Weights,
    /// The defense, which makes the updates.
    pub defense: &'a mut dyn AlignmentDefense,
    /// The stage's own data.
    pub data: Stream,
    /// The defense's extra data.
    pub streams: Streams,
    /// Length, batches, optimiser.
    pub optim: &'a OptimSpec,
    /// The stage's seed.
    pub seed: Seed,
    /// Held-back harmful batches whose loss is tracked.
    pub monitor: Vec<Batch>,
    /// The models that the weights come from.
    pub ancestry: &'a dyn Ancestry,
}

/// Everything but tensors that an exact resume needs.
#[derive(Debug, Serialize, Deserialize)]
struct Position {
    step: usize,
    drawn: usize,
    streams: BTreeMap<String, usize>,
    moment_steps: BTreeMap<String, i32>,
    defense: Value,
    record: TrainRecord,
}

impl Training<'_> {
    /// Updates in all.
    pub fn total(&self) -> usize {
        self.optim.updates(self.data.batches_per_epoch())
    }

    /// Trains to the end, or to the user's wish to stop, which leaves a checkpoint.
    ///
    /// # Errors
    /// The user stopped it, a loss or gradient is not finite, or a tensor or file operation failed.
    pub fn run(mut self, watch: &mut dyn Watch) -> Result<TrainRecord> {
        let (total, begun) = (self.total(), Instant::now());
        let warmup = (self.optim.warmup * total as f64).ceil() as usize;
        let OptimSpec { betas, eps, weight_decay, .. } = *self.optim;
        let mut optimizer = AdamW::new(AdamWConfig { betas, eps, weight_decay });
        let (mut step, mut record) = match watch.resume() {
            Some(folder) => self.restore(&folder, &mut optimizer).map_err(|error| error.file(folder))?,
            None => (0, TrainRecord::default()),
        };
        let spent = record.seconds;
        if step == 0 {
            self.with_stage(0, total, |defense, cx| defense.begin(cx))?;
            self.watch_harmful_loss(0, &mut record)?;
        }
        watch.started(total, step);
        let (first, mut unread) = (step, Vec::new());
        while step < total {
            let _span = tracing::debug_span!("step", step = step + 1).entered();
            let rate = self.optim.learning_rate * self.optim.schedule.factor(step, warmup, total);
            let at_rate = |error| at_rate(error, rate);
            let before = (step == first).then(|| self.weights.snapshot()).transpose()?;
            let batches = self.draw()?;
            let update = self.update(&batches, step, total, &mut record).map_err(at_rate)?;
            self.data.prefetch(&self.weights.device().clone())?;
            if let Some(before) = before {
                self.check_untouched(&before)?;
            }
            let factor = match self.optim.clip {
                // On the host the gradients themselves are looked at.
                None if self.weights.device().is_cpu() => Scalar::from(1.),
                limit => update.grads.clip_factor(limit.unwrap_or(f64::INFINITY))?,
            };
            let at_hand = !factor.is_pending();
            if at_hand {
                check_finite(&update, step).map_err(at_rate)?;
            }
            optimizer.step(self.weights, &update.grads, &factor, rate)?;
            step += 1;
            unread.push(Unread { step, loss: update.loss, factor, scalars: update.scalars });
            let monitored = step == total || step.is_multiple_of(total.div_ceil(MONITOR_POINTS));
            let stop = watch.must_stop();
            let save = step < total && (stop || watch.checkpoint_due());
            if at_hand || monitored || save || unread.len() == READ_EVERY {
                read_out(&mut unread, &mut record).map_err(at_rate)?;
            }
            if monitored {
                self.watch_harmful_loss(step, &mut record).map_err(at_rate)?;
            }
            if step == total {
                self.check_trained(&batches, step).map_err(at_rate)?;
            }
            tracing::debug!(loss = record.loss.last(), learning_rate = rate, "trained");
            watch.step(step, record.loss.last().copied());
            if save {
                record.seconds = spent + begun.elapsed().as_secs_f64();
                record.peak_bytes = record.peak_bytes.max(stage_peak(self.weights.device()));
                watch.save(step, &|folder| self.store(folder, step, &optimizer, &record))?;
            }
            if stop {
                return Err(Error::interrupted());
            }
        }
        self.with_stage(total, total, |defense, cx| defense.finish(cx))?;
        record.seconds = spent + begun.elapsed().as_secs_f64();
        record.peak_bytes = record.peak_bytes.max(stage_peak(self.weights.device()));
        Ok(record)
    }

    /// The micro batches of the next step.
    fn draw(&mut self) -> Result<Vec<Batch>> {
        let device = self.weights.device().clone();
        (0..self.optim.accumulate).map(|_| self.data.next_batch(&device)).collect()
    }

    /// The update of one step: that of its batch, or the mean over its micro batches.
    fn update(&mut self, batches: &[Batch], step: usize, total: usize, record: &mut TrainRecord) -> Result<Update> {
        Update::over(batches, |micro| {
            let clock = Clock { step, total, micro, micros: batches.len() };
            let cx = StepCx::new(self.model, self.weights, &mut self.streams, self.seed, clock);
            let mut cx = cx.with_checkpointing(self.optim.checkpointing).with_micro_batches(batches);
            let update = self.defense.step(&mut cx, &batches[micro])?;
            record.passes += cx.passes();
            Ok(update)
        })
    }

    /// Law 1, checked where it costs nothing: a defense that moves the weights itself is caught at once.
    fn check_untouched(&self, before: &Grads) -> Result<()> {
        let moved = self.weights.snapshot()?.add_scaled(-1., before)?;
        if moved.norm()?.value()? == 0. {
            return Ok(());
        }
        Err(Error::run("the defense changed the weights in its step").help("move weights inside `cx.scratch` only"))
    }

    /// What the next step would find out about the last update: that the weights, or the loss at them, are not finite.
    fn check_trained(&self, batches: &[Batch], step: usize) -> Result<()> {
        self.weights.check_finite().map_err(|error| error.at("step", step.to_string()).help(Error::DIVERGED))?;
        let mut losses = batches.iter().map(|batch| label_loss(self.model, self.weights, batch));
        losses.try_for_each(|loss| finite("the loss after the last update", loss?, step).map(drop))
    }

    fn watch_harmful_loss(&self, step: usize, record: &mut TrainRecord) -> Result<()> {
        if self.monitor.is_empty() {
            return Ok(());
        }
        let (mut total, mut labels) = (0., 0);
        for batch in &self.monitor {
            total += label_loss(self.model, self.weights, batch)? * batch.labels() as f64;
            labels += batch.labels();
        }
        record.monitor.push((step, finite("the loss on held-back harmful rows", total / labels as f64, step)?));
        Ok(())
    }

    fn with_stage(
        &mut self,
        step: usize,
        total: usize,
        work: impl FnOnce(&mut dyn AlignmentDefense, &mut StageCx) -> Result<()>,
    ) -> Result<()> {
        let (clock, ancestry) = (Clock::at(step, total), self.ancestry);
        let (model, weights, streams) = (self.model, &mut *self.weights, &mut self.streams);
        work(self.defense, &mut StageCx { model, weights, streams, seed: self.seed, clock, ancestry })
    }

    fn store(&self, folder: &Path, step: usize, optimizer: &AdamW, record: &TrainRecord) -> Result<()> {
        let (moments, moment_steps) = optimizer.state();
        let State { tensors, value } = self.defense.state();
        write_tensors(&folder.join("weights.safetensors"), self.weights.snapshot()?)?;
        write_tensors(&folder.join("moments.safetensors"), moments)?;
        write_tensors(&folder.join("defense.safetensors"), tensors)?;
        let (drawn, streams) = (self.data.drawn(), self.streams.drawn());
        let position = Position { step, drawn, streams, moment_steps, defense: value, record: record.clone() };
        let path = folder.join("position.json");
        let text =
            serde_json::to_vec(&position).map_err(|error| Error::run("cannot write the position").source(error))?;
        disk::write(&path, &text)
    }

    fn restore(&mut self, folder: &Path, optimizer: &mut AdamW) -> Result<(usize, TrainRecord)> {
        let path = folder.join("position.json");
        let position: Position = serde_json::from_slice(&disk::read(&path)?)
            .map_err(|error| Error::data("the checkpoint cannot be read").file(&path).source(error))?;
        let device = self.weights.device().clone();
        let read = |name: &str| -> Result<BTreeMap<String, candle_core::Tensor>> {
            let mut file = Checkpoint::open(&folder.join(name))?;
            let names: Vec<String> = file.names().map(str::to_owned).collect();
            names.into_iter().map(|name| Ok((name.clone(), file.read(&name, &device)?))).collect()
        };
        self.weights.set(&read("weights.safetensors")?.into_iter().collect())?;
        optimizer.load_state(read("moments.safetensors")?, &position.moment_steps)?;
        self.defense.load_state(State { tensors: read("defense.safetensors")?, value: position.defense })?;
        self.data.seek(position.drawn);
        self.streams.seek(&position.streams);
        Ok((position.step, position.record))
    }
}

/// Numbers of a step that may still be on a device.
struct Unread {
    /// Steps done, this one included.
    step: usize,
    loss: Scalar,
    /// What the gradients were clipped by.
    factor: Scalar,
    scalars: BTreeMap<&'static str, Scalar>,
}

/// Reads the numbers of the steps since the last reading into the record.
fn read_out(unread: &mut Vec<Unread>, record: &mut TrainRecord) -> Result<()> {
    for Unread { step, loss, factor, scalars } in unread.drain(..) {
        let loss = finite("the loss", loss.value()?, step - 1)?;
        // A norm that is no number gives such a factor, and an infinite one gives zero.
        let factor = factor.value()?;
        if factor.is_nan() || factor <= 0. {
            return Err(gradient_not_finite(loss, step - 1));
        }
        record.loss.push(loss);
        for (name, value) in scalars {
            let value = finite(&format!("the defense's number `{name}`"), value.value()?, step - 1)?;
            record.scalars.entry(name.to_owned()).or_default().push((step, value));
        }
    }
    Ok(())
}

/// Fails, naming the tensor and the step, if a gradient is infinite or not a number.
fn check_finite(update: &Update, step: usize) -> Result<()> {
    match update.grads.first_not_finite()? {
        None => Ok(()),
        Some(name) => Err(gradient_not_finite(update.loss.value()?, step).at("tensor", name.to_owned())),
    }
}

fn gradient_not_finite(loss: f64, step: usize) -> Error {
    Error::run(format!("a gradient is not finite, at a loss of {loss}"))
        .at("step", step.to_string())
        .help(Error::DIVERGED)
}

/// `value`, if it is finite: JSON would make `null` of it.
fn finite(what: &str, value: f64, step: usize) -> Result<f64> {
    if value.is_finite() {
        return Ok(value);
    }
    Err(Error::run(format!("{what} is not finite: {value}")).at("step", step.to_string()).help(Error::DIVERGED))
}

/// `error` with the learning rate of its step, if the computation failed.
fn at_rate(error: Error, rate: f64) -> Error {
    if error.kind() == Kind::Run { error.at("learning rate", rate.to_string()) } else { error }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Tensor};

    use super::*;

    /// A number as a device holds it, here in a tensor of the host.
    fn pending(value: f32) -> Scalar {
        Scalar::Device(Tensor::new(value, &Device::Cpu).expect("a tensor"))
    }

    fn read(loss: f32, factor: f32) -> Result<TrainRecord> {
        let mut record = TrainRecord::default();
        let step = |loss, factor, step| Unread { step, loss, factor, scalars: BTreeMap::new() };
        let mut unread = vec![step(pending(2.), pending(0.5), 1), step(pending(loss), pending(factor), 2)];
        read_out(&mut unread, &mut record).map(|()| record)
    }

    #[test]
    fn what_a_device_computed_is_read_and_must_be_finite() -> Result<()> {
        assert_eq!(read(1.5, 1e-30)?.loss, [2., 1.5]);
        for (loss, factor, what) in [
            (f32::NAN, 1., "the loss"),
            (1., f32::NAN, "a gradient is not finite, at a loss of 1"),
            (1., 0., "a gradient"),
        ] {
            let error = read(loss, factor).expect_err("not finite");
            assert!(error.message().contains(what) && error.place("step") == Some("1"), "{error}");
        }
        Ok(())
    }

    /// What `read_out` relies on, also where nothing is clipped.
    #[test]
    fn the_factor_tells_of_a_gradient_that_is_not_finite() -> Result<()> {
        for limit in [1., f64::INFINITY] {
            let factor = |value: f32| {
                let grads: Grads = [("w".to_owned(), Tensor::new(&[value, 0.], &Device::Cpu)?)].into_iter().collect();
                grads.clip_factor(limit)?.value()
            };
            assert_eq!((factor(0.)?, factor(1e-3)?), (1., 1.));
            assert!(factor(1e19)? > 0. && factor(f32::NAN)?.is_nan());
            let infinite = factor(f32::INFINITY)?;
            assert!(infinite.is_nan() || infinite == 0., "{infinite}");
        }
        Ok(())
    }
}
