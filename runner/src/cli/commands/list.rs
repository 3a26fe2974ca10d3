//! `titer list`.

use serde_json::{Value, json};
use titer_core::registry::{Entry, all};
use titer_core::{DefenseEntry, JudgeEntry, ModelEntry, Result, TaskEntry};

use super::{Done, pretty};
use crate::diagnostics::Problems;
use crate::plugins::origin;

/// The arguments.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Only plugins of this kind.
    #[arg(value_enum)]
    pub kind: Option<ListedKind>,
    /// For programs: with versions and default settings.
    #[arg(long)]
    pub json: bool,
}

/// A kind of plugin.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum ListedKind {
    /// Defenses against harmful fine-tuning.
    Defenses,
    /// Architectures.
    Models,
    /// Sources of rows and prompts.
    Tasks,
    /// Judges of answers.
    Judges,
}

/// Lists the plugins.
///
/// # Errors
/// Two plugins of a kind share a name.
pub fn run(args: &Args) -> Result<Done, Problems> {
    let wanted = |kind: ListedKind| args.kind.is_none_or(|only| only == kind);
    let mut plugins = Vec::new();
    for (kind, listed) in [
        (ListedKind::Defenses, described::<DefenseEntry>()),
        (ListedKind::Models, described::<ModelEntry>()),
        (ListedKind::Tasks, described::<TaskEntry>()),
        (ListedKind::Judges, described::<JudgeEntry>()),
    ] {
        plugins.extend(if wanted(kind) { listed? } else { Vec::new() });
    }
    if args.json {
        return Ok(pretty(&Value::Array(plugins)).into());
    }
    let text = |plugin: &Value, key: &str| plugin[key].as_str().unwrap_or_default().to_owned();
    let width = plugins.iter().map(|plugin| text(plugin, "name").len()).max().unwrap_or(0);
    let line = |plugin: &Value| {
        let from = plugin["from"]["plugin"].as_str().map_or_else(String::new, |from| format!("  [{from}]"));
        format!("{:<8} {:<width$}  {}{from}\n", text(plugin, "kind"), text(plugin, "name"), text(plugin, "summary"))
    };
    Ok(plugins.iter().map(line).collect::<String>().into())
}

fn described<E: Entry>() -> Result<Vec<Value>> {
    let described = |entry: &E| {
        Ok(json!({
            "kind": E::KIND,
            "name": entry.name(),
            "summary": entry.summary(),
            "version": entry.version(),
            "settings": (entry.settings().defaults)(),
            "from": origin(entry)?,
        }))
    };
    all::<E>()?.into_iter().map(described).collect()
}
