//! `titer plugin`: plugins outside of Titer.

use super::Done;
use crate::diagnostics::Problems;

pub mod build;
pub mod check;
pub mod new;

/// The arguments.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// What to do.
    #[command(subcommand)]
    pub command: PluginCommand,
}

/// What can be done with a plugin.
#[derive(Debug, Clone, clap::Subcommand)]
pub enum PluginCommand {
    /// Makes a crate with a small plugin that works, to be changed.
    New(new::Args),
    /// Compiles a plugin crate into a shared library that fits this runner.
    Build(build::Args),
    /// Runs the checks that every plugin must pass.
    Check(check::Args),
}

/// Makes, builds or checks a plugin.
///
/// # Errors
/// What could not be done.
pub fn run(args: &Args) -> Result<Done, Problems> {
    match &args.command {
        PluginCommand::New(args) => new::run(args),
        PluginCommand::Build(args) => build::run(args),
        PluginCommand::Check(args) => check::run(args),
    }
}
