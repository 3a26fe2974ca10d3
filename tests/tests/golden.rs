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
use serde_json::{Value, json};
use titer_core::data::{Batch, Stream};
use titer_core::defense::{Clock, Orphan, StepCx, Streams};
use titer_core::model::generate::{Decoding, greedy};
use titer_core::model::label_loss;
use titer_core::model::sites_of_kind;
use titer_core::optim::{AdamW, AdamWConfig, Schedule};
use titer_core::rng::Seed;
use titer_core::weights::LoraConfig;
use titer_core::weights::checkpoint::Checkpoint;
use titer_core::{
    AlignmentDefense, Forward, Grads, Model, ModelEntry, Pass, Scalar, Sites, StageCx, Update, Weights, registry,
};
use titer_plugins::defenses::antidote::{Antidote, Padding};
use titer_plugins::defenses::vaccine::Vaccine;
use titer_tests::defense;

/// `model_type`s that Titer does not read yet.
const ARCHITECTURES_NOT_YET: [&str; 4] = ["gemma", "gemma2", "phi", "phi3"];

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
    assert!(passed >= 8, "only {passed} traces were checked");
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
    let beside = |adapter: &str| adapter.replace("adapter_model.safetensors", "adapter_config.json");
    let file = |key: &str| -> Result<PathBuf> {
        let path = match (info["files"][key].as_str(), key) {
            (Some(path), _) => path,
            (None, "config") => &format!("../_models/{}/config.json", info["model"].as_str().unwrap_or_default()),
            (None, "trace") => "trace.safetensors",
            (None, "lora_config") => &beside(info["files"]["lora_init"].as_str().unwrap_or_default()),
            (None, _) => bail!("the trace has no file `{key}`"),
        };
        Ok(folder.join(path))
    };
    match architecture(&file("config")?)? {
        Ok(model) if class.contains("prune_") => {
            check_pruning(&info, model.as_ref(), class, &file).map(Outcome::Reproduced)
        }
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
/// Gradients within rounding of zero. Of their sign, AdamW with ε = 1e-8 makes an update of about the learning rate; such
/// elements (one in ten thousand) are compared by their gradients only.
const VANISHING: f64 = 2e-8;

/// The defense that stands for a reference class, and its settings in the published form.
fn counterpart(info: &Value, class: &str, repository: &str) -> Result<(&'static str, Value)> {
    let hyper = &info["hyper"];
    let number = |key: &str| hyper[key].as_f64().with_context(|| format!("the trace has no `{key}`"));
    let count = |key: &str| hyper[key].as_u64().with_context(|| format!("the trace has no `{key}`"));
    let (name, mut settings) = match class.rsplit('.').next().unwrap_or(class) {
        "Trainer" => ("sft", json!({})),
        "BaseTrainer" | "VaccineTrainer" if repository.contains("T-Vaccine") => (
            "t-vaccine",
            json!({
                "rho": number("rho")?,
                "layers": count("lisa_activated_layers")?,
                "sample_every": count("lisa_interval_steps")?,
                "probe_every": count("probability_steps")?,
            }),
        ),
        "VaccineTrainer" | "BaseTrainer" => ("vaccine", json!({ "rho": number("rho")? })),
        "RandomVaccineTrainer" => ("random-perturbation", json!({ "rho": number("rho")? })),
        "FITrainer" => ("ewc", json!({ "lambda": number("lamb")? })),
        "KLTrainer" => ("kl", json!({ "lambda": number("lamb")? })),
        "VlguardTrainer" => ("vlguard", json!({ "lambda": number("lamb")?, "algorithm": "weighted" })),
        "BoosterAlignmentTrainer" => {
            let rho = if hyper["perturb_aware"] == json!(true) { number("rho")? } else { 0. };
            ("booster", json!({ "lambda": number("lamb")?, "alpha": number("alpha")?, "rho": rho }))
        }
        "RepNoiseTrainer" => ("repnoise", json!({ "alpha": number("alpha")?, "beta": number("beta")? })),
        // The original computes in f32 throughout.
        "rep_noise_loss" => {
            ("repnoise", json!({ "alpha": number("alpha")?, "beta": number("beta")?, "half_precision": false }))
        }
        "LDIFSTrainer" => ("ldifs", json!({ "rho": number("rho")? })),
        "LisaTrainer" | "ADMMTrainer" => {
            let guided = hyper["guide_data_num"].as_u64() != Some(0);
            let align_steps = if guided { count("alignment_step")? } else { 0 };
            let settings = json!({
                "rho": number("rho")?, "align_steps": align_steps, "fine_tune_steps": count("finetune_step")?
            });
            ("lisa", settings)
        }
        other => bail!("the reference class {other} is not understood"),
    };
    settings["fidelity"] = json!("code-exact");
    Ok((name, settings))
}

/// The stream that a recorded batch comes from, by its key in the trace.
fn stream_of(key: &str) -> Option<&'static str> {
    // Micro batches may be numbered.
    match key.trim_end_matches(|c: char| c.is_ascii_digit() || c == '_') {
        "harmful" | "dangerous" => Some("harmful"),
        "alignment" | "fisher" => Some("safe"),
        _ => None,
    }
}

