//! Seeded, never-ending streams of batches.

use std::sync::Arc;

use candle_core::Device;

use crate::data::batch::Batch;
use crate::data::example::Example;
use crate::error::{Error, Result};
use crate::rng::{Seed, permutation};

/// A never-ending stream of batches. Its state is one number, the count of batches drawn: batch `k` is a pure function
/// of the stream's source and `k`.
///
/// ```
/// use std::sync::Arc;
///
/// use candle_core::Device;
/// use titer_core::data::{Example, Stream};
/// use titer_core::rng::Seed;
///
/// let examples = (3..9).map(|token| Example { tokens: vec![1, token, 2], first_label: 1 });
/// let mut stream = Stream::new(Arc::new(examples.collect()), 2, 1, Seed::new(0), 0)?;
/// assert_eq!(stream.batches_per_epoch(), 3);
/// let first = stream.next_batch(&Device::Cpu)?;
/// assert_eq!((first.tokens.count(), first.labels()), (4, 4));
///
/// stream.seek(0);
/// let again = stream.next_batch(&Device::Cpu)?;
/// assert_eq!(again.targets.to_vec1::<u32>()?, first.targets.to_vec1::<u32>()?);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
pub struct Stream {
    source: Batches,
    drawn: usize,
    /// The next batch, if it was collated ahead.
    ready: Option<Batch>,
}

#[derive(Debug, Clone)]
enum Batches {
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
    /// then shuffled: rows of similar length meet, with the same examples per epoch.
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
        Ok(Self::from(Batches::Shuffled(Shuffled { examples, batch_size, bucket, seed, pad, epoch: None })))
    }

    /// A stream of these batches in their order, over and over.
    ///
    /// # Errors
    /// There is no batch.
    pub fn of_batches(batches: Vec<Batch>) -> Result<Self> {
        if batches.is_empty() {
            return Err(Error::data("a data stream has no batch"));
        }
        Ok(Self::from(Batches::Fixed(batches.into())))
    }

    fn from(source: Batches) -> Self {
        Self { source, drawn: 0, ready: None }
    }

    /// The same stream with the first `rows` examples of `other` (all, if it has fewer) appended to its own.
    ///
    /// # Errors
    /// One of the two is a stream of ready-made batches.
    pub fn with_rows_of(self, other: &Stream, rows: usize) -> Result<Self> {
        match (self.source, &other.source) {
            (Batches::Shuffled(own), Batches::Shuffled(other)) => {
                let more = other.examples.iter().take(rows);
                let examples = own.examples.iter().chain(more).cloned().collect();
                Ok(Self::from(Batches::Shuffled(Shuffled { examples: Arc::new(examples), epoch: None, ..own })))
            }
            _ => Err(Error::run("rows cannot be added to a stream of ready-made batches")),
        }
    }

    /// Batches per epoch.
    pub fn batches_per_epoch(&self) -> usize {
        match &self.source {
            Batches::Shuffled(rows) => rows.examples.len().div_ceil(rows.batch_size),
            Batches::Fixed(batches) => batches.len(),
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
            Batches::Shuffled(rows) => rows.batch(epoch, within).iter().map(|example| example.labels()).sum(),
            Batches::Fixed(batches) => batches[within].labels(),
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
            Batches::Shuffled(rows) => rows.collate(epoch, within, device),
            Batches::Fixed(batches) => Ok(batches[within].clone()),
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
