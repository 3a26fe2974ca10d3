//! The attention mask of a pass.

use candle_core::{Device, Tensor};
use titer_kernels::attention::CausalMask;

use super::tokens::Tokens;
use crate::error::{Error, Result};

/// Where each token of a pass stands, and which keys it may look at.
///
/// Token `q` of batch row `b` has the position `starts[b] + q`, which is also its slot in the row's keys and values. It
/// sees the slots up to its own that hold real tokens; padding is never seen.
#[derive(Debug, Clone)]
pub struct AttentionMask {
    /// The part that the kernels of the host read.
    pub(super) host: CausalMask,
    /// The position of each token, in row-major order.
    pub positions: Vec<u32>,
    /// `starts`, `ends` and `rows`, `[batch]` each, and `positions`, where the kernels of a device read them.
    #[cfg(feature = "cuda")]
    pub(super) table: Tensor,
}

impl AttentionMask {
    /// The tokens of a training pass: every row is on its own and begins at position 0.
    ///
    /// # Errors
    /// A tensor operation failed.
    pub fn new(tokens: &Tokens) -> Result<Self> {
        let batch = tokens.lengths.len();
        Self::after(tokens, &vec![0; batch], &(0..batch).collect::<Vec<_>>())
    }

    /// The tokens of a pass with a cache: batch row `b` continues cache row `rows[b]` after `starts[b]` tokens.
    ///
    /// # Errors
    /// A tensor operation failed.
    pub fn after(tokens: &Tokens, starts: &[usize], rows: &[usize]) -> Result<Self> {
        let (batch, queries) = tokens.dims();
        let ends: Vec<usize> = starts.iter().zip(&tokens.lengths).map(|(start, length)| start + length).collect();
        let positions: Vec<u32> = (0..batch * queries).map(|at| (starts[at / queries] + at % queries) as u32).collect();
        #[cfg(feature = "cuda")]
        let table = {
            let rows = starts.iter().chain(&ends).chain(rows).map(|&n| n as u32);
            let table: Vec<u32> = rows.chain(positions.iter().copied()).collect();
            let count = table.len();
            Tensor::from_vec(table, count, tokens.ids.device())?
        };
        Ok(Self {
            host: CausalMask { queries, starts: starts.to_vec(), ends, rows: rows.to_vec() },
            positions,
            #[cfg(feature = "cuda")]
            table,
        })
    }

    /// The position of each token, `[tokens]`, u32, on `device`.
    pub(super) fn positions_on(&self, device: &Device) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if device.is_cuda() {
            return Ok(self.table.narrow(0, 3 * self.host.starts.len(), self.positions.len())?);
        }
        Ok(Tensor::from_slice(&self.positions, self.positions.len(), device)?)
    }

    /// Fails if keys of earlier passes are seen: nobody knows where their gradients belong.
    pub(super) fn check_differentiable(&self, rows: usize) -> Result<()> {
        if self.host.rows.iter().copied().eq(0..rows) && self.host.starts.iter().all(|&start| start == 0) {
            return Ok(());
        }
        Err(Error::run("attention over a cache cannot be differentiated"))
    }
}
