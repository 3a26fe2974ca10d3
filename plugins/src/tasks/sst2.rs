//! SST-2: sentiment of film reviews, posed and scored as in the Vaccine repository.

use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use titer_core::rng::Seed;
use titer_core::{Result, Row, Settings, SettingsType, Task, TaskEntry, inventory};

use crate::files::{DataFile, DataRecord, Header};

inventory::submit! {
    TaskEntry {
        name: "sst2",
        summary: "SST-2 from a folder with train.tsv and dev.tsv",
        settings: SettingsType::of::<Sst2>(),
        version: 1,
        build: |settings: &Settings, folder: &Path| {
            let Sst2 { path } = settings.parse()?;
            Ok(Box::new(Sst2 { path: folder.join(path) }))
        },
    }
}

/// The settings, and the task.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Sst2 {
    /// The folder of `train.tsv` and `dev.tsv` (sentence, tab, 0 or 1; a header line is recognised).
    #[schemars(extend("format" = "path"))]
    pub path: PathBuf,
}

impl Default for Sst2 {
    fn default() -> Self {
        Self { path: "sst2".into() }
    }
}

const INSTRUCTION: &str = "Analyze the sentiment of the input, and respond only positive or negative";
const LABELS: [(&str, &str); 2] = [("0", "negative"), ("1", "positive")];

impl Sst2 {
    fn rows(&self, file: &str, count: usize) -> Result<Vec<Row>> {
        let table = DataFile::read(&self.path.join(file), Header::If("sentence"))?;
        let row = |record: &DataRecord| -> Result<Row> {
            let named = table.text(record, "sentence").is_ok();
            let [sentence, label] = if named { ["sentence", "label"] } else { ["0", "1"] };
            let input = Some(table.text(record, sentence)?.trim().to_owned());
            Ok(Row { input, ..Row::new(INSTRUCTION, table.label(record, label, &LABELS)?) })
        };
        table.first(count)?.iter().map(row).collect()
    }
}

impl Task for Sst2 {
    fn train(&self, count: usize, _seed: Seed) -> Result<Vec<Row>> {
        self.rows("train.tsv", count)
    }

    fn test(&self, count: usize) -> Result<Vec<Row>> {
        self.rows("dev.tsv", count)
    }

    /// The answer contains the label, but for case.
    fn score(&self, row: &Row, answer: &str) -> Option<bool> {
        Some(answer.to_lowercase().contains(&row.output))
    }

    fn labels(&self) -> Result<Vec<String>> {
        Ok(LABELS.map(|(_, label)| label.to_owned()).to_vec())
    }

    fn max_new_tokens(&self) -> usize {
        200
    }

    fn files(&self) -> Vec<PathBuf> {
        ["train.tsv", "dev.tsv"].map(|name| self.path.join(name)).to_vec()
    }
}
