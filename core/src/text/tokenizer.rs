//! The tokenizer of a model with its special tokens.

use std::path::Path;

use tokenizers::AddedToken;
use tokenizers::models::wordlevel::WordLevel;
use tokenizers::pre_tokenizers::whitespace::WhitespaceSplit;
use tokenizers::processors::template::TemplateProcessing;

use crate::bounds::{self, read_file};
use crate::error::{Error, Result};
use crate::guard::guarded;

/// A tokenizer with its special tokens.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// Ends an answer in training rows.
    pub eos: u32,
    /// Each of these ends an answer that is being generated; `eos` is among them.
    pub ends: Vec<u32>,
    /// Fills short rows where a method asks for padding; never attended to and never a label.
    pub pad: u32,
}

impl Tokenizer {
    /// Wraps a tokenizer whose end-of-text token is `eos`. Padding, where a method asks for it, is `pad`; any id will do.
    pub fn new(inner: tokenizers::Tokenizer, eos: u32, pad: u32) -> Self {
        Self { inner, eos, ends: vec![eos], pad }
    }

    /// The same tokenizer with other special tokens: training rows end in `eos`, generated answers in that or any of
    /// `ends`.
    #[must_use]
    pub fn with_special(mut self, eos: u32, ends: Vec<u32>, pad: u32) -> Self {
        (self.eos, self.ends, self.pad) = (eos, ends, pad);
        self.ends.push(eos);
        self.ends.sort_unstable();
        self.ends.dedup();
        self
    }

    /// A word-level tokenizer of a closed language: words are separated by spaces, and every text starts with `<bos>`.
    /// `words` begins with the special tokens, which are written like `<eos>`.
    ///
    /// # Errors
    /// `<bos>`, `<eos>` or `<pad>` is missing, or a word occurs twice.
    pub fn word_level(words: &[String]) -> Result<Self> {
        let broken = |why: String| Error::run(format!("the vocabulary makes no tokenizer: {why}"));
        let ids = words.iter().enumerate().map(|(id, word)| (word.clone(), id as u32));
        let model = WordLevel::builder().vocab(ids.collect()).build().map_err(|error| broken(error.to_string()))?;
        let mut inner = tokenizers::Tokenizer::new(model);
        if inner.get_vocab_size(false) < words.len() {
            return Err(broken("a word occurs twice".into()));
        }
        let id = |word: &str| inner.token_to_id(word).ok_or_else(|| broken(format!("`{word}` is missing")));
        let (bos, eos, pad) = (id("<bos>")?, id("<eos>")?, id("<pad>")?);
        inner.with_pre_tokenizer(Some(WhitespaceSplit));
        let start = TemplateProcessing::builder()
            .try_single("<bos> $A")
            .map_err(broken)?
            .special_tokens(vec![("<bos>", bos)])
            .build()
            .map_err(|error| broken(error.to_string()))?;
        inner.with_post_processor(Some(start));
        let special = words.iter().filter(|word| word.starts_with('<'));
        let special = special.map(|word| AddedToken::from(word.clone(), true)).collect::<Vec<_>>();
        inner.add_special_tokens(special).map_err(|error| broken(error.to_string()))?;
        Ok(Self::new(inner, eos, pad))
    }

    /// Reads `tokenizer.json`.
    ///
    /// # Errors
    /// The file is missing or malformed.
    pub fn from_file(path: &Path, eos: u32, pad: u32) -> Result<Self> {
        let bytes = read_file("read the tokenizer", path, bounds::JSON_BYTES).map_err(|error| {
            error.help("the model folder needs a `tokenizer.json` (the fast tokenizer of Hugging Face)")
        })?;
        Self::from_bytes(&bytes, eos, pad).map_err(|error| error.file(path))
    }

    /// Reads the bytes of a `tokenizer.json`.
    ///
    /// # Errors
    /// The bytes are malformed.
    pub fn from_bytes(bytes: &[u8], eos: u32, pad: u32) -> Result<Self> {
        let mut inner = parsed(|| tokenizers::Tokenizer::from_bytes(bytes)).map_err(|why| {
            Error::data(format!("the tokenizer cannot be read: {why}"))
                .help("it must be the `tokenizer.json` of Hugging Face's fast tokenizers")
        })?;
        inner.with_padding(None);
        let _ = inner.with_truncation(None);
        Ok(Self::new(inner, eos, pad))
    }

    /// The `tokenizer.json` of this tokenizer.
    ///
    /// # Errors
    /// It cannot be serialised.
    pub fn to_json(&self) -> Result<String> {
        self.inner.to_string(false).map_err(|error| Error::run(format!("the tokenizer cannot be written: {error}")))
    }

    /// How many ids there are, added tokens included.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// The largest id plus one: what a model's embedding must hold.
    pub fn id_bound(&self) -> u32 {
        self.inner.get_vocab(true).into_values().max().map_or(0, |id| id.saturating_add(1))
    }

    /// The id of a token.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The token of an id.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// The tokens of `text`, with the tokenizer's own special tokens (a leading `<bos>`, say) if `special`.
    ///
    /// # Errors
    /// The tokenizer failed.
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        Ok(self.encode_with_ends(text, special)?.into_iter().map(|(token, _)| token).collect())
    }

    /// The tokens of [`Tokenizer::encode`], and where each ends in `text`, in bytes: 0 for one that is not in the text.
    ///
    /// # Errors
    /// The tokenizer failed.
    pub fn encode_with_ends(&self, text: &str, special: bool) -> Result<Vec<(u32, usize)>> {
        let encoding = parsed(|| self.inner.encode(text, special)).map_err(|why| {
            Error::data(format!("cannot tokenise `{}`: {why}", bounds::shortened(text))).help(
                "a word-level tokenizer knows the words of its own language only; else `tokenizer.json` is damaged",
            )
        })?;
        let ends = encoding.get_offsets().iter().map(|&(_, end)| end);
        Ok(encoding.get_ids().iter().copied().zip(ends).collect())
    }

    /// The text of `ids`, without special tokens.
    ///
    /// # Errors
    /// The tokenizer failed.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        parsed(|| self.inner.decode(ids, true)).map_err(|why| {
            Error::data(format!("cannot decode tokens: {why}"))
                .help("`tokenizer.json` is damaged: take it from the same model as the weights")
        })
    }
}

/// What the tokenizers library gives. It panics on some malformed files, which is an error like its others.
fn parsed<T>(call: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, String> {
    guarded(call)?.map_err(|error| error.to_string())
}
