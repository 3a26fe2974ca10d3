//! `titer bench`.

use std::path::Path;

use serde_json::Value;
use titer_core::arithmetic::{self, Arithmetic};
use titer_core::bounds::{self, at_most};
use titer_core::device::parse_device;
use titer_core::{Error, Settings};

use super::{Done, downloads};
use crate::bench;
use crate::bench::{AnswerParts, Measurement, Setup, Speed};
use crate::diagnostics::Problems;
use crate::environment;
use crate::hub;
use crate::logging::Logging;

/// The arguments.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// What to measure.
    #[command(subcommand)]
    pub what: What,
}

/// What can be measured.
#[derive(Debug, Clone, clap::Subcommand)]
pub enum What {
    /// One training step: forward, backward, clipping, AdamW.
    Step {
        /// The defense whose step it is.
        #[arg(long, default_value = "sft")]
        method: String,
        /// A setting of the defense, as in `rho=10`; may be repeated.
        #[arg(long = "set", value_name = "KEY=VALUE")]
        settings: Vec<String>,
        /// The dropout probability of the adapters' inputs.
        #[arg(long, value_name = "P", default_value_t = 0.)]
        dropout: f32,
        /// Keeps only the inputs of blocks, and runs them again in the backward pass.
        #[arg(long)]
        checkpointing: bool,
        /// On what.
        #[command(flatten)]
        on: On,
    },
    /// Greedy answers to a set of prompts.
    Generate {
        /// New tokens of each answer.
        #[arg(long, default_value_t = 64)]
        new: usize,
        /// Prompts in all [default: one batch].
        #[arg(long)]
        prompts: Option<usize>,
        /// On what.
        #[command(flatten)]
        on: On,
    },
}

/// What both kinds share.
#[derive(Debug, Clone, clap::Args)]
pub struct On {
    /// A shape, with random weights, or a model's folder, or its name on the hub.
    #[arg(long, default_value = "15m", help = format!("A model's folder, its name on the Hugging Face hub, or a shape with random weights: {}", bench::shapes()))]
    pub model: String,
    /// Rows per batch [default: 5 for a step, 16 for answers].
    #[arg(long)]
    pub batch: Option<usize>,
    /// Tokens per row, of the prompt for answers [default: 200 for a step, 64 for answers].
    #[arg(long)]
    pub length: Option<usize>,
    /// Transformer blocks, if other than the shape's own.
    #[arg(long)]
    pub layers: Option<usize>,
    /// How the weights are stored: `f32`, `f16`, `bf16`, `q8_0`, `q6k`, `q4_1`, `q4k` or `q4_0`.
    #[arg(long, default_value = "f32")]
    pub dtype: String,
    /// auto, cpu, cuda or cuda:N.
    #[arg(long, default_value = "cpu")]
    pub device: String,
    /// How the CPU rounds: `portable` or `native`.
    #[arg(long, default_value = "portable", value_parser = parse_arithmetic)]
    pub arithmetic: Arithmetic,
    /// Threads of the host [default: all cores].
    #[arg(long)]
    pub threads: Option<usize>,
    /// Measured repetitions; the median counts.
    #[arg(long, default_value_t = 5)]
    pub repeat: usize,
    /// Repetitions before them.
    #[arg(long, default_value_t = 1)]
    pub warmup: usize,
    /// For programs: one line of JSON.
    #[arg(long)]
    pub json: bool,
}

fn parse_arithmetic(name: &str) -> Result<Arithmetic, String> {
    let known = [Arithmetic::Portable, Arithmetic::Native];
    let found = known.into_iter().find(|arithmetic| arithmetic.name() == name);
    found.ok_or_else(|| "use portable or native".to_owned())
}

impl On {
    /// Fails on sizes that measure nothing, or that no machine has room for.
    fn check(&self) -> Result<(), Error> {
        at_least_one("--batch", self.batch)?;
        at_least_one("--length", self.length)?;
        at_least_one("--threads", self.threads)?;
        at_least_one("--repeat", Some(self.repeat))?;
        at_most("--batch", self.batch.unwrap_or(1), bounds::BATCH)?;
        at_most("--length", self.length.unwrap_or(1), bounds::TOKENS)?;
        at_most("--layers", self.layers.unwrap_or(1), bounds::LAYERS)?;
        at_most("--threads", self.threads.unwrap_or(1), bounds::THREADS)?;
        at_most("--repeat", self.repeat, bounds::STEPS)?;
        at_most("--warmup", self.warmup, bounds::STEPS)
    }

