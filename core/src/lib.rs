//! What a plugin of Titer imports: the four traits (defense, model, task, judge), the registry and the training primitives.
//!
//! # Code map, from the lowest floor to the highest
//!
//! A file imports from its own floor and from lower ones, never from a higher one; files of different folders never import
//! each other in a circle. `tests/tests/structure.rs` holds this.
//!
//! | floor | what it holds |
//! |---|---|
//! | `titer-kernels` (`core/kernels`) | the CPU kernels, a crate of its own: slices in, slices out, all `unsafe` of the CPU |
//! | [`error`] [`bounds`] [`rng`] [`arithmetic`] [`event`] | errors; limits of what a user may ask for; named generators; what decides rounding; progress |
//! | [`registry`] | looking plugins up by name; typed settings; plugin crates from elsewhere |
//! | [`tensor`] | the tape and its operators, gradients, how a matrix is stored, the bridge to candle, the device kernels |
//! | [`weights`] | declared parameters, LoRA, precision, checkpoints |
//! | [`device`] [`optim`] | device and dtype parsing; AdamW and schedules |
//! | [`nn`] | layers, activation points, the key/value cache, what travels along with a forward pass |
//! | [`data`] | rows, examples, batches, streams, mixtures |
//! | [`text`] | templates and tokenizers: rows to examples |
//! | [`model`] | the trait of an architecture; loss, replay and generation for any of them |
//! | [`causal_lm`] | opens a model folder: architecture, weights and tokenizer |
//! | [`task`] [`judge`] | one trait and its entry each |
//! | [`defense`] | the trait, its entry, and the context that a defense works in |
//! | [`report`] | `results.json` |
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
pub mod causal_lm;
pub mod data;
pub mod defense;
pub mod device;
pub mod error;
pub mod event;
pub mod gguf;
pub mod guard;
pub mod judge;
pub mod model;
pub mod nn;
pub mod optim;
pub mod registry;
pub mod report;
pub mod rng;
pub mod task;
pub mod tensor;
#[cfg(feature = "testing")]
pub mod testing;
pub mod text;
pub mod weights;

pub use causal_lm::CausalLm;
pub use data::Row;
pub use defense::{
    AlignmentDefense, Conflict, DefenseEntry, Limits, Pass, Privilege, Quirk, Stack, Stage, StageCx, State, StepCx,
    Update, no_conflict, no_limits,
};
pub use error::{Error, Kind, Result};
pub use judge::{Answers, Asked, Judge, JudgeCx, JudgeEntry, Label, Verdict};
pub use model::{Model, ModelEntry};
pub use nn::{Forward, ModelSpec, Sites};
pub use registry::{Entry, Settings, SettingsType};
pub use task::{Task, TaskEntry};
pub use tensor::{Grads, Matrix, Scalar, Tape, Traced};
pub use weights::{Precision, Weights};

/// Re-exported so that a plugin registers with the very `inventory` that the registry reads.
pub use inventory;
