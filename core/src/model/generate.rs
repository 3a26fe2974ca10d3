//! Batched decoding with a key/value cache.

use candle_core::{DType, Tensor};
use candle_transformers::generation::{LogitsProcessor, Sampling};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::model::architecture::Model;
use crate::nn::cache::Cache;
use crate::nn::forward::Forward;
use crate::nn::sites::Sites;
use crate::tensor::elementwise::{argmax, norm};
use crate::tensor::ops;
use crate::tensor::tokens::Tokens;
use crate::weights::parameters::Weights;

/// A prefix of fewer tokens is not worth a pass of its own.
const SHORTEST_PREFIX: usize = 16;

/// How answers are decoded.
#[derive(Debug, Clone)]
pub struct Decoding {
    /// At most this many tokens.
    pub max_new_tokens: usize,
    /// Prompts decoded at a time. It changes the speed, not the answers.
    pub batch_size: usize,
    /// The tokens that end an answer; none if it always goes on to its greatest length.
    pub ends: Vec<u32>,
}

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Finish {
    /// The model ended it.
    Stop,
    /// It was cut at the greatest length.
    Length,
    /// It was not begun: prompt and an answer of the greatest length pass the model's positions. That is so whatever the
    /// model would say, so the prompts that are left out do not depend on the method.
    TooLong,
}

/// A generated answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Continuation {
    /// Its tokens, without the one that ended it.
    pub tokens: Vec<u32>,
    /// Why it ended.
    pub finish: Finish,
}

/// The greedy continuation of each prompt.
///
/// `progress` is told how many prompts are done whenever one is; an error from it stops the work.
///
/// # Errors
/// A prompt is empty, the logits are not finite, or a tensor operation failed.
pub fn greedy(
    model: &dyn Model,
    weights: &Weights,
    prompts: &[Vec<u32>],
    decoding: &Decoding,
    progress: impl FnMut(usize) -> Result<()>,
) -> Result<Vec<Continuation>> {
    decode(model, weights, prompts, decoding, argmax, progress)
}

/// One sampled continuation of `prompt` at `temperature`, from the smallest set of tokens that holds `top_p` of the
/// probability.
///
/// # Errors
/// As [`greedy`].
pub fn sample(
    model: &dyn Model,
    weights: &Weights,
    prompt: &[u32],
    decoding: &Decoding,
    (temperature, top_p, seed): (f64, f64, u64),
) -> Result<Continuation> {
    let mut processor = LogitsProcessor::from_sampling(seed, Sampling::TopP { p: top_p, temperature });
    let pick = |logits: &Tensor| {
        if !norm([logits])?.value()?.is_finite() {
            return Ok(None);
        }
        Ok(Some(vec![processor.sample(&logits.get(0)?.to_dtype(DType::F32)?)?]))
    };
    let answers = decode(model, weights, &[prompt.to_vec()], decoding, pick, |_| Ok(()))?;
    answers.into_iter().next().ok_or_else(|| Error::run("one prompt has no answer"))
}

/// A prompt under way: which one it is, and its row in the cache.
struct OpenAnswer {
    prompt: usize,
    row: usize,
    last: u32,
}

