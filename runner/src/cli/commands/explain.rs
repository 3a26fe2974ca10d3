//! `titer explain`.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::path::Path;

use titer_core::registry::{Entry, all, nearest};
use titer_core::{DefenseEntry, Error, JudgeEntry, Limits, ModelEntry, TaskEntry};

use super::{Done, cell};
use crate::diagnostics::Problems;
use crate::plugins::{origin, registered};
use crate::reference::glossary::{self, Term};
use crate::reference::keys::{self, ConfigKey, Setting};
use crate::reference::{effects, normalized};

/// The arguments.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// A plugin, a term such as `hs`, or a key of the configuration such as `fine_tune.samples`; or the folder of a run. With a
    /// kind in front of it (`defense:`, `model:`, `task:`, `judge:`, `term:`, `key:`) only of that kind.
    pub name: String,
    /// A cell of the run: the first digits of its id, or parts of its label as in `Vaccine, p=0.1, seed=0`. Without it, the
    /// cells are listed.
    pub cell: Option<String>,
}

/// Explains everything of that name: plugins, terms, keys of the configuration; or all that is known about where a cell's
/// numbers come from; or lists the cells of a run.
///
/// # Errors
/// There is nothing of that name; the error names the nearest.
pub fn run(args: &Args) -> Result<Done, Problems> {
    let folder = Path::new(&args.name);
    if let Some(cell) = &args.cell {
        return Ok(cell::find(folder, cell)?.explained().into());
    }
    let topics = topics(&args.name)?;
    match topics.as_slice() {
        [] if folder.is_dir() => Ok(cell::list(folder)?.into()),
        [] => Ok(by_last_part(&args.name)?.into()),
        topics => {
            let mut text = topics.iter().map(|topic| topic.text.as_str()).collect::<Vec<_>>().join("\n");
            let mut others: Vec<String> = Vec::new();
            if topics.len() > 1 {
                let named = topics.iter().map(|topic| format!("`titer explain {}:{}`", topic.kind, topic.name));
                others.extend(named);
            }
            if folder.is_dir() {
                others.push(format!("`titer explain ./{}` lists the cells of that folder", args.name));
            }
            if !others.is_empty() {
                let _ = writeln!(text, "\nseveral things are called `{}`: {}", args.name, others.join(", "));
            }
            Ok(text.into())
        }
    }
}

/// Something that a name stands for.
struct Topic {
    kind: &'static str,
    name: String,
    text: String,
}

/// Everything that `asked` is the whole name of.
fn topics(asked: &str) -> Result<Vec<Topic>, Error> {
    let kinds = [DefenseEntry::KIND, ModelEntry::KIND, TaskEntry::KIND, JudgeEntry::KIND, TERM, KEY];
    let prefix = asked.split_once(':').filter(|(kind, _)| kinds.contains(kind));
    let (only, name) = prefix.map_or((None, asked), |(kind, name)| (Some(kind), name));
    // A path is no name.
    if name.contains(['/', '\\']) {
        return Ok(Vec::new());
    }
    let mut topics = plugins::<DefenseEntry>(name, defense)?;
    topics.extend(plugins::<ModelEntry>(name, other)?);
    topics.extend(plugins::<TaskEntry>(name, other)?);
    topics.extend(plugins::<JudgeEntry>(name, other)?);
    for term in glossary::terms().into_iter().filter(|term| term.is_called(name)) {
        let also = if term.aliases.is_empty() { String::new() } else { format!("also: {}\n", term.aliases.join(", ")) };
        let text = format!("{} (term)\n{also}\n{}\n", term.name, term.plain());
        topics.push(Topic { kind: TERM, name: normalized(term.name), text });
    }
    let keys = keys::keys();
    if let Some(path) = keys::canonical(name, &keys) {
        topics.push(Topic { kind: KEY, text: key(&path, name, &keys)?, name: path });
    }
    topics.extend(setting_of(name)?);
    topics.retain(|topic| only.is_none_or(|only| topic.kind == only));
    Ok(topics)
}

const TERM: &str = "term";
const KEY: &str = "key";

fn plugins<E: Entry>(name: &str, text: fn(&E) -> Result<String, Error>) -> Result<Vec<Topic>, Error> {
    let called = |entry: &&E| normalized(entry.name()) == normalized(name);
    let topic = |entry: &E| Ok(Topic { kind: E::KIND, name: entry.name().to_owned(), text: text(entry)? });
    all::<E>()?.into_iter().filter(called).map(topic).collect()
}

/// A setting by the name of its plugin, as in `vaccine.rho`.
fn setting_of(name: &str) -> Result<Option<Topic>, Error> {
    let Some((plugin, setting)) = name.rsplit_once('.') else { return Ok(None) };
    let fits = |found: &Setting| normalized(found.plugin) == normalized(plugin) && found.name == setting;
    Ok(keys::settings()?.into_iter().find(fits).map(|found| Topic {
        kind: found.kind,
        name: name.to_owned(),
        text: format!(
            "{} (setting of the {} {})\n{}\n\n  type      {}\n  default   {}\n",
            found.name, found.kind, found.plugin, found.description, found.holds, found.default
        ),
    }))
}

