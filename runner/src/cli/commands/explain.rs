//! `titer explain`.

use std::fmt::Write;
use std::path::Path;

use serde_json::Value;
use titer_core::registry::{Entry, all, nearest};
use titer_core::{DefenseEntry, Error, JudgeEntry, Limits, ModelEntry, SettingsType, TaskEntry};

use super::{Done, cell};
use crate::diagnostics::Problems;
use crate::plugins::origin;

/// The arguments.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// The name of a defense, model, task or judge; or the folder of a run.
    pub name: String,
    /// A cell of the run: the first digits of its id, or parts of its label as in `Vaccine, p=0.1, seed=0`. Without it, the
    /// cells are listed.
    pub cell: Option<String>,
}

/// Explains every plugin of that name, or everything that is known about where a cell's numbers come from; or lists the
/// cells of a run.
///
/// # Errors
/// There is none; the error names the nearest.
pub fn run(args: &Args) -> Result<Done, Problems> {
    if let Some(cell) = &args.cell {
        return Ok(cell::find(Path::new(&args.name), cell)?.explained().into());
    }
    let mut names = Vec::new();
    let mut text = String::new();
    for entry in all::<DefenseEntry>()? {
        names.push(entry.name);
        if entry.name == args.name {
            text += &defense(entry)?;
        }
    }
    others::<ModelEntry>(&args.name, &mut names, &mut text)?;
    others::<TaskEntry>(&args.name, &mut names, &mut text)?;
    others::<JudgeEntry>(&args.name, &mut names, &mut text)?;
    let folder = Path::new(&args.name);
    if text.is_empty() && folder.is_dir() {
        return Ok(cell::list(folder)?.into());
    }
    if text.is_empty() {
        let hint = nearest(&args.name, names.iter().copied());
        let hint = hint.map_or_else(String::new, |near| format!("; did you mean `{near}`?"));
        let error = Error::config(format!("nothing is called `{}`{hint}", args.name));
        return Err(error.help("`titer list` shows every plugin").into());
    }
    Ok(text.into())
}

fn others<E: Entry>(name: &str, names: &mut Vec<&'static str>, text: &mut String) -> Result<(), Error> {
    for entry in all::<E>()? {
        names.push(entry.name());
        if entry.name() == name {
            let _ = writeln!(text, "{} ({}, version {})\n{}", name, E::KIND, entry.version(), entry.summary());
            if let Some(origin) = origin(entry)? {
                let _ = writeln!(text, "from {origin}");
            }
            *text += &settings(entry.settings());
        }
    }
    Ok(())
}

fn defense(entry: &DefenseEntry) -> Result<String, Error> {
    let mut text = format!("{} (defense, version {})\n{}\n\n", entry.name, entry.version, entry.summary);
    let stages: Vec<_> = entry.stages.iter().map(|stage| stage.name()).collect();
    let list = |items: &[&str]| if items.is_empty() { "none".to_owned() } else { items.join(", ") };
    let defaults = (entry.settings.defaults)();
    let (passes, limits) = ((entry.passes)(&defaults), (entry.limits)(&defaults));
    let limits = limits_in_words(limits);
    let answers = if entry.privilege.harmful_answers { "sees harmful answers" } else { "sees no harmful answers" };
    for (what, value) in [
        ("paper", entry.paper.to_owned()),
        ("update", entry.formula.to_owned()),
        ("stages", stages.join(", ")),
        ("streams", list((entry.streams)(&defaults))),
        ("sites", list(entry.sites)),
        ("passes", format!("{passes} per step at the default settings")),
        ("privilege", format!("{answers}; needs: {}", entry.privilege.needs)),
        ("limits", limits),
        ("neutral", entry.neutral.map_or_else(|| "no such settings".into(), |neutral| neutral().to_string())),
        ("notes", entry.notes.to_owned()),
        ("from", origin(entry)?.map_or_else(String::new, |origin| origin.to_string())),
    ] {
        if !value.is_empty() {
            let _ = writeln!(text, "  {what:<10} {}", value.replace('\n', "\n             "));
        }
    }
    if !entry.quirks.is_empty() {
        text += "\nquirks of the published code, all set by fidelity = \"code-exact\"\n";
        for quirk in entry.quirks {
            let _ = writeln!(text, "  {:<28} {}", format!("{} = {}", quirk.setting, (quirk.published)()), quirk.what);
        }
    }
    Ok(text + &settings(&entry.settings))
}

/// What a defense does not go with in training, a line each.
fn limits_in_words(limits: Limits) -> String {
    let lines = [
        limits.checkpointing.map(|why| format!("no gradient checkpointing: {why}")),
        limits.accumulation.map(|why| format!("accumulated batches are not one large batch: {why}")),
    ];
    lines.into_iter().flatten().collect::<Vec<_>>().join("\n")
}

/// A line per setting: name, default, meaning.
fn settings(settings: &SettingsType) -> String {
    let (schema, defaults) = ((settings.schema)().to_value(), (settings.defaults)());
    let Some(properties) = schema.get("properties").and_then(Value::as_object).filter(|map| !map.is_empty()) else {
        return "\nsettings: none\n".into();
    };
    let mut text = String::from("\nsettings\n");
    for (name, property) in properties {
        let meaning = property.get("description").and_then(Value::as_str).unwrap_or("").replace('\n', " ");
        let default = defaults.get(name).map_or_else(String::new, Value::to_string);
        let choices = choices(&schema, property);
        let choices = if choices.is_empty() { choices } else { format!(" One of {choices}.") };
        let _ = writeln!(text, "  {:<28} {meaning}{choices}", format!("{name} = {default}"));
    }
    text
}

/// The words that a setting may be, if it is one of a few.
fn choices(schema: &Value, property: &Value) -> String {
    let name = property["$ref"].as_str().and_then(|path| path.rsplit('/').next()).unwrap_or_default();
    let definition = &schema["$defs"][name];
    let words = definition["enum"].as_array().into_iter().flatten();
    let described = definition["oneOf"].as_array().into_iter().flatten();
    let described =
        described.flat_map(|one| one.get("const").into_iter().chain(one["enum"].as_array().into_iter().flatten()));
    words.chain(described).map(Value::to_string).collect::<Vec<_>>().join(", ")
}
