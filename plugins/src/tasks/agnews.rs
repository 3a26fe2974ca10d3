//! AG News: topic of news items, posed and scored as in the Vaccine repository.

use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use titer_core::rng::Seed;
use titer_core::{Result, Row, Settings, SettingsType, Task, TaskEntry, inventory};

use crate::files::{DataFile, DataRecord, Header, Splits};

inventory::submit! {
    TaskEntry {
        name: "agnews",
        summary: "AG News: topic of news items",
        settings: SettingsType::of::<AgNews>(),
        version: 1,
        build: |settings: &Settings, folder: &Path| {
            let AgNews { path } = settings.parse()?;
            Ok(Box::new(AgNews { path: folder.join(path) }))
        },
    }
}

/// The settings, and the task.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct AgNews {
    /// The folder of `train.csv` and `test.csv` (class 1 to 4, title, description; no header), or the data set of the
    /// hub.
    #[schemars(extend("format" = "path"))]
    pub path: PathBuf,
}

impl Default for AgNews {
    fn default() -> Self {
        Self { path: "hf://datasets/fancyzhx/ag_news".into() }
    }
}

const SPLITS: Splits = Splits { train: ["train.csv", "train"], test: ["test.csv", "test"] };
const INSTRUCTION: &str = "Categorize the news article given in the input into one of the 4 categories:\n\n\
                           World\nSports\nBusiness\nSci/Tech\n";
const LABELS: [(&str, &str); 4] = [("1", "World"), ("2", "Sports"), ("3", "Business"), ("4", "Sci/Tech")];
/// The hub counts from 0.
const HUB_LABELS: [(&str, &str); 4] = [("0", "World"), ("1", "Sports"), ("2", "Business"), ("3", "Sci/Tech")];

impl AgNews {
    fn rows(file: &Path, count: usize) -> Result<Vec<Row>> {
        let table = DataFile::read(file, Header::No)?;
        let row = |record: &DataRecord| -> Result<Row> {
            let (input, label) = if let Ok(text) = table.text(record, "text") {
                (text.into_owned(), table.label(record, "label", &HUB_LABELS)?)
            } else {
                let input = format!("{} {}", table.text(record, "1")?, table.text(record, "2")?);
                (input, table.label(record, "0", &LABELS)?)
            };
            Ok(Row { input: Some(input), ..Row::new(INSTRUCTION, label) })
        };
        table.first(count)?.iter().map(row).collect()
    }
}

impl Task for AgNews {
    fn train(&self, count: usize, _seed: Seed) -> Result<Vec<Row>> {
        Self::rows(&SPLITS.train_in(&self.path), count)
    }

    fn test(&self, count: usize) -> Result<Vec<Row>> {
        Self::rows(&SPLITS.test_in(&self.path), count)
    }

    /// As in the reference: the answer contains the category, as written or in lower case; `sci` counts for `Sci/Tech`.
    fn score(&self, row: &Row, answer: &str) -> Option<bool> {
        let lower = if row.output == "Sci/Tech" { "sci".to_owned() } else { row.output.to_lowercase() };
        Some(answer.contains(&row.output) || answer.contains(&lower))
    }

    fn labels(&self) -> Result<Vec<String>> {
        Ok(LABELS.map(|(_, label)| label.to_owned()).to_vec())
    }

    fn max_new_tokens(&self) -> usize {
        200
    }

    fn files(&self) -> Vec<PathBuf> {
        SPLITS.files_in(&self.path).into_iter().filter(|path| path.is_file()).collect()
    }
}
