//! The device path: everything that runs on a GPU, held to the host. `.ci/device` builds for CUDA and runs these tests on a
//! stand-in for the driver (`tests/standin`), so no GPU is needed. With a GPU, all but three modules run on it too:
//!
//! ```text
//! cargo test --workspace --release --features cuda --test device -- --ignored --skip machines --skip planted --skip budgets
//! ```

#![allow(clippy::print_stdout, reason = "a test shows what it measured")]

mod attention;
mod budgets;
mod conformance;
mod machines;
mod models;
mod operators;
mod planted;
mod runs;
mod standin;
mod threads;
