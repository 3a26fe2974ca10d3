//! The chat template that a model brings: from a conversation to the text that it was tuned on.

use std::collections::BTreeMap;
use std::path::Path;

use jiff::civil::Date;
use minijinja::value::{Kwargs, Serde};
use minijinja::{Environment, ErrorKind, UndefinedBehavior, Value, context};
use minijinja_contrib::pycompat::unknown_method_callback;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};

use super::jinja::rendered;
use crate::bounds::{self, read_file};
use crate::data::row::{Message, Row};
use crate::error::Result;
use crate::gguf::Gguf;

/// The chat template of a model, with what it is rendered with. It makes the prompt of a row that ends where the answer
/// begins, and the whole conversation with the answer, as transformers' `apply_chat_template` does.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ChatTemplate {
    /// The Jinja text over `messages` and `add_generation_prompt`.
    text: String,
    /// What the model's special tokens are, by name: `bos_token`, `eos_token`.
    special_tokens: BTreeMap<String, String>,
    /// The system prompt of conversations that have none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    system: Option<String>,
    /// Put in front of each request, with an empty line between the two.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    before: Option<String>,
}

/// The day that templates are told when they ask for today's, so that a run gives the same tomorrow: what Llama 3.1's own
/// template falls back to.
const TODAY: Date = jiff::civil::date(2024, 7, 26);

impl ChatTemplate {
    /// A template by its Jinja text and the model's special tokens by name.
    pub fn new(text: impl Into<String>, special_tokens: BTreeMap<String, String>) -> Self {
        Self { text: text.into(), special_tokens, system: None, before: None }
    }

    /// The chat template of a GGUF file, or of a model folder: `chat_template.jinja`, or else that of `tokenizer_config.json` or
    /// `chat_template.json`. `None` if it has none.
    ///
    /// # Errors
    /// A file is malformed.
    pub fn of_folder(folder: &Path) -> Result<Option<Self>> {
        if Gguf::is(folder) {
            let gguf = Gguf::open(folder)?;
            let (Some(text), tokens) = (gguf.text("tokenizer.chat_template"), gguf.tokens()?) else { return Ok(None) };
            let named =
                [("bos_token", "bos"), ("eos_token", "eos"), ("unk_token", "unknown"), ("pad_token", "padding")];
            let special = named.into_iter().filter_map(|(name, own)| {
                Some((name.to_owned(), (*tokens.get(gguf.id_of(own)? as usize)?).to_owned()))
            });
            return Ok(Some(Self::new(text, special.collect())));
        }
        let json = |name: &str| bounds::read_optional_json(&folder.join(name));
        let config = json("tokenizer_config.json")?;
        let file = folder.join("chat_template.jinja");
        let text = if file.exists() {
            let bytes = read_file("read the chat template", &file, bounds::TEMPLATE_BYTES as u64)?;
            Some(bounds::text(&bytes, &file)?.to_owned())
        } else {
            match default_of(&config["chat_template"]) {
                Some(text) => Some(text),
                None => default_of(&json("chat_template.json")?["chat_template"]),
            }
        };
        let Some(text) = text else { return Ok(None) };
        let mut special_tokens = BTreeMap::new();
        for source in [json("special_tokens_map.json")?, config] {
            for (name, token) in source.as_object().into_iter().flatten().filter(|(name, _)| name.ends_with("_token")) {
                if let Some(token) = token.as_str().or_else(|| token["content"].as_str()) {
                    special_tokens.insert(name.clone(), token.to_owned());
                }
            }
        }
        Ok(Some(Self::new(text, special_tokens)))
    }

    /// With a system prompt, for conversations that bring none.
    #[must_use]
    pub fn with_system(self, system: Option<String>) -> Self {
        Self { system, ..self }
    }

    /// With a text in front of each request.
    #[must_use]
    pub(super) fn with_before(self, text: &str) -> Self {
        let before = self.before.map_or_else(|| text.to_owned(), |before| format!("{text}\n\n{before}"));
        Self { before: Some(before), ..self }
    }

