//! What is measured, by which judges, and the published values beside it.

use serde_json::{Map, Value};
use titer_core::bounds;
use titer_core::{JudgeEntry, Settings};

use super::attack::table_name;
use super::checks::{Resolver, explained};
use super::data::{Drawn, Use};
use crate::experiment::Probe;
use crate::experiment::config::{Config, EvaluateConfig, FineTuneMode, JudgeRef};
use crate::experiment::spec::{PluginSpec, of_rows};

impl Resolver<'_> {
    pub(super) fn evaluate(&mut self, config: &EvaluateConfig) -> (Vec<Probe>, Vec<PluginSpec>) {
        self.positive("evaluate.batch_size", config.batch_size, bounds::BATCH);
        self.positive("evaluate.max_new_tokens", config.max_new_tokens.unwrap_or(1), bounds::TOKENS);
        let mut probes = Vec::new();
        for (name, rows) in [("harmful", &config.harmful), ("benign", &config.benign)] {
            let rows = rows.as_ref().and_then(|rows| self.rows(&format!("evaluate.{name}"), rows, Use::Test));
            probes.extend(rows.map(|Drawn { spec: prompts, rows, task }| Probe {
                name,
                prompts,
                prompts_content: of_rows(&rows),
                max_new_tokens: config.max_new_tokens.unwrap_or_else(|| task.max_new_tokens()),
            }));
        }
        let no_settings = Map::new();
        let mut judges = Vec::new();
        for (index, judge) in config.judges.iter().enumerate() {
            let key = format!("evaluate.judges.{index}");
            let (name, name_key, settings) = match judge {
                JudgeRef::Name(name) => (name, key.clone(), &no_settings),
                JudgeRef::Table { judge, settings } => (judge, format!("{key}.judge"), settings),
            };
            judges.extend(self.judge(&key, &name_key, name, settings));
        }
        let judged = config.harmful.is_some() || config.benign.is_some();
        self.check(
            !judged || !config.judges.is_empty(),
            "evaluate.judges",
            "harmful and benign answers need a judge",
            "name one, as in judges = [\"…\"]; `titer list judges` shows them",
        );
        self.distinct("evaluate.judges", judges.iter().map(|judge| judge.name.clone()));
        (probes, judges)
    }

    /// Builds a judge, which checks its settings, and hashes its files.
    fn judge(&mut self, key: &str, name_key: &str, name: &str, written: &Map<String, Value>) -> Option<PluginSpec> {
        let settings = &self.placed::<JudgeEntry>(key, name, written)?;
        let (entry, spec) = self.plugin::<JudgeEntry>(key, name_key, name, settings)?;
        let judge = (entry.build)(&Settings::from(settings.clone()), self.source.folder());
        let judge = self.take(key, judge.map_err(|error| explained(name, error)));
        let files = self.take(key, judge?.files())?;
        let content = self.content(&files, |cx, file| cx.check_path::<JudgeEntry>(key, name, written, file));
        Some(PluginSpec { content: self.take(key, content)?, ..spec })
    }

    /// Published values must be of a method and a task that the experiment names; ratios and samples may be others.
    pub(super) fn published(&mut self, config: &Config) {
        let methods: Vec<&str> = config.methods.iter().map(|method| method.name.as_str()).collect();
        let tasks: Vec<&str> = config.fine_tune.tasks.iter().map(table_name).collect();
        let modes = [FineTuneMode::Double, FineTuneMode::Single, FineTuneMode::Full].map(FineTuneMode::name);
        for (index, published) in config.published.iter().enumerate() {
            let key = format!("published.{index}");
            self.take(&key, published.check());
            self.one_of(&format!("{key}.method"), &published.method, &methods);
            self.one_of(&format!("{key}.task"), &published.task, &tasks);
            if let Some(lora) = &published.lora {
                self.one_of(&format!("{key}.lora"), lora, &modes);
            }
        }
    }
}
