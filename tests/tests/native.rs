//! Native arithmetic: answers of quantized models are computed with activations rounded to 8 bits, and nothing else is.
//!
//! The arithmetic is chosen for the whole process, so all of it is one test.

use anyhow::Result;
use candle_core::{Device, Tensor};
use serde_json::{Value, json};
use titer_core::arithmetic::{Arithmetic, Level, choose, identity, limit};
use titer_core::data::Batch;
use titer_core::defense::Streams;
use titer_core::device::DeviceChoice;
use titer_core::model::generate::{Continuation, Decoding, greedy};
use titer_core::nn::cache::Cache;
use titer_core::rng::Seed;
use titer_core::tensor::grads::Grads;
use titer_core::tensor::tokens::Tokens;
use titer_core::{Forward, Model, Precision, Sites, Weights};
use titer_tests::{adapt, batch, build, context, difference};

/// What is computed with blocks as they are stored, and what is widened as in portable arithmetic.
const ROUNDED: [&str; 4] = ["q8_0", "q4_0", "q4_1", "q4k"];
const WIDENED: [&str; 3] = ["f32", "bf16", "q6k"];
const VOCABULARY: u32 = 67;

fn config() -> Value {
    json!({
        "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 512,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    })
}

fn weights(model: &dyn Model, name: &str) -> Result<Weights> {
    let mut weights = Weights::random(model.params(), Seed::new(1), Precision::parse(name)?, &Device::Cpu)?;
    adapt(&mut weights, 0.)?;
    weights.merge()?;
    adapt(&mut weights, 0.)?;
    Ok(weights)
}

/// Answers to prompts, many at a time and one at a time: products of many rows and of few.
fn answers(model: &dyn Model, weights: &Weights, batch_size: usize) -> Result<Vec<Continuation>> {
    let prompt = |n: u32| (0..n).map(|i| (i * 7 + n * 3) % VOCABULARY).collect();
    let prompts: Vec<Vec<u32>> = [5, 2, 9, 30, 1].into_iter().map(prompt).collect();
    let decoding = Decoding { max_new_tokens: 24, batch_size, ends: Vec::new() };
    Ok(greedy(model, weights, &prompts, &decoding, |_| Ok(()))?)
}

/// The hidden states of a text: with a cache, as in answers, or without one.
fn hidden(model: &dyn Model, weights: &Weights, cached: bool) -> Result<Tensor> {
    let ids: Vec<u32> = (0..20).map(|i| i * 5 % VOCABULARY).collect();
    let mut cache = Cache::new(model.spec(), 1, ids.len(), candle_core::DType::F32, &Device::Cpu)?;
    let (tokens, mut idle) = (Tokens::new(&[&ids], &Device::Cpu)?, Sites::none());
    let mut pass = Forward::new(weights, &mut idle);
    pass.cache = cached.then_some(&mut cache);
    Ok(model.hidden(&tokens, &mut pass)?.tensor().clone())
}

/// The loss and the gradients of a step.
fn step(model: &dyn Model, weights: &Weights, batch: &Batch) -> Result<(f64, Grads)> {
    let mut streams = Streams::default();
    let result = context(model, weights, &mut streams).backward(batch, Sites::none())?;
    Ok((result.loss.value()?, result.grads))
}

#[test]
fn answers_alone_are_computed_with_rounded_activations_and_by_every_kernel_alike() -> Result<()> {
    let model = build(&config())?;
    let model = model.as_ref();
    // Long enough for the kernels of large products.
    let batch = batch(VOCABULARY, &[60, 40], &mut Seed::new(5).generator())?;
    for name in ROUNDED.into_iter().chain(WIDENED) {
        let weights = weights(model, name)?;
        choose(Arithmetic::Portable);
        let ((loss, gradients), state) = (step(model, &weights, &batch)?, hidden(model, &weights, false)?);
        let exact = hidden(model, &weights, true)?;
        choose(Arithmetic::Native);
        let (native_loss, native_gradients) = step(model, &weights, &batch)?;
        let gap = (native_loss - loss).abs();
        assert!(gap < 1e-5, "{name}: losses differ by {gap:e}");
        for (param, gradient) in gradients.iter() {
            let gap = difference(native_gradients.get(param).expect("a gradient"), gradient)?;
            assert!(gap < 1e-5, "{name}: gradients of {param} differ by {gap:e}");
        }
        let gap = difference(&hidden(model, &weights, false)?, &state)?;
        assert!(gap < 2e-5, "{name}: without a cache, hidden states differ by {gap:e}");
        let gap = difference(&hidden(model, &weights, true)?, &exact)?;
        if WIDENED.contains(&name) {
            assert!(gap < 2e-5, "{name}: with a cache, hidden states differ by {gap:e}");
            continue;
        }
        // The greatest difference of any number. Measured: 0.15 for q4_0, of normalised states.
        assert!((1e-4..0.4).contains(&gap), "{name}: with a cache, hidden states differ by {gap:e}");
        // The plain code is the reference: each vector kernel answers with its tokens, step by step.
        limit(Level::Scalar);
        let expected = answers(model, &weights, 1)?;
        for level in Level::ALL {
            limit(level);
            for batch_size in [1, 5] {
                assert_eq!(
                    answers(model, &weights, batch_size)?,
                    expected,
                    "{name}, {level:?}, {batch_size} at a time"
                );
            }
        }
    }
    choose(Arithmetic::Portable);
    let [portable, native] = [Arithmetic::Portable, Arithmetic::Native].map(|kind| identity(kind, DeviceChoice::Cpu));
    assert!(native.ends_with(" int8") && !portable.contains("int8"), "{portable}, {native}");
    Ok(())
}
