//! Runs side by side. A placeholder.

use std::path::PathBuf;

use titer_core::Result;

/// The runs in the folders as one table.
///
/// # Errors
/// A folder holds no results, or their protocols differ.
pub fn compare(folders: &[PathBuf]) -> Result<String> {
    let loaded = folders.iter().map(|folder| crate::reporters::load(folder)).collect::<Result<Vec<_>>>()?;
    let lines: Vec<_> = loaded.iter().map(|run| format!("{}: {} rows", run.experiment, run.rows.len())).collect();
    Ok(lines.join("\n") + "\n")
}