/// The names of the batches under a key: one, or one for each micro batch.
fn names(value: &Value) -> Result<Vec<String>> {
    let many = value.as_array().map_or_else(|| vec![value], |many| many.iter().collect());
    many.into_iter().map(|name| Ok(name.as_str().context("a batch has no name")?.to_owned())).collect()
}

/// Plays a trace again with the registered defense.
struct Replay<'a> {
    info: &'a Value,
    model: Box<dyn Model>,
    defense: Box<dyn AlignmentDefense>,
    streams: Streams,
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
        let repository = info["reference"]["repo"].as_str().unwrap_or_default();
        let (name, settings) = counterpart(info, class, repository)?;
        let defense = defense(name, settings)?;
        let (weights, shadow) = (start(model.as_ref(), file)?, start(model.as_ref(), file)?);
        let trace = file("trace").and_then(|path| Ok(Checkpoint::open(&path)?));
        let mut batches = Checkpoint::open(&file("batches")?)?;
        let streams = streams(info, &mut batches)?;
        Ok(Self { info, model, defense, streams, weights, shadow, trace: trace?, batches })
    }

    fn run(mut self) -> Result<String> {
        let mut worst = Worst::default();
        self.begin(&mut worst)?;
        let Some(optimizer) = self.info["optimizer"].as_object() else { return self.gradients_only(worst) };
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
        let mut vanishing: BTreeMap<String, Vec<usize>> = BTreeMap::new();
        let steps = self.info["steps"].as_array().context("the trace has no steps")?;
        ensure!(!steps.is_empty(), "the trace has no steps");
        for (step, record) in steps.iter().enumerate() {
            let (grads, micros) = self.step(step, record, clip, &mut worst)?;
            let theirs = self.read_all(&format!("step{step}.grad."))?;
            ensure!(theirs.len() == grads.len(), "{} gradients, the reference has {}", grads.len(), theirs.len());
            compare(&mut worst, "grad", &grads, &theirs, self.tolerance(), &format!("step {step}"))?;
            for (name, theirs) in theirs.iter() {
                let tiny = flat(theirs)?.into_iter().enumerate().filter(|(_, g)| *g != 0. && g.abs() <= VANISHING);
                vanishing.entry(name.to_owned()).or_default().extend(tiny.map(|(at, _)| at));
            }
            adamw.step(&self.weights, &grads, &Scalar::from(1.), rate)?;
            fed.step(&self.shadow, &theirs, &Scalar::from(1.), rate)?;
            let allowed = if micros > 1 { 5. * WEIGHTS } else { WEIGHTS };
            for (kind, weights, tolerance) in
                [("lora", &self.weights, allowed), ("lora of their grads", &self.shadow, 1e-6)]
            {
                for (name, var) in weights.trainable() {
                    let theirs = self.trace.read(&format!("step{step}.lora.base_model.model.{name}"), &Device::Cpu)?;
                    let (ours, theirs) = (flat(var.as_tensor())?, flat(&theirs)?);
                    let vanishing = vanishing.get(name).map_or(&[][..], Vec::as_slice);
                    let kept = |values: Vec<f64>| -> Vec<f64> {
                        let values = values.into_iter().enumerate();
                        values.filter(|(at, _)| !vanishing.contains(at)).map(|(_, value)| value).collect()
                    };
                    worst.note(
                        kind,
                        difference(&kept(ours), &kept(theirs)),
                        tolerance,
                        &format!("step {step} {name}"),
                    )?;
                }
            }
        }
        Ok(worst.show())
    }

    /// Rounding in the reference that no other implementation can follow exactly.
    fn tolerance(&self) -> f64 {
        if self.info["method"].as_str().is_some_and(|method| method.starts_with("repnoise")) { 2e-4 } else { TOLERANCE }
    }

    /// The preparation, at the weights that the reference prepared at.
    fn begin(&mut self, worst: &mut Worst) -> Result<()> {
        let (model, weights, streams) = (self.model.as_ref(), &mut self.weights, &mut self.streams);
        let (seed, clock) = (Seed::new(0), Clock::at(0, usize::MAX));
        self.defense.begin(&mut StageCx { model, weights, streams, seed, clock, ancestry: &Orphan })?;
        let state = self.defense.state();
        for (name, theirs) in self.read_all("step0.fisher.")?.iter() {
            let ours = state.tensors.get(&format!("fisher.{name}")).context("no Fisher information")?;
            worst.note("fisher", relative(ours, theirs)?, TOLERANCE, name)?;
        }
        let start = self.read_all("start_lora.")?;
        self.shadow.set(&start)?;
        Ok(self.weights.set(&start)?)
    }

    /// A trace of one step's loss and of some of its gradients.
    fn gradients_only(mut self, mut worst: Worst) -> Result<String> {
        let record = &self.info["steps"][0];
        let (update, losses) = self.update(&record["batches"]["harmless"], record, Clock::at(0, 1))?;
        self.check_losses(record, &update, &losses, 0, &mut worst)?;
        let theirs = ["step0.grad.", "grad."].map(|prefix| self.read_all(prefix));
        let theirs = theirs.into_iter().collect::<Result<Vec<_>>>()?.into_iter().find(|grads| !grads.is_empty());
        compare(&mut worst, "grad", &update.grads, &theirs.context("no gradient")?, self.tolerance(), "step 0")?;
        Ok(worst.show())
    }

    /// The gradients of one optimiser step, compared on the way, and the number of its micro batches.
    fn step(&mut self, step: usize, record: &Value, clip: Option<f64>, worst: &mut Worst) -> Result<(Grads, usize)> {
        let batches = record["batches"].as_object().context("the step names no batches")?;
        let offered = batches.iter().filter(|(key, _)| key.starts_with("inputs") || *key == "offered");
        let inputs = offered.map(|(_, value)| names(value)).collect::<Result<Vec<_>>>()?.concat();
        ensure!(!inputs.is_empty(), "the step names no batch");
        let (micros, share) = (inputs.len(), 1. / inputs.len() as f64);
        let mut sum = Grads::default();
        for (micro, name) in inputs.iter().enumerate() {
            if micros == 1 {
                self.check_sites(step, record, name, worst)?;
            }
            let clock = Clock { step, total: self.total() / micros, micro, micros };
            let (update, losses) = self.update(&json!(name), record, clock)?;
            // A method that clears what earlier micro batches gave has nothing to show before the last.
            let kept = !update.grads.is_empty();
            sum = sum.add_scaled(share, &update.grads)?;
            if micros == 1 {
                self.check_losses(record, &update, &losses, step, worst)?;
            } else if kept {
                let after = self.read_all(&format!("step{step}.micro{micro}.grad."))?;
                compare(worst, "micro grad", &sum, &after, self.tolerance(), &format!("step {step}.{micro}"))?;
            }
        }
        let Some(limit) = clip else { return Ok((sum, micros)) };
        let (norm, factor) = (sum.norm()?.value()?, sum.clip_factor(limit)?);
        if let Some(theirs) = record["clip_total_norm"].as_f64() {
            worst.note("clip norm", (norm - theirs).abs() / theirs, TOLERANCE, &format!("step {step}"))?;
        }
        Ok((sum.map(|grad| factor.times(grad))?, micros))
    }

    /// Micro batches in all, where the reference's arithmetic knows it.
    fn total(&self) -> usize {
        let hyper = |key: &str| self.info["hyper"][key].as_u64();
        let total = hyper("num_train_epochs").zip(hyper("train_batches_per_epoch")).map(|(a, b)| a * b);
        total.map_or(usize::MAX, |total| total as usize)
    }

    /// The defense's own step on the batch `name`, and the cross-entropies it took.
    fn update(&mut self, name: &Value, record: &Value, clock: Clock) -> Result<(Update, Vec<f64>)> {
        let name = name.as_str().context("a batch has no name")?;
        let batch = read_batch(&mut self.batches, name)?;
        let noise = self.noise(clock, record, &batch)?;
        let mut cx = StepCx::new(self.model.as_ref(), &self.weights, &mut self.streams, Seed::new(0), clock);
        cx = cx.with_noise(noise);
        let update = self.defense.step(&mut cx, &batch)?;
        let losses = cx.losses().iter().map(Scalar::value).collect::<titer_core::Result<_>>()?;
        Ok((update, losses))
    }

    /// The noise that the reference drew in this step. A recorded choice of layers becomes noise that makes it.
    fn noise(&mut self, clock: Clock, record: &Value, batch: &Batch) -> Result<Vec<Tensor>> {
        if let Some(active) = record["extra"]["active_layers"].as_array() {
            let layers = self.model.spec().layers;
            let far = |layer: usize| !active.contains(&json!(layer));
            let far: Vec<f32> = (0..2 * layers).map(|at| f32::from(u8::from(far(at % layers)))).collect();
            return Ok(vec![Tensor::from_vec(far, (2, layers), &Device::Cpu)?]);
        }
        let prefixes =
            [format!("step{}.micro{}.randn.", clock.step, clock.micro), format!("step{}.randn.", clock.step)];
        let recorded = |prefix: &str, index: usize| Some(format!("{prefix}{index}"));
        for prefix in prefixes {
            let names = (0..).map_while(|index| recorded(&prefix, index).filter(|name| self.trace.has(name)));
            let names: Vec<String> = names.collect();
            if !names.is_empty() {
                // RepNoise draws noise for padding, too.
                let padded = self.info["method"].as_str().is_some_and(|method| method.starts_with("repnoise"));
                let read = |name: &String| {
                    let noise = self.trace.read(name, &Device::Cpu)?;
                    if padded { Ok(noise) } else { real_rows(&noise, batch) }
                };
                return names.iter().map(read).collect();
            }
        }
        Ok(Vec::new())
    }

    fn check_losses(
        &self,
        record: &Value,
        update: &Update,
        ours: &[f64],
        step: usize,
        worst: &mut Worst,
    ) -> Result<()> {
        let mut note = |ours: f64, theirs: &Value| {
            let theirs = theirs.as_f64().context("a loss is no number")?;
            worst.note("loss", (ours - theirs).abs() / theirs.abs(), self.tolerance(), &format!("step {step}"))
        };
        note(update.loss.value()?, &record["returned_loss"])?;
        // The reference's list may begin with the losses of a preparation, and may leave out what it does not keep.
        let theirs = record["loss_passes"].as_array().map_or(&[][..], Vec::as_slice);
        if theirs.is_empty() {
            return Ok(());
        }
        ensure!(!ours.is_empty() && ours.len() <= theirs.len(), "{} passes, theirs {}", ours.len(), theirs.len());
        ours.iter().zip(&theirs[theirs.len() - ours.len()..]).try_for_each(|(ours, theirs)| note(*ours, theirs))
    }

    /// The gradients at the attention outputs and the perturbation, of the methods that perturb.
    fn check_sites(&mut self, step: usize, record: &Value, name: &str, worst: &mut Worst) -> Result<()> {
        let harmful = record["batches"].as_object().into_iter().flatten();
        let harmful = harmful.filter(|(key, _)| stream_of(key) == Some("harmful")).map(|(_, value)| names(value));
        let harmful = harmful.collect::<Result<Vec<_>>>()?.concat();
        let theirs = self.read_all(&format!("step{step}.harmful_grad."))?;
        if let Some(name) = harmful.first()
            && !theirs.is_empty()
        {
            let ours = self.pass(name, false)?.grads;
            compare(worst, "harmful grad", &ours, &theirs, TOLERANCE, &format!("step {step}"))?;
        }
        for (kind, name) in [("dangerous_attn_grad", harmful.first()), ("attn_grad", Some(&name.to_owned()))] {
            let theirs = self.read_layers(&format!("step{step}.{kind}."))?;
            let Some(name) = name.filter(|_| !theirs.is_empty()) else { continue };
            let batch = read_batch(&mut self.batches, name)?;
            let real = |theirs: Grads| -> Result<Grads> {
                theirs.iter().map(|(site, tensor)| Ok((site.to_owned(), real_rows(tensor, &batch)?))).collect()
            };
            let theirs = real(theirs)?;
            let ours = self.pass(name, true)?.site_grads.restrict(|site| theirs.get(site).is_some());
            compare(worst, "site grad", &ours, &theirs, TOLERANCE, &format!("step {step} {kind}"))?;
            let perturbation = self.read_layers(&format!("step{step}.perturb."))?;
            if kind == "attn_grad" && !perturbation.is_empty() {
                let rho = self.info["hyper"]["rho"].as_f64().context("the trace has no rho")?;
                let ours = Vaccine { rho, ..Vaccine::default() }.perturbation(&ours, &batch.tokens)?;
                compare(worst, "perturb", &ours, &real(perturbation)?, TOLERANCE, &format!("step {step}"))?;
            }
        }
        Ok(())
    }

    /// A plain pass over a recorded batch, outside the defense.
    fn pass(&mut self, name: &str, probe: bool) -> Result<Pass> {
        let batch = read_batch(&mut self.batches, name)?;
        let mut none = Streams::default();
        let mut cx = StepCx::new(self.model.as_ref(), &self.weights, &mut none, Seed::new(0), Clock::at(0, 1));
        let sites = if probe { sites_of_kind(self.model.as_ref(), "attn_out")? } else { Vec::new() };
        Ok(cx.backward(&batch, Sites::none().probe(sites))?)
    }

    fn read_all(&mut self, prefix: &str) -> Result<Grads> {
        read_all(&mut self.trace, prefix)
    }

    /// Tensors by layer (`layers.3`) under the names of the sites.
    fn read_layers(&mut self, prefix: &str) -> Result<Grads> {
        let site = |name: String| format!("{}.attn_out", name.replace("layers.", "layer."));
        Ok(self.read_all(prefix)?.into_iter().map(|(name, tensor)| (site(name), tensor)).collect())
    }
}

