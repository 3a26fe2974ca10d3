//! Matrix products of cuBLAS, summed in f32.

use candle_core::cuda_backend::cudarc::cublas::{result as blas, sys};
use candle_core::{DType, Tensor};

use super::launch::{address, device, fresh};
use crate::error::{Error, Result};
use crate::tensor::host::last_dim;

/// A row-major matrix, `ld` elements from one row to the next.
#[derive(Clone, Copy)]
struct Operand {
    address: u64,
    dtype: DType,
    ld: usize,
    transposed: bool,
}

impl Operand {
    fn operation(self) -> sys::cublasOperation_t {
        if self.transposed { sys::cublasOperation_t::CUBLAS_OP_T } else { sys::cublasOperation_t::CUBLAS_OP_N }
    }

    fn kind(self) -> Result<sys::cudaDataType> {
        match self.dtype {
            DType::F32 => Ok(sys::cudaDataType::CUDA_R_32F),
            DType::BF16 => Ok(sys::cudaDataType::CUDA_R_16BF),
            other => Err(Error::device(format!("no device product for {other:?}")).help("use f32 or bf16")),
        }
    }
}

const COMPUTE: sys::cublasComputeType_t = sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
const ALGORITHM: sys::cublasGemmAlgo_t = sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT;

/// By way of candle's error, from which is known what can be done.
fn failed(error: blas::CublasError) -> Error {
    candle_core::Error::Msg(format!("a matrix product failed: {error:?}")).into()
}

/// `alpha · op(A) op(B)` of the sizes `[m, n, k]`.
pub(in crate::tensor) fn gemm(
    alpha: f64,
    transpose: [bool; 2],
    sizes: [usize; 3],
    operands: [&Tensor; 2],
    dtype: DType,
) -> Result<Tensor> {
    let c = fresh(operands[0], (sizes[0], sizes[1]), dtype)?;
    run((alpha, 0.), transpose, sizes, &c, operands)?;
    Ok(c)
}

/// Adds `alpha · op(A) op(B)` to `c`.
pub(in crate::tensor) fn gemm_add(
    alpha: f64,
    transpose: [bool; 2],
    sizes: [usize; 3],
    c: &Tensor,
    operands: [&Tensor; 2],
) -> Result<()> {
    run((alpha, 1.), transpose, sizes, c, operands)
}

/// `C = alpha · op(A) op(B) + beta C`, where `A` and `B` have one type, and `C` is a whole tensor of `m · n` elements.
fn run(
    (alpha, beta): (f64, f64),
    transpose: [bool; 2],
    [m, n, k]: [usize; 3],
    c: &Tensor,
    [a, b]: [&Tensor; 2],
) -> Result<()> {
    let matrix = |tensor: &Tensor, dtype: DType, transposed: bool| -> Result<Operand> {
        Ok(Operand { address: address(tensor, dtype)?, dtype, ld: last_dim(tensor), transposed })
    };
    let (handle, alpha, beta) = (device(c)?.cublas_handle(), alpha as f32, beta as f32);
    let (a, b) = (matrix(a, a.dtype(), transpose[0])?, matrix(b, a.dtype(), transpose[1])?);
    let c = Operand { ld: n, ..matrix(c, c.dtype(), false)? };
    // cuBLAS counts columns first, which makes every row-major matrix its transpose: Cᵀ = Bᵀ Aᵀ.
    // SAFETY: the operands are tensors of these sizes, and the call is queued on the stream that they live on.
    unsafe {
        blas::gemm_ex(
            *handle.handle(),
            b.operation(),
            a.operation(),
            n as i32,
            m as i32,
            k as i32,
            (&raw const alpha).cast(),
            b.address as *const _,
            b.kind()?,
            b.ld as i32,
            a.address as *const _,
            a.kind()?,
            a.ld as i32,
            (&raw const beta).cast(),
            c.address as *mut _,
            c.kind()?,
            c.ld as i32,
            COMPUTE,
            ALGORITHM,
        )
    }
    .map_err(failed)
}
