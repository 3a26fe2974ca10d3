//! Verdicts on stored answers.

use std::path::Path;

use serde::{Deserialize, Serialize};
use titer_core::report::Answer;
use titer_core::{Error, JudgeEntry, Result, Row, Verdict, registry};

use super::{ANSWERS, RECORD, StageIo, Stages, settings, write_json};
use crate::disk;
use crate::plan::JudgeSpec;

/// What was made of each answer, in the order of the answers.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct JudgeRecord {
    /// The verdicts of a judge.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub verdicts: Vec<Verdict>,
    /// Whether each answer is right, by the task's own scoring.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub correct: Vec<bool>,
}

pub(super) fn run(stages: &Stages, spec: &JudgeSpec, parent: &str, io: &mut StageIo) -> Result<()> {
    let answers = read_answers(&(io.artifact)(parent)?.join(ANSWERS))?;
    io.watch.started(answers.len(), 0);
    let asked = answers.into_iter().map(|answer| {
        let row = Row { instruction: answer.instruction, input: answer.input, output: answer.reference };
        (row, answer.answer)
    });
    let record = match &spec.judge {
        Some(judge) => {
            let judge = (registry::find::<JudgeEntry>(&judge.name)?.build)(&settings(judge))?;
            let verdicts = asked.map(|(row, answer)| judge.judge(&row, &answer)).collect::<Result<_>>()?;
            JudgeRecord { verdicts, ..JudgeRecord::default() }
        }
        None => {
            let task = stages.task(&spec.prompts.task)?;
            let score = |(row, answer): (Row, String)| {
                task.score(&row, &answer).ok_or_else(|| {
                    Error::config(format!("`{}` does not score answers", spec.prompts.task.name))
                        .key("fine_tune.tasks")
                        .help("give the task a scoring rule")
                })
            };
            JudgeRecord { correct: asked.map(score).collect::<Result<_>>()?, ..JudgeRecord::default() }
        }
    };
    write_json(&io.output.join(RECORD), &record)
}

/// Stored answers.
///
/// # Errors
/// The file is missing or damaged.
pub fn read_answers(path: &Path) -> Result<Vec<Answer>> {
    let bytes = disk::read(path)?;
    let lines = bytes.split(|&byte| byte == b'\n').filter(|line| !line.is_empty()).enumerate();
    let parse = |(line, bytes): (usize, &[u8])| {
        serde_json::from_slice(bytes).map_err(|error| {
            Error::data("a stored answer is damaged")
                .file(path)
                .at("line", (line + 1).to_string())
                .source(error)
                .help("run the same command again: the damaged stage is computed anew")
        })
    };
    lines.map(parse).collect()
}
