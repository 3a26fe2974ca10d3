//! `titer plugin build`.
//!
//! A plugin fits a runner only if it is compiled against the very core that the runner uses. That core and the crates
//! whose types it shares with plugins lie in the target folder that the runner was built in; cargo says which files
//! they are. The plugin's own dependencies are compiled as usual.

use std::path::PathBuf;

use super::super::Done;
use crate::diagnostics::Problems;

/// The arguments.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// The plugin's folder.
    #[arg(default_value = ".")]
    pub path: PathBuf,
}

/// Builds the plugin.
///
/// # Errors
/// It does not compile, or this runner cannot load plugins.
pub fn run(args: &Args) -> Result<Done, Problems> {
    let file = build(&args.path)?;
    let hash = crate::disk::hash(&file)?;
    let shown = file.display();
    Ok(format!(
        "{shown}\nblake3 {hash}\n\nuse it with --plugin {shown}, or in a configuration:\n\n[plugins]\npaths = [{{ path = \
         \"{shown}\", blake3 = \"{hash}\" }}]\n"
    )
    .into())
}

#[cfg(feature = "dynamic")]
pub(super) use sdk::build;

/// Cannot build what this runner could not load.
///
/// # Errors
/// Always.
#[cfg(not(feature = "dynamic"))]
pub(super) fn build(folder: &std::path::Path) -> titer_core::Result<PathBuf> {
    Err(crate::plugins::without_dynamic("build a shared library").file(folder))
}

#[cfg(feature = "dynamic")]
mod sdk;
