//! Matrix products into fresh memory or onto what is there already.

use candle_core::{DType, Tensor};
use titer_kernels::gemm::{product, product_into};
use titer_kernels::matrix::{View, ViewMut};

use super::host::{Element, by_dtype, read_all, tensor, write};
use crate::error::{Error, Result};

/// `alpha · op(A) op(B)`, where `op` transposes the operands that `transpose` marks. Both are contiguous matrices of
/// one element type.
#[derive(Debug, Clone, Copy)]
pub struct Gemm {
    /// The factor on the product.
    pub alpha: f64,
    /// Whether `A` and `B` are transposed first.
    pub transpose: [bool; 2],
}

impl Gemm {
    /// `A B`.
    pub const NN: Self = Self { alpha: 1., transpose: [false, false] };
    /// `A Bᵀ`.
    pub const NT: Self = Self { alpha: 1., transpose: [false, true] };
    /// `Aᵀ B`.
    pub const TN: Self = Self { alpha: 1., transpose: [true, false] };

    /// The same product times `factor`.
    #[must_use]
    pub const fn times(self, factor: f64) -> Self {
        Self { alpha: self.alpha * factor, ..self }
    }

    /// The product as a fresh tensor of type `dtype`, which is the operands' own, or f32 for half-precision ones.
    ///
    /// # Errors
    /// The inner sizes differ, or the device failed.
    pub fn product_as(self, a: &Tensor, b: &Tensor, dtype: DType) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if a.device().is_cuda() {
            return super::cuda::gemm(self.alpha, self.transpose, self.sizes(a, b)?, [a, b], dtype);
        }
        debug_assert_eq!(a.dtype(), dtype, "the host computes in one type");
        by_dtype!(dtype, fresh(self, a, b))
    }

    /// The product as a fresh tensor.
    ///
    /// # Errors
    /// The inner sizes differ, or the device failed.
    pub fn product(self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        self.product_as(a, b, a.dtype())
    }

    /// Adds the product to `c`, in place.
    ///
    /// # Errors
    /// The sizes differ, or the device failed.
    pub fn add_to(self, c: &Tensor, a: &Tensor, b: &Tensor) -> Result<()> {
        #[cfg(feature = "cuda")]
        if a.device().is_cuda() {
            let sizes = self.sizes(a, b)?;
            check_target(c, sizes)?;
            return super::cuda::gemm_add(self.alpha, self.transpose, sizes, c, [a, b]);
        }
        by_dtype!(c.dtype(), add(self, c, a, b))
    }

    /// `[m, n, k]` of the product of these operands.
    fn sizes(self, a: &Tensor, b: &Tensor) -> Result<[usize; 3]> {
        let turn =
            |(rows, columns): (usize, usize), transpose| if transpose { (columns, rows) } else { (rows, columns) };
        let (m, k) = turn(a.dims2()?, self.transpose[0]);
        let (inner, n) = turn(b.dims2()?, self.transpose[1]);
        if inner != k {
            let message = format!("matrices {:?} and {:?} cannot be multiplied", a.dims(), b.dims());
            return Err(Error::run(message));
        }
        Ok([m, n, k])
    }
}

fn fresh<T: Element>(gemm: Gemm, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let [m, n, k] = gemm.sizes(a, b)?;
    let c = read_all([a, b], |[a, b]: [&[T]; 2]| {
        let (a, b) = (view(a, m, k, gemm.transpose[0]), view(b, k, n, gemm.transpose[1]));
        Ok(product(T::of(gemm.alpha), a, b))
    })?;
    tensor(c, &[m, n])
}

fn add<T: Element>(gemm: Gemm, c: &Tensor, a: &Tensor, b: &Tensor) -> Result<()> {
    let [m, n, k] = gemm.sizes(a, b)?;
    check_target(c, [m, n, k])?;
    read_all([a, b], |[a, b]: [&[T]; 2]| {
        let (a, b) = (view(a, m, k, gemm.transpose[0]), view(b, k, n, gemm.transpose[1]));
        write(c, |c: &mut [T]| product_into(ViewMut::new(c, [m, n], n), true, T::of(gemm.alpha), a, b))
    })
}

/// Whether a product of these sizes can be added to `c`.
fn check_target(c: &Tensor, [m, n, _]: [usize; 3]) -> Result<()> {
    if c.elem_count() == m * n {
        return Ok(());
    }
    Err(Error::run(format!("a product [{m}, {n}] cannot be added to {:?}", c.dims())))
}

