//! The keys of the configuration, read from the schema of its types.

use std::collections::BTreeMap;

use serde_json::Value;
use titer_core::registry::{Entry, all};
use titer_core::{DefenseEntry, JudgeEntry, ModelEntry, Result, TaskEntry};

use crate::experiment::config::Config;
use crate::experiment::schema::follow;

/// A key of the configuration.
#[derive(Debug, Clone, PartialEq)]
pub struct ConfigKey {
    /// Its dotted path without indices of lists. `NAME` stands for a name that the user gives, `*` for the settings of a
    /// plugin.
    pub path: String,
    /// What it holds, in words.
    pub kind: String,
    /// The value if it is left out; `None` if there is no such value.
    pub default: Option<Value>,
    /// Whether it must be given, wherever its table is.
    pub required: bool,
    /// What it is for.
    pub description: String,
    /// Whether other keys stand below it.
    pub table: bool,
}

/// A setting of a plugin.
#[derive(Debug, Clone, PartialEq)]
pub struct Setting {
    /// `defense`, `model`, `task` or `judge`.
    pub kind: &'static str,
    /// The plugin.
    pub plugin: &'static str,
    /// Its name.
    pub name: String,
    /// What it holds, in words.
    pub holds: String,
    /// The value if it is left out.
    pub default: Value,
    /// What it is for.
    pub description: String,
}

/// Every key, tables included, sorted by path.
pub fn keys() -> Vec<ConfigKey> {
    let schema = Config::schema().to_value();
    let mut keys = BTreeMap::new();
    Walk { root: &schema, keys: &mut keys }.below(&schema, "");
    keys.into_values().collect()
}

struct Walk<'a> {
    root: &'a Value,
    keys: &'a mut BTreeMap<String, ConfigKey>,
}

impl Walk<'_> {
    /// The keys of a table, through references, alternatives and lists.
    fn below(&mut self, schema: &Value, path: &str) {
        let schema = follow(self.root, schema);
        for branch in schema["anyOf"].as_array().into_iter().flatten() {
            self.below(branch, path);
        }
        if schema["items"].is_object() {
            self.below(&schema["items"], path);
        }
        let join = |name: &str| if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") };
        let required: Vec<&str> =
            schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        for (name, property) in schema["properties"].as_object().into_iter().flatten() {
            let path = join(name);
            let before = self.keys.len();
            self.below(property, &path);
            let key = ConfigKey {
                kind: holds(self.root, property),
                default: property.get("default").filter(|default| !default.is_null()).cloned(),
                required: required.contains(&name.as_str()),
                description: description(self.root, property),
                table: self.keys.len() > before,
                path,
            };
            self.keys.insert(key.path.clone(), key);
        }
        match &schema["additionalProperties"] {
            named @ Value::Object(_) => self.below(named, &join("NAME")),
            Value::Bool(true) => {
                let path = join("*");
                let key = ConfigKey {
                    kind: "any".to_owned(),
                    default: None,
                    required: false,
                    description: format!(
                        "A setting of the plugin: `titer explain` with the name of the {}.",
                        plugin(&path)
                    ),
                    table: false,
                    path: path.clone(),
                };
                self.keys.insert(path, key);
            }
            _ => {}
        }
    }
}

/// The kind of plugin whose settings stand at `path`.
pub fn plugin(path: &str) -> &'static str {
    match path {
        _ if path.starts_with("methods.") => DefenseEntry::KIND,
        _ if path.starts_with("evaluate.judges") => JudgeEntry::KIND,
        _ if path.starts_with("base.shape") => ModelEntry::KIND,
        _ => TaskEntry::KIND,
    }
}

/// `path` as users write it: with indices (`methods.0.align`) and names of streams (`streams.safe.rows`), and settings of
/// plugins, as the key that it is of.
pub fn canonical(path: &str, keys: &[ConfigKey]) -> Option<String> {
    let parts: Vec<&str> = path.split('.').filter(|part| part.parse::<usize>().is_err()).collect();
    let known = |path: &str| keys.iter().any(|key| key.path == path);
    let mut parts: Vec<String> = parts.into_iter().map(str::to_lowercase).collect();
    if parts.len() > 1 && parts[0] == "streams" && !known(&parts.join(".")) {
        "NAME".clone_into(&mut parts[1]);
    }
    let plain = parts.join(".");
    if known(&plain) {
        return Some(plain);
    }
    let (table, _) = plain.rsplit_once('.')?;
    let any = format!("{table}.*");
    known(&any).then_some(any)
}

