//! Launches of the device kernels and of cuBLAS products. Everything is queued on candle's stream of the device, and
//! nothing here waits for it.
//!
//! | file | what it holds |
//! |---|---|
//! | `open` `memory` | finding and opening a device, and a test that kernels run; its pool of memory |
//! | `launch` | arguments of kernels, fresh tensors, the launch itself |
//! | `operators` | operators that are one or two kernels |
//! | `adapter` | dropout, and the products of adapters that read it |
//! | `optimizer` | norms, clipping and AdamW, over many tensors at once |
//! | `products` | matrix products of cuBLAS |
//! | `attention` | attention without the matrix of scores |

#![allow(clippy::cast_possible_wrap, reason = "sizes and addresses are far below half of their types' ranges")]
#![allow(unsafe_code, reason = "kernel launches and library calls take raw device addresses")]

mod adapter;
mod attention;
mod launch;
mod memory;
mod open;
mod operators;
mod optimizer;
mod products;

pub(super) use adapter::{
    adapters_dx, adapters_gradients, adapters_inner, adapters_narrow, adapters_up, dropout, fuses_adapters,
};
pub(super) use attention::{attention, attention_backward};
pub(super) use launch::fresh;
pub(crate) use memory::{memory_peak, restart_memory_peak};
pub(crate) use open::{find, is_present, list, open};
pub(super) use operators::{
    activation, activation_backward, add_assign, add_bias, argmax, cache_write, cross_entropy, decode, gated,
    gated_backward, layer_norm, layer_norm_backward, mean, rms_norm, rms_norm_backward, rotate, scale, scatter_rows,
    sum_rows,
};
pub(crate) use optimizer::to_bf16_many;
pub(super) use optimizer::{adamw, at_most, clip_factor, norm};
pub(super) use products::{gemm, gemm_add};
