//! Plugin crates from elsewhere: loaded from shared libraries, or linked into a runner of one's own.
//!
//! Loading a shared library runs its code, so nothing is loaded but what the command line or a configuration names.

#[cfg(feature = "dynamic")]
pub(crate) mod dynamic;

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fmt;
use std::path::PathBuf;
use std::sync::{Mutex, OnceLock, PoisonError};

use serde::{Deserialize, Serialize};
use titer_core::registry::Entry;
use titer_core::registry::plugin::{Plugin, PluginRecord};
use titer_core::{DefenseEntry, Error, JudgeEntry, ModelEntry, Result, TaskEntry, inventory};

use crate::disk;

/// Titer's own crates. Their entries are identified by name and version.
pub(crate) const OWN: [&str; 3] = ["titer_core", "titer_plugins", "titer"];

/// How many hexadecimal digits a hash has.
const HASH_DIGITS: usize = 64;

/// A shared library to load, as the user names it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PluginFile {
    /// The file.
    pub path: PathBuf,
    /// The BLAKE3 hash that its bytes must have.
    pub blake3: Option<String>,
}

/// `PATH`, or `PATH=HASH`.
impl From<OsString> for PluginFile {
    fn from(text: OsString) -> Self {
        let pinned = text.to_str().and_then(|text| text.rsplit_once('=')).filter(|(_, hash)| is_hash(hash));
        match pinned {
            Some((path, hash)) => Self { path: path.into(), blake3: Some(hash.to_owned()) },
            None => Self { path: text.into(), blake3: None },
        }
    }
}

/// Whether `text` could be the BLAKE3 hash of a file.
pub(crate) fn is_hash(text: &str) -> bool {
    text.len() == HASH_DIGITS && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// A shared library that is part of the process, for the rest of its life.
#[derive(Debug, Clone)]
pub(crate) struct LoadedPlugin {
    pub(crate) path: PathBuf,
    pub(crate) blake3: String,
    pub(crate) records: Vec<PluginRecord>,
}

static LOADED: Mutex<Vec<LoadedPlugin>> = Mutex::new(Vec::new());

fn loaded() -> Vec<LoadedPlugin> {
    LOADED.lock().unwrap_or_else(PoisonError::into_inner).clone()
}

/// The shared libraries that are loaded, by their content: for a process that must have the same ones.
pub fn files() -> Vec<PluginFile> {
    loaded().into_iter().map(|LoadedPlugin { path, blake3, .. }| PluginFile { path, blake3: Some(blake3) }).collect()
}

/// Loads a shared library and thereby runs its code, unless it is loaded already.
///
/// # Errors
/// The file does not fit this runner, is not what its hash says, or could have been put there by anyone; none of its
/// code has run then. Or it registers what is registered already.
#[cfg(feature = "dynamic")]
pub fn load(file: &PluginFile) -> Result<()> {
    let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
    let new = crate::plugins::dynamic::load(file, &loaded).map_err(|error| error.file(&file.path))?;
    loaded.extend(new);
    Ok(())
}

/// Cannot load anything: this runner is built without the feature.
///
/// # Errors
/// Always.
#[cfg(not(feature = "dynamic"))]
pub fn load(file: &PluginFile) -> Result<()> {
    Err(without_dynamic("load a plugin").file(&file.path))
}

/// Why a runner without the feature `dynamic` cannot do `what`.
#[cfg(not(feature = "dynamic"))]
pub(crate) fn without_dynamic(what: &str) -> Error {
    Error::config(format!("this runner cannot {what}: it is built without the feature `dynamic`")).help(
        "build one that can with `cargo build --release --features dynamic`, or link the plugin into a runner of your \
         own, as its README says",
    )
}

/// Where an entry comes from that is not Titer's own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Origin {
    /// Name and version of the plugin crate.
    pub plugin: String,
    /// The shared library; `None` for a crate that is linked into the runner.
    pub file: Option<PathBuf>,
    /// The BLAKE3 hash of the shared library, or of the runner that the crate is linked into.
    pub blake3: String,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.file {
            Some(file) => write!(f, "{} ({})", self.plugin, file.display()),
            None => write!(f, "{} (linked into this runner)", self.plugin),
        }
    }
}

/// Where an entry comes from; `None` if it is Titer's own.
///
/// # Errors
/// The running program cannot be read.
pub fn origin<E: Entry>(entry: &E) -> Result<Option<Origin>> {
    let name = entry.crate_name();
    if OWN.contains(&name) {
        return Ok(None);
    }
    let title =
        |records: &[PluginRecord]| records.iter().find(|record| record.crate_name() == name).map(PluginRecord::title);
    for LoadedPlugin { path, blake3, records } in loaded() {
        if let Some(plugin) = title(&records) {
            return Ok(Some(Origin { plugin, file: Some(path), blake3 }));
        }
    }
    let plugin = title(&Plugin::all()?).unwrap_or_else(|| name.to_owned());
    Ok(Some(Origin { plugin, file: None, blake3: runner_hash()? }))
}

/// What identifies an entry in stage keys beyond its name and version: nothing for Titer's own; else the hash of the
/// file that its code is in, which changes with the code whether or not its author thought of the version.
///
/// # Errors
/// The running program cannot be read.
pub fn identity<E: Entry>(entry: &E) -> Result<Option<String>> {
    Ok(origin(entry)?.map(|origin| origin.blake3))
}

/// The hash of the running program.
fn runner_hash() -> Result<String> {
    static HASH: OnceLock<String> = OnceLock::new();
    match HASH.get() {
        Some(hash) => Ok(hash.clone()),
        None => {
            let path =
                std::env::current_exe().map_err(|error| Error::run("the runner cannot find itself").source(error))?;
            let hash = disk::hash(&path)?;
            Ok(HASH.get_or_init(|| hash).clone())
        }
    }
}

/// An entry of any kind: kind, name and crate.
pub(crate) type Registered = (&'static str, &'static str, &'static str);

/// Every entry of the process.
pub(crate) fn registered() -> BTreeSet<Registered> {
    fn of<E: Entry>() -> impl Iterator<Item = Registered> {
        inventory::iter::<E>.into_iter().map(|entry| (E::KIND, entry.name(), entry.crate_name()))
    }
    of::<DefenseEntry>().chain(of::<ModelEntry>()).chain(of::<TaskEntry>()).chain(of::<JudgeEntry>()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_may_carry_a_hash() {
        let hash = "0123456789abcdef".repeat(4);
        let file = PluginFile::from(OsString::from(format!("a=b.so={hash}")));
        assert_eq!(file, PluginFile { path: "a=b.so".into(), blake3: Some(hash) });
        let file = PluginFile::from(OsString::from("a=b.so"));
        assert_eq!(file, PluginFile { path: "a=b.so".into(), blake3: None });
    }

    #[test]
    fn only_outside_entries_have_an_origin() {
        let own = titer_core::registry::find::<DefenseEntry>("sft").unwrap();
        assert_eq!(origin(own).unwrap(), None);
        assert_eq!(identity(own).unwrap(), None);
    }
}
