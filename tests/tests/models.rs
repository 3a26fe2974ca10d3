//! Every architecture: gradients of every parameter against finite differences, an independent forward pass, and
//! decoding that depends on neither the cache nor the batch.

use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use candle_transformers::models::llama as reference;
use serde_json::Value;
use titer_core::data::Tokens;
use titer_core::generate::{Decoding, greedy};
use titer_core::rng::Seed;
use titer_core::step::Streams;
use titer_core::{Forward, Model, Sites, Traced, Weights};
use titer_tests::{adapt, batch, build, context, difference, loss, values, variants};

fn random(config: &Value, dtype: DType) -> Result<(Box<dyn Model>, Weights)> {
    let model = build(config)?;
    let weights = Weights::random(model.as_ref(), Seed::new(1), dtype, &Device::Cpu)?;
    Ok((model, weights))
}

/// Every trainable parameter has a gradient, and it is the slope of the loss along a random direction through all of
/// them and along each parameter's own largest component.
fn check_gradients(name: &str, model: &dyn Model, weights: &Weights) -> Result<()> {
    let batch = batch(23, &[7, 4], &mut Seed::new(5).generator())?;
    let mut streams = Streams::default();
    let found = context(model, weights, &mut streams).backward(&batch, Sites::none())?.grads;
    let excused = model.without_gradient();
    for (param, var) in weights.trainable() {
        if excused.iter().any(|(name, _)| name == param) {
            continue;
        }
        let gradient = values(found.get(param).with_context(|| format!("{name}: {param} gets no gradient"))?)?;
        let (largest, slope) = gradient
            .iter()
            .enumerate()
            .max_by(|a, b| a.1.abs().total_cmp(&b.1.abs()))
            .with_context(|| format!("{param} is empty"))?;
        assert!(*slope != 0., "{name}: the gradient of {param} is zero");
        let start = var.as_tensor().copy()?;
        let moved = |by: f64| -> Result<f64> {
            let mut point = values(&start)?;
            point[largest] += by;
            var.set(&Tensor::from_vec(point, var.shape(), &Device::Cpu)?.to_dtype(var.dtype())?)?;
            loss(model, weights, &batch, Sites::none())
        };
        let step = 1e-5;
        let numeric = (moved(step)? - moved(-step)?) / (2. * step);
        var.set(&start)?;
        let gap = (slope - numeric).abs() / (slope.abs() + 1e-4);
        assert!(gap < 1e-5, "{name}: {param}[{largest}]: analytic {slope}, numeric {numeric}");
    }
    Ok(())
}

#[test]
fn every_parameter_gets_the_right_gradient() -> Result<()> {
    for (name, config) in variants() {
        let (model, mut weights) = random(&config, DType::F64)?;
        weights.train_full()?;
        assert_eq!(weights.trainable().len(), model.params().iter().count());
        check_gradients(name, model.as_ref(), &weights)?;
    }
    Ok(())
}

#[test]
fn every_adapter_gets_the_right_gradient() -> Result<()> {
    for (name, config) in variants() {
        let (model, mut weights) = random(&config, DType::F64)?;
        adapt(&mut weights, 0.)?;
        assert_eq!(weights.trainable().len(), 2 * 7 * model.spec().layers);
        check_gradients(name, model.as_ref(), &weights)?;
    }
    Ok(())
}

#[test]
fn every_site_gives_the_right_gradient() -> Result<()> {
    for (name, config) in variants() {
        let (model, weights) = random(&config, DType::F64)?;
        let batch = batch(23, &[7, 4], &mut Seed::new(5).generator())?;
        let mut sites = Sites::none().probe(model.sites()).observe(model.sites());
        let hidden = model.hidden(&batch.tokens, &mut Forward::new(&weights, &mut sites))?;
        sites.check_visited()?;
        assert_eq!(hidden.tensor().dims(), [2, 7, 16]);
        for site in model.sites() {
            let direction = titer_core::rng::randn(&[2, 7, 16], &mut Seed::new(6).generator(), &Device::Cpu)?;
            let direction = direction.to_dtype(DType::F64)?;
            assert_eq!(sites.observed()[&site].tensor().dims(), direction.dims(), "{name}: {site}");
            let moved = |by: f64| -> Result<f64> {
                let sites = Sites::none().add([(site.clone(), (&direction * by)?)]);
                loss(model.as_ref(), &weights, &batch, sites)
            };
            let numeric = (moved(1e-6)? - moved(-1e-6)?) / 2e-6;
            let mut streams = Streams::default();
            let mut cx = context(model.as_ref(), &weights, &mut streams);
            let pass = cx.site_gradients(&batch, Sites::none().probe([site.clone()]))?;
            let gradient = pass.site_grads.get(&site).context("a site gradient")?;
            let analytic = (gradient * &direction)?.sum_all()?.to_scalar::<f64>()?;
            assert!((analytic - numeric).abs() < 1e-6 * (1. + analytic.abs()), "{name} {site}: {analytic} {numeric}");
        }
    }
    Ok(())
}

