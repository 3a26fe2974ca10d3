//! Renderings of `results.json`. A placeholder: JSON only.

use std::path::Path;

use titer_core::error::io_error;
use titer_core::report::Results;
use titer_core::{Error, Result};

/// A rendering.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// Markdown.
    Md,
    /// A self-contained page.
    Html,
    /// `results.json` itself.
    Json,
    /// One line per row and metric.
    Csv,
    /// A table for a paper.
    Latex,
}

/// Writes every report into `folder`.
///
/// # Errors
/// A file cannot be written.
pub fn write_all(results: &Results, folder: &Path) -> Result<()> {
    crate::store::write_file(&folder.join("results.json"), render(results, Format::Json)?.as_bytes())
}

/// One rendering as text.
///
/// # Errors
/// The results cannot be rendered so.
pub fn render(results: &Results, _format: Format) -> Result<String> {
    serde_json::to_string_pretty(results).map_err(|error| Error::run("results do not serialise").source(error))
}

/// The results in a run's folder.
///
/// # Errors
/// There are none, or they are malformed.
pub fn load(folder: &Path) -> Result<Results> {
    let path = folder.join("results.json");
    let bytes = std::fs::read(&path).map_err(|error| io_error("read", &path, error))?;
    serde_json::from_slice(&bytes).map_err(|error| Error::data("malformed results").file(&path).source(error))
}