/// The weights that a trace starts from.
fn start(model: &dyn Model, file: &impl Fn(&str) -> Result<PathBuf>) -> Result<Weights> {
    let mut weights = Weights::load(model.params(), &mut Checkpoint::open(&file("base")?)?, DType::F32, &Device::Cpu)?;
    match file("lora_init") {
        Ok(adapter) => {
            let config = lora_config(&read_json(&file("lora_config")?)?)?;
            weights.continue_lora(&config, &mut Checkpoint::open(&adapter)?)?;
        }
        Err(_) => weights.train_full()?,
    }
    Ok(weights)
}

/// The tensors of a trace whose names begin with `prefix`, by the rest of the name.
fn read_all(trace: &mut Checkpoint, prefix: &str) -> Result<Grads> {
    let names: Vec<String> = trace.names().filter(|name| name.starts_with(prefix)).map(str::to_owned).collect();
    let read = |name: String| -> Result<(String, Tensor)> {
        let tensor = trace.read(&name, &Device::Cpu)?;
        let short = name[prefix.len()..].trim_start_matches("base_model.model.").to_owned();
        Ok((short, tensor))
    };
    Ok(names.into_iter().map(read).collect::<Result<Vec<_>>>()?.into_iter().collect())
}

/// Prunes as recorded, through the registered defense: the mask exactly, what the weights are scored with, the weights
/// and the logits afterwards.
fn check_pruning(
    info: &Value,
    model: &dyn Model,
    class: &str,
    file: &impl Fn(&str) -> Result<PathBuf>,
) -> Result<String> {
    let (mut worst, mut weights) = (Worst::default(), start(model, file)?);
    let (mut trace, mut recorded) = (Checkpoint::open(&file("trace")?)?, Checkpoint::open(&file("batches")?)?);
    let batches = calibration(&info["hyper"], &mut recorded)?;
    let (count, mut streams) = (batches.len(), Streams::default());
    streams.insert("harmful", Stream::of_batches(batches)?);
    let counted = Antidote { padding: Padding::Counted, ..Antidote::default() };
    let theirs = read_all(&mut trace, "scaler_row.")?;
    if !theirs.is_empty() {
        let mut cx = StepCx::new(model, &weights, &mut streams, Seed::new(0), Clock::at(0, 0));
        let ours = counted.input_means(&mut cx, "harmful", count)?;
        compare(&mut worst, "scaler row", &ours, &theirs, TOLERANCE, "calibration")?;
    }
    let score = match (class.contains("prune_with_FI"), info["hyper"]["sample_num"].as_u64()) {
        (true, _) => "gradient",
        (false, Some(0)) => "magnitude",
        (false, _) => "wanda",
    };
    let settings = json!({ "ratio": info["hyper"]["dense_ratio"], "score": score, "fidelity": "code-exact" });
    let (seed, clock, ancestry) = (Seed::new(0), Clock::at(0, 0), &Orphan);
    let cx = &mut StageCx { model, weights: &mut weights, streams: &mut streams, seed, clock, ancestry };
    defense("antidote", settings)?.finish(cx)?;
    let (pruned, masks) = (weights.snapshot()?, read_all(&mut trace, "mask.")?);
    compare(&mut worst, "pruned", &pruned, &read_all(&mut trace, "pruned_lora.")?, 0., "weights")?;
    ensure!(masks.len() == pruned.len(), "{} masks for {} weights", masks.len(), pruned.len());
    for (name, mask) in masks.iter() {
        let ours = pruned.get(name).with_context(|| format!("no weight {name}"))?;
        let removed = flat(ours)?.into_iter().map(|weight| f64::from(u8::from(weight == 0.)));
        ensure!(removed.eq(flat(mask)?), "the mask of {name} differs");
    }
    let batch = read_batch(&mut recorded, "user.0")?;
    let hidden = model.hidden(&batch.tokens, &mut Forward::new(&weights, &mut Sites::none()))?;
    let ours = model.logits(&hidden, &mut Forward::new(&weights, &mut Sites::none()))?;
    let theirs = real_rows(&trace.read("logits_after.user.0", &Device::Cpu)?, &batch)?;
    worst.note("logits", relative(ours.tensor(), &theirs)?, TOLERANCE, "user.0")?;
    Ok(worst.show())
}

