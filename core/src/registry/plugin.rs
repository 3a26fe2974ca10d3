//! Plugin crates from elsewhere: who they are and what they were built with.
//!
//! A plugin crate says `titer_core::plugin!();` once, at its root. That writes a record into a section of the compiled
//! file, where a runner reads it **before** it loads the file and thereby runs its code, and makes the crate known to
//! a runner that it is linked into.

use std::str::FromStr;

use crate::error::{Error, Result};

/// The section of a shared library that holds its records.
pub const SECTION: &str = ".titer_plugin";

/// The field of a record, and its value.
pub type Field = (&'static str, &'static str);

/// What this core was built with. A shared library fits a runner only if every field is the same in both: the layout of
/// a Rust type may change with any of them.
pub const FINGERPRINT: [Field; 11] = [
    ("core", env!("CARGO_PKG_VERSION")),
    ("candle", env!("TITER_CANDLE")),
    ("rustc", env!("TITER_RUSTC")),
    ("target", env!("TITER_TARGET")),
    ("profile", env!("TITER_PROFILE")),
    ("opt", env!("TITER_OPT")),
    ("features", env!("TITER_FEATURES")),
    ("rustflags", env!("TITER_RUSTFLAGS")),
    ("core-src", env!("TITER_CORE_SRC")),
    ("panic", if cfg!(panic = "abort") { "abort" } else { "unwind" }),
    ("debug-assertions", if cfg!(debug_assertions) { "on" } else { "off" }),
];

/// A plugin crate that is part of the process.
#[derive(Debug)]
pub struct Plugin {
    /// Its record, as [`crate::plugin!`] wrote it.
    pub record: &'static [u8],
}

inventory::collect!(Plugin);

impl Plugin {
    /// Every plugin crate of the process, by its name.
    ///
    /// # Errors
    /// A record is malformed.
    pub fn all() -> Result<Vec<PluginRecord>> {
        let mut records = Vec::new();
        for plugin in inventory::iter::<Plugin> {
            records.extend(PluginRecord::all(plugin.record)?);
        }
        records.sort_by(|a, b| a.name().cmp(b.name()));
        Ok(records)
    }
}

/// Who a plugin crate is (`name`, `version`, `crate`) and what its core was built with (the [`FINGERPRINT`]).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PluginRecord(Vec<(String, String)>);

impl PluginRecord {
    /// Every record of a section.
    ///
    /// # Errors
    /// The section is malformed.
    pub fn all(section: &[u8]) -> Result<Vec<Self>> {
        let text = std::str::from_utf8(section).map_err(|error| malformed().source(error))?;
        text.split('\0').filter(|record| !record.is_empty()).map(str::parse).collect()
    }

    /// The value of a field; empty if there is none.
    pub fn field(&self, name: &str) -> &str {
        self.0.iter().find(|(field, _)| field == name).map_or("", |(_, value)| value)
    }

    /// The package's name.
    pub fn name(&self) -> &str {
        self.field("name")
    }

    /// The crate's name, as in Rust paths.
    pub fn crate_name(&self) -> &str {
        self.field("crate").split(':').next().unwrap_or_default()
    }

    /// Name and version, as in `my-plugin 0.1.0`.
    pub fn title(&self) -> String {
        format!("{} {}", self.name(), self.field("version"))
    }

    /// Where this record departs from the core of this process: field, ours, theirs.
    pub fn differences(&self) -> Vec<(&'static str, &'static str, &str)> {
        let fields = FINGERPRINT.iter().map(|&(field, ours)| (field, ours, self.field(field)));
        fields.filter(|(_, ours, theirs)| ours != theirs).collect()
    }
}

impl FromStr for PluginRecord {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let field = |pair: &str| pair.split_once('=').map(|(name, value)| (name.to_owned(), value.to_owned()));
        text.split(';').map(field).collect::<Option<_>>().map(Self).ok_or_else(malformed)
    }
}

