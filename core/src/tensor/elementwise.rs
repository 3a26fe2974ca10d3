//! Sums and copies of whole tensors, through which no gradient flows.

use candle_core::{DType, Tensor};
use titer_kernels::attention::Sequence;
use titer_kernels::elementwise as kernels;

use super::host::{Element, by_dtype, last_dim, read, read_all, tensor, write};
use super::mask::AttentionMask;
use super::scalar::Scalar;
use crate::error::{Error, Result};

/// `a + b` of one shape and type.
///
/// # Errors
/// The shapes differ, or a tensor operation failed.
pub fn sum(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    same_shape(a, b)?;
    dispatch!(a, Ok((a + b)?), by_dtype!(a.dtype(), sum_host(a, b)))
}

/// `a += b`, in place; both of one shape and type, in memory of their own.
///
/// # Errors
/// The shapes differ, or a tensor operation failed.
pub fn add_assign(a: &Tensor, b: &Tensor) -> Result<()> {
    same_shape(a, b)?;
    dispatch!(a, super::cuda::add_assign(a, b), by_dtype!(a.dtype(), add_assign_host(a, b)))
}

/// Writes `fresh: [tokens, width]` into `store: [slots, width]`: each sequence goes where `mask` says that it continues.
///
/// # Errors
/// A sequence has slots that are not there, or a tensor operation failed.
pub fn cache_write(store: &Tensor, fresh: &Tensor, mask: &AttentionMask) -> Result<()> {
    let (fresh, slots) = (fresh.contiguous()?, store.dims2()?.0);
    if mask.sequences.iter().any(|sequence| sequence.keys + sequence.start + sequence.queries > slots) {
        return Err(Error::run("the key/value cache is full"));
    }
    dispatch!(
        fresh,
        super::cuda::cache_write(store, &fresh, mask),
        by_dtype!(fresh.dtype(), cache_write_host(store, &fresh, &mask.sequences))
    )
}

fn cache_write_host<T: Element>(store: &Tensor, fresh: &Tensor, sequences: &[Sequence]) -> Result<()> {
    let width = last_dim(fresh);
    read(fresh, |fresh: &[T]| {
        write(store, |store: &mut [T]| {
            for Sequence { first, queries, start, keys, .. } in sequences {
                let fresh = &fresh[first * width..][..queries * width];
                store[(keys + start) * width..][..queries * width].copy_from_slice(fresh);
            }
        })
    })
}

/// The f32 tensors in bf16; on a device by one launch for many of them.
///
/// # Errors
/// A tensor operation failed.
pub(crate) fn to_bf16(tensors: &[&Tensor]) -> Result<Vec<Tensor>> {
    #[cfg(feature = "cuda")]
    if tensors.first().is_some_and(|tensor| tensor.device().is_cuda()) {
        return super::cuda::to_bf16_many(tensors);
    }
    Ok(tensors.iter().map(|tensor| tensor.to_dtype(DType::BF16)).collect::<candle_core::Result<_>>()?)
}

/// The place of the greatest number in each row of `x: [rows, width]`, the first of equal ones; `None` if a number is not
/// finite.
///
/// # Errors
/// A tensor operation failed.
pub fn argmax(x: &Tensor) -> Result<Option<Vec<u32>>> {
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        let places = super::cuda::argmax(x)?.to_vec1()?;
        return Ok(Some(places).filter(|places| !places.contains(&u32::MAX)));
    }
    Ok(if norm([x])?.value()?.is_finite() { Some(x.argmax(candle_core::D::Minus1)?.to_vec1()?) } else { None })
}

/// `√Σ t²` over all elements of all tensors. On the host the squares are summed in f64; on a device in f32, without
/// waiting for it.
///
/// # Errors
/// A tensor operation failed.
pub fn norm<'a>(tensors: impl IntoIterator<Item = &'a Tensor>) -> Result<Scalar> {
    let tensors: Vec<&Tensor> = tensors.into_iter().collect();
    #[cfg(feature = "cuda")]
    if tensors.first().is_some_and(|tensor| tensor.device().is_cuda()) {
        return super::cuda::norm(&tensors);
    }
    let mut total = 0.;
    for tensor in tensors {
        total += match tensor.dtype() {
            DType::F32 => read(tensor, |values: &[f32]| Ok(kernels::square_sum(values)))?,
            _ => tensor.to_dtype(DType::F64)?.sqr()?.sum_all()?.to_scalar()?,
        };
    }
    Ok(Scalar::Host(total.sqrt()))
}

/// The factor that brings the norm of all tensors together down to at most `max_norm`: `min(1, max_norm / (norm + 1e-6))`.
/// A norm that is not a number gives such a factor.
///
/// # Errors
/// A tensor operation failed.
pub fn clip_factor<'a>(tensors: impl IntoIterator<Item = &'a Tensor>, max_norm: f64) -> Result<Scalar> {
    let tensors: Vec<&Tensor> = tensors.into_iter().collect();
    #[cfg(feature = "cuda")]
    if tensors.first().is_some_and(|tensor| tensor.device().is_cuda()) {
        return super::cuda::clip_factor(&tensors, max_norm);
    }
    norm(tensors)?.affine(1., 1e-6)?.recip()?.affine(max_norm, 0.)?.at_most(1.)
}

pub(super) fn same_shape(a: &Tensor, b: &Tensor) -> Result<()> {
    if a.dims() == b.dims() && a.dtype() == b.dtype() {
        return Ok(());
    }
    let describe = |t: &Tensor| format!("{:?} ({:?})", t.dims(), t.dtype());
    Err(Error::run(format!("tensors {} and {} do not match", describe(a), describe(b))))
}

fn sum_host<T: Element>(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    read_all([a, b], |[xs, ys]: [&[T]; 2]| tensor(kernels::add(xs, ys), a.dims()))
}

fn add_assign_host<T: Element>(a: &Tensor, b: &Tensor) -> Result<()> {
    read(b, |ys: &[T]| write(a, |xs: &mut [T]| kernels::add_assign(xs, ys)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::check::normal;

    #[test]
    fn shapes_that_differ_are_an_error() -> Result<()> {
        assert!(sum(normal(&[2], 1)?.as_tensor(), normal(&[3], 1)?.as_tensor()).is_err());
        Ok(())
    }
}
