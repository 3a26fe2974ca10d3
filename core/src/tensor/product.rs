//! Products with a stored matrix, whatever it is stored as.

use candle_core::{CpuStorage, Tensor};
use titer_kernels::gemm::product_into;
use titer_kernels::matrix::{View, ViewMut};

use super::gemm::Gemm;
use super::host::{Element, read, tensor, write};
use super::matrix::Matrix;
use crate::error::{Error, Result};

/// Dequantized numbers that exist at a time on the host: few enough to stay in the caches, enough that reading the other
/// operand once for each chunk costs little.
const CHUNK: usize = 1 << 21;

impl Matrix {
    /// `x Wᵀ` for `x: [n, columns]`.
    pub(super) fn product_transposed(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Dense(w) => Gemm::NT.product(x, w),
            Self::LowPrecision(_) if !x.device().is_cpu() => Gemm::NT.product(x, &self.dense()?),
            Self::LowPrecision(low) => {
                let (n, rows) = (x.dims2()?.0, self.dims()[0]);
                self.check_inner(x, 1)?;
                let mut y = vec![0f32; n * rows];
                read(
                    x,
                    |x: &[f32]| {
                        if low.product_as_stored(&mut y, x)? { Ok(()) } else { multiply_transposed(self, &mut y, x) }
                    },
                )?;
                tensor(y, &[n, rows])
            }
        }
    }

    /// `g W` for `g: [n, rows]`.
    pub(super) fn product(&self, g: &Tensor) -> Result<Tensor> {
        match self {
            Self::Dense(w) => Gemm::NN.product(g, w),
            Self::LowPrecision(_) if !g.device().is_cpu() => Gemm::NN.product(g, &self.dense()?),
            Self::LowPrecision(_) => {
                let sum = Tensor::zeros((g.dims2()?.0, self.dims()[1]), g.dtype(), g.device())?;
                self.add_product(&sum, g)?;
                Ok(sum)
            }
        }
    }

    /// Adds `g W` to `sum: [n, columns]`, in place.
    pub(super) fn add_product(&self, sum: &Tensor, g: &Tensor) -> Result<()> {
        match self {
            Self::Dense(w) => Gemm::NN.add_to(sum, g, w),
            Self::LowPrecision(_) if !g.device().is_cpu() => Gemm::NN.add_to(sum, g, &self.dense()?),
            Self::LowPrecision(_) => {
                let (n, columns) = (g.dims2()?.0, self.dims()[1]);
                self.check_inner(g, 0)?;
                if sum.elem_count() != n * columns {
                    return Err(Error::run(format!("a product [{n}, {columns}] cannot be added to {:?}", sum.dims())));
                }
                read(g, |g: &[f32]| {
                    let mut done = Ok(());
                    write(sum, |sum: &mut [f32]| done = multiply(self, sum, true, g))?;
                    done
                })
            }
        }
    }

    /// Whether the last dimension of `x` is the matrix's dimension `index`.
    fn check_inner(&self, x: &Tensor, index: usize) -> Result<()> {
        if x.dims().last() == self.dims().get(index) {
            return Ok(());
        }
        Err(Error::run(format!("matrices {:?} and {:?} cannot be multiplied", x.dims(), self.dims())))
    }
}

/// `y = x Wᵀ` for `x: [n, columns]`, row-major on the host.
pub(super) fn multiply_transposed<T: Element>(w: &Matrix, y: &mut [T], x: &[T]) -> Result<()> {
    let (rows, columns) = (w.dims()[0], w.dims()[1]);
    let n = x.len() / columns;
    if let (Matrix::LowPrecision(low), Some(y), Some(x)) = (w, T::singles_mut(y), T::singles(x))
        && low.product_of_bf16(y, false, x, true)?
    {
        return Ok(());
    }
    chunks(w, |first, w: &[T]| {
        let count = w.len() / columns;
        let y = ViewMut::new(&mut y[first..], [n, count], rows);
        product_into(y, false, T::one(), View::of(x, n, columns), View::of(w, count, columns).t());
        Ok(())
    })
}

/// `sum = g W` for `g: [n, rows]`, or `sum += g W` if it `accumulate`s, row-major on the host.
pub(super) fn multiply<T: Element>(w: &Matrix, sum: &mut [T], accumulate: bool, g: &[T]) -> Result<()> {
    let (rows, columns) = (w.dims()[0], w.dims()[1]);
    let n = g.len() / rows;
    if let (Matrix::LowPrecision(low), Some(sum), Some(g)) = (w, T::singles_mut(sum), T::singles(g))
        && low.product_of_bf16(sum, accumulate, g, false)?
    {
        return Ok(());
    }
    chunks(w, |first, w: &[T]| {
        let count = w.len() / columns;
        let sum = ViewMut::new(sum, [n, columns], columns);
        product_into(
            sum,
            accumulate || first > 0,
            T::one(),
            View::new(&g[first..], [n, count], rows),
            View::of(w, count, columns),
        );
        Ok(())
    })
}

