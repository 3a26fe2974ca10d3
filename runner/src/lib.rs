//! The runner of Titer: from a configuration to a report.
//!
//! # Code map, in the order of the flow
//!
//! | module | what it holds |
//! |---|---|
//! | [`experiment`] | what the user writes, its layers, and the same with every name looked up: all mistakes at once |
//! | [`plan`] | which stages for which cells, a pure function; what enters the key of a stage and the identity of a row |
//! | [`store`] | finished stages by key: atomic, locked, verified |
//! | [`execute`] | runs what is missing, several stages at once |
//! | [`stage`] | what each stage does; the only place that updates weights |
//! | [`results`] | `results.json`: its rows, where they come from |
//! | [`stats`] | intervals and tests |
//! | [`report`] | renderings of results, runs side by side, published values against ours |
//! | [`mod@reference`] | what users look up: terms, keys, settings of plugins, commands |
//! | [`cli`] | the command line: one module a command, progress, exit codes |
//! | [`plugins`] | plugin crates from elsewhere; how a shared library is examined and loaded |
//! | [`disk`] [`inputs`] [`names`] [`manifest`] [`interrupt`] [`diagnostics`] | what several of these need |
//! | [`model_folder`] [`hub`] | writes model folders; finds models by their name on the Hugging Face hub |
//! | [`memory`] [`environment`] [`driver`] [`mod@bench`] | what the process uses; how fast it is |
//!
//! The modules depend on each other in one direction only: `tests/tests/structure.rs` holds the order.

#![warn(missing_docs)]

pub mod bench;
pub mod cli;
pub mod diagnostics;
pub mod disk;
pub mod driver;
pub mod environment;
pub mod execute;
pub mod experiment;
#[cfg(test)]
mod faults;
pub mod hub;
pub mod inputs;
pub mod interrupt;
pub mod logging;
pub mod manifest;
pub mod memory;
pub mod model_folder;
pub mod names;
pub mod plan;
pub mod plugins;
pub mod reference;
pub mod report;
pub mod results;
pub mod stage;
pub mod stats;
pub mod store;
#[cfg(test)]
mod testing;

/// Tensors of a few megabytes come and go with every operator. The system's allocator gives each back to the kernel and
/// faults its pages in again, which costs a training step a fifth of its time.
///
/// With the feature `dynamic` the standard library is shared, and Rust then has only one allocator, the system's: a
/// second one in the program would free what it did not allocate. There the build script puts the same allocator in the
/// place of the system's.
#[cfg(not(feature = "dynamic"))]
#[global_allocator]
static ALLOCATOR: memory::Counting<mimalloc::MiMalloc> = memory::Counting(mimalloc::MiMalloc);
#[cfg(feature = "dynamic")]
use mimalloc as _;

// Without a reference to the crate its plugins would not be linked and the registry would be silently empty.
use titer_plugins as _;
// Likewise the shared core: with it among the dependencies, the linker takes the core from nowhere else.
#[cfg(feature = "dynamic")]
use titer_facade as _;
