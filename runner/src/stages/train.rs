//! Training under a defense: alignment, or the user's fine-tuning with harmful rows mixed in.

use candle_core::DType;
use titer_core::data::{Batch, Stream, mixture};
use titer_core::rng::Seed;
use titer_core::text::Encoder;
use titer_core::{Error, Grads, Result, Row};

use super::{ADAPTER, Lineage, RECORD, StageIo, Stages, defense, encoder, write_json};
use crate::disk;
use crate::plan::{AdapterSpec, RowsSpec, TrainSpec};
use crate::train_loop::Training;

pub(super) fn run(stages: &Stages, spec: &TrainSpec, parent: &str, io: &mut StageIo) -> Result<()> {
    let mut base = stages.open(parent, io.artifact)?;
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
    let rows = rows(stages, spec, seed)?;
    let pad = encoder.tokenizer.pad;
    let data = Stream::new(
        encoder.examples(&rows)?.into(),
        spec.optim.batch_size,
        spec.optim.bucket,
        seed.named("data"),
        pad,
    )?;
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
        ancestry: &Lineage { stages, key: parent, artifact: io.artifact },
    };
    let record = training.run(io.watch)?;
    save(&base, io)?;
    write_json(&io.output.join(RECORD), &record)
}

/// Stores what was trained: the adapter in PEFT's layout, or all weights. Also a step after the last check of a loss, or a
/// change without any step, may have spoiled them, so that they are looked at here.
pub(super) fn save(base: &crate::base_model::BaseModel, io: &StageIo) -> Result<()> {
    let adapter = base.weights.lora();
    let (name, tensors) = match adapter {
        Some(_) => (ADAPTER, base.weights.adapter_tensors()?),
        None => ("model.safetensors", base.weights.base_tensors()?),
    };
    for (name, tensor) in &tensors {
        let tensor = (name.clone(), tensor.to_dtype(DType::F32)?);
        if Grads::from_iter([tensor]).first_not_finite()?.is_some() {
            return Err(Error::run("a weight is not finite")
                .at("tensor", name.clone())
                .help("lower the learning rate or the strength of the defense"));
        }
    }
    disk::write_tensors(&io.output.join(name), tensors)?;
    let Some(config) = adapter else { return Ok(()) };
    let peft = serde_json::json!({
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": config.r,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": config.target_modules,
        "bias": "none",
        "inference_mode": true,
    });
    write_json(&io.output.join("adapter_config.json"), &peft)
}

fn rows(stages: &Stages, spec: &TrainSpec, seed: Seed) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for part in &spec.data {
        rows.extend(stages.train_rows(part, seed)?);
    }
    let Some(mix) = &spec.harmful else { return Ok(rows) };
    let harmful = stages.train_rows(&mix.source, seed)?;
    mixture(&rows, &harmful, spec.rows(), mix.ratio, seed.named("mixture"))
}

/// Held-back rows as batches, in their own order.
fn monitor(stages: &Stages, spec: &RowsSpec, encoder: &Encoder, batch_size: usize) -> Result<Vec<Batch>> {
    let rows = stages.task(&spec.task)?.test(spec.rows)?;
    let examples = encoder.examples(&rows)?;
    let collate = |chunk: &[titer_core::data::Example]| {
        Batch::collate(&chunk.iter().collect::<Vec<_>>(), encoder.tokenizer.pad, &stages.device)
    };
    examples.chunks(batch_size).map(collate).collect()
}
