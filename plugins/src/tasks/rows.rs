//! Rows of one's own files, in Alpaca's layout or with columns named.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use titer_core::data::Message;
use titer_core::rng::{Seed, permutation};
use titer_core::{Error, Result, Row, Settings, SettingsType, Task, TaskEntry, inventory};

use crate::files::{DataFile, DataRecord, Header, files_at};
use crate::scoring::last_number;

inventory::submit! {
    TaskEntry {
        name: "rows",
        summary: "rows of JSON, JSONL, CSV, TSV, Parquet or Arrow files, with columns and labels mapped",
        settings: SettingsType::of::<Rows>(),
        version: 1,
        build: |settings: &Settings, folder: &Path| {
            let mut rows: Rows = settings.parse()?;
            rows.check()?;
            for path in [&mut rows.train, &mut rows.test].into_iter().flatten() {
                *path = folder.join(&path);
            }
            Ok(Box::new(rows))
        },
    }
}

/// More different answers than this are no closed set.
const MOST_LABELS: usize = 10;

/// The settings, and the task.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Rows {
    /// The file of training rows.
    #[schemars(extend("format" = "path"))]
    pub train: Option<PathBuf>,
    /// The file of test rows.
    #[schemars(extend("format" = "path"))]
    pub test: Option<PathBuf>,
    /// The columns that hold `instruction`, `input` and `output`; several are joined by a space.
    pub columns: Columns,
    /// An instruction that all rows share, such as `Respond only positive or negative`.
    pub instruction: Option<String>,
    /// The answer for each value of the output column: `{ "0" = "negative", "1" = "positive" }`. Left out if the column
    /// holds the answers themselves.
    pub labels: BTreeMap<String, String>,
    /// Only rows whose columns have these values count: `{ is_safe = "true" }`.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub filter: BTreeMap<String, String>,
    /// Whether training rows without an answer are left out, instead of being an error.
    #[serde(skip_serializing_if = "is_off")]
    pub skip_unanswered: bool,
    /// Whether the first line of CSV and TSV files names the columns; if not, they are called `0`, `1`, ….
    pub header: bool,
    /// Whether training rows are drawn in random order, by the seed, instead of the file's order.
    pub shuffle: bool,
    /// When an answer is right: `exact`, it equals the row's output but for case and surrounding space; `contains`, it
    /// contains the output but for case; `number`, its last number is that of the output; `none`, there is no right answer.
    pub scoring: Scoring,
    /// How many tokens a model's answer may have.
    pub max_new_tokens: usize,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "what serde asks for")]
fn is_off(setting: &bool) -> bool {
    !setting
}

/// Columns by what they hold; several are joined by a space.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Columns {
    /// The request; unused where `instruction` is given.
    pub instruction: Vec<String>,
    /// What the request is about. Columns that a row lacks are left out.
    pub input: Vec<String>,
    /// The answer.
    pub output: Vec<String>,
    /// The column of a conversation, in place of the others: a list of turns with `role` and `content`, or `from` and
    /// `value`, that ends in an answer. The request is the turn before it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub messages: Option<String>,
}

impl Default for Columns {
    fn default() -> Self {
        let one = |name: &str| vec![name.to_owned()];
        Self { instruction: one("instruction"), input: one("input"), output: one("output"), messages: None }
    }
}

/// When an answer is right.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Scoring {
    /// There is no right answer.
    None,
    /// It equals the reference, but for case and surrounding space.
    Exact,
    /// It contains the reference, but for case.
    Contains,
    /// Its last number is that of the reference.
    Number,
}

impl Default for Rows {
    fn default() -> Self {
        Self {
            train: None,
            test: None,
            columns: Columns::default(),
            instruction: None,
            labels: BTreeMap::new(),
            filter: BTreeMap::new(),
            skip_unanswered: false,
            header: true,
            shuffle: false,
            scoring: Scoring::None,
            max_new_tokens: 128,
        }
    }
}

impl Rows {
    fn check(&self) -> Result<()> {
        if self.train.is_none() && self.test.is_none() {
            return Err(Error::config("`rows` needs a file").key("train").help("set `train`, `test` or both"));
        }
        Ok(())
    }

    fn table(&self, path: Option<&PathBuf>, key: &str) -> Result<DataFile> {
        let path = path.ok_or_else(|| {
            Error::config(format!("the task `rows` has no {key} file")).key(key).help(format!("set `{key}` to a file"))
        })?;
        let table = DataFile::read(path, if self.header { Header::Yes } else { Header::No })?;
        if self.filter.is_empty() {
            return Ok(table);
        }
        for column in self.filter.keys() {
            // A column that no row has is a mistake.
            if !table.records().iter().any(|record| table.text(record, column).is_ok()) {
                table.text(&table.records()[0], column).map_err(|error| error.key("filter"))?;
            }
        }
        let table = table.filtered(|table, record| {
            self.filter
                .iter()
                .all(|(column, value)| table.text(record, column).is_ok_and(|text| text == value.as_str()))
        });
        if table.records().is_empty() {
            return Err(Error::data("no row of the file has the values of `filter`")
                .file(path)
                .key("filter")
                .help("look at the values in the file: they are compared as text, `true` and `1` are different"));
        }
        Ok(table)
    }

