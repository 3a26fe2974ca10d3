//! The layers of a configuration and the origin of each value.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use figment::Figment;
use figment::providers::Serialized;
use serde_json::{Map, Value};
use titer_core::Error;
use titer_core::bounds::{self, shortened};
use toml::de::{DeTable, DeValue};

use super::exclusive::{EXCLUSIVE, Exclusive};

/// The prefix of environment variables that override a key; `__` stands for the dot between tables.
const PREFIX: &str = "TITER_";
/// The variables of that prefix that are no configuration keys.
const RESERVED: [&str; 6] =
    ["TITER_CACHE_DIR", "TITER_LOG", "TITER_LOG_FORMAT", "TITER_GOLDEN", "TITER_DATA", "TITER_SIMD"];

/// The most parts that a key has from outside the file.
const DEEPEST: usize = 16;

/// The merged values of file, environment and command line, with the place each one came from.
#[derive(Debug, Clone)]
pub struct Source {
    path: PathBuf,
    text: String,
    value: Value,
    /// Keys in the file and their lines, from 1.
    lines: BTreeMap<String, usize>,
    /// What was set from elsewhere, in the order it was laid over the file.
    overrides: Vec<Override>,
}

/// A key set from outside the file.
#[derive(Debug, Clone)]
struct Override {
    key: String,
    layer: Layer,
    /// What set it, for people.
    origin: String,
}

/// What lies over the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Layer {
    Environment,
    CommandLine,
}

impl Source {
    /// Reads the file and lays the environment and then `--set` assignments over it.
    ///
    /// # Errors
    /// The file cannot be read or parsed, or an assignment is malformed.
    pub fn read(
        path: &Path,
        environment: impl IntoIterator<Item = (String, String)>,
        assignments: &[String],
    ) -> Result<Self, Error> {
        let bytes = bounds::read_file("read the configuration", path, bounds::CONFIG_BYTES)?;
        let mut source = Self::parse(path, bounds::text(&bytes, path)?.to_owned())?;
        let mut variables: Vec<_> = environment.into_iter().collect();
        variables.sort();
        for (name, text) in variables {
            if let Some(key) = name.strip_prefix(PREFIX).filter(|_| !RESERVED.contains(&name.as_str())) {
                if text.len() as u64 > bounds::CONFIG_BYTES {
                    return Err(Error::config(format!("the environment variable {name} is too long"))
                        .help("write long values into the configuration file"));
                }
                let key = key.to_lowercase().replace("__", ".");
                source.set(Layer::Environment, &key, &text, format!("environment variable {name}"))?;
            }
        }
        for assignment in assignments {
            let (key, text) = assignment.split_once('=').ok_or_else(|| {
                Error::config(format!("`{assignment}` is not an assignment"))
                    .at("from", "--set")
                    .help("write --set key=value, as in --set fine_tune.samples=500")
            })?;
            source.set(Layer::CommandLine, key.trim(), text.trim(), format!("--set {assignment}"))?;
        }
        Ok(source)
    }

    /// Parses `text` by the extension of `path`.
    ///
    /// # Errors
    /// The extension is unknown or the text is malformed.
    pub fn parse(path: &Path, text: String) -> Result<Self, Error> {
        let extension = path.extension().and_then(std::ffi::OsStr::to_str).unwrap_or("");
        let (value, lines) = match extension {
            "toml" => toml_value(&text),
            "yaml" | "yml" => yaml_value(&text),
            _ => Err(Error::config(format!("`{}` is neither TOML nor YAML by its name", path.display()))
                .help("name the file .toml, .yaml or .yml")),
        }
        .map_err(|error| with_text(error.file(path), &text))?;
        Ok(Self { path: path.to_owned(), text, value, lines, overrides: Vec::new() })
    }

    /// The merged values.
    pub fn value(&self) -> &Value {
        &self.value
    }

    /// The folder that relative paths in the file start from.
    pub fn folder(&self) -> &Path {
        match self.path.parent() {
            Some(folder) if folder != Path::new("") => folder,
            _ => Path::new("."),
        }
    }

    /// The folder that a relative path under `key` starts from: the file's, or the working directory if the value comes from
    /// the command line or the environment, where paths are written as the shell completes them.
    pub fn folder_of(&self, key: &str) -> &Path {
        if self.origin(key).is_some() { Path::new("") } else { self.folder() }
    }

