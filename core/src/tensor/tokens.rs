//! Token ids of a batch: the input of a model.

use std::ops::Range;

use candle_core::{Device, Tensor};

use crate::error::{Error, Result};

/// The sequences of a batch, one behind the other: the input of a model. There is no padding between them, so nothing is
/// computed for it, and whatever a model makes of tokens, `[tokens, …]`, has real ones only.
///
/// [`Batch::padded`](crate::data::Batch::padded) gives the exception: published code that counts padding needs it.
#[derive(Debug, Clone)]
pub struct Tokens {
    /// Token ids, `[tokens]`, u32.
    pub ids: Tensor,
    /// The number of tokens of each sequence.
    pub lengths: Vec<usize>,
    /// The real ones among them, which come first.
    pub real: Vec<usize>,
    /// The largest id. A device does not look at ids before it reads by them.
    pub largest: u32,
}

impl Tokens {
    /// The tokens of these sequences.
    ///
    /// # Errors
    /// There is no token, or a tensor operation failed.
    pub fn new<R: AsRef<[u32]>>(sequences: &[R], device: &Device) -> Result<Self> {
        let ids: Vec<u32> = sequences.iter().flat_map(AsRef::as_ref).copied().collect();
        let Some(largest) = ids.iter().copied().max() else { return Err(Error::run("a batch has no token")) };
        let lengths: Vec<usize> = sequences.iter().map(|sequence| sequence.as_ref().len()).collect();
        let count = ids.len();
        Ok(Self { ids: Tensor::from_vec(ids, count, device)?, real: lengths.clone(), lengths, largest })
    }

    /// How many tokens there are.
    pub fn count(&self) -> usize {
        self.lengths.iter().sum()
    }

    /// The place of each sequence among all tokens.
    pub fn ranges(&self) -> impl Iterator<Item = Range<usize>> {
        self.lengths.iter().scan(0, |first, length| {
            let range = *first..*first + length;
            *first = range.end;
            Some(range)
        })
    }
}
