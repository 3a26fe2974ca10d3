//! The attention mask of a pass.

use candle_core::{Device, Tensor};
use titer_kernels::attention::Sequence;

use super::tokens::Tokens;
use crate::error::{Error, Result};

/// Where each token of a pass stands, and which keys it may look at: those of its own sequence, up to its own. Padding is
/// never seen.
#[derive(Debug, Clone)]
pub struct AttentionMask {
    /// The sequences that have tokens, as the kernels of the host read them.
    pub(super) sequences: Vec<Sequence>,
    /// The position of each token in its sequence.
    pub positions: Vec<u32>,
    /// What the kernels of a device read: of all sequences the numbers in [`DEVICE_ROWS`], a row each, and `positions`.
    #[cfg(feature = "cuda")]
    pub(super) table: Tensor,
}

/// What `attention.cu` reads of the sequences, in this order.
#[cfg(feature = "cuda")]
const DEVICE_ROWS: [fn(&Sequence) -> usize; 5] = [|s| s.first, |s| s.queries, |s| s.start, |s| s.end, |s| s.keys];

/// The sequences of `tokens`, each on its own.
fn alone(tokens: &Tokens) -> impl Iterator<Item = Sequence> {
    tokens.ranges().zip(&tokens.real).map(|(range, &end)| Sequence {
        first: range.start,
        queries: range.len(),
        start: 0,
        end,
        keys: range.start,
    })
}

impl AttentionMask {
    /// The tokens of a training pass: every sequence is on its own and begins at position 0.
    ///
    /// # Errors
    /// A tensor operation failed.
    pub fn new(tokens: &Tokens) -> Result<Self> {
        Self::of(alone(tokens).collect(), tokens.ids.device())
    }

    /// The tokens of a pass with a cache of `slots` for each row: sequence `s` continues cache row `rows[s]` after
    /// `starts[s]` tokens.
    ///
    /// # Errors
    /// A row has not enough slots, or a tensor operation failed.
    pub fn after(tokens: &Tokens, starts: &[usize], rows: &[usize], slots: usize) -> Result<Self> {
        if starts.iter().zip(&tokens.lengths).any(|(start, length)| start + length > slots) {
            return Err(Error::run("the key/value cache is full"));
        }
        let behind = |((own, start), row): ((Sequence, &usize), &usize)| Sequence {
            start: *start,
            end: start + own.end,
            keys: row * slots,
            ..own
        };
        let sequences = alone(tokens).zip(starts).zip(rows).map(behind);
        Self::of(sequences.collect(), tokens.ids.device())
    }

    #[cfg_attr(not(feature = "cuda"), expect(unused_variables, clippy::unnecessary_wraps, reason = "for a device"))]
    fn of(mut sequences: Vec<Sequence>, device: &Device) -> Result<Self> {
        sequences.retain(|sequence| sequence.queries > 0);
        let own = |s: &Sequence| s.start as u32..(s.start + s.queries) as u32;
        let positions: Vec<u32> = sequences.iter().flat_map(own).collect();
        #[cfg(feature = "cuda")]
        let table = {
            let rows = DEVICE_ROWS.iter().flat_map(|value| sequences.iter().map(move |s| value(s) as u32));
            let table: Vec<u32> = rows.chain(positions.iter().copied()).collect();
            let count = table.len();
            Tensor::from_vec(table, count, device)?
        };
        Ok(Self {
            sequences,
            positions,
            #[cfg(feature = "cuda")]
            table,
        })
    }

    /// The position of each token, `[tokens]`, u32, on `device`.
    pub(super) fn positions_on(&self, device: &Device) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if device.is_cuda() {
            return Ok(self.table.narrow(0, DEVICE_ROWS.len() * self.sequences.len(), self.positions.len())?);
        }
        Ok(Tensor::from_slice(&self.positions, self.positions.len(), device)?)
    }

    /// Fails if there are keys (`slots` of them) of earlier passes: nobody knows where their gradients belong.
    pub(super) fn check_differentiable(&self, slots: usize) -> Result<()> {
        let own = |sequence: &Sequence| sequence.start == 0 && sequence.keys == sequence.first;
        if slots == self.positions.len() && self.sequences.iter().all(own) {
            return Ok(());
        }
        Err(Error::run("attention over a cache cannot be differentiated"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Any row, not just the last one: what does not fit would be written over the next row.
    #[test]
    fn a_row_of_the_cache_that_is_full_is_an_error() -> Result<()> {
        let tokens = Tokens::new(&[[0; 3]; 2], &Device::Cpu)?;
        for (starts, fits) in [([13, 4], true), ([14, 4], false), ([4, 14], false)] {
            assert_eq!(AttentionMask::after(&tokens, &starts, &[0, 2], 16).is_ok(), fits, "{starts:?}");
        }
        Ok(())
    }
}
