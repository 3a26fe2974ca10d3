//! `titer plugin new`.

use std::path::{Path, PathBuf};

use titer_core::registry::{Entry, all};
use titer_core::{DefenseEntry, Error, JudgeEntry, ModelEntry, Result, TaskEntry};

use super::super::Done;
use crate::diagnostics::Problems;
use crate::disk;

/// The arguments.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// What the plugin is.
    #[arg(value_enum)]
    pub kind: PluginKind,
    /// Its name: of the crate, and in configurations.
    pub name: String,
    /// The folder to make [default: one of that name, here].
    #[arg(long, value_name = "DIR")]
    pub path: Option<PathBuf>,
}

/// A kind of plugin.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum PluginKind {
    /// A defense against harmful fine-tuning.
    Defense,
    /// An architecture.
    Model,
    /// A source of rows and prompts.
    Task,
    /// A judge of answers.
    Judge,
}

impl PluginKind {
    fn word(self) -> &'static str {
        match self {
            PluginKind::Defense => DefenseEntry::KIND,
            PluginKind::Model => ModelEntry::KIND,
            PluginKind::Task => TaskEntry::KIND,
            PluginKind::Judge => JudgeEntry::KIND,
        }
    }

    fn example(self) -> &'static str {
        match self {
            PluginKind::Defense => include_str!("../../../../templates/plugin/defense.rs"),
            PluginKind::Model => include_str!("../../../../templates/plugin/model.rs"),
            PluginKind::Task => include_str!("../../../../templates/plugin/task.rs"),
            PluginKind::Judge => include_str!("../../../../templates/plugin/judge.rs"),
        }
    }

    fn names(self) -> Result<Vec<&'static str>> {
        fn of<E: Entry>() -> Result<Vec<&'static str>> {
            Ok(all::<E>()?.into_iter().map(Entry::name).collect())
        }
        match self {
            PluginKind::Defense => of::<DefenseEntry>(),
            PluginKind::Model => of::<ModelEntry>(),
            PluginKind::Task => of::<TaskEntry>(),
            PluginKind::Judge => of::<JudgeEntry>(),
        }
    }
}

/// The workspace that this runner was built from: what a plugin depends on when it is linked statically.
pub(super) fn checkout() -> PathBuf {
    let runner = Path::new(env!("CARGO_MANIFEST_DIR"));
    runner.parent().unwrap_or(runner).to_owned()
}

/// Makes the crate.
///
/// # Errors
/// The name is taken or no name for a crate, or the folder exists.
pub fn run(args: &Args) -> Result<Done, Problems> {
    check_name(&args.name)?;
    if args.kind.names()?.contains(&args.name.as_str()) {
        let message = format!("a {} called `{}` exists already", args.kind.word(), args.name);
        return Err(Error::config(message).key("NAME").help("choose another name").into());
    }
    let folder = args.path.clone().unwrap_or_else(|| PathBuf::from(&args.name));
    if folder.exists() {
        let error = Error::config(format!("`{}` exists already", folder.display())).key("--path");
        return Err(error.help("choose another name, or another folder with --path").into());
    }
    for (name, text) in files(args.kind, &args.name) {
        let path = folder.join(name);
        let parent = path.parent().unwrap_or(&folder);
        std::fs::create_dir_all(parent)
            .map_err(|error| titer_core::error::io_error("make the folder", parent, error))?;
        disk::replace(&path, text.as_bytes())?;
    }
    let shown = folder.display();
    Ok(format!("{shown}: a {} to change\nnext: {}\n", args.kind.word(), next(&shown.to_string())).into())
}

/// What to do with the crate: this runner may be unable to load shared libraries.
fn next(folder: &str) -> String {
    if cfg!(feature = "dynamic") {
        format!("titer plugin check {folder}")
    } else {
        format!("cd {folder} && cargo run --release --features runner -- plugin check")
    }
}

/// The crate's files: the templates are a crate called `my-plugin`, and compile as they are.
fn files(kind: PluginKind, name: &str) -> Vec<(&'static str, String)> {
    let checkout = checkout();
    let filled = |template: &str| {
        template
            .replace("my-plugin", name)
            .replace("my_plugin", &name.replace('-', "_"))
            .replace("MyPlugin", &type_name(name))
            .replace("KIND", kind.word())
            .replace("TITER", &checkout.display().to_string())
    };
    let mut files = vec![
        ("Cargo.toml", filled(include_str!("../../../../templates/plugin/Cargo.toml.txt"))),
        ("README.md", filled(include_str!("../../../../templates/plugin/README.md"))),
        ("src/lib.rs", filled(kind.example())),
        ("src/runner.rs", filled(include_str!("../../../../templates/plugin/runner.rs"))),
        (".gitignore", "/target\n".into()),
    ];
    // The host's versions to start with: what is downloaded and tested there need not be looked for.
    files.extend(std::fs::read_to_string(checkout.join("Cargo.lock")).ok().map(|lock| ("Cargo.lock", lock)));
    files
}

/// `gradient-noise` to `GradientNoise`.
fn type_name(name: &str) -> String {
    let capital = |word: &str| word[..1].to_uppercase() + &word[1..];
    name.split('-').filter(|word| !word.is_empty()).map(capital).collect()
}

/// Words that a crate of the scaffold cannot be called, since it uses them otherwise.
const TAKEN: [&str; 9] = ["core", "std", "alloc", "test", "schemars", "serde", "serde-json", "titer", "titer-core"];

/// Words of Rust that no crate can be called.
const KEYWORDS: [&str; 52] = [
    "abstract", "as", "async", "await", "become", "box", "break", "const", "continue", "crate", "do", "dyn", "else",
    "enum", "extern", "false", "final", "fn", "for", "gen", "if", "impl", "in", "let", "loop", "macro", "match", "mod",
    "move", "mut", "override", "priv", "pub", "ref", "return", "self", "static", "struct", "super", "trait", "true",
    "try", "type", "typeof", "unsafe", "unsized", "use", "virtual", "where", "while", "yield", "union",
];

fn check_name(name: &str) -> Result<()> {
    let words = name.split('-').all(|word| {
        word.starts_with(|first: char| first.is_ascii_lowercase())
            && word.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit())
    });
    let problem = if !words {
        "consists of lower-case words with dashes between"
    } else if TAKEN.contains(&name) {
        "must not be that of a crate it uses"
    } else if KEYWORDS.contains(&name) {
        "must not be a keyword of Rust"
    } else {
        return Ok(());
    };
    let error = Error::config(format!("a plugin's name {problem}, found `{name}`")).key("NAME");
    Err(error.help("choose a name such as gradient-noise"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_become_types() {
        assert_eq!(type_name("gradient-noise2"), "GradientNoise2");
        for name in ["gradient-noise", "sam2", "a"] {
            assert!(check_name(name).is_ok(), "{name}");
        }
        for name in ["", "-", "a--b", "Noise", "2fast", "a_b", "serde", "a b", "../x", "fn", "self"] {
            assert_eq!(check_name(name).unwrap_err().place("key"), Some("NAME"), "{name}");
        }
    }

    #[test]
    fn nothing_of_the_template_is_left() {
        for kind in [PluginKind::Defense, PluginKind::Model, PluginKind::Task, PluginKind::Judge] {
            for (file, text) in files(kind, "gradient-noise") {
                for left in ["my-plugin", "my_plugin", "MyPlugin", "KIND", "TITER"] {
                    let allowed = file == "README.md" && left == "TITER";
                    assert!(allowed || !text.contains(left), "{left} is left in {file} of {kind:?}");
                }
            }
        }
    }
}
