//! Bases stored in fewer bits than f32: what is computed equals what a dense model of the same numbers computes, an
//! adapter merged into them stays whole, and they take the memory that they promise.

use anyhow::Result;
use candle_core::{DType, Device};
use serde_json::{Value, json};
use titer::disk::write_tensors;
use titer_core::defense::Streams;
use titer_core::model::generate::{Decoding, greedy};
use titer_core::model::label_loss;
use titer_core::rng::Seed;
use titer_core::weights::checkpoint::Checkpoint;
use titer_core::weights::{LoraConfig, Role};
use titer_core::{Forward, Model, Precision, Sites, Weights};
use titer_tests::cli::{run, small, stderr, titer};
use titer_tests::{adapt, batch, build, context, difference};

const NAMES: [&str; 7] = ["f16", "bf16", "q8_0", "q6k", "q4_1", "q4k", "q4_0"];

/// Rows of 256, which every kind of block divides.
fn config(changes: Value) -> Value {
    let mut config = json!({
        "model_type": "llama", "vocab_size": 23, "hidden_size": 256, "intermediate_size": 512,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32,
    });
    config.as_object_mut().expect("a table").extend(changes.as_object().expect("a table").clone());
    config
}

fn configs() -> Vec<Value> {
    let changes =
        [json!({}), json!({ "tie_word_embeddings": true }), json!({ "attention_bias": true, "mlp_bias": true })];
    changes.into_iter().map(config).collect()
}

fn random(model: &dyn Model, name: &str) -> Result<Weights> {
    Ok(Weights::random(model.params(), Seed::new(1), Precision::parse(name)?, &Device::Cpu)?)
}

/// The numbers that `weights` stand for, in f32, by way of a file.
fn widened(model: &dyn Model, weights: &Weights) -> Result<Weights> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("model.safetensors");
    write_tensors(&path, weights.base_tensors()?)?;
    Ok(Weights::load(model.params(), &mut Checkpoint::open(&path)?, DType::F32, &Device::Cpu)?)
}

#[test]
fn gradients_and_losses_equal_those_of_a_dense_model_of_the_same_numbers() -> Result<()> {
    let batch = batch(23, &[7, 4], &mut Seed::new(5).generator())?;
    for config in configs() {
        let model = build(&config)?;
        for name in NAMES {
            let mut packed = random(model.as_ref(), name)?;
            assert_eq!(packed.activation_dtype(), DType::F32);
            let mut dense = widened(model.as_ref(), &packed)?;
            for ((name, a), (_, b)) in packed.named().zip(dense.named()) {
                assert_eq!(difference(&a.dense()?, &b.dense()?)?, 0., "{name}");
            }
            adapt(&mut packed, 0.)?;
            adapt(&mut dense, 0.)?;
            for checkpointing in [false, true] {
                let pass = |weights: &Weights| {
                    let mut streams = Streams::default();
                    let mut cx = context(model.as_ref(), weights, &mut streams).with_checkpointing(checkpointing);
                    cx.backward(&batch, Sites::none())
                };
                let (ours, theirs) = (pass(&packed)?, pass(&dense)?);
                let gap = (ours.loss.value()? - theirs.loss.value()?).abs();
                assert!(gap < 1e-5, "{name}: losses differ by {gap:e}");
                assert_eq!(ours.grads.len(), theirs.grads.len());
                for (param, gradient) in ours.grads.iter() {
                    let gap = difference(gradient, theirs.grads.get(param).expect("a gradient"))?;
                    assert!(gap < 1e-5, "{name}: gradients of {param} differ by {gap:e}");
                }
            }
        }
    }
    Ok(())
}

