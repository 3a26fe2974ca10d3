//! A post-fine-tuning defense: it changes the fine-tuned weights once, without a loop.

use std::time::Instant;

use titer_core::Result;
use titer_core::defense::Clock;
use titer_core::rng::Seed;
use titer_core::{Stage, StageCx};

use super::train::save;
use super::{RECORD, StageIo, Stages, defense, encoder, write_json};
use crate::memory::stage_peak;
use crate::plan::PostSpec;
use crate::stage::train_loop::TrainRecord;

pub(super) fn run(stages: &Stages, spec: &PostSpec, io: &mut StageIo) -> Result<()> {
    io.watch.started(1, 0);
    let begun = Instant::now();
    let lineage = io.lineage(stages);
    let mut base = lineage.parent()?;
    if base.weights.lora().is_none() {
        base.weights.train_full()?;
    }
    let seed = Seed::new(spec.seed).named(Stage::Post.name());
    let encoder = encoder(&spec.encoding, &base.tokenizer);
    let mut streams = stages.streams(&spec.streams, &encoder, spec.batch_size, seed)?;
    let mut defense = defense(&spec.defense)?;
    let clock = Clock::at(0, 0);
    let (model, weights) = (base.model.as_ref(), &mut base.weights);
    let mut cx = StageCx { model, weights, streams: &mut streams, seed, clock, ancestry: &lineage };
    defense.begin(&mut cx)?;
    defense.finish(&mut cx)?;
    save(&base, io)?;
    let peak_bytes = stage_peak(&stages.device);
    let record = TrainRecord { seconds: begun.elapsed().as_secs_f64(), peak_bytes, ..TrainRecord::default() };
    write_json(&io.output.join(RECORD), &record)
}