/// The harmful batches that pruning was calibrated on, as the trace describes them in words: `harmful.0-2`, as they are
/// or row by row without padding.
fn calibration(hyper: &Value, recorded: &mut Checkpoint) -> Result<Vec<Batch>> {
    let words = hyper["calibration"].as_str().unwrap_or("harmful.0-0");
    let range = words.strip_prefix("harmful.").and_then(|rest| rest.split([' ', ',']).next());
    let (first, last) = range.and_then(|range| range.split_once('-')).unwrap_or(("0", "0"));
    let batches =
        (first.parse::<usize>()?..=last.parse()?).map(|index| read_batch(recorded, &format!("harmful.{index}")));
    let batches = batches.collect::<Result<Vec<_>>>()?;
    if !words.contains("pads stripped") {
        return Ok(batches);
    }
    Ok(batches.iter().map(Batch::rows).collect::<titer_core::Result<Vec<_>>>()?.concat())
}

/// The rows at real tokens of a tensor `[batch, length, ..]`. Padding is seen by nobody, so what stands there is nobody's
/// business.
fn real_rows(tensor: &Tensor, batch: &Batch) -> Result<Tensor> {
    let rows = batch.tokens.lengths.iter().enumerate().map(|(row, &length)| tensor.get(row)?.narrow(0, 0, length));
    Ok(Tensor::cat(&rows.collect::<candle_core::Result<Vec<_>>>()?, 0)?)
}

