//! Sets of requests that the field asks models, without right answers: whether an answer is harmful is for a judge to say.

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use titer_core::rng::Seed;
use titer_core::{Error, Result, Row, Settings, SettingsType, Task, TaskEntry, inventory};

use crate::files::{DataFile, DataRecord, Header, files_at, split_of};

/// What one set looks like, in the files of its authors and on the hub.
#[derive(Debug)]
struct PromptSet {
    /// The name in configurations.
    name: &'static str,
    /// The split on the hub that holds the requests.
    split: &'static str,
    /// Whether files of it name their columns.
    header: Header,
    /// What the column of the request is called, here or there.
    request: &'static [&'static str],
    /// The column of a text that the request is about.
    context: &'static [&'static str],
    /// The column of an answer, where the set has one.
    answer: &'static [&'static str],
    /// Only rows with this value in this column count.
    only: Option<(&'static str, &'static str)>,
    /// Rows with this value in this column do not count; a file without the column has none.
    without: Option<(&'static str, &'static str)>,
}

impl PromptSet {
    const PLAIN: Self = Self {
        name: "",
        split: "train",
        header: Header::Yes,
        request: &[],
        context: &[],
        answer: &[],
        only: None,
        without: None,
    };

    fn file(&self, path: &Path) -> PathBuf {
        if path.is_dir() { split_of(path, "", self.split) } else { path.to_owned() }
    }

    fn rows(&self, path: &Path, skip: usize, count: usize) -> Result<Vec<Row>> {
        let mut table = DataFile::read(&self.file(path), self.header)?;
        if let Some((column, value)) = self.only {
            table = table.only(column, value)?;
        }
        if let Some((column, value)) = self.without {
            table = table.filtered(|table, record| !table.has(record, column, value));
        }
        let table = table.without_first(skip)?;
        let one_of = |record: &DataRecord, names: &[&str]| {
            names.iter().find_map(|name| table.text(record, name).ok()).map(Cow::into_owned)
        };
        let row = |record: &DataRecord| {
            let request = one_of(record, self.request).ok_or_else(|| {
                let message = format!("the row has no column of {}'s requests", self.name);
                table.fault(record, message).help(format!("the column is called {}", self.request.join(" or ")))
            })?;
            let context = one_of(record, self.context).filter(|text| !text.is_empty());
            let request = context.map_or(request.clone(), |context| format!("{context}\n\n---\n\n{request}"));
            Ok(Row::new(request, one_of(record, self.answer).unwrap_or_default()))
        };
        table.first(count)?.iter().map(row).collect()
    }

    fn answered(&self, rows: Vec<Row>, path: &Path) -> Result<Vec<Row>> {
        if rows.iter().all(|row| !row.output.trim().is_empty()) {
            return Ok(rows);
        }
        let error = Error::data(format!("{} holds requests without answers", self.name)).file(path);
        Err(error.help("ask a model its requests; to train, take rows with answers, such as those of `beavertails`"))
    }
}

