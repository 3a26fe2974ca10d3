//! The `Task` trait: rows to train on, prompts to answer, and how answers are scored.

use std::fmt::Debug;
use std::path::Path;

use crate::data::row::Row;
use crate::error::Result;
use crate::registry::entry::{Entry, by_fields};
use crate::registry::settings::{Settings, SettingsType};
use crate::rng::Seed;

/// A source of rows: a user's task, alignment data, harmful data or a set of prompts.
///
/// Pure: no model, no device, no network. The same settings and seed give the same rows on every machine.
pub trait Task: Debug + Send + Sync {
    /// The first `count` training rows in the order that `seed` gives (a file's own order where it has one).
    ///
    /// # Errors
    /// The data is missing or malformed, or has fewer than `count` rows.
    fn train(&self, count: usize, seed: Seed) -> Result<Vec<Row>>;

    /// The first `count` held-out rows, always the same ones. `output` is the reference answer, empty if there is
    /// none.
    ///
    /// # Errors
    /// The data is missing or malformed, or has fewer than `count` rows.
    fn test(&self, count: usize) -> Result<Vec<Row>>;

    /// Whether `answer` is right for `row`. A task without right answers (prompts for a judge) says `None`.
    fn score(&self, _row: &Row, _answer: &str) -> Option<bool> {
        None
    }

    /// The closed set of texts that the task is answered with: `positive` and `negative`. Empty where answers are open. A
    /// judge takes an answer to a request that is such a label, and nothing more, for an answer to something else.
    ///
    /// # Errors
    /// The labels come from data that is missing or malformed.
    fn labels(&self) -> Result<Vec<String>> {
        Ok(Vec::new())
    }

    /// How many tokens an answer may have.
    fn max_new_tokens(&self) -> usize;

    /// Every word of a generated, closed language, from which a word-level tokenizer is built when a model is
    /// pretrained on it. `None` for natural text.
    fn vocabulary(&self) -> Option<Vec<String>> {
        None
    }

    /// The files the rows come from, in a fixed order. Their content is part of every cache key, and stands for the
    /// settings that are paths: mark those with `#[schemars(extend("format" = "path"))]`, or moving a file computes
    /// everything again. Empty for generated data, which the settings and the plugin's version identify.
    fn files(&self) -> Vec<std::path::PathBuf> {
        Vec::new()
    }
}

/// Describes a task to the registry.
#[derive(Debug)]
pub struct TaskEntry {
    /// The name in configurations.
    pub name: &'static str,
    /// One line for `titer list`.
    pub summary: &'static str,
    /// The type of its settings.
    pub settings: SettingsType,
    /// Changes whenever the rows or the scoring do.
    pub version: u32,
    /// Builds the task. Relative paths in the settings are taken from the given folder.
    pub build: fn(&Settings, &Path) -> Result<Box<dyn Task>>,
}

inventory::collect!(TaskEntry);

impl Entry for TaskEntry {
    const KIND: &'static str = "task";
    by_fields!();
}
