//! Keys and values of tokens already seen, one slot per token, for generation.

use candle_core::Tensor;
use candle_nn::kv_cache::KvCache;

use crate::Result;
use crate::model::ModelSpec;

/// The key/value cache of a batch of rows that share one prefill.
///
/// Prompts are padded on the right to the longest one. A row of `length` prompt tokens leaves the slots
/// `length..prefill` empty; generated tokens of all rows go to the slots from `prefill` on.
#[derive(Debug)]
pub struct Cache {
    layers: Vec<KvCache>,
    lengths: Vec<usize>,
    prefill: usize,
    filled: usize,
}

impl Cache {
    /// An empty cache for rows with these prompt lengths, with room for `new_tokens` more.
    pub fn new(spec: &ModelSpec, lengths: &[usize], new_tokens: usize) -> Self {
        let prefill = lengths.iter().copied().max().unwrap_or(0);
        let layers = (0..spec.layers).map(|_| KvCache::new(2, prefill + new_tokens)).collect();
        Self { layers, lengths: lengths.to_vec(), prefill, filled: 0 }
    }

    /// Appends keys and values `[batch, kv_heads, new, head_dim]` of one layer; returns all of them so far.
    ///
    /// # Errors
    /// The cache is full, or a tensor operation failed.
    pub fn append(&mut self, layer: usize, keys: &Tensor, values: &Tensor) -> Result<(Tensor, Tensor)> {
        Ok(self.layers[layer].append(&keys.contiguous()?, &values.contiguous()?)?)
    }

    /// Slots filled before the current pass.
    pub fn filled(&self) -> usize {
        self.filled
    }

    /// Prompt length of each row.
    pub fn lengths(&self) -> &[usize] {
        &self.lengths
    }

    /// The slot at which generated tokens begin.
    pub fn prefill(&self) -> usize {
        self.prefill
    }

    /// The position of the token of `row` in `slot`: generated tokens follow the row's own prompt.
    pub fn position(&self, row: usize, slot: usize) -> usize {
        if slot < self.prefill { slot } else { self.lengths[row] + slot - self.prefill }
    }

    /// Marks `new` more slots as filled, after a pass over all layers.
    pub fn advance(&mut self, new: usize) {
        self.filled += new;
    }
}
