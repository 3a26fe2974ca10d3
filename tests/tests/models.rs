//! Every architecture: gradients of every parameter against finite differences, an independent forward pass, and
//! decoding that depends on neither the cache nor the batch.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result};
use candle_core::{DType, Device, IndexOp, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::{gemma, gemma2, llama, mistral, phi3, qwen2, qwen3};
use serde_json::{Value, json};
use titer_core::data::{Batch, Tokens};
use titer_core::defense::Streams;
use titer_core::model::generate::{Continuation, Decoding, Finish, greedy, sample};
use titer_core::rng::Seed;
use titer_core::weights::checkpoint::Checkpoint;
use titer_core::weights::{HEAD, LoraConfig, Role};
use titer_core::{Forward, Model, Sites, Traced, Weights};
use titer_tests::{adapt, batch, build, context, difference, values, variants};

fn random(config: &Value, dtype: DType) -> Result<(Box<dyn Model>, Weights)> {
    let model = build(config)?;
    let weights = Weights::random(model.params(), Seed::new(1), dtype, &Device::Cpu)?;
    Ok((model, weights))
}

/// The loss of `batch` with these sites, and nothing differentiated but them.
fn loss(model: &dyn Model, weights: &Weights, batch: &Batch, sites: Sites) -> Result<f64> {
    Ok(context(model, weights, &mut Streams::default()).site_gradients(batch, sites)?.loss.value()?)
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
        let linears = model.params().iter().filter(|param| param.role == Role::Linear);
        assert_eq!(weights.trainable().len(), 2 * linears.count());
        check_gradients(name, model.as_ref(), &weights)?;
    }
    Ok(())
}

