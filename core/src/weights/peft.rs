//! Adapter folders as PEFT keeps them: `adapter_config.json` beside `adapter_model.safetensors`.

use std::collections::BTreeSet;
use std::path::Path;

use serde_json::{Map, Value, json};

use super::adapters::matches;
use super::checkpoint::Checkpoint;
use super::lora::LoraConfig;
use super::parameters::Weights;
use super::schema::{Param, module_of};
use crate::bounds;
use crate::error::{Error, Kind, Result};

/// The weights of an adapter.
pub const ADAPTER_WEIGHTS: &str = "adapter_model.safetensors";
/// How they are applied.
pub const ADAPTER_CONFIG: &str = "adapter_config.json";

/// Keys that change what an adapter computes, or what else is stored, in a way that is not supported. A value that is
/// null, false or empty asks for nothing. Made from PEFT 0.21.2.
const UNSUPPORTED: [&str; 18] = [
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "fan_in_fan_out",
    "lora_bias",
    "modules_to_save",
    "layers_to_transform",
    "layer_replication",
    "rank_pattern",
    "alpha_pattern",
    "exclude_modules",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "megatron_config",
];

/// Initialisations that leave the base model's weights as they are. Others, such as `pissa`, change them, and an adapter's
/// folder does not hold those.
const KEEP_THE_BASE: [&str; 3] = ["gaussian", "eva", "orthogonal"];

/// The `adapter_config.json` of an adapter that stands on the model in `base`, a folder or a name.
pub fn peft_config(config: &LoraConfig, base: Option<&str>) -> Value {
    json!({
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.r,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": config.target_modules,
        "bias": "none",
        "inference_mode": true,
    })
}

/// How the adapter in `folder` is applied.
///
/// # Errors
/// The file is missing or malformed, or the adapter is of a kind that is not supported.
pub fn read_peft_config(folder: &Path) -> Result<LoraConfig> {
    let path = folder.join(ADAPTER_CONFIG);
    let bytes = bounds::read_file("read the adapter's configuration", &path, bounds::CONFIG_BYTES)
        .map_err(|error| error.help("an adapter's folder needs adapter_config.json and adapter_model.safetensors"))?;
    let keys: Map<String, Value> = serde_json::from_slice(&bytes).map_err(|error| {
        let error = Error::data("the adapter's configuration is no table of JSON").file(&path).source(error);
        error.help("save the adapter again, as with PEFT's `save_pretrained`")
    })?;
    lora_config(&keys).map_err(|error| error.file(&path))
}

impl Weights {
    /// Attaches the adapter in `folder`, as PEFT saves one. As there, targets that this model has not count for nothing.
    ///
    /// # Errors
    /// A file is missing or malformed, the adapter belongs to another model, or it is of a kind that is not supported.
    pub fn load_peft(&mut self, folder: &Path) -> Result<()> {
        let mut config = read_peft_config(folder)?;
        if let Some(targets) = &mut config.target_modules {
            let linear = |param: &&Param| param.is_linear();
            let modules: Vec<&str> = self.params.iter().filter(linear).map(|param| module_of(&param.name)).collect();
            targets.retain(|target| modules.iter().any(|module| matches(module, target)));
            if targets.is_empty() {
                return Err(Error::data("none of the adapter's `target_modules` is a linear layer of this model")
                    .file(folder.join(ADAPTER_CONFIG))
                    .key("target_modules")
                    .help("take the model that `base_model_name_or_path` names"));
            }
        }
        let mut checkpoint = Checkpoint::open(&folder.join(ADAPTER_WEIGHTS)).map_err(|error| {
            error.help("an adapter's folder needs adapter_model.safetensors; an older adapter_model.bin is not read")
        })?;
        self.continue_lora(&config, &mut checkpoint)?;
        self.check_finite().map_err(|error| {
            error.of_kind(Kind::Data).file(checkpoint.path()).help("the adapter is damaged: copy or train it again")
        })?;
        let read: BTreeSet<String> = self.adapter_tensors()?.into_iter().map(|(name, _)| name).collect();
        match checkpoint.names().find(|name| !read.contains(*name)) {
            None => Ok(()),
            Some(other) => Err(Error::data(format!("the adapter holds `{other}`, which nothing in this model reads"))
                .file(checkpoint.path())
                .help("the adapter belongs to another model, or adapts more than linear layers")),
        }
    }
}

