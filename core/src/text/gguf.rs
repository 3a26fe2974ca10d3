//! The `tokenizer.json` that a GGUF file stands for.

use std::collections::{BTreeMap, HashMap};

use serde_json::{Value, json};

use super::tokenizer::Tokenizer;
use crate::error::Result;
use crate::gguf::Gguf;

/// What llama.cpp calls a token that stands for something, and one that the user added.
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;

/// How a byte-level tokenizer splits text before it merges, by llama.cpp's names for it.
const SPLITS: [(&[&str], &str); 3] = [
    (&["default", "gpt-2", "gpt2", ""], ""),
    (
        &["llama-bpe", "llama3", "llama-v3"],
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
    (
        &["qwen2"],
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
];

/// The ones that split off every digit.
const DIGITS: [&str; 2] = ["smollm", "starcoder"];

impl Gguf {
    /// The tokenizer, with the tokens that end an answer.
    ///
    /// # Errors
    /// It is of a kind that is not read, or the file does not say all of it.
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        let tokens = self.tokens()?;
        let (model, parts) = match self.text("tokenizer.ggml.model").unwrap_or_default() {
            "gpt2" => self.byte_level(&tokens)?,
            "llama" => self.sentence_pieces(&tokens)?,
            other => {
                let error = self.fault(format!("tokenizers of kind `{other}` are not read"), "tokenizer.ggml.model");
                return Err(error.help("take the model's folder in Hugging Face's layout, with its tokenizer.json"));
            }
        };
        let kinds = self.list("tokenizer.ggml.token_type").unwrap_or_default();
        let added = tokens.iter().zip(kinds).enumerate().filter_map(|(id, (token, kind))| {
            let kind = kind.to_i32().unwrap_or_default();
            [CONTROL, USER_DEFINED].contains(&kind).then(|| {
                json!({
                    "id": id, "content": token, "special": kind == CONTROL, "single_word": false, "lstrip": false,
                    "rstrip": false, "normalized": false
                })
            })
        });
        let mut written = json!({ "version": "1.0", "added_tokens": added.collect::<Vec<_>>(), "model": model });
        if let (Some(written), Value::Object(parts)) = (written.as_object_mut(), parts) {
            written.extend(parts);
        }
        let begins = self.value("tokenizer.ggml.add_bos_token").and_then(|value| value.to_bool().ok());
        let begins = begins.unwrap_or(self.text("tokenizer.ggml.model") == Some("llama"));
        if let Some((id, first)) =
            self.id_of("bos").filter(|_| begins).and_then(|id| Some((id, *tokens.get(id as usize)?)))
        {
            let sequence = json!({ "Sequence": { "id": "A", "type_id": 0 } });
            let special = json!({ "SpecialToken": { "id": first, "type_id": 0 } });
            written["post_processor"] = json!({
                "type": "TemplateProcessing", "single": [special, sequence],
                "pair": [special, sequence, { "Sequence": { "id": "B", "type_id": 1 } }],
                "special_tokens": { first: { "id": first, "ids": [id], "tokens": [first] } }
            });
        }
        let eos = self.id_of("eos").ok_or_else(|| self.missing("tokenizer.ggml.eos_token_id"))?;
        let ends = ["eot", "eom"].into_iter().filter_map(|name| self.id_of(name)).collect();
        let tokenizer =
            Tokenizer::from_bytes(written.to_string().as_bytes(), eos, self.id_of("padding").unwrap_or(eos));
        let tokenizer = tokenizer.map_err(|error| error.file(&self.path))?;
        let pad = tokenizer.pad;
        Ok(tokenizer.with_special(eos, ends, pad))
    }

    /// The model and the other parts of a byte-level BPE tokenizer.
    fn byte_level(&self, tokens: &[&str]) -> Result<(Value, Value)> {
        let kind = self.text("tokenizer.ggml.pre").unwrap_or_default();
        let bytes = |regex: bool| json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": regex });
        let split = SPLITS.iter().find(|(names, _)| names.contains(&kind)).map(|(_, pattern)| *pattern);
        let pre_tokenizer = match split {
            Some("") => bytes(true),
            Some(pattern) => json!({ "type": "Sequence", "pretokenizers": [
                { "type": "Split", "pattern": { "Regex": pattern }, "behavior": "Isolated", "invert": false }, bytes(false)
            ]}),
            None if DIGITS.contains(&kind) => json!({ "type": "Sequence", "pretokenizers": [
                { "type": "Digits", "individual_digits": true }, bytes(true)
            ]}),
            None => {
                let known = SPLITS.iter().flat_map(|(names, _)| *names).chain(&DIGITS).filter(|name| !name.is_empty());
                let known = known.copied().collect::<Vec<_>>().join(", ");
                let error =
                    self.fault(format!("text that is split as `{kind}` says is not read"), "tokenizer.ggml.pre");
                return Err(error.help(format!("take the model's folder in Hugging Face's layout; read are {known}")));
            }
        };
        let merges = self.list("tokenizer.ggml.merges").ok_or_else(|| self.missing("tokenizer.ggml.merges"))?;
        let merges = merges.iter().filter_map(|merge| merge.to_string().ok()?.split_once(' '));
        let merges: Vec<[&str; 2]> = merges.map(|(left, right)| [left, right]).collect();
        let whole_words = SPLITS[1].0.contains(&kind);
        let model = json!({
            "type": "BPE", "vocab": numbered(tokens), "merges": merges, "byte_fallback": false, "fuse_unk": false,
            "ignore_merges": whole_words
        });
        let mut parts = json!({ "pre_tokenizer": pre_tokenizer, "decoder": bytes(true) });
        if kind == "qwen2" {
            parts["normalizer"] = json!({ "type": "NFC" });
        }
        Ok((model, parts))
    }

    /// The model and the other parts of a BPE tokenizer as `SentencePiece` has it. It has scores in place of merges: of two pieces
    /// that make a third, those are merged first that make the one with the highest score.
    fn sentence_pieces(&self, tokens: &[&str]) -> Result<(Value, Value)> {
        let scores = self.list("tokenizer.ggml.scores").ok_or_else(|| self.missing("tokenizer.ggml.scores"))?;
        let ids: HashMap<&str, usize> = tokens.iter().enumerate().map(|(id, token)| (*token, id)).collect();
        let mut merges = Vec::new();
        for (token, score) in tokens.iter().zip(scores) {
            let score = score.to_f32().unwrap_or(f32::NEG_INFINITY);
            let cuts = token.char_indices().skip(1).map(|(at, _)| token.split_at(at));
            let mut pairs: Vec<_> = cuts.filter_map(|(l, r)| Some((*ids.get(l)?, *ids.get(r)?, l, r))).collect();
            pairs.sort_unstable();
            merges.extend(pairs.into_iter().map(|(_, _, left, right)| (score, left, right)));
        }
        let lengths = |(_, left, right): &(f32, &str, &str)| (left.chars().count(), right.chars().count());
        merges.sort_by(|a, b| b.0.total_cmp(&a.0).then_with(|| lengths(b).cmp(&lengths(a))));
        let merges: Vec<[&str; 2]> = merges.into_iter().map(|(_, left, right)| [left, right]).collect();
        let model = json!({
            "type": "BPE", "vocab": numbered(tokens), "merges": merges, "byte_fallback": true, "fuse_unk": true,
            "unk_token": self.id_of("unknown").and_then(|id| tokens.get(id as usize))
        });
        let space = json!({ "type": "Replace", "pattern": { "String": " " }, "content": "▁" });
        let mut decoders = vec![
            json!({ "type": "Replace", "pattern": { "String": "▁" }, "content": " " }),
            json!({ "type": "ByteFallback" }),
            json!({ "type": "Fuse" }),
        ];
        let prefixed =
            self.value("tokenizer.ggml.add_space_prefix").and_then(|value| value.to_bool().ok()).unwrap_or(true);
        let normalizer = if prefixed {
            decoders.push(json!({ "type": "Strip", "content": " ", "start": 1, "stop": 0 }));
            json!({ "type": "Sequence", "normalizers": [{ "type": "Prepend", "prepend": "▁" }, space] })
        } else {
            space
        };
        Ok((model, json!({ "normalizer": normalizer, "decoder": { "type": "Sequence", "decoders": decoders } })))
    }
}

/// The id of each token.
fn numbered(tokens: &[&str]) -> BTreeMap<String, usize> {
    tokens.iter().enumerate().map(|(id, token)| ((*token).to_owned(), id)).collect()
}
