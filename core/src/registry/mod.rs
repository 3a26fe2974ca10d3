//! Looking plugins up by name.
//!
//! Plugins describe themselves with an `inventory` entry. Reading them back sorts by name, refuses duplicates and
//! answers an unknown name with the nearest ones. Entries arrive only if the crate that submits them is linked: a
//! runner needs `use titer_plugins as _;`, or the registry is silently empty.
//!
//! | file | what it holds |
//! |---|---|
//! | [`entry`] | what all entries have in common, and looking them up |
//! | [`settings`] | typed settings of plugins |
//! | [`plugin`] | plugin crates from elsewhere: who they are and what they were built with |

pub mod entry;
mod nearest;
pub mod plugin;
pub mod settings;

pub use entry::{Entry, all, find};
pub use nearest::{did_you_mean, nearest};
pub use settings::{Settings, SettingsType};
