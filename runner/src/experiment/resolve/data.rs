//! Rows: tasks looked up, their files hashed, their rows drawn once.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};
use titer_core::bounds;
use titer_core::registry::{Entry, find};
use titer_core::rng::Seed;
use titer_core::{Error, Result, Row, Settings, Task, TaskEntry};

use super::checks::Resolver;
use crate::experiment::config::{StreamConfig, TaskRef};
use crate::experiment::spec::{PATH, PluginSpec, RowsSpec, StreamSpec, absolute};
use crate::hub::data::HubData;
use crate::{disk, hub, inputs};

impl Resolver<'_> {
    /// The settings of a plugin in which each path that does not come from the file is a whole one, since a plugin takes
    /// relative paths from the file's folder. Data sets of the hub are taken here, and are paths like others then.
    pub(super) fn placed<E: Entry>(
        &mut self,
        key: &str,
        name: &str,
        settings: &Map<String, Value>,
    ) -> Option<Map<String, Value>> {
        let mut settings = settings.clone();
        for (setting, schema) in schema::<E>(name)["properties"].as_object().into_iter().flatten() {
            let written = settings.get(setting);
            let Some(text) = written.or(schema.get("default")).and_then(Value::as_str).filter(|_| is_path(schema))
            else {
                continue;
            };
            let key = format!("{key}.{setting}");
            let outside = written.is_some() && self.source.folder_of(&key) == Path::new("");
            let whole = outside.then(|| std::path::absolute(text).ok()).flatten();
            let taken = self.hub_data(text);
            if let Some(path) = self.take(&key, taken)?.or(whole) {
                settings.insert(setting.clone(), Value::from(path.to_string_lossy()));
            }
        }
        Some(settings)
    }

    /// Where the data of the hub lies that `text` names, if it does.
    fn hub_data(&mut self, text: &str) -> Result<Option<PathBuf>> {
        let Some(data) = HubData::of(text)? else { return Ok(None) };
        if !self.hub_data.contains_key(text) {
            self.hub_data.insert(text.to_owned(), hub::data::fetch(&data)?);
        }
        Ok(self.hub_data.get(text).map(|(_, path)| path.clone()))
    }

    /// What to do if one of a plugin's files is missing: says where its path starts.
    pub(super) fn check_path<E: Entry>(
        &self,
        key: &str,
        name: &str,
        settings: &Map<String, Value>,
        file: &Path,
    ) -> String {
        let schema = schema::<E>(name);
        let start = settings.iter().filter(|(setting, _)| is_path(&schema["properties"][setting])).find_map(
            |(setting, value)| {
                let (key, path) = (format!("{key}.{setting}"), Path::new(value.as_str()?));
                let whole = absolute(&self.source.folder_of(&key).join(path));
                self.source.start_of(&key, path).filter(|_| whole == absolute(file))
            },
        );
        start.map_or_else(|| "check the path".to_owned(), |start| format!("check the path; {start}"))
    }

    /// Builds a task, which checks that its files are there, and hashes them.
    pub(super) fn task(
        &mut self,
        key: &str,
        name: &str,
        settings: &Map<String, Value>,
    ) -> Option<(PluginSpec, Box<dyn Task>)> {
        let (written, settings) = (settings, &self.placed::<TaskEntry>(key, name, settings)?);
        let (entry, spec) = self.plugin::<TaskEntry>(key, &format!("{key}.task"), name, settings)?;
        let task = (entry.build)(&Settings::from(settings.clone()), self.source.folder());
        let task = self.take(key, task)?;
        let content = self.content(&task.files(), |cx, file| cx.check_path::<TaskEntry>(key, name, written, file));
        Some((PluginSpec { content: self.take(key, content)?, ..spec }, task))
    }

    /// Rows to train on (`Use::Train`) or to ask (`Use::Test`). They are drawn once, so that missing or malformed data
    /// is known before any work is done.
    pub(super) fn rows(&mut self, key: &str, rows: &TaskRef, purpose: Use) -> Option<Drawn> {
        let built = self.task(key, &rows.task, &rows.settings);
        let count = rows
            .rows
            .ok_or_else(|| Error::config("the number of rows is missing").key("rows").help("add it, as in rows = 500"));
        let count = self.take(key, count)?;
        if !self.positive(&format!("{key}.rows"), count, bounds::ROWS) {
            return None;
        }
        let (task, built) = built?;
        let drawn = self.drawn(key, built.as_ref(), count, purpose)?;
        Some(Drawn { spec: RowsSpec { task, rows: count }, rows: drawn, task: built })
    }

    pub(super) fn stream(&mut self, name: &str, stream: &StreamConfig) -> Option<StreamSpec> {
        let key = format!("streams.{name}");
        if let Some(size) = stream.batch_size {
            self.positive(&format!("{key}.batch_size"), size, bounds::BATCH);
        }
        let rows = self.rows(&key, &stream.rows, Use::Train)?.spec;
        Some(StreamSpec { name: name.to_owned(), rows, batch_size: stream.batch_size })
    }

    pub(super) fn drawn(&mut self, key: &str, task: &dyn Task, count: usize, purpose: Use) -> Option<Vec<Row>> {
        let rows = match purpose {
            Use::Train => task.train(count, Seed::new(0)),
            Use::Test => task.test(count),
        };
        self.take(key, rows)
    }

    /// The hash of files. `remedy` says what to do about a missing one.
    pub(super) fn content(&mut self, files: &[PathBuf], remedy: impl Fn(&Self, &Path) -> String) -> Result<String> {
        inputs::content(files, |file| {
            if let Some(hash) = self.hashes.get(file) {
                return Ok(hash.clone());
            }
            let hash = disk::hash(file);
            let hash = hash.map_err(|error| if file.exists() { error } else { error.help(remedy(self, file)) })?;
            self.hashes.insert(file.to_owned(), hash.clone());
            Ok(hash)
        })
    }
}

/// The schema of a plugin's settings; null for an unknown plugin.
fn schema<E: Entry>(name: &str) -> Value {
    find::<E>(name).map(|entry| (entry.settings().schema)().to_value()).unwrap_or_default()
}

fn is_path(schema: &Value) -> bool {
    schema["format"] == PATH
}

/// What rows are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Use {
    /// To train on.
    Train,
    /// To ask and compare with.
    Test,
}

/// Rows of a task, drawn once.
pub(super) struct Drawn {
    pub(super) spec: RowsSpec,
    pub(super) rows: Vec<Row>,
    pub(super) task: Box<dyn Task>,
}
