//! From text to tokens and back: rows, prompt templates, the tokenizer.

use std::path::Path;

use minijinja::machinery::{Token, tokenize};
use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, context};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokenizers::AddedToken;
use tokenizers::models::wordlevel::WordLevel;
use tokenizers::pre_tokenizers::whitespace::WhitespaceSplit;
use tokenizers::processors::template::TemplateProcessing;

use crate::bounds::{self, read_file};
use crate::data::Example;
use crate::guard::guarded;
use crate::{Error, Result};

/// One row of a data set: an instruction, an optional input to it, and the answer to learn or to compare with.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Row {
    /// What the user asks. Empty for plain documents, which are learnt from their first token on.
    pub instruction: String,
    /// What the instruction is about, where the data set keeps it apart.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub input: Option<String>,
    /// The answer.
    pub output: String,
}

impl Row {
    /// A row without an input.
    pub fn new(instruction: impl Into<String>, output: impl Into<String>) -> Self {
        Self { instruction: instruction.into(), input: None, output: output.into() }
    }
}

/// How a row becomes the text of a prompt: the name of a built-in template or a Jinja text over `instruction` and
/// `input`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct Template(String);

/// The built-in templates: name and Jinja text.
///
/// `alpaca` is the prompt of the Vaccine repository, to the byte: no newline after the last colon.
pub const TEMPLATES: [(&str, &str); 3] = [
    (
        "alpaca",
        "{% if input %}Below is an instruction that describes a task, paired with an input that provides further \
         context. Write a response that appropriately completes the request.\n\n### Instruction:\n{{ instruction }}\
         \n\n### Input:\n{{ input }}\n\n### Response:{% else %}Below is an instruction that describes a task. Write \
         a response that appropriately completes the request.\n\n### Instruction:\n{{ instruction }}\n\n### \
         Response:{% endif %}",
    ),
    (
        "alpaca-newline",
        "{% if input %}Below is an instruction that describes a task, paired with an input that provides further \
         context. Write a response that appropriately completes the request.\n\n### Instruction:\n{{ instruction }}\
         \n\n### Input:\n{{ input }}\n\n### Response:\n{% else %}Below is an instruction that describes a task. \
         Write a response that appropriately completes the request.\n\n### Instruction:\n{{ instruction }}\n\n### \
         Response:\n{% endif %}",
    ),
    // A space stands before the answer, as in the documents of the embedded world.
    ("chat", "<user> {{ instruction }}{% if input %} {{ input }}{% endif %} <asst> "),
];

impl Template {
    /// A template by its built-in name or as a Jinja text.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The Jinja text.
    pub fn text(&self) -> &str {
        TEMPLATES.iter().find(|(name, _)| *name == self.0).map_or(&self.0, |(_, text)| text)
    }

    /// The prompt of `row`; empty for a plain document.
    ///
    /// # Errors
    /// The Jinja text is malformed or does not use `instruction`.
    pub fn render(&self, row: &Row) -> Result<String> {
        if row.instruction.is_empty() && row.input.is_none() {
            return Ok(String::new());
        }
        self.check_size()?;
        let mut environment = Environment::empty();
        environment.set_undefined_behavior(minijinja::UndefinedBehavior::Strict);
        environment.set_fuel(Some(bounds::TEMPLATE_FUEL));
        // The text is the prompt to the byte, so Jinja's habit of dropping a last newline is off. The other two are how
        // transformers renders chat templates.
        let mut syntax = environment.syntax().to_builder();
        syntax.keep_trailing_newline(true).trim_blocks(true).lstrip_blocks(true);
        environment.set_syntax(syntax.build().map_err(|error| Error::run("the template syntax").source(error))?);
        let input = row.input.as_deref().unwrap_or("");
        environment.render_str(self.text(), context! { instruction => &row.instruction, input }).map_err(|error| {
            if error.kind() == minijinja::ErrorKind::OutOfFuel {
                let message = format!("the prompt template takes more than {} steps", bounds::TEMPLATE_FUEL);
                return Error::config(message)
                    .key("template")
                    .help("take out loops and repetitions; this is a limit of Titer");
            }
            let names: Vec<&str> = TEMPLATES.iter().map(|(name, _)| *name).collect();
            Error::config(format!("the prompt template cannot be rendered: {error}"))
                .key("template")
                .help(format!("use one of {} or a Jinja text over `instruction` and `input`", names.join(", ")))
        })
    }