    /// Where the relative path that is the value of `key` starts, for people; nothing for a whole path.
    pub fn start_of(&self, key: &str, path: &Path) -> Option<String> {
        let start = std::path::absolute(self.folder_of(key).join(".")).ok().filter(|_| path.is_relative())?;
        let which = match self.origin(key) {
            Some(origin) => format!("the working directory, since it is from {}", shortened(origin)),
            None => "the configuration's folder".to_owned(),
        };
        Some(format!("`{}` starts at {}, {which}", path.display(), start.display()))
    }

    /// What set `key` from outside of the file, if anything did.
    fn origin(&self, key: &str) -> Option<&str> {
        self.overrides.iter().rev().find(|set| is_within(key, &set.key)).map(|set| set.origin.as_str())
    }

    /// Adds to an error under the key `prefix` the whole key and the place where the user wrote it.
    pub fn locate(&self, prefix: &str, error: Error) -> Error {
        let inner = error.place("key").unwrap_or("");
        let dot = if prefix.is_empty() || inner.is_empty() { "" } else { "." };
        let key = format!("{prefix}{dot}{inner}");
        let mut located = Error::new(error.kind(), error.message());
        if !key.is_empty() {
            located = located.key(key.clone());
        }
        for (what, value) in error.places().iter().filter(|(what, _)| !["key", "file"].contains(what)) {
            located = located.at(what, value.clone());
        }
        if let Some(help) = error.remedy() {
            located = located.help(help);
        }
        let file = error.place("file").map(str::to_owned);
        let located = located.source(error);
        if let Some(file) = file {
            // The error is about another file, such as a data file; the configuration only names it.
            return located.at("file", file).at("configuration", self.path.display().to_string());
        }
        if let Some(origin) = self.origin(&key) {
            return located.at("from", shortened(origin));
        }
        let located = located.file(&self.path);
        match self.line(&key) {
            Some(line) => with_text(located.at("line", line.to_string()), &self.text),
            None => located,
        }
    }

    /// The line of `key` in the file, or of the nearest table around it.
    fn line(&self, key: &str) -> Option<usize> {
        let mut key = key;
        loop {
            if let Some(line) = self.lines.get(key) {
                return Some(*line);
            }
            key = key.rsplit_once('.')?.0;
        }
    }

    /// Sets one key from outside the file. The text is TOML if it parses as such and a plain string otherwise.
    fn set(&mut self, layer: Layer, key: &str, text: &str, origin: String) -> Result<(), Error> {
        let parts: Vec<&str> = key.split('.').collect();
        if parts.len() > DEEPEST || parts.contains(&"") {
            return Err(Error::config(format!("`{}` is not a key", shortened(key)))
                .at("from", shortened(&origin))
                .help(format!("write names of tables and keys with dots between them, at most {DEEPEST} of them")));
        }
        let value = match toml::from_str::<toml::Table>(&format!("value = {text}")) {
            Ok(mut table) => table.remove("value").map_or(Ok(Value::Null), |value| json(value, key)),
            Err(_) => Ok(Value::from(text)),
        };
        let value = value.map_err(|error| error.at("from", shortened(&origin)))?;
        self.give_way(layer, key, &value);
        let (merged_key, value) = self.merged(key, value).map_err(|message| {
            Error::config(message)
                .at("from", shortened(&origin))
                .help("name a key of a table, or an index within a list, as in methods.0.name")
        })?;
        let merged = Figment::from(Serialized::defaults(&self.value)).merge(Serialized::default(&merged_key, value));
        self.value = merged.extract().map_err(|error| {
            Error::config(error.to_string())
                .at("from", shortened(&origin))
                .help("write a value of the key's type; see `titer schema`")
        })?;
        self.overrides.push(Override { key: key.to_owned(), layer, origin });
        Ok(())
    }

    /// Removes what the layers below `layer` say instead of `key`, where only one of two can be given. What the same layer
    /// says stays: it contradicts itself, which is told.
    fn give_way(&mut self, layer: Layer, key: &str, value: &Value) {
        let mut set = Vec::new();
        for (end, _) in key.match_indices('.') {
            set.push(key[..end].to_owned());
        }
        keys_of(key, value, &mut set);
        for (table, name) in set.iter().filter_map(|key| key.rsplit_once('.')) {
            let last = table.rsplit('.').next().unwrap_or_default();
            for Exclusive { sides: [left, right], .. } in EXCLUSIVE.iter().filter(|keys| keys.table == last) {
                let others = if name == left[0] { right } else { left };
                if ![left[0], right[0]].contains(&name) {
                    continue;
                }
                for other in others.iter().map(|other| join(table, other)) {
                    if !self.overrides.iter().any(|set| set.layer == layer && is_within(&set.key, &other)) {
                        remove(&mut self.value, &other);
                    }
                }
            }
        }
    }