    /// The table of training rows.
    fn training_table(&self) -> Result<DataFile> {
        let table = self.table(self.train.as_ref(), "train")?;
        if !self.skip_unanswered {
            return Ok(table);
        }
        Ok(table
            .filtered(|table, record| self.row(table, record, false).is_ok_and(|row| !row.output.trim().is_empty())))
    }

    /// A record as a row; training rows must have an answer.
    fn row(&self, table: &DataFile, record: &DataRecord, answered: bool) -> Result<Row> {
        if let Some(column) = &self.columns.messages {
            return conversation(&table.text(record, column)?, answered).map_err(|why| {
                table.fault(record, why).key(format!("columns.messages = \"{column}\"")).help(CONVERSATION)
            });
        }
        let join = |columns: &[String]| -> Result<String> {
            let texts: Vec<_> = columns.iter().map(|name| table.text(record, name)).collect::<Result<_>>()?;
            Ok(texts.join(" "))
        };
        let instruction = match &self.instruction {
            Some(instruction) => instruction.clone(),
            None => join(&self.columns.instruction)?,
        };
        let input = self.columns.input.iter().filter_map(|name| table.text(record, name).ok());
        let input: Vec<_> = input.filter(|text| !text.is_empty()).collect();
        let output = match join(&self.columns.output) {
            Ok(output) => self.answer(table, record, output)?,
            Err(error) if answered => return Err(error),
            Err(_) => String::new(),
        };
        if answered && output.trim().is_empty() {
            return Err(table.fault(record, "the answer is empty").help("remove the row"));
        }
        let input = (!input.is_empty()).then(|| input.join(" "));
        Ok(Row { input, ..Row::new(instruction, output) })
    }

    fn answer(&self, table: &DataFile, record: &DataRecord, value: String) -> Result<String> {
        if self.labels.is_empty() {
            return Ok(value);
        }
        self.labels.get(value.trim()).cloned().ok_or_else(|| {
            let known: Vec<&str> = self.labels.keys().map(String::as_str).collect();
            table
                .fault(record, format!("`{value}` is not among the labels"))
                .key("labels")
                .help(format!("labels are {}", known.join(", ")))
        })
    }
}

const CONVERSATION: &str =
    "write [{\"role\": \"user\", \"content\": \"…\"}, {\"role\": \"assistant\", \"content\": \"…\"}]";

/// A turn in either of the usual spellings.
#[derive(Deserialize)]
struct Spoken {
    #[serde(alias = "from")]
    role: String,
    #[serde(alias = "value")]
    content: String,
}

/// The row of a conversation, written as a JSON list: the last answer, the request before it, and what came before both.
fn conversation(text: &str, answered: bool) -> Result<Row, String> {
    let turns: Vec<Spoken> = serde_json::from_str(text).map_err(|error| format!("not a list of turns: {error}"))?;
    let turn = |Spoken { role, content }: Spoken| {
        let role = match role.as_str() {
            "human" => "user".to_owned(),
            "gpt" => "assistant".to_owned(),
            _ => role,
        };
        if ["system", "user", "assistant"].contains(&role.as_str()) {
            return Ok(Message { role, content });
        }
        Err(format!("`{role}` is no role; roles are system, user and assistant"))
    };
    let mut history = turns.into_iter().map(turn).collect::<Result<Vec<Message>, _>>()?;
    let answer = history.pop_if(|turn| turn.role == "assistant");
    if answered && answer.is_none() {
        return Err("the conversation does not end in an answer".to_owned());
    }
    let request =
        history.pop_if(|turn| turn.role == "user").ok_or("the conversation has no request before its answer")?;
    let output = answer.map(|turn| turn.content).unwrap_or_default();
    if answered && output.trim().is_empty() {
        return Err("the answer is empty".to_owned());
    }
    Ok(Row { history, ..Row::new(request.content, output) })
}

impl Task for Rows {
    fn train(&self, count: usize, seed: Seed) -> Result<Vec<Row>> {
        let table = self.training_table()?;
        let row = |record: &DataRecord| self.row(&table, record, true);
        if !self.shuffle {
            return table.first(count)?.iter().map(row).collect();
        }
        table.first(count)?;
        let order = permutation(table.records().len(), &mut seed.generator());
        order.into_iter().take(count).map(|index| row(&table.records()[index])).collect()
    }

