//! The runner of Titer: from a configuration to a report.
//!
//! # Code map, in the order of the flow
//!
//! | module | what it holds |
//! |---|---|
//! | [`config`] | what the user writes, its layers, and the place of every mistake |
//! | [`resolve`] | names looked up, defaults filled in, data hashed: all mistakes at once |
//! | [`planner`] [`plan`] | which stages for which cells; a pure function |
//! | [`store`] | finished stages by key: atomic, locked, verified |
//! | [`executor`] | runs what is missing, several stages at once |
//! | [`stages`] [`train_loop`] [`base_model`] | what each stage does; the only place that updates weights; model folders |
//! | [`results`] [`statistics`] | `results.json`; intervals and tests |
//! | [`reporters`] [`compare`] | its renderings; runs side by side |
//! | [`cli`] [`commands`] [`progress`] [`diagnostics`] | the command line and what it shows |
//! | [`memory`] [`environment`] [`mod@bench`] | what the process uses; how fast it is |
//! | [`driver`] | asks the CUDA driver for its version; the crate's only `unsafe` |

#![warn(missing_docs)]

pub mod base_model;
pub mod bench;
pub mod cli;
pub mod commands;
pub mod compare;
pub mod config;
pub mod diagnostics;
pub mod driver;
pub mod environment;
pub mod executor;
pub mod memory;
pub mod plan;
pub mod planner;
pub mod progress;
pub mod reporters;
pub mod resolve;
pub mod results;
pub mod stages;
pub mod statistics;
pub mod store;
#[cfg(test)]
mod testing;
pub mod train_loop;

// Without a reference to the crate its plugins would not be linked and the registry would be silently empty.
use titer_plugins as _;
