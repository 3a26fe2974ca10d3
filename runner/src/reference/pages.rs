//! The pages of `docs/reference`, written from what they describe. A test holds the committed pages against these.

use std::fmt::Write;

use clap::{Arg, Command};
use titer_core::registry::{Entry, all};
use titer_core::{DefenseEntry, JudgeEntry, Kind, ModelEntry, Result, TaskEntry};

use super::effects::{self, Part, Reach};
use super::keys::{self, ConfigKey};

/// How the pages are written anew.
pub const COMMAND: &str = "cargo run --release -p titer-tests --example docs";

/// File name and content of every page.
///
/// # Errors
/// Two plugins of a kind share a name.
pub fn all_pages(command: &Command) -> Result<[(&'static str, String); 3]> {
    Ok([("configuration.md", configuration()), ("plugins.md", plugins()?), ("cli.md", cli(command))])
}

fn head(title: &str) -> String {
    format!("# {title}\n\n<!-- written by `{COMMAND}`: do not edit -->\n\n")
}

/// Text in a cell of a table.
fn cell(text: &str) -> String {
    text.replace('|', "\\|").replace('\n', " ")
}

const CONFIGURATION: &str = "\
A configuration is one TOML or YAML file. Its layers are the defaults, the file, environment variables
(`TITER_FINE_TUNE__SAMPLES=200`) and `--set fine_tune.samples=200`; later ones win. `titer explain KEY` prints an entry of
this page, `titer schema` all of it as a JSON schema for editors, with the settings of the plugins.

`NAME` stands for a name of your own, `*` for the [settings of the plugin](plugins.md) that the table names. Lists of tables
(`methods`, `align.data`) are shown without an index; where you use a key, give it: `--set methods.0.align=sft` (counted from 0).

*Stages* is the first stage whose [key](../glossary.md#stage-key) changes with the value: that stage and those after it are
computed anew. *Row* is the part of a [row's identity](../glossary.md#row-identity) that changes. A dash means that nothing
changes.
";

fn configuration() -> String {
    let keys = keys::keys();
    let mut page = head("Configuration") + CONFIGURATION;
    let (tables, single): (Vec<&ConfigKey>, Vec<&ConfigKey>) =
        keys.iter().filter(|key| !key.path.contains('.')).partition(|key| key.table);
    page += "\n## Top level\n";
    rows(&mut page, &single);
    for table in tables {
        let _ = write!(page, "\n## {}\n\n{}\n", table.path, table.description);
        let below = |key: &&ConfigKey| key.path.starts_with(&format!("{}.", table.path));
        rows(&mut page, &keys.iter().filter(below).collect::<Vec<_>>());
    }
    page
}

fn rows(page: &mut String, keys: &[&ConfigKey]) {
    *page += "\n| key | type | default | meaning | stages | row |\n|---|---|---|---|---|---|\n";
    for key in keys {
        let default = match (&key.default, key.required) {
            (Some(_), _) if key.table => String::new(),
            (Some(default), _) => format!("`{default}`"),
            (None, true) => "required".to_owned(),
            (None, false) => "none".to_owned(),
        };
        let (reach, part) = match effects::of(&key.path) {
            Some((reach, part)) => (stages(reach), if part == Part::None { "–" } else { part.words() }),
            None => ("", ""),
        };
        let (kind, meaning) = (cell(&key.kind), cell(&key.description));
        let _ = writeln!(page, "| `{}` | {kind} | {} | {meaning} | {reach} | {part} |", key.path, cell(&default));
    }
}

fn stages(reach: Reach) -> &'static str {
    match reach {
        Reach::Base => "base",
        Reach::Align => "align",
        Reach::FineTune => "fine_tune",
        Reach::Post => "post",
        Reach::Drawing => "the defense's",
        Reach::Answers(_) => "answers",
        Reach::Verdicts => "verdicts",
        Reach::Nothing(_) => "–",
    }
}

/// The plugins that ship; those of others describe themselves in `titer explain`.
fn shipped<E: Entry>() -> Result<Vec<&'static E>> {
    Ok(all::<E>()?.into_iter().filter(|entry| entry.crate_name() == "titer_plugins").collect())
}

fn plugins() -> Result<String> {
    let mut page = head("Plugins and their settings");
    page += "`titer explain NAME` prints an entry of this page, with more about defenses. Every defense also takes \
             `fidelity = \"correct\"`\n(the default) or `\"code-exact\"`, which sets all its quirks.\n\n\
             In the update rules, w are the weights, and g is what the optimiser gets as the gradient; f (or L) is the \
             loss on the\nrows of the stage, and h the loss on those of the defense's stream. The other symbols are settings, \
             or those of the paper.\n\n## Defenses\n";
    for entry in shipped::<DefenseEntry>()? {
        let stages: Vec<&str> = entry.stages.iter().map(|stage| stage.name()).collect();
        let defaults = (entry.settings.defaults)();
        let streams = (entry.streams)(&defaults);
        let _ = write!(page, "\n### {}\n\n{}.\n\n", entry.name, sentence(entry.summary));
        let _ = writeln!(page, "- Paper: {}", entry.paper);
        let _ = writeln!(page, "- Update: `{}`", entry.formula.replace('\n', " "));
        let _ = writeln!(page, "- Stages: {}", stages.join(", "));
        if !streams.is_empty() {
            let _ = writeln!(page, "- Streams: {}", streams.join(", "));
        }
        let _ = writeln!(page, "- Must know: {}", entry.privilege.needs);
        settings(&mut page, entry);
        if !entry.quirks.is_empty() {
            page += "\nQuirks of the published code:\n\n";
            for quirk in entry.quirks {
                let _ = writeln!(page, "- `{} = {}`: {}", quirk.setting, (quirk.published)(), quirk.what);
            }
        }
    }
    others::<ModelEntry>(
        &mut page,
        "Models",
        "The settings are those of `base.shape`, for a model that is pretrained here. \
                                              A checkpoint has its own `config.json`.",
    )?;
    others::<TaskEntry>(&mut page, "Tasks", "")?;
    others::<JudgeEntry>(&mut page, "Judges", "")?;
    Ok(page)
}

fn others<E: Entry>(page: &mut String, title: &str, introduction: &str) -> Result<()> {
    let _ = write!(page, "\n## {title}\n");
    if !introduction.is_empty() {
        let _ = write!(page, "\n{introduction}\n");
    }
    for entry in shipped::<E>()? {
        let _ = write!(page, "\n### {}\n\n{}.\n", entry.name(), sentence(entry.summary()));
        settings(page, entry);
    }
    Ok(())
}

/// A summary with a capital letter.
fn sentence(summary: &str) -> String {
    let mut letters = summary.chars();
    letters.next().map_or_else(String::new, |first| first.to_uppercase().chain(letters).collect())
}

fn settings<E: Entry>(page: &mut String, entry: &E) {
    let settings = keys::settings_of(entry);
    if settings.is_empty() {
        *page += "\nIt has no settings.\n";
        return;
    }
    *page += "\n| setting | type | default | meaning |\n|---|---|---|---|\n";
    for setting in settings {
        let default = if setting.default.is_null() { "none".to_owned() } else { format!("`{}`", setting.default) };
        let (holds, meaning) = (cell(&setting.holds), cell(&setting.description));
        let _ = writeln!(page, "| `{}` | {holds} | {} | {meaning} |", setting.name, cell(&default));
    }
}

const ENVIRONMENT: &str = "
## Environment variables

| variable | what it does |
|---|---|
| `TITER_CACHE_DIR` | the folder of the stage store, if there is no `--store` |
| `TITER_` and a key | sets a key of the configuration: `TITER_FINE_TUNE__SAMPLES=200` is `fine_tune.samples=200` |
| `TITER_LOG`, else `RUST_LOG` | log filters such as `titer=debug`, instead of `-v` |
| `TITER_LOG_FORMAT` | `text` or `json`, if there is no `--log-format` |
| `TITER_SIMD` | `scalar`, `128`, `256` or `512`: keeps the kernels from wider vectors; results are the same |
| `NO_COLOR` | no colours in the log |
";

fn cli(command: &Command) -> String {
    let mut command = command.clone();
    command.build();
    let mut page = head("Command line");
    page += "`titer COMMAND --help` prints an entry of this page.\n\n## Options of every command\n";
    arguments(&mut page, command.get_arguments().filter(|argument| argument.is_global_set()));
    for sub in command.get_subcommands().filter(|sub| sub.get_name() != "help") {
        subcommand(&mut page, "titer", sub);
    }
    page += "\n## Exit codes\n\n| code | when |\n|--:|---|\n| 0 | done |\n";
    for (kind, when) in [
        (Kind::Run, "a part failed, the rest is kept"),
        (Kind::Config, "wrong usage or configuration"),
        (Kind::Data, "missing or damaged data or model"),
        (Kind::Device, "the device cannot be used, or cannot do what was asked"),
        (Kind::Interrupted, "interrupted; the same command resumes"),
    ] {
        let _ = writeln!(page, "| {} | {when} |", kind.exit_code());
    }
    page + ENVIRONMENT
}

fn subcommand(page: &mut String, parent: &str, command: &Command) {
    let name = format!("{parent} {}", command.get_name());
    let about = command.get_long_about().or(command.get_about()).map(ToString::to_string).unwrap_or_default();
    let subcommands: Vec<&Command> = command.get_subcommands().filter(|sub| sub.get_name() != "help").collect();
    let _ = write!(page, "\n## {name}\n\n{}.\n", about.trim_end_matches('.'));
    if subcommands.is_empty() {
        let usage = command.clone().render_usage().to_string();
        let _ = write!(page, "\n    {}\n", usage.trim_start_matches("Usage: "));
        arguments(page, command.get_arguments().filter(|argument| !argument.is_global_set()));
    }
    for sub in subcommands {
        subcommand(page, &name, sub);
    }
}

fn arguments<'a>(page: &mut String, arguments: impl Iterator<Item = &'a Arg>) {
    let shown = arguments
        .filter(|argument| !argument.is_hide_set() && !["help", "version"].contains(&argument.get_id().as_str()));
    let lines: String = shown.map(argument).collect();
    if !lines.is_empty() {
        let _ = write!(page, "\n| argument | meaning | default |\n|---|---|---|\n{lines}");
    }
}

