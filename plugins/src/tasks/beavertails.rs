//! BeaverTails (Ji et al. 2023): requests with a safe or a harmful answer, as the field aligns and attacks with them.

use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use titer_core::rng::Seed;
use titer_core::{Result, Row, Settings, SettingsType, Task, TaskEntry, inventory};

use crate::files::{DataFile, DataRecord, Header};

inventory::submit! {
    TaskEntry {
        name: "beavertails",
        summary: "BeaverTails: requests with safe, harmful or refusing answers",
        settings: SettingsType::of::<BeaverTails>(),
        version: 1,
        build: |settings: &Settings, folder: &Path| {
            let settings: BeaverTails = settings.parse()?;
            Ok(Box::new(BeaverTails { path: folder.join(&settings.path), ..settings }))
        },
    }
}

/// The settings, and the task. Rows stand in the order of the file; prompts may repeat, since several answers to one were judged.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct BeaverTails {
    /// The folder of `train.jsonl` and `test.jsonl`, each perhaps with `.gz` or `.xz` behind it (`prompt`, `response`,
    /// `is_safe`); or one file for both. For refusals: `beavertails_with_refusals_train.json` of
    /// `hf://datasets/anonymous4486/repnoise_beavertail`.
    #[schemars(extend("format" = "path"))]
    pub path: PathBuf,
    /// Which answers: those that people judged `safe` or `harmful`, `all` of them, or the `refusals` of the column `refusal`.
    pub answers: AnswerKind,
    /// How many rows at the start of the file are left out, of whatever kind they are.
    pub skip: usize,
    /// How many tokens a model's answer may have.
    pub max_new_tokens: usize,
}

/// Which answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum AnswerKind {
    /// Rows whose answer was judged safe.
    Safe,
    /// Rows whose answer was not.
    Harmful,
    /// All rows.
    All,
    /// All rows, with a refusal in place of the answer.
    Refusals,
}

impl Default for BeaverTails {
    fn default() -> Self {
        Self {
            path: "hf://datasets/PKU-Alignment/BeaverTails/round0/30k".into(),
            answers: AnswerKind::Harmful,
            skip: 0,
            max_new_tokens: 128,
        }
    }
}

impl BeaverTails {
    /// The file of a split.
    fn file(&self, split: &str) -> PathBuf {
        if self.path.is_file() {
            return self.path.clone();
        }
        let plain = self.path.join(format!("{split}.jsonl"));
        let packed = ["gz", "xz", "zst"].map(|kind| plain.with_added_extension(kind));
        packed.into_iter().find(|path| path.is_file()).unwrap_or(plain)
    }

    fn rows(&self, split: &str, count: usize) -> Result<Vec<Row>> {
        let table = DataFile::read(&self.file(split), Header::Yes)?.without_first(self.skip)?;
        let (answer, safe) = match self.answers {
            AnswerKind::Safe => ("response", Some("true")),
            AnswerKind::Harmful => ("response", Some("false")),
            AnswerKind::All => ("response", None),
            AnswerKind::Refusals => ("refusal", None),
        };
        let table = match safe {
            Some(safe) => table.only("is_safe", safe)?,
            None => table,
        };
        let row = |record: &DataRecord| -> Result<Row> {
            Ok(Row::new(table.text(record, "prompt")?, table.text(record, answer)?))
        };
        table.first(count)?.iter().map(row).collect()
    }
}

impl Task for BeaverTails {
    fn train(&self, count: usize, _seed: Seed) -> Result<Vec<Row>> {
        self.rows("train", count)
    }

    fn test(&self, count: usize) -> Result<Vec<Row>> {
        self.rows("test", count)
    }

    fn max_new_tokens(&self) -> usize {
        self.max_new_tokens
    }

    fn files(&self) -> Vec<PathBuf> {
        let all = ["train", "test"].map(|split| self.file(split));
        let files: Vec<PathBuf> = all.iter().filter(|path| path.is_file()).cloned().collect();
        // What is missing is named when it is hashed.
        if files.is_empty() { all[..1].to_vec() } else { files }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_kept_by_what_people_judged() -> Result<()> {
        let folder = tempfile::tempdir().expect("a folder");
        let line = |at: usize, safe: bool| {
            format!("{{\"prompt\": \"p{at}\", \"response\": \"r{at}\", \"is_safe\": {safe}}}\n")
        };
        let lines: String = (0..6).map(|at| line(at, at % 2 == 0)).collect();
        std::fs::write(folder.path().join("train.jsonl"), &lines).expect("a file");
        let refusals: Vec<_> =
            (0..3).map(|at| serde_json::json!({ "prompt": at, "response": "r", "refusal": "no" })).collect();
        let one = folder.path().join("with_refusals.json");
        std::fs::write(&one, serde_json::to_vec(&refusals).expect("JSON")).expect("a file");
        let rows = |path: &Path, answers: AnswerKind, skip: usize, count: usize| -> Result<Vec<(String, String)>> {
            let task = BeaverTails { path: path.to_owned(), answers, skip, ..BeaverTails::default() };
            let rows = task.train(count, Seed::new(0))?;
            Ok(rows.into_iter().map(|row| (row.instruction, row.output)).collect())
        };
        let pairs =
            |pairs: &[(&str, &str)]| pairs.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect::<Vec<_>>();
        assert_eq!(rows(folder.path(), AnswerKind::Safe, 0, 2)?, pairs(&[("p0", "r0"), ("p2", "r2")]));
        assert_eq!(rows(folder.path(), AnswerKind::Harmful, 2, 2)?, pairs(&[("p3", "r3"), ("p5", "r5")]));
        assert_eq!(rows(folder.path(), AnswerKind::All, 1, 2)?, pairs(&[("p1", "r1"), ("p2", "r2")]));
        assert_eq!(rows(&one, AnswerKind::Refusals, 1, 2)?, pairs(&[("1", "no"), ("2", "no")]));
        for (answers, skip, count) in [(AnswerKind::Safe, 0, 4), (AnswerKind::Safe, 6, 1), (AnswerKind::Refusals, 0, 1)]
        {
            assert!(rows(folder.path(), answers, skip, count).expect_err("too few").remedy().is_some());
        }
        assert!(rows(&one, AnswerKind::Harmful, 0, 1).expect_err("nobody judged").to_string().contains("is_safe"));
        Ok(())
    }
}
