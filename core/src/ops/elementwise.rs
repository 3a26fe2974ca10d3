//! Sums, products and copies of whole tensors.

use candle_core::{DType, Tensor};

use super::host::{Real, by_dtype, read, rows, simd, tensor, write};
use super::{last_dim, math};
use crate::matrix::Matrix;
use crate::tape::{Tape, Traced};
use crate::{Error, Result, Scalar};

/// `a + b`: the residual connection.
///
/// # Errors
/// The shapes differ, or a tensor operation failed.
pub fn add(tape: &mut Tape, a: &Traced, b: &Traced) -> Result<Traced> {
    let result = sum(a.tensor(), b.tensor())?;
    Ok(tape.record(result, &[a, b], |gradient, into| {
        into.add_shared(0, &gradient)?;
        into.add_shared(1, &gradient)
    }))
}

/// The rows `index: [n]` (u32, each at most once) of `x: [rows, width]`.
///
/// # Errors
/// An index lies outside, or a tensor operation failed.
pub fn select_rows(tape: &mut Tape, x: &Traced, index: &Tensor) -> Result<Traced> {
    let (result, shape, at) = (x.tensor().index_select(index, 0)?, x.tensor().dims().to_vec(), index.clone());
    Ok(tape.record(result, &[x], move |gradient, into| {
        let g = &gradient;
        let dx = dispatch!(
            g,
            super::cuda::scatter_rows(g, &at, &shape),
            by_dtype!(g.dtype(), scatter_rows(g, &at, &shape))
        )?;
        into.add(0, dx)
    }))
}

/// The rows `ids` of `table: [vocabulary, width]`, any of them any number of times: an embedding.
///
/// # Errors
/// An id lies outside the table, or a tensor operation failed.
pub fn embed(tape: &mut Tape, table: impl Into<Traced<Matrix>>, ids: &Tensor) -> Result<Traced> {
    let (table, ids) = (table.into(), ids.flatten_all()?);
    let (result, shape) = (table.tensor().gather(&ids)?, table.tensor().dims().to_vec());
    let table = table.with_tensor(result.clone());
    Ok(tape.record(result, &[&table], move |gradient, into| {
        let zeros = Tensor::zeros(shape, gradient.dtype(), gradient.device())?;
        into.add(0, zeros.index_add(&ids, &gradient, 0)?)
    }))
}

fn scatter_rows<T: Real>(g: &Tensor, index: &Tensor, shape: &[usize]) -> Result<Tensor> {
    let (width, index) = (last_dim(g), index.to_vec1::<u32>()?);
    read(g, |gs: &[T]| {
        let mut dx = vec![T::zero(); shape.iter().product()];
        for (&row, g) in index.iter().zip(gs.chunks_exact(width)) {
            dx[row as usize * width..][..width].copy_from_slice(g);
        }
        tensor(dx, shape)
    })
}

/// `a + b` of one shape and type.
///
/// # Errors
/// The shapes differ, or a tensor operation failed.
pub(crate) fn sum(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    same_shape(a, b)?;
    dispatch!(a, Ok((a + b)?), by_dtype!(a.dtype(), zip(a, b, |a, b| a + b)))
}

/// `a ∘ b` of one shape and type.
///
/// # Errors
/// The shapes differ, or a tensor operation failed.
pub(crate) fn multiply(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    same_shape(a, b)?;
    dispatch!(a, Ok((a * b)?), by_dtype!(a.dtype(), zip(a, b, |a, b| a * b)))
}

/// `a += b`, in place; both of one shape and type, in memory of their own.
///
/// # Errors
/// The shapes differ, or a tensor operation failed.
pub(crate) fn add_assign(a: &Tensor, b: &Tensor) -> Result<()> {
    same_shape(a, b)?;
    dispatch!(a, super::cuda::add_assign(a, b), by_dtype!(a.dtype(), add_assign_host(a, b)))
}

/// Writes `fresh: [batch, new, width]` into `store: [rows, slots, width]`: batch row `b` goes to row `rows[b]`, from slot
/// `starts[b]` on. What does not fit behind the last slot is padding, and dropped.
///
/// # Errors
/// A tensor operation failed.
pub(crate) fn cache_write(store: &Tensor, fresh: &Tensor, rows: &[usize], starts: &[usize]) -> Result<()> {
    let fresh = fresh.contiguous()?;
    dispatch!(
        fresh,
        super::cuda::cache_write(store, &fresh, rows, starts),
        by_dtype!(fresh.dtype(), cache_write_host(store, &fresh, rows, starts))
    )
}

