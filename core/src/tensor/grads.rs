//! Arithmetic on gradients: an ordered map from a name to a tensor.

use std::collections::BTreeMap;

use candle_core::Tensor;

use crate::error::Result;
use crate::tensor::elementwise::{clip_factor, norm};
use crate::tensor::scalar::Scalar;

/// Tensors by name: the gradients of parameters or of sites. The order is that of the names, so sums over the map are
/// the same on every run.
///
/// ```
/// # include!(concat!(env!("CARGO_MANIFEST_DIR"), "/doc/bigram.rs"));
/// # fn main() -> titer_core::Result<()> {
/// # use candle_core::{DType, Device};
/// # use titer_core::data::Batch;
/// # use titer_core::defense::{Clock, StepCx, Streams};
/// # use titer_core::rng::Seed;
/// # use titer_core::Weights;
/// #
/// # let model = Bigram::new(8, 4);
/// # let mut weights = Weights::random(model.params(), Seed::new(0), DType::F32, &Device::Cpu)?;
/// # weights.train_full()?;
/// # // One row; position 0 predicts token 5, position 1 token 2.
/// # let batch = Batch::with_labels(&[[1, 5]], [(0, 0, 5), (0, 1, 2)], 0, &Device::Cpu)?;
/// # let mut streams = Streams::default();
/// # let mut cx = StepCx::new(&model, &weights, &mut streams, Seed::new(1), Clock::at(0, 1));
/// let grads = cx.backward(&batch, titer_core::Sites::none())?.grads;
/// let unit = grads.normalized(1., 1e-12)?;
/// assert!((unit.norm()?.value()? - 1.).abs() < 1e-6);
///
/// // g − ½ g, and only what belongs to the embedding.
/// let half = grads.clone().add_scaled(-0.5, &grads)?.restrict(|name| name.contains("embed"));
/// assert!((half.norm()?.value()? / grads.norm()?.value()? - 0.5).abs() < 1e-6);
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, Default)]
pub struct Grads(BTreeMap<String, Tensor>);

impl Grads {
    /// The tensor called `name`.
    pub fn get(&self, name: &str) -> Option<&Tensor> {
        self.0.get(name)
    }

    /// The tensors in the order of their names.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.0.iter().map(|(name, tensor)| (name.as_str(), tensor))
    }

    /// How many tensors there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// `self + scale * other`. A tensor that only one side has counts as zero on the other.
    ///
    /// # Errors
    /// Two tensors of one name differ in shape.
    pub fn add_scaled(mut self, scale: f64, other: &Grads) -> Result<Grads> {
        for (name, tensor) in &other.0 {
            let scaled = if scale == 1. { tensor.clone() } else { (tensor * scale)? };
            let sum = match self.0.get(name) {
                Some(mine) => (mine + scaled)?,
                None => scaled,
            };
            self.0.insert(name.clone(), sum);
        }
        Ok(self)
    }

    /// Every tensor times `factor`.
    ///
    /// # Errors
    /// A tensor operation failed.
    pub fn scale(&self, factor: f64) -> Result<Grads> {
        self.map(|tensor| Ok((tensor * factor)?))
    }

    /// Every tensor through `f`.
    ///
    /// # Errors
    /// `f` failed.
    pub fn map(&self, mut f: impl FnMut(&Tensor) -> Result<Tensor>) -> Result<Grads> {
        self.0.iter().map(|(name, tensor)| Ok((name.clone(), f(tensor)?))).collect()
    }

    /// The global L2 norm over all tensors, `sqrt(Σ ‖g‖²)`; summed in f64 on the host.
    ///
    /// # Errors
    /// A tensor operation failed.
    pub fn norm(&self) -> Result<Scalar> {
        norm(self.0.values())
    }

    /// The tensors scaled to a global norm of `length`: times `length / (‖g‖ + eps)`.
    ///
    /// # Errors
    /// A tensor operation failed.
    pub fn normalized(&self, length: f64, eps: f64) -> Result<Grads> {
        let factor = self.norm()?.affine(1., eps)?.recip()?.affine(length, 0.)?;
        self.map(|tensor| factor.times(tensor))
    }

    /// The factor that brings the global norm down to at most `max_norm`, as `torch.nn.utils.clip_grad_norm_`:
    /// `min(1, max_norm / (norm + 1e-6))`.
    ///
    /// # Errors
    /// A tensor operation failed.
    pub fn clip_factor(&self, max_norm: f64) -> Result<Scalar> {
        clip_factor(self.0.values(), max_norm)
    }

    /// Only the tensors whose name `keep` accepts.
    #[must_use]
    pub fn restrict(mut self, keep: impl Fn(&str) -> bool) -> Grads {
        self.0.retain(|name, _| keep(name));
        self
    }

    /// The first tensor that holds a value which is infinite or not a number.
    ///
    /// # Errors
    /// A tensor operation failed.
    pub fn first_not_finite(&self) -> Result<Option<&str>> {
        for (name, tensor) in &self.0 {
            if !norm([tensor])?.value()?.is_finite() {
                return Ok(Some(name));
            }
        }
        Ok(None)
    }
}

impl FromIterator<(String, Tensor)> for Grads {
    fn from_iter<I: IntoIterator<Item = (String, Tensor)>>(iter: I) -> Self {
        Self(iter.into_iter().collect())
    }
}

impl IntoIterator for Grads {
    type Item = (String, Tensor);
    type IntoIter = std::collections::btree_map::IntoIter<String, Tensor>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.into_iter()
    }
}
