//! What the parts of resolving share: mistakes are collected with their key, plugins are looked up.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use serde_json::{Map, Value};
use titer_core::registry::{Entry, did_you_mean, find};
use titer_core::report::HubFiles;
use titer_core::{Error, Result, Settings};

use crate::diagnostics::Problems;
use crate::experiment::exclusive::Exclusive;
use crate::experiment::layers::Source;
use crate::experiment::spec::PluginSpec;
use crate::plugins::identity;

pub(super) struct Resolver<'a> {
    pub(super) source: &'a Source,
    pub(super) problems: Problems,
    /// Content hashes of files already read.
    pub(super) hashes: BTreeMap<PathBuf, String>,
    /// Data sets of the hub already taken, by what names them: what they are, and where they lie.
    pub(super) hub_data: BTreeMap<String, (HubFiles, PathBuf)>,
}

impl<'a> Resolver<'a> {
    pub(super) fn new(source: &'a Source) -> Self {
        Self { source, problems: Problems::default(), hashes: BTreeMap::new(), hub_data: BTreeMap::new() }
    }

    /// Keeps the value and collects the error, under the key.
    pub(super) fn take<T>(&mut self, key: &str, result: Result<T>) -> Option<T> {
        result.map_err(|error| self.problems.push(self.source.locate(key, error))).ok()
    }

    pub(super) fn problem(&mut self, key: &str, message: &str, help: &str) {
        self.take::<()>(key, Err(Error::config(message).help(help)));
    }

    pub(super) fn check(&mut self, holds: bool, key: &str, message: &str, help: &str) {
        if !holds {
            self.problem(key, message, help);
        }
    }

    /// Tells that not exactly one of two keys of the table `key` is given.
    pub(super) fn not_one(&mut self, key: &str, keys: &Exclusive, both: bool) {
        let Exclusive { sides: [left, right], says, help, .. } = keys;
        let found = if both { "both are given" } else { "neither is given" };
        self.problem(key, &format!("{says} either `{}` or `{}`; {found}", left[0], right[0]), help);
    }

    /// Whether `number` lies between 1 and `most`; if not, nothing may be made of that size.
    pub(super) fn positive(&mut self, key: &str, number: usize, most: usize) -> bool {
        self.check(number > 0, key, "expected at least 1, found `0`", "set it to 1 or more");
        let message = format!("expected at most {most}, found `{number}`");
        self.check(number <= most, key, &message, &format!("set it to {most} or less; this is a limit of Titer"));
        (1..=most).contains(&number)
    }

    pub(super) fn fraction(&mut self, key: &str, number: f64, help: &str) {
        self.check((0. ..=1.).contains(&number), key, &format!("must lie in [0, 1], found `{number}`"), help);
    }

    pub(super) fn seeds(&mut self, key: &str, seeds: &[u64]) {
        self.check(!seeds.is_empty(), key, "the list is empty: nothing would run", "give at least one seed, as in [0]");
        self.distinct(key, seeds.iter().map(u64::to_string));
    }

    pub(super) fn distinct(&mut self, key: &str, names: impl IntoIterator<Item = String>) {
        let mut seen = BTreeSet::new();
        for name in names {
            if seen.contains(&name) {
                self.problem(key, &format!("`{name}` appears twice"), "remove or rename one of them");
            }
            seen.insert(name);
        }
    }

    /// Looks a plugin up and fills its settings in.
    pub(super) fn plugin<E: Entry>(
        &mut self,
        key: &str,
        name_key: &str,
        name: &str,
        settings: &Map<String, Value>,
    ) -> Option<(&'static E, PluginSpec)> {
        let entry = self.take(name_key, find::<E>(name))?;
        let settings = entry.resolve(&Settings::from(settings.clone()));
        let settings = self.take(key, settings.map_err(|error| explained(name, error)))?;
        let plugin = self.take(name_key, identity(entry))?;
        Some((
            entry,
            PluginSpec { name: name.to_owned(), settings, version: entry.version(), plugin, content: String::new() },
        ))
    }

    pub(super) fn one_of(&mut self, key: &str, name: &str, known: &[&str]) {
        let hint = did_you_mean(name, known.iter().copied());
        let message = format!("`{name}` is not in this configuration{hint}");
        self.check(known.contains(&name), key, &message, &format!("use one of {}", known.join(", ")));
    }
}

/// Points to the plugin's documentation, unless the plugin gave a remedy of its own.
pub(super) fn explained(name: &str, error: Error) -> Error {
    if error.remedy().is_some() { error } else { error.help(format!("`titer explain {name}` shows its settings")) }
}
