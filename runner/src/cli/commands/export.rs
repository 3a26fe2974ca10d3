//! `titer export`.

use std::path::PathBuf;

use titer_core::Error;

use super::{Done, cell, open_store};
use crate::diagnostics::Problems;
use crate::stage::{ExportFormat, export};

/// The arguments.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// The folder of a run.
    #[arg(required_unless_present = "key")]
    pub run: Option<PathBuf>,
    /// A cell of it: the first digits of its id, or parts of its label as in `Vaccine, p=0.1, seed=0`.
    #[arg(required_unless_present = "key")]
    pub cell: Option<String>,
    /// Which of the cell's models: `base`, `align`, `fine_tune` or `post` [default: the last one].
    #[arg(long, value_name = "STAGE", conflicts_with = "key")]
    pub stage: Option<String>,
    /// The key of a stage in the store, in place of a run and a cell.
    #[arg(long, conflicts_with_all = ["run", "cell"])]
    pub key: Option<String>,
    /// What the model is written as.
    #[arg(long, value_enum)]
    pub to: ExportFormat,
    /// The folder to write, which must not exist or be empty.
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// The folder of the stage store [default: `TITER_CACHE_DIR`, else titer in the user's cache folder].
    #[arg(long, value_name = "DIR")]
    pub store: Option<PathBuf>,
}

/// Takes the model of a cell, or of a stage, out of the store.
///
/// # Errors
/// The cell or one of its stages is not found, or cannot be written in this form.
pub fn run(args: &Args) -> Result<Done, Problems> {
    let store = open_store(args.store.as_ref())?;
    let key = match (&args.key, &args.run, &args.cell) {
        (Some(key), ..) => key.clone(),
        (None, Some(run), Some(words)) => cell::find(run, words)?.artifact(args.stage.as_deref())?.to_owned(),
        _ => return Err(Error::config("a run and a cell are needed").help("titer export RUN CELL").into()),
    };
    export(&store, &key, args.to, &args.out)?;
    Ok(format!("{}\n", args.out.display()).into())
}
