//! Judges, one file each.

pub mod refusal_phrases;
pub mod world;
