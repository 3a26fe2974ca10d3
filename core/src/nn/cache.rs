//! Keys and values of tokens already seen, for generation.

use candle_core::{DType, Device, Tensor};

use crate::error::Result;
use crate::nn::spec::ModelSpec;
use crate::tensor::elementwise::cache_write;
use crate::tensor::mask::AttentionMask;

/// The key/value cache of a set of rows: row `r` holds its tokens in the slots `0..lengths[r]`, without gaps, whatever
/// the other rows hold. A row can be cleared and used for another sequence while the others go on.
#[derive(Debug)]
pub struct Cache {
    /// Keys and values of each layer, `[rows · slots, kv_heads · head_dim]`.
    layers: Vec<[Tensor; 2]>,
    lengths: Vec<usize>,
    slots: usize,
    /// The first tokens, which all rows have in common.
    shared: usize,
    /// The cache rows that the current pass continues, and their lengths before it.
    active: Vec<usize>,
}

impl Cache {
    /// An empty cache of `rows` rows with room for `slots` tokens each.
    ///
    /// # Errors
    /// The device has not enough memory.
    pub fn new(spec: &ModelSpec, rows: usize, slots: usize, dtype: DType, device: &Device) -> Result<Self> {
        let shape = (rows * slots, spec.kv_heads * spec.head_dim);
        let empty = || -> Result<Tensor> { Ok(Tensor::zeros(shape, dtype, device)?) };
        let layers = (0..spec.layers).map(|_| Ok([empty()?, empty()?])).collect::<Result<_>>()?;
        Ok(Self { layers, lengths: vec![0; rows], slots, shared: 0, active: (0..rows).collect() })
    }

    /// Chooses the rows that the next passes continue: sequence `s` is cache row `rows[s]`.
    pub fn select(&mut self, rows: Vec<usize>) {
        self.active = rows;
    }

    /// Empties a row for another sequence, but for the tokens that all rows share.
    pub fn clear(&mut self, row: usize) {
        self.lengths[row] = self.shared;
    }

    /// Copies what `row` holds into every row, in place of what these held: sequences that begin alike are computed once.
    ///
    /// # Errors
    /// A tensor operation failed.
    pub fn share(&mut self, row: usize) -> Result<()> {
        self.shared = self.lengths[row];
        for store in self.layers.iter().flatten() {
            let held = store.narrow(0, row * self.slots, self.shared)?.force_contiguous()?;
            for other in (0..self.lengths.len()).filter(|&other| other != row) {
                store.slice_set(&held, 0, other * self.slots)?;
            }
        }
        self.lengths.fill(self.shared);
        Ok(())
    }

    /// The cache rows of the current pass.
    pub fn rows(&self) -> &[usize] {
        &self.active
    }

    /// How many tokens each row of the current pass holds already.
    pub fn starts(&self) -> Vec<usize> {
        self.active.iter().map(|&row| self.lengths[row]).collect()
    }

    /// The most tokens a row can hold.
    pub fn slots(&self) -> usize {
        self.slots
    }

    /// Writes the new keys and values `[tokens, kv_heads · head_dim]` of one layer behind those of the current rows, which
    /// `mask` names; returns all keys and values of that layer.
    ///
    /// # Errors
    /// `mask` is one of another cache, or a tensor operation failed.
    pub fn append(
        &mut self,
        layer: usize,
        keys: &Tensor,
        values: &Tensor,
        mask: &AttentionMask,
    ) -> Result<[Tensor; 2]> {
        for (store, fresh) in self.layers[layer].iter().zip([keys, values]) {
            cache_write(store, fresh, mask)?;
        }
        Ok(self.layers[layer].clone())
    }

    /// Marks the slots of a pass as filled, once all layers ran: sequence `s` brought `lengths[s]` tokens.
    pub fn advance(&mut self, lengths: &[usize]) {
        for (&row, length) in self.active.iter().zip(lengths) {
            self.lengths[row] += length;
        }
    }
}
