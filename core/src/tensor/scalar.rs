//! A number that may still be on its way from a device.

use candle_core::{DType, Tensor};

use crate::error::Result;

/// A loss or a norm. On the host it is an f64; on a device it stays there until somebody reads it, since every reading
/// waits for all work before it.
#[derive(Debug, Clone)]
pub enum Scalar {
    /// A number at hand.
    Host(f64),
    /// A tensor without dimensions, f32.
    Device(Tensor),
}

impl Scalar {
    /// The only element of `tensor`.
    ///
    /// # Errors
    /// The tensor has more than one element.
    pub fn of(tensor: &Tensor) -> Result<Self> {
        let tensor = tensor.detach().reshape(())?;
        if tensor.device().is_cpu() {
            return Ok(Self::Host(tensor.to_dtype(DType::F64)?.to_scalar()?));
        }
        Ok(Self::Device(tensor.to_dtype(DType::F32)?))
    }

    /// Reads the number, waiting for it if need be.
    ///
    /// # Errors
    /// The device failed.
    pub fn value(&self) -> Result<f64> {
        match self {
            Self::Host(value) => Ok(*value),
            Self::Device(tensor) => Ok(f64::from(tensor.to_scalar::<f32>()?)),
        }
    }

    /// Whether reading the number waits for a device.
    pub fn is_pending(&self) -> bool {
        matches!(self, Self::Device(_))
    }

    /// `factor · self + offset`.
    ///
    /// # Errors
    /// The device failed.
    pub fn affine(&self, factor: f64, offset: f64) -> Result<Self> {
        Ok(match self {
            Self::Host(value) => Self::Host(value * factor + offset),
            Self::Device(tensor) => Self::Device(tensor.affine(factor, offset)?),
        })
    }

    /// `self + other`.
    ///
    /// # Errors
    /// The device failed.
    pub fn plus(&self, other: &Self) -> Result<Self> {
        Ok(match (self, other) {
            (Self::Host(a), b) => b.affine(1., *a)?,
            (a, Self::Host(b)) => a.affine(1., *b)?,
            (Self::Device(a), Self::Device(b)) => Self::Device((a + b)?),
        })
    }

    /// `1 / self`.
    ///
    /// # Errors
    /// The device failed.
    pub fn recip(&self) -> Result<Self> {
        Ok(match self {
            Self::Host(value) => Self::Host(value.recip()),
            Self::Device(tensor) => Self::Device(tensor.recip()?),
        })
    }

    /// `√self`.
    ///
    /// # Errors
    /// The device failed.
    pub fn sqrt(&self) -> Result<Self> {
        Ok(match self {
            Self::Host(value) => Self::Host(value.sqrt()),
            Self::Device(tensor) => Self::Device(tensor.sqrt()?),
        })
    }

    /// `min(self, limit)`.
    ///
    /// # Errors
    /// The device failed.
    pub fn at_most(&self, limit: f64) -> Result<Self> {
        Ok(match self {
            // Unlike `f64::min` this keeps a number that is not one, as the device does.
            Self::Host(value) => Self::Host(if *value > limit { limit } else { *value }),
            Self::Device(tensor) => {
                Self::Device(dispatch!(tensor, super::cuda::at_most(tensor, limit)?, tensor.minimum(limit)?))
            }
        })
    }

    /// `tensor · self`.
    ///
    /// # Errors
    /// The device failed.
    pub fn times(&self, tensor: &Tensor) -> Result<Tensor> {
        Ok(match self {
            Self::Host(value) => (tensor * *value)?,
            Self::Device(factor) => tensor.broadcast_mul(&factor.to_dtype(tensor.dtype())?)?,
        })
    }
}

impl From<f64> for Scalar {
    fn from(value: f64) -> Self {
        Self::Host(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    /// The two forms agree: the device's arithmetic, here on a host tensor, and the host's.
    #[test]
    fn both_forms_compute_the_same() -> Result<()> {
        let host = Scalar::from(2.5);
        let device = Scalar::Device(Tensor::new(2.5f32, &Device::Cpu)?);
        let all = |x: &Scalar| -> Result<Vec<f64>> {
            let parts = [x.affine(3., 1.)?, x.plus(x)?, x.recip()?, x.sqrt()?, x.at_most(1.)?, x.at_most(4.)?];
            parts.iter().map(Scalar::value).collect()
        };
        for (a, b) in all(&host)?.into_iter().zip(all(&device)?) {
            assert!((a - b).abs() < 1e-6, "{a} and {b}");
        }
        let tensor = Tensor::new(&[1f32, 2.], &Device::Cpu)?;
        assert_eq!(host.times(&tensor)?.to_vec1::<f32>()?, device.times(&tensor)?.to_vec1::<f32>()?);
        assert!(device.is_pending() && !host.is_pending());
        Ok(())
    }
}
