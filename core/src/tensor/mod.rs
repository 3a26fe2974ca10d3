//! Tensors and the record of what was computed with them.
//!
//! | file | what it holds |
//! |---|---|
//! | `host` | the elements of candle's host tensors as slices, for the kernels |
//! | `cuda` | launches of the device kernels and of cuBLAS products |
//! | [`gemm`] [`elementwise`] [`dropout`] [`adamw`] | arithmetic that no gradient flows through |
//! | [`scalar`] [`grads`] [`tokens`] [`mask`] | a number of a device, tensors by name, batches of token ids, attention masks |
//! | [`matrix`] `product` | how a base matrix is stored (f32, half precision, quantized), and products with it |
//! | [`tape`] | the record of a forward pass, and the backward pass over it |
//! | [`bridge`] | between the tape and candle's own graph, both ways |
//! | [`ops`] | differentiable operators, one file each |

/// The second expression on the host, the first on a CUDA device of a build that has one.
macro_rules! dispatch {
    ($on:expr, $cuda:expr, $host:expr) => {{
        #[cfg(feature = "cuda")]
        let result = if $on.device().is_cuda() { $cuda } else { $host };
        #[cfg(not(feature = "cuda"))]
        let result = {
            let _ = &$on;
            $host
        };
        result
    }};
}

pub mod adamw;
pub mod bridge;
#[cfg(test)]
pub(crate) mod check;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;
pub mod dropout;
pub mod elementwise;
pub mod gemm;
pub mod grads;
mod host;
pub mod mask;
pub mod matrix;
pub mod ops;
mod product;
pub mod scalar;
pub mod tape;
pub mod tokens;

pub use dropout::{Dropout, DropoutMasks};
pub use gemm::Gemm;
pub use grads::Grads;
pub use mask::AttentionMask;
pub use matrix::Matrix;
pub use scalar::Scalar;
pub use tape::{Tape, Traced};
pub use tokens::Tokens;