/// Calls `f` with the rows of a host matrix as they are computed with, chunk after chunk: the index of the first row,
/// and the numbers. A dense matrix is one chunk.
fn chunks<T: Element>(matrix: &Matrix, mut f: impl FnMut(usize, &[T]) -> Result<()>) -> Result<()> {
    let low = match matrix {
        Matrix::Dense(tensor) => return read(tensor, |all: &[T]| f(0, all)),
        Matrix::LowPrecision(low) => low,
    };
    let (rows, columns) = (matrix.dims()[0], matrix.dims()[1]);
    let step = (CHUNK / columns.max(1)).clamp(1, rows.max(1));
    let mut scratch = CpuStorage::F32(vec![0.; step * columns]);
    for first in (0..rows).step_by(step) {
        let count = step.min(rows - first) * columns;
        if let CpuStorage::F32(scratch) = &mut scratch {
            low.decode(first, &mut scratch[..count])?;
        }
        // Low precision is computed with in f32; any other type is an error here.
        f(first, &scratch.as_slice::<T>()?[..count])?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use candle_core::quantized::GgmlDType;
    use candle_core::{DType, Device};

    use super::*;
    use crate::rng::{Seed, randn};
    use crate::tensor::check::close;

    fn random(shape: [usize; 2], seed: u64, scale: f64) -> Result<Tensor> {
        Ok((randn(&shape, &mut Seed::new(seed).generator(), &Device::Cpu)? * scale)?)
    }

    /// `[5000, 512]` in every way of storing it: more than one chunk.
    fn stored() -> Result<Vec<Matrix>> {
        let w = random([5000, 512], 1, 0.02)?;
        let mut all = vec![Matrix::Dense(w.clone())];
        for dtype in [DType::BF16, DType::F16] {
            all.push(Matrix::half(&w, dtype, DType::F32)?);
        }
        for kind in [GgmlDType::Q8_0, GgmlDType::Q6K, GgmlDType::Q4K, GgmlDType::Q4_0, GgmlDType::Q4_1] {
            all.push(Matrix::quantized(&w, kind, DType::F32, &Device::Cpu)?);
        }
        let (b, a) = (random([5000, 3], 2, 0.02)?, random([3, 512], 3, 0.02)?);
        let merged = all.iter().map(|w| w.plus(0.5, &b, &a)).collect::<Result<Vec<_>>>()?;
        // Twice over, as double LoRA does.
        let twice = merged[7].plus(-1.5, &b, &a)?;
        close(&twice.dense()?, &(all[7].dense()? - b.matmul(&a)?)?, 1e-7)?;
        Ok(all.into_iter().chain(merged).chain([twice]).collect())
    }

    #[test]
    fn products_equal_those_of_the_dequantized_matrix() -> Result<()> {
        let (x, g, sum) = (random([3, 512], 4, 1.)?, random([3, 5000], 5, 1.)?, random([3, 512], 6, 1.)?);
        let many = random([40, 512], 7, 1.)?;
        let ids = Tensor::new(&[4999u32, 0, 7, 7], &Device::Cpu)?;
        for w in stored()? {
            let dense = w.dense()?;
            for x in [&x, &many] {
                close(&w.product_transposed(x)?, &Gemm::NT.product(x, &dense)?, 2e-6)?;
            }
            close(&w.product(&g)?, &Gemm::NN.product(&g, &dense)?, 5e-6)?;
            let target = sum.copy()?;
            w.add_product(&target, &g)?;
            close(&target, &(&sum + Gemm::NN.product(&g, &dense)?)?, 5e-6)?;
            close(&w.gather(&ids)?, &dense.index_select(&ids, 0)?, 1e-8)?;
        }
        Ok(())
    }

    /// The kernels decode as candle does, and a product of a few rows has the bits of the decoded numbers.
    #[test]
    fn decoded_numbers_have_the_bits_of_candle_s() -> Result<()> {
        let x = random([3, 512], 4, 1.)?;
        let [four, six, sixteen] = [random([4, 512], 8, 1.)?, random([6, 512], 9, 1.)?, random([16, 512], 10, 1.)?];
        let bits = |t: &Tensor| -> Result<Vec<u32>> {
            Ok(t.flatten_all()?.to_vec1::<f32>()?.into_iter().map(f32::to_bits).collect())
        };
        for w in stored()?.into_iter().take(8) {
            let dense = w.dense()?;
            let mut decoded = Vec::new();
            chunks(&w, |first, rows: &[f32]| {
                assert_eq!(first * 512, decoded.len());
                decoded.extend_from_slice(rows);
                Ok(())
            })?;
            assert_eq!(bits(&Tensor::from_vec(decoded, (5000, 512), &Device::Cpu)?)?, bits(&dense)?, "{w:?}");
            for rows in [&x, &x.narrow(0, 0, 1)?, &x.narrow(0, 1, 2)?.contiguous()?, &four, &six, &sixteen] {
                assert_eq!(bits(&w.product_transposed(rows)?)?, bits(&Gemm::NT.product(rows, &dense)?)?);
            }
        }
        // The last block of rows is not whole.
        let odd = Matrix::quantized(&random([66, 512], 11, 0.02)?, GgmlDType::Q8_0, DType::F32, &Device::Cpu)?;
        assert_eq!(bits(&odd.product_transposed(&x)?)?, bits(&Gemm::NT.product(&x, &odd.dense()?)?)?);
        Ok(())
    }

    #[test]
    fn quantized_numbers_are_near_the_numbers_they_stand_for() -> Result<()> {
        // The relative error, as a norm, that the widths of the steps promise.
        let limits = [0., 2e-3, 3e-4, 6e-3, 2.5e-2, 9e-2, 1e-1, 1e-1];
        let stored = stored()?;
        let w = stored[0].dense()?;
        let norm = |t: &Tensor| -> Result<f64> { crate::tensor::elementwise::norm([t])?.value() };
        for (matrix, limit) in stored.iter().zip(limits) {
            let error = norm(&(matrix.dense()? - &w)?)? / norm(&w)?;
            assert!(error <= limit && error >= limit / 4., "{matrix:?}: {error}");
        }
        Ok(())
    }

    #[test]
    fn sizes_that_do_not_fit_are_an_error() -> Result<()> {
        let x = random([3, 4], 1, 1.)?;
        for w in stored()? {
            assert!(w.product_transposed(&x).is_err());
            assert!(w.product(&x).is_err());
            assert!(w.gather(&Tensor::new(&[5000u32], &Device::Cpu)?).is_err());
        }
        Ok(())
    }
}
