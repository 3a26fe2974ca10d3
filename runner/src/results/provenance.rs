//! Where the numbers of a run come from: program, plugins, configuration, files, machine, time.

use std::collections::BTreeSet;

use serde_json::json;
use titer_core::Result;
use titer_core::registry::all;
use titer_core::report::{PluginOrigin, Provenance};
use titer_core::{DefenseEntry, Entry, JudgeEntry, ModelEntry, TaskEntry};

use crate::environment;
use crate::experiment::config::LoadedConfig;
use crate::logging::now;
use crate::plan::Plan;
use crate::plugins;

/// The provenance of a run that ends now. When it started is for the caller to say.
///
/// # Errors
/// The running program cannot be read, or two plugins share a name.
pub fn of(loaded: &LoadedConfig, plan: &Plan, device: &str) -> Result<Provenance> {
    Ok(Provenance {
        commit: option_env!("CHECKOUT_COMMIT").map(str::to_owned),
        plugins: plugin_origins()?.into_iter().collect(),
        config: json!(loaded.config),
        inputs: plan.inputs.clone(),
        hub: plan.checkpoints().find_map(|spec| spec.hub.clone()),
        hub_data: plan.hub_data.clone(),
        processor: environment::processor(),
        device: device.to_owned(),
        arithmetic: plan.arithmetic.clone(),
        started: String::new(),
        finished: now(),
    })
}

/// The plugin crates from elsewhere that are part of this process.
fn plugin_origins() -> Result<BTreeSet<PluginOrigin>> {
    fn of<E: Entry>() -> Result<Vec<PluginOrigin>> {
        let origin = |origin: plugins::Origin| PluginOrigin {
            plugin: origin.plugin,
            file: origin.file.map(|file| file.display().to_string()),
            blake3: origin.blake3,
        };
        all::<E>()?.into_iter().filter_map(|entry| Some(plugins::origin(entry).transpose()?.map(origin))).collect()
    }
    let all = [of::<DefenseEntry>()?, of::<ModelEntry>()?, of::<TaskEntry>()?, of::<JudgeEntry>()?];
    Ok(all.into_iter().flatten().collect())
}