    /// Fails if the template is so large or so deep that parsing it could exhaust the stack.
    fn check_size(&self) -> Result<()> {
        let refuse = |what: &str, most: usize| {
            Error::config(format!("the prompt template has {what}, at most {most} are possible"))
                .key("template")
                .help("write a shorter template; this is a limit of Titer")
        };
        if self.text().len() > bounds::TEMPLATE_BYTES {
            return Err(refuse(&format!("{} bytes", self.text().len()), bounds::TEMPLATE_BYTES));
        }
        let (mut all, mut of_tag) = (0, 0);
        // What is no token at all is left to the parser, which says why.
        for (token, _) in tokenize(self.text(), false, SyntaxConfig::default()).map_while(Result::ok) {
            match token {
                Token::TemplateData(_) => continue,
                Token::VariableStart | Token::BlockStart => of_tag = 0,
                _ => of_tag += 1,
            }
            all += 1;
            if of_tag > bounds::TAG_TOKENS {
                return Err(refuse("a tag of too many words and signs", bounds::TAG_TOKENS));
            }
            if all > bounds::TEMPLATE_TOKENS {
                return Err(refuse("too many words and signs in its tags", bounds::TEMPLATE_TOKENS));
            }
        }
        Ok(())
    }

    /// Checks the template without a row.
    ///
    /// # Errors
    /// As [`Template::render`], or the instruction does not reach the prompt.
    pub fn check(&self) -> Result<()> {
        let prompt = self.render(&Row { input: Some("%input%".into()), ..Row::new("%instruction%", "") })?;
        if prompt.contains("%instruction%") {
            return Ok(());
        }
        Err(Error::config(format!("the prompt template `{}` does not use `instruction`", self.0))
            .key("template")
            .help("write `{{ instruction }}` where the user's request belongs"))
    }
}

/// A tokenizer with its special tokens.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// Ends an answer in training rows.
    pub eos: u32,
    /// Each of these ends an answer that is being generated; `eos` is among them.
    pub ends: Vec<u32>,
    /// Fills short rows of a batch; never attended to and never a label.
    pub pad: u32,
}

impl Tokenizer {
    /// Wraps a tokenizer whose end-of-text token is `eos`. Padding uses `pad` (its loss and attention are masked, so
    /// any id will do).
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
        let encoding = parsed(|| self.inner.encode(text, special)).map_err(|why| {
            Error::data(format!("cannot tokenise `{}`: {why}", bounds::shortened(text))).help(
                "a word-level tokenizer knows the words of its own language only; else `tokenizer.json` is damaged",
            )
        })?;
        Ok(encoding.get_ids().to_vec())
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

/// Text to tokens under one protocol: tokenizer, template and length limit.
#[derive(Debug, Clone)]
pub struct Encoder {
    /// The tokenizer.
    pub tokenizer: Tokenizer,
    /// The prompt template.
    pub template: Template,
    /// Rows are cut after this many tokens (the tail, as the reference does).
    pub max_length: usize,
}

impl Encoder {
    /// The tokens of the prompt of `row`.
    ///
    /// # Errors
    /// The template or the tokenizer failed.
    pub fn prompt(&self, row: &Row) -> Result<Vec<u32>> {
        self.tokenizer.encode(&self.template.render(row)?, true)
    }

    /// The tokens of prompt, answer and end of text, with the prompt's tokens masked from the loss.
    ///
    /// Prompt and answer are tokenised together with nothing between them, as at the reference: what separates them is
    /// part of the template. Where a token spans the boundary, the mask ends before it, so that no part of the answer goes
    /// unlearnt. `None` if the length limit leaves no label.
    ///
    /// # Errors
    /// The template or the tokenizer failed.
    pub fn example(&self, row: &Row) -> Result<Option<Example>> {
        let prompt_text = self.template.render(row)?;
        let prompt = self.tokenizer.encode(&prompt_text, true)?;
        let mut tokens = self.tokenizer.encode(&format!("{prompt_text}{}", row.output), true)?;
        let shared = prompt.iter().zip(&tokens).take_while(|(a, b)| a == b).count();
        tokens.push(self.tokenizer.eos);
        tokens.truncate(self.max_length);
        // The first token has nothing before it to be predicted from.
        let first_label = shared.max(1);
        Ok((first_label < tokens.len()).then_some(Example { tokens, first_label }))
    }

