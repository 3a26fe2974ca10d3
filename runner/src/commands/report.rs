//! `titer report`.

use std::path::PathBuf;

use super::Done;
use crate::diagnostics::Problems;
use crate::reporters::{self, Format};

/// The arguments.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// The folder of a run.
    pub dir: PathBuf,
    /// The form.
    #[arg(long, value_enum, default_value = "md")]
    pub format: Format,
}

/// Renders the results.
///
/// # Errors
/// The folder holds no results.
pub fn run(args: &Args) -> Result<Done, Problems> {
    Ok(reporters::render(&reporters::load(&args.dir)?, &args.dir, args.format)?.into())
}
