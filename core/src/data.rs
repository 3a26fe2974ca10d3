//! Examples, batches, seeded streams and mixtures.

use std::sync::Arc;

use candle_core::{Device, Tensor};

use crate::rng::{Seed, permutation};
use crate::text::Row;
use crate::{Error, Result};

/// One tokenised row. Labels are the tokens from `first_label` on; each is predicted from the position before it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Example {
    /// Prompt, answer and end of text.
    pub tokens: Vec<u32>,
    /// Index of the first token that counts in the loss; at least 1.
    pub first_label: usize,
}

impl Example {
    /// How many tokens count in the loss.
    fn labels(&self) -> usize {
        self.tokens.len().saturating_sub(self.first_label)
    }
}

/// A batch of right-padded sequences, the input of a model.
#[derive(Debug, Clone)]
pub struct Tokens {
    /// Token ids, `[batch, length]`, u32.
    pub ids: Tensor,
    /// The number of real tokens of each row; what follows is padding.
    pub lengths: Vec<usize>,
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
        Ok(Self { ids: Tensor::from_vec(ids, (rows.len(), length), device)?, lengths })
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
        let count = targets.len();
        Ok(Self {
            tokens,
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

/// A never-ending stream of batches. Its state is one number, the count of batches drawn: batch `k` is a pure function
/// of the stream's source and `k`.
#[derive(Debug, Clone)]
pub struct Stream {
    source: Source,
    drawn: usize,
    /// The next batch, if it was collated ahead.
    ready: Option<Batch>,
}

#[derive(Debug, Clone)]
enum Source {
    Shuffled(Shuffled),
    /// Ready-made batches, in their order, over and over.
    Fixed(Arc<Vec<Batch>>),
}

/// Epochs of seeded permutations. The last batch of an epoch may be smaller, as in the Hugging Face trainer.
#[derive(Debug, Clone)]
struct Shuffled {
    examples: Arc<Vec<Example>>,
    batch_size: usize,
    bucket: usize,
    seed: Seed,
    pad: u32,
    epoch: Option<(usize, Vec<Vec<usize>>)>,
}

impl Stream {
    /// A stream over `examples` in batches of `batch_size`.
    ///
    /// With `bucket > 1`, windows of `bucket` batches are sorted by length before being cut into batches, which are
    /// then shuffled: less padding, the same examples per epoch.
    ///
    /// # Errors
    /// There is no example, or the batch size is zero.
    pub fn new(examples: Arc<Vec<Example>>, batch_size: usize, bucket: usize, seed: Seed, pad: u32) -> Result<Self> {
        if examples.is_empty() {
            return Err(Error::data("a data stream has no example"));
        }
        if batch_size == 0 {
            return Err(Error::config("`batch_size` must be at least 1, found `0`").key("batch_size"));
        }
        Ok(Self::from(Source::Shuffled(Shuffled { examples, batch_size, bucket, seed, pad, epoch: None })))
    }

    /// A stream of these batches in their order, over and over.
    ///
    /// # Errors
    /// There is no batch.
    pub fn of_batches(batches: Vec<Batch>) -> Result<Self> {
        if batches.is_empty() {
            return Err(Error::data("a data stream has no batch"));
        }
        Ok(Self::from(Source::Fixed(batches.into())))
    }

    fn from(source: Source) -> Self {
        Self { source, drawn: 0, ready: None }
    }

    /// The same stream with the first `rows` examples of `other` (all, if it has fewer) appended to its own.
    ///
    /// # Errors
    /// One of the two is a stream of ready-made batches.
    pub fn with_rows_of(self, other: &Stream, rows: usize) -> Result<Self> {
        match (self.source, &other.source) {
            (Source::Shuffled(own), Source::Shuffled(other)) => {
                let more = other.examples.iter().take(rows);
                let examples = own.examples.iter().chain(more).cloned().collect();
                Ok(Self::from(Source::Shuffled(Shuffled { examples: Arc::new(examples), epoch: None, ..own })))
            }
            _ => Err(Error::run("rows cannot be added to a stream of ready-made batches")),
        }
    }

    /// Batches per epoch.
    pub fn batches_per_epoch(&self) -> usize {
        match &self.source {
            Source::Shuffled(rows) => rows.examples.len().div_ceil(rows.batch_size),
            Source::Fixed(batches) => batches.len(),
        }
    }

    /// How many batches were drawn: the whole state of the stream.
    pub fn drawn(&self) -> usize {
        self.drawn
    }

    /// Goes on after `drawn` batches.
    pub fn seek(&mut self, drawn: usize) {
        self.drawn = drawn;
        self.ready = None;
    }

    /// Collates the next batch ahead and sends it to the device, while that works on what was queued before.
    ///
    /// # Errors
    /// A tensor operation failed.
    pub fn prefetch(&mut self, device: &Device) -> Result<()> {
        if self.ready.is_none() {
            self.ready = Some(self.collate(device)?);
        }
        Ok(())
    }

    /// The next batch.
    ///
    /// # Errors
    /// A tensor operation failed.
    pub fn next_batch(&mut self, device: &Device) -> Result<Batch> {
        let batch = match self.ready.take() {
            Some(batch) => batch,
            None => self.collate(device)?,
        };
        self.drawn += 1;
        Ok(batch)
    }

    /// The labels of batch number `index`, counted from the stream's beginning.
    fn labels(&mut self, index: usize) -> usize {
        let (epoch, within) = (index / self.batches_per_epoch(), index % self.batches_per_epoch());
        match &mut self.source {
            Source::Shuffled(rows) => rows.batch(epoch, within).iter().map(|example| example.labels()).sum(),
            Source::Fixed(batches) => batches[within].labels(),
        }
    }

    /// The part of the last batch drawn in the labels of all batches that the stream gives an update, if it gives one to
    /// each of its `micros` micro batches and this was that of number `micro`.
    pub(crate) fn share(&mut self, micro: usize, micros: usize) -> f64 {
        let last = self.drawn.saturating_sub(1);
        let first = last.saturating_sub(micro);
        let all: usize = (first..first + micros).map(|index| self.labels(index)).sum();
        self.labels(last) as f64 / all as f64
    }

    /// Batch number `drawn`.
    fn collate(&mut self, device: &Device) -> Result<Batch> {
        let (epoch, within) = (self.drawn / self.batches_per_epoch(), self.drawn % self.batches_per_epoch());
        match &mut self.source {
            Source::Shuffled(rows) => rows.collate(epoch, within, device),
            Source::Fixed(batches) => Ok(batches[within].clone()),
        }
    }
}

impl Shuffled {
    fn collate(&mut self, epoch: usize, within: usize, device: &Device) -> Result<Batch> {
        let pad = self.pad;
        Batch::collate(&self.batch(epoch, within), pad, device)
    }

    /// The examples of one batch.
    fn batch(&mut self, epoch: usize, within: usize) -> Vec<&Example> {
        if self.epoch.as_ref().is_none_or(|(current, _)| *current != epoch) {
            self.epoch = Some((epoch, self.order(epoch)));
        }
        let (_, order) = self.epoch.as_ref().expect("set above");
        order[within].iter().map(|&index| &self.examples[index]).collect()
    }

    /// The batches of one epoch as example indices.
    fn order(&self, epoch: usize) -> Vec<Vec<usize>> {
        let mut generator = self.seed.at(epoch).generator();
        let mut indices = permutation(self.examples.len(), &mut generator);
        if self.bucket <= 1 {
            return indices.chunks(self.batch_size).map(<[usize]>::to_vec).collect();
        }
        let mut batches = Vec::with_capacity(indices.len().div_ceil(self.batch_size));
        for window in indices.chunks_mut(self.batch_size * self.bucket) {
            window.sort_by_key(|&index| self.examples[index].tokens.len());
            let cut: Vec<Vec<usize>> = window.chunks(self.batch_size).map(<[usize]>::to_vec).collect();
            let shuffled = permutation(cut.len(), &mut generator);
            batches.extend(shuffled.into_iter().map(|at| cut[at].clone()));
        }
        batches
    }
}

/// How many of `total` rows are harmful at ratio `p`: `p * total`, rounded to the nearest integer.
///
/// # Errors
/// `p` is outside `[0, 1]`.
pub fn harmful_count(total: usize, p: f64) -> Result<usize> {
    if !(0. ..=1.).contains(&p) {
        return Err(Error::config(format!("a harmful ratio must lie in [0, 1], found `{p}`"))
            .key("harmful_ratios")
            .help("0.1 means that one row in ten is harmful"));
    }
    Ok((p * total as f64).round() as usize)
}

/// `total` rows of which exactly [`harmful_count`] come from `harmful` and the rest from `benign`, each from the front
/// of its list, in a seeded order.
///
/// # Errors
/// `p` is outside `[0, 1]` or a list is too short.
pub fn mixture(benign: &[Row], harmful: &[Row], total: usize, p: f64, seed: Seed) -> Result<Vec<Row>> {
    let bad = harmful_count(total, p)?;
    let take = |rows: &[Row], count: usize, what: &str| {
        rows.get(..count).map(<[Row]>::to_vec).ok_or_else(|| {
            Error::data(format!(
                "{count} {what} rows are needed (samples = {total}, harmful ratio = {p}), found {}",
                rows.len()
            ))
            .help(format!("lower `samples` or give more {what} rows"))
        })
    };
    let mut rows = take(benign, total - bad, "user")?;
    rows.extend(take(harmful, bad, "harmful")?);
    let order = permutation(rows.len(), &mut seed.generator());
    Ok(order.into_iter().map(|index| rows[index].clone()).collect())
}