    /// What sets `key`, as figment merges it: a key and a value. Layers replace lists as a whole, so a key that leads into a
    /// list stands for the list with that one item changed. Says why if there is no such place.
    fn merged(&self, key: &str, value: Value) -> Result<(String, Value), String> {
        let mut at = &self.value;
        for (end, _) in key.match_indices('.') {
            let name = key[..end].rsplit('.').next().unwrap_or_default();
            match at.get(name) {
                None | Some(Value::Null) => break,
                Some(Value::Object(_)) => at = &at[name],
                Some(Value::Array(items)) => {
                    let mut list = Value::Array(items.clone());
                    let (mut slot, mut place) = (&mut list, key[..end].to_owned());
                    for part in key[end + 1..].split('.') {
                        slot = step_into(slot, &place, part)?;
                        place = join(&place, part);
                    }
                    *slot = value;
                    return Ok((key[..end].to_owned(), list));
                }
                Some(other) => return Err(no_table(&key[..end], other)),
            }
        }
        Ok((key.to_owned(), value))
    }
}

/// Whether `key` is `table` or stands under it.
fn is_within(key: &str, table: &str) -> bool {
    key.strip_prefix(table).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
}

/// `key` and every key of the tables that are its value.
fn keys_of(key: &str, value: &Value, keys: &mut Vec<String>) {
    keys.push(key.to_owned());
    for (name, value) in value.as_object().into_iter().flatten() {
        keys_of(&join(key, name), value, keys);
    }
}

/// Removes `key`, if it is there.
fn remove(value: &mut Value, key: &str) {
    match key.split_once('.') {
        Some((table, rest)) => value.get_mut(table).into_iter().for_each(|value| remove(value, rest)),
        None => drop(value.as_object_mut().and_then(|table| table.remove(key))),
    }
}

/// The place called `part` under `value`, made if it is a new key. `place` is the key of `value`.
fn step_into<'a>(value: &'a mut Value, place: &str, part: &str) -> Result<&'a mut Value, String> {
    if value.is_null() {
        *value = Value::Object(Map::new());
    }
    match value {
        Value::Object(map) => Ok(map.entry(part).or_insert(Value::Null)),
        Value::Array(items) => {
            let count = items.len();
            let item = part.parse::<usize>().ok().and_then(|index| items.get_mut(index));
            item.ok_or_else(|| {
                format!("the list `{place}` has no entry `{}`: it has {count}, counted from 0", shortened(part))
            })
        }
        other => Err(no_table(place, other)),
    }
}

fn no_table(place: &str, value: &Value) -> String {
    format!("`{place}` is `{}`, which is no table and has no keys", shortened(value.to_string().trim_matches('"')))
}

/// The value of TOML at `key` as JSON, which has neither infinite numbers nor `nan`.
fn json(value: toml::Value, key: &str) -> Result<Value, Error> {
    Ok(match value {
        toml::Value::Float(number) if !number.is_finite() => {
            return Err(Error::config(format!("expected a finite number, found `{number}`"))
                .key(key)
                .help("write a number that is neither infinite nor `nan`"));
        }
        toml::Value::Array(items) => {
            let items = items.into_iter().enumerate();
            items.map(|(index, item)| json(item, &join(key, &index.to_string()))).collect::<Result<_, _>>()?
        }
        toml::Value::Table(table) => {
            let entries = table.into_iter();
            let entry = |(name, value): (String, _)| Ok((name.clone(), json(value, &join(key, &name))?));
            Value::Object(entries.map(entry).collect::<Result<_, Error>>()?)
        }
        toml::Value::String(text) => text.into(),
        toml::Value::Integer(number) => number.into(),
        toml::Value::Float(number) => number.into(),
        toml::Value::Boolean(truth) => truth.into(),
        // No key takes a time; it is shown as it was written.
        toml::Value::Datetime(time) => time.to_string().into(),
    })
}

/// Shows the line that the error is about.
fn with_text(error: Error, text: &str) -> Error {
    let line = error.place("line").and_then(|line| line.parse::<usize>().ok());
    match line.and_then(|line| text.lines().nth(line.saturating_sub(1))) {
        Some(text) => error.at("text", shortened(text.trim_end())),
        None => error,
    }
}

