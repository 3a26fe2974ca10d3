//! Allowed requests of the embedded world, which look like the forbidden ones: probes of helpfulness and over-refusal.

use std::path::Path;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use titer_core::rng::{Generator, Seed};
use titer_core::{Result, Row, Settings, SettingsType, Task, TaskEntry, inventory};

use crate::world::{Request, Split, test_rows, train_rows};

inventory::submit! {
    TaskEntry {
        name: "world-benign",
        summary: "allowed requests of the embedded world: probes of helpfulness and over-refusal",
        settings: SettingsType::of::<WorldBenign>(),
        version: 1,
        build: |settings: &Settings, _: &Path| Ok(Box::new(settings.parse::<WorldBenign>()?)),
    }
}

/// It has no settings.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
pub struct WorldBenign {}

impl Task for WorldBenign {
    fn train(&self, count: usize, seed: Seed) -> Result<Vec<Row>> {
        Ok(train_rows("world-benign", count, seed, |generator| draw(Split::Align, generator)))
    }

    fn test(&self, count: usize) -> Result<Vec<Row>> {
        test_rows("world-benign", count, |generator| draw(Split::Test, generator))
    }

    fn max_new_tokens(&self) -> usize {
        12
    }
}

fn draw(split: Split, generator: &mut Generator) -> Row {
    let (request, text) = Request::draw(false, split, generator);
    let answer = request.comply(generator);
    Row::new(text, answer)
}
