//! What an entry owes: settings that build, survive JSON and refuse mistakes.

use serde_json::{Value, json};

use super::case::table;
use super::{CheckOutcome, Listed};
use crate::defense::entry::DefenseEntry;
use crate::error::Result;
use crate::registry::entry::Entry;
use crate::registry::settings::Settings;

/// The checks of a defense that need no model.
pub(super) const CHECKS: &[Listed<DefenseEntry>] =
    &[("defaults", defaults), ("unknown setting", unknown_setting), ("published form", published_form)];

/// A setting that no plugin has.
const NO_SETTING: &str = "no_plugin_has_this";

fn defaults(entry: &DefenseEntry) -> Result<CheckOutcome> {
    let settings = entry.resolve(&Settings::empty())?;
    (entry.build)(&table(settings.clone())?)?;
    survives(entry, &settings)
}

/// The same settings come out of text and out of themselves.
pub(super) fn survives<E: Entry>(entry: &E, settings: &Value) -> Result<CheckOutcome> {
    let read: Value = serde_json::from_str(&settings.to_string()).unwrap_or_default();
    let again = entry.resolve(&table(read)?)?;
    Ok(CheckOutcome::judge(again == *settings, format!("read again: {again}")))
}

/// A misspelt setting is refused, and the nearest one named.
pub(super) fn unknown_setting<E: Entry>(entry: &E) -> Result<CheckOutcome> {
    let settings = table((entry.settings().defaults)())?;
    let known = settings.as_map().keys().next();
    let misspelt = known.map_or_else(|| NO_SETTING.to_owned(), |key| doubled(key));
    let given = table(json!({ (misspelt.as_str()): 1 }))?;
    Ok(match (entry.resolve(&given), known) {
        (Ok(_), _) => {
            CheckOutcome::Failed(format!("`{misspelt}` passes in silence: read settings with `Settings::parse`"))
        }
        (Err(error), Some(key)) if !error.message().contains(&format!("`{key}`")) => {
            CheckOutcome::Failed(format!("`{misspelt}` is refused without naming `{key}`: {}", error.message()))
        }
        (Err(error), _) => CheckOutcome::Passed(error.message().to_owned()),
    })
}

/// `key` with its last letter twice.
fn doubled(key: &str) -> String {
    key.chars().chain(key.chars().last()).collect()
}

fn published_form(entry: &DefenseEntry) -> Result<CheckOutcome> {
    if entry.quirks.is_empty() {
        return Ok(CheckOutcome::NotApplicable("it declares no quirk of the published code"));
    }
    let defaults = entry.resolve(&Settings::empty())?;
    let published = entry.resolve(&table(json!({ "fidelity": "code-exact" }))?)?;
    (entry.build)(&table(published.clone())?)?;
    let idle = entry.quirks.iter().find(|quirk| published[quirk.setting] == defaults[quirk.setting]);
    Ok(match idle {
        Some(quirk) => CheckOutcome::Failed(format!("the quirk of `{}` is the default", quirk.setting)),
        None => CheckOutcome::Passed(format!("{} quirks", entry.quirks.len())),
    })
}
