//! GGUF files, as llama.cpp keeps models: weights, configuration and tokenizer in one.
//!
//! | file | what it holds |
//! |---|---|
//! | `config` | the `config.json` that a file stands for |
//! | `tensors` | its tensors under Hugging Face's names |
//!
//! Its tokenizer and chat template are read where text is.

mod config;
mod tensors;

use std::ffi::OsStr;
use std::fs::File;
use std::path::{Path, PathBuf};

use candle_core::quantized::gguf_file::{Content, Value};

use crate::bounds;
use crate::error::{Error, Result};
use crate::guard::guarded;

pub(crate) use tensors::{GgufTensors, StoredTensor};

/// An open GGUF file.
#[derive(Debug)]
pub struct Gguf {
    pub(crate) path: PathBuf,
    file: File,
    content: Content,
}

impl Gguf {
    /// Whether `path` is called like a GGUF file.
    pub fn is(path: &Path) -> bool {
        path.extension() == Some(OsStr::new("gguf"))
    }

    /// Opens a file and reads its table of contents.
    ///
    /// # Errors
    /// It cannot be read, or is no GGUF file.
    pub fn open(path: &Path) -> Result<Self> {
        let mut file = bounds::open("open the GGUF file", path)?;
        let content = guarded(|| Content::read(&mut file));
        let content = content.and_then(|content| content.map_err(|error| error.to_string())).map_err(|why| {
            Error::data(format!("the GGUF file cannot be read: {why}")).file(path).help(
                "it is cut off or damaged, or holds a kind of numbers that is not read: copy or download it again",
            )
        })?;
        Ok(Self { path: path.to_owned(), file, content })
    }

    /// A value that files need not have.
    pub(crate) fn value(&self, key: &str) -> Option<&Value> {
        self.content.metadata.get(key)
    }

    pub(crate) fn integer(&self, key: &str) -> Option<u64> {
        match self.value(key)? {
            Value::I32(number) => u64::try_from(*number).ok(),
            Value::I64(number) => u64::try_from(*number).ok(),
            value => value.to_u64().ok(),
        }
    }

    pub(crate) fn text(&self, key: &str) -> Option<&str> {
        self.value(key)?.to_string().ok().map(String::as_str)
    }

    pub(crate) fn list(&self, key: &str) -> Option<&[Value]> {
        self.value(key)?.to_vec().ok().map(Vec::as_slice)
    }

    /// The vocabulary.
    ///
    /// # Errors
    /// The file has none.
    pub(crate) fn tokens(&self) -> Result<Vec<&str>> {
        let list = self.list("tokenizer.ggml.tokens").ok_or_else(|| self.missing("tokenizer.ggml.tokens"))?;
        Ok(list.iter().map(|token| token.to_string().map_or("", String::as_str)).collect())
    }

    /// The id of a special token: `bos`, `eos`, `unknown`, `padding`.
    pub(crate) fn id_of(&self, name: &str) -> Option<u32> {
        u32::try_from(self.integer(&format!("tokenizer.ggml.{name}_token_id"))?).ok()
    }

    /// The architecture, as llama.cpp calls it.
    fn architecture(&self) -> &str {
        self.text("general.architecture").unwrap_or_default()
    }

    pub(crate) fn fault(&self, message: impl Into<String>, key: &str) -> Error {
        Error::data(message).file(&self.path).key(key)
    }

    pub(crate) fn missing(&self, key: &str) -> Error {
        self.fault(format!("the file does not say `{key}`"), key)
            .help("convert the model again with a current llama.cpp, or take its folder in Hugging Face's layout")
    }
}
