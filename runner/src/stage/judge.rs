//! Verdicts on stored answers.

use std::path::Path;

use serde::{Deserialize, Serialize};
use titer_core::model::generate::Finish;
use titer_core::report::Answer;
use titer_core::{Answers, Asked, Error, JudgeEntry, Result, Row, Verdict, registry};

use super::{ANSWERS, RECORD, StageIo, Stages, settings, write_json};
use crate::disk;
use crate::plan::JudgeSpec;

/// What was made of each answer, in the order of the answers.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct JudgeRecord {
    /// The verdicts of a judge; none on a prompt that was too long to be answered.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub verdicts: Vec<Option<Verdict>>,
    /// Whether each answer is right, by the task's own scoring; likewise.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub correct: Vec<Option<bool>>,
}

impl JudgeRecord {
    /// How many prompts of `probe` were judged, and how many were too long, if any.
    pub fn counts(&self, probe: &str) -> Vec<(String, usize)> {
        let judged = self.verdicts.iter().flatten().count() + self.correct.iter().flatten().count();
        let too_long = self.verdicts.len() + self.correct.len() - judged;
        let mut counts = vec![(probe.to_owned(), judged)];
        if too_long > 0 {
            counts.push((format!("{probe}_too_long"), too_long));
        }
        counts
    }
}

pub(super) fn run(stages: &Stages, spec: &JudgeSpec, io: &mut StageIo) -> Result<()> {
    let answers = read_answers(&(io.artifact)(&io.parent()?.key)?.join(ANSWERS))?;
    io.watch.started(answers.len(), 0);
    let answered: Vec<bool> = answers.iter().map(|answer| answer.finish != Some(Finish::TooLong)).collect();
    let asked = answers.into_iter().zip(&answered).filter(|(_, answered)| **answered).map(|(answer, _)| {
        let row = Row { instruction: answer.instruction, input: answer.input, output: answer.reference };
        (row, answer.answer)
    });
    let asked: Vec<(Row, String)> = asked.collect();
    let record = match &spec.judge {
        Some(judge) => {
            let judge = (registry::find::<JudgeEntry>(&judge.name)?.build)(&settings(judge))?;
            let asked: Vec<Asked> = asked.iter().map(|(row, answer)| Asked { row, answer }).collect();
            let verdicts = judge.judge(&Answers { asked: &asked, labels: &spec.labels })?;
            if verdicts.len() != asked.len() {
                return Err(Error::run(format!("{} verdicts on {} answers", verdicts.len(), asked.len()))
                    .help("a judge gives one verdict for each answer"));
            }
            JudgeRecord { verdicts: spread(&answered, verdicts), ..JudgeRecord::default() }
        }
        None => {
            let task = stages.task(&spec.prompts.task)?;
            let score = |(row, answer): &(Row, String)| {
                task.score(row, answer).ok_or_else(|| {
                    Error::config(format!("`{}` does not score answers", spec.prompts.task.name))
                        .key("fine_tune.tasks")
                        .help("give the task a scoring rule")
                })
            };
            let correct = asked.iter().map(score).collect::<Result<Vec<_>>>()?;
            JudgeRecord { correct: spread(&answered, correct), ..JudgeRecord::default() }
        }
    };
    write_json(&io.output.join(RECORD), &record)
}

/// What was made of the answered prompts, at the places of all prompts.
fn spread<T>(answered: &[bool], made: Vec<T>) -> Vec<Option<T>> {
    let mut made = made.into_iter();
    answered.iter().map(|answered| if *answered { made.next() } else { None }).collect()
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
                .help("run the experiment again with `titer run`: the damaged stage is computed anew")
        })
    };
    lines.map(parse).collect()
}
