//! Dropout masks, which are computed where they are used and never stored.

use candle_core::Tensor;
use rand::RngExt;
use titer_kernels::dropout as kernels;
pub use titer_kernels::dropout::Dropout;

#[cfg(feature = "cuda")]
use super::elementwise::add_assign;
use super::host::{Element, by_dtype, read, tensor, write};
use crate::error::Result;
use crate::rng::Seed;

/// The dropout masks of one pass: one for each layer that asks.
#[derive(Debug, Clone)]
pub struct DropoutMasks {
    key: [u32; 2],
    layer: u32,
}

impl DropoutMasks {
    /// The masks that follow from a seed.
    pub fn new(seed: Seed) -> Self {
        Self { key: seed.generator().random(), layer: 0 }
    }

    /// The next layer's mask, of probability `p`.
    pub fn next_layer(&mut self, p: f32) -> Dropout {
        self.layer += 1;
        Dropout { key: self.key, layer: self.layer, p }
    }
}

/// `m ∘ x`.
///
/// # Errors
/// A tensor operation failed.
pub fn dropout(x: &Tensor, mask: Dropout) -> Result<Tensor> {
    dispatch!(x, super::cuda::dropout(x, mask), by_dtype!(x.dtype(), dropout_host(x, mask)))
}

/// `y += m ∘ x`, in place, for contiguous tensors of one shape and type in memory of their own.
pub(super) fn add_dropout(y: &Tensor, x: &Tensor, mask: Dropout) -> Result<()> {
    dispatch!(x, add_assign(y, &dropout(x, mask)?), by_dtype!(x.dtype(), add_dropout_host(y, x, mask)))
}

fn dropout_host<T: Element>(x: &Tensor, mask: Dropout) -> Result<Tensor> {
    read(x, |values: &[T]| tensor(kernels::dropout(values, mask), x.dims()))
}

fn add_dropout_host<T: Element>(y: &Tensor, x: &Tensor, mask: Dropout) -> Result<()> {
    read(x, |xs: &[T]| write(y, |ys: &mut [T]| kernels::add_dropout(ys, xs, mask)))
}
