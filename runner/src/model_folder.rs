//! Writes model folders in Hugging Face's layout, as [`CausalLm::open`] reads them.

use std::path::Path;

use serde_json::json;
use titer_core::{CausalLm, Result};

use crate::disk;

/// Writes a model's folder, weights without an adapter.
///
/// # Errors
/// A file cannot be written.
pub fn save(lm: &CausalLm, folder: &Path) -> Result<()> {
    let tokenizer = &lm.tokenizer;
    let mut config = lm.model.config();
    if let Some(map) = config.as_object_mut() {
        let ends = match tokenizer.ends.as_slice() {
            [eos] => json!(eos),
            ends => json!(ends),
        };
        map.insert("eos_token_id".into(), ends);
        map.insert("pad_token_id".into(), json!(tokenizer.pad));
        if let Some(bos) = tokenizer.id("<bos>") {
            map.insert("bos_token_id".into(), json!(bos));
        }
    }
    let write = |name: &str, text: String| disk::write(&folder.join(name), text.as_bytes());
    write("config.json", format!("{config:#}\n"))?;
    write("tokenizer.json", tokenizer.to_json()?)?;
    let special = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": tokenizer.token(tokenizer.eos),
        "pad_token": tokenizer.token(tokenizer.pad),
    });
    write("tokenizer_config.json", format!("{special:#}\n"))?;
    disk::write_tensors_for_torch(&folder.join("model.safetensors"), lm.weights.base_tensors()?)
}
