//! From text to tokens and back.

mod chat;
mod encode;
mod gguf;
mod jinja;
mod template;
mod tokenizer;

pub use chat::ChatTemplate;
pub use encode::Encoder;
pub use template::{TEMPLATES, Template};
pub use tokenizer::Tokenizer;
