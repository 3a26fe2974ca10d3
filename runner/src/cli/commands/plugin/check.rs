//! `titer plugin check`.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};
use titer_core::registry::{Entry, all, did_you_mean};
use titer_core::{DefenseEntry, Error, JudgeEntry, ModelEntry, Result, Settings, TaskEntry, testing};

use super::super::Done;
use super::build;
use crate::diagnostics::Problems;
use crate::plugins;
use crate::plugins::{PluginFile, Registered, registered};

/// The arguments.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// The plugin's folder, which is built first, or its shared library, or the name of one that this runner has; left out
    /// in a runner that plugins are linked into, all of these.
    #[arg(value_name = "PATH|NAME")]
    pub plugin: Option<PathBuf>,
}

/// One thing that a plugin owes.
struct Owed {
    kind: &'static str,
    plugin: &'static str,
    what: &'static str,
    outcome: Result<()>,
}

/// Goes through what every plugin owes.
///
/// # Errors
/// The plugin cannot be built or loaded, or it registers nothing.
pub fn run(args: &Args) -> Result<Done, Problems> {
    let entries = entries(args.plugin.as_deref())?;
    if entries.is_empty() {
        let help = "submit an entry with `inventory::submit!`, as `titer plugin new` shows";
        return Err(Error::config("there is no plugin to check").help(help).into());
    }
    let mut checks = Vec::new();
    checks.extend(of::<DefenseEntry>(&entries, |entry, settings| (entry.build)(settings).map(drop))?);
    checks.extend(of::<ModelEntry>(&entries, |entry, settings| (entry.build)(settings).map(drop))?);
    checks.extend(of::<TaskEntry>(&entries, |entry, settings| (entry.build)(settings, Path::new(".")).map(drop))?);
    checks.extend(of::<JudgeEntry>(&entries, |entry, settings| (entry.build)(settings, Path::new(".")).map(drop))?);
    Ok(table(&checks, &conformance(&entries)?))
}

/// The laws, for every defense on every architecture and for every architecture by itself: what each is, and the checks.
fn conformance(entries: &BTreeSet<Registered>) -> Result<Vec<(String, Vec<testing::Check>)>> {
    let mut found = Vec::new();
    for architecture in all::<ModelEntry>()? {
        // An architecture that cannot be built says so in its own checks.
        if let Ok(world) = testing::Fixture::small(architecture) {
            for defense in all::<DefenseEntry>()?.into_iter().filter(|entry| among(entries, *entry)) {
                let subject = format!("{} on {}", defense.name, architecture.name);
                found.push((subject, testing::check_defense(defense, &world)));
            }
        }
        if among(entries, architecture) {
            found.push((architecture.name.to_owned(), testing::check_model(architecture)));
        }
    }
    Ok(found)
}

fn among<E: Entry>(entries: &BTreeSet<Registered>, entry: &E) -> bool {
    entries.contains(&(E::KIND, entry.name(), entry.crate_name()))
}

/// The entries to check: those of the file, those of the name, or of all plugins in the process.
fn entries(path: Option<&Path>) -> Result<BTreeSet<Registered>> {
    if let Some(name) = path.filter(|path| !path.exists()).and_then(Path::to_str)
        && Path::new(name).components().count() == 1
    {
        let (named, others): (BTreeSet<_>, BTreeSet<_>) = registered().into_iter().partition(|entry| entry.1 == name);
        if named.is_empty() {
            let hint = did_you_mean(name, others.into_iter().map(|(_, name, _)| name));
            return Err(Error::config(format!("there is no file and no plugin called `{name}`{hint}"))
                .help("give a plugin's folder, its shared library, or a name that `titer list` shows"));
        }
        return Ok(named);
    }
    let before = if path.is_some() { registered() } else { BTreeSet::new() };
    match path {
        Some(folder) if folder.is_dir() => plugins::load(&PluginFile { path: build::build(folder)?, blake3: None })?,
        Some(file) => plugins::load(&PluginFile { path: file.to_owned(), blake3: None })?,
        None => {}
    }
    Ok(registered().difference(&before).filter(|(_, _, from)| !plugins::OWN.contains(from)).copied().collect())
}

