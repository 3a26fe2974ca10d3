//! Architectures, one file each, and what their files have in common.

pub mod decoder;
pub mod gemma;
pub mod gemma2;
pub mod gemma3;
pub mod llama;
pub mod mistral;
pub mod opt;
pub mod phi3;
pub mod qwen2;
pub mod qwen3;
pub mod rope_scaling;
pub mod windows;

use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use titer_core::bounds::{self, at_most};
use titer_core::weights::ParamList;
use titer_core::{Error, Kind, Result, Settings};

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

/// Fails on the first size that is zero or above its limit.
fn check_sizes(sizes: impl IntoIterator<Item = (&'static str, usize, usize)>) -> Result<()> {
    for (key, size, most) in sizes {
        if size == 0 {
            let error = Error::config(format!("`{key}` must be at least 1, found `0`")).key(key);
            return Err(error.help(format!("set it to 1 or more, at most {most}")));
        }
        at_most(key, size, most)?;
    }
    Ok(())
}

/// Fails if the parameters are more than any machine holds.
fn check_count(params: &ParamList) -> Result<()> {
    let (count, most) = (params.count(), bounds::PARAMETERS);
    if count <= most {
        return Ok(());
    }
    let message = format!("the sizes make a model of {count} parameters, at most {most} are possible");
    Err(Error::config(message).key("hidden_size").help("choose smaller sizes; this is a limit of Titer"))
}

/// Fails unless `number` is above 0, at most `most` and finite.
fn check_positive(key: &'static str, number: f64, most: f64, usual: &str) -> Result<()> {
    if number > 0. && number <= most {
        return Ok(());
    }
    let message = format!("`{key}` must lie in (0, {most}], found `{number}`");
    Err(Error::config(message).key(key).help(format!("{usual} is usual")))
}

/// Fails unless fresh weights can have the standard deviation `given`.
fn check_deviation(key: &'static str, given: Option<f64>) -> Result<()> {
    given.filter(|given| *given != 0.).map_or(Ok(()), |given| check_positive(key, given, 1e3, "0.02"))
}

/// What is wrong about a `config.json`: its values are data, not the user's configuration.
fn in_checkpoint(error: Error, path: &Path) -> Error {
    let error = error.of_kind(Kind::Data).file(path);
    if error.remedy().is_some() { error } else { error.help(COPY_AGAIN) }
}

const COPY_AGAIN: &str = "correct the key, or take config.json from the model's source again";

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
    Error::data(message).file(path).key(key).help(COPY_AGAIN)
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
    let Some(map) = config.as_object_mut() else {
        let error = Error::data(format!("this {family} config.json is no table")).file(path);
        return Err(error.help(COPY_AGAIN));
    };
    map.retain(|_, value| !value.is_null());
    Settings::from(std::mem::take(map)).read().map_err(|error| in_checkpoint(error, path))
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
