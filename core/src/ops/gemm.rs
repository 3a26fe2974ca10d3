//! Matrix products into fresh memory or onto what is there already.

use candle_core::{DType, Tensor};

use super::host::{Real, by_dtype, read, tensor, write};
use super::portable;
use crate::Result;
use crate::arithmetic::{Arithmetic, chosen};

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
            return super::cuda::gemm(self, a, b, dtype);
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
            return super::cuda::gemm_add(self, c, a, b);
        }
        by_dtype!(c.dtype(), add(self, c, a, b))
    }

    /// `(m, n, k)` of the product of these operands.
    pub(super) fn sizes(self, a: &Tensor, b: &Tensor) -> Result<(usize, usize, usize)> {
        let turn =
            |(rows, columns): (usize, usize), transpose| if transpose { (columns, rows) } else { (rows, columns) };
        let (m, k) = turn(a.dims2()?, self.transpose[0]);
        let (inner, n) = turn(b.dims2()?, self.transpose[1]);
        if inner != k {
            let message = format!("matrices {:?} and {:?} cannot be multiplied", a.dims(), b.dims());
            return Err(crate::Error::run(message));
        }
        Ok((m, n, k))
    }
}

fn fresh<T: Real>(gemm: Gemm, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let (m, n, k) = gemm.sizes(a, b)?;
    let mut c = Vec::<T>::with_capacity(m * n);
    read(a, |a: &[T]| {
        read(b, |b: &[T]| {
            let target = Matrix::row_major(c.as_mut_ptr(), [m, n], n);
            let (a, b) = (Matrix::of(a, m, k, gemm.transpose[0]), Matrix::of(b, k, n, gemm.transpose[1]));
            // SAFETY: the sizes were checked against the slices, and the product writes every element.
            #[expect(unsafe_code, reason = "the memory is filled by the product before it counts as initialised")]
            unsafe {
                multiply(target, false, T::of(gemm.alpha), a, b, threads());
                c.set_len(m * n);
            }
            Ok(())
        })
    })?;
    tensor(c, &[m, n])
}

fn add<T: Real>(gemm: Gemm, c: &Tensor, a: &Tensor, b: &Tensor) -> Result<()> {
    let (m, n, k) = gemm.sizes(a, b)?;
    if c.elem_count() != m * n {
        return Err(crate::Error::run(format!("a product [{m}, {n}] cannot be added to {:?}", c.dims())));
    }
    read(a, |a: &[T]| {
        read(b, |b: &[T]| {
            write(c, |c: &mut [T]| {
                let target = Matrix::row_major(c.as_mut_ptr(), [m, n], n);
                let (a, b) = (Matrix::of(a, m, k, gemm.transpose[0]), Matrix::of(b, k, n, gemm.transpose[1]));
                // SAFETY: the sizes were checked against the slices.
                #[expect(unsafe_code, reason = "the product takes pointers")]
                unsafe {
                    multiply(target, true, T::of(gemm.alpha), a, b, threads());
                }
            })
        })
    })
}

/// How many threads a product uses.
pub(super) fn threads() -> usize {
    rayon::current_num_threads()
}

/// A matrix in memory. `P` is a pointer.
#[derive(Debug, Clone, Copy)]
pub(super) struct Matrix<P> {
    pub rows: usize,
    pub columns: usize,
    pub row_stride: usize,
    pub column_stride: usize,
    pub data: P,
}

impl<T> Matrix<*const T> {
    /// `rows × columns` of a row-major slice, or of the transpose of one.
    fn of(data: &[T], rows: usize, columns: usize, transposed: bool) -> Self {
        assert_eq!(data.len(), rows * columns, "a matrix of another size");
        let (row_stride, column_stride) = if transposed { (1, rows) } else { (columns, 1) };
        Self { rows, columns, row_stride, column_stride, data: data.as_ptr() }
    }
}

impl<P> Matrix<P> {
    /// `rows × columns` whose rows are contiguous and `stride` elements apart.
    pub(super) fn row_major(data: P, [rows, columns]: [usize; 2], stride: usize) -> Self {
        Self { rows, columns, row_stride: stride, column_stride: 1, data }
    }

    /// The transpose, of the same memory.
    pub(super) fn t(self) -> Self {
        Self {
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
            data: self.data,
        }
    }
}

/// `C (+)= alpha A B`.
///
/// # Safety
/// The matrices lie in valid memory, and nothing else accesses `C` meanwhile.
#[allow(unsafe_code, reason = "the product takes pointers")]
pub(super) unsafe fn multiply<T: Real>(
    c: Matrix<*mut T>,
    accumulate: bool,
    alpha: T,
    a: Matrix<*const T>,
    b: Matrix<*const T>,
    threads: usize,
) {
    debug_assert_eq!((c.rows, c.columns, a.columns), (a.rows, b.columns, b.rows));
    // SAFETY: as this function's.
    if unsafe { T::multiply_specially(c, accumulate, alpha, a, b, threads) } {
        return;
    }
    if chosen() == Arithmetic::Portable {
        // SAFETY: as this function's.
        return unsafe { portable::multiply(c, accumulate, alpha, a, b, threads) };
    }
    let parallelism = if threads > 1 { gemm::Parallelism::Rayon(threads) } else { gemm::Parallelism::None };
    let stride = |stride: usize| stride.cast_signed();
    // SAFETY: as this function's.
    unsafe {
        gemm::gemm(
            c.rows,
            c.columns,
            a.columns,
            c.data,
            stride(c.column_stride),
            stride(c.row_stride),
            accumulate,
            a.data,
            stride(a.column_stride),
            stride(a.row_stride),
            b.data,
            stride(b.column_stride),
            stride(b.row_stride),
            T::one(),
            alpha,
            false,
            false,
            false,
            parallelism,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::check::{close, normal};

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
}
