//! What users look up: terms, keys of the configuration, settings of plugins, commands.
//!
//! Everything is read from where it is defined: `docs/glossary.md`, the types of the configuration, the registry, the
//! definitions of the command line. `titer explain`, `titer schema` and the pages of `docs/reference` show the same.

pub mod effects;
pub mod glossary;
pub mod keys;
pub mod pages;
pub mod schema;

/// A name for look-up: case, spaces, hyphens and underscores do not count, so `HS`, `harmful score` and `harmful_score`
/// are found alike.
pub fn normalized(name: &str) -> String {
    let letters: String = name.chars().filter(|c| c.is_alphanumeric()).flat_map(char::to_lowercase).collect();
    if letters.is_empty() { name.trim().to_owned() } else { letters }
}
