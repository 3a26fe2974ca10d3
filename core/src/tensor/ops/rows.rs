//! Rows of a matrix by their indices: selection and embedding.

use candle_core::Tensor;
use titer_kernels::elementwise as kernels;

use crate::error::Result;
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

fn scatter_rows<T: Element>(g: &Tensor, index: &Tensor, shape: &[usize]) -> Result<Tensor> {
    let (width, index) = (last_dim(g), index.to_vec1::<u32>()?);
    read(g, |gs: &[T]| tensor(kernels::scatter_rows(gs, &index, width, shape.iter().product()), shape))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::check::{gradients, normal};
    use candle_core::Device;

    #[test]
    fn gradients_equal_finite_differences() -> Result<()> {
        let x = normal(&[3, 4], 1)?;
        let index = Tensor::new(&[2u32, 0], &Device::Cpu)?;
        let ids = Tensor::new(&[2u32, 0, 2, 2], &Device::Cpu)?;
        gradients(std::slice::from_ref(&x), |tape, x| select_rows(tape, &x[0], &index))?;
        gradients(&[x], |tape, x| embed(tape, &x[0], &ids))
    }
}
