//! Asks a judge outside of a run.

use candle_core::{DType, Device};

use crate::error::{Error, Result};
use crate::judge::{Answers, Judge, JudgeCx, Verdict};
use crate::weights::Precision;

/// What `judge` says of each answer, on the CPU, with models in `f32`.
///
/// # Errors
/// The judge could not be asked, or gave no verdict on an answer.
pub fn verdicts(judge: &dyn Judge, answers: &Answers) -> Result<Vec<Verdict>> {
    let mut keep = |_: &[Option<Verdict>]| Ok(());
    let none = vec![None; answers.asked.len()];
    let mut cx = JudgeCx::new(&Device::Cpu, Precision::from(DType::F32), none, &mut keep);
    judge.judge(answers, &mut cx)?;
    let verdict = |(place, verdict): (usize, Option<Verdict>)| {
        verdict.ok_or_else(|| Error::run(format!("the judge gave no verdict on answer {place}")))
    };
    cx.into_verdicts().into_iter().enumerate().map(verdict).collect()
}
