//! `titer compare`.

use std::path::PathBuf;

use super::Done;
use crate::diagnostics::Problems;

/// The arguments.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// The folders of the runs.
    #[arg(required = true, num_args = 2..)]
    pub dirs: Vec<PathBuf>,
}

/// Puts the runs side by side.
///
/// # Errors
/// A folder holds no results, or their protocols differ.
pub fn run(args: &Args) -> Result<Done, Problems> {
    Ok(crate::report::compare::compare(&args.dirs)?.into())
}
