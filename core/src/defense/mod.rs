//! Defenses: the trait, its description in the registry, and the context that a defense works in.
//!
//! | file | what it holds |
//! |---|---|
//! | [`alignment_defense`] | the trait |
//! | [`entry`] | its description in the registry |
//! | [`stage`] [`streams`] [`ancestry`] | the stages and the clock, extra data, earlier models |
//! | [`update`] | what a pass gives, and what a step asks for |
//! | [`stage_context`] [`step_context`] | what a defense sees around and in its steps |
//! | [`toolkit`] | what defenses share |
//! | `custom_loss` [`scratch`] | losses of a defense's own; weights moved for a while |

pub mod alignment_defense;
pub mod ancestry;
mod custom_loss;
pub mod entry;
mod open_pass;
pub mod scratch;
pub mod stage;
pub mod stage_context;
pub mod step_context;
pub mod streams;
pub mod toolkit;
pub mod update;

pub use alignment_defense::{AlignmentDefense, State};
pub use ancestry::{Ancestry, Orphan};
pub use entry::{Conflict, DefenseEntry, Limits, Privilege, Quirk, Stack, no_conflict, no_limits};
pub use scratch::Scratch;
pub use stage::{Clock, Stage};
pub use stage_context::StageCx;
pub use step_context::StepCx;
pub use streams::Streams;
pub use update::{Pass, Update};