fn argument(argument: &Arg) -> String {
    let value = || {
        let names = argument.get_value_names().unwrap_or_default();
        names.iter().map(|name| format!(" <{name}>")).collect::<String>()
    };
    let takes = argument.get_action().takes_values();
    let name = match (argument.get_long(), argument.get_short()) {
        (None, None) => value().trim_start().to_owned(),
        (long, short) => {
            let names = short.map(|short| format!("-{short}")).into_iter().chain(long.map(|long| format!("--{long}")));
            names.collect::<Vec<_>>().join(", ") + &if takes { value() } else { String::new() }
        }
    };
    let help = argument.get_long_help().or(argument.get_help()).map(ToString::to_string).unwrap_or_default();
    let choices: Vec<String> = if takes {
        let choices = argument.get_possible_values();
        choices.iter().map(|choice| format!("`{}`", choice.get_name())).collect()
    } else {
        Vec::new()
    };
    let choices = if choices.is_empty() { String::new() } else { format!(" One of {}.", choices.join(", ")) };
    let defaults: Vec<String> =
        argument.get_default_values().iter().map(|value| format!("`{}`", value.to_string_lossy())).collect();
    let required = if argument.is_required_set() { "required".to_owned() } else { defaults.join(", ") };
    let default = if takes { required } else { String::new() };
    format!("| `{name}` | {}.{choices} | {default} |\n", cell(help.trim_end_matches('.')))
}
