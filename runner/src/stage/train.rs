//! Training under a defense: alignment, or the user's fine-tuning with harmful rows mixed in.

use titer_core::data::{Batch, Stream, mixture};
use titer_core::rng::Seed;
use titer_core::text::Encoder;
use titer_core::weights::peft::{ADAPTER_CONFIG, ADAPTER_WEIGHTS, peft_config};
use titer_core::{Result, Row};

use super::{RECORD, StageIo, Stages, WEIGHTS, defense, encoder, write_json};
use crate::disk;
use crate::experiment::spec::{AdapterSpec, RowsSpec};
use crate::plan::TrainSpec;
use crate::stage::train_loop::{LeftOut, TrainRecord, Training};

pub(super) fn run(stages: &Stages, spec: &TrainSpec, io: &mut StageIo) -> Result<()> {
    let lineage = io.lineage(stages);
    let mut base = lineage.parent()?;
    let seed = Seed::new(spec.seed).named(spec.phase.name());
    match &spec.adapter {
        AdapterSpec::Full => base.weights.train_full()?,
        AdapterSpec::Fresh(config) => {
            base.weights.merge()?;
            base.weights.train_lora(config, seed.named("lora"))?;
        }
        // An adapter that the parent brought is attached, and under training, already.
        AdapterSpec::Continue(config) => {
            if base.weights.lora().is_none() {
                base.weights.train_lora(config, seed.named("lora"))?;
            }
        }
    }
    let encoder = encoder(&spec.encoding, &base.tokenizer);
    let (rows, harmful) = rows(stages, spec, seed)?;
    let pad = encoder.tokenizer.pad;
    let examples = encoder.examples(&rows)?;
    let left_out = left_out(&encoder, &rows, &harmful, examples.len())?;
    let data = Stream::new(examples.into(), spec.optim.batch_size, spec.optim.bucket, seed.named("data"), pad)?;
    let monitor = match &spec.monitor {
        Some(held_back) => monitor(stages, held_back, &encoder, spec.optim.batch_size)?,
        None => Vec::new(),
    };
    let streams = stages.streams(&spec.streams, &encoder, spec.optim.batch_size, seed)?;
    let mut defense = defense(&spec.defense)?;
    let data = defense.data(data, &streams)?;
    let training = Training {
        model: base.model.as_ref(),
        weights: &mut base.weights,
        defense: defense.as_mut(),
        data,
        streams,
        optim: &spec.optim,
        seed,
        monitor,
        ancestry: &lineage,
    };
    let record = training.run(io.watch)?;
    save(&base, io)?;
    write_json(&io.output.join(RECORD), &TrainRecord { left_out, ..record })
}

/// The rows that are not among the examples, if there are such.
fn left_out(encoder: &Encoder, rows: &[Row], harmful: &[Row], examples: usize) -> Result<Option<LeftOut>> {
    let lost = rows.len() - examples;
    if lost == 0 {
        return Ok(None);
    }
    let mut harmful_lost = 0;
    for row in harmful {
        harmful_lost += usize::from(encoder.example(row)?.is_none());
    }
    Ok(Some(LeftOut { rows: rows.len(), lost, harmful: harmful.len(), harmful_lost }))
}

/// Stores what was trained: the adapter in PEFT's layout, or all weights. Weights that are not finite, or that the model
/// computes nothing finite with, are never stored.
pub(super) fn save(base: &titer_core::CausalLm, io: &StageIo) -> Result<()> {
    base.check_sound()?;
    let Some(config) = base.weights.lora() else {
        return disk::write_tensors(&io.output.join(WEIGHTS), base.weights.base_tensors()?);
    };
    disk::write_tensors(&io.output.join(ADAPTER_WEIGHTS), base.weights.adapter_tensors()?)?;
    write_json(&io.output.join(ADAPTER_CONFIG), &peft_config(config, None))
}

/// All rows, and the harmful ones among them.
fn rows(stages: &Stages, spec: &TrainSpec, seed: Seed) -> Result<(Vec<Row>, Vec<Row>)> {
    let mut rows = Vec::new();
    for part in &spec.data {
        rows.extend(stages.train_rows(part, seed)?);
    }
    let Some(mix) = &spec.harmful else { return Ok((rows, Vec::new())) };
    let harmful = stages.train_rows(&mix.source, seed)?;
    Ok((mixture(&rows, &harmful, spec.rows(), mix.ratio, seed.named("mixture"))?, harmful))
}

/// Held-back rows as batches, in their own order.
fn monitor(stages: &Stages, spec: &RowsSpec, encoder: &Encoder, batch_size: usize) -> Result<Vec<Batch>> {
    let rows = stages.test_rows(spec)?;
    let examples = encoder.examples(&rows)?;
    let collate = |chunk: &[titer_core::data::Example]| {
        Batch::collate(&chunk.iter().collect::<Vec<_>>(), encoder.tokenizer.pad, &stages.device)
    };
    examples.chunks(batch_size).map(collate).collect()
}
