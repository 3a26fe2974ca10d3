//! Architectures, one file each, and what their files have in common.

pub mod decoder;
pub mod llama;
pub mod mistral;
pub mod opt;
pub mod qwen2;
pub mod rope_scaling;

use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use titer_core::{Error, Result, Settings};

/// Declares the keys of a `config.json` that shape the computation: those of every architecture and, with a default
/// each, those of its own. The defaults are the small model of the embedded world.
macro_rules! model_keys {
    ($(#[$about:meta])* $name:ident { $($(#[$doc:meta])* $key:ident: $kind:ty = $default:expr,)* }) => {
        $(#[$about])*
        #[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize, schemars::JsonSchema)]
        #[serde(default)]
        pub struct $name {
            /// Rows of the embedding; set by the tokenizer when a model is built from scratch.
            pub vocab_size: usize,
            /// Width of the residual stream.
            pub hidden_size: usize,
            /// Transformer blocks.
            pub num_hidden_layers: usize,
            /// Query heads.
            pub num_attention_heads: usize,
            /// The longest sequence.
            pub max_position_embeddings: usize,
            $($(#[$doc])* pub $key: $kind,)*
        }

        impl Default for $name {
            fn default() -> Self {
                Self {
                    vocab_size: 0,
                    hidden_size: 64,
                    num_hidden_layers: 3,
                    num_attention_heads: 4,
                    max_position_embeddings: 128,
                    $($key: $default,)*
                }
            }
        }
    };
}
use model_keys;

/// The sites of block `index`, in order of computation.
fn block_sites(index: usize) -> [String; 3] {
    ["attn_out", "mlp_out", "block_out"].map(|kind| format!("layer.{index}.{kind}"))
}

/// The sites of a model of `layers` blocks, in order of computation.
fn all_sites(layers: usize) -> Vec<String> {
    std::iter::once("embed".to_owned()).chain((0..layers).flat_map(block_sites)).collect()
}

/// Fails on the first size that is zero.
fn check_sizes(sizes: impl IntoIterator<Item = (&'static str, usize)>) -> Result<()> {
    match sizes.into_iter().find(|(_, size)| *size == 0) {
        Some((key, _)) => Err(Error::config(format!("`{key}` must be at least 1, found `0`")).key(key)),
        None => Ok(()),
    }
}

/// Fails if `heads` heads do not share `width` evenly.
fn check_heads(width: usize, heads: usize) -> Result<()> {
    if width.is_multiple_of(heads) {
        return Ok(());
    }
    let message = format!("`hidden_size` {width} is not a multiple of {heads} heads");
    Err(Error::config(message).key("num_attention_heads").help("change one of the two"))
}

/// The error about `key` of the `config.json` at `path`.
fn refuse(key: &str, message: String, path: &Path) -> Error {
    Error::data(message).file(path).key(key)
}

/// Fails unless the `config.json` at `path` has all of `keys`: a default in place of a size would be a wrong model.
fn require(family: &str, keys: &[&str], config: &Value, path: &Path) -> Result<()> {
    match keys.iter().find(|key| config[**key].is_null()) {
        Some(key) => {
            let error = refuse(key, format!("`{key}` is missing"), path);
            Err(error.help(format!("this is not a config.json of the {family} family")))
        }
        None => Ok(()),
    }
}

/// The keys of the `config.json` at `path` that `T` has; a null is a key left out.
fn read_keys<T: DeserializeOwned>(family: &str, mut config: Value, path: &Path) -> Result<T> {
    if let Some(map) = config.as_object_mut() {
        map.retain(|_, value| !value.is_null());
    }
    serde_json::from_value(config)
        .map_err(|error| Error::data(format!("this {family} config.json cannot be used: {error}")).file(path))
}

/// The `config.json` of a model that was built here.
fn keys_of<T: Serialize>(config: &T, model_type: &str, architecture: &str) -> Value {
    let mut keys = Settings::of(config).as_map().clone();
    keys.retain(|_, value| !value.is_null());
    keys.insert("architectures".into(), json!([architecture]));
    keys.insert("model_type".into(), json!(model_type));
    keys.insert("torch_dtype".into(), json!("float32"));
    Value::Object(keys)
}