/// Decodes all prompts, at most `batch_size` at a time. What all of them begin with, such as a template's opening, is
/// computed once. A row that finishes makes room for the next prompt while the others go on. `pick` chooses the next token
/// of each row from logits `[rows, vocabulary]`, unless one is not finite.
fn decode(
    model: &dyn Model,
    weights: &Weights,
    prompts: &[Vec<u32>],
    decoding: &Decoding,
    mut pick: impl FnMut(&Tensor) -> Result<Option<Vec<u32>>>,
    mut progress: impl FnMut(usize) -> Result<()>,
) -> Result<Vec<Continuation>> {
    if prompts.iter().any(Vec::is_empty) {
        return Err(Error::data("a prompt has no token").help("give the prompt a text, or the tokenizer a start token"));
    }
    // The last token of an answer is not fed to the model.
    let fits = |prompt: &Vec<u32>| prompt.len() + decoding.max_new_tokens <= model.spec().max_positions + 1;
    let unanswered = |prompt| {
        let finish = if fits(prompt) { Finish::Length } else { Finish::TooLong };
        Continuation { tokens: Vec::new(), finish }
    };
    let mut answers: Vec<Continuation> = prompts.iter().map(unanswered).collect();
    // The next prompt is the last one here.
    let mut waiting: Vec<usize> = (0..prompts.len()).rev().filter(|&prompt| fits(&prompts[prompt])).collect();
    if decoding.max_new_tokens == 0 || waiting.is_empty() {
        progress(prompts.len())?;
        return Ok(answers);
    }
    let frozen = weights.frozen();
    let longest = waiting.iter().map(|&prompt| prompts[prompt].len()).max().unwrap_or(0);
    let rows = decoding.batch_size.clamp(1, waiting.len());
    let slots = longest + decoding.max_new_tokens;
    let mut cache = Cache::new(model.spec(), rows, slots, weights.activation_dtype(), weights.device())?;
    let prefix = common_prefix(waiting.iter().map(|&prompt| prompts[prompt].as_slice()));
    if prefix > 0 {
        let tokens = Tokens::new(&[&prompts[waiting[0]][..prefix]], weights.device())?;
        cache.select(vec![0]);
        model.hidden(&tokens, &mut Forward { cache: Some(&mut cache), ..Forward::new(&frozen, &mut Sites::none()) })?;
        cache.share(0)?;
    }
    let mut free: Vec<usize> = (0..rows).rev().collect();
    let mut running: Vec<OpenAnswer> = Vec::new();
    let mut done = prompts.len() - waiting.len();
    while done < prompts.len() {
        // Several prompts at once make a better matrix product than one, so a few rows are left to gather.
        let refill = running.is_empty() || free.len() >= rows.div_ceil(4);
        let fresh = if refill { free.len().min(waiting.len()) } else { 0 };
        let (batch, tokens): (Vec<OpenAnswer>, Vec<&[u32]>) = if fresh > 0 {
            let started = waiting.split_off(waiting.len() - fresh).into_iter().zip(free.split_off(free.len() - fresh));
            let batch: Vec<OpenAnswer> = started.map(|(prompt, row)| OpenAnswer { prompt, row, last: 0 }).collect();
            for row in &batch {
                cache.clear(row.row);
            }
            let tokens = batch.iter().map(|row| &prompts[row.prompt][prefix..]).collect();
            (batch, tokens)
        } else {
            (std::mem::take(&mut running), Vec::new())
        };
        let last: Vec<[u32; 1]> = batch.iter().map(|row| [row.last]).collect();
        let tokens = if fresh > 0 { tokens } else { last.iter().map(<[u32; 1]>::as_slice).collect() };
        let tokens = Tokens::new(&tokens, weights.device())?;
        cache.select(batch.iter().map(|row| row.row).collect());
        // A logit that is not a number is neither greater nor less than another, so some token would be picked.
        let picked = pick(&next_logits(model, &frozen, &tokens, &mut cache)?)?.ok_or_else(|| {
            Error::run("the logits are not finite: the model computes nothing to answer with").help(Error::DIVERGED)
        })?;
        for (mut row, token) in batch.into_iter().zip(picked) {
            let answer = &mut answers[row.prompt];
            if decoding.ends.contains(&token) {
                answer.finish = Finish::Stop;
            } else {
                answer.tokens.push(token);
            }
            if answer.finish == Finish::Stop || answer.tokens.len() == decoding.max_new_tokens {
                free.push(row.row);
                done += 1;
                progress(done)?;
            } else {
                row.last = token;
                running.push(row);
            }
        }
    }
    Ok(answers)
}

/// How many tokens all prompts begin with, if a pass of their own is worth it. Each prompt keeps one to predict from.
fn common_prefix<'a>(mut prompts: impl Iterator<Item = &'a [u32]>) -> usize {
    let Some(first) = prompts.next() else { return 0 };
    let common = |other: &[u32]| first.iter().zip(other).take_while(|(a, b)| a == b).count().min(other.len() - 1);
    prompts
        .map(common)
        .min()
        .map(|shared| shared.min(first.len() - 1))
        .filter(|&shared| shared >= SHORTEST_PREFIX)
        .unwrap_or(0)
}

/// Logits `[rows, vocabulary]` after the last token of each row.
fn next_logits(model: &dyn Model, weights: &Weights, tokens: &Tokens, cache: &mut Cache) -> Result<Tensor> {
    let mut sites = Sites::none();
    let mut pass = Forward { cache: Some(cache), ..Forward::new(weights, &mut sites) };
    let mut hidden = model.hidden(tokens, &mut pass)?;
    let rows = tokens.lengths.len();
    if rows < tokens.count() {
        let last: Vec<u32> = tokens.ranges().map(|range| range.end as u32 - 1).collect();
        hidden = ops::select_rows(&mut pass.tape, &hidden, &Tensor::from_vec(last, rows, weights.device())?)?;
    }
    Ok(model.logits(&hidden, &mut pass)?.tensor().clone())
}

#[cfg(test)]
mod tests {
    use super::common_prefix;

    #[test]
    fn a_common_prefix_leaves_each_prompt_a_token_and_is_long_enough() {
        let numbers: Vec<u32> = (0..40).collect();
        let prefix = |ends: &[usize]| common_prefix(ends.iter().map(|&end| &numbers[..end]));
        assert_eq!(prefix(&[20, 30, 40]), 19);
        assert_eq!(prefix(&[30, 17]), 16);
        assert_eq!(prefix(&[30, 16]), 0);
        assert_eq!(prefix(&[40]), 0);
        assert_eq!(prefix(&[]), 0);
        let other: Vec<u32> = (0..18).chain(60..80).collect();
        assert_eq!(common_prefix([&numbers[..], &other].into_iter()), 18);
    }
}