/// Every setting of every plugin.
///
/// # Errors
/// Two plugins of a kind share a name.
pub fn settings() -> Result<Vec<Setting>> {
    fn of<E: Entry>() -> Result<Vec<Setting>> {
        Ok(all::<E>()?.into_iter().flat_map(settings_of).collect())
    }
    Ok([of::<DefenseEntry>()?, of::<ModelEntry>()?, of::<TaskEntry>()?, of::<JudgeEntry>()?].concat())
}

/// Every setting of a plugin.
pub fn settings_of<E: Entry>(entry: &E) -> Vec<Setting> {
    let (schema, defaults) = ((entry.settings().schema)().to_value(), (entry.settings().defaults)());
    let properties = schema["properties"].as_object().cloned().unwrap_or_default();
    let setting = |(name, property): (String, Value)| Setting {
        kind: E::KIND,
        plugin: entry.name(),
        holds: holds(&schema, &property),
        default: defaults[&name].clone(),
        description: description(&schema, &property),
        name,
    };
    properties.into_iter().map(setting).collect()
}

/// The description on one line: the key's own, or that of its type.
fn description(root: &Value, schema: &Value) -> String {
    let own = schema["description"].as_str().or_else(|| follow(root, schema)["description"].as_str());
    own.unwrap_or_default().replace('\n', " ")
}

/// What a value of this schema is, in words.
fn holds(root: &Value, schema: &Value) -> String {
    let schema = follow(root, schema);
    let words = |schemas: &Value| -> Vec<String> {
        let schemas = schemas.as_array().into_iter().flatten().filter(|schema| schema["type"] != "null");
        schemas.map(|schema| holds(root, schema)).collect()
    };
    if let Some(names) = names(schema) {
        return names.join(", ");
    }
    if schema["anyOf"].is_array() {
        return words(&schema["anyOf"]).join(" or ");
    }
    let kinds: Vec<&str> = match &schema["type"] {
        Value::Array(kinds) => kinds.iter().filter_map(Value::as_str).collect(),
        kind => kind.as_str().into_iter().collect(),
    };
    match kinds.into_iter().find(|kind| *kind != "null") {
        Some("string") if schema["format"] == "path" => "path".to_owned(),
        Some("integer") => "whole number".to_owned(),
        Some("boolean") => "true or false".to_owned(),
        Some("array") => match holds(root, &schema["items"]) {
            items if schema["minItems"] == schema["maxItems"] && schema["minItems"].is_u64() => {
                format!("list of {} × {items}", schema["minItems"])
            }
            items => format!("list of {items}"),
        },
        Some("object") => "table".to_owned(),
        Some(kind) => kind.to_owned(),
        None => "any".to_owned(),
    }
}

/// The words that a value may be, if it is one of a few.
fn names(schema: &Value) -> Option<Vec<String>> {
    let listed = schema["enum"].as_array().into_iter().flatten();
    let described = schema["oneOf"].as_array().into_iter().flatten();
    let described =
        described.flat_map(|one| one.get("const").into_iter().chain(one["enum"].as_array().into_iter().flatten()));
    let names: Vec<String> = listed.chain(described).filter(|name| !name.is_null()).map(Value::to_string).collect();
    (!names.is_empty()).then_some(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(path: &str) -> ConfigKey {
        keys().into_iter().find(|key| key.path == path).unwrap_or_else(|| panic!("no key {path}"))
    }

    #[test]
    fn keys_say_type_default_and_whether_they_are_required() {
        let samples = key("fine_tune.samples");
        assert_eq!(samples.kind, "whole number or list of whole number");
        assert!(samples.required && samples.default.is_none() && !samples.table);
        let betas = key("align.train.betas");
        assert_eq!((betas.kind.as_str(), betas.required), ("list of 2 × number", false));
        assert_eq!(betas.default, Some(serde_json::json!([0.9, 0.999])));
        assert_eq!(key("fine_tune.mode").kind, "\"double\", \"single\", \"full\"");
        assert!(key("align.train").table && key("methods").table);
    }

    #[test]
    fn paths_are_found_as_users_write_them() {
        let keys = keys();
        for (written, path) in [
            ("methods.0.align", "methods.align"),
            ("methods.align.rho", "methods.align.*"),
            ("streams.safe.rows", "streams.NAME.rows"),
            ("base.shape.hidden_size", "base.shape.*"),
            ("Align.Train.Steps", "align.train.steps"),
        ] {
            assert_eq!(canonical(written, &keys).as_deref(), Some(path), "{written}");
        }
        assert_eq!(canonical("align.train.stepps", &keys), None);
    }

    #[test]
    fn every_key_is_described_and_says_what_it_changes() {
        for key in keys() {
            assert!(key.description.len() > 5, "{} has no description", key.path);
            if !key.table && !key.path.starts_with("published") {
                assert!(super::super::effects::of(&key.path).is_some(), "what does {} change?", key.path);
            }
        }
    }
}
