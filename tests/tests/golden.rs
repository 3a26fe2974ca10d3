//! The reference trainers, step by step: losses, site gradients, perturbations, gradients and weights.
//!
//! The traces were recorded from the published trainers, unmodified. The test reads every folder under `TITER_GOLDEN`
//! (by default the full set beside the checkout, if it is there) and always the committed subset; a trace it does not
//! understand is a failure, unless its method or architecture is on the not-yet list below, which is printed.

#![allow(clippy::print_stdout, reason = "a test says what it left out")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use candle_core::{DType, Device, Tensor};
use serde_json::Value;
use titer_core::checkpoint::Checkpoint;
use titer_core::data::Batch;
use titer_core::generate::{Decoding, greedy};
use titer_core::model::sites_of_kind;
use titer_core::optim::{AdamW, AdamWConfig, Schedule};
use titer_core::rng::Seed;
use titer_core::step::{Clock, StepCx, Streams, label_loss};
use titer_core::weights::LoraConfig;
use titer_core::{AlignmentDefense, Forward, Grads, Model, ModelEntry, Pass, Scalar, Sites, Update, Weights, registry};
use titer_plugins::defenses::random_perturbation::{Measure, RandomPerturbation};
use titer_plugins::defenses::sft::Sft;
use titer_plugins::defenses::vaccine::{Norm, Vaccine};

/// Reference trainers that Titer has no counterpart of yet: repository and class.
const METHODS_NOT_YET: [(&str, &str); 12] = [
    ("", "FITrainer"),
    ("", "KLTrainer"),
    ("", "VlguardTrainer"),
    ("", "BoosterAlignmentTrainer"),
    ("", "RepNoiseTrainer"),
    ("", "rep_noise_loss"),
    ("", "LDIFSTrainer"),
    ("", "LisaTrainer"),
    ("", "prune_with_FI"),
    ("", "prune_wanda_outlier"),
    ("T-Vaccine", "BaseTrainer"),
    ("T-Vaccine", "VaccineTrainer"),
];

/// `model_type`s that Titer does not read yet.
const ARCHITECTURES_NOT_YET: [&str; 6] = ["qwen2", "mistral", "gemma", "gemma2", "phi", "phi3"];

fn trace_folders() -> Vec<PathBuf> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let full = std::env::var_os("TITER_GOLDEN").map_or_else(|| here.join("../../shared/golden/traces"), PathBuf::from);
    let mut roots = vec![here.join("golden")];
    if full.is_dir() {
        roots.push(full);
    } else {
        assert!(std::env::var_os("TITER_GOLDEN").is_none(), "TITER_GOLDEN names no folder: {}", full.display());
    }
    let folders = roots.iter().flat_map(|root| std::fs::read_dir(root).expect("a folder of traces"));
    let mut folders: Vec<PathBuf> = folders.map(|entry| entry.expect("an entry").path()).collect();
    folders
        .retain(|folder| folder.is_dir() && !folder.file_name().is_some_and(|n| n.to_string_lossy().starts_with('_')));
    folders.sort();
    folders
}

