//! The JSON schema of configurations with the settings of every registered plugin: for editors and other programs.
//!
//! The types of the configuration leave settings open, since they know no plugin. Here each place that names a plugin gets
//! one alternative per plugin: `align = { defense = "vaccine" }` then takes Vaccine's settings and no other key.

use serde_json::{Map, Value, json};
use titer_core::registry::{Entry, all};
use titer_core::{DefenseEntry, JudgeEntry, ModelEntry, Result, Stage, TaskEntry};

use crate::experiment::config::Config;

/// The name that stands for no defense at alignment and after fine-tuning.
const NONE: &str = "none";

/// The schema.
///
/// # Errors
/// Two plugins of a kind share a name.
pub fn full() -> Result<Value> {
    let mut schema = Config::schema().to_value();
    let mut definitions = schema["$defs"].as_object().cloned().unwrap_or_default();
    for stage in [Stage::Align, Stage::FineTune, Stage::Post] {
        let acts =
            |entry: &DefenseEntry| entry.stages.contains(&stage) || (entry.name == NONE && stage != Stage::FineTune);
        let place = SchemaPlace { name: stage.name(), of: "DefenseRef", key: "defense" };
        place.fill::<DefenseEntry>(&mut definitions, acts)?;
        let mut method = definitions["MethodConfig"]["properties"][stage.name()].take();
        replace_reference(&mut method, "DefenseRef", stage.name());
        definitions["MethodConfig"]["properties"][stage.name()] = method;
    }
    definitions.remove("DefenseRef");
    SchemaPlace { name: "judge", of: "JudgeRef", key: "judge" }.fill::<JudgeEntry>(&mut definitions, |_| true)?;
    SchemaPlace { name: "rows", of: "TaskRef", key: "task" }.fill::<TaskEntry>(&mut definitions, |_| true)?;
    SchemaPlace { name: "stream", of: "StreamConfig", key: "task" }.fill::<TaskEntry>(&mut definitions, |_| true)?;
    SchemaPlace { name: "user_task", of: "UserTaskConfig", key: "task" }
        .fill::<TaskEntry>(&mut definitions, |_| true)?;
    for (of, name) in
        [("JudgeRef", "judge"), ("TaskRef", "rows"), ("StreamConfig", "stream"), ("UserTaskConfig", "user_task")]
    {
        definitions.remove(of);
        definitions.values_mut().for_each(|definition| replace_reference(definition, of, name));
        replace_reference(&mut schema["properties"], of, name);
    }
    shapes(&mut definitions)?;
    schema["$defs"] = definitions.into();
    Ok(schema)
}

/// A place of the configuration that names a plugin.
struct SchemaPlace {
    /// The name of its definition here.
    name: &'static str,
    /// The definition that it replaces, whose settings are open.
    of: &'static str,
    /// The key that holds the plugin's name.
    key: &'static str,
}

impl SchemaPlace {
    fn fill<E: Entry>(&self, definitions: &mut Map<String, Value>, fits: impl Fn(&E) -> bool) -> Result<()> {
        let SchemaPlace { name, of, key } = *self;
        let open = definitions[of].clone();
        // A plugin by its bare name, or a table.
        let branches = open["anyOf"].as_array();
        let table = branches.map_or(&open, |branches| branches.last().unwrap_or(&open));
        let own = table["properties"].as_object().cloned().unwrap_or_default();
        let entries: Vec<&E> = all::<E>()?.into_iter().filter(|entry| fits(entry)).collect();
        let names: Vec<&str> = entries.iter().map(|entry| entry.name()).collect();
        let mut choices = Vec::new();
        for entry in &entries {
            let mut properties = settings(*entry, definitions);
            properties.extend(own.clone());
            let definition = format!("{name}.{}", entry.name());
            definitions.insert(
                definition.clone(),
                json!({ "description": entry.summary(), "properties": properties, "additionalProperties": false }),
            );
            choices.push(json!({
                "if": { "properties": { key: { "const": entry.name() } }, "required": [key] },
                "then": { "$ref": format!("#/$defs/{definition}") }
            }));
        }
        let mut named = own[key].clone();
        named["enum"] = json!(names);
        let table = json!({ "type": "object", "properties": { key: named }, "required": [key], "allOf": choices });
        let mut closed = match branches {
            None => table,
            Some(_) => json!({ "anyOf": [{ "type": "string", "enum": names }, table] }),
        };
        closed["description"] = open["description"].clone();
        definitions.insert(name.to_owned(), closed);
        Ok(())
    }
}

/// The properties of a plugin's settings with their defaults. Types that they refer to become definitions.
fn settings<E: Entry>(entry: &E, definitions: &mut Map<String, Value>) -> Map<String, Value> {
    let mut schema = (entry.settings().schema)().to_value();
    let defaults = (entry.settings().defaults)();
    let prefix = format!("{}.{}", E::KIND, entry.name());
    let own: Vec<String> = schema["$defs"].as_object().into_iter().flatten().map(|(name, _)| name.clone()).collect();
    for name in &own {
        replace_reference(&mut schema, name, &format!("{prefix}.{name}"));
    }
    for name in &own {
        definitions.insert(format!("{prefix}.{name}"), schema["$defs"][name].clone());
    }
    let mut properties = schema["properties"].as_object().cloned().unwrap_or_default();
    for (name, property) in &mut properties {
        property["default"] = defaults[name].clone();
    }
    if E::KIND == DefenseEntry::KIND {
        properties.insert(
            "fidelity".to_owned(),
            json!({
                "enum": ["correct", "code-exact"], "default": "correct",
                "description": "`code-exact` copies what the published code does where that differs from the method."
            }),
        );
    }
    properties
}

/// The sizes of a model that is pretrained, by the model.
fn shapes(definitions: &mut Map<String, Value>) -> Result<()> {
    let entries = all::<ModelEntry>()?;
    let mut choices = Vec::new();
    for entry in &entries {
        let definition = format!("shape.{}", entry.name);
        let properties = settings(*entry, definitions);
        definitions.insert(
            definition.clone(),
            json!({ "description": entry.summary, "properties": properties, "additionalProperties": false }),
        );
        choices.push(json!({
            "if": { "properties": { "model": { "const": entry.name } }, "required": ["model"] },
            "then": { "properties": { "shape": { "$ref": format!("#/$defs/{definition}") } } }
        }));
    }
    let names: Vec<&str> = entries.iter().map(|entry| entry.name).collect();
    definitions["BaseConfig"]["properties"]["model"]["enum"] = json!(names);
    definitions["BaseConfig"]["allOf"] = choices.into();
    Ok(())
}

/// Lets every reference to the definition `from` point to the definition `to`.
fn replace_reference(schema: &mut Value, from: &str, to: &str) {
    match schema {
        Value::Object(map) => {
            if map.get("$ref").is_some_and(|target| *target == format!("#/$defs/{from}")) {
                map.insert("$ref".to_owned(), format!("#/$defs/{to}").into());
            }
            map.values_mut().for_each(|value| replace_reference(value, from, to));
        }
        Value::Array(items) => items.iter_mut().for_each(|item| replace_reference(item, from, to)),
        _ => {}
    }
}
