//! `titer generate`.

use std::path::PathBuf;

use titer_core::device::parse_device;

use super::Done;
use crate::diagnostics::Problems;
use crate::stages::{Generation, generate};

/// The arguments.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// A folder in the Hugging Face layout, such as `titer pretrain` names.
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
    /// A prompt; may be repeated.
    #[arg(long = "prompt", value_name = "TEXT", required = true)]
    pub prompts: Vec<String>,
    /// The template the prompts are put in: a built-in name or a Jinja text.
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
    /// How the weights are stored: `f32`, `f16`, `bf16`, `q8_0`, `q6k`, `q4k` or `q4_0`.
    #[arg(long, default_value = "f32")]
    pub dtype: String,
}

/// Prints one answer per prompt.
///
/// # Errors
/// The model cannot be loaded, or the device cannot be used.
pub fn run(args: &Args) -> Result<Done, Problems> {
    let request = Generation {
        model: args.model.clone(),
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
