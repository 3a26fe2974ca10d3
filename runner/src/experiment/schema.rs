//! Checks values against a JSON schema and reports every mistake with its key, where serde would stop at the first.
//!
//! Only what `schemars` writes for configuration types is understood: objects, arrays, scalars, constants, `anyOf`.

use serde_json::Value;
use titer_core::Error;
use titer_core::bounds::shortened;
use titer_core::registry::did_you_mean;

/// Every way in which `value` departs from the schema `root`.
pub(super) fn check(root: &Value, value: &Value) -> Vec<Error> {
    let mut checker = Checker { root, errors: Vec::new() };
    checker.visit(root, value, "");
    checker.errors
}

struct Checker<'a> {
    root: &'a Value,
    errors: Vec<Error>,
}

impl<'a> Checker<'a> {
    fn visit(&mut self, schema: &'a Value, value: &Value, key: &str) {
        let schema = follow(self.root, schema);
        if let Some(branches) = branches(schema) {
            return self.visit_branches(schema, branches, value, key);
        }
        if let Some(names) = schema.get("enum").and_then(Value::as_array) {
            return self.visit_names(&names.iter().collect::<Vec<_>>(), value, key);
        }
        if !accepts(schema, value) {
            return self.report(key, mismatch(&expected_type(schema), value));
        }
        match value {
            Value::Object(map) => {
                let properties = schema.get("properties").and_then(Value::as_object);
                let open = schema.get("additionalProperties").unwrap_or(&Value::Bool(true));
                for (name, value) in map {
                    let key = join(key, name);
                    match (properties.and_then(|known| known.get(name)), open) {
                        (Some(schema), _) => self.visit(schema, value, &key),
                        (None, Value::Object(_)) => self.visit(open, value, &key),
                        (None, Value::Bool(false)) => {
                            let known: Vec<&str> =
                                properties.into_iter().flatten().map(|(name, _)| name.as_str()).collect();
                            self.report(&key, unknown(name, &known));
                        }
                        (None, _) => {}
                    }
                }
                for name in schema.get("required").and_then(Value::as_array).into_iter().flatten() {
                    if let Some(name) = name.as_str().filter(|name| !map.contains_key(*name)) {
                        let expected = properties.and_then(|known| known.get(name));
                        // What a key is for says more than what its type is.
                        let expected = expected.map(|schema| match schema.get("description") {
                            Some(_) => schema,
                            None => follow(self.root, schema),
                        });
                        let expected = expected.map_or_else(String::new, |schema| format!(": {}", summary(schema)));
                        let place = if key.is_empty() { "the configuration".into() } else { format!("`{key}`") };
                        self.report(
                            &join(key, name),
                            Error::config(format!("{place} lacks the key `{name}`{expected}"))
                                .help(format!("add `{name}`; `titer schema` describes every key")),
                        );
                    }
                }
            }
            Value::Array(items) => {
                if let Some(schema) = schema.get("items") {
                    for (index, item) in items.iter().enumerate() {
                        self.visit(schema, item, &join(key, &index.to_string()));
                    }
                }
            }
            _ => {}
        }
    }

    /// Alternatives differ in their JSON type, so the type tells which one is meant.
    fn visit_branches(&mut self, schema: &'a Value, branches: &'a [Value], value: &Value, key: &str) {
        let constants: Vec<&Value> = branches.iter().filter_map(|branch| branch.get("const")).collect();
        if constants.len() == branches.len() {
            return self.visit_names(&constants, value, key);
        }
        match branches.iter().map(|branch| follow(self.root, branch)).find(|branch| self.fits(branch, value)) {
            Some(branch) => self.visit(branch, value, key),
            None => self.report(key, mismatch(&self.expectation(schema), value)),
        }
    }

    fn fits(&self, schema: &'a Value, value: &Value) -> bool {
        match branches(schema) {
            Some(branches) => branches.iter().any(|branch| self.fits(follow(self.root, branch), value)),
            None => accepts(schema, value),
        }
    }

    /// The expected type in words; of alternatives, each one but `null`.
    fn expectation(&self, schema: &'a Value) -> String {
        let Some(branches) = branches(schema) else { return expected_type(schema) };
        let words = branches.iter().map(|branch| self.expectation(follow(self.root, branch)));
        words.filter(|word| !word.is_empty()).collect::<Vec<_>>().join(" or ")
    }

