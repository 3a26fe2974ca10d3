//! One module per command: its arguments and what it does.

use std::path::PathBuf;

use titer_core::event::Sink;
use titer_core::weights::checkpoint::Checkpoint;
use titer_core::{Error, arithmetic};

use crate::cli::outlook::Outlook;
use crate::cli::progress::for_stderr;
use crate::diagnostics::Problems;
use crate::experiment::config::{Config, LoadedConfig};
use crate::experiment::resolve;
use crate::logging::Logging;
use crate::plan::Plan;
use crate::plan::planner;
use crate::reference;
use crate::store::Store;

pub mod bench;
pub mod cell;
pub mod compare;
pub mod diff;
pub mod doctor;
pub mod explain;
pub mod export;
pub mod generate;
pub mod list;
pub mod plan;
pub mod plugin;
pub mod pretrain;
pub mod report;
pub mod run;
pub mod worker;

/// What a command that went well says, and its exit code.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Done {
    /// For standard output.
    pub text: String,
    /// 0, or 1 if a part of the work failed while the rest was kept.
    pub code: u8,
}

impl From<String> for Done {
    fn from(text: String) -> Self {
        Self { text, code: 0 }
    }
}

/// The arguments of every command that reads a configuration.
#[derive(Debug, Clone, clap::Args)]
pub struct ConfigArgs {
    /// The experiment: a .toml or .yaml file.
    pub config: PathBuf,
    /// Overrides one key, as in `fine_tune.samples=500`; may be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub overrides: Vec<String>,
    /// The folder of the stage store [default: `TITER_CACHE_DIR`, else titer in the user's cache folder].
    #[arg(long, value_name = "DIR")]
    pub store: Option<PathBuf>,
}

impl ConfigArgs {
    /// The configuration, its plan and the store, for running it.
    ///
    /// # Errors
    /// Every mistake in the configuration; or the checkpoint has no weights.
    pub fn prepare(&self, device: Option<&str>, logging: Logging) -> Result<(LoadedConfig, Plan, Store), Problems> {
        let (loaded, plan, store) = self.sketch(device, logging)?;
        if let Some(spec) = plan.without_weights() {
            let error = Checkpoint::open(&spec.path).err().unwrap_or_else(|| {
                let error = Error::data("the folder holds no weights").file(&spec.path);
                error.help("a model folder needs model.safetensors, or shards of that kind beside its index")
            });
            return Err(loaded.source.locate("base.path", error).into());
        }
        Ok((loaded, plan, store))
    }

    /// The same, also for a checkpoint that is not there yet but for its `config.json`: see [`Plan::without_weights`]. A model
    /// of the hub is downloaded, since keys depend on its content.
    ///
    /// # Errors
    /// Every mistake in the configuration.
    pub fn sketch(&self, device: Option<&str>, logging: Logging) -> Result<(LoadedConfig, Plan, Store), Problems> {
        let mut overrides = self.overrides.clone();
        overrides.extend(device.map(|device| format!("device={device:?}")));
        let loaded = Config::load(&self.config, &overrides)?;
        loaded.load_plugins()?;
        arithmetic::choose(loaded.config.arithmetic);
        let mut experiment = resolve::resolve(&loaded)?;
        let fetched = experiment.fetch_weights(&*downloads(logging));
        fetched.map_err(|error| loaded.source.locate("base.path", error))?;
        Ok((loaded, planner::plan(&experiment), open_store(self.store.as_ref())?))
    }
}

/// Shows downloads.
fn downloads(logging: Logging) -> Box<dyn Sink> {
    for_stderr(logging.format, Outlook::default())
}

/// The store in `folder`, or the user's.
fn open_store(folder: Option<&PathBuf>) -> Result<Store, Error> {
    Store::open(folder.cloned().unwrap_or_else(Store::default_root))
}

/// `titer schema`: with the settings of every plugin.
///
/// # Errors
/// Two plugins of a kind share a name.
pub fn schema() -> Result<Done, Problems> {
    Ok(pretty(&reference::schema::full()?).into())
}

/// JSON for people and programs alike.
fn pretty(value: &serde_json::Value) -> String {
    format!("{value:#}\n")
}
