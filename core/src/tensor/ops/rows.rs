//! Rows of a matrix by their indices, selection and embedding, and its columns by their places.

use candle_core::{D, Tensor};
use titer_kernels::elementwise as kernels;

use crate::error::{Error, Result};
use crate::tensor::host::{Element, by_dtype, last_dim, read, tensor};
use crate::tensor::matrix::Matrix;
use crate::tensor::tape::{Tape, Traced};

/// The rows `index: [n]` (u32, each at most once) of `x: [rows, width]`.
///
/// # Errors
/// An index lies outside, or a tensor operation failed.
pub fn select_rows(tape: &mut Tape, x: &Traced, index: &Tensor) -> Result<Traced> {
    let (xs, at) = (x.tensor().contiguous()?, index.clone());
    let (result, shape) = (xs.index_select(index, 0)?, xs.dims().to_vec());
    Ok(tape.record(result, &[x], move |gradient, into| {
        let g = &gradient;
        let dx = dispatch!(
            g,
            crate::tensor::cuda::scatter_rows(g, &at, &shape),
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

/// The columns of `x: [rows, width]` in groups of these widths, from the first on: what layers stored as one give.
///
/// # Errors
/// The widths are not that of `x` together, or a tensor operation failed.
pub fn split_columns<const N: usize>(tape: &mut Tape, x: &Traced, widths: [usize; N]) -> Result<[Traced; N]> {
    let xs = x.tensor();
    if widths.iter().sum::<usize>() != last_dim(xs) {
        return Err(Error::run(format!("columns {widths:?} of a tensor of shape {:?}", xs.dims())));
    }
    let mut first = 0;
    let groups = widths.map(|width| {
        let group = xs.narrow(D::Minus1, first, width)?.contiguous();
        first += width;
        group
    });
    let groups: Vec<Tensor> = groups.into_iter().collect::<candle_core::Result<_>>()?;
    let groups = groups.try_into().map_err(|_| Error::run("a group of columns was lost"))?;
    Ok(tape.record_all(groups, &[x], |gradients: [Tensor; N], into| into.add(0, Tensor::cat(&gradients, D::Minus1)?)))
}

fn scatter_rows<T: Element>(g: &Tensor, index: &Tensor, shape: &[usize]) -> Result<Tensor> {
    let (width, index) = (last_dim(g), index.to_vec1::<u32>()?);
    read(g, |gs: &[T]| tensor(kernels::scatter_rows(gs, &index, width, shape.iter().product()), shape))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::check::{close, gradients, normal};
    use candle_core::Device;

    #[test]
    fn gradients_equal_finite_differences() -> Result<()> {
        let x = normal(&[3, 4], 1)?;
        let index = Tensor::new(&[2u32, 0], &Device::Cpu)?;
        let ids = Tensor::new(&[2u32, 0, 2, 2], &Device::Cpu)?;
        gradients(std::slice::from_ref(&x), |tape, x| select_rows(tape, &x[0], &index))?;
        gradients(&[x], |tape, x| embed(tape, &x[0], &ids))
    }

    #[test]
    fn columns_in_groups_give_their_gradients_back() -> Result<()> {
        let x = normal(&[3, 5], 1)?;
        let [left, right] = split_columns(&mut Tape::default(), &Traced::constant(x.as_detached_tensor()), [2, 3])?;
        close(left.tensor(), &x.narrow(1, 0, 2)?, 0.)?;
        close(right.tensor(), &x.narrow(1, 2, 3)?, 0.)?;
        // The middle one is not used.
        gradients(&[normal(&[3, 5], 1)?], |tape, x| {
            let [left, _, right] = split_columns(tape, &x[0], [2, 1, 2])?;
            super::super::swiglu(tape, &left, &right)
        })?;
        assert!(split_columns(&mut Tape::default(), &Traced::constant(x.as_detached_tensor()), [2, 2]).is_err());
        Ok(())
    }
}