    /// The Jinja text.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// The prompt of `row`, or with its answer the whole conversation.
    ///
    /// # Errors
    /// The template is malformed, or refuses the conversation.
    pub(super) fn render(&self, row: &Row, answered: bool) -> Result<String> {
        let mut messages: Vec<Message> = Vec::new();
        if let Some(system) = self.system.as_ref().filter(|_| row.history.iter().all(|turn| turn.role != "system")) {
            messages.push(Message { role: "system".into(), content: system.clone() });
        }
        messages.extend(row.history.iter().cloned());
        let parts = [self.before.as_deref(), Some(row.instruction.as_str()), row.input.as_deref()];
        let request = parts.into_iter().flatten().collect::<Vec<_>>().join("\n\n");
        messages.push(Message { role: "user".into(), content: request });
        if answered {
            messages.push(Message { role: "assistant".into(), content: row.output.clone() });
        }
        let messages = Value::from(Serde(&messages));
        let tokens = Value::from(Serde(&self.special_tokens));
        let told = context! { messages, add_generation_prompt => !answered, ..tokens };
        rendered(environment(), &as_jinja(&self.text), false, told)
            .map_err(|error| if error.remedy().is_none() { error.help(REFUSED) } else { error })
    }
}

/// What can be done about a chat template that fails.
const REFUSED: &str = "look at what the template asks of a conversation (some take no system prompt, or want turns in turn), or write \
                       the prompt's format as a Jinja text over `instruction` and `input`";

/// The text that a `chat_template` stands for: itself, or of several with names the default one.
fn default_of(template: &serde_json::Value) -> Option<String> {
    let mut named = template.as_array().into_iter().flatten();
    let default = || named.find(|entry| entry["name"] == "default").and_then(|entry| entry["template"].as_str());
    template.as_str().or_else(default).map(str::to_owned)
}

/// The template without the marks of an answer's text, which only transformers knows.
fn as_jinja(text: &str) -> String {
    let mut text = text.to_owned();
    for (mark, plain) in [("generation", "if true"), ("endgeneration", "endif")] {
        for (open, close) in [("{%", "%}"), ("{%-", "%}"), ("{%", "-%}"), ("{%-", "-%}")] {
            text = text.replace(&format!("{open} {mark} {close}"), &format!("{open} {plain} {close}"));
        }
    }
    text
}

/// What transformers renders chat templates in.
fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_undefined_behavior(UndefinedBehavior::Lenient);
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.set_unknown_method_callback(unknown_method_callback);
    environment.add_function("raise_exception", |message: String| -> Result<Value, minijinja::Error> {
        Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
    });
    environment.add_function("strftime_now", |format: String| -> Result<String, minijinja::Error> {
        jiff::fmt::strtime::format(&format, TODAY)
            .map_err(|error| minijinja::Error::new(ErrorKind::InvalidOperation, error.to_string()))
    });
    environment.add_filter("tojson", python_json);
    environment
}

/// `json.dumps` as transformers calls it.
fn python_json(value: &Value, kwargs: Kwargs) -> Result<String, minijinja::Error> {
    let failed = |error: serde_json::Error| minijinja::Error::new(ErrorKind::BadSerialization, error.to_string());
    let indent: Option<usize> = kwargs.get("indent")?;
    kwargs.get::<Option<bool>>("ensure_ascii")?;
    kwargs.assert_all_used()?;
    let mut written = Vec::new();
    match indent {
        Some(indent) => {
            let indent = " ".repeat(indent.min(16));
            let formatter = PrettyFormatter::with_indent(indent.as_bytes());
            value.serialize(&mut Serializer::with_formatter(&mut written, formatter)).map_err(failed)?;
        }
        None => value.serialize(&mut Serializer::with_formatter(&mut written, Spaced)).map_err(failed)?,
    }
    String::from_utf8(written).map_err(|error| minijinja::Error::new(ErrorKind::BadSerialization, error.to_string()))
}

/// JSON on one line, with a space behind each comma and colon.
struct Spaced;

impl Formatter for Spaced {
    fn begin_array_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHATML: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + \
                          message.content.strip() + '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}\
                          {{ '<|im_start|>assistant\n' }}{% endif %}\n";

    fn chat(text: &str) -> ChatTemplate {
        let tokens = [("bos_token", "<s>"), ("eos_token", "</s>")];
        ChatTemplate::new(text, tokens.map(|(name, token)| (name.to_owned(), token.to_owned())).into())
    }

    #[test]
    fn a_prompt_ends_where_the_answer_begins() -> Result<()> {
        let row = Row { input: Some("{% x %}".into()), ..Row::new(" \"hi\" {{ a }} <|im_end|>", "yes\n") };
        let prompt = "<|im_start|>user\n\"hi\" {{ a }} <|im_end|>\n\n{% x %}<|im_end|>\n<|im_start|>assistant\n";
        assert_eq!(chat(CHATML).render(&row, false)?, prompt);
        assert_eq!(chat(CHATML).render(&row, true)?, format!("{prompt}yes<|im_end|>\n"));
        Ok(())
    }

