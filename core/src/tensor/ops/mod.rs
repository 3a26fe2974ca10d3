//! Differentiable operators that models are built of.
//!
//! Candle's own fused operators (`ops::rms_norm`, `softmax_last_dim`, `rotary_emb::rope`) drop the gradient silently,
//! and its matrix product differentiates frozen weights. Each operator here has an analytic backward pass, computes on
//! the host (f32 and f64, vectorised, on all threads) and on CUDA devices (f32 and bf16), and records itself on a
//! [`Tape`](crate::tensor::tape::Tape). Tests hold every one against finite differences and against the same computation
//! composed of candle's tensor operations.
//!
//! [`exp`], [`ln`], [`log_softmax`], [`matmul`] and the sums are for candle expressions, such as a defense's own loss.

mod activation;
mod attention;
mod cross_entropy;
mod expression;
mod linear;
mod norm;
mod residual;
mod rope;
mod rows;

pub use activation::{activate, gated, scale, soft_cap, swiglu};
pub use attention::attention;
pub use cross_entropy::{cross_entropy, head_cross_entropy};
pub use expression::{exp, ln, log_softmax, matmul, mean_all, sum_all, sum_last};
#[cfg(feature = "cuda")]
pub(in crate::tensor) use linear::AdapterPass;
pub use linear::{LinearLayer, LowRank, linear, linears};
pub use norm::{add_layer_norm, add_rms_norm, layer_norm, rms_norm};
pub use residual::add;
pub use rope::{Rope, Rotation, check_positions, rotate};
pub use rows::{embed, select_rows, split_columns};
pub use titer_kernels::activation::Activation;
pub use titer_kernels::attention::Attention;

pub use crate::tensor::gemm::Gemm;