/// A key at `path`, which the user wrote as `asked`.
fn key(path: &str, asked: &str, keys: &[ConfigKey]) -> Result<String, Error> {
    let Some(found) = keys.iter().find(|key| key.path == path) else { return Ok(String::new()) };
    let mut text = format!("{path} (key of the configuration)\n{}\n\n  type      {}\n", found.description, found.kind);
    let default = match (&found.default, found.required) {
        (Some(default), _) => default.to_string(),
        (None, true) => "none, it must be given".to_owned(),
        (None, false) => "none, it may be left out".to_owned(),
    };
    let _ = writeln!(text, "  default   {default}");
    if let Some((reach, part)) = effects::of(path) {
        let _ = writeln!(text, "  changes   the key of {}; of a row's identity: {}", reach.words(), part.words());
    }
    let below: Vec<&ConfigKey> = keys.iter().filter(|key| key.path.starts_with(&format!("{path}."))).collect();
    if !below.is_empty() {
        text += "\nkeys below it\n";
        for key in below {
            text += &line(&key.path, &key.description);
        }
    }
    if path.ends_with(".*") {
        let (name, kind) = (last_part(asked), keys::plugin(path));
        let settings = keys::settings()?.into_iter().filter(|setting| setting.kind == kind && setting.name == name);
        let lines: String = settings.map(|setting| of_plugin(&setting)).collect();
        if lines.is_empty() && name != "*" {
            let _ = writeln!(text, "\nno {kind} has a setting `{name}`");
        }
        text += &lines;
    }
    Ok(text)
}

fn last_part(path: &str) -> &str {
    path.rsplit('.').next().unwrap_or(path)
}

/// A line of a list.
fn line(name: &str, meaning: &str) -> String {
    format!("  {name:<34} {meaning}\n")
}

fn of_plugin(setting: &Setting) -> String {
    line(&format!("{}.{} = {}", setting.plugin, setting.name, setting.default), &setting.description)
}

/// The keys and settings of plugins whose last part is `name`; one key alone in full.
fn by_last_part(name: &str) -> Result<String, Error> {
    let (keys, settings) = (keys::keys(), keys::settings()?);
    let ends = |key: &&ConfigKey| key.path.ends_with(&format!(".{}", name.to_lowercase()));
    let found: Vec<&ConfigKey> = keys.iter().filter(ends).collect();
    let of_plugins: String = settings.iter().filter(|setting| setting.name == name).map(of_plugin).collect();
    match found.as_slice() {
        [] if of_plugins.is_empty() => Err(unknown(name, &keys, &settings)),
        [only] if of_plugins.is_empty() => key(&only.path, name, &keys),
        found => {
            let of_config: String = found.iter().map(|key| line(&key.path, &key.description)).collect();
            let parts = [("keys of the configuration", of_config), ("settings of plugins", of_plugins)];
            let parts = parts.into_iter().filter(|(_, lines)| !lines.is_empty());
            let parts: Vec<String> = parts.map(|(what, lines)| format!("{what}\n{lines}")).collect();
            Ok(format!("{}\ngive one of these in full, as in `titer explain align.train.steps`\n", parts.join("\n")))
        }
    }
}

/// How many near names an error offers.
const OFFERED: usize = 3;

fn unknown(name: &str, keys: &[ConfigKey], settings: &[Setting]) -> Error {
    let mut names: BTreeSet<String> = glossary::terms().iter().flat_map(Term::names).map(str::to_owned).collect();
    names.extend(keys.iter().flat_map(|key| [key.path.as_str(), last_part(&key.path)]).map(str::to_owned));
    names.extend(settings.iter().map(|setting| setting.name.clone()));
    names.extend(registered().into_iter().map(|(_, name, _)| name.to_owned()));
    let mut offered = Vec::new();
    while let Some(near) = nearest(name, names.iter().map(String::as_str)).filter(|_| offered.len() < OFFERED) {
        let near = near.to_owned();
        names.retain(|name| normalized(name) != normalized(&near));
        offered.push(format!("`{near}`"));
    }
    let hint = if offered.is_empty() { String::new() } else { format!("; did you mean {}?", offered.join(" or ")) };
    Error::config(format!("nothing is called `{name}`{hint}")).help(
        "`titer list` shows every plugin, docs/glossary.md every term, docs/reference/configuration.md every key of a \
         configuration",
    )
}

/// A model, a task or a judge.
fn other<E: Entry>(entry: &E) -> Result<String, Error> {
    let mut text = format!("{} ({}, version {})\n{}\n", entry.name(), E::KIND, entry.version(), entry.summary());
    if let Some(origin) = origin(entry)? {
        let _ = writeln!(text, "from {origin}");
    }
    Ok(text + &settings(entry))
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
    Ok(text + &settings(entry))
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
fn settings<E: Entry>(entry: &E) -> String {
    let settings = keys::settings_of(entry);
    if settings.is_empty() {
        return "\nsettings: none\n".into();
    }
    let mut text = String::from("\nsettings\n");
    for Setting { name, holds, default, description, .. } in settings {
        let choices = if holds.starts_with('"') { format!(" One of {holds}.") } else { String::new() };
        let _ = writeln!(text, "  {:<28} {description}{choices}", format!("{name} = {default}"));
    }
    text
}
