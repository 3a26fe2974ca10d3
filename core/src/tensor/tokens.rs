//! Token ids of a batch: the input of a model.

use candle_core::{Device, Tensor};

use crate::error::{Error, Result};

/// A batch of right-padded sequences, the input of a model.
#[derive(Debug, Clone)]
pub struct Tokens {
    /// Token ids, `[batch, length]`, u32.
    pub ids: Tensor,
    /// The number of real tokens of each row; what follows is padding.
    pub lengths: Vec<usize>,
    /// The largest id. A device does not look at ids before it reads by them.
    pub largest: u32,
}

impl Tokens {
    /// Pads `rows` on the right with `pad`.
    ///
    /// # Errors
    /// There is no row, or a tensor operation failed.
    pub fn pad<R: AsRef<[u32]>>(rows: &[R], pad: u32, device: &Device) -> Result<Self> {
        let length = rows.iter().map(|row| row.as_ref().len()).max().filter(|&length| length > 0);
        let length = length.ok_or_else(|| Error::run("a batch has no token"))?;
        let mut ids = Vec::with_capacity(rows.len() * length);
        for row in rows {
            ids.extend_from_slice(row.as_ref());
            ids.resize(ids.len() + length - row.as_ref().len(), pad);
        }
        let lengths = rows.iter().map(|row| row.as_ref().len()).collect();
        let largest = ids.iter().copied().max().unwrap_or(0);
        Ok(Self { ids: Tensor::from_vec(ids, (rows.len(), length), device)?, lengths, largest })
    }

    /// `(batch, length)`.
    pub fn dims(&self) -> (usize, usize) {
        let dims = self.ids.dims();
        (dims[0], dims[1])
    }

    /// One at real tokens and zero at padding, `[batch, length, 1]`, f32.
    ///
    /// # Errors
    /// A tensor operation failed.
    pub fn mask(&self) -> Result<Tensor> {
        let (batch, length) = self.dims();
        let real = |row: usize| (0..length).map(move |at| f32::from(u8::from(at < self.lengths[row])));
        Ok(Tensor::from_iter((0..batch).flat_map(real), self.ids.device())?.reshape((batch, length, 1))?)
    }
}
