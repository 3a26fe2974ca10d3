//! Documents of the embedded world, for pretraining.

use std::path::Path;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use titer_core::rng::{Generator, Seed};
use titer_core::{Result, Row, Settings, SettingsType, Task, TaskEntry, inventory};

use crate::world::{document, test_rows, train_rows, vocabulary};

inventory::submit! {
    TaskEntry {
        name: "world-text",
        summary: "documents of the embedded world, to pretrain a base model on",
        settings: SettingsType::of::<WorldText>(),
        version: 1,
        build: |settings: &Settings, _: &Path| Ok(Box::new(settings.parse::<WorldText>()?)),
    }
}

/// It has no settings.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
pub struct WorldText {}

impl Task for WorldText {
    fn train(&self, count: usize, seed: Seed) -> Result<Vec<Row>> {
        Ok(train_rows("world-text", count, seed, draw))
    }

    fn test(&self, count: usize) -> Result<Vec<Row>> {
        test_rows("world-text", count, draw)
    }

    fn max_new_tokens(&self) -> usize {
        12
    }

    fn vocabulary(&self) -> Option<Vec<String>> {
        Some(vocabulary())
    }
}

fn draw(generator: &mut Generator) -> Row {
    Row::new("", document(generator))
}