    #[test]
    fn a_system_prompt_and_earlier_turns_go_first() -> Result<()> {
        let turn = |role: &str, content: &str| Message { role: role.into(), content: content.into() };
        let text = "{% for m in messages %}[{{ m.role }}:{{ m.content }}]{% endfor %}";
        let template = chat(text).with_system(Some("be safe".into())).with_before("think");
        let mut row = Row { history: vec![turn("user", "a"), turn("assistant", "b")], ..Row::new("c", "d") };
        let rest = "[user:a][assistant:b][user:think\n\nc]";
        assert_eq!(template.render(&row, false)?, format!("[system:be safe]{rest}"));
        row.history.insert(0, turn("system", "own"));
        assert_eq!(template.render(&row, true)?, format!("[system:own]{rest}[assistant:d]"));
        Ok(())
    }

    #[test]
    fn templates_use_what_transformers_gives_them() -> Result<()> {
        for (text, expected) in [
            ("{{ bos_token }}{{ nothing }}|{% if nothing %}x{% endif %}{{ tools is defined }}", "<s>|False"),
            ("{{ strftime_now('%d %b %Y') }}", "26 Jul 2024"),
            (
                "{{ {'role': 'a', 'n': [1, true, none], 'q': 'ü<'} | tojson }}",
                "{\"role\": \"a\", \"n\": [1, true, null], \"q\": \"ü<\"}",
            ),
            ("{{ [1] | tojson(indent=2) }}", "[\n  1\n]"),
            (
                "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
                "1",
            ),
            ("{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}x{% endfor %}", ""),
            ("{{ messages[0]['content'].split(' ')[-1].upper() }}", "B"),
            ("{%- generation -%} {{ 1 }} {%- endgeneration -%}", "1"),
            ("{% generation %}a{% endgeneration %}", "a"),
            ("{{ messages[1:] | length }}{{ 'a' in messages[0].content }}", "0True"),
            ("{% macro f(x) %}<{{ x }}>{% endmacro %}{{ f('y') }}", "<y>"),
            ("a\n", "a"),
        ] {
            assert_eq!(chat(text).render(&Row::new("a b", ""), false)?, expected, "{text}");
        }
        Ok(())
    }

    /// As Mistral's, which puts the system prompt into the last turn if that is the user's.
    #[test]
    fn a_prompt_that_the_answer_changes_is_refused() {
        let text = "{% for m in messages %}{% if m.role == 'user' %}[{{ system if loop.last }}{{ m.content }}]{% else %}\
                    {{ m.content }}{% endif %}{% endfor %}";
        let template = super::super::Template::from(chat(&text.replace("system if", "'be safe ' if")));
        let error = template.render_answered(&Row::new("a", "b")).expect_err("another prompt").to_string();
        assert!(error.contains("writes the prompt otherwise") && error.contains("key: template"), "{error}");
        assert!(super::super::Template::from(chat(CHATML)).render_answered(&Row::new("a", "b")).is_ok());
    }

    #[test]
    fn a_conversation_that_the_template_refuses_says_why() {
        let error = chat("{{ raise_exception('roles must alternate') }}").render(&Row::new("a", ""), false);
        let error = error.expect_err("refused").to_string();
        assert!(error.contains("roles must alternate"), "{error}");
    }

    #[test]
    fn a_folder_says_it_in_one_of_several_files() -> Result<()> {
        let folder = tempfile::tempdir().expect("a folder");
        let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).expect("a file");
        let of_folder = || ChatTemplate::of_folder(folder.path());
        assert_eq!(of_folder()?, None);
        write(
            "tokenizer_config.json",
            r#"{"chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d{{ bos_token }}{{ eos_token }}"}], "bos_token": {"content": "<b>"}, "eos_token": "<e>"}"#,
        );
        let row = Row::new("a", "");
        assert_eq!(of_folder()?.expect("a template").render(&row, false)?, "d<b><e>");
        write("chat_template.jinja", "file");
        assert_eq!(of_folder()?.expect("a template").render(&row, false)?, "file");
        write("tokenizer_config.json", "{");
        assert!(of_folder().is_err());
        Ok(())
    }
}