    fn visit_names(&mut self, names: &[&Value], value: &Value, key: &str) {
        if names.contains(&value) {
            return;
        }
        let names: Vec<&str> = names.iter().filter_map(|name| name.as_str()).collect();
        let hint = value.as_str().map_or_else(String::new, |word| did_you_mean(word, names.iter().copied()));
        let message = format!("`{}` is not possible here{hint}", plain(value));
        self.report(key, Error::config(message).help(format!("use one of {}", names.join(", "))));
    }

    fn report(&mut self, key: &str, error: Error) {
        self.errors.push(error.key(key));
    }
}

/// The schema that a reference stands for.
pub(crate) fn follow<'a>(root: &'a Value, schema: &'a Value) -> &'a Value {
    let target = schema["$ref"].as_str().and_then(|path| root.pointer(path.trim_start_matches('#')));
    target.map_or(schema, |target| follow(root, target))
}

fn branches(schema: &Value) -> Option<&[Value]> {
    schema.get("anyOf").or_else(|| schema.get("oneOf")).and_then(Value::as_array).map(Vec::as_slice)
}

/// Whether the value has a type that the schema names, and is not below its minimum.
fn accepts(schema: &Value, value: &Value) -> bool {
    let fits = |name: &str| match name {
        "string" => value.is_string(),
        "boolean" => value.is_boolean(),
        "integer" => value.is_u64() || (value.is_i64() && schema.get("minimum").is_none()),
        "number" => value.is_number(),
        "array" => value.is_array(),
        "object" => value.is_object(),
        "null" => value.is_null(),
        _ => true,
    };
    let types = type_names(schema);
    let fixed_length = ["minItems", "maxItems"].map(|bound| schema.get(bound).and_then(Value::as_u64));
    let length_fits = match (value.as_array(), fixed_length) {
        (Some(items), [Some(least), Some(most)]) => (least..=most).contains(&(items.len() as u64)),
        _ => true,
    };
    (types.is_empty() || types.into_iter().any(fits)) && length_fits
}

fn type_names(schema: &Value) -> Vec<&str> {
    match schema.get("type") {
        Some(Value::String(name)) => vec![name],
        Some(Value::Array(names)) => names.iter().filter_map(Value::as_str).collect(),
        _ => Vec::new(),
    }
}

fn expected_type(schema: &Value) -> String {
    let word = |name: &str| match name {
        "string" => Some("a string".to_owned()),
        "boolean" => Some("true or false".to_owned()),
        "integer" if schema.get("minimum").is_some() => Some("a whole number, at least 0".to_owned()),
        "integer" => Some("a whole number".to_owned()),
        "number" => Some("a number".to_owned()),
        "array" => {
            Some(schema.get("minItems").map_or_else(|| "a list".to_owned(), |count| format!("a list of {count}")))
        }
        "object" => Some("a table".to_owned()),
        _ => None,
    };
    type_names(schema).into_iter().find_map(word).unwrap_or_default()
}

fn summary(schema: &Value) -> String {
    let text = schema.get("description").and_then(Value::as_str).unwrap_or("").lines().next().unwrap_or("");
    text.trim_end_matches('.').to_owned()
}

fn mismatch(expected: &str, found: &Value) -> Error {
    let kind = match found {
        Value::Null | Value::Bool(_) => "",
        Value::Number(_) => "the number ",
        Value::String(_) => "the string ",
        Value::Array(_) => "the list ",
        Value::Object(_) => "the table ",
    };
    let remedy = match found {
        Value::String(text) if text.parse::<f64>().is_ok() => format!("write {text} without quotes"),
        _ if expected.starts_with("a string") => format!("write it in quotes: \"{}\"", plain(found)),
        _ if expected.starts_with("a list") => format!("write it as a list: [{}]", shortened(&found.to_string())),
        _ if expected.starts_with("a table") => "write { key = value }".to_owned(),
        _ => format!("write {expected}; `titer schema` describes every key"),
    };
    Error::config(format!("expected {expected}, found {kind}`{}`", plain(found))).help(remedy)
}

fn unknown(name: &str, known: &[&str]) -> Error {
    let hint = did_you_mean(name, known.iter().copied());
    Error::config(format!("unknown key `{name}`{hint}")).help(format!("known keys: {}", known.join(", ")))
}

fn plain(value: &Value) -> String {
    shortened(&value.as_str().map_or_else(|| value.to_string(), str::to_owned))
}

fn join(prefix: &str, part: &str) -> String {
    if prefix.is_empty() { part.to_owned() } else { format!("{prefix}.{part}") }
}
