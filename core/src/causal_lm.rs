//! Opens models: folders in Hugging Face's layout (`config.json`, `model.safetensors` or shards, `tokenizer.json`), and GGUF
//! files, which hold all of it. What is said of a folder here goes for such a file as well.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use candle_core::Device;
use serde_json::{Value, json};

use crate::bounds;
use crate::data::Batch;
use crate::error::{Error, Kind, Result, io_error};
use crate::gguf::Gguf;
use crate::model::{Model, ModelEntry, label_loss};
use crate::registry;
use crate::text::Tokenizer;
use crate::weights::checkpoint::Checkpoint;
use crate::weights::{Precision, Weights};

/// A causal language model that can be run: architecture, weights and tokenizer. The runner, judges and plugins open models
/// this way. A clone shares the weights until one of the two changes them.
///
/// ```no_run
/// use candle_core::Device;
/// use titer_core::CausalLm;
/// use titer_core::device::parse_dtype;
///
/// # fn main() -> titer_core::Result<()> {
/// let device = Device::Cpu;
/// let judge = CausalLm::open("models/guard".as_ref(), parse_dtype("bf16", &device)?, &device)?;
/// let prompt = judge.tokenizer.encode("Is this answer harmful?", true)?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct CausalLm {
    /// The architecture.
    pub model: Arc<dyn Model>,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// Its weights.
    pub weights: Weights,
}

impl CausalLm {
    /// Opens a folder; its weights are stored as `precision` says. The folder's `model_type` decides which registered model
    /// reads it.
    ///
    /// # Errors
    /// A file is missing or malformed, no registered model reads it, or the parts do not belong together.
    pub fn open(folder: &Path, precision: Precision, device: &Device) -> Result<Self> {
        Self::with_weights(folder, None, folder, precision, device)
    }

    /// Likewise with the weights of another folder or file. `name` is the registered model that must read the folder.
    ///
    /// # Errors
    /// As [`CausalLm::open`].
    pub fn with_weights(
        folder: &Path,
        name: Option<&str>,
        weights: &Path,
        precision: Precision,
        device: &Device,
    ) -> Result<Self> {
        let started = Instant::now();
        let config = read_config(folder)?;
        let [path, tokenizer_path] = ["config.json", "tokenizer.json"].map(|name| file_of(folder, name));
        let entry = model_entry(&config, name).map_err(|error| error.file(&path))?;
        let model = model_of(entry, &config, &path)?;
        let tokenizer = if Gguf::is(folder) {
            Gguf::open(folder)?.tokenizer()?
        } else {
            with_special_tokens(Tokenizer::from_file(&tokenizer_path, 0, 0)?, folder, &config)?
        };
        let vocabulary = model.spec().vocab_size;
        let special = tokenizer.ends.iter().chain([&tokenizer.pad]).map(|id| id.saturating_add(1));
        let largest = special.fold(tokenizer.id_bound(), u32::max) as usize;
        if largest > vocabulary {
            return Err(Error::data(format!(
                "the tokenizer gives ids up to {}, but the model's vocabulary has {vocabulary} tokens",
                largest - 1
            ))
            .file(&tokenizer_path)
            .help("take tokenizer.json from the same model as the weights"));
        }
        let loaded = Weights::load(model.params(), &mut Checkpoint::open(weights)?, precision, device)?;
        tracing::info!(weights = %weights.display(), seconds = started.elapsed().as_secs_f64(), "loaded a model");
        Ok(Self { model: Arc::from(model), tokenizer, weights: loaded })
    }

    /// Fails if the weights that a stage changed, or the loss at them on a few tokens, are not finite.
    ///
    /// # Errors
    /// They are not, or a tensor operation failed.
    pub fn check_sound(&self) -> Result<()> {
        const FEW: usize = 8;
        let spec = self.model.spec();
        let ids: Vec<u32> = (0..spec.vocab_size.min(spec.max_positions).min(FEW) as u32).collect();
        let labels = (1..ids.len()).map(|at| (0, at - 1, ids[at]));
        let batch = Batch::with_labels(&[&ids], labels.collect::<Vec<_>>(), self.tokenizer.pad, self.weights.device())?;
        self.weights.check_finite().map_err(|error| error.help(Error::DIVERGED))?;
        let loss = label_loss(self.model.as_ref(), &self.weights, &batch)?;
        if loss.is_finite() {
            return Ok(());
        }
        let message = format!("the model computes nothing finite any more: its loss on {} tokens is {loss}", ids.len());
        Err(Error::run(message).help(Error::DIVERGED))
    }
}

/// Where a model has its file of this name: in its folder, or in the one file that it is.
pub fn file_of(folder: &Path, name: &str) -> PathBuf {
    if Gguf::is(folder) { folder.to_owned() } else { folder.join(name) }
}

/// The extension of files with weights.
pub const WEIGHTS: &str = "safetensors";

