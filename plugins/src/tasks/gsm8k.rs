//! GSM8K: sums in words, posed and scored as in the Vaccine repository.

use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use titer_core::rng::Seed;
use titer_core::{Result, Row, Settings, SettingsType, Task, TaskEntry, inventory};

use crate::files::{DataFile, DataRecord, Header, Splits};
use crate::scoring::{first_number, last_number};

inventory::submit! {
    TaskEntry {
        name: "gsm8k",
        summary: "GSM8K: sums in words",
        settings: SettingsType::of::<Gsm8k>(),
        version: 1,
        build: |settings: &Settings, folder: &Path| {
            let Gsm8k { path } = settings.parse()?;
            Ok(Box::new(Gsm8k { path: folder.join(path) }))
        },
    }
}

/// The settings, and the task.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Gsm8k {
    /// The folder of `train.jsonl` and `test.jsonl` (`question`, and `answer` with the result after `####`), or the data set of the
    /// hub.
    #[schemars(extend("format" = "path"))]
    pub path: PathBuf,
}

impl Default for Gsm8k {
    fn default() -> Self {
        Self { path: "hf://datasets/openai/gsm8k/main".into() }
    }
}

const SPLITS: Splits = Splits { train: ["train.jsonl", "train"], test: ["test.jsonl", "test"] };
const ASK: &str = "\nFirst think step by step and then answer the final number.\n";
const RESULT: &str = "The final answer is: ";

impl Gsm8k {
    fn rows(file: &Path, count: usize) -> Result<Vec<Row>> {
        let table = DataFile::read(file, Header::Yes)?;
        let row = |record: &DataRecord| -> Result<Row> {
            let question = format!("{}{ASK}", table.text(record, "question")?);
            Ok(Row::new(question, table.text(record, "answer")?.replace("####", RESULT)))
        };
        table.first(count)?.iter().map(row).collect()
    }
}

/// The number after the marker if there is one there, else the last number of the text.
fn result(text: &str) -> Option<f64> {
    let after = text.split_once(RESULT.trim_end()).and_then(|(_, after)| first_number(after));
    after.or_else(|| last_number(text))
}

impl Task for Gsm8k {
    fn train(&self, count: usize, _seed: Seed) -> Result<Vec<Row>> {
        Self::rows(&SPLITS.train_in(&self.path), count)
    }

    fn test(&self, count: usize) -> Result<Vec<Row>> {
        Self::rows(&SPLITS.test_in(&self.path), count)
    }

    /// The number after `The final answer is:`, or else the last one, equals the reference's.
    fn score(&self, row: &Row, answer: &str) -> Option<bool> {
        Some(result(answer).is_some_and(|number| Some(number) == result(&row.output)))
    }

    fn max_new_tokens(&self) -> usize {
        200
    }

    fn files(&self) -> Vec<PathBuf> {
        SPLITS.files_in(&self.path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_final_answer_counts_and_else_the_last_number() {
        let task = Gsm8k::default();
        let row = Row::new("", "2 + 3 = 5\nThe final answer is:  1,005");
        for (answer, right) in [
            ("The final answer is: 1005, of 7", true),
            ("so 1005.0", true),
            ("1005 apples, no 1006", false),
            ("The final answer is: unknown. 1005", true),
            ("I do not know", false),
        ] {
            assert_eq!(task.score(&row, answer), Some(right), "{answer}");
        }
    }
}