    /// [`Encoder::example`] for every row, without those that lost all labels to the length limit.
    ///
    /// # Errors
    /// No row is left, or the template or the tokenizer failed.
    pub fn examples(&self, rows: &[Row]) -> Result<Vec<Example>> {
        if rows.is_empty() {
            return Err(Error::data("the data set is empty").help("point it at a file with at least one row"));
        }
        let mut examples = Vec::with_capacity(rows.len());
        for row in rows {
            examples.extend(self.example(row)?);
        }
        if examples.is_empty() {
            return Err(Error::data(format!(
                "all labels are truncated away: no answer token of {} rows lies within {} tokens",
                rows.len(),
                self.max_length
            ))
            .key("max_length")
            .help("raise max_length above the length of the prompts"));
        }
        if examples.len() < rows.len() {
            let (lost, rows) = (rows.len() - examples.len(), rows.len());
            tracing::warn!(
                lost,
                rows,
                max_length = self.max_length,
                "rows without any label after truncation are left out"
            );
        }
        Ok(examples)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encoder(template: &str) -> Encoder {
        let words = ["<pad>", "<bos>", "<user>", "<asst>", "<eos>", "hello", "there", "a>", "a>there"];
        let tokenizer = Tokenizer::word_level(&words.map(str::to_owned)).expect("a tokenizer");
        Encoder { tokenizer, template: Template::new(template), max_length: 100 }
    }

    /// The tokens of a row and those that count in the loss.
    fn tokens(template: &str) -> (Vec<String>, Vec<String>) {
        let encoder = encoder(template);
        let example = encoder.example(&Row::new("hello", "there")).expect("tokens").expect("a label");
        let text: Vec<String> = example.tokens.iter().filter_map(|&id| encoder.tokenizer.token(id)).collect();
        let labels = text[example.first_label..].to_vec();
        (text, labels)
    }

    #[test]
    fn nothing_is_put_between_prompt_and_answer() {
        // A prompt that ends in `>` is no chat marker: the answer follows without a space.
        let (text, labels) = tokens("{{ instruction }} a>");
        assert_eq!(text, ["<bos>", "hello", "a>there", "<eos>"]);
        assert_eq!(labels, ["a>there", "<eos>"]);
        assert_eq!(tokens("{{ instruction }} a> ").1, ["there", "<eos>"]);
    }

    #[test]
    fn the_embedded_worlds_template_says_its_own_space() {
        let (text, labels) = tokens("chat");
        assert_eq!(text, ["<bos>", "<user>", "hello", "<asst>", "there", "<eos>"]);
        assert_eq!(labels, ["there", "<eos>"]);
        // As its documents are written.
        let encoder = encoder("chat");
        let document = encoder.example(&Row::new("", "<user> hello <asst> there")).expect("tokens").expect("a label");
        let row = encoder.example(&Row::new("hello", "there")).expect("tokens").expect("a label");
        assert_eq!(document.tokens, row.tokens);
        assert!(Template::new("chat").render(&Row::new("hello", "")).expect("a prompt").ends_with("<asst> "));
    }

    #[test]
    fn a_template_is_rendered_to_the_byte() {
        let render = |text: &str| Template::new(text).render(&Row::new("hello", "")).expect("a prompt");
        assert_eq!(render("<|im_start|>assistant\n{{ instruction }}\n"), "<|im_start|>assistant\nhello\n");
        // Lines that hold a block alone leave nothing behind, as in transformers.
        assert_eq!(
            render("{% if input %}\n  {{ input }}\n{% else %}\n{{ instruction }}:\n  {% endif %}\n"),
            "hello:\n"
        );
    }
}