#[test]
fn the_candle_form_of_the_loss_reads_a_packed_head() -> Result<()> {
    let batch = batch(23, &[7, 4], &mut Seed::new(5).generator())?;
    let model = build(&config(json!({})))?;
    let mut weights = random(model.as_ref(), "q8_0")?;
    adapt(&mut weights, 0.)?;
    let mut streams = Streams::default();
    let mut cx = context(model.as_ref(), &weights, &mut streams);
    let expected = cx.backward(&batch, Sites::none())?;
    let (hidden, _) = cx.hidden(&batch.tokens, Sites::none())?;
    let loss = cx.cross_entropy(&hidden, &batch)?;
    let found = cx.backward_loss(&loss)?;
    assert!((f64::from(loss.to_scalar::<f32>()?) - expected.loss.value()?).abs() < 1e-6);
    for (name, gradient) in expected.grads.iter() {
        assert!(difference(gradient, found.get(name).expect("a gradient"))? < 1e-6, "{name}");
    }
    Ok(())
}

#[test]
fn losses_are_near_those_of_f32() -> Result<()> {
    let model = build(&config(json!({})))?;
    let batches = (0..16)
        .map(|seed| batch(23, &[7, 4], &mut Seed::new(seed).generator()))
        .collect::<titer_core::Result<Vec<_>>>()?;
    let losses = |name: &str| -> Result<Vec<f64>> {
        let weights = random(model.as_ref(), name)?;
        batches.iter().map(|batch| Ok(label_loss(model.as_ref(), &weights, batch)?)).collect()
    };
    let exact = losses("f32")?;
    // Mean errors over the batches, measured: 1.3e-4, 1.3e-3, 2.9e-3, 1.2e-2, 0.054, 0.046 nats; the limits are about twice
    // that.
    for (name, limit) in NAMES.into_iter().zip([3e-4, 3e-3, 6e-3, 2.4e-2, 0.11, 0.1]) {
        let errors = losses(name)?.iter().zip(&exact).map(|(ours, exact)| (ours - exact).abs()).sum::<f64>();
        let error = errors / batches.len() as f64;
        assert!(error > 0. && error < limit, "{name}: off by {error:e}");
    }
    Ok(())
}

#[test]
fn a_merged_adapter_loses_nothing() -> Result<()> {
    let batch = batch(23, &[7, 4], &mut Seed::new(5).generator())?;
    let model = build(&config(json!({})))?;
    for name in NAMES {
        let mut weights = random(model.as_ref(), name)?;
        adapt(&mut weights, 0.)?;
        let hidden = |weights: &Weights| -> Result<_> {
            let mut sites = Sites::none();
            Ok(model.hidden(&batch.tokens, &mut Forward::new(weights, &mut sites))?.tensor().clone())
        };
        let (before, base) = (hidden(&weights)?, weights.merged()?);
        let gap = difference(&before, &hidden(&base)?)?;
        assert!(gap < 2e-5, "{name}: {gap:e}");
        // A second adapter on top, as in double LoRA, and what a file keeps of both.
        weights.merge()?;
        weights.train_lora(&LoraConfig::default(), Seed::new(9))?;
        assert!(difference(&before, &hidden(&weights)?)? < 2e-5, "{name}: a fresh adapter changes nothing");
        weights.discard_adapter();
        adapt(&mut weights, 0.)?;
        let twice = hidden(&weights)?;
        weights.merge()?;
        assert!(difference(&twice, &hidden(&weights)?)? < 5e-5, "{name}: merged twice");
        assert!(difference(&twice, &hidden(&widened(model.as_ref(), &weights)?)?)? < 5e-5, "{name}: from a file");
        assert!(difference(&before, &twice)? > 1e-2, "{name}: the second adapter does something");
    }
    Ok(())
}

#[test]
fn blocks_come_back_from_a_file_as_they_were() -> Result<()> {
    let model = build(&config(json!({})))?;
    for name in ["bf16", "q8_0", "q4_0"] {
        let (weights, folder) = (random(model.as_ref(), name)?, tempfile::tempdir()?);
        let path = folder.path().join("model.safetensors");
        write_tensors(&path, weights.base_tensors()?)?;
        let precision = Precision::parse(name)?;
        let again = Weights::load(model.params(), &mut Checkpoint::open(&path)?, precision, &Device::Cpu)?;
        assert_eq!(again.precision(), precision);
        assert_eq!(again.bytes(), weights.bytes());
        for ((param, a), (_, b)) in weights.named().zip(again.named()) {
            assert_eq!(difference(&a.dense()?, &b.dense()?)?, 0., "{name}: {param}");
        }
    }
    Ok(())
}