/// The adapter that the keys of an `adapter_config.json` describe.
fn lora_config(keys: &Map<String, Value>) -> Result<LoraConfig> {
    let wrong = |key: &'static str, message: String| Error::data(message).key(key);
    let merge = "merge it into its base model with PEFT's `merge_and_unload`, and take the merged model";
    let get = |key: &str| keys.get(key).unwrap_or(&Value::Null);
    if get("peft_type") != "LORA" {
        let message = format!("an adapter of type {} cannot be read, only LoRA", get("peft_type"));
        return Err(wrong("peft_type", message).help(merge));
    }
    if let Some(key) = UNSUPPORTED.into_iter().find(|key| asks(get(key))) {
        let message = format!("adapters with `{key} = {}` are not supported", get(key));
        return Err(wrong(key, message).help(merge));
    }
    if !matches!(get("bias").as_str(), None | Some("none")) {
        return Err(wrong("bias", "an adapter that changes biases is not supported".to_owned()).help(merge));
    }
    if let Some(name) = get("init_lora_weights").as_str()
        && !KEEP_THE_BASE.contains(&name)
    {
        let message = format!("the adapter began as `{name}`, so it stands on other weights than the base model's");
        return Err(wrong("init_lora_weights", message).help(merge));
    }
    let again = "save the adapter again, as with PEFT's `save_pretrained`";
    let rank = get("r").as_u64().and_then(|r| usize::try_from(r).ok());
    let r = rank
        .filter(|r| (1..=bounds::RANK).contains(r))
        .ok_or_else(|| wrong("r", format!("`r` must be a rank, found {}", get("r"))).help(again))?;
    let alpha = get("lora_alpha").as_f64();
    let alpha = alpha.ok_or_else(|| {
        wrong("lora_alpha", format!("`lora_alpha` must be a number, found {}", get("lora_alpha"))).help(again)
    })?;
    let names =
        |list: &Vec<Value>| list.iter().map(|name| name.as_str().map(str::to_owned)).collect::<Option<Vec<_>>>();
    let target_modules = match get("target_modules") {
        Value::String(all) if all == "all-linear" => None,
        Value::Array(list) if names(list).is_some() => names(list),
        other => {
            let message = format!("`target_modules` must be a list of names, found {other}");
            return Err(
                wrong("target_modules", message).help("spell out the names of the layers, or merge the adapter")
            );
        }
    };
    // Rank-stabilised LoRA divides by the root of the rank.
    let alpha = if asks(get("use_rslora")) { alpha * (r as f64).sqrt() } else { alpha };
    Ok(LoraConfig { r, alpha, dropout: 0., target_modules })
}

/// Whether a key's value asks for something.
fn asks(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => false,
        Value::Array(list) => !list.is_empty(),
        Value::Object(map) => !map.is_empty(),
        Value::String(text) => !text.is_empty(),
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(changes: &Value) -> Result<LoraConfig> {
        let given = LoraConfig { target_modules: Some(vec!["q_proj".to_owned()]), ..LoraConfig::default() };
        let mut keys = peft_config(&given, Some("base")).as_object().expect("a table").clone();
        keys.extend(changes.as_object().expect("a table").clone());
        lora_config(&keys)
    }

    #[test]
    fn what_is_written_is_read() -> Result<()> {
        let neutral = json!({
            "use_dora": false, "rank_pattern": {}, "modules_to_save": null, "exclude_modules": [], "lora_bias": false,
            "init_lora_weights": true, "revision": null, "peft_version": "0.20.0"
        });
        let found = read(&neutral)?;
        assert_eq!((found.r, found.alpha, found.target_modules), (8, 16., Some(vec!["q_proj".to_owned()])));
        assert_eq!(read(&json!({ "target_modules": "all-linear" }))?.target_modules, None);
        assert_eq!(read(&json!({ "use_rslora": true, "r": 4, "lora_alpha": 6 }))?.scale(), 3.);
        Ok(())
    }

    #[test]
    fn what_changes_the_result_and_is_not_supported_is_refused() {
        for (changes, key) in [
            (json!({ "peft_type": "IA3" }), "peft_type"),
            (json!({ "use_dora": true }), "use_dora"),
            (json!({ "rank_pattern": { "q_proj": 2 } }), "rank_pattern"),
            (json!({ "alpha_pattern": { "q_proj": 2 } }), "alpha_pattern"),
            (json!({ "modules_to_save": ["lm_head"] }), "modules_to_save"),
            (json!({ "layers_to_transform": [0] }), "layers_to_transform"),
            (json!({ "bias": "lora_only" }), "bias"),
            (json!({ "init_lora_weights": "pissa_niter_4" }), "init_lora_weights"),
            (json!({ "init_lora_weights": "OLoRA" }), "init_lora_weights"),
            (json!({ "r": -1 }), "r"),
            (json!({ "r": 0 }), "r"),
            (json!({ "lora_alpha": "8" }), "lora_alpha"),
            (json!({ "target_modules": ".*q_proj" }), "target_modules"),
        ] {
            let error = read(&changes).expect_err(key);
            assert_eq!(error.place("key"), Some(key), "{error}");
            assert!(error.remedy().is_some(), "{error}");
        }
    }
}