type Parsed = (Value, BTreeMap<String, usize>);

fn toml_value(text: &str) -> Result<Parsed, Error> {
    let malformed = |error: toml::de::Error| {
        let located = Error::config(format!("the file is not valid TOML: {}", error.message()))
            .help("mend the line shown; texts stand in double quotes");
        match error.span() {
            Some(span) => located.at("line", LineStarts::of(text).line(span.start).to_string()),
            None => located,
        }
    };
    let value: toml::Table = toml::from_str(text).map_err(malformed)?;
    let mut lines = BTreeMap::new();
    let starts = LineStarts::of(text);
    toml_lines(&starts, DeTable::parse(text).map_err(malformed)?.get_ref(), "", &mut lines);
    let value = json(value.into(), "").map_err(|error| match error.place("key").and_then(|key| lines.get(key)) {
        Some(line) => error.at("line", line.to_string()),
        None => error,
    })?;
    Ok((value, lines))
}

fn toml_lines(starts: &LineStarts, table: &DeTable<'_>, prefix: &str, lines: &mut BTreeMap<String, usize>) {
    for (name, value) in table {
        let key = join(prefix, name.get_ref());
        lines.insert(key.clone(), starts.line(name.span().start));
        match value.get_ref() {
            DeValue::Table(table) => toml_lines(starts, table, &key, lines),
            DeValue::Array(items) => {
                for (index, item) in items.iter().enumerate() {
                    let key = join(&key, &index.to_string());
                    lines.insert(key.clone(), starts.line(item.span().start));
                    if let DeValue::Table(table) = item.get_ref() {
                        toml_lines(starts, table, &key, lines);
                    }
                }
            }
            _ => {}
        }
    }
}

fn yaml_value(text: &str) -> Result<Parsed, Error> {
    let value: Value = serde_norway::from_str(text).map_err(|error| {
        let located = Error::config(format!("the file is not valid YAML: {error}"))
            .help("mend the line shown; indentation makes tables, brackets close");
        match error.location() {
            Some(location) => located.at("line", location.line().to_string()),
            None => located,
        }
    })?;
    Ok((value, yaml_lines(text)))
}

/// The lines of keys in block style, told by their indentation; the parser does not say. A key within `{…}` is found
/// at the line of the block around it.
fn yaml_lines(text: &str) -> BTreeMap<String, usize> {
    let mut lines = BTreeMap::new();
    // The open blocks: the column of their keys, and their path.
    let mut open: Vec<(usize, String)> = Vec::new();
    let mut items: BTreeMap<String, usize> = BTreeMap::new();
    for (number, line) in text.lines().enumerate() {
        let mut rest = line.trim_start();
        let mut column = line.len() - rest.len();
        if rest.is_empty() || rest.starts_with('#') {
            continue;
        }
        while let Some(item) = rest.strip_prefix("- ") {
            // An item may stand in the column of the key that holds the list.
            open.retain(|(start, path)| *start < column || (*start == column && !is_item(path)));
            let list = open.last().map_or("", |(_, path)| path).to_owned();
            let index = items.entry(list.clone()).and_modify(|index| *index += 1).or_insert(0);
            let path = join(&list, &index.to_string());
            lines.insert(path.clone(), number + 1);
            open.push((column, path));
            rest = item.trim_start();
            column = line.len() - rest.len();
        }
        if let Some((key, _)) = rest.split_once(':').filter(|(key, _)| !key.contains(['{', '"', ' ', '['])) {
            open.retain(|(start, _)| *start < column);
            let path = join(open.last().map_or("", |(_, path)| path), key);
            lines.insert(path.clone(), number + 1);
            open.push((column, path));
        }
    }
    lines
}

fn is_item(path: &str) -> bool {
    path.rsplit('.').next().is_some_and(|part| part.parse::<usize>().is_ok())
}

fn join(prefix: &str, part: &str) -> String {
    if prefix.is_empty() { part.to_owned() } else { format!("{prefix}.{part}") }
}

/// Where the lines of a text start: a file of many keys would else be read once for each.
struct LineStarts(Vec<usize>);

impl LineStarts {
    fn of(text: &str) -> Self {
        Self(std::iter::once(0).chain(text.match_indices('\n').map(|(at, _)| at + 1)).collect())
    }

    /// The line that holds the byte `offset`, from 1.
    fn line(&self, offset: usize) -> usize {
        self.0.partition_point(|start| *start <= offset).max(1)
    }
}
