//! The core and everything below it in one shared library: a runner and the plugins that it loads must count tensors,
//! register entries and unwind panics in one place.

pub use titer_core::*;
