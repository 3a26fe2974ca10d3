//! Model folders in Hugging Face's layout: `config.json`, `model.safetensors` (or shards), `tokenizer.json`.

use std::path::Path;

use candle_core::Device;
use serde_json::{Value, json};
use titer_core::bounds;
use titer_core::checkpoint::Checkpoint;
use titer_core::data::Batch;
use titer_core::step::label_loss;
use titer_core::text::Tokenizer;
use titer_core::{Error, Kind, Model, ModelEntry, Precision, Result, Weights, registry};

use crate::disk;

/// A model that can be run: architecture, weights and tokenizer.
#[derive(Debug)]
pub struct BaseModel {
    /// The architecture.
    pub model: Box<dyn Model>,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// Its weights.
    pub weights: Weights,
}

impl BaseModel {
    /// Opens a folder; its weights are stored as `precision` says. `name` is the registered model that must read it; without it the folder's `model_type` decides.
    ///
    /// # Errors
    /// A file is missing or malformed, or the parts do not belong together.
    pub fn open(folder: &Path, name: Option<&str>, precision: Precision, device: &Device) -> Result<Self> {
        let config = read_config(folder)?;
        let path = folder.join("config.json");
        let entry = model_entry(&config, name).map_err(|error| error.file(&path))?;
        let model = model_of(entry, &config, &path)?;
        let eos = special_token(folder, &config, "eos_token_id")?.ok_or_else(|| {
            Error::data("no `eos_token_id`: nothing would end an answer")
                .file(&path)
                .key("eos_token_id")
                .help("add the id of the end-of-text token to config.json")
        })?;
        let pad = special_token(folder, &config, "pad_token_id")?.unwrap_or(eos);
        let tokenizer_path = folder.join("tokenizer.json");
        let tokenizer = Tokenizer::from_file(&tokenizer_path, eos, pad)?;
        let vocabulary = model.spec().vocab_size;
        let largest = tokenizer.id_bound().max(eos.saturating_add(1)).max(pad.saturating_add(1)) as usize;
        if largest > vocabulary {
            return Err(Error::data(format!(
                "the tokenizer gives ids up to {}, but the model's vocabulary has {vocabulary} tokens",
                largest - 1
            ))
            .file(&tokenizer_path)
            .help("take tokenizer.json from the same model as the weights"));
        }
        let weights = Weights::load(model.as_ref(), &mut Checkpoint::open(folder)?, precision, device)?;
        Ok(Self { model, tokenizer, weights })
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

    /// Writes the folder, weights without an adapter.
    ///
    /// # Errors
    /// A file cannot be written.
    pub fn save(&self, folder: &Path) -> Result<()> {
        let mut config = self.model.config();
        if let Some(map) = config.as_object_mut() {
            map.insert("eos_token_id".into(), json!(self.tokenizer.eos));
            map.insert("pad_token_id".into(), json!(self.tokenizer.pad));
            if let Some(bos) = self.tokenizer.id("<bos>") {
                map.insert("bos_token_id".into(), json!(bos));
            }
        }
        let write = |name: &str, text: String| disk::write(&folder.join(name), text.as_bytes());
        write("config.json", format!("{config:#}\n"))?;
        write("tokenizer.json", self.tokenizer.to_json()?)?;
        let tokenizer = json!({
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": self.tokenizer.token(self.tokenizer.eos),
            "pad_token": self.tokenizer.token(self.tokenizer.pad),
        });
        write("tokenizer_config.json", format!("{tokenizer:#}\n"))?;
        disk::write_tensors(&folder.join("model.safetensors"), self.weights.base_tensors()?)
    }
}

/// The `config.json` of a model folder.
///
/// # Errors
/// It is missing or malformed.
pub(crate) fn read_config(folder: &Path) -> Result<Value> {
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
pub(crate) fn model_of(entry: &ModelEntry, config: &Value, path: &Path) -> Result<Box<dyn Model>> {
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

/// A special token's id, from `config.json` or `generation_config.json`; of a list, the first.
fn special_token(folder: &Path, config: &Value, key: &str) -> Result<Option<u32>> {
    let generation = std::fs::read_to_string(folder.join("generation_config.json")).unwrap_or_default();
    let generation: Value = serde_json::from_str(&generation).unwrap_or_default();
    let value = [&config[key], &generation[key]].into_iter().find(|value| !value.is_null());
    let Some(value) = value else { return Ok(None) };
    let id = value.as_array().map_or(Some(value), |list| list.first()).and_then(Value::as_u64);
    match id.and_then(|id| u32::try_from(id).ok()) {
        Some(id) => Ok(Some(id)),
        None => Err(Error::data(format!("`{key}` must be a token id, found `{value}`"))
            .file(folder.join("config.json"))
            .key(key)
            .help("write the id of the token as a whole number")),
    }
}
