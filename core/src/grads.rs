//! Arithmetic on gradients: an ordered map from a name to a tensor.

use std::collections::BTreeMap;

use candle_core::{DType, Tensor};

use crate::{Error, Result};

/// Tensors by name: the gradients of parameters or of sites. The order is that of the names, so sums over the map are
/// the same on every run.
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

    /// The global L2 norm over all tensors: `sqrt(Σ ‖g‖²)`, accumulated in f64 on the host.
    ///
    /// # Errors
    /// A tensor operation failed.
    pub fn norm(&self) -> Result<f64> {
        let mut total = 0f64;
        for tensor in self.0.values() {
            total += sum_of_squares(tensor)?;
        }
        Ok(total.sqrt())
    }

    /// Scales the gradients to a global norm of at most `max_norm`, as `torch.nn.utils.clip_grad_norm_`:
    /// the factor is `min(1, max_norm / (norm + 1e-6))`. Returns them with the norm before clipping.
    ///
    /// # Errors
    /// A tensor operation failed.
    pub fn clip(self, max_norm: f64) -> Result<(Grads, f64)> {
        let norm = self.norm()?;
        let factor = max_norm / (norm + 1e-6);
        if factor < 1. { Ok((self.scale(factor)?, norm)) } else { Ok((self, norm)) }
    }

    /// Only the tensors whose name `keep` accepts.
    #[must_use]
    pub fn restrict(mut self, keep: impl Fn(&str) -> bool) -> Grads {
        self.0.retain(|name, _| keep(name));
        self
    }

    /// Fails, naming the tensor, if a value is infinite or not a number.
    ///
    /// # Errors
    /// A value is not finite.
    pub fn check_finite(&self) -> Result<()> {
        for (name, tensor) in &self.0 {
            if !sum_of_squares(tensor)?.is_finite() {
                return Err(Error::run("a gradient is not finite").at("tensor", name.clone()));
            }
        }
        Ok(())
    }
}

/// `‖t‖²`, summed in f64 on the host and in f32 elsewhere.
pub fn sum_of_squares(tensor: &Tensor) -> Result<f64> {
    if tensor.device().is_cpu() && tensor.dtype() == DType::F32 {
        let values = tensor.flatten_all()?.to_vec1::<f32>()?;
        return Ok(values.iter().map(|&value| f64::from(value) * f64::from(value)).sum());
    }
    let wide = if tensor.device().is_cpu() { DType::F64 } else { DType::F32 };
    Ok(tensor.to_dtype(wide)?.sqr()?.sum_all()?.to_dtype(DType::F64)?.to_scalar()?)
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
