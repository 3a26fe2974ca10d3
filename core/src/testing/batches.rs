//! Circumstances: micro batches, single rows, other models, other ways to train and to store.

use std::fmt::Write;

use candle_core::DType;
use candle_core::quantized::GgmlDType;

use super::CheckOutcome;
use super::case::{Case, Run};
use super::fixture::{Adapted, joined};
use super::laws::runs;
use super::numbers::distance;
use crate::data::stream::Stream;
use crate::defense::streams::Streams;
use crate::defense::update::Update;
use crate::error::Result;
use crate::tensor::grads::Grads;
use crate::weights::precision::Precision;

/// Every micro batch of an update counts, and accumulated batches are one large batch, or the entry says why not.
pub(super) fn accumulation(case: &Case) -> Result<CheckOutcome> {
    let counts = every_micro_batch_counts(case)?;
    let CheckOutcome::Passed(mut finding) = counts else { return Ok(counts) };
    let [loss, grads] = joint_gap(case)?;
    let limit = case.tolerance(EQUAL);
    let equal = loss < limit && grads < limit;
    let _ = write!(finding, "; from one large batch the loss is {loss:.1e} away, the gradients {grads:.1e}");
    let declared = case.limits()?.accumulation;
    if let Some(why) = declared {
        let _ = write!(finding, ", declared: {why}");
    }
    Ok(CheckOutcome::judge(equal == declared.is_none(), finding))
}

/// How far the update of two micro batches is from that of one batch with the rows of both, in the stage's own data and
/// in every stream: loss and gradients, each as a share.
fn joint_gap(case: &Case) -> Result<[f64; 2]> {
    let case = Case { micros: 2, ..case.precise() };
    let mut run = case.under_way()?;
    let parts = [run.draw()?, run.draw()?];
    let (mut split, mut whole) = (case.streams()?, Streams::default());
    split.seek(&run.streams.drawn());
    for (name, drawn) in run.streams.drawn() {
        let mut ahead = case.streams()?;
        ahead.seek(&[(name.clone(), drawn)].into());
        let mut next = || ahead.next(&name, run.weights.device());
        let pairs = (0..JOINED).map(|_| joined(&[next()?, next()?], case.device));
        whole.insert(name.clone(), Stream::of_batches(pairs.collect::<Result<_>>()?)?);
    }
    let (split, whole) = (run.update_of(&parts, split)?, run.update_of(&[joined(&parts, case.device)?], whole)?);
    let (loss, other) = (split.loss.value()?, whole.loss.value()?);
    let grads = distance(&split.grads, &whole.grads)? / whole.grads.norm()?.value()?;
    Ok([(loss - other).abs() / other.abs().max(1.), grads])
}

/// Another micro batch in the place of one changes the update.
fn every_micro_batch_counts(case: &Case) -> Result<CheckOutcome> {
    let case = Case { micros: 2, ..case.clone() };
    let (grads, mut moved) = (accumulated(&case, None)?, Vec::new());
    for micro in 0..case.micros {
        let change = distance(&grads, &accumulated(&case, Some(micro))?)? / grads.norm()?.value()?;
        if change.is_nan() || change == 0. {
            return Ok(CheckOutcome::Failed(format!("micro batch {micro} of an update does not count")));
        }
        moved.push(format!("{:.0} %", 100. * change));
    }
    Ok(CheckOutcome::Passed(format!("another micro batch moves the update by {}", moved.join(" and "))))
}

/// The gradients of the first update; micro batch `other` has other data, its batches of the streams included.
fn accumulated(case: &Case, other: Option<usize>) -> Result<Grads> {
    let mut run = case.run()?;
    run.begin()?;
    let mut batches = (0..=case.micros).map(|_| run.draw()).collect::<Result<Vec<_>>>()?;
    if let Some(other) = other {
        batches.swap(other, case.micros);
    }
    let batches = &batches[..case.micros];
    let update = Update::over(batches, |micro| {
        let ahead = usize::from(other == Some(micro));
        shift_streams(&mut run, |drawn| drawn + ahead);
        let update = run.micro(batches, micro);
        shift_streams(&mut run, |drawn| drawn - ahead);
        update
    });
    Ok(update?.grads)
}

/// How far numbers may be apart, as a share, that differ in the order of sums only, in double precision.
const EQUAL: f64 = 1e-9;
/// Batches of a stream of joined ones.
const JOINED: usize = 3;

fn shift_streams(run: &mut Run, to: impl Fn(usize) -> usize) {
    let drawn = run.streams.drawn().into_iter().map(|(name, drawn)| (name, to(drawn))).collect();
    run.streams.seek(&drawn);
}

/// The stage runs on batches of one row.
pub(super) fn one_row(case: &Case) -> Result<CheckOutcome> {
    runs(&Case { batch_size: 1, ..case.clone() })
}

/// The stage runs on a model of one layer.
pub(super) fn one_layer(case: &Case) -> Result<CheckOutcome> {
    match case.shallow {
        Some(model) => runs(&Case { model, ..case.clone() }),
        None => Ok(CheckOutcome::NotApplicable("there is no model of one layer at hand")),
    }
}

/// The stage runs if all parameters are trained.
pub(super) fn full(case: &Case) -> Result<CheckOutcome> {
    runs(&Case { trained: Adapted::Full, ..case.clone() })
}

/// The stage runs over a base in half precision.
pub(super) fn bf16(case: &Case) -> Result<CheckOutcome> {
    stored(case, DType::BF16.into())
}

/// The stage runs over a base in blocks of eight bits.
pub(super) fn q8_0(case: &Case) -> Result<CheckOutcome> {
    stored(case, Precision::Quantized(GgmlDType::Q8_0))
}

fn stored(case: &Case, precision: Precision) -> Result<CheckOutcome> {
    if precision.check(case.model.params()).is_err() {
        return Ok(CheckOutcome::NotApplicable("the model's sizes do not fit these blocks"));
    }
    runs(&Case { precision, ..case.clone() })
}
