//! `titer generate`.

use std::path::PathBuf;

use titer_core::Error;
use titer_core::bounds::{self, at_most};
use titer_core::device::parse_device;

use super::{Done, downloads};
use crate::diagnostics::Problems;
use crate::hub;
use crate::logging::Logging;
use crate::stage::{Generation, generate};

/// The arguments.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// A folder in the Hugging Face layout, such as `titer pretrain` names; or a model of the Hugging Face hub, `owner/name` or
    /// `hf://owner/name@revision`.
    #[arg(long, value_name = "MODEL")]
    pub model: PathBuf,
    /// An adapter as PEFT keeps it, such as `titer export --to peft` writes, to put on the model.
    #[arg(long, value_name = "DIR")]
    pub adapter: Option<PathBuf>,
    /// A prompt; may be repeated.
    #[arg(long = "prompt", value_name = "TEXT", required = true)]
    pub prompts: Vec<String>,
    /// The template the prompts are put in: a built-in name, a Jinja text, or `model`, the model's own chat template.
    #[arg(long, default_value = "alpaca")]
    pub template: String,
    /// Longest answer in tokens.
    #[arg(long, default_value_t = 128)]
    pub max_new_tokens: usize,
    /// 0 for greedy decoding.
    #[arg(long, default_value_t = 0.)]
    pub temperature: f64,
    /// Samples from the likeliest tokens that have this probability together.
    #[arg(long, default_value_t = 1.)]
    pub top_p: f64,
    /// Seed of sampling.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// `auto`, `cpu`, `cuda` or `cuda:N`.
    #[arg(long, default_value = "auto")]
    pub device: String,
    /// How the weights are stored: `f32`, `f16`, `bf16`, `q8_0`, `q6k`, `q4_1`, `q4k` or `q4_0`.
    #[arg(long, default_value = "f32")]
    pub dtype: String,
}

/// Fails on numbers that nothing can be sampled with.
fn check(args: &Args) -> Result<(), Error> {
    at_most("--max-new-tokens", args.max_new_tokens, bounds::TOKENS)?;
    let (temperature, top_p) = (args.temperature, args.top_p);
    if !(0. ..=1e6).contains(&temperature) {
        let message = format!("`--temperature` must lie in [0, 1e6], found `{temperature}`");
        return Err(Error::config(message).key("--temperature").help("0 is greedy, 1 the model's own distribution"));
    }
    if !(top_p > 0. && top_p <= 1.) {
        let message = format!("`--top-p` must lie in (0, 1], found `{top_p}`");
        return Err(Error::config(message).key("--top-p").help("1 samples from all tokens, 0.9 from the likely ones"));
    }
    Ok(())
}

/// Prints one answer per prompt.
///
/// # Errors
/// The model cannot be loaded, or the device cannot be used.
pub fn run(args: &Args, logging: Logging) -> Result<Done, Problems> {
    check(args)?;
    let request = Generation {
        model: hub::model_folder(&args.model, &*downloads(logging))?,
        adapter: args.adapter.clone(),
        prompts: args.prompts.clone(),
        template: args.template.clone(),
        max_new_tokens: args.max_new_tokens,
        temperature: args.temperature,
        top_p: args.top_p,
        seed: args.seed,
        dtype: args.dtype.clone(),
    };
    let answers = generate(&request, &parse_device(&args.device)?)?;
    Ok(answers.into_iter().map(|answer| answer + "\n").collect::<String>().into())
}
