//! What a plugin of Titer imports: the three traits, the registry and the training primitives.
//!
//! # Code map, in reading order
//!
//! | module | what it holds |
//! |---|---|
//! | [`defense`] [`model`] [`task`] [`judge`] | one trait each, and the entry that registers it |
//! | [`registry`] [`settings`] [`plugin`](mod@plugin) | looking plugins up by name; typed settings; plugin crates from elsewhere |
//! | [`step`] [`sites`] [`grads`] [`scalar`] | the verbs of a defense, activation points, gradient arithmetic |
//! | [`weights`] [`matrix`] [`checkpoint`] | parameters, LoRA, snapshots; how a base is stored; tensor files |
//! | [`layers`] [`ops`] [`tape`] | what models are built of; differentiable operators; the backward pass |
//! | [`text`] [`data`] [`rng`] | templates and tokenizers; streams and mixtures; named generators |
//! | [`optim`] [`generate`] [`cache`] | AdamW and schedules; batched greedy decoding |
//! | [`arithmetic`] | what decides the rounding of a result |
//! | [`bounds`] | upper limits of what a user may ask for; reading files within them |
//! | [`device`] [`event`] [`report`] [`error`] | device parsing; progress; `results.json`; errors |
//! | `testing` | with the feature of that name: what every defense and every model is checked for |
//!
//! # Laws
//!
//! 1. A step leaves the weights as it found them; only the train loop applies an [`Update`].
//! 2. The same plan and seed give the same report on CPU, bit for bit; an interrupted and resumed run equals an
//!    uninterrupted one.
//! 3. A neutral defense equals plain fine-tuning bit for bit; an active one differs from it.
//! 4. A declared objective's gradient equals finite differences; Vaccine's perturbation has global norm `rho`.
//! 5. Every trainable parameter receives a gradient, or the model says which do not and why.
//! 6. An artifact exists only after its commit record. Its key is written out field by field: configuration, data by
//!    content, parent, plugin versions, arithmetic; the artifact names it. So a wrong hit is impossible and an unchanged
//!    stage never runs twice.
//! 7. Every number carries protocol, setting and coordinates, each as a readable manifest with a hash. A table refuses to
//!    mix protocols, keeps settings apart and drops no row.
//! 8. Nothing outside [`device`] and the kernels knows CUDA; nothing outside the plugin loader, the allocator that counts
//!    and the kernels is `unsafe`.
//! 9. Bad input ends in an error that names the file, the key and the nearest valid value; never a panic, never lost
//!    work.
//! 10. What differs stays different: every key of the configuration changes the key of a stage or the identity of a row,
//!     or is listed as irrelevant with its reason.

#![warn(missing_docs)]

pub mod arithmetic;
pub mod bounds;
pub mod cache;
pub mod checkpoint;
pub mod data;
pub mod defense;
pub mod device;
pub mod error;
pub mod event;
pub mod generate;
pub mod grads;
mod guard;
pub mod judge;
pub mod layers;
pub mod matrix;
pub mod model;
pub mod ops;
pub mod optim;
pub mod plugin;
pub mod registry;
pub mod report;
pub mod rng;
pub mod scalar;
pub mod settings;
pub mod sites;
pub mod step;
pub mod tape;
pub mod task;
#[cfg(feature = "testing")]
pub mod testing;
pub mod text;
pub mod weights;

pub use defense::{
    AlignmentDefense, Conflict, DefenseEntry, Limits, Privilege, Quirk, Stack, Stage, State, no_conflict, no_limits,
};
pub use error::{Error, Kind, Result};
pub use grads::Grads;
pub use judge::{Answers, Asked, Judge, JudgeEntry, Verdict};
pub use matrix::{Matrix, Precision};
pub use model::{Forward, Model, ModelEntry, ModelSpec};
pub use registry::Entry;
pub use scalar::Scalar;
pub use settings::{Settings, SettingsType};
pub use sites::Sites;
pub use step::{Pass, StageCx, StepCx, Update};
pub use tape::{Tape, Traced};
pub use task::{Task, TaskEntry};
pub use text::Row;
pub use weights::Weights;

/// Re-exported so that a plugin registers with the very `inventory` that the registry reads.
pub use inventory;
