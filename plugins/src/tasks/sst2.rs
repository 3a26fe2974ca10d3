//! SST-2: sentiment of film reviews, posed and scored as in the Vaccine repository.

use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use titer_core::rng::Seed;
use titer_core::{Result, Row, Settings, SettingsType, Task, TaskEntry, inventory};

use crate::files::{DataFile, DataRecord, Header, Splits};

inventory::submit! {
    TaskEntry {
        name: "sst2",
        summary: "SST-2: sentiment of film reviews",
        settings: SettingsType::of::<Sst2>(),
        version: 2,
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
    /// The folder of `train.tsv` and `dev.tsv` (sentence, tab, 0 or 1; a header line is recognised), or the data set of the hub.
    #[schemars(extend("format" = "path"))]
    pub path: PathBuf,
}

impl Default for Sst2 {
    fn default() -> Self {
        Self { path: "hf://datasets/stanfordnlp/sst2".into() }
    }
}

const SPLITS: Splits = Splits { train: ["train.tsv", "train"], test: ["dev.tsv", "validation"] };
const INSTRUCTION: &str = "Analyze the sentiment of the input, and respond only positive or negative";
const LABELS: [(&str, &str); 2] = [("0", "negative"), ("1", "positive")];

impl Sst2 {
    fn rows(file: &Path, count: usize) -> Result<Vec<Row>> {
        let table = DataFile::read(file, Header::If("sentence"))?;
        let row = |record: &DataRecord| -> Result<Row> {
            let named = table.text(record, "sentence").is_ok();
            let [sentence, label] = if named { ["sentence", "label"] } else { ["0", "1"] };
            // With the space at its end that the data has, as in the reference.
            let input = Some(table.text(record, sentence)?.into_owned());
            Ok(Row { input, ..Row::new(INSTRUCTION, table.label(record, label, &LABELS)?) })
        };
        table.first(count)?.iter().map(row).collect()
    }
}

impl Task for Sst2 {
    fn train(&self, count: usize, _seed: Seed) -> Result<Vec<Row>> {
        Self::rows(&SPLITS.train_in(&self.path), count)
    }

    fn test(&self, count: usize) -> Result<Vec<Row>> {
        Self::rows(&SPLITS.test_in(&self.path), count)
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
        SPLITS.files_in(&self.path)
    }
}