#[test]
fn logits_equal_those_of_candle_transformers() -> Result<()> {
    for (name, config) in variants() {
        if config["attention_bias"] == true {
            continue; // the reference has no biases
        }
        let (model, weights) = random(&config, DType::F32)?;
        let tensors = weights.named().map(|(name, matrix)| Ok((name.to_owned(), matrix.dense()?)));
        let tensors = tensors.collect::<Result<_>>()?;
        let builder = candle_nn::VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
        let config: reference::LlamaConfig = serde_json::from_value(with_defaults(&config))?;
        let config = config.into_config(false);
        let llama = reference::Llama::load(builder, &config)?;
        let ids: Vec<u32> = vec![3, 1, 4, 1, 5, 9, 2, 6, 5];
        let tokens = Tokens::pad(&[ids.as_slice()], 0, &Device::Cpu)?;
        let mut sites = Sites::none();
        let mut pass = Forward::new(&weights, &mut sites);
        let hidden = model.hidden(&tokens, &mut pass)?;
        let ours = model.logits(&hidden.reshape(((), 16))?, &mut pass)?.tensor().clone();
        for end in 1..=ids.len() {
            let mut cache = reference::Cache::new(false, DType::F32, &config, &Device::Cpu)?;
            let theirs = llama.forward(&Tensor::new(&ids[..end], &Device::Cpu)?.reshape((1, end))?, 0, &mut cache)?;
            let gap = difference(&ours.narrow(0, end - 1, 1)?, &theirs)?;
            assert!(gap < 1e-4, "{name}, position {end}: logits differ by {gap:.1e}");
        }
    }
    Ok(())
}

/// The keys that the reference insists on.
fn with_defaults(config: &Value) -> Value {
    let mut config = config.clone();
    let map = config.as_object_mut().expect("a table");
    for (key, value) in [("rope_theta", 10000.0.into()), ("tie_word_embeddings", false.into())] {
        map.entry(key).or_insert(value);
    }
    config
}

#[test]
fn decoding_depends_on_neither_cache_nor_batch() -> Result<()> {
    for (name, config) in variants() {
        let (model, mut weights) = random(&config, DType::F32)?;
        adapt(&mut weights, 0.)?;
        let prompts: Vec<Vec<u32>> =
            [5usize, 2, 9, 1, 5, 7].iter().map(|&n| (0..n).map(|i| ((i * 7 + n * 3) % 23) as u32).collect()).collect();
        let eos = 5;
        let plain: Vec<Vec<u32>> =
            prompts.iter().map(|prompt| without_cache(model.as_ref(), &weights, prompt, eos)).collect::<Result<_>>()?;
        assert!(plain.iter().any(|answer| answer.len() == 12), "{name}: some answer is cut");
        for batch_size in 1..=prompts.len() {
            let decoding = Decoding { max_new_tokens: 12, batch_size, eos, pad: 0 };
            let batched = greedy(model.as_ref(), &weights, &prompts, &decoding, |_| Ok(()))?;
            assert_eq!(batched, plain, "{name}, batches of {batch_size}");
        }
        let merged = greedy(
            model.as_ref(),
            &weights.merged()?,
            &prompts,
            &Decoding { max_new_tokens: 12, batch_size: 4, eos, pad: 0 },
            |_| Ok(()),
        )?;
        assert_eq!(merged, plain, "{name}, adapter merged");
    }
    Ok(())
}

/// Greedy decoding the slow way: the whole text anew for each token.
fn without_cache(model: &dyn Model, weights: &Weights, prompt: &[u32], eos: u32) -> Result<Vec<u32>> {
    let mut text = prompt.to_vec();
    while text.len() < prompt.len() + 12 {
        let tokens = Tokens::pad(&[text.as_slice()], 0, &Device::Cpu)?;
        let mut sites = Sites::none();
        let mut pass = Forward::new(weights, &mut sites);
        let hidden = model.hidden(&tokens, &mut pass)?.tensor().get(0)?;
        let last = Traced::constant(hidden.narrow(0, text.len() - 1, 1)?);
        let logits = values(model.logits(&last, &mut pass)?.tensor())?;
        let best = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).context("a vocabulary")?.0 as u32;
        if best == eos {
            break;
        }
        text.push(best);
    }
    Ok(text.split_off(prompt.len()))
}
