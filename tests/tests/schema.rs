//! `titer schema`: every configuration that the program takes fits, and settings are those of the plugin that is named.

use std::path::Path;

use serde_json::{Value, json};
use titer::reference::schema;
use titer_core::registry::all;
use titer_core::{DefenseEntry, Entry, JudgeEntry, ModelEntry, TaskEntry};
use titer_tests::cli::{SMALL, titer};

/// Why `value` does not fit, in the words that our schema uses. A keyword that is not known here fails the test.
fn misfits(root: &Value, schema: &Value, value: &Value, at: &str) -> Vec<String> {
    let mut found = Vec::new();
    let fits = |schema: &Value, value: &Value| misfits(root, schema, value, at).is_empty();
    let list = |schema: &Value| schema.as_array().cloned().unwrap_or_default();
    for (keyword, rule) in schema.as_object().into_iter().flatten() {
        let holds = match keyword.as_str() {
            "$schema" | "$defs" | "title" | "description" | "default" | "format" | "then" => true,
            "$ref" => {
                let target = rule.as_str().expect("a reference").trim_start_matches('#');
                let target = root.pointer(target).unwrap_or_else(|| panic!("nothing at {target}"));
                found.extend(misfits(root, target, value, at));
                true
            }
            "allOf" => {
                for branch in list(rule) {
                    found.extend(misfits(root, &branch, value, at));
                }
                true
            }
            "if" => {
                !fits(rule, value) || {
                    found.extend(misfits(root, &schema["then"], value, at));
                    true
                }
            }
            "anyOf" => list(rule).iter().any(|branch| fits(branch, value)),
            "oneOf" => list(rule).iter().filter(|branch| fits(branch, value)).count() == 1,
            "enum" => list(rule).contains(value),
            "const" => rule == value,
            "type" => {
                let is = |kind: &Value| match kind.as_str().expect("a type") {
                    "null" => value.is_null(),
                    "string" => value.is_string(),
                    "boolean" => value.is_boolean(),
                    "integer" => value.is_u64() || value.is_i64(),
                    "number" => value.is_number(),
                    "array" => value.is_array(),
                    "object" => value.is_object(),
                    other => panic!("type {other}"),
                };
                if rule.is_array() { list(rule).iter().any(is) } else { is(rule) }
            }
            "minimum" | "maximum" => value.as_f64().is_none_or(|number| {
                let bound = rule.as_f64().expect("a number");
                if keyword == "minimum" { number >= bound } else { number <= bound }
            }),
            "minItems" => value.as_array().is_none_or(|items| items.len() as u64 >= rule.as_u64().expect("a count")),
            "maxItems" => value.as_array().is_none_or(|items| items.len() as u64 <= rule.as_u64().expect("a count")),
            "items" => {
                for (index, item) in value.as_array().into_iter().flatten().enumerate() {
                    found.extend(misfits(root, rule, item, &format!("{at}.{index}")));
                }
                true
            }
            "required" => list(rule).iter().all(|key| value.get(key.as_str().expect("a key")).is_some()),
            "properties" => {
                for (key, rule) in rule.as_object().expect("a table") {
                    if let Some(value) = value.get(key) {
                        found.extend(misfits(root, rule, value, &format!("{at}.{key}")));
                    }
                }
                true
            }
            "additionalProperties" => {
                let known = |key: &String| schema["properties"].get(key).is_some();
                for (key, value) in value.as_object().into_iter().flatten().filter(|(key, _)| !known(key)) {
                    match rule {
                        Value::Bool(false) => found.push(format!("{at}.{key} is unknown")),
                        Value::Bool(true) => {}
                        rule => found.extend(misfits(root, rule, value, &format!("{at}.{key}"))),
                    }
                }
                true
            }
            other => panic!("the keyword {other}"),
        };
        if !holds {
            found.push(format!("{at}: {keyword} {rule} does not take {value}"));
        }
    }
    found
}

fn problems(config: &Value) -> Vec<String> {
    let schema = schema::full().expect("no name twice");
    misfits(&schema, &schema, config, "")
}

/// The small experiment with one change at a JSON pointer.
fn changed(pointer: &str, value: Value) -> Value {
    let mut config: Value = toml::from_str(SMALL).expect("TOML");
    *config.pointer_mut(pointer).unwrap_or_else(|| panic!("nothing at {pointer}")) = value;
    config
}