/// Targets that are left out are the model's own; those that are named must exist.
#[test]
fn adapters_follow_the_architecture() -> Result<()> {
    let llama = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"].as_slice();
    let opt = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"].as_slice();
    let phi3 = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"];
    for (which, own, foreign) in [
        ("llama", llama, "fc1"),
        ("mistral", llama, "fc1"),
        ("qwen2", llama, "fc1"),
        ("qwen3", llama, "fc1"),
        ("gemma 3", llama, "fc1"),
        ("phi 3", phi3.as_slice(), "q_proj"),
        ("opt", opt, "o_proj"),
    ] {
        let config = variants().into_iter().find(|(name, _)| *name == which).context("a variant")?.1;
        let (_, mut weights) = random(&config, DType::F32)?;
        let named = LoraConfig { target_modules: Some(vec![foreign.to_owned()]), ..LoraConfig::default() };
        let error = weights.train_lora(&named, Seed::new(2)).expect_err(foreign);
        assert!(error.to_string().contains(&format!("`{foreign}` matches no linear layer")), "{error}");
        assert_eq!(error.place("key"), Some("lora.target_modules"));
        weights.train_lora(&LoraConfig::default(), Seed::new(2))?;
        let targets = weights.lora().and_then(|lora| lora.target_modules.clone()).context("an adapter")?;
        assert_eq!(targets, own);
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
        assert_eq!(hidden.tensor().dims(), [11, 16]);
        for site in model.sites() {
            let direction = titer_core::rng::randn(&[11, 16], &mut Seed::new(6).generator(), &Device::Cpu)?;
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

/// What a model declares about blocks is what its Hugging Face names say.
#[test]
fn parameters_belong_to_the_blocks_in_their_names() -> Result<()> {
    let named = |name: &str| -> Option<usize> {
        let (_, rest) = name.split_once(".layers.")?;
        rest.split('.').next()?.parse().ok()
    };
    for (variant, config) in variants() {
        let (model, mut weights) = random(&config, DType::F32)?;
        for param in model.params().iter() {
            assert_eq!(param.block, named(&param.name), "{variant}: {}", param.name);
        }
        adapt(&mut weights, 0.)?;
        let blocks = weights.blocks();
        for name in weights.trainable().keys() {
            assert_eq!(blocks.get(name).copied(), named(name), "{variant}: {name}");
        }
    }
    Ok(())
}

/// The last logits of a sequence by another implementation.
type Reference = Box<dyn FnMut(&Tensor) -> Result<Tensor>>;

/// The model of candle-transformers with these weights; `None` for what it cannot express.
fn reference(config: &Value, weights: &Weights) -> Result<Option<Reference>> {
    let tensors = weights.named().map(|(name, matrix)| Ok((name.to_owned(), matrix.dense()?)));
    let builder = VarBuilder::from_tensors(tensors.collect::<Result<_>>()?, DType::F32, &Device::Cpu);
    let mut config = with_defaults(config);
    // A token sees `window` tokens including itself; there it sees one more.
    if let Some(window) = config["sliding_window"].as_u64() {
        config["sliding_window"] = (window - 1).into();
    }
    Ok(match config["model_type"].as_str() {
        // There without biases.
        Some("llama") if config["attention_bias"] != true => {
            let config = serde_json::from_value::<llama::LlamaConfig>(config)?.into_config(false);
            let model = llama::Llama::load(builder, &config)?;
            Some(Box::new(move |ids| {
                let mut cache = llama::Cache::new(false, DType::F32, &config, &Device::Cpu)?;
                Ok(model.forward(ids, 0, &mut cache)?)
            }))
        }
        Some("mistral") => {
            let mut model = mistral::Model::new(&serde_json::from_value(config)?, builder)?;
            Some(Box::new(move |ids| {
                model.clear_kv_cache();
                Ok(model.forward(ids, 0)?.i((.., 0))?)
            }))
        }
        Some("qwen3") => {
            let more = json!({
                "attention_bias": false, "use_sliding_window": false, "max_window_layers": 0, "hidden_act": "silu"
            });
            let mut model = qwen3::ModelForCausalLM::new(&serde_json::from_value(with(config, more))?, builder)?;
            Some(Box::new(move |ids| {
                model.clear_kv_cache();
                Ok(model.forward(ids, 0)?.i((.., 0))?)
            }))
        }
        // There the window is in every block, whatever the configuration says.
        Some("qwen2") if config["use_sliding_window"] != true => {
            let more = json!({
                "sliding_window": IDS.len(), "max_window_layers": 0, "use_sliding_window": false, "hidden_act": "silu"
            });
            let mut model = qwen2::ModelForCausalLM::new(&serde_json::from_value(with(config, more))?, builder)?;
            Some(Box::new(move |ids| {
                model.clear_kv_cache();
                Ok(model.forward(ids, 0)?.i((.., 0))?)
            }))
        }
        Some("gemma") => {
            let more = json!({ "attention_bias": false, "hidden_activation": "gelu_pytorch_tanh" });
            let mut model = gemma::Model::new(false, &serde_json::from_value(with(config, more))?, builder)?;
            Some(Box::new(move |ids| {
                model.clear_kv_cache();
                Ok(model.forward(ids, 0)?.i((.., 0))?)
            }))
        }
        // There the window is in every block, and scores are scaled by the width of a head.
        Some("gemma2") if config["sliding_window"].is_null() => {
            let more = json!({ "attention_bias": false, "hidden_activation": "gelu_pytorch_tanh" });
            let mut model = gemma2::Model::new(false, &serde_json::from_value(with(config, more))?, builder)?;
            Some(Box::new(move |ids| {
                model.clear_kv_cache();
                Ok(model.forward(ids, 0)?.i((.., 0))?)
            }))
        }
        // There without a window.
        Some("phi3") if config["sliding_window"].is_null() => {
            let config = serde_json::from_value(with(config, json!({ "hidden_act": "silu" })))?;
            let mut model = phi3::Model::new(&config, builder)?;
            Some(Box::new(move |ids| {
                model.clear_kv_cache();
                Ok(model.forward(ids, 0)?.i((.., 0))?)
            }))
        }
        _ => None,
    })
}

/// A configuration with more keys.
fn with(mut config: Value, more: Value) -> Value {
    config.as_object_mut().expect("a table").extend(more.as_object().expect("a table").clone());
    config
}

#[test]
fn logits_equal_those_of_candle_transformers() -> Result<()> {
    let mut compared = BTreeSet::new();
    for (name, config) in variants() {
        let (model, weights) = random(&config, DType::F32)?;
        let Some(mut reference) = reference(&config, &weights)? else { continue };
        compared.insert(config["model_type"].clone().to_string());
        let ours = logits(model.as_ref(), &weights, &[&IDS])?.remove(0);
        for end in 1..=IDS.len() {
            let theirs = reference(&Tensor::new(&IDS[..end], &Device::Cpu)?.reshape((1, end))?)?;
            let gap = difference(&ours.narrow(0, end - 1, 1)?, &theirs)?;
            assert!(gap < 1e-4, "{name}, position {end}: logits differ by {gap:.1e}");
        }
    }
    // OPT is not among its models; the test below writes it down once more. Its Gemma 3 fails on the host: its cache wants
    // tensors without gaps, and does not get them.
    assert_eq!(compared.len(), 7, "{compared:?}");
    Ok(())
}

const IDS: [u32; 9] = [3, 1, 4, 1, 5, 9, 2, 6, 5];

/// Logits `[length, vocabulary]` of each row.
fn logits(model: &dyn Model, weights: &Weights, rows: &[&[u32]]) -> Result<Vec<Tensor>> {
    let tokens = Tokens::new(rows, &Device::Cpu)?;
    let mut sites = Sites::none();
    let mut pass = Forward::new(weights, &mut sites);
    let hidden = model.hidden(&tokens, &mut pass)?;
    let logits = model.logits(&hidden, &mut pass)?.tensor().clone();
    Ok(tokens.ranges().map(|row| logits.narrow(0, row.start, row.len())).collect::<candle_core::Result<_>>()?)
}

/// OPT written down once more from its paper's code: candle's tensor operations, one row, whole matrices of scores.
#[test]
fn logits_of_opt_equal_the_composed_form() -> Result<()> {
    for (name, config) in variants().into_iter().filter(|(_, config)| config["model_type"] == "opt") {
        let (model, mut weights) = random(&config, DType::F64)?;
        // Fresh norms and biases are ones and zeros, and would hide a mistake.
        weights.train_full()?;
        for (name, var) in weights.trainable() {
            let noise = titer_core::rng::randn(var.dims(), &mut Seed::new(3).named(name).generator(), &Device::Cpu)?;
            var.set(&(var.as_tensor() + (noise.to_dtype(DType::F64)? * 0.1)?)?)?;
        }
        let ours = logits(model.as_ref(), &weights, &[&IDS, &IDS[2..6]])?;
        for (row, ids) in [&IDS[..], &IDS[2..6]].into_iter().enumerate() {
            let gap = difference(&ours[row], &composed_opt(&config, &weights, ids)?)?;
            assert!(gap < 1e-9, "{name}, row {row}: logits differ by {gap:.1e}");
        }
    }
    Ok(())
}

fn composed_opt(config: &Value, weights: &Weights, ids: &[u32]) -> Result<Tensor> {
    let named = weights.named().map(|(name, matrix)| Ok((name, matrix.dense()?)));
    let tensors: BTreeMap<&str, Tensor> = named.collect::<Result<_>>()?;
    let get = |name: &str| tensors.get(format!("model.decoder.{name}").as_str());
    let linear = |x: &Tensor, name: &str| -> Result<Tensor> {
        let y = x.matmul(&get(&format!("{name}.weight")).context("a weight")?.t()?)?;
        Ok(get(&format!("{name}.bias")).map_or(Ok(y.clone()), |bias| y.broadcast_add(bias))?)
    };
    let norm = |x: &Tensor, name: &str| -> Result<Tensor> {
        let centred = x.broadcast_sub(&x.mean_keepdim(1)?)?;
        let scaled = centred.broadcast_div(&(centred.sqr()?.mean_keepdim(1)? + 1e-5)?.sqrt()?)?;
        let [weight, bias] = ["weight", "bias"].map(|part| get(&format!("{name}.{part}")));
        Ok(scaled.broadcast_mul(weight.context("a scale")?)?.broadcast_add(bias.context("a shift")?)?)
    };
    let (length, before) = (ids.len(), config["do_layer_norm_before"] != false);
    let mut x = get("embed_tokens.weight").context("a table")?.index_select(&Tensor::new(ids, &Device::Cpu)?, 0)?;
    if get("project_in.weight").is_some() {
        x = linear(&x, "project_in")?;
    }
    x = (x + get("embed_positions.weight").context("a table")?.narrow(0, 2, length)?)?;
    let future = (0..length * length).map(|at| if at % length > at / length { f64::NEG_INFINITY } else { 0. });
    let future = Tensor::from_iter(future, &Device::Cpu)?.reshape((length, length))?;
    for layer in 0..2 {
        let at = |name: &str| format!("layers.{layer}.{name}");
        let y = if before { norm(&x, &at("self_attn_layer_norm"))? } else { x.clone() };
        let [q, k, v] = ["q_proj", "k_proj", "v_proj"].map(|name| linear(&y, &at(&format!("self_attn.{name}"))));
        let (q, k, v) = ((q? * 0.5)?, k?, v?);
        let head = |head: usize| -> Result<Tensor> {
            let [q, k, v] = [&q, &k, &v].map(|x| x.narrow(1, head * 4, 4)?.contiguous());
            let scores = (q?.matmul(&k?.t()?)? + &future)?;
            Ok(candle_nn::ops::softmax(&scores, 1)?.matmul(&v?)?)
        };
        let heads = (0..4).map(head).collect::<Result<Vec<_>>>()?;
        x = (x + linear(&Tensor::cat(&heads, 1)?, &at("self_attn.out_proj"))?)?;
        x = if before { x } else { norm(&x, &at("self_attn_layer_norm"))? };
        let y = if before { norm(&x, &at("final_layer_norm"))? } else { x.clone() };
        let y = linear(&y, &at("fc1"))?;
        let y = if config["activation_function"] == "gelu" { y.gelu_erf()? } else { y.relu()? };
        x = (x + linear(&y, &at("fc2"))?)?;
        x = if before { x } else { norm(&x, &at("final_layer_norm"))? };
    }
    if before {
        x = norm(&x, "final_layer_norm")?;
    }
    if get("project_out.weight").is_some() {
        x = linear(&x, "project_out")?;
    }
    let head = tensors.get("lm_head.weight").or_else(|| get("embed_tokens.weight")).context("a head")?;
    Ok(x.matmul(&head.t()?)?)
}

/// A sequence may be as long as the model has positions, and one token more is an error that says so.
#[test]
fn a_sequence_beyond_the_positions_is_an_error() -> Result<()> {
    for (name, config) in variants() {
        let (model, weights) = random(&config, DType::F32)?;
        let row = vec![1; model.spec().max_positions + 1];
        assert!(logits(model.as_ref(), &weights, &[&row[1..], &[1]])?[0].sum_all()?.to_scalar::<f32>()?.is_finite());
        let error = logits(model.as_ref(), &weights, &[&row]).expect_err(name).to_string();
        assert!(error.contains("exceeds the model's 32 positions"), "{name}: {error}");
    }
    Ok(())
}

/// A checkpoint of the bare model, as OPT's own are, loads too.
#[test]
fn a_checkpoint_without_the_leading_model_loads() -> Result<()> {
    let config = variants().into_iter().find(|(name, _)| *name == "opt").context("a variant")?.1;
    let (model, weights) = random(&config, DType::F32)?;
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("model.safetensors");
    let bare = |name: &str| name.trim_start_matches("model.").to_owned();
    let tensors = weights.named().map(|(name, matrix)| Ok((bare(name), matrix.dense()?)));
    candle_core::safetensors::save(&tensors.collect::<Result<std::collections::HashMap<_, _>>>()?, &path)?;
    let loaded = Weights::load(model.params(), &mut Checkpoint::open(&path)?, DType::F32, &Device::Cpu)?;
    for ((name, ours), (_, theirs)) in loaded.named().zip(weights.named()) {
        assert!(difference(&ours.dense()?, &theirs.dense()?)? == 0., "{name}");
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
        let whole: Vec<Vec<u32>> =
            prompts.iter().map(|prompt| without_cache(model.as_ref(), &weights, prompt)).collect::<Result<_>>()?;
        // A token that ends some answers and not others.
        let ended = |eos: u32| whole.iter().filter(|answer| answer.contains(&eos)).count();
        let eos = (0..23).find(|&eos| (1..whole.len()).contains(&ended(eos)));
        let eos = eos.with_context(|| format!("{name}: all answers are made of the same tokens"))?;
        let until = |answer: &Vec<u32>| answer.iter().copied().take_while(|&token| token != eos).collect::<Vec<_>>();
        let plain: Vec<Vec<u32>> = whole.iter().map(until).collect();
        for batch_size in 1..=prompts.len() {
            let decoding = Decoding { max_new_tokens: 12, batch_size, ends: vec![eos] };
            let batched = greedy(model.as_ref(), &weights, &prompts, &decoding, |_| Ok(()))?;
            assert_eq!(tokens_of(batched), plain, "{name}, batches of {batch_size}");
        }
        let merged = greedy(
            model.as_ref(),
            &weights.merged()?,
            &prompts,
            &Decoding { max_new_tokens: 12, batch_size: 4, ends: vec![eos] },
            |_| Ok(()),
        )?;
        assert_eq!(tokens_of(merged), plain, "{name}, adapter merged");
    }
    Ok(())
}

/// What all prompts begin with is computed once, and the answers are those of prompts asked by themselves.
#[test]
fn prompts_with_a_common_beginning_are_answered_as_without_it() -> Result<()> {
    for (name, config) in variants() {
        let (model, mut weights) = random(&config, DType::F32)?;
        adapt(&mut weights, 0.)?;
        let prompt = |n: usize| {
            let own = (0..n).map(|i| ((i * 5 + n * 3) % 23) as u32);
            (0..17).map(|i| (i * 7 % 23) as u32).chain(own).collect::<Vec<_>>()
        };
        // One of them is nothing but the beginning.
        let prompts = [3, 0, 4, 1].map(prompt);
        let alone: Vec<Vec<u32>> =
            prompts.iter().map(|prompt| without_cache(model.as_ref(), &weights, prompt)).collect::<Result<_>>()?;
        for batch_size in 1..=prompts.len() {
            let decoding = Decoding { max_new_tokens: 12, batch_size, ends: Vec::new() };
            let together = greedy(model.as_ref(), &weights, &prompts, &decoding, |_| Ok(()))?;
            assert_eq!(tokens_of(together), alone, "{name}, batches of {batch_size}");
        }
    }
    Ok(())
}

#[test]
fn any_of_the_end_tokens_ends_an_answer() -> Result<()> {
    let (model, mut weights) = random(&variants()[0].1, DType::F32)?;
    adapt(&mut weights, 0.)?;
    let answer = |ends: Vec<u32>| -> Result<Continuation> {
        let decoding = Decoding { max_new_tokens: 12, batch_size: 1, ends };
        let mut answers = greedy(model.as_ref(), &weights, &[vec![3, 5, 7]], &decoding, |_| Ok(()))?;
        answers.pop().context("an answer")
    };
    let whole = answer(Vec::new())?;
    assert_eq!((whole.tokens.len(), whole.finish), (12, Finish::Length));
    let absent = (0..23).find(|id| !whole.tokens.contains(id)).context("a token that is not used")?;
    for (at, &token) in whole.tokens.iter().enumerate() {
        let first = whole.tokens.iter().position(|&other| other == token).unwrap_or(at);
        for ends in [vec![token], vec![absent, token], vec![token, absent]] {
            let ended = answer(ends)?;
            assert_eq!(ended, Continuation { tokens: whole.tokens[..first].to_vec(), finish: Finish::Stop });
        }
    }
    Ok(())
}

/// One broken logit among many gives no answer, whether or not its token would be picked.
#[test]
fn logits_that_are_not_finite_give_no_answer() -> Result<()> {
    let (model, mut weights) = random(&variants()[0].1, DType::F32)?;
    weights.train_full()?;
    let prompt = vec![3, 5, 7];
    let decoding = Decoding { max_new_tokens: 4, batch_size: 1, ends: Vec::new() };
    let answers = || {
        let greedy = greedy(model.as_ref(), &weights, std::slice::from_ref(&prompt), &decoding, |_| Ok(()));
        let sampled = sample(model.as_ref(), &weights, &prompt, &decoding, (1., 0.9, 0));
        [greedy.map(|mut answers| answers.remove(0)), sampled]
    };
    assert!(answers().iter().all(|answer| answer.as_ref().is_ok_and(|answer| answer.tokens.len() == 4)));
    let head = &weights.trainable()[&format!("{HEAD}.weight")];
    let start = values(head.as_tensor())?;
    // Both signs of infinity: that of the logit depends on the hidden state too.
    for broken in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        for token in [0, 11, 22] {
            let mut numbers = start.clone();
            numbers[token * model.spec().hidden_size] = broken;
            head.set(&Tensor::from_vec(numbers, head.shape(), &Device::Cpu)?.to_dtype(DType::F32)?)?;
            for answer in answers() {
                let error = answer.err().with_context(|| format!("{broken} for token {token} is answered"))?;
                assert!(error.to_string().contains("logits are not finite"), "{error}");
            }
        }
    }
    Ok(())
}

#[test]
fn a_prompt_that_is_too_long_leaves_the_others_answered() -> Result<()> {
    for (name, config) in variants() {
        let (model, mut weights) = random(&config, DType::F32)?;
        adapt(&mut weights, 0.)?;
        let positions = model.spec().max_positions;
        let prompt = |length: usize| (0..length).map(|i| (i * 7 % 23) as u32).collect::<Vec<u32>>();
        // The last of four tokens is not fed to the model.
        let prompts = [prompt(4), prompt(positions - 2), prompt(positions - 3), prompt(positions + 9), prompt(6)];
        let fit = [true, false, true, false, true];
        let decoding = |batch_size| Decoding { max_new_tokens: 4, batch_size, ends: Vec::new() };
        for batch_size in [1, 5] {
            let mut told = Vec::new();
            let answers = greedy(model.as_ref(), &weights, &prompts, &decoding(batch_size), |done| {
                told.push(done);
                Ok(())
            })?;
            for ((answer, prompt), fits) in answers.iter().zip(&prompts).zip(fit) {
                let alone = if fits {
                    greedy(model.as_ref(), &weights, std::slice::from_ref(prompt), &decoding(1), |_| Ok(()))?.remove(0)
                } else {
                    Continuation { tokens: Vec::new(), finish: Finish::TooLong }
                };
                assert_eq!(*answer, alone, "{name}, a prompt of {} tokens", prompt.len());
                assert_eq!(answer.finish == Finish::Length, fits);
            }
            assert_eq!(told, [3, 4, 5], "{name}: those that are too long are done at once");
        }
    }
    Ok(())
}

fn tokens_of(answers: Vec<Continuation>) -> Vec<Vec<u32>> {
    answers.into_iter().map(|answer| answer.tokens).collect()
}

/// Twelve greedy tokens the slow way: the whole text anew for each.
fn without_cache(model: &dyn Model, weights: &Weights, prompt: &[u32]) -> Result<Vec<u32>> {
    let mut text = prompt.to_vec();
    while text.len() < prompt.len() + 12 {
        let tokens = Tokens::new(&[text.as_slice()], &Device::Cpu)?;
        let mut sites = Sites::none();
        let mut pass = Forward::new(weights, &mut sites);
        let hidden = model.hidden(&tokens, &mut pass)?.tensor().clone();
        let last = Traced::constant(hidden.narrow(0, text.len() - 1, 1)?);
        let logits = values(model.logits(&last, &mut pass)?.tensor())?;
        text.push(logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).context("a vocabulary")?.0 as u32);
    }
    Ok(text.split_off(prompt.len()))
}
