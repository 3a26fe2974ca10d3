//! Judges, one file each.

pub mod world;