#[test]
fn answers_equal_those_of_a_dense_model_of_the_same_numbers() -> Result<()> {
    let model = build(&config(json!({})))?;
    let prompts: Vec<Vec<u32>> = [5u32, 2, 9].iter().map(|&n| (0..n).map(|i| (i * 7 + n * 3) % 23).collect()).collect();
    let decoding = Decoding { max_new_tokens: 10, batch_size: 2, ends: Vec::new() };
    for name in NAMES {
        let mut packed = random(model.as_ref(), name)?;
        let mut dense = widened(model.as_ref(), &packed)?;
        adapt(&mut packed, 0.)?;
        adapt(&mut dense, 0.)?;
        packed.merge()?;
        let answers = |weights| greedy(model.as_ref(), weights, &prompts, &decoding, |_| Ok(()));
        assert_eq!(answers(&packed)?, answers(&dense)?, "{name}");
    }
    Ok(())
}

#[test]
fn stored_bytes_are_what_the_format_says() -> Result<()> {
    let model = build(&config(json!({})))?;
    let count = |keep: &dyn Fn(&titer_core::weights::Param) -> bool| -> usize {
        model.params().iter().filter(|param| keep(param)).map(|param| param.shape.iter().product::<usize>()).sum()
    };
    let blocks = count(&|param| param.role == Role::Linear);
    let vectors = count(&|param| param.shape.len() < 2);
    let rest = model.params().count() - blocks - vectors;
    assert!(blocks > 0 && rest == 2 * 23 * 256, "the embedding and the head");
    for (name, size, block) in
        [("bf16", 2, 1), ("q8_0", 34, 32), ("q4_1", 20, 32), ("q4_0", 18, 32), ("q6k", 210, 256), ("q4k", 144, 256)]
    {
        let expected = blocks / block * size + 2 * rest + 4 * vectors;
        assert_eq!(random(model.as_ref(), name)?.bytes(), expected, "{name}");
    }
    Ok(())
}

#[test]
fn what_cannot_be_is_an_error_that_says_so() -> Result<()> {
    let model = build(&config(json!({})))?;
    for name in NAMES {
        let error = random(model.as_ref(), name)?.train_full().expect_err("frozen").to_string();
        assert!(error.contains(name) && error.contains("f32"), "{error}");
    }
    let odd = build(&config(json!({ "intermediate_size": 272 })))?;
    let error = random(odd.as_ref(), "q8_0").expect_err("half a block").to_string();
    assert!(error.contains("down_proj") && error.contains("272") && error.contains("q8_0"), "{error}");
    assert!(random(odd.as_ref(), "bf16").is_ok());
    let output = titer().args(["bench", "step", "--model", "quickstart", "--dtype", "q5"]).output()?;
    assert_eq!(output.status.code(), Some(2));
    for name in NAMES {
        assert!(stderr(&output).contains(name), "{}", stderr(&output));
    }
    let folder = tempfile::tempdir()?;
    let mut command = run(folder.path(), &small(folder.path(), &[]));
    let output = command.args(["--set", "dtype=bf16", "--set", "fine_tune.mode=full"]).output()?;
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("stored as bf16 are frozen"), "{}", stderr(&output));
    Ok(())
}

#[test]
fn the_whole_pipeline_runs_on_blocks() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let config = small(
        folder.path(),
        &[
            ("checkpoint_seconds = 0.0", "checkpoint_seconds = 60.0\ndtype = \"q4_0\"\ndevice = \"cpu\""),
            ("hidden_size = 16, intermediate_size = 24", "hidden_size = 32, intermediate_size = 64"),
        ],
    );
    let output = run(folder.path(), &config).output()?;
    assert!(output.status.success(), "{}", stderr(&output));
    Ok(())
}