/// The second data sources of a trace, by the streams that a defense draws them from: its batches in their order.
fn streams(info: &Value, batches: &mut Checkpoint) -> Result<Streams> {
    let mut found: BTreeMap<&str, Vec<Batch>> = BTreeMap::new();
    for record in info["steps"].as_array().context("the trace has no steps")? {
        for (key, value) in record["batches"].as_object().context("the step names no batches")? {
            let aligning = key == "used" && record["extra"]["status"] == "alignment";
            if let Some(stream) = stream_of(key).or(aligning.then_some("safe")) {
                for name in names(value)? {
                    found.entry(stream).or_default().push(read_batch(batches, &name)?);
                }
            }
        }
    }
    let mut streams = Streams::default();
    for (name, batches) in found {
        streams.insert(name, Stream::of_batches(batches)?);
    }
    Ok(streams)
}

/// Compares every tensor that the reference has.
fn compare(
    worst: &mut Worst,
    kind: &'static str,
    ours: &Grads,
    theirs: &Grads,
    tolerance: f64,
    place: &str,
) -> Result<()> {
    ensure!(!theirs.is_empty(), "{place}: the reference has no {kind}");
    for (name, theirs) in theirs.iter() {
        let ours = ours.get(name).with_context(|| format!("{place}: no {kind} for {name}"))?;
        worst.note(kind, relative(ours, theirs)?, tolerance, &format!("{place} {name}"))?;
    }
    Ok(())
}

