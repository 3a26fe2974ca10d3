//! Typed plugin settings.
//!
//! A plugin declares its settings as a struct that derives `Serialize`, `Deserialize`, `JsonSchema` and implements
//! `Default`; `#[serde(default, deny_unknown_fields)]` makes every key optional and every misspelt key an error.

use schemars::{JsonSchema, Schema};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::nearest::did_you_mean;
use crate::bounds::shortened;
use crate::error::{Error, Result};

/// The settings a user gave to a plugin: a table of keys and values.
///
/// ```
/// use schemars::JsonSchema;
/// use serde::{Deserialize, Serialize};
/// use serde_json::json;
/// use titer_core::Settings;
///
/// #[derive(Debug, Default, Serialize, Deserialize, JsonSchema)]
/// #[serde(default)]
/// struct Sam {
///     /// How far the weights are moved.
///     rho: f64,
/// }
///
/// let given = |value: serde_json::Value| Settings::of(&value);
/// assert_eq!(given(json!({ "rho": 0.1 })).parse::<Sam>()?.rho, 0.1);
/// let error = given(json!({ "rhoo": 0.1 })).parse::<Sam>().unwrap_err();
/// assert!(error.to_string().contains("did you mean `rho`?"));
/// # Ok::<(), titer_core::Error>(())
/// ```
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Settings(Map<String, Value>);

impl Settings {
    /// No settings: all defaults.
    pub fn empty() -> Self {
        Self::default()
    }

    /// The settings that a typed value stands for.
    pub fn of<T: Serialize>(value: &T) -> Self {
        match serde_json::to_value(value) {
            Ok(Value::Object(map)) => Self(map),
            other => panic!("settings must serialise to a table, got {other:?}"),
        }
    }

    /// The table itself.
    pub fn as_map(&self) -> &Map<String, Value> {
        &self.0
    }

    /// Reads the settings as `T`.
    ///
    /// # Errors
    /// An unknown key (with the nearest known one) or a value of the wrong type, named by key.
    pub fn parse<T: DeserializeOwned + JsonSchema>(&self) -> Result<T> {
        let known = property_names(&schemars::schema_for!(T));
        if let Some(key) = self.0.keys().find(|key| !known.contains(key)) {
            let hint = did_you_mean(key, known.iter().map(String::as_str));
            let keys = if known.is_empty() { "it has none".to_owned() } else { known.join(", ") };
            return Err(Error::config(format!("unknown setting `{key}`{hint}"))
                .key(key.clone())
                .help(format!("known settings: {keys}")));
        }
        self.read()
    }

    /// Reads the settings as `T`, which need not know every key.
    ///
    /// # Errors
    /// A value of the wrong type, named by key.
    pub fn read<T: DeserializeOwned>(&self) -> Result<T> {
        // One key at a time would lose struct-wide validation; serde_json alone loses the key. Figment keeps both.
        let provider = figment::providers::Serialized::defaults(&self.0);
        figment::Figment::from(provider).extract().map_err(|error| {
            let key = error.path.join(".");
            let wrong = Error::config(in_words(&error.kind));
            if key.is_empty() { wrong } else { wrong.key(key) }
        })
    }
}

/// What was expected and found, without the names that Rust has for it.
fn in_words(kind: &figment::error::Kind) -> String {
    use figment::error::{Actual, Kind};
    let (Kind::InvalidType(found, expected) | Kind::InvalidValue(found, expected)) = kind else {
        return kind.to_string();
    };
    let expected = match expected.as_str() {
        "usize" | "u64" | "u32" | "u16" | "u8" => "a whole number, at least 0",
        "f64" | "f32" => "a number",
        "bool" | "a boolean" => "true or false",
        other => other,
    };
    let found = match found {
        // Numbers that are not finite come as nothing, since JSON has no such.
        Actual::Unit => "nothing, or a number that is not finite".to_owned(),
        Actual::Float(number) => format!("`{number:e}`"),
        other => other.to_string(),
    };
    format!("expected {expected}, found {}", shortened(&found))
}

impl From<Map<String, Value>> for Settings {
    fn from(map: Map<String, Value>) -> Self {
        Self(map)
    }
}

/// The type of a plugin's settings, without its generic parameter: schema, defaults and validation.
#[derive(Debug, Clone, Copy)]
pub struct SettingsType {
    /// The JSON schema, with the doc comments as descriptions.
    pub schema: fn() -> Schema,
    /// The defaults, as JSON.
    pub defaults: fn() -> Value,
    resolve: fn(&Settings) -> Result<Value>,
    type_name: fn() -> &'static str,
}

impl SettingsType {
    /// The type `T`.
    pub const fn of<T: Serialize + DeserializeOwned + JsonSchema + Default>() -> Self {
        Self {
            schema: || schemars::schema_for!(T),
            defaults: || serde_json::to_value(T::default()).expect("settings serialise"),
            resolve: |settings| {
                let typed: T = settings.parse()?;
                Ok(serde_json::to_value(typed).expect("settings serialise"))
            },
            type_name: || std::any::type_name::<T>(),
        }
    }

    /// The crate that defines the type, as in Rust paths: the plugin's own.
    pub fn crate_name(&self) -> &'static str {
        (self.type_name)().split("::").next().unwrap_or_default()
    }

    /// `settings` with every default filled in.
    ///
    /// # Errors
    /// An unknown key or a value of the wrong type.
    pub fn resolve(&self, settings: &Settings) -> Result<Value> {
        (self.resolve)(settings)
    }
}

fn property_names(schema: &Schema) -> Vec<String> {
    let properties = schema.get("properties").and_then(Value::as_object);
    properties.map(|map| map.keys().cloned().collect()).unwrap_or_default()
}