/// The files of a model folder that can change what it computes, sorted by name.
///
/// # Errors
/// The folder cannot be read.
pub fn model_files(folder: &Path) -> Result<Vec<PathBuf>> {
    const EXTENSIONS: [&str; 5] = [WEIGHTS, "json", "model", "jinja", "txt"];
    if Gguf::is(folder) {
        return Ok(vec![folder.to_owned()]);
    }
    let listing = std::fs::read_dir(folder).map_err(|error| io_error("read the checkpoint folder", folder, error))?;
    let mut files: Vec<PathBuf> = listing
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().and_then(std::ffi::OsStr::to_str).is_some_and(|ext| EXTENSIONS.contains(&ext)))
        .collect();
    files.sort();
    Ok(files)
}

/// The `config.json` of a model folder.
///
/// # Errors
/// It is missing or malformed.
pub fn read_config(folder: &Path) -> Result<Value> {
    if Gguf::is(folder) {
        return Gguf::open(folder)?.config();
    }
    let path = folder.join("config.json");
    if !path.exists() && folder.join("adapter_config.json").exists() {
        let error = Error::data("the folder holds an adapter of PEFT, not a model").file(folder);
        return Err(error.help("merge it into its base model first, as with PEFT's `merge_and_unload`"));
    }
    let bytes = bounds::read_file("read the model's configuration", &path, bounds::CONFIG_BYTES)
        .map_err(|error| error.help("a model folder needs config.json, model.safetensors and tokenizer.json"))?;
    let value: Value = serde_json::from_str(bounds::text(&bytes, &path)?).map_err(|error| {
        Error::data(format!("config.json is not valid JSON: {error}"))
            .file(&path)
            .at("line", error.line().to_string())
            .help("correct the line, or copy or download the file again")
    })?;
    if value.is_object() {
        return Ok(value);
    }
    Err(Error::data("config.json holds no table").file(&path).help("take config.json from the model's source again"))
}

/// The model that the `config.json` at `path` describes. What is wrong there is damaged data, whoever reads it.
///
/// # Errors
/// A key is missing or wrong.
pub fn model_of(entry: &ModelEntry, config: &Value, path: &Path) -> Result<Box<dyn Model>> {
    if let Some(quantized) = config.get("quantization_config").filter(|value| !value.is_null()) {
        let method = quantized["quant_method"].as_str().unwrap_or("an unknown method");
        return Err(Error::data(format!("the weights are quantized by {method}, which cannot be read"))
            .file(path)
            .key("quantization_config")
            .help("take the checkpoint that is not quantized; `dtype` stores it in fewer bits"));
    }
    (entry.from_config)(config, path).map_err(|error| error.of_kind(Kind::Data).file(path))
}

fn model_entry(config: &Value, name: Option<&str>) -> Result<&'static ModelEntry> {
    let kind = config["model_type"].as_str().unwrap_or_default();
    let entries = registry::all::<ModelEntry>()?;
    let known = || entries.iter().flat_map(|entry| entry.model_types).copied().collect::<Vec<_>>().join(", ");
    let reads = |entry: &ModelEntry| entry.model_types.contains(&kind);
    let found = match name {
        Some(name) => Some(registry::find::<ModelEntry>(name)?).filter(|entry| reads(entry)),
        None => entries.iter().copied().find(|entry| reads(entry)),
    };
    found.ok_or_else(|| {
        Error::data(format!(
            "the folder holds a model of type `{kind}`, which {} does not read",
            name.unwrap_or("Titer")
        ))
        .key("model_type")
        .help(format!("types that can be read: {}", known()))
    })
}

/// The tokenizer with the tokens that end an answer and that pad.
///
/// An answer ends at any id of `eos_token_id`, as in transformers, where `GenerationMixin` stops at every element of
/// `generation_config.eos_token_id` (`EosTokenCriteria`), and `PreTrainedModel.from_pretrained` takes the generation
/// configuration from `generation_config.json` if there is one, else from `config.json`. Training rows end in the tokenizer's
/// `eos_token`, as in transformers, or else in the first id.
fn with_special_tokens(tokenizer: Tokenizer, folder: &Path, config: &Value) -> Result<Tokenizer> {
    let generation = bounds::read_optional_json(&folder.join("generation_config.json"))?;
    let ids = |key: &str| -> Result<Vec<u32>> {
        match [(&generation, "generation_config.json"), (config, "config.json")]
            .into_iter()
            .find(|(config, _)| !config[key].is_null())
        {
            Some((config, file)) => token_ids(&config[key], key).map_err(|error| error.file(folder.join(file))),
            None => Ok(Vec::new()),
        }
    };
    warn_of_generation(&generation, &folder.join("generation_config.json"));
    let ends = ids("eos_token_id")?;
    let named = bounds::read_optional_json(&folder.join("tokenizer_config.json"))?;
    let named = named["eos_token"].as_str().or_else(|| named["eos_token"]["content"].as_str());
    let eos = named.and_then(|token| tokenizer.id(token)).or_else(|| ends.first().copied()).ok_or_else(|| {
        Error::data("no `eos_token_id`: nothing would end an answer")
            .file(folder.join("config.json"))
            .key("eos_token_id")
            .help("add the id of the end-of-text token to config.json")
    })?;
    let pad = ids("pad_token_id")?.first().copied().unwrap_or(eos);
    Ok(tokenizer.with_special(eos, ends, pad))
}

