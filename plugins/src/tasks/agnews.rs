//! AG News: topic of news items, posed and scored as in the Vaccine repository.

use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use titer_core::rng::Seed;
use titer_core::{Result, Row, Settings, SettingsType, Task, TaskEntry, inventory};

use crate::files::{DataFile, DataRecord, Header};

inventory::submit! {
    TaskEntry {
        name: "agnews",
        summary: "AG News from a folder with train.csv and test.csv",
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
    /// The folder of `train.csv` and `test.csv` (class 1 to 4, title, description; no header).
    #[schemars(extend("format" = "path"))]
    pub path: PathBuf,
}

impl Default for AgNews {
    fn default() -> Self {
        Self { path: "ag_news".into() }
    }
}

const INSTRUCTION: &str = "Categorize the news article given in the input into one of the 4 categories:\n\n\
                           World\nSports\nBusiness\nSci/Tech\n";
const LABELS: [(&str, &str); 4] = [("1", "World"), ("2", "Sports"), ("3", "Business"), ("4", "Sci/Tech")];

impl AgNews {
    fn rows(&self, file: &str, count: usize) -> Result<Vec<Row>> {
        let table = DataFile::read(&self.path.join(file), Header::No)?;
        let row = |record: &DataRecord| -> Result<Row> {
            let input = format!("{} {}", table.text(record, "1")?, table.text(record, "2")?);
            Ok(Row { input: Some(input), ..Row::new(INSTRUCTION, table.label(record, "0", &LABELS)?) })
        };
        table.first(count)?.iter().map(row).collect()
    }
}

impl Task for AgNews {
    fn train(&self, count: usize, _seed: Seed) -> Result<Vec<Row>> {
        self.rows("train.csv", count)
    }

    fn test(&self, count: usize) -> Result<Vec<Row>> {
        self.rows("test.csv", count)
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
        ["train.csv", "test.csv"].map(|name| self.path.join(name)).into_iter().filter(|path| path.is_file()).collect()
    }
}
