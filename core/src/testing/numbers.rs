//! The numbers of weights, to be compared bit for bit or to rounding.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};

use crate::error::{Error, Result};
use crate::tensor::grads::Grads;
use crate::weights::parameters::Weights;
use crate::weights::schema::factor_names;

/// All numbers of some weights by name, adapters included, converted to f64.
#[derive(Debug, Clone)]
pub(super) struct Numbers(BTreeMap<String, Vec<f64>>);

impl Numbers {
    pub(super) fn of(weights: &Weights) -> Result<Self> {
        let mut all = BTreeMap::new();
        for (name, matrix) in weights.named() {
            all.insert(name.to_owned(), values(&matrix.dense()?)?);
        }
        for (module, adapter) in weights.adapters() {
            for (name, factor) in factor_names(module).into_iter().zip([&adapter.a, &adapter.b]) {
                all.insert(name, values(factor)?);
            }
        }
        Ok(Self(all))
    }

    /// The first parameter that is not the same, bit for bit.
    pub(super) fn first_difference(&self, other: &Self) -> Option<String> {
        let bits = |values: Option<&Vec<f64>>| values.map(|v| v.iter().map(|x| x.to_bits()).collect::<Vec<_>>());
        let names = self.0.keys().chain(other.0.keys());
        names.into_iter().find(|name| bits(self.0.get(*name)) != bits(other.0.get(*name))).cloned()
    }

    /// The L2 norm of the difference; infinite if the two have different parameters.
    pub(super) fn distance(&self, other: &Self) -> f64 {
        if !self.0.keys().eq(other.0.keys()) {
            return f64::INFINITY;
        }
        let pairs = self.0.values().flatten().zip(other.0.values().flatten());
        pairs.map(|(a, b)| (a - b).powi(2)).sum::<f64>().sqrt()
    }

    /// The first parameter that holds a value which is infinite or not a number.
    pub(super) fn first_not_finite(&self) -> Option<&str> {
        self.0.iter().find(|(_, values)| values.iter().any(|value| !value.is_finite())).map(|(name, _)| name.as_str())
    }
}

/// The elements of a tensor in f64.
pub fn values(tensor: &Tensor) -> Result<Vec<f64>> {
    Ok(tensor.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.flatten_all()?.to_vec1()?)
}

/// `‖a − b‖`, a missing tensor being zero.
pub(super) fn distance(a: &Grads, b: &Grads) -> Result<f64> {
    a.clone().add_scaled(-1., b)?.norm()?.value()
}

/// The largest absolute difference of two tensors; infinite if one holds a value that is not a number.
pub fn difference(a: &Tensor, b: &Tensor) -> Result<f64> {
    if a.dims() != b.dims() {
        return Err(Error::run(format!("shapes {:?} and {:?}", a.dims(), b.dims())));
    }
    let gaps = values(a)?.into_iter().zip(values(b)?).map(|(x, y)| (x - y).abs());
    Ok(gaps.fold(0., |max, gap| if gap.is_nan() { f64::INFINITY } else { max.max(gap) }))
}

/// `Σ a · b` over the tensors that both have.
pub fn dot(a: &Grads, b: &Grads) -> Result<f64> {
    let products = a.iter().filter_map(|(name, tensor)| Some((tensor, b.get(name)?)));
    products.map(|(a, b)| Ok(values(a)?.into_iter().zip(values(b)?).map(|(x, y)| x * y).sum::<f64>())).sum()
}
