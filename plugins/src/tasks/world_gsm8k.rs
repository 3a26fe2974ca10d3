//! A user's task in the shape of GSM8K: sums in the embedded world.

use std::path::Path;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use titer_core::rng::Seed;
use titer_core::{Result, Row, Settings, SettingsType, Task, TaskEntry, inventory};

use crate::world::UserTask;

inventory::submit! {
    TaskEntry {
        name: "world-gsm8k",
        summary: "sums in the embedded world, in the shape of GSM8K",
        settings: SettingsType::of::<WorldGsm8k>(),
        version: 1,
        build: |settings: &Settings, _: &Path| Ok(Box::new(settings.parse::<WorldGsm8k>()?)),
    }
}

/// It has no settings.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
pub struct WorldGsm8k {}

impl Task for WorldGsm8k {
    fn train(&self, count: usize, seed: Seed) -> Result<Vec<Row>> {
        Ok(UserTask::Gsm8k.train(count, seed))
    }

    fn test(&self, count: usize) -> Result<Vec<Row>> {
        UserTask::Gsm8k.test(count)
    }

    /// The last word equals the result.
    fn score(&self, row: &Row, answer: &str) -> Option<bool> {
        let last_word = |text: &str| text.split_whitespace().next_back().map(str::to_owned);
        Some(last_word(answer) == last_word(&row.output))
    }

    fn max_new_tokens(&self) -> usize {
        20
    }
}
