//! The `config.json` that a GGUF file stands for.

use serde_json::{Map, Value, json};

use super::Gguf;
use crate::error::Result;

/// Architectures by llama.cpp's name, with their `model_type`.
const ARCHITECTURES: [(&str, &str); 6] = [
    ("llama", "llama"),
    ("qwen2", "qwen2"),
    ("qwen3", "qwen3"),
    ("gemma", "gemma"),
    ("gemma2", "gemma2"),
    ("gemma3", "gemma3_text"),
];

impl Gguf {
    /// The configuration, under Hugging Face's names.
    ///
    /// # Errors
    /// The architecture is not read, or a number is missing.
    pub fn config(&self) -> Result<Value> {
        let architecture = self.architecture();
        let Some((_, model_type)) = ARCHITECTURES.iter().find(|(name, _)| *name == architecture) else {
            let known = ARCHITECTURES.map(|(name, _)| name).join(", ");
            return Err(self
                .fault(
                    format!("the file holds a model of architecture `{architecture}`, which is not read"),
                    "general.architecture",
                )
                .help(format!("architectures that are read from GGUF files: {known}")));
        };
        let key = |name: &str| format!("{architecture}.{name}");
        let number = |name: &str| self.integer(&key(name)).ok_or_else(|| self.missing(&key(name)));
        let float = |name: &str| self.value(&key(name)).and_then(|value| value.to_f32().ok()).map(shortest);
        if self.content.tensor_infos.contains_key("rope_freqs.weight") {
            return Err(self
                .fault("rotary frequencies that the file brings as a tensor are not read", "rope_freqs.weight")
                .help("take the model's folder in Hugging Face's layout, whose config.json says how they are scaled"));
        }
        let (heads, width) = (number("attention.head_count")?, number("embedding_length")?);
        let head_dim = self.integer(&key("attention.key_length")).or_else(|| width.checked_div(heads));
        let vocabulary = self.tokens()?.len();
        let mut config = json!({
            "model_type": model_type,
            "vocab_size": vocabulary,
            "hidden_size": width,
            "intermediate_size": number("feed_forward_length")?,
            "num_hidden_layers": number("block_count")?,
            "num_attention_heads": heads,
            "num_key_value_heads": self.integer(&key("attention.head_count_kv")).unwrap_or(heads),
            "max_position_embeddings": number("context_length")?,
            "rms_norm_eps": float("attention.layer_norm_rms_epsilon").ok_or_else(|| self.missing(&key("attention.layer_norm_rms_epsilon")))?,
            "rope_theta": float("rope.freq_base").unwrap_or(10_000.),
            "tie_word_embeddings": !self.content.tensor_infos.contains_key("output.weight"),
            "torch_dtype": "float32",
        });
        let mut more = Map::new();
        if let Some(head_dim) = head_dim {
            more.insert("head_dim".into(), head_dim.into());
        }
        if let Some(kind) = self.text(&key("rope.scaling.type")).filter(|kind| *kind != "none") {
            more.insert("rope_scaling".into(), json!({ "rope_type": kind, "factor": float("rope.scaling.factor") }));
        }
        let biased = |name: &str| self.content.tensor_infos.contains_key(&format!("blk.0.{name}.bias"));
        more.insert("attention_bias".into(), biased("attn_q").into());
        more.insert("mlp_bias".into(), biased("ffn_up").into());
        if ["gemma2", "gemma3"].contains(&architecture) {
            more.extend(self.gemma(architecture, heads, head_dim.unwrap_or_default(), width, &float));
        }
        for (name, own) in [("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")] {
            if let Some(id) = self.id_of(own) {
                more.insert(name.into(), id.into());
            }
        }
        if let Some(config) = config.as_object_mut() {
            config.extend(more);
        }
        Ok(config)
    }

    /// What Gemma's later versions have beside. The file does not say how scores are scaled: llama.cpp knows it by the number
    /// of blocks, and so do we.
    fn gemma(
        &self,
        architecture: &str,
        heads: u64,
        head_dim: u64,
        width: u64,
        float: &dyn Fn(&str) -> Option<f64>,
    ) -> Map<String, Value> {
        let largest = self.integer(&format!("{architecture}.block_count"))
            == Some(if architecture == "gemma2" { 46 } else { 62 });
        let scalar = if largest { width.checked_div(heads).unwrap_or(head_dim) } else { head_dim };
        let window = self.integer(&format!("{architecture}.attention.sliding_window"));
        let fields = [
            ("query_pre_attn_scalar", Some(json!(scalar))),
            ("sliding_window", Some(json!(window))),
            ("attn_logit_softcapping", Some(json!(float("attn_logit_softcapping")))),
            ("final_logit_softcapping", Some(json!(float("final_logit_softcapping")))),
            ("rope_local_base_freq", (architecture == "gemma3").then(|| json!(10_000.))),
        ];
        fields.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?))).collect()
    }
}

/// The number that was meant by one of 32 bits: 1e-5, not 9.999999747378752e-6.
fn shortest(number: f32) -> f64 {
    number.to_string().parse().unwrap_or_else(|_| f64::from(number))
}