#[test]
fn it_is_what_the_command_prints() {
    let output = titer().arg("schema").output().expect("titer runs");
    let printed: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    // The example defense of the documentation is linked into the tests only.
    let mut ours = schema::full().expect("no name twice");
    assert!(ours["$defs"].as_object_mut().expect("definitions").remove("align.sam").is_some());
    assert_eq!(printed["$defs"]["align.vaccine"], ours["$defs"]["align.vaccine"]);
    assert_eq!(printed["properties"], ours["properties"]);
}

#[test]
fn every_shipped_configuration_fits() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs");
    let mut seen = 0;
    for folder in [folder.clone(), folder.join("paper")] {
        for entry in std::fs::read_dir(folder).expect("a folder") {
            let path = entry.expect("an entry").path();
            if path.extension().is_some_and(|extension| extension == "toml") {
                let config = toml::from_str(&std::fs::read_to_string(&path).expect("text")).expect("TOML");
                assert_eq!(problems(&config), [""; 0], "{}", path.display());
                seen += 1;
            }
        }
    }
    assert!(seen > 8, "only {seen} configurations");
}

/// A table that names the plugin with all its default settings.
fn defaults<E: Entry>(entry: &E, key: &str) -> Value {
    let mut table = (entry.settings().defaults)();
    // TOML has no null: what has no default is left out.
    table.as_object_mut().expect("a table").retain(|_, value| !value.is_null());
    table[key] = entry.name().into();
    table
}

/// Every plugin takes its own settings, in every place where it may stand, and no other.
fn takes<E: Entry>(key: &str, pointer: &str, other: bool, fits: impl Fn(&E) -> bool) {
    for entry in all::<E>().expect("no name twice") {
        let table = defaults(entry, key);
        let found = problems(&changed(pointer, table.clone()));
        assert_eq!(found.is_empty(), fits(entry), "{} at {pointer}: {found:?}", entry.name());
        if fits(entry) {
            let mut more = table;
            more["no_such_setting"] = 1.into();
            assert!(!problems(&changed(pointer, more)).is_empty(), "{} at {pointer} takes anything", entry.name());
            if other {
                assert_eq!(problems(&changed(pointer, entry.name().into())), [""; 0], "{} by its name", entry.name());
            }
        }
    }
}

#[test]
fn every_plugin_takes_its_own_settings_where_it_may_stand() {
    use titer_core::Stage;
    let at = |stage: Stage| move |entry: &DefenseEntry| entry.stages.contains(&stage);
    takes::<DefenseEntry>("defense", "/methods/0/align", true, at(Stage::Align));
    let fine_tune = SMALL.replace("align = \"sft\"", "align = \"sft\"\nfine_tune = \"sft\"\npost = \"none\"");
    assert_eq!(problems(&toml::from_str(&fine_tune).expect("TOML")), [""; 0]);
    takes::<TaskEntry>("task", "/align/data/0", false, |_| true);
    takes::<TaskEntry>("task", "/fine_tune/tasks/0", false, |_| true);
    takes::<TaskEntry>("task", "/evaluate/harmful", false, |_| true);
    takes::<JudgeEntry>("judge", "/evaluate/judges/0", true, |_| true);
    for entry in all::<ModelEntry>().expect("no name twice") {
        let mut config = changed("/base/shape", json!({ "hidden_size": 16 }));
        config["base"]["model"] = entry.name.into();
        assert_eq!(problems(&config), [""; 0], "{}", entry.name);
        config["base"]["shape"] = json!({ "no_such_size": 16 });
        assert!(!problems(&config).is_empty(), "{}", entry.name);
    }
}

#[test]
fn settings_follow_the_name_and_stages_count() {
    let align = |value: Value| problems(&changed("/methods/0/align", value)).is_empty();
    assert!(align(json!({ "defense": "vaccine", "rho": 2.0, "fidelity": "code-exact" })));
    assert!(!align(json!({ "defense": "vaccine", "rho": "2" })));
    assert!(!align(json!({ "defense": "vaccine", "lambda": 2.0 })));
    assert!(!align(json!("lisa")), "Lisa acts at fine-tuning");
    assert!(!align(json!("vacine")));
    let mut config = changed("/methods/0/align", json!("sft"));
    for (stage, value, fits) in [("fine_tune", "lisa", true), ("fine_tune", "none", false), ("post", "none", true)] {
        config["methods"][0].as_object_mut().expect("a table").retain(|key, _| key == "name" || key == "align");
        config["methods"][0][stage] = value.into();
        assert_eq!(problems(&config).is_empty(), fits, "{stage} = {value}");
    }
}
