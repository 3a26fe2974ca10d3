//! A user's task in the shape of SST2: sentiment of reviews in the embedded world.

use std::path::Path;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use titer_core::rng::Seed;
use titer_core::{Result, Row, Settings, SettingsType, Task, TaskEntry, inventory};

use crate::world::UserTask;

inventory::submit! {
    TaskEntry {
        name: "world-sst2",
        summary: "sentiment of reviews in the embedded world, in the shape of SST2",
        settings: SettingsType::of::<WorldSst2>(),
        version: 1,
        build: |settings: &Settings, _: &Path| Ok(Box::new(settings.parse::<WorldSst2>()?)),
    }
}

/// It has no settings.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
pub struct WorldSst2 {}

impl Task for WorldSst2 {
    fn train(&self, count: usize, seed: Seed) -> Result<Vec<Row>> {
        Ok(UserTask::Sst2.train(count, seed))
    }

    fn test(&self, count: usize) -> Result<Vec<Row>> {
        UserTask::Sst2.test(count)
    }

    /// The first word equals the label.
    fn score(&self, row: &Row, answer: &str) -> Option<bool> {
        let first_word = |text: &str| text.split_whitespace().next().map(str::to_owned);
        Some(first_word(answer) == first_word(&row.output))
    }

    fn labels(&self) -> Result<Vec<String>> {
        Ok(UserTask::Sst2.labels())
    }

    fn max_new_tokens(&self) -> usize {
        3
    }
}
