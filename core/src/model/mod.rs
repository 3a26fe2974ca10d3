//! Architectures, and what can be done with any of them.
//!
//! | file | what it holds |
//! |---|---|
//! | [`architecture`] | the [`Model`] trait |
//! | [`entry`] | its description in the registry |
//! | [`loss`] | the loss of a batch |
//! | `replay` | the backward pass under gradient checkpointing |
//! | [`generate`] | batched greedy decoding, and sampling |

pub mod architecture;
pub mod entry;
pub mod generate;
pub mod loss;
pub(crate) mod replay;

pub use architecture::{Model, sites_of_kind};
pub use entry::{BuildModel, ModelEntry};
pub use loss::label_loss;