/// A batch as recorded: labels of −100 are masked; position `t` predicts label `t + 1`.
fn read_batch(batches: &mut Checkpoint, name: &str) -> Result<Batch> {
    let mut read = |key: &str| read_ids(batches, &format!("{name}.{key}"));
    let (ids, labels, mask) = (read("input_ids")?, read("labels")?, read("attention_mask")?);
    let real: Vec<usize> = mask.iter().map(|row| row.iter().sum::<i64>() as usize).collect();
    // Padded again, a batch has to be as long as the reference's.
    ensure!(real.iter().max() == ids.iter().map(Vec::len).max().as_ref(), "{name} is padded beyond its longest row");
    let rows = ids.iter().zip(&real).map(|(row, &real)| row[..real].iter().map(|&id| id as u32).collect());
    let rows: Vec<Vec<u32>> = rows.collect();
    let labels = labels.iter().enumerate().flat_map(|(row, labels)| {
        let labels = labels.iter().enumerate().skip(1).filter(|&(_, &label)| label >= 0);
        labels.map(move |(at, &label)| (row, at - 1, label as u32))
    });
    Ok(Batch::with_labels(&rows, labels, 1, &Device::Cpu)?)
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
    let mut plain = Weights::load(model.params(), &mut Checkpoint::open(base)?, DType::F32, &Device::Cpu)?;
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
    let logits = model.logits(&hidden, &mut Forward::new(weights, &mut Sites::none()))?;
    let real = |tensor: &Tensor| real_rows(tensor, batch);
    worst.note("logits", relative(logits.tensor(), &real(&read(golden, "logits.safe0")?)?)?, TOLERANCE, variant)?;
    if variant == "lora" {
        for layer in 0..=layers {
            let ours = if layer == layers { &hidden } else { &sites.observed()[&stream(layer)] };
            let theirs = read(golden, &format!("hidden.{layer}.safe0"))?;
            worst.note("hidden", relative(ours.tensor(), &real(&theirs)?)?, TOLERANCE, &format!("layer {layer}"))?;
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
            let decoding = Decoding { max_new_tokens: 16, batch_size, ends: vec![eos] };
            let ours = greedy(model, weights, &prompts, &decoding, |_| Ok(()))?;
            for (ours, theirs) in ours.iter().zip(&theirs) {
                let theirs = theirs[width..].iter().map(|&id| id as u32).take_while(|&id| id != eos);
                ensure!(ours.tokens.iter().copied().eq(theirs), "{variant} {output}: {ours:?}");
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