/// `rows × columns` of a row-major slice, or of the transpose of one.
fn view<T>(data: &[T], rows: usize, columns: usize, transposed: bool) -> View<'_, T> {
    if transposed { View::of(data, columns, rows).t() } else { View::of(data, rows, columns) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::check::{close, normal};

    #[test]
    fn products_and_sums_equal_the_composed_form() -> Result<()> {
        let [a, b, c] = [[3, 4], [5, 4], [3, 5]].map(|shape| normal(&shape, shape[1] as u64).expect("a tensor"));
        let product = (a.matmul(&b.t()?)? * 0.5)?;
        close(&Gemm::NT.times(0.5).product(&a, &b)?, &product, 1e-12)?;
        let sum = (c.as_tensor() + &product)?;
        let target = c.copy()?;
        Gemm::NT.times(0.5).add_to(&target, &a, &b)?;
        close(&target, &sum, 1e-12)?;
        close(&Gemm::TN.product(&a, &product)?, &a.t()?.matmul(&product)?, 1e-12)?;
        close(&Gemm::NN.product(&product, &b)?, &product.matmul(&b)?, 1e-12)
    }

    /// Large f32 products, whichever unit of the processor computes them, have the accuracy of f32: the error of an element
    /// is small beside the sum of the absolute values of its terms. The sizes fill no block of any kernel.
    #[test]
    fn large_products_have_the_accuracy_of_their_type() -> Result<()> {
        let (m, n, k) = (333, 415, 1100);
        let [a, b, c] = [(m, k), (k, n), (m, n)].map(|(rows, columns)| {
            normal(&[rows, columns], (rows + columns) as u64).expect("a tensor").as_detached_tensor()
        });
        let narrow = |t: &Tensor| Ok::<_, crate::Error>(t.to_dtype(DType::F32)?);
        let wide = |t: &Tensor| Ok::<_, crate::Error>(t.to_dtype(DType::F64)?);
        let (a, b, c) = (narrow(&a)?, narrow(&b)?, narrow(&c)?);
        let product = wide(&a)?.matmul(&wide(&b)?)?;
        let scale = wide(&a)?.abs()?.matmul(&wide(&b)?.abs()?)?;
        let check = |found: &Tensor, expected: &Tensor| -> Result<()> {
            let error = ((wide(found)? - expected)?.abs()? / &scale)?.flatten_all()?.max(0)?.to_scalar::<f64>()?;
            assert!(error < 2f64.powi(-22), "relative error {error}");
            Ok(())
        };
        for gemm in [Gemm::NN, Gemm::NT, Gemm::TN] {
            let a = if gemm.transpose[0] { a.t()?.contiguous()? } else { a.clone() };
            let b = if gemm.transpose[1] { b.t()?.contiguous()? } else { b.clone() };
            check(&gemm.product(&a, &b)?, &product)?;
            let sum = c.copy()?;
            gemm.times(0.5).add_to(&sum, &a, &b)?;
            check(&sum, &(wide(&c)? + (&product * 0.5)?)?)?;
        }
        Ok(())
    }

    #[test]
    fn sizes_that_do_not_fit_are_an_error() -> Result<()> {
        let (a, b) = (normal(&[3, 4], 1)?, normal(&[3, 4], 2)?);
        assert!(Gemm::NN.product(&a, &b).is_err());
        assert!(Gemm::NT.add_to(normal(&[2, 2], 3)?.as_tensor(), &a, &b).is_err());
        Ok(())
    }

    /// Every small dimension, with sizes that fill no block, against the product in f64.
    #[test]
    fn products_with_a_small_dimension_equal_those_in_double_precision() -> Result<()> {
        let narrow = |t: &Tensor| t.to_dtype(DType::F32);
        for small in [1, 5, 8, 16] {
            for (m, n, k) in [(small, 131, 77), (131, small, 77), (131, 77, small)] {
                let [a, b, c] = [(m, k), (k, n), (m, n)].map(|(rows, columns)| {
                    normal(&[rows, columns], (rows + columns) as u64).expect("a tensor").as_detached_tensor()
                });
                let expected = (a.matmul(&b)? * 0.5)?;
                for gemm in [Gemm::NN, Gemm::NT, Gemm::TN] {
                    let a = narrow(&if gemm.transpose[0] { a.t()?.contiguous()? } else { a.clone() })?;
                    let b = narrow(&if gemm.transpose[1] { b.t()?.contiguous()? } else { b.clone() })?;
                    close(&gemm.times(0.5).product(&a, &b)?, &expected, 2e-5)?;
                    let sum = narrow(&c)?;
                    gemm.times(0.5).add_to(&sum, &a, &b)?;
                    close(&sum, &(&c + &expected)?, 2e-5)?;
                }
            }
        }
        Ok(())
    }
}