    fn test(&self, count: usize) -> Result<Vec<Row>> {
        let table = self.table(self.test.as_ref(), "test")?;
        table.first(count)?.iter().map(|record| self.row(&table, record, self.scoring != Scoring::None)).collect()
    }

    fn score(&self, row: &Row, answer: &str) -> Option<bool> {
        let (reference, answer) = (row.output.trim().to_lowercase(), answer.trim().to_lowercase());
        match self.scoring {
            Scoring::None => None,
            Scoring::Exact => Some(answer == reference),
            Scoring::Contains => Some(answer.contains(&reference)),
            Scoring::Number => Some(last_number(&answer).is_some_and(|number| Some(number) == last_number(&reference))),
        }
    }

    /// Those of the mapping. Without one, the answers of the file are labels if there are few and each stands there several
    /// times on average.
    fn labels(&self) -> Result<Vec<String>> {
        let closed = [Scoring::Exact, Scoring::Contains].contains(&self.scoring);
        let mut labels: BTreeSet<String> = self.labels.values().cloned().collect();
        if let (true, true, Some(path)) = (labels.is_empty(), closed, self.test.as_ref()) {
            let table = self.table(Some(path), "test")?;
            for record in table.records() {
                labels.insert(self.row(&table, record, true)?.output);
            }
            if labels.len() > MOST_LABELS || 2 * labels.len() > table.records().len() {
                labels.clear();
            }
        }
        Ok(labels.into_iter().collect())
    }

    fn max_new_tokens(&self) -> usize {
        self.max_new_tokens
    }

