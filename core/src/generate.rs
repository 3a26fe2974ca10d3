//! Batched decoding with a key/value cache.

use candle_core::{D, DType, Tensor};
use candle_transformers::generation::{LogitsProcessor, Sampling};

use crate::cache::Cache;
use crate::data::Tokens;
use crate::model::{Forward, Model};
use crate::sites::Sites;
use crate::weights::Weights;
use crate::{Error, Result};

/// How answers are decoded.
#[derive(Debug, Clone)]
pub struct Decoding {
    /// At most this many tokens.
    pub max_new_tokens: usize,
    /// Prompts per batch. It changes the speed, not the answers.
    pub batch_size: usize,
    /// The token that ends an answer.
    pub eos: u32,
    /// The token that fills short rows.
    pub pad: u32,
}

/// The greedy continuation of each prompt, without the end-of-text token.
///
/// Prompts are grouped by length, so that little is padded. `progress` is told after each batch how many prompts are
/// done; an error from it stops the work.
///
/// # Errors
/// A prompt is empty or too long for the model, or a tensor operation failed.
pub fn greedy(
    model: &dyn Model,
    weights: &Weights,
    prompts: &[Vec<u32>],
    decoding: &Decoding,
    mut progress: impl FnMut(usize) -> Result<()>,
) -> Result<Vec<Vec<u32>>> {
    let mut order: Vec<usize> = (0..prompts.len()).collect();
    order.sort_by_key(|&index| prompts[index].len());
    let mut answers = vec![Vec::new(); prompts.len()];
    let mut done = 0;
    for batch in order.chunks(decoding.batch_size.max(1)) {
        let rows: Vec<&[u32]> = batch.iter().map(|&index| prompts[index].as_slice()).collect();
        let argmax = |logits: &Tensor| Ok(logits.argmax(D::Minus1)?.to_vec1::<u32>()?);
        for (&index, answer) in batch.iter().zip(decode(model, weights, &rows, decoding, argmax)?) {
            answers[index] = answer;
        }
        done += batch.len();
        progress(done)?;
    }
    Ok(answers)
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
) -> Result<Vec<u32>> {
    let mut processor = LogitsProcessor::from_sampling(seed, Sampling::TopP { p: top_p, temperature });
    let answers = decode(model, weights, &[prompt], decoding, |logits| Ok(vec![processor.sample(&logits.get(0)?)?]))?;
    Ok(answers.into_iter().next().unwrap_or_default())
}

/// Decodes one batch; `pick` chooses the next token of each row from logits `[batch, vocabulary]`.
fn decode(
    model: &dyn Model,
    weights: &Weights,
    prompts: &[&[u32]],
    decoding: &Decoding,
    mut pick: impl FnMut(&Tensor) -> Result<Vec<u32>>,
) -> Result<Vec<Vec<u32>>> {
    let lengths: Vec<usize> = prompts.iter().map(|prompt| prompt.len()).collect();
    if lengths.contains(&0) {
        return Err(Error::data("a prompt has no token").help("give the prompt a text, or the tokenizer a start token"));
    }
    let frozen = weights.frozen();
    let mut cache = Cache::new(model.spec(), &lengths, decoding.max_new_tokens);
    let mut answers = vec![Vec::new(); prompts.len()];
    let mut finished = vec![false; prompts.len()];
    let mut tokens = Tokens::pad(prompts, decoding.pad, weights.device())?;
    for _ in 0..decoding.max_new_tokens {
        let mut sites = Sites::none();
        let mut pass = Forward { cache: Some(&mut cache), ..Forward::new(&frozen, &mut sites) };
        let hidden = model.hidden(&tokens, &mut pass)?;
        let (_, length) = tokens.dims();
        let last: Vec<u32> =
            tokens.lengths.iter().enumerate().map(|(row, real)| (row * length + real - 1) as u32).collect();
        let last = Tensor::from_vec(last, prompts.len(), hidden.device())?;
        let logits = model.logits(&hidden.flatten(0, 1)?.index_select(&last, 0)?, &mut pass)?;
        let mut next = pick(&logits.to_dtype(DType::F32)?)?;
        for ((token, answer), finished) in next.iter_mut().zip(&mut answers).zip(&mut finished) {
            *finished |= *token == decoding.eos;
            if *finished {
                *token = decoding.pad;
            } else {
                answer.push(*token);
            }
        }
        if finished.iter().all(|&finished| finished) {
            break;
        }
        let rows: Vec<[u32; 1]> = next.into_iter().map(|token| [token]).collect();
        tokens = Tokens::pad(&rows, decoding.pad, weights.device())?;
    }
    Ok(answers)
}
