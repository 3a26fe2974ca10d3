//! `titer diff`.

use std::path::PathBuf;

use super::{Done, cell};
use crate::diagnostics::Problems;

/// The arguments.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// The folder of a run.
    pub run_a: PathBuf,
    /// A cell of it: the first digits of its id, or parts of its label as in `Vaccine, p=0.1, seed=0`.
    pub cell_a: String,
    /// The folder of the other run; may be the same.
    pub run_b: PathBuf,
    /// A cell of that.
    pub cell_b: String,
}

/// Shows what separates two numbers.
///
/// # Errors
/// A folder holds no results, or a cell is not found.
pub fn run(args: &Args) -> Result<Done, Problems> {
    let (a, b) = (cell::find(&args.run_a, &args.cell_a)?, cell::find(&args.run_b, &args.cell_b)?);
    Ok(a.against(&b).into())
}
