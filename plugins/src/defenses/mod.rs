//! Defenses, one file each.

pub mod none;
pub mod random_perturbation;
pub mod sft;
pub mod vaccine;
