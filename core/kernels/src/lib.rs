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
//! All products go through [`gemm`], which chooses among four kernels: `skinny` (one small dimension), `portable` (the
//! same bits everywhere), `amx` (the tile unit) and the `gemm` crate. `simd` chooses the width of vectors and `parallel`
//! splits work over threads. `encoding` says how numbers lie in low precision, and `widen` takes them into registers.
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
pub mod kernel;
pub mod low_precision;
pub mod matrix;
pub mod norm;
mod parallel;
mod portable;
pub mod real;
pub mod reduce;
pub mod rope;
mod simd;
mod skinny;
#[cfg(target_arch = "x86_64")]
mod widen;
