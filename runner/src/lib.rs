//! Runs experiments.

pub mod base_model;
pub mod memory;
pub mod plan;
pub mod stages;
pub mod train_loop;