#[test]
fn traces_of_the_reference_trainers_are_reproduced() {
    let (mut failures, mut passed) = (Vec::new(), 0);
    for folder in trace_folders() {
        let name = folder.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        match check_folder(&folder) {
            Ok(Outcome::Reproduced(worst)) => {
                passed += 1;
                println!("{name:32} {worst}");
            }
            Ok(Outcome::NotYet(why)) => println!("{name:32} not yet: {why}"),
            Err(error) => failures.push(format!("{name}: {error:#}")),
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    assert!(passed >= 4, "only {passed} traces were checked");
}

enum Outcome {
    Reproduced(String),
    NotYet(String),
}

fn check_folder(folder: &Path) -> Result<Outcome> {
    let (trace, golden) = (folder.join("trace.json"), folder.join("golden.json"));
    if golden.is_file() {
        let info = read_json(&golden)?;
        let model = info["model"].as_str().context("golden.json names no model")?;
        let base = folder.join("../_models").join(model);
        return match architecture(&base.join("config.json"))? {
            Ok(model) => check_forward(folder, &base, model.as_ref()).map(Outcome::Reproduced),
            Err(why) => Ok(Outcome::NotYet(why)),
        };
    }
    ensure!(trace.is_file(), "neither trace.json nor golden.json");
    let info = read_json(&trace)?;
    let class = info["reference"]["cls"].as_str().context("the trace names no reference class")?;
    let repository = info["reference"]["repo"].as_str().context("the trace names no repository")?;
    let not_yet = |(place, known): &&(&str, &str)| repository.contains(place) && class.contains(known);
    if let Some((_, known)) = METHODS_NOT_YET.iter().find(not_yet) {
        return Ok(Outcome::NotYet(format!("method {known}")));
    }
    let file = |key: &str| -> Result<PathBuf> {
        Ok(folder.join(info["files"][key].as_str().with_context(|| format!("the trace has no file `{key}`"))?))
    };
    match architecture(&file("config")?)? {
        Ok(model) => Replay::new(&info, model, class, &file)?.run().map(Outcome::Reproduced),
        Err(why) => Ok(Outcome::NotYet(why)),
    }
}

fn read_json(path: &Path) -> Result<Value> {
    let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    Ok(serde_json::from_str(&text)?)
}

/// The registered model that reads this `config.json`, or why there is none yet.
fn architecture(path: &Path) -> Result<Result<Box<dyn Model>, String>> {
    let config = read_json(path)?;
    let kind = config["model_type"].as_str().context("config.json has no model_type")?;
    match registry::all::<ModelEntry>()?.into_iter().find(|entry| entry.model_types.contains(&kind)) {
        Some(entry) => Ok(Ok((entry.from_config)(&config, path)?)),
        None if ARCHITECTURES_NOT_YET.contains(&kind) => Ok(Err(format!("architecture {kind}"))),
        None => bail!("unknown architecture {kind}"),
    }
}

/// The largest difference of two tensors, relative to the largest value of the second.
fn relative(ours: &Tensor, theirs: &Tensor) -> Result<f64> {
    ensure!(ours.dims() == theirs.dims(), "shapes {:?} and {:?}", ours.dims(), theirs.dims());
    let (ours, theirs) = (flat(ours)?, flat(theirs)?);
    let largest = theirs.iter().fold(0f64, |max, value| max.max(value.abs()));
    Ok(difference(&ours, &theirs) / largest.max(1e-12))
}

fn flat(tensor: &Tensor) -> Result<Vec<f64>> {
    Ok(tensor.to_dtype(DType::F64)?.flatten_all()?.to_vec1()?)
}

fn difference(ours: &[f64], theirs: &[f64]) -> f64 {
    ours.iter()
        .zip(theirs)
        .fold(0., |max, (a, b)| f64::max(max, if (a - b).is_nan() { f64::INFINITY } else { (a - b).abs() }))
}

/// Keeps the worst difference of each kind, and fails on one beyond its tolerance.
#[derive(Default)]
struct Worst(BTreeMap<&'static str, f64>);

impl Worst {
    fn note(&mut self, kind: &'static str, value: f64, tolerance: f64, place: &str) -> Result<()> {
        ensure!(value <= tolerance, "{kind} at {place}: differs by {value:.2e}, allowed {tolerance:.0e}");
        let worst = self.0.entry(kind).or_default();
        *worst = worst.max(value);
        Ok(())
    }

    fn show(&self) -> String {
        self.0.iter().map(|(kind, value)| format!("{kind} {value:.1e}")).collect::<Vec<_>>().join("  ")
    }
}

/// Relative tolerance on losses, activations and gradients.
const TOLERANCE: f64 = 1e-4;
/// Absolute tolerance on weights: AdamW turns a relative error of a tiny gradient into one of up to the learning rate.
const WEIGHTS: f64 = 1e-5;

enum Method {
    Sft,
    Vaccine(Vaccine),
    Random(RandomPerturbation),
}

struct Replay<'a> {
    info: &'a Value,
    model: Box<dyn Model>,
    method: Method,
    weights: Weights,
    /// A second copy, which gets the reference's own gradients: the optimiser alone.
    shadow: Weights,
    trace: Checkpoint,
    batches: Checkpoint,
}

impl<'a> Replay<'a> {
    fn new(
        info: &'a Value,
        model: Box<dyn Model>,
        class: &str,
        file: &impl Fn(&str) -> Result<PathBuf>,
    ) -> Result<Self> {
        let rho = || info["hyper"]["rho"].as_f64().context("the trace has no rho");
        let method = match class.rsplit('.').next().unwrap_or(class) {
            "Trainer" => Method::Sft,
            "VaccineTrainer" | "BaseTrainer" => Method::Vaccine(Vaccine { rho: rho()?, norm: Norm::Batch, every: 1 }),
            "RandomVaccineTrainer" => Method::Random(RandomPerturbation { rho: rho()?, measure: Measure::Variance }),
            other => bail!("the reference class {other} is not understood"),
        };
        let start = || -> Result<Weights> {
            let mut base = Checkpoint::open(&file("base")?)?;
            let mut weights = Weights::load(model.as_ref(), &mut base, DType::F32, &Device::Cpu)?;
            let config = lora_config(&read_json(&file("lora_config")?)?)?;
            weights.continue_lora(&config, &mut Checkpoint::open(&file("lora_init")?)?)?;
            Ok(weights)
        };
        let (weights, shadow) = (start()?, start()?);
        let (trace, batches) = (Checkpoint::open(&file("trace")?)?, Checkpoint::open(&file("batches")?)?);
        Ok(Self { info, model, method, weights, shadow, trace, batches })
    }

    fn run(mut self) -> Result<String> {
        let optimizer = &self.info["optimizer"];
        let number = |key: &str| optimizer[key].as_f64().with_context(|| format!("the optimizer has no {key}"));
        ensure!(optimizer["schedule"] == "constant", "schedule {}", optimizer["schedule"]);
        let betas = [optimizer["betas"][0].as_f64(), optimizer["betas"][1].as_f64()];
        let config = AdamWConfig {
            betas: betas.map(|beta| beta.expect("two betas")),
            eps: number("eps")?,
            weight_decay: number("weight_decay")?,
        };
        let (rate, clip) = (number("lr")?, optimizer["max_grad_norm"].as_f64());
        let (mut adamw, mut fed) = (AdamW::new(config), AdamW::new(config));
        let mut worst = Worst::default();
        let steps = self.info["steps"].as_array().context("the trace has no steps")?;
        ensure!(!steps.is_empty(), "the trace has no steps");
        for (step, record) in steps.iter().enumerate() {
            let grads = self.step(step, record, clip, &mut worst)?;
            let theirs = self.read_all(&format!("step{step}.grad."))?;
            ensure!(theirs.len() == grads.len(), "{} gradients, the reference has {}", grads.len(), theirs.len());
            for (name, theirs) in theirs.iter() {
                let ours = grads.get(name).with_context(|| format!("no gradient for {name}"))?;
                worst.note("grad", relative(ours, theirs)?, TOLERANCE, &format!("step {step} {name}"))?;
            }
            adamw.step(&self.weights, &grads, &Scalar::from(1.), rate)?;
            fed.step(&self.shadow, &theirs, &Scalar::from(1.), rate)?;
            for (kind, weights, tolerance) in
                [("lora", &self.weights, WEIGHTS), ("lora of their grads", &self.shadow, 1e-6)]
            {
                for (name, var) in weights.trainable() {
                    let theirs = self.trace.read(&format!("step{step}.lora.base_model.model.{name}"), &Device::Cpu)?;
                    let gap = difference(&flat(var.as_tensor())?, &flat(&theirs)?);
                    worst.note(kind, gap, tolerance, &format!("step {step} {name}"))?;
                }
            }
        }
        Ok(worst.show())
    }

    /// The gradients of one optimiser step, compared on the way.
    fn step(&mut self, step: usize, record: &Value, clip: Option<f64>, worst: &mut Worst) -> Result<Grads> {
        let record_batches = record["batches"].as_object().context("the step names no batches")?;
        ensure!(record_batches.keys().all(|key| key.starts_with("inputs")), "batches {record_batches:?}");
        let names: Vec<&str> = record_batches
            .values()
            .flat_map(|value| value.as_array().map_or_else(|| vec![value], |many| many.iter().collect()))
            .map(|name| name.as_str().context("a batch has no name"))
            .collect::<Result<_>>()?;
        if names.len() != 1 {
            return self.accumulated_step(step, &names, worst);
        }
        let batch = read_batch(&mut self.batches, names[0])?;
        let (update, passes) = self.update((step, 0, 1), &batch, worst)?;
        let returned = record["returned_loss"].as_f64().context("no returned_loss")?;
        worst.note(
            "loss",
            (update.loss.value()? - returned).abs() / returned.abs(),
            TOLERANCE,
            &format!("step {step}"),
        )?;
        let theirs = record["loss_passes"].as_array().context("no loss_passes")?;
        ensure!(theirs.len() == passes.len(), "{} passes, the reference made {}", passes.len(), theirs.len());
        for (ours, theirs) in passes.iter().zip(theirs) {
            let theirs = theirs.as_f64().context("a loss is no number")?;
            worst.note("loss", (ours - theirs).abs() / theirs.abs(), TOLERANCE, &format!("step {step} passes"))?;
        }
        match clip {
            Some(limit) => {
                let (norm, factor) = (update.grads.norm()?.value()?, update.grads.clip_factor(limit)?);
                if let Some(theirs) = record["clip_total_norm"].as_f64() {
                    worst.note("clip norm", (norm - theirs).abs() / theirs, TOLERANCE, &format!("step {step}"))?;
                }
                Ok(update.grads.map(|grad| factor.times(grad))?)
            }
            None => Ok(update.grads),
        }
    }

    /// Gradient accumulation. The published Vaccine keeps the last micro batch only, a fault that Titer does not copy,
    /// so each micro batch is compared on its own, and the optimiser goes on with the reference's gradient.
    fn accumulated_step(&mut self, step: usize, names: &[&str], worst: &mut Worst) -> Result<Grads> {
        let mut before = Grads::default();
        for (micro, name) in names.iter().enumerate() {
            let batch = read_batch(&mut self.batches, name)?;
            let (update, _) = self.update((step, micro, names.len()), &batch, worst)?;
            let ours = update.grads.scale(1. / names.len() as f64)?;
            let after = self.read_all(&format!("step{step}.micro{micro}.grad."))?;
            ensure!(after.len() == ours.len(), "micro batch {micro} has {} gradients", after.len());
            let wiped = matches!(self.method, Method::Vaccine(_));
            let theirs = if wiped { after.clone() } else { after.clone().add_scaled(-1., &before)? };
            for (name, theirs) in theirs.iter() {
                let ours = ours.get(name).with_context(|| format!("no gradient for {name}"))?;
                worst.note("micro grad", relative(ours, theirs)?, TOLERANCE, &format!("step {step}.{micro} {name}"))?;
            }
            before = after;
        }
        self.read_all(&format!("step{step}.grad."))
    }

    /// The method's update for one batch, and the loss of each of its passes.
    fn update(
        &mut self,
        (step, micro, micros): (usize, usize, usize),
        batch: &Batch,
        worst: &mut Worst,
    ) -> Result<(Update, Vec<f64>)> {
        let clock = Clock { step, total: usize::MAX, micro };
        let mut streams = Streams::default();
        let mut cx = StepCx::new(self.model.as_ref(), &self.weights, &mut streams, Seed::new(0), clock);
        match &mut self.method {
            Method::Sft => {
                let update = Sft.step(&mut cx, batch)?;
                let loss = update.loss.value()?;
                Ok((update, vec![loss]))
            }
            Method::Vaccine(vaccine) => {
                let attention = sites_of_kind(self.model.as_ref(), "attn_out")?;
                let first = cx.site_gradients(batch, Sites::none().probe(attention.clone()))?;
                let perturbation = vaccine.perturbation(&first.site_grads)?;
                let pairs = [("attn_grad", &first.site_grads), ("perturb", &perturbation)];
                // Under accumulation the trace keeps one micro batch's only, so the micro gradients speak for all.
                for (kind, ours) in pairs.into_iter().filter(|_| micros == 1) {
                    for (layer, site) in attention.iter().enumerate() {
                        let key = format!("step{step}.{kind}.layers.{layer}");
                        let theirs = self.trace.read(&key, &Device::Cpu)?;
                        let ours = ours.get(site).context("a site gradient")?;
                        worst.note(kind, relative(ours, &theirs)?, TOLERANCE, &key)?;
                    }
                }
                let update = vaccine.step(&mut cx, batch)?;
                let passes = vec![first.loss.value()?, update.loss.value()?];
                Ok((update, passes))
            }
            Method::Random(random) => {
                // The recorded noise in place of the plugin's own.
                let attention = sites_of_kind(self.model.as_ref(), "attn_out")?;
                let noise = attention.into_iter().enumerate().map(|(layer, site)| {
                    Ok((site, self.trace.read(&format!("step{step}.randn.{layer}"), &Device::Cpu)?))
                });
                let noise: Grads = noise.collect::<Result<Vec<_>>>()?.into_iter().collect();
                let perturbation = random.perturbation(&noise, &batch.tokens.lengths)?;
                let pass: Pass = cx.backward(batch, Sites::none().add(perturbation))?;
                let loss = pass.loss.value()?;
                Ok((pass.into(), vec![loss]))
            }
        }
    }

    fn read_all(&mut self, prefix: &str) -> Result<Grads> {
        let names: Vec<String> =
            self.trace.names().filter(|name| name.starts_with(prefix)).map(str::to_owned).collect();
        let read = |name: String| -> Result<(String, Tensor)> {
            let tensor = self.trace.read(&name, &Device::Cpu)?;
            let short = name[prefix.len()..].trim_start_matches("base_model.model.").to_owned();
            Ok((short, tensor))
        };
        Ok(names.into_iter().map(read).collect::<Result<Vec<_>>>()?.into_iter().collect())
    }
}

/// A batch as recorded: labels of −100 are masked; position `t` predicts label `t + 1`.
fn read_batch(batches: &mut Checkpoint, name: &str) -> Result<Batch> {
    let mut read = |key: &str| read_ids(batches, &format!("{name}.{key}"));
    let (ids, labels, mask) = (read("input_ids")?, read("labels")?, read("attention_mask")?);
    let rows: Vec<Vec<u32>> = ids.iter().map(|row| row.iter().map(|&id| id as u32).collect()).collect();
    let labels = labels.iter().enumerate().flat_map(|(row, labels)| {
        let labels = labels.iter().enumerate().skip(1).filter(|&(_, &label)| label >= 0);
        labels.map(move |(at, &label)| (row, at - 1, label as u32))
    });
    let mut batch = Batch::with_labels(&rows, labels, 1, &Device::Cpu)?;
    batch.tokens.lengths = mask.iter().map(|row| row.iter().sum::<i64>() as usize).collect();
    Ok(batch)
}

fn read_ids(file: &mut Checkpoint, name: &str) -> Result<Vec<Vec<i64>>> {
    Ok(file.read(name, &Device::Cpu)?.to_dtype(DType::I64)?.to_vec2()?)
}

fn lora_config(adapter: &Value) -> Result<LoraConfig> {
    let targets = adapter["target_modules"].as_array().context("no target_modules")?;
    Ok(LoraConfig {
        r: adapter["r"].as_u64().context("no r")? as usize,
        alpha: adapter["lora_alpha"].as_f64().context("no lora_alpha")?,
        dropout: adapter["lora_dropout"].as_f64().context("no lora_dropout")? as f32,
        target_modules: Some(targets.iter().filter_map(|t| t.as_str().map(str::to_owned)).collect()),
    })
}

/// Logits, loss, hidden states and greedy continuations, with and without an adapter.
fn check_forward(folder: &Path, base: &Path, model: &dyn Model) -> Result<String> {
    let mut worst = Worst::default();
    let mut golden = Checkpoint::open(&folder.join("golden.safetensors"))?;
    let mut plain = Weights::load(model, &mut Checkpoint::open(base)?, DType::F32, &Device::Cpu)?;
    let batch = read_batch(&mut Checkpoint::open(&folder.join("../_data/batches.safetensors"))?, "safe.0")?;
    check_variant(model, &plain, "base", &batch, &mut golden, &mut worst)?;
    let adapter = base.join("lora_all");
    let config = lora_config(&read_json(&adapter.join("adapter_config.json"))?)?;
    plain.continue_lora(&config, &mut Checkpoint::open(&adapter.join("adapter_model.safetensors"))?)?;
    check_variant(model, &plain, "lora", &batch, &mut golden, &mut worst)?;
    plain.merge()?;
    check_variant(model, &plain, "lora", &batch, &mut golden, &mut worst)?;
    Ok(worst.show())
}

fn check_variant(
    model: &dyn Model,
    weights: &Weights,
    variant: &str,
    batch: &Batch,
    golden: &mut Checkpoint,
    worst: &mut Worst,
) -> Result<()> {
    let read = |golden: &mut Checkpoint, name: &str| golden.read(&format!("{variant}.{name}"), &Device::Cpu);
    let layers = model.spec().layers;
    let stream = |layer: usize| if layer == 0 { "embed".into() } else { format!("layer.{}.block_out", layer - 1) };
    let mut sites = Sites::none().observe((0..layers).map(stream));
    let hidden = model.hidden(&batch.tokens, &mut Forward::new(weights, &mut sites))?;
    let loss = label_loss(model, weights, batch)?;
    let theirs = read(golden, "loss.safe0")?.to_vec1::<f32>()?[0];
    worst.note("loss", (loss - f64::from(theirs)).abs() / f64::from(theirs), TOLERANCE, variant)?;
    let rows = hidden.reshape(((), model.spec().hidden_size))?;
    let logits = model.logits(&rows, &mut Forward::new(weights, &mut Sites::none()))?.tensor().clone();
    let (rows, length) = batch.tokens.dims();
    // Padding is seen by nobody, so what stands there is nobody's business.
    let real = |tensor: &Tensor| -> Result<Tensor> {
        let rows: Vec<Tensor> = (0..rows)
            .map(|row| tensor.get(row)?.narrow(0, 0, batch.tokens.lengths[row]))
            .collect::<candle_core::Result<_>>()?;
        Ok(Tensor::cat(&rows, 0)?)
    };
    let logits = real(&logits.reshape((rows, length, ()))?)?;
    worst.note("logits", relative(&logits, &real(&read(golden, "logits.safe0")?)?)?, TOLERANCE, variant)?;
    if variant == "lora" {
        for layer in 0..=layers {
            let ours = if layer == layers { &hidden } else { &sites.observed()[&stream(layer)] };
            let theirs = read(golden, &format!("hidden.{layer}.safe0"))?;
            worst.note(
                "hidden",
                relative(&real(ours.tensor())?, &real(&theirs)?)?,
                TOLERANCE,
                &format!("layer {layer}"),
            )?;
        }
    }
    check_generation(model, weights, variant, golden)
}

/// Sixteen greedy tokens: alone, in a batch of prompts of unequal length, and with an end-of-text token.
fn check_generation(model: &dyn Model, weights: &Weights, variant: &str, golden: &mut Checkpoint) -> Result<()> {
    let no_eos = u32::MAX;
    let eos = golden.read(&format!("{variant}.generate.eos_id"), &Device::Cpu)?.to_vec1::<i64>()?[0] as u32;
    for (input, output, eos) in
        [("single", "single", no_eos), ("leftpad", "leftpad", no_eos), ("leftpad", "leftpad_eos", eos)]
    {
        let width = golden.read(&format!("input.{input}"), &Device::Cpu)?.dim(1)?;
        let theirs = read_ids(golden, &format!("{variant}.generate.{output}"))?;
        let prompts = read_ids(golden, &format!("input.{input}"))?;
        // The reference pads on the left with id 1, which no prompt contains.
        let prompts: Vec<Vec<u32>> =
            prompts.iter().map(|row| row.iter().skip_while(|&&id| id == 1).map(|&id| id as u32).collect()).collect();
        for batch_size in [1, 2, prompts.len()] {
            let decoding = Decoding { max_new_tokens: 16, batch_size, eos, pad: 1 };
            let ours = greedy(model, weights, &prompts, &decoding, |_| Ok(()))?;
            for (ours, theirs) in ours.iter().zip(&theirs) {
                let theirs = theirs[width..].iter().map(|&id| id as u32).take_while(|&id| id != eos && id != 1);
                ensure!(ours.iter().copied().eq(theirs), "{variant} {output}: {ours:?}");
            }
        }
    }
    Ok(())
}

#[test]
fn schedules_are_those_of_the_reference() -> Result<()> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let schedules = read_json(&here.join("golden/_data/lr_schedules.json"))?;
    let schedules = schedules.as_object().context("a table")?;
    assert!(schedules.len() >= 4);
    for (name, schedule) in schedules {
        let kind: Schedule = serde_json::from_value(schedule["kind"].clone())?;
        let number = |key: &str| schedule[key].as_u64().with_context(|| format!("{name} has no {key}"));
        let (warmup, total) = (number("warmup_steps")? as usize, number("total_steps")? as usize);
        let base = schedule["base_lr"].as_f64().context("no base_lr")?;
        for (step, rate) in schedule["lr_at_step"].as_array().context("no rates")?.iter().enumerate() {
            let (ours, theirs) = (base * kind.factor(step, warmup, total), rate.as_f64().context("a rate")?);
            assert!((ours - theirs).abs() <= 1e-9 * base, "{name} step {step}: {ours} and {theirs}");
        }
    }
    Ok(())
}
