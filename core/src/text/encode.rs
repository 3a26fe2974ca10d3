//! Rows to training examples and prompts: template and tokenizer together.

use super::template::Template;
use super::tokenizer::Tokenizer;
use crate::data::example::Example;
use crate::data::row::Row;
use crate::error::{Error, Result};

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
        Ok(without_ends(&self.tokens(&self.template.render(row)?)?))
    }

    /// The tokens of a text, and where they end in it. A chat template writes special tokens itself, so that the tokenizer
    /// adds none; before a text that begins with the first token that it would add, it does not add that one.
    fn tokens(&self, text: &str) -> Result<Vec<(u32, usize)>> {
        let mut tokens = self.tokenizer.encode_with_ends(text, !self.template.is_chat())?;
        if let [(first, _), (second, _), ..] = tokens[..]
            && first == second
            && !self.template.is_chat()
            && self.tokenizer.encode("", true)?.first() == Some(&first)
        {
            tokens.remove(0);
        }
        Ok(tokens)
    }

    /// The tokens of prompt, answer and end of text, with the prompt's tokens masked from the loss.
    ///
    /// Prompt and answer are tokenised together with nothing between them, as at the reference: what separates them is
    /// part of the template. Where a token spans the boundary, the mask ends before it, so that no part of the answer goes
    /// unlearnt and, but for that token, no part of the prompt is learnt. What a chat template writes behind the answer is
    /// learnt with it; the end of text is added only where that has no end token. `None` if the length limit leaves no label.
    ///
    /// # Errors
    /// The template or the tokenizer failed.
    pub fn example(&self, row: &Row) -> Result<Option<Example>> {
        let [prompt, whole] = self.template.render_answered(row)?;
        let (before, spans) = (without_ends(&self.tokens(&prompt)?), self.tokens(&whole)?);
        let mut tokens = without_ends(&spans);
        let behind = || spans.iter().position(|&(_, end)| end > prompt.len()).unwrap_or(spans.len());
        let masked = if tokens.starts_with(&before) { before.len() } else { behind() };
        let ended = || tokens[masked..].iter().any(|token| self.tokenizer.ends.contains(token));
        if !(self.template.is_chat() && ended()) {
            tokens.push(self.tokenizer.eos);
        }
        tokens.truncate(self.max_length);
        // The first token has nothing before it to be predicted from.
        let first_label = masked.max(1);
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
            .key("encoding.max_length")
            .help("raise `encoding.max_length` above the length of the prompts"));
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

/// The tokens alone.
fn without_ends(tokens: &[(u32, usize)]) -> Vec<u32> {
    tokens.iter().map(|&(token, _)| token).collect()
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

    /// The prompt alone is `x ab`, and with its answer `x a bc`: only `bc` has a letter of the answer.
    #[test]
    fn no_whole_token_of_the_prompt_is_learnt() {
        let words = ["x", "a", "b", "c", "ab", "bc", "<eos>"];
        let vocabulary = words.iter().zip(0..).map(|(word, id)| (word.to_string(), id)).collect();
        let merges = [("b", "c"), ("a", "b")].map(|(left, right)| (left.to_owned(), right.to_owned()));
        let model = tokenizers::models::bpe::BPE::new(vocabulary, merges.into());
        let tokenizer = Tokenizer::new(tokenizers::Tokenizer::new(model), 6, 6);
        let encoder = Encoder { tokenizer, template: Template::new("{{ instruction }}"), max_length: 100 };
        assert_eq!(encoder.prompt(&Row::new("xab", "c")).expect("tokens"), [0, 4]);
        let example = encoder.example(&Row::new("xab", "c")).expect("tokens").expect("a label");
        assert_eq!((example.tokens, example.first_label), (vec![0, 1, 5, 6], 2));
    }

    /// The template writes the special tokens and the end of the answer; what stands behind that is learnt, too.
    #[test]
    fn a_chat_template_has_each_special_token_once() {
        let ended = "{{ bos_token }} {% for m in messages %}{{ '<user>' if m.role == 'user' else '<asst>' }} {{ m.content }} \
                     {% if m.role == 'assistant' %}<eos> a>{% endif %}{% endfor %}\
                     {% if add_generation_prompt %}<asst>{% endif %}";
        let chat = |text: &str| {
            let tokens = [("bos_token".to_owned(), "<bos>".to_owned())];
            Encoder { template: super::super::ChatTemplate::new(text, tokens.into()).into(), ..encoder("") }
        };
        let tokens = |encoder: &Encoder| {
            let example = encoder.example(&Row::new("hello", "there")).expect("tokens").expect("a label");
            let text: Vec<String> = example.tokens.iter().filter_map(|&id| encoder.tokenizer.token(id)).collect();
            (text, example.first_label)
        };
        let expected = ["<bos>", "<user>", "hello", "<asst>", "there", "<eos>", "a>"].map(str::to_owned);
        assert_eq!(tokens(&chat(ended)), (expected.to_vec(), 4));
        let (text, first) = tokens(&chat(&ended.replace("<eos> a>", "")));
        assert_eq!((&text[4..], first), (&["there".to_owned(), "<eos>".to_owned()][..], 4));
    }

    #[test]
    fn a_template_may_write_the_first_token_itself() {
        let expected = ["<bos>", "hello", "there", "<eos>"].map(str::to_owned);
        assert_eq!(tokens("<bos> {{ instruction }} ").0, expected);
        assert_eq!(tokens("{{ instruction }} ").0, expected);
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
}