fn cache_write_host<T: Real>(store: &Tensor, fresh: &Tensor, rows: &[usize], starts: &[usize]) -> Result<()> {
    let ((_, new, width), (_, slots, _)) = (fresh.dims3()?, store.dims3()?);
    read(fresh, |fresh: &[T]| {
        write(store, |store: &mut [T]| {
            for ((&row, &start), fresh) in rows.iter().zip(starts).zip(fresh.chunks_exact(new * width)) {
                let fits = new.min(slots - start) * width;
                store[(row * slots + start) * width..][..fits].copy_from_slice(&fresh[..fits]);
            }
        })
    })
}

/// `√Σ t²` over all elements of all tensors. On the host the squares are summed in f64; on a device in f32, without
/// waiting for it.
///
/// # Errors
/// A tensor operation failed.
pub(crate) fn norm<'a>(tensors: impl IntoIterator<Item = &'a Tensor>) -> Result<Scalar> {
    let tensors: Vec<&Tensor> = tensors.into_iter().collect();
    #[cfg(feature = "cuda")]
    if tensors.first().is_some_and(|tensor| tensor.device().is_cuda()) {
        return super::cuda::norm(&tensors);
    }
    let mut total = 0.;
    for tensor in tensors {
        total += match tensor.dtype() {
            DType::F32 => read(tensor, |values: &[f32]| {
                Ok(simd(
                    #[inline(always)]
                    || square_sum(values),
                ))
            })?,
            _ => tensor.to_dtype(DType::F64)?.sqr()?.sum_all()?.to_scalar()?,
        };
    }
    Ok(Scalar::Host(total.sqrt()))
}

/// `Σ x²` of f32 values in f64.
#[inline(always)]
fn square_sum(values: &[f32]) -> f64 {
    math::lanes(values.len(), |at| f64::from(values[at]) * f64::from(values[at]))
}

fn same_shape(a: &Tensor, b: &Tensor) -> Result<()> {
    if a.dims() == b.dims() && a.dtype() == b.dtype() {
        return Ok(());
    }
    let describe = |t: &Tensor| format!("{:?} ({:?})", t.dims(), t.dtype());
    Err(Error::run(format!("tensors {} and {} do not match", describe(a), describe(b))))
}

fn zip<T: Real>(a: &Tensor, b: &Tensor, f: impl Fn(T, T) -> T + Sync) -> Result<Tensor> {
    read(a, |xs: &[T]| {
        read(b, |ys: &[T]| {
            let mut out = vec![T::zero(); xs.len()];
            rows(
                &mut out,
                1,
                #[inline(always)]
                |first, part| {
                    for ((out, &x), &y) in part.iter_mut().zip(&xs[first..]).zip(&ys[first..]) {
                        *out = f(x, y);
                    }
                },
            );
            tensor(out, a.dims())
        })
    })
}

fn add_assign_host<T: Real>(a: &Tensor, b: &Tensor) -> Result<()> {
    read(b, |ys: &[T]| {
        write(a, |xs: &mut [T]| {
            rows(
                xs,
                1,
                #[inline(always)]
                |first, part| {
                    for (x, &y) in part.iter_mut().zip(&ys[first..]) {
                        *x += y;
                    }
                },
            );
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::check::{gradients, normal};
    use candle_core::Device;

    #[test]
    fn gradients_equal_finite_differences() -> Result<()> {
        let (x, y) = (normal(&[3, 4], 1)?, normal(&[3, 4], 2)?);
        let index = Tensor::new(&[2u32, 0], &Device::Cpu)?;
        let ids = Tensor::new(&[2u32, 0, 2, 2], &Device::Cpu)?;
        gradients(&[x.clone(), y], |tape, x| add(tape, &x[0], &x[1]))?;
        gradients(std::slice::from_ref(&x), |tape, x| add(tape, &x[0], &x[0]))?;
        gradients(std::slice::from_ref(&x), |tape, x| select_rows(tape, &x[0], &index))?;
        gradients(&[x], |tape, x| embed(tape, &x[0], &ids))
    }

    #[test]
    fn shapes_that_differ_are_an_error() -> Result<()> {
        assert!(sum(normal(&[2], 1)?.as_tensor(), normal(&[3], 1)?.as_tensor()).is_err());
        Ok(())
    }
}
