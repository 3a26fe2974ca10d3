//! The models that the weights of a stage come from.

use std::fmt::Debug;

use crate::error::{Error, Result};
use crate::weights::parameters::Weights;

/// The models that a stage's weights come from.
pub trait Ancestry: Debug {
    /// The base model, before any alignment.
    ///
    /// # Errors
    /// It cannot be loaded.
    fn base(&self) -> Result<Weights>;

    /// The model after alignment, with the alignment's adapter still attached if it has one.
    ///
    /// # Errors
    /// The model was not aligned, or cannot be loaded.
    fn aligned(&self) -> Result<Weights>;
}

/// The ancestry of weights that have none.
#[derive(Debug, Clone, Copy, Default)]
pub struct Orphan;

impl Ancestry for Orphan {
    fn base(&self) -> Result<Weights> {
        Err(Error::run("there is no base model to compare these weights with"))
    }

    fn aligned(&self) -> Result<Weights> {
        Err(Error::run("there is no aligned model to compare these weights with"))
    }
}
