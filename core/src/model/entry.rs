//! The description of a model in the registry.

use std::path::Path;

use serde_json::Value;

use crate::error::Result;
use crate::model::architecture::Model;
use crate::registry::entry::{Entry, by_fields};
use crate::registry::settings::{Settings, SettingsType};

/// Builds an architecture from its settings (the keys of `config.json`).
pub type BuildModel = fn(&Settings) -> Result<Box<dyn Model>>;

/// Describes a model to the registry.
#[derive(Debug)]
pub struct ModelEntry {
    /// The name in configurations.
    pub name: &'static str,
    /// One line for `titer list`.
    pub summary: &'static str,
    /// The `model_type` values of `config.json` that this model reads.
    pub model_types: &'static [&'static str],
    /// The type of its settings: the sizes of a model built from scratch.
    pub settings: SettingsType,
    /// Changes whenever the computation does.
    pub version: u32,
    /// Builds the model from settings.
    pub build: BuildModel,
    /// Builds the model from a checkpoint's `config.json`.
    pub from_config: fn(&Value, &Path) -> Result<Box<dyn Model>>,
}

inventory::collect!(ModelEntry);

impl Entry for ModelEntry {
    const KIND: &'static str = "model";
    by_fields!();
}