/// A setting that no plugin has.
const UNKNOWN: &str = "no_plugin_has_this_setting";

/// The checks of every entry of one kind.
fn of<E: Entry>(entries: &BTreeSet<Registered>, build: fn(&E, &Settings) -> Result<()>) -> Result<Vec<Owed>> {
    let mut checks = Vec::new();
    for entry in all::<E>()?.into_iter().filter(|entry| among(entries, *entry)) {
        let mut check = |what, outcome| checks.push(Owed { kind: E::KIND, plugin: entry.name(), what, outcome });
        check("is described", described(entry));
        check("its default settings load", defaults(entry).and_then(|settings| entry.resolve(&settings)).map(drop));
        check(
            "builds with its default settings",
            defaults(entry).and_then(|settings| build(entry, &sized(E::KIND, settings))),
        );
        check("refuses an unknown setting", refuses(entry, build));
    }
    Ok(checks)
}

fn described<E: Entry>(entry: &E) -> Result<()> {
    let fits = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    if entry.name().is_empty() || !entry.name().chars().all(fits) {
        let message = format!("the name `{}` is not of lower-case letters, digits and dashes", entry.name());
        return Err(Error::config(message).help("rename it, as in gradient-noise"));
    }
    if entry.summary().trim().is_empty() {
        return Err(Error::config("the summary is empty").help("say in one line what it does"));
    }
    Ok(())
}

fn defaults<E: Entry>(entry: &E) -> Result<Settings> {
    match (entry.settings().defaults)() {
        Value::Object(map) => Ok(Settings::from(map)),
        other => Err(Error::config(format!("the default settings are no table: {other}"))),
    }
}

/// A model learns the size of its vocabulary from the tokenizer.
fn sized(kind: &str, settings: Settings) -> Settings {
    let mut map = settings.as_map().clone();
    if kind == ModelEntry::KIND && map.get("vocab_size") == Some(&Value::from(0)) {
        map.insert("vocab_size".into(), 32.into());
    }
    Settings::from(map)
}

fn refuses<E: Entry>(entry: &E, build: fn(&E, &Settings) -> Result<()>) -> Result<()> {
    let settings = Settings::from(Map::from_iter([(UNKNOWN.to_owned(), Value::from(1))]));
    match entry.resolve(&settings).and_then(|_| build(entry, &settings)) {
        Ok(()) => {
            Err(Error::config("an unknown setting passes in silence").help("read settings with `Settings::parse`"))
        }
        Err(_) => Ok(()),
    }
}

/// The checks in a table, and below it the laws; exit code 1 if one failed.
fn table(checks: &[Owed], laws: &[(String, Vec<testing::Check>)]) -> Done {
    let width = checks.iter().map(|check| check.plugin.len()).max().unwrap_or(0);
    let mut text = String::new();
    for Owed { kind, plugin, what, outcome } in checks {
        let state = if outcome.is_ok() { "ok" } else { "FAILED" };
        let _ = writeln!(text, "{state:<6}  {kind:<8} {plugin:<width$}  {what}");
        if let Err(error) = outcome {
            let _ = writeln!(text, "        {}", error.to_string().replace('\n', "\n        "));
        }
    }
    for (subject, checks) in laws {
        let _ = writeln!(text, "\n{subject}");
        for check in checks {
            let _ = writeln!(text, "{check}");
        }
    }
    let laws: Vec<&testing::Check> = laws.iter().flat_map(|(_, checks)| checks).collect();
    let failed = checks.iter().filter(|check| check.outcome.is_err()).count()
        + laws.iter().filter(|check| check.outcome.failed()).count();
    let all = checks.len() + laws.len();
    let _ = writeln!(text, "{} of {all} checks passed", all - failed);
    Done { text, code: u8::from(failed > 0) }
}
