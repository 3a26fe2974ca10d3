//! From text to tokens and back.

mod encode;
mod guard;
mod template;
mod tokenizer;

pub use encode::Encoder;
pub use template::{TEMPLATES, Template};
pub use tokenizer::Tokenizer;