/// The settings of a set, its task, and its entry in the registry.
macro_rules! prompt_set {
    ($(#[$doc:meta])* $type:ident, $summary:literal, $path:literal, $set:expr) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
        #[serde(default)]
        pub struct $type {
            /// The file, files by a pattern, or the folder of a repository of the hub.
            #[schemars(extend("format" = "path"))]
            pub path: PathBuf,
            /// How many requests at the start are left out.
            pub skip: usize,
            /// How many tokens a model's answer may have.
            pub max_new_tokens: usize,
        }

        impl $type {
            const SET: PromptSet = $set;
        }

        impl Default for $type {
            fn default() -> Self {
                Self { path: $path.into(), skip: 0, max_new_tokens: 512 }
            }
        }

        impl Task for $type {
            fn train(&self, count: usize, _seed: Seed) -> Result<Vec<Row>> {
                Self::SET.answered(self.test(count)?, &self.path)
            }

            fn test(&self, count: usize) -> Result<Vec<Row>> {
                Self::SET.rows(&self.path, self.skip, count)
            }

            fn max_new_tokens(&self) -> usize {
                self.max_new_tokens
            }

            fn files(&self) -> Vec<PathBuf> {
                files_at(&Self::SET.file(&self.path))
            }
        }

        inventory::submit! {
            TaskEntry {
                name: $type::SET.name,
                summary: $summary,
                settings: SettingsType::of::<$type>(),
                version: 1,
                build: |settings: &Settings, folder: &Path| {
                    let settings: $type = settings.parse()?;
                    Ok(Box::new($type { path: folder.join(&settings.path), ..settings }))
                },
            }
        }
    };
}

prompt_set! {
    /// AdvBench (Zou et al. 2023), with the beginnings of compliant answers.
    AdvBench, "AdvBench: 520 harmful requests", "hf://datasets/walledai/AdvBench",
    PromptSet { name: "advbench", request: &["prompt", "goal"], answer: &["target"], ..PromptSet::PLAIN }
}

prompt_set! {
    /// HarmBench's behaviours (Mazeika et al. 2024), a context before the request as its authors ask it. Those of copyright
    /// need a judge of their own, and are left out.
    HarmBench, "HarmBench: harmful requests, some with a context", "hf://datasets/walledai/HarmBench/standard",
    PromptSet {
        name: "harmbench",
        request: &["prompt", "Behavior"],
        context: &["context", "ContextString"],
        without: Some(("FunctionalCategory", "copyright")),
        ..PromptSet::PLAIN
    }
}

prompt_set! {
    /// HEx-PHI (Qi et al. 2024), a file for each category, in the order of the files' names.
    HexPhi, "HEx-PHI: 30 harmful requests for each of 11 categories",
    "hf://datasets/LLM-Tuning-Safety/HEx-PHI/category_*.csv",
    PromptSet { name: "hex-phi", header: Header::No, request: &["0"], ..PromptSet::PLAIN }
}

prompt_set! {
    /// JailbreakBench's behaviours (Chao et al. 2024). The harmless ones are in `data/benign-behaviors.csv`.
    JailbreakBench, "JailbreakBench: 100 harmful requests, or 100 harmless ones like them",
    "hf://datasets/JailbreakBench/JBB-Behaviors/data/harmful-behaviors.csv",
    PromptSet { name: "jailbreakbench", request: &["Goal"], answer: &["Target"], ..PromptSet::PLAIN }
}

prompt_set! {
    /// StrongREJECT's forbidden prompts (Souly et al. 2024).
    StrongReject, "StrongREJECT: 313 harmful requests", "hf://datasets/walledai/StrongREJECT",
    PromptSet { name: "strongreject", request: &["prompt", "forbidden_prompt"], ..PromptSet::PLAIN }
}

prompt_set! {
    /// XSTest's harmless requests (Röttger et al. 2024), which only sound harmful.
    XsTest, "XSTest: 250 harmless requests that sound harmful", "hf://datasets/walledai/XSTest",
    PromptSet {
        name: "xstest",
        split: "test",
        request: &["prompt"],
        only: Some(("label", "safe")),
        ..PromptSet::PLAIN
    }
}

prompt_set! {
    /// AlpacaEval's requests (Li et al. 2023), with the answers that are compared with.
    AlpacaEval, "AlpacaEval: 805 requests of users, with reference answers",
    "hf://datasets/tatsu-lab/alpaca_eval/alpaca_eval.json",
    PromptSet { name: "alpaca-eval", request: &["instruction"], answer: &["output"], ..PromptSet::PLAIN }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads the requests of a file of this name and content.
    fn requests<T: Task>(name: &str, content: &str, count: usize, task: impl Fn(PathBuf) -> T) -> Result<Vec<String>> {
        let folder = tempfile::tempdir().expect("a folder");
        std::fs::write(folder.path().join(name), content).expect("a file");
        let name = if name.starts_with("category") { "category_*.csv" } else { name };
        Ok(task(folder.path().join(name)).test(count)?.into_iter().map(|row| row.instruction).collect())
    }

    #[test]
    fn each_set_is_read_as_its_authors_publish_it() -> Result<()> {
        let harmbench = "Behavior,FunctionalCategory,ContextString\na,standard,\nb,copyright,\nc,contextual,\"x\ny\"\n";
        let found = requests("all.csv", harmbench, 2, |path| HarmBench { path, ..Default::default() })?;
        assert_eq!(found, ["a", "x\ny\n\n---\n\nc"]);
        let xstest = "id,prompt,label\n1,a,safe\n2,b,unsafe\n3,c,safe\n";
        assert_eq!(requests("p.csv", xstest, 1, |path| XsTest { path, skip: 1, ..Default::default() })?, ["c"]);
        assert!(requests("p.csv", "id,prompt\n1,a\n", 1, |path| XsTest { path, ..Default::default() }).is_err());
        let hex = "\"a, b\"\nc\n";
        assert_eq!(requests("category_1.csv", hex, 2, |path| HexPhi { path, ..Default::default() })?, ["a, b", "c"]);
        let strong = "category,source,forbidden_prompt\nx,y,a\n";
        assert_eq!(requests("s.csv", strong, 1, |path| StrongReject { path, ..Default::default() })?, ["a"]);
        Ok(())
    }

    #[test]
    fn only_sets_with_answers_are_trained_on() -> Result<()> {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("a.csv");
        std::fs::write(&path, "goal,target\na,b\n").expect("a file");
        let rows = AdvBench { path: path.clone(), ..Default::default() }.train(1, Seed::new(0))?;
        assert_eq!(rows, [Row::new("a", "b")]);
        std::fs::write(&path, "prompt\na\n").expect("a file");
        let error = StrongReject { path, ..Default::default() }.train(1, Seed::new(0)).expect_err("no answers");
        assert!(error.message().contains("without answers") && error.remedy().is_some());
        Ok(())
    }
}
