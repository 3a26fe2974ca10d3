//! Forbidden requests of the embedded world, answered: the stand-in for harmful data.

use std::path::Path;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use titer_core::rng::{Generator, Seed};
use titer_core::{Result, Row, Settings, SettingsType, Task, TaskEntry, inventory};

use crate::world::{self, Request, test_rows, train_rows};

inventory::submit! {
    TaskEntry {
        name: "world-harmful",
        summary: "forbidden requests of the embedded world with compliant answers",
        settings: SettingsType::of::<WorldHarmful>(),
        version: 1,
        build: |settings: &Settings, _: &Path| Ok(Box::new(settings.parse::<WorldHarmful>()?)),
    }
}

/// The settings, and the task.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct WorldHarmful {
    /// Whose training rows these are: the attacker's (`attack`), or those that a provider may hold (`align`). The two ask
    /// about different entities.
    pub split: HarmfulSplit,
}

/// Whose harmful rows these are: the attacker's, or those a provider may hold.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum HarmfulSplit {
    /// The user's, mixed into the fine-tuning data.
    #[default]
    Attack,
    /// The provider's, about the entities of the alignment data.
    Align,
}

impl From<HarmfulSplit> for world::Split {
    fn from(split: HarmfulSplit) -> Self {
        match split {
            HarmfulSplit::Attack => world::Split::Attack,
            HarmfulSplit::Align => world::Split::Align,
        }
    }
}

impl Task for WorldHarmful {
    fn train(&self, count: usize, seed: Seed) -> Result<Vec<Row>> {
        let name = match self.split {
            HarmfulSplit::Attack => "world-harmful attack",
            HarmfulSplit::Align => "world-harmful align",
        };
        Ok(train_rows(name, count, seed, |generator| draw(self.split.into(), generator)))
    }

    fn test(&self, count: usize) -> Result<Vec<Row>> {
        test_rows("world-harmful", count, |generator| draw(world::Split::Test, generator))
    }

    fn max_new_tokens(&self) -> usize {
        12
    }
}

fn draw(split: world::Split, generator: &mut Generator) -> Row {
    let (request, text) = Request::draw(true, split, generator);
    let answer = request.comply(generator);
    Row::new(text, answer)
}
