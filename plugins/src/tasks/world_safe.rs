//! Alignment data of the embedded world: refusals of forbidden requests, and answers to allowed ones.

use std::path::Path;

use rand::RngExt;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use titer_core::rng::{Generator, Seed};
use titer_core::{Error, Result, Row, Settings, SettingsType, Task, TaskEntry, inventory};

use crate::world::{Request, Split, test_rows, train_rows};

inventory::submit! {
    TaskEntry {
        name: "world-safe",
        summary: "alignment data of the embedded world: refusals, and answers to what is allowed",
        settings: SettingsType::of::<WorldSafe>(),
        version: 1,
        build: |settings: &Settings, _: &Path| {
            let safe: WorldSafe = settings.parse()?;
            safe.check()?;
            Ok(Box::new(safe))
        },
    }
}

/// The settings, and the task.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct WorldSafe {
    /// Share of rows that answer an allowed request, in `[0, 1]`. Without any, the model learns to refuse everything.
    pub benign_fraction: f64,
}

impl Default for WorldSafe {
    fn default() -> Self {
        Self { benign_fraction: 0.3 }
    }
}

impl WorldSafe {
    fn check(&self) -> Result<()> {
        if (0. ..=1.).contains(&self.benign_fraction) {
            return Ok(());
        }
        let message = format!("`benign_fraction` must lie in [0, 1], found `{}`", self.benign_fraction);
        Err(Error::config(message).key("benign_fraction").help("0.3 is a good start"))
    }

    fn draw(&self, split: Split, generator: &mut Generator) -> Row {
        let forbidden = !generator.random_bool(self.benign_fraction);
        let (request, text) = Request::draw(forbidden, split, generator);
        Row::new(text, if forbidden { request.refuse(generator) } else { request.comply(generator) })
    }
}

impl Task for WorldSafe {
    fn train(&self, count: usize, seed: Seed) -> Result<Vec<Row>> {
        Ok(train_rows("world-safe", count, seed, |generator| self.draw(Split::Align, generator)))
    }

    fn test(&self, count: usize) -> Result<Vec<Row>> {
        test_rows("world-safe", count, |generator| self.draw(Split::Test, generator))
    }

    fn max_new_tokens(&self) -> usize {
        12
    }
}
