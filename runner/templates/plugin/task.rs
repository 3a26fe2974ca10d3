//! Sums of two one-digit numbers: a user's task with a right answer.

use std::path::Path;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use titer_core::rng::{Seed, permutation};
use titer_core::{Error, Result, Row, Settings, SettingsType, Task, TaskEntry, inventory};

titer_core::plugin!();

inventory::submit! {
    TaskEntry {
        name: "my-plugin",
        summary: "sums of two numbers",
        settings: SettingsType::of::<MyPlugin>(),
        version: 1,
        build: |settings: &Settings, _: &Path| Ok(Box::new(settings.parse::<MyPlugin>()?)),
    }
}

/// The settings, and the task.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct MyPlugin {
    /// Both numbers are below this.
    pub below: usize,
}

impl Default for MyPlugin {
    fn default() -> Self {
        Self { below: 40 }
    }
}

impl MyPlugin {
    /// `count` of the sums with these numbers, of which every fifth is held out.
    fn rows(&self, count: usize, held_out: bool, seed: Seed) -> Result<Vec<Row>> {
        let all = permutation(self.below * self.below, &mut seed.generator());
        let rows: Vec<Row> = all
            .into_iter()
            .filter(|pair| (pair % 5 == 0) == held_out)
            .map(|pair| (pair / self.below, pair % self.below))
            .map(|(a, b)| Row::new(format!("what is {a} plus {b} ?"), (a + b).to_string()))
            .take(count)
            .collect();
        if rows.len() == count {
            return Ok(rows);
        }
        Err(Error::data(format!("{count} rows are asked for, {} exist", rows.len())).key("below").help("raise `below`"))
    }
}

impl Task for MyPlugin {
    fn train(&self, count: usize, seed: Seed) -> Result<Vec<Row>> {
        self.rows(count, false, seed)
    }

    fn test(&self, count: usize) -> Result<Vec<Row>> {
        self.rows(count, true, Seed::new(0))
    }

    fn score(&self, row: &Row, answer: &str) -> Option<bool> {
        Some(answer.trim() == row.output)
    }

    fn max_new_tokens(&self) -> usize {
        4
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_row_is_both_learnt_and_asked() {
        let task = MyPlugin { below: 10 };
        let (train, test) = (task.train(80, Seed::new(1)).expect("rows"), task.test(20).expect("rows"));
        assert!(test.iter().all(|row| train.iter().all(|other| other.instruction != row.instruction)));
        assert!(task.test(21).is_err());
    }

    #[test]
    fn only_the_sum_is_right() {
        let task = MyPlugin::default();
        let row = Row::new("what is 2 plus 3 ?", "5");
        assert_eq!((task.score(&row, " 5"), task.score(&row, "6")), (Some(true), Some(false)));
    }
}
