//! Answers to prompts: generated once, stored with their text, judged later as often as asked.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Instant;

use serde::{Deserialize, Serialize};
use titer_core::model::generate::{Decoding, Finish, greedy};
use titer_core::report::Answer;
use titer_core::text::Encoder;
use titer_core::{Error, Result};

use super::{ANSWERS, RECORD, StageIo, Stages, write_json};
use crate::disk;
use crate::plan::AnswerSpec;

/// What generating cost.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub struct AnswerRecord {
    /// Seconds.
    pub seconds: f64,
}

pub(super) fn run(stages: &Stages, spec: &AnswerSpec, io: &mut StageIo) -> Result<()> {
    let begun = Instant::now();
    let mut base = io.lineage(stages).parent()?;
    base.weights.merge()?;
    let rows = stages.test_rows(&spec.prompts)?;
    let tokenizer = base.tokenizer;
    let encoder = Encoder { tokenizer, template: spec.template.clone(), max_length: usize::MAX };
    let prompts = rows.iter().map(|row| encoder.prompt(row)).collect::<Result<Vec<_>>>()?;
    let decoding = Decoding {
        max_new_tokens: spec.max_new_tokens,
        batch_size: spec.batch_size,
        ends: encoder.tokenizer.ends.clone(),
    };
    io.watch.started(prompts.len(), 0);
    let watch = &mut *io.watch;
    let answers = greedy(base.model.as_ref(), &base.weights, &prompts, &decoding, |done| {
        watch.answered(done);
        if watch.must_stop() { Err(Error::interrupted()) } else { Ok(()) }
    })?;
    if !answers.is_empty() && answers.iter().all(|answer| answer.finish == Finish::TooLong) {
        let (positions, longest) = (base.model.spec().max_positions, spec.max_new_tokens);
        let key = if spec.probe == "task" { "fine_tune.tasks" } else { "evaluate" };
        return Err(Error::data(format!(
            "every prompt of the probe `{}` is too long for the model's {positions} positions with an answer of {longest} \
             tokens",
            spec.probe
        ))
        .key(key)
        .help("lower `max_new_tokens`, or take shorter prompts"));
    }
    let mut lines = String::new();
    for (row, answer) in rows.into_iter().zip(answers) {
        let answer = Answer {
            probe: spec.probe.clone(),
            instruction: row.instruction,
            input: row.input,
            history: row.history,
            reference: row.output,
            answer: encoder.tokenizer.decode(&answer.tokens)?,
            finish: Some(answer.finish),
            verdicts: BTreeMap::new(),
            correct: None,
        };
        let line = serde_json::to_string(&answer).map_err(|error| Error::run("cannot serialise").source(error))?;
        writeln!(lines, "{line}").map_err(|error| Error::run("cannot format").source(error))?;
    }
    disk::write(&io.output.join(ANSWERS), lines.as_bytes())?;
    write_json(&io.output.join(RECORD), &AnswerRecord { seconds: begun.elapsed().as_secs_f64() })
}
