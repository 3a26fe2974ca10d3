//! Holds the device against the host, and then measures it: `gpu_check` prints one JSON object.
//!
//! For every element type the loss and the gradients of an alignment step by plain fine-tuning and by Vaccine are
//! compared with the host's in f32, on a Llama with grouped queries; greedy answers must be equal in f32. Exit code 1 if
//! an error lies above its limit.

#![expect(clippy::print_stdout, reason = "its output is the report")]

use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use serde_json::{Value, json};
use titer_core::data::{Batch, Example};
use titer_core::defense::{Clock, StepCx, Streams};
use titer_core::model::generate::{Decoding, greedy};
use titer_core::optim::{AdamW, AdamWConfig};
use titer_core::rng::{Seed, randn};
use titer_core::weights::LoraConfig;
use titer_core::{Model, Settings, Update, Weights};
use titer_tests::{build, defense};

/// The largest relative error of a gradient, by element type: bf16 keeps 8 bits.
const LIMITS: [(DType, f64); 2] = [(DType::F32, 1e-4), (DType::BF16, 5e-2)];

fn main() -> Result<()> {
    let device = Device::new_cuda(0).context("this check needs a CUDA device")?;
    let mut good = true;
    let mut checks = Vec::new();
    for (dtype, limit) in LIMITS {
        for method in ["sft", "vaccine"] {
            let (host, _) = one_step(method, DType::F32, &Device::Cpu)?;
            let (ours, moved) = one_step(method, dtype, &device)?;
            let error = worst_error(&host, &ours)?;
            let loss = (host.loss.value()? - ours.loss.value()?).abs() / host.loss.value()?;
            let passed = error < limit && loss < limit && moved.is_finite();
            good &= passed;
            checks.push(json!({
                "method": method, "dtype": format!("{dtype:?}"), "gradient_error": error, "loss_error": loss,
                "limit": limit, "passed": passed,
            }));
        }
    }
    let (host, ours) = (answers(&Device::Cpu)?, answers(&device)?);
    let equal = host == ours;
    good &= equal;
    let report = json!({ "checks": checks, "answers_equal": equal, "benches": benches(&device)?, "passed": good });
    println!("{report:#}");
    anyhow::ensure!(good, "the device differs from the host");
    Ok(())
}

fn model() -> titer_core::Result<Box<dyn Model>> {
    build(&json!({
        "model_type": "llama", "vocab_size": 997, "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4,
        "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.08
    }))
}

/// An adapter whose both factors are random, on the device: all are drawn on the host, so that devices agree.
fn weights(model: &dyn Model, dtype: DType, device: &Device) -> Result<Weights> {
    let mut weights = Weights::random(model.params(), Seed::new(1), dtype, device)?;
    weights.train_lora(&LoraConfig::default(), Seed::new(2))?;
    for (name, var) in weights.trainable() {
        let noise = randn(var.dims(), &mut Seed::new(3).named(name).generator(), device)?;
        var.set(&(noise.to_dtype(var.dtype())? * 0.02)?)?;
    }
    Ok(weights)
}

fn examples() -> Vec<Example> {
    let row = |length: usize, start: u32| (0..length as u32).map(|i| (start + i * 37) % 997).collect();
    [(70, 3), (41, 5), (64, 11)]
        .map(|(length, start)| Example { tokens: row(length, start), first_label: length / 4 })
        .to_vec()
}

/// The update of one step, and the norm of the adapter after AdamW applied it.
fn one_step(method: &str, dtype: DType, device: &Device) -> Result<(Update, f64)> {
    let model = model()?;
    let weights = weights(model.as_ref(), dtype, device)?;
    let examples = examples();
    let batch = Batch::collate(&examples.iter().collect::<Vec<_>>(), 0, device)?;
    let mut streams = Streams::default();
    let clock = Clock::at(0, 1);
    let mut cx = StepCx::new(model.as_ref(), &weights, &mut streams, Seed::new(4), clock);
    let update = defense(method, Value::Null)?.step(&mut cx, &batch)?;
    let factor = update.grads.clip_factor(1.)?;
    AdamW::new(AdamWConfig::default()).step(&weights, &update.grads, &factor, 1e-3)?;
    Ok((update, weights.snapshot()?.norm()?.value()?))
}

/// The largest error of a gradient relative to its norm.
fn worst_error(host: &Update, ours: &Update) -> Result<f64> {
    let mut worst = 0f64;
    for (name, expected) in host.grads.iter() {
        let found = ours.grads.get(name).with_context(|| format!("{name} has no gradient on the device"))?;
        let found = found.to_device(&Device::Cpu)?.to_dtype(DType::F32)?;
        let norm = |t: &Tensor| -> Result<f64> { Ok(f64::from(t.sqr()?.sum_all()?.to_scalar::<f32>()?).sqrt()) };
        worst = worst.max(norm(&(found - expected)?)? / norm(expected)?.max(1e-12));
    }
    Ok(worst)
}

fn answers(device: &Device) -> Result<Vec<Vec<u32>>> {
    let model = model()?;
    let weights = weights(model.as_ref(), DType::F32, device)?.merged()?;
    let prompts: Vec<Vec<u32>> = examples().into_iter().map(|example| example.tokens).collect();
    let decoding = Decoding { max_new_tokens: 24, batch_size: 2, ends: Vec::new() };
    let answers = greedy(model.as_ref(), &weights, &prompts, &decoding, |_| Ok(()))?;
    Ok(answers.into_iter().map(|answer| answer.tokens).collect())
}

/// Steps and answers of the shapes that people train.
fn benches(device: &Device) -> Result<Vec<titer::bench::Measurement>> {
    use titer::bench::{Setup, generate, step};
    let setup = |model: &str, batch: usize, length: usize| Setup {
        model: model.into(),
        batch,
        length,
        layers: None,
        dtype: "bf16".into(),
        repeat: 10,
        warmup: 3,
    };
    let mut measured = Vec::new();
    for shape in ["110m", "1b", "llama-2-7b"] {
        for method in ["sft", "vaccine"] {
            measured.push(step(&setup(shape, 5, 200), method, &Settings::default(), 0.1, false, device)?);
        }
    }
    let decoding = |batch: usize| Setup { repeat: 1, warmup: 1, ..setup("llama-2-7b", batch, 64) };
    measured.push(generate(&decoding(1), 8, 128, device)?);
    measured.push(generate(&decoding(128), 500, 128, device)?);
    Ok(measured)
}
