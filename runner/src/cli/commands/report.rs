//! `titer report`.

use std::path::PathBuf;

use super::Done;
use crate::diagnostics::Problems;
use crate::report;
use crate::report::Format;
use crate::results::file::load;

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
    Ok(report::render(&load(&args.dir)?, &args.dir, args.format)?.into())
}
