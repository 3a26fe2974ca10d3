//! A training batch.

use candle_core::{Device, Tensor};

use crate::data::example::Example;
use crate::error::{Error, Result};
use crate::tensor::tokens::Tokens;

/// A training batch: tokens and the labels to predict.
///
/// Labels are kept only where the loss is taken. `positions[k]` is the row `b * length + t` of the flattened hidden
/// states that predicts `targets[k]`.
#[derive(Debug, Clone)]
pub struct Batch {
    /// The input.
    pub tokens: Tokens,
    /// Flattened positions that predict a label, `[labels]`, u32.
    pub positions: Tensor,
    /// The labels, `[labels]`, u32.
    pub targets: Tensor,
    /// The largest label.
    pub largest_target: u32,
}

impl Batch {
    /// Collates examples. The last token of a row predicts nothing, so it is not fed to the model.
    ///
    /// # Errors
    /// No example has a label, or a tensor operation failed.
    pub fn collate(examples: &[&Example], pad: u32, device: &Device) -> Result<Self> {
        let rows: Vec<&[u32]> = examples.iter().map(|example| &example.tokens[..example.tokens.len() - 1]).collect();
        let labels = examples.iter().enumerate().flat_map(|(row, example)| {
            (example.first_label..example.tokens.len()).map(move |at| (row, at - 1, example.tokens[at]))
        });
        Self::with_labels(&rows, labels, pad, device)
    }

    /// A batch of `rows` whose labels are given as `(row, position that predicts it, label)`.
    ///
    /// # Errors
    /// There is no label, or a tensor operation failed.
    pub fn with_labels<R: AsRef<[u32]>>(
        rows: &[R],
        labels: impl IntoIterator<Item = (usize, usize, u32)>,
        pad: u32,
        device: &Device,
    ) -> Result<Self> {
        let tokens = Tokens::pad(rows, pad, device)?;
        let (_, length) = tokens.dims();
        let (positions, targets): (Vec<u32>, Vec<u32>) =
            labels.into_iter().map(|(row, at, label)| ((row * length + at) as u32, label)).unzip();
        if targets.is_empty() {
            return Err(Error::run("a batch has no label: its loss would be 0/0"));
        }
        let (count, largest_target) = (targets.len(), targets.iter().copied().max().unwrap_or(0));
        Ok(Self {
            tokens,
            largest_target,
            positions: Tensor::from_vec(positions, count, device)?,
            targets: Tensor::from_vec(targets, count, device)?,
        })
    }

    /// How many labels the loss averages over.
    pub fn labels(&self) -> usize {
        self.targets.elem_count()
    }

    /// One at the positions that predict a label and zero elsewhere, `[batch, length, 1]`, f32.
    ///
    /// # Errors
    /// A tensor operation failed.
    pub fn label_mask(&self) -> Result<Tensor> {
        let (batch, length) = self.tokens.dims();
        let mut mask = vec![0f32; batch * length];
        for position in self.positions.to_vec1::<u32>()? {
            mask[position as usize] = 1.;
        }
        Ok(Tensor::from_vec(mask, (batch, length, 1), self.tokens.ids.device())?)
    }

    /// Each row that has a label as a batch of its own, without the padding.
    ///
    /// # Errors
    /// A tensor operation failed.
    pub fn rows(&self) -> Result<Vec<Batch>> {
        let (_, length) = self.tokens.dims();
        let (positions, targets) = (self.positions.to_vec1::<u32>()?, self.targets.to_vec1::<u32>()?);
        let mut rows = Vec::with_capacity(self.tokens.lengths.len());
        for (row, &real) in self.tokens.lengths.iter().enumerate() {
            let own = positions.iter().zip(&targets).filter(|(position, _)| **position as usize / length == row);
            let own: Vec<_> = own.map(|(position, target)| (0, *position as usize % length, *target)).collect();
            if !own.is_empty() {
                let ids = self.tokens.ids.get(row)?.narrow(0, 0, real)?.to_vec1::<u32>()?;
                rows.push(Self::with_labels(&[ids], own, 0, self.tokens.ids.device())?);
            }
        }
        Ok(rows)
    }
}