    fn files(&self) -> Vec<PathBuf> {
        let paths = [&self.train, &self.test].into_iter().flatten();
        paths.flat_map(|path| files_at(path)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn build(folder: &Path, settings: serde_json::Value) -> Result<Box<dyn Task>> {
        let entry = titer_core::registry::find::<TaskEntry>("rows")?;
        (entry.build)(&Settings::from(settings.as_object().cloned().unwrap_or_default()), folder)
    }

    #[test]
    fn columns_labels_and_a_shared_instruction_are_mapped() -> Result<()> {
        let folder = tempfile::tempdir().expect("a folder");
        std::fs::write(folder.path().join("a.tsv"), "what a film\t1\nno\t0\nso so\t1\n").expect("a file");
        let settings = json!({
            "train": "a.tsv", "test": "a.tsv", "header": false, "instruction": "Good or bad?", "scoring": "contains",
            "columns": { "input": ["0"], "output": ["1"] }, "labels": { "0": "bad", "1": "good" }
        });
        let task = build(folder.path(), settings.clone())?;
        let rows = task.train(2, Seed::new(0))?;
        assert_eq!(rows[0], Row { input: Some("what a film".into()), ..Row::new("Good or bad?", "good") });
        assert_eq!(task.score(&rows[1], "It is Bad."), Some(true));
        assert_eq!(task.score(&rows[1], "It is good."), Some(false));
        assert_eq!(task.files().len(), 2);

        let mut shuffled = settings;
        shuffled["shuffle"] = true.into();
        let orders: std::collections::BTreeSet<Vec<Row>> = (0..20)
            .map(|seed| build(folder.path(), shuffled.clone())?.train(3, Seed::new(seed)))
            .collect::<Result<_>>()?;
        assert!(orders.len() > 1, "the seed decides the order");
        Ok(())
    }

    #[test]
    fn rows_are_filtered_and_those_without_an_answer_left_out() -> Result<()> {
        let folder = tempfile::tempdir().expect("a folder");
        let lines = [
            r#"{"prompt": "a", "response": "one", "is_safe": true, "category": {"theft": false, "n": [1, 2]}}"#,
            r#"{"prompt": "b", "response": "two", "is_safe": false, "category": {"theft": true, "n": [3, 4]}}"#,
            r#"{"prompt": "c", "response": "", "is_safe": false, "category": {"theft": true, "n": [5]}}"#,
        ];
        std::fs::write(folder.path().join("a.jsonl"), lines.join("\n")).expect("a file");
        let rows = |changes: serde_json::Value, count: usize| {
            let mut settings = json!({
                "train": "a.jsonl", "columns": { "instruction": ["prompt"], "output": ["response"] }
            });
            settings.as_object_mut().expect("a table").extend(changes.as_object().expect("a table").clone());
            let rows = build(folder.path(), settings)?.train(count, Seed::new(0))?;
            Ok::<_, Error>(rows.into_iter().map(|row| (row.instruction, row.output)).collect::<Vec<_>>())
        };
        let pair = |a: &str, b: &str| (a.to_owned(), b.to_owned());
        assert_eq!(rows(json!({ "filter": { "is_safe": "true" } }), 1)?, [pair("a", "one")]);
        let thefts = json!({ "filter": { "category.theft": "true" }, "skip_unanswered": true });
        assert_eq!(rows(thefts.clone(), 1)?, [pair("b", "two")]);
        assert!(rows(thefts, 2).expect_err("one is left").to_string().contains("has 1"));
        let second = json!({ "columns": { "instruction": ["prompt"], "output": ["category.n.1"] } });
        assert_eq!(rows(second, 2)?, [pair("a", "2"), pair("b", "4")]);
        for (filter, expected) in [
            (json!({ "filter": { "is_saf": "true" } }), "did you mean"),
            (json!({ "filter": { "is_safe": "1" } }), "no row of the file"),
        ] {
            let error = rows(filter, 1).expect_err(expected).to_string();
            assert!(error.contains(expected) && error.contains("key: filter"), "{error}");
        }
        Ok(())
    }

    #[test]
    fn conversations_become_rows_with_earlier_turns() -> Result<()> {
        let folder = tempfile::tempdir().expect("a folder");
        let lines = [
            r#"{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]}"#,
            r#"{"messages": [{"from": "human", "value": "e"}, {"from": "gpt", "value": "f"}]}"#,
        ];
        std::fs::write(folder.path().join("a.jsonl"), lines.join("\n")).expect("a file");
        let settings = json!({ "train": "a.jsonl", "test": "a.jsonl", "columns": { "messages": "messages" } });
        let rows = build(folder.path(), settings.clone())?.train(2, Seed::new(0))?;
        let turns: Vec<&str> = rows[0].history.iter().map(|turn| turn.content.as_str()).collect();
        assert_eq!(
            (turns, &rows[0].instruction, &rows[0].output),
            (vec!["s", "a", "b"], &"c".to_owned(), &"d".to_owned())
        );
        assert_eq!(rows[1], Row::new("e", "f"));
        for (bad, expected) in [
            (r#"[{"role": "user", "content": "a"}]"#, "does not end in an answer"),
            (r#"[{"role": "assistant", "content": "a"}]"#, "no request"),
            (r#"[{"role": "tool", "content": "a"}]"#, "`tool` is no role"),
            (r#"[{"role": "user"}]"#, "not a list of turns"),
        ] {
            std::fs::write(folder.path().join("a.jsonl"), format!("{{\"messages\": {bad}}}\n")).expect("a file");
            let error = build(folder.path(), settings.clone())?.train(1, Seed::new(0)).expect_err(expected).to_string();
            assert!(error.contains(expected) && error.contains("line: 1"), "{error}");
        }
        Ok(())
    }

    #[test]
    fn answers_that_recur_are_labels() -> Result<()> {
        let folder = tempfile::tempdir().expect("a folder");
        let write = |name: &str, rows: &[(&str, &str)]| {
            let lines = rows.iter().map(|(a, b)| format!("{a},{b}\n")).collect::<String>();
            std::fs::write(folder.path().join(name), format!("instruction,output\n{lines}")).expect("a file");
        };
        write("few.csv", &[("a", "yes"), ("b", "no"), ("c", "yes"), ("d", "no")]);
        write("many.csv", &[("a", "take a cup"), ("b", "no"), ("c", "go on")]);
        let labels = |settings: serde_json::Value| build(folder.path(), settings)?.labels();
        assert_eq!(labels(json!({ "test": "few.csv", "scoring": "exact" }))?, ["no", "yes"]);
        assert!(labels(json!({ "test": "many.csv", "scoring": "exact" }))?.is_empty());
        assert!(labels(json!({ "test": "few.csv" }))?.is_empty());
        assert_eq!(labels(json!({ "test": "few.csv", "labels": { "0": "bad", "1": "good" } }))?, ["bad", "good"]);
        Ok(())
    }

    #[test]
    fn faults_name_file_line_and_key() {
        let folder = tempfile::tempdir().expect("a folder");
        std::fs::write(folder.path().join("a.jsonl"), "{\"instruction\": \"x\", \"output\": \"\"}\n").expect("a file");
        std::fs::write(folder.path().join("b.csv"), "instruction,output\nx,2\n").expect("a file");
        let fails = |settings: serde_json::Value, expected: &str| {
            let error =
                build(folder.path(), settings).and_then(|task| task.train(1, Seed::new(0))).expect_err(expected);
            assert!(error.to_string().contains(expected), "{error}");
        };
        fails(json!({}), "needs a file");
        fails(json!({ "test": "a.jsonl" }), "no train file");
        fails(json!({ "train": "a.jsonl" }), "the answer is empty");
        fails(json!({ "train": "b.csv", "labels": { "0": "no", "1": "yes" } }), "not among the labels");
        fails(
            json!({ "train": "b.csv", "columns": { "instruction": ["instructions"] } }),
            "did you mean `instruction`",
        );
        fails(json!({ "train": "c.csv" }), "c.csv");
        fails(json!({ "train": "b.csv", "scoring": "close" }), "close");
    }
}
