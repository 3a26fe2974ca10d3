//! The CPU kernels: slices in, slices out. They know no tensor library, no tape and no error type of Titer; the caller
//! checks shapes and reports mistakes. A slice of the wrong size is a bug of the caller, and panics.
//!
//! | module | what it holds |
//! |---|---|
//! | [`arithmetic`] | what decides the rounding of a result |
//! | [`kernel`] | units that not every processor has, and the check for them |
//! | [`real`] [`reduce`] | number types, `eˣ` and `ln x`; sums and maxima in a fixed order |
//! | [`matrix`] [`low_precision`] [`gemm`] | matrices in memory; in low precision; products of them by the kernel that suits |
//! | [`attention`] [`norm`] [`rope`] [`activation`] [`cross_entropy`] [`dropout`] [`elementwise`] [`adamw`] | one operator each |
//!
//! All products go through [`gemm`], which chooses among five kernels: `skinny` (one small dimension), `portable` (the
//! same bits everywhere), `amx` (the tile unit, for f32 and for matrices stored in bf16), the `gemm` crate, and `int8`
//! (quantized weights and activations that `rounded` has rounded to 8 bits; `int8_vectors` holds its vector code). `simd`
//! chooses the width of vectors and `parallel` splits work over threads. `encoding` says how numbers lie in low precision, and `widen` takes them into
//! registers.
//!
//! All `unsafe` code of the CPU is in this crate.

#![warn(missing_docs)]
#![allow(unsafe_code, reason = "kernels take pointers, vectors and instructions; their callers get safe functions")]

pub mod activation;
pub mod adamw;
#[cfg(target_arch = "x86_64")]
mod amx;
pub mod arithmetic;
pub mod attention;
pub mod cross_entropy;
pub mod dropout;
pub mod elementwise;
mod encoding;
pub mod gemm;
mod int8;
#[cfg(target_arch = "x86_64")]
mod int8_vectors;
pub mod kernel;
pub mod low_precision;
pub mod matrix;
pub mod norm;
mod parallel;
mod portable;
pub mod real;
pub mod reduce;
pub mod rope;
mod rounded;
mod simd;
mod skinny;
#[cfg(target_arch = "x86_64")]
mod widen;