/// Warns of settings that transformers' own generation would obey, also when it decodes greedily, and that are not applied here.
fn warn_of_generation(generation: &Value, file: &Path) {
    for (key, neutral) in
        [("repetition_penalty", 1.), ("no_repeat_ngram_size", 0.), ("min_new_tokens", 0.), ("min_length", 0.)]
    {
        if generation[key].as_f64().is_some_and(|value| value != neutral) {
            tracing::warn!(file = %file.display(), key, value = %generation[key], "this setting of generation is not applied");
        }
    }
    for key in ["suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "sequence_bias", "forced_bos_token_id"] {
        if !generation[key].is_null() && generation[key] != json!([]) {
            tracing::warn!(file = %file.display(), key, "this setting of generation is not applied");
        }
    }
}

/// The token ids of a configuration's key: one, or a list. `-1` is how old configurations say that there is none.
fn token_ids(value: &Value, key: &str) -> Result<Vec<u32>> {
    let list = value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice);
    let id = |value: &Value| {
        value.as_u64().and_then(|id| u32::try_from(id).ok()).ok_or_else(|| {
            Error::data(format!("`{key}` must be a token id or a list of them, found `{value}`"))
                .key(key)
                .help("write the ids as whole numbers that are not negative")
        })
    };
    list.iter().filter(|value| **value != json!(-1)).map(id).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The tokenizer of a folder with these files; `<user>` is token 2, `<asst>` 3, `<eos>` 4.
    fn opened(config: &Value, files: &[(&str, Value)]) -> Result<Tokenizer> {
        let folder = tempfile::tempdir().expect("a folder");
        for (name, content) in files {
            std::fs::write(folder.path().join(name), content.to_string()).expect("a file");
        }
        let words = ["<pad>", "<bos>", "<user>", "<asst>", "<eos>", "a"].map(str::to_owned);
        with_special_tokens(Tokenizer::word_level(&words)?, folder.path(), config)
    }

    #[test]
    fn every_end_token_counts_and_generation_config_goes_first() -> Result<()> {
        let ends = |config: Value, files: &[(&str, Value)]| {
            let tokenizer = opened(&config, files)?;
            Ok::<_, Error>((tokenizer.eos, tokenizer.ends, tokenizer.pad))
        };
        let generation = |ids: Value| ("generation_config.json", json!({ "eos_token_id": ids }));
        let named = |token: Value| ("tokenizer_config.json", json!({ "eos_token": token }));
        assert_eq!(ends(json!({ "eos_token_id": 4 }), &[])?, (4, vec![4], 4));
        assert_eq!(ends(json!({ "eos_token_id": [4, 2] }), &[])?, (4, vec![2, 4], 4));
        assert_eq!(ends(json!({ "eos_token_id": 4 }), &[generation(json!([3, 2]))])?, (3, vec![2, 3], 3));
        // Training rows end as the tokenizer says, which ends answers too.
        assert_eq!(ends(json!({ "eos_token_id": [4, 2] }), &[named(json!("<user>"))])?, (2, vec![2, 4], 2));
        let added = named(json!({ "content": "<asst>", "lstrip": false }));
        assert_eq!(ends(json!({ "eos_token_id": 4, "pad_token_id": 0 }), &[added])?, (3, vec![3, 4], 0));
        // The end token may stand in the tokenizer's configuration alone; -1 is no padding token.
        assert_eq!(ends(json!({ "pad_token_id": -1 }), &[named(json!("<eos>"))])?, (4, vec![4], 4));
        Ok(())
    }

    #[test]
    fn end_tokens_that_are_none_say_where() {
        for (config, files, expected) in [
            (json!({}), vec![], vec!["eos_token_id", "config.json"]),
            (json!({ "eos_token_id": "</s>" }), vec![], vec!["eos_token_id", "</s>"]),
            (json!({ "eos_token_id": [4, -7] }), vec![], vec!["-7"]),
            (
                json!({ "eos_token_id": 4 }),
                vec![("generation_config.json", json!({ "eos_token_id": 0.5 }))],
                vec!["generation_config.json", "0.5"],
            ),
        ] {
            let error = opened(&config, &files).expect_err("no end token").to_string();
            assert!(expected.iter().all(|part| error.contains(part)), "{error}");
        }
    }
}