fn malformed() -> Error {
    Error::config(format!("the section `{SECTION}` holds no plugin record")).help("build the plugin again")
}

/// The bytes of a record with [`FINGERPRINT`] after `identity`.
#[doc(hidden)]
pub const fn record_len(identity: &str) -> usize {
    let mut len = identity.len() + 1;
    let mut at = 0;
    while at < FINGERPRINT.len() {
        len += FINGERPRINT[at].0.len() + FINGERPRINT[at].1.len() + 2;
        at += 1;
    }
    len
}

/// The record itself: `identity`, then `;field=value` for each field, then a zero byte.
#[doc(hidden)]
pub const fn record<const LEN: usize>(identity: &str) -> [u8; LEN] {
    let mut bytes = [0; LEN];
    let mut len = append(&mut bytes, 0, identity);
    let mut at = 0;
    while at < FINGERPRINT.len() {
        len = append(&mut bytes, len, ";");
        len = append(&mut bytes, len, FINGERPRINT[at].0);
        len = append(&mut bytes, len, "=");
        len = append(&mut bytes, len, FINGERPRINT[at].1);
        at += 1;
    }
    bytes
}

const fn append(bytes: &mut [u8], mut len: usize, text: &str) -> usize {
    let mut at = 0;
    while at < text.len() {
        bytes[len] = text.as_bytes()[at];
        len += 1;
        at += 1;
    }
    len
}

/// Makes the crate a plugin crate: once, at its root, as in `titer_core::plugin!();`.
#[macro_export]
macro_rules! plugin {
    () => {
        const _: () = {
            const IDENTITY: &str = concat!(
                "name=",
                env!("CARGO_PKG_NAME"),
                ";version=",
                env!("CARGO_PKG_VERSION"),
                ";crate=",
                module_path!()
            );
            #[used]
            #[unsafe(link_section = ".titer_plugin")]
            static RECORD: [u8; $crate::registry::plugin::record_len(IDENTITY)] =
                $crate::registry::plugin::record(IDENTITY);
            // The linker keeps what it can reach, and it reaches what registers itself.
            $crate::inventory::submit! { $crate::registry::plugin::Plugin { record: &RECORD } }
        };
    };
}

/// Lies where the core lies: a runner that loads plugins makes sure that this is the shared library.
pub static ANCHOR: u8 = 0;

#[cfg(test)]
mod tests {
    use super::*;

    const IDENTITY: &str = "name=my-plugin;version=1.2.3;crate=my_plugin";
    static RECORD: [u8; record_len(IDENTITY)] = record(IDENTITY);

    #[test]
    fn a_record_says_who_and_with_what() {
        let [record] = PluginRecord::all(&RECORD).unwrap().try_into().unwrap();
        assert_eq!((record.title().as_str(), record.crate_name()), ("my-plugin 1.2.3", "my_plugin"));
        assert!(record.differences().is_empty());
        assert_eq!(record.field("core"), env!("CARGO_PKG_VERSION"));
        assert!(FINGERPRINT.iter().all(|(field, _)| !record.field(field).is_empty()), "{record:?}");
    }

    #[test]
    fn every_difference_is_told() {
        let text = String::from_utf8(RECORD.to_vec()).unwrap();
        for (field, ours) in FINGERPRINT {
            let other = text.replace(&format!(";{field}={ours}"), &format!(";{field}=another"));
            let [record] = PluginRecord::all(other.as_bytes()).unwrap().try_into().unwrap();
            assert_eq!(record.differences(), [(field, ours, "another")]);
        }
    }

    #[test]
    fn sections_of_two_records_and_of_none() {
        let two: Vec<u8> = RECORD.iter().chain(&[0; 5]).chain(&RECORD).copied().collect();
        assert_eq!(PluginRecord::all(&two).unwrap().len(), 2);
        assert!(PluginRecord::all(b"").unwrap().is_empty());
        assert!(PluginRecord::all(b"nonsense\0").is_err() && PluginRecord::all(&[0xff]).is_err());
    }
}
