//! Verdicts on stored answers.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use titer_core::device::parse_dtype;
use titer_core::model::generate::Finish;
use titer_core::report::Answer;
use titer_core::{Answers, Asked, Error, JudgeCx, JudgeEntry, Label, Result, Row, Verdict, registry};

use super::{ANSWERS, RECORD, StageIo, Stages, base_of, read_json, settings, write_json};
use crate::disk;
use crate::experiment::spec::PluginSpec;
use crate::manifest::digest;
use crate::plan::JudgeSpec;
use crate::stage::train_loop::Watch;

/// The verdicts of a judge that is not done, in a checkpoint.
const VERDICTS: &str = "verdicts.json";

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
    /// What the judge took each answer for; none where it was not clear, or where there was no answer.
    pub fn labels(&self) -> Vec<Option<Label>> {
        self.verdicts.iter().map(|verdict| verdict.as_ref()?.label()).collect()
    }

    /// On how many answers the judge's output could not be parsed.
    pub fn unparsable(&self) -> usize {
        self.verdicts.iter().flatten().filter(|verdict| verdict.label().is_none()).count()
    }

    /// How many prompts of `probe` count, and how many were too long or could not be judged, if any.
    pub fn counts(&self, probe: &str) -> Vec<(String, usize)> {
        let judged = self.labels().iter().flatten().count() + self.correct.iter().flatten().count();
        let unparsable = self.unparsable();
        let too_long = self.verdicts.len() + self.correct.len() - judged - unparsable;
        let mut counts = vec![(probe.to_owned(), judged)];
        let others = [("too_long", too_long), ("unparsable", unparsable)].into_iter().filter(|(_, count)| *count > 0);
        counts.extend(others.map(|(why, count)| (format!("{probe}_{why}"), count)));
        counts
    }
}

pub(super) fn run(stages: &Stages, spec: &JudgeSpec, io: &mut StageIo) -> Result<()> {
    let answers = read_answers(&(io.artifact)(&io.parent()?.key)?.join(ANSWERS))?;
    let answered: Vec<bool> = answers.iter().map(|answer| answer.finish != Some(Finish::TooLong)).collect();
    let asked = answers.into_iter().zip(&answered).filter(|(_, answered)| **answered).map(|(answer, _)| {
        let Answer { instruction, input, history, reference: output, .. } = answer;
        (Row { instruction, input, output, history }, answer.answer)
    });
    let asked: Vec<(Row, String)> = asked.collect();
    let record = match &spec.judge {
        Some(judge) => {
            let asked: Vec<Asked> = asked.iter().map(|(row, answer)| Asked { row, answer }).collect();
            let verdicts = verdicts(stages, judge, &Answers { asked: &asked, labels: &spec.labels }, io)?;
            JudgeRecord { verdicts: spread(&answered, verdicts), ..JudgeRecord::default() }
        }
        None => {
            io.watch.started(asked.len(), 0);
            let unscored = || {
                Error::config(format!("`{}` does not score answers", spec.prompts.task.name))
                    .key("fine_tune.tasks")
                    .help("give the task a scoring rule")
            };
            let correct = stages.read(&spec.prompts.task, |task| {
                asked.iter().map(|(row, answer)| task.score(row, answer).ok_or_else(unscored)).collect::<Result<_>>()
            })?;
            JudgeRecord { correct: spread(&answered, correct), ..JudgeRecord::default() }
        }
    };
    write_json(&io.output.join(RECORD), &record)
}

/// The verdicts of a judge, which goes on where an earlier run stopped.
fn verdicts(stages: &Stages, spec: &PluginSpec, answers: &Answers, io: &mut StageIo) -> Result<Vec<Verdict>> {
    let judge = (registry::find::<JudgeEntry>(&spec.name)?.build)(&settings(spec), &stages.folder)?;
    let files = judge.files()?;
    let unchanged = || stages.inputs.check(None, &files, &spec.content);
    unchanged()?;
    let precision = parse_dtype(base_of(io.ancestors)?.dtype, &stages.device)?;
    let watch = &mut *io.watch;
    let kept = KeptVerdicts::newest(answers, watch)?;
    let (count, kept_before, of) = (kept.verdicts.len(), given(&kept.verdicts), kept.answers);
    watch.started(count, kept_before);
    let mut changed = None;
    let mut keep = |verdicts: &[Option<Verdict>]| {
        changed = changed.take().or_else(|| unchanged().err());
        if changed.is_some() {
            return Err(Error::data("the judge's files were changed"));
        }
        let done = given(verdicts);
        watch.answered(done);
        match done < count {
            true if watch.must_stop() => Err(Error::interrupted()),
            true if watch.checkpoint_due() => save(watch, &of, verdicts),
            _ => Ok(()),
        }
    };
    let mut cx = JudgeCx::new(&stages.device, precision, kept.verdicts, &mut keep);
    // A judge that failed after its last verdict is not asked again.
    let judged = if kept_before < count { judge.judge(answers, &mut cx) } else { Ok(()) };
    let verdicts = cx.into_verdicts();
    // Verdicts by files that were changed meanwhile are not kept.
    if let Some(error) = changed {
        return Err(error);
    }
    let missing = count - given(&verdicts);
    // What it has given need not be asked again. Its own error tells more than one of the disk.
    if (judged.is_err() || missing > 0)
        && given(&verdicts) > kept_before
        && let Err(error) = save(watch, &of, &verdicts)
    {
        tracing::warn!("verdicts since the last checkpoint are lost: {error}");
    }
    judged?;
    match missing {
        0 => Ok(verdicts.into_iter().flatten().collect()),
        _ if watch.must_stop() => Err(Error::interrupted()),
        _ => Err(Error::run(format!("the judge `{}` gave no verdict on {missing} of {count} answers", spec.name))
            .help("a judge gives a verdict on every answer that is pending, if only that its output is unparsable")),
    }
}

/// The verdicts of a judge that is not done.
#[derive(Serialize, Deserialize)]
struct KeptVerdicts {
    /// The hash of the answers that they are about.
    answers: String,
    /// By the place of the answer.
    verdicts: Vec<Option<Verdict>>,
}

impl KeptVerdicts {
    /// The newest checkpoint of a judge of these answers; without one, no verdicts.
    fn newest(answers: &Answers, watch: &dyn Watch) -> Result<Self> {
        let texts: Vec<Value> = answers.asked.iter().map(|asked| json!([asked.row, asked.answer])).collect();
        let none = Self { answers: digest(&json!(texts)), verdicts: vec![None; texts.len()] };
        let Some(folder) = watch.resume() else { return Ok(none) };
        let kept: Self = read_json(&folder.join(VERDICTS))?;
        Ok(if kept.answers == none.answers { kept } else { none })
    }
}

fn given(verdicts: &[Option<Verdict>]) -> usize {
    verdicts.iter().flatten().count()
}

fn save(watch: &mut dyn Watch, answers: &str, verdicts: &[Option<Verdict>]) -> Result<()> {
    let kept = json!({ "answers": answers, "verdicts": verdicts });
    watch.save(given(verdicts), &|folder| write_json(&folder.join(VERDICTS), &kept))
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