    fn setup(&self, batch: usize, length: usize) -> Setup {
        Setup {
            model: self.model.clone(),
            batch: self.batch.unwrap_or(batch),
            length: self.length.unwrap_or(length),
            layers: self.layers,
            dtype: self.dtype.clone(),
            repeat: self.repeat,
            warmup: self.warmup,
        }
    }
}

/// Fails if nothing is asked for.
fn at_least_one(key: &str, value: Option<usize>) -> Result<(), Error> {
    if value != Some(0) {
        return Ok(());
    }
    Err(Error::config("nothing would be measured").key(key).help("give 1 or more"))
}

/// Measures.
///
/// # Errors
/// An unknown shape, method, setting or device, or a folder that holds no model.
pub fn run(args: &Args, logging: Logging) -> Result<Done, Problems> {
    let (What::Step { on, .. } | What::Generate { on, .. }) = &args.what;
    on.check()?;
    if let What::Generate { new, prompts, .. } = &args.what {
        at_least_one("--new", Some(*new))?;
        at_least_one("--prompts", *prompts)?;
        at_most("--new", *new, bounds::TOKENS)?;
        at_most("--prompts", prompts.unwrap_or(1), bounds::ROWS)?;
    }
    let cores = || std::thread::available_parallelism().map_or(1, usize::from);
    environment::fix(on.threads.unwrap_or_else(cores));
    let device = parse_device(&on.device)?;
    arithmetic::choose(on.arithmetic);
    // A shape's name is no name of the hub.
    let model = hub::model_folder(Path::new(&on.model), &*downloads(logging))?;
    let on = On { model: model.to_string_lossy().into_owned(), ..on.clone() };
    // On a thread of the pool, as the stages of a run are: from outside, every parallel loop would be a switch of threads.
    let measured = rayon::scope(|_| match &args.what {
        What::Step { method, settings, dropout, checkpointing, .. } => {
            let settings = parse_settings(settings)?;
            bench::step(&on.setup(5, 200), method, &settings, *dropout, *checkpointing, &device)
        }
        What::Generate { new, prompts, .. } => {
            let setup = on.setup(16, 64);
            bench::generate(&setup, prompts.unwrap_or(setup.batch), *new, &device)
        }
    })?;
    Ok(if on.json { as_json(&measured)? } else { as_text(&measured) }.into())
}

/// `key=value` pairs; a value that is no JSON is a string.
fn parse_settings(pairs: &[String]) -> Result<Settings, Error> {
    let parse = |pair: &String| {
        let (key, value) = pair.split_once('=').ok_or_else(|| {
            Error::config(format!("`{pair}` is not of the form KEY=VALUE")).key("set").help("as in `--set rho=10`")
        })?;
        let value = serde_json::from_str(value).unwrap_or_else(|_| Value::String(value.to_owned()));
        Ok((key.to_owned(), value))
    };
    Ok(Settings::from(pairs.iter().map(parse).collect::<Result<serde_json::Map<_, _>, Error>>()?))
}

fn as_json(measured: &Measurement) -> Result<String, Error> {
    let line = serde_json::to_string(measured).map_err(|error| Error::run("cannot serialise").source(error))?;
    Ok(line + "\n")
}

fn as_text(measured: &Measurement) -> String {
    let Measurement { what, setup, device, threads, .. } = measured;
    let parts = measured.parts.map_or_else(String::new, |AnswerParts { prefill, decode }| {
        let told = |speed: Option<Speed>| {
            speed.map_or_else(|| "too few".to_owned(), |speed| format!("{:.0}", speed.tokens_per_second))
        };
        format!("tokens/s apart, at best: {} of prompts, {} of answers after the first\n", told(prefill), told(decode))
    });
    let mebibytes = |bytes: u64| format!("{:.0} MiB peak", bytes as f64 / f64::from(1 << 20));
    let peak = measured.peak_bytes.map_or_else(|| "peak memory not measured".to_owned(), mebibytes);
    format!(
        "{what}, {} ({:.1} M parameters), {} x {} tokens, {} on {device}, {threads} threads\n\
         {:.4} s median of {}, {:.4} s best, {:.0} tokens/s\n\
         {parts}{peak}, {:.1} GFLOP/s, {:.0} % of this machine's {:.1} GFLOP/s in a large matrix product\n",
        setup.model,
        measured.parameters as f64 / 1e6,
        setup.batch,
        setup.length,
        setup.dtype,
        measured.seconds_per_step,
        setup.repeat,
        measured.seconds_min,
        measured.tokens_per_second,
        measured.flops_per_second / 1e9,
        100. * measured.share_of_peak,
        measured.matmul_flops_per_second / 1e9,
    )
}
