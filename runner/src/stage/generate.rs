//! Answers to prompts from the command line.

use std::path::PathBuf;

use candle_core::Device;
use titer_core::device::parse_dtype;
use titer_core::model::generate::{Decoding, Finish, greedy, sample};
use titer_core::text::{Encoder, Template};
use titer_core::{CausalLm, Error, Result, Row};

/// Prompts to continue with a model from a folder.
#[derive(Debug, Clone, PartialEq)]
pub struct Generation {
    /// The model's folder.
    pub model: PathBuf,
    /// An adapter to put on it.
    pub adapter: Option<PathBuf>,
    /// The prompts.
    pub prompts: Vec<String>,
    /// The template they are put in.
    pub template: String,
    /// Longest answer.
    pub max_new_tokens: usize,
    /// 0 for greedy decoding.
    pub temperature: f64,
    /// Mass of the tokens to sample from.
    pub top_p: f64,
    /// Seed of sampling.
    pub seed: u64,
    /// How the weights are stored.
    pub dtype: String,
}

/// Answers to the prompts.
///
/// # Errors
/// The model cannot be loaded.
pub fn generate(request: &Generation, device: &Device) -> Result<Vec<String>> {
    let mut base = CausalLm::open(&request.model, parse_dtype(&request.dtype, device)?, device)?;
    if let Some(folder) = &request.adapter {
        base.weights.load_peft(folder)?;
        base.weights.merge()?;
    }
    let template = match request.template.as_str() {
        Template::MODEL => Template::of_model(&request.model, None)?,
        text => Template::new(text),
    };
    template.check()?;
    let encoder = Encoder { tokenizer: base.tokenizer, template, max_length: usize::MAX };
    let prompts = request.prompts.iter().map(|prompt| encoder.prompt(&Row::new(prompt, "")));
    let prompts = prompts.collect::<Result<Vec<_>>>()?;
    let decoding = Decoding {
        max_new_tokens: request.max_new_tokens,
        batch_size: prompts.len(),
        ends: encoder.tokenizer.ends.clone(),
    };
    let (model, weights) = (base.model.as_ref(), &base.weights);
    let answers = if request.temperature == 0. {
        greedy(model, weights, &prompts, &decoding, |_| Ok(()))?
    } else {
        let sampling = (request.temperature, request.top_p, request.seed);
        prompts.iter().map(|prompt| sample(model, weights, prompt, &decoding, sampling)).collect::<Result<_>>()?
    };
    if let Some(index) = answers.iter().position(|answer| answer.finish == Finish::TooLong) {
        return Err(Error::data(format!(
            "prompt {} has {} tokens, and with an answer of {} it passes the model's {} positions",
            index + 1,
            prompts[index].len(),
            request.max_new_tokens,
            model.spec().max_positions
        ))
        .help("shorten the prompt, or lower --max-new-tokens"));
    }
    answers.iter().map(|answer| encoder.tokenizer.decode(&answer.tokens)).collect()
}
