//! Architectures, one file each.

pub mod llama;
