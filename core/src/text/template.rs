//! Prompt templates: from a row to the text of a prompt.

use minijinja::machinery::{Token, tokenize};
use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, context};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::bounds;
use crate::data::row::Row;
use crate::error::{Error, Result};

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
