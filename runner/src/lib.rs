//! The runner of Titer: from a configuration to a report.
//!
//! # Code map, in the order of the flow
//!
//! | module | what it holds |
//! |---|---|
//! | [`config`] | what the user writes, its layers, and the place of every mistake |
//! | [`resolve`] | names looked up, defaults filled in, data hashed: all mistakes at once |
//! | [`planner`] [`plan`] | which stages for which cells; a pure function |
//! | [`identity`] | what enters the key of a stage and the identity of a row, field by field |
//! | [`disk`] [`store`] | every access to the disk; finished stages by key: atomic, locked, verified |
//! | [`executor`] | runs what is missing, several stages at once |
//! | [`stages`] [`train_loop`] [`base_model`] | what each stage does; the only place that updates weights; model folders |
//! | [`results`] [`provenance`] [`statistics`] | `results.json`; where it comes from; intervals and tests |
//! | [`output`] | the folder of a run's results, which processes take turns to write |
//! | [`published`] | published values against ours |
//! | [`reporters`] [`compare`] | its renderings; runs side by side |
//! | [`cli`] [`commands`] [`progress`] [`diagnostics`] | the command line and what it shows |
//! | [`names`] [`label`] | what a name may be, and how text from elsewhere is shown; a cell in words |
//! | [`memory`] [`environment`] [`mod@bench`] | what the process uses; how fast it is |
//! | [`plugins`] `dynamic` | plugin crates from elsewhere; how a shared library is examined and loaded |
//! | [`driver`] | asks the CUDA driver for its version; with `dynamic` and [`memory`] the crate's only `unsafe` |

#![warn(missing_docs)]

pub mod base_model;
pub mod bench;
pub mod cli;
pub mod commands;
pub mod compare;
pub mod config;
pub mod diagnostics;
pub mod disk;
pub mod driver;
#[cfg(feature = "dynamic")]
mod dynamic;
pub mod environment;
pub mod executor;
#[cfg(test)]
mod faults;
pub mod identity;
pub mod label;
pub mod memory;
pub mod names;
pub mod output;
pub mod plan;
pub mod planner;
pub mod plugins;
pub mod progress;
pub mod provenance;
pub mod published;
pub mod reporters;
pub mod resolve;
pub mod results;
pub mod stages;
pub mod statistics;
pub mod store;
#[cfg(test)]
mod testing;
pub mod train_loop;

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
