//! What every plugin entry has in common, and the look-up by name.

use serde_json::Value;

use super::nearest::did_you_mean;
use crate::error::{Error, Result};
use crate::registry::settings::{Settings, SettingsType};

/// What every kind of plugin entry has in common.
pub trait Entry: inventory::Collect + 'static {
    /// The kind of plugin as a word: `defense`, `model`, `task`, `judge`.
    const KIND: &'static str;
    /// The name it is asked for by.
    fn name(&self) -> &'static str;
    /// One line for `titer list`.
    fn summary(&self) -> &'static str;
    /// The type of its settings.
    fn settings(&self) -> &SettingsType;
    /// Changes whenever the behaviour does, so that cached results of the old one are not used.
    fn version(&self) -> u32;
    /// The settings `given` with every default filled in, as canonical JSON.
    ///
    /// # Errors
    /// An unknown key or a value of the wrong type.
    fn resolve(&self, given: &Settings) -> Result<Value> {
        self.settings().resolve(given)
    }
    /// The crate it comes from, as in Rust paths; its settings are of a type of that crate.
    fn crate_name(&self) -> &'static str {
        self.settings().crate_name()
    }
}

/// The part of an [`Entry`] that is read from the fields of the same names.
macro_rules! by_fields {
    () => {
        fn name(&self) -> &'static str {
            self.name
        }
        fn summary(&self) -> &'static str {
            self.summary
        }
        fn settings(&self) -> &$crate::registry::SettingsType {
            &self.settings
        }
        fn version(&self) -> u32 {
            self.version
        }
    };
}
pub(crate) use by_fields;

/// All entries of one kind, sorted by name.
///
/// # Errors
/// Two entries share a name.
pub fn all<E: Entry>() -> Result<Vec<&'static E>> {
    let mut entries: Vec<&'static E> = inventory::iter::<E>.into_iter().collect();
    entries.sort_by_key(|entry| entry.name());
    match entries.windows(2).find(|pair| pair[0].name() == pair[1].name()) {
        Some(pair) => Err(Error::config(format!("two {}s are registered as `{}`", E::KIND, pair[0].name()))
            .at("crates", pair.iter().map(|entry| entry.crate_name()).collect::<Vec<_>>().join(", "))
            .help("rename one of them, or load only one of the two plugins")),
        None => Ok(entries),
    }
}

/// The entry called `name`.
///
/// # Errors
/// No such entry; the error names the nearest ones.
pub fn find<E: Entry>(name: &str) -> Result<&'static E> {
    let entries = all::<E>()?;
    entries.iter().copied().find(|entry| entry.name() == name).ok_or_else(|| {
        let names = entries.iter().map(|entry| entry.name());
        let hint = did_you_mean(name, names.clone());
        Error::config(format!("unknown {} `{name}`{hint}", E::KIND)).help(format!(
            "known {}s: {}",
            E::KIND,
            names.collect::<Vec<_>>().join(", ")
        ))
    })
}
