//! A training batch.

use candle_core::{Device, Tensor};

use crate::data::example::Example;
use crate::error::{Error, Result};
use crate::tensor::tokens::Tokens;

/// The tokens of a row, and its labels as `(position that predicts it, label)`.
type RowOfIds = (Vec<u32>, Vec<(usize, u32)>);

/// A training batch: tokens and the labels to predict.
///
/// Labels are kept only where the loss is taken: hidden state `positions[k]` of all tokens predicts `targets[k]`.
#[derive(Debug, Clone)]
pub struct Batch {
    /// The input.
    pub tokens: Tokens,
    /// The tokens that predict a label, `[labels]`, u32.
    pub positions: Tensor,
    /// The labels, `[labels]`, u32.
    pub targets: Tensor,
    /// The largest label.
    pub largest_target: u32,
    /// The token that fills short rows where padding is asked for.
    pub pad: u32,
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
    /// There is no label, one lies beyond its row, or a tensor operation failed.
    pub fn with_labels<R: AsRef<[u32]>>(
        rows: &[R],
        labels: impl IntoIterator<Item = (usize, usize, u32)>,
        pad: u32,
        device: &Device,
    ) -> Result<Self> {
        let tokens = Tokens::new(rows, device)?;
        let ranges: Vec<_> = tokens.ranges().collect();
        let (mut positions, mut targets) = (Vec::new(), Vec::new());
        for (row, at, label) in labels {
            if at >= ranges[row].len() {
                let length = ranges[row].len();
                return Err(Error::run(format!("a label is predicted at position {at} of a row of {length} tokens")));
            }
            positions.push((ranges[row].start + at) as u32);
            targets.push(label);
        }
        if targets.is_empty() {
            return Err(Error::run("a batch has no label: its loss would be 0/0"));
        }
        let (count, largest_target) = (targets.len(), targets.iter().copied().max().unwrap_or(0));
        Ok(Self {
            tokens,
            largest_target,
            pad,
            positions: Tensor::from_vec(positions, count, device)?,
            targets: Tensor::from_vec(targets, count, device)?,
        })
    }

    /// How many labels the loss averages over.
    pub fn labels(&self) -> usize {
        self.targets.elem_count()
    }

    /// The same rows, filled up on the right to `length` tokens each, or to the longest: hidden states `[rows · length, …]`.
    /// What published code computes from padding needs it; everything else is faster without.
    ///
    /// # Errors
    /// A tensor operation failed.
    pub fn padded(&self, length: Option<usize>) -> Result<Self> {
        let longest = self.tokens.lengths.iter().copied().max().unwrap_or(0);
        let length = length.unwrap_or(0).max(longest);
        let mut rows = self.to_rows()?;
        for (row, _) in &mut rows {
            row.resize(length, self.pad);
        }
        let labels = rows.iter().enumerate();
        let labels = labels.flat_map(|(row, (_, own))| own.iter().map(move |&(at, label)| (row, at, label)));
        let ids: Vec<&[u32]> = rows.iter().map(|(ids, _)| ids.as_slice()).collect();
        let mut padded = Self::with_labels(&ids, labels, self.pad, self.tokens.ids.device())?;
        padded.tokens.real.clone_from(&self.tokens.real);
        Ok(padded)
    }

    /// Each row that has a label as a batch of its own.
    ///
    /// # Errors
    /// A tensor operation failed.
    pub fn rows(&self) -> Result<Vec<Batch>> {
        let mut rows = Vec::with_capacity(self.tokens.lengths.len());
        for (ids, labels) in self.to_rows()? {
            if !labels.is_empty() {
                let labels = labels.into_iter().map(|(at, label)| (0, at, label));
                rows.push(Self::with_labels(&[ids], labels, self.pad, self.tokens.ids.device())?);
            }
        }
        Ok(rows)
    }

    /// The real tokens of each row, and its labels.
    fn to_rows(&self) -> Result<Vec<RowOfIds>> {
        let ids = self.tokens.ids.to_vec1::<u32>()?;
        let positions = self.positions.to_vec1::<u32>()?.into_iter().map(|position| position as usize);
        let labels: Vec<(usize, u32)> = positions.zip(self.targets.to_vec1::<u32>()?).collect();
        let row = |(range, &real): (std::ops::Range<usize>, &usize)| {
            let own = labels.iter().filter(|(position, _)| range.contains(position));
            let own = own.map(|(position, label)| (position - range.start, *label)).collect();
            (ids[range.start..][..real].to_vec(), own)
        };
        Ok(self.tokens.ranges().zip(&self.tokens.real).map(row).collect())
    }
}
