//! Runs side by side. A placeholder.

use std::path::PathBuf;

use titer_core::Result;

/// The runs in the folders as one table.
///
/// # Errors
/// A folder holds no results, or their protocols differ.
pub fn compare(folders: &[PathBuf]) -> Result<String> {
    let loaded = folders.iter().map(|folder| crate::reporters::load(folder)).collect::<Result<Vec<_>>>()?;
    Ok(loaded.iter().map(|results| format!("{}: {} rows\n", results.experiment, results.rows.len())).collect())
}
