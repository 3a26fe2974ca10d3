//! The tensors of a GGUF file under Hugging Face's names.

use std::borrow::Cow;

use candle_core::quantized::{GgmlDType as Kind, QStorage, QTensor};
use candle_core::{DType, Device, Tensor};

use super::Gguf;
use crate::error::{Error, Result};
use crate::guard::guarded;

/// Modules of a block: llama.cpp's name, and Hugging Face's.
const MODULES: [(&str, &str); 13] = [
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("attn_q_norm", "self_attn.q_norm"),
    ("attn_k_norm", "self_attn.k_norm"),
    ("post_attention_norm", "post_attention_layernorm"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
    ("post_ffw_norm", "post_feedforward_layernorm"),
];

/// A tensor as a file stores it.
#[derive(Debug)]
pub(crate) enum StoredTensor {
    /// Numbers of their own.
    Plain(Tensor),
    /// Blocks of small integers with a common scale.
    Blocks(QTensor),
}

/// A GGUF file to read tensors from.
#[derive(Debug)]
pub(crate) struct GgufTensors {
    gguf: Gguf,
    /// Query heads, and key/value heads, whose rows llama.cpp has in another order.
    interleaved: Option<[u64; 2]>,
    /// Whether the file's norms hold their whole scale, the model's what it is above one.
    above_one: bool,
}

impl GgufTensors {
    pub(crate) fn of(gguf: Gguf) -> Result<Self> {
        let config = gguf.config()?;
        let heads = ["num_attention_heads", "num_key_value_heads"].map(|key| config[key].as_u64().unwrap_or(1));
        let (interleaved, above_one) = match gguf.architecture() {
            "llama" => (Some(heads), false),
            architecture => (None, architecture.starts_with("gemma")),
        };
        Ok(Self { gguf, interleaved, above_one })
    }

    /// All names: Hugging Face's, with the file's own.
    pub(crate) fn names(&self) -> Vec<(String, String)> {
        let infos = self.gguf.content.tensor_infos.keys();
        infos.filter_map(|own| Some((self.name_of(own)?, own.clone()))).collect()
    }

    fn name_of(&self, own: &str) -> Option<String> {
        match own {
            "token_embd.weight" => return Some("model.embed_tokens.weight".into()),
            "output_norm.weight" => return Some("model.norm.weight".into()),
            "output.weight" => return Some("lm_head.weight".into()),
            _ => {}
        }
        let (block, rest) = own.strip_prefix("blk.")?.split_once('.')?;
        let (module, part) = rest.rsplit_once('.')?;
        let (_, name) = MODULES.iter().find(|(known, _)| *known == module)?;
        // With a norm behind attention, the one before the MLP has another name.
        let later_gemma = ["gemma2", "gemma3"].contains(&self.gguf.architecture());
        let name = if module == "ffn_norm" && later_gemma { "pre_feedforward_layernorm" } else { name };
        Some(format!("model.layers.{block}.{name}.{part}"))
    }

    /// The tensor that the file calls `own`, as it is stored. On the host.
    ///
    /// # Errors
    /// The file is damaged.
    pub(crate) fn read(&mut self, own: &str) -> Result<StoredTensor> {
        let path = self.gguf.path.clone();
        let damaged = |why: String| {
            Error::data(format!("the tensor `{own}` cannot be read: {why}"))
                .file(&path)
                .help("the file is cut off or damaged: copy or download it again")
        };
        let tensor = guarded(|| self.gguf.content.tensor(&mut self.gguf.file, own, &Device::Cpu));
        let mut tensor = tensor.and_then(|tensor| tensor.map_err(|error| error.to_string())).map_err(damaged)?;
        if let Some(heads) = self.heads_of(own) {
            tensor = in_halves(&tensor, heads)?;
        }
        let plain = match tensor.dtype() {
            Kind::F32 | Kind::F16 | Kind::BF16 => {
                let dtype = match tensor.dtype() {
                    Kind::F16 => DType::F16,
                    Kind::BF16 => DType::BF16,
                    _ => DType::F32,
                };
                tensor.dequantize(&Device::Cpu)?.to_dtype(dtype)?
            }
            _ => return Ok(StoredTensor::Blocks(tensor)),
        };
        Ok(StoredTensor::Plain(if self.above_one && own.ends_with("norm.weight") { (plain - 1.)? } else { plain }))
    }

    /// How many heads the rows of this tensor belong to, if they are in llama.cpp's order.
    fn heads_of(&self, own: &str) -> Option<u64> {
        let [queries, keys] = self.interleaved?;
        match own.rsplit('.').nth(1)? {
            "attn_q" => Some(queries),
            "attn_k" => Some(keys),
            _ => None,
        }
    }
}

/// Rows of each head in the order in which rotary positions turn the first half with the second, given those in which they
/// turn neighbours. Rows are moved whole, so blocks stay as they are.
fn in_halves(tensor: &QTensor, heads: u64) -> Result<QTensor> {
    let rows = tensor.shape().dims().first().copied().unwrap_or(1);
    let head = rows / heads.max(1) as usize;
    if head == 0 || !head.is_multiple_of(2) || rows != head * heads as usize {
        return Err(Error::data(format!("{rows} rows of queries or keys are not those of {heads} heads")));
    }
    let bytes = tensor.data()?;
    let width = bytes.len() / rows;
    let mut moved = Vec::with_capacity(bytes.len());
    for row in 0..rows {
        let (first, at) = (row / head * head, row % head);
        let from = first + if at < head / 2 { 2 * at } else { 2 * (at - head / 2) + 1 };
        moved.extend_from_slice(&bytes[from * width..][..width]);
    }
    let storage = QStorage::from_data(Cow::Owned(moved), &Device::Cpu, tensor.dtype())?;
    Ok(QTensor::new(storage, tensor.shape())?)
}
