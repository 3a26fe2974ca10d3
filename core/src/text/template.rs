//! Prompt templates: from a row to the text of a prompt, and of a prompt with its answer.

use std::path::Path;

use minijinja::machinery::{Token, tokenize};
use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, context};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::chat::ChatTemplate;
use super::jinja::rendered;
use crate::bounds;
use crate::data::row::Row;
use crate::error::{Error, Result};

/// How a row becomes the text of a prompt: the name of a built-in template, a Jinja text over `instruction` and
/// `input`, or the chat template of a model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct Template(TemplateForm);

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
enum TemplateForm {
    Plain(String),
    Chat(ChatTemplate),
}

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

impl From<ChatTemplate> for Template {
    fn from(chat: ChatTemplate) -> Self {
        Self(TemplateForm::Chat(chat))
    }
}

impl Template {
    /// A template by its built-in name or as a Jinja text.
    pub fn new(text: impl Into<String>) -> Self {
        Self(TemplateForm::Plain(text.into()))
    }

    /// What stands in a configuration for the chat template of the model.
    pub const MODEL: &str = "model";

    /// The chat template of a model folder, with this system prompt for conversations that have none.
    ///
    /// # Errors
    /// The folder has none, or a file is malformed.
    pub fn of_model(folder: &Path, system: Option<String>) -> Result<Self> {
        let chat = ChatTemplate::of_folder(folder)?.ok_or_else(|| {
            Error::data("the model has no chat template").file(folder).help(
                "take the model's tokenizer_config.json or chat_template.jinja, or use another template: a base model that \
                 was never tuned to chat has none",
            )
        })?;
        Ok(chat.with_system(system).into())
    }

    /// The Jinja text.
    pub fn text(&self) -> &str {
        match &self.0 {
            TemplateForm::Plain(text) => TEMPLATES.iter().find(|(name, _)| name == text).map_or(text, |(_, text)| text),
            TemplateForm::Chat(chat) => chat.text(),
        }
    }

    /// With the Jinja text in place of a built-in name.
    #[must_use]
    pub fn spelled_out(self) -> Self {
        match self.0 {
            TemplateForm::Plain(_) => Self::new(self.text()),
            TemplateForm::Chat(_) => self,
        }
    }

    /// Whether it is a model's chat template, which writes the answer too, and special tokens wherever they belong.
    pub fn is_chat(&self) -> bool {
        matches!(self.0, TemplateForm::Chat(_))
    }

    /// The same with `text` in front of each instruction and an empty line between the two.
    #[must_use]
    pub fn before_instruction(&self, text: &str) -> Self {
        match &self.0 {
            TemplateForm::Plain(_) => {
                // A JSON string is a Jinja string too, so nothing in the text can end it early.
                let literal = serde_json::Value::from(format!("{text}\n\n"));
                // A template drops one line break after a block, so what follows begins as it would alone.
                Self::new(format!("{{% set instruction = {literal} ~ instruction %}}\n{}", self.text()))
            }
            TemplateForm::Chat(chat) => chat.clone().with_before(text).into(),
        }
    }

    /// The prompt of `row`; empty for a plain document.
    ///
    /// # Errors
    /// The Jinja text is malformed or does not use `instruction`, or the row has earlier turns, which only a chat
    /// template has a place for.
    pub fn render(&self, row: &Row) -> Result<String> {
        if is_document(row) {
            return Ok(String::new());
        }
        self.check_size()?;
        match &self.0 {
            TemplateForm::Chat(chat) => chat.render(row, false),
            TemplateForm::Plain(_) if !row.history.is_empty() => {
                Err(Error::config("the prompt template has no place for the earlier turns of a conversation")
                    .key("template")
                    .help("set it to \"model\", the chat template of the model, or leave such rows out"))
            }
            TemplateForm::Plain(_) => {
                let mut environment = Environment::empty();
                environment.set_undefined_behavior(minijinja::UndefinedBehavior::Strict);
                let input = row.input.as_deref().unwrap_or("");
                let told = context! { instruction => &row.instruction, input };
                // The text is the prompt to the byte, so Jinja's habit of dropping a last newline is off.
                rendered(environment, self.text(), true, told).map_err(|error| {
                    let names: Vec<&str> = TEMPLATES.iter().map(|(name, _)| *name).collect();
                    let help = format!(
                        "use one of {}, \"model\", or a Jinja text over `instruction` and `input`",
                        names.join(", ")
                    );
                    if error.remedy().is_none() { error.help(help) } else { error }
                })
            }
        }
    }

    /// The prompt of `row`, and the prompt with the answer, as the template writes them together.
    ///
    /// # Errors
    /// As [`Template::render`], or a chat template writes another prompt where it has the answer: what is learnt would not be
    /// the answer alone, and not what the model is asked later.
    pub fn render_answered(&self, row: &Row) -> Result<[String; 2]> {
        let prompt = self.render(row)?;
        let whole = match &self.0 {
            TemplateForm::Chat(chat) if !is_document(row) => chat.render(row, true)?,
            _ => format!("{prompt}{}", row.output),
        };
        if whole.starts_with(&prompt) {
            return Ok([prompt, whole]);
        }
        Err(Error::config("the chat template writes the prompt otherwise where its answer follows, so that it cannot be trained with")
            .key("template")
            .help("some templates do so with a system prompt: leave `encoding.system` out, or write the format as a Jinja text"))
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
        let row = Row { input: Some("%input%".into()), ..Row::new("%instruction%", "%output%") };
        let [prompt, _] = self.render_answered(&row)?;
        if prompt.contains("%instruction%") {
            return Ok(());
        }
        Err(Error::config(format!("the prompt template `{}` does not use `instruction`", self.text()))
            .key("template")
            .help("write `{{ instruction }}` where the user's request belongs"))
    }
}

/// Whether a row is a plain document, which has no prompt.
fn is_document(row: &Row) -> bool {
    row.instruction.is_empty() && row.input.is_none() && row.history.is_empty()
}

#[cfg(test)]
mod tests {
    use super::*;

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
