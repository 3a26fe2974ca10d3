//! What several test files share.

pub mod cli;
pub mod in_process;
pub mod judges;
pub mod own_defense;
pub mod simulation;

// Linked, the plugins are known to the registry.
pub use titer_core::testing::{difference, values};
pub use titer_plugins::testing::{adapt, all_tiny, batch, build, context, defense, step, tiny, variants};
