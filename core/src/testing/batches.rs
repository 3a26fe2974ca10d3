//! Circumstances: micro batches, single rows, padding, other models, other ways to train and to store.

use candle_core::quantized::GgmlDType;
use candle_core::{DType, Tensor};

use super::Outcome;
use super::case::{Case, Run, seed};
use super::fixture::{Adapted, normal};
use super::laws::runs;
use super::numbers::{Numbers, distance};
use crate::{Error, Grads, Precision, Result, Stage};

/// Every micro batch of an update counts: another one in its place changes the update.
pub(super) fn accumulation(case: &Case) -> Result<Outcome> {
    let case = Case { micros: 2, ..case.clone() };
    let (grads, mut moved) = (accumulated(&case, None)?, Vec::new());
    for micro in 0..case.micros {
        let change = distance(&grads, &accumulated(&case, Some(micro))?)? / grads.norm()?.value()?;
        if change.is_nan() || change == 0. {
            return Ok(Outcome::Failed(format!("micro batch {micro} of an update does not count")));
        }
        moved.push(format!("{:.0} %", 100. * change));
    }
    Ok(Outcome::Passed(format!("another micro batch moves the update by {}", moved.join(" and "))))
}

/// The gradients of the first update; micro batch `other` has other data, its batches of the streams included.
fn accumulated(case: &Case, other: Option<usize>) -> Result<Grads> {
    let mut run = case.run()?;
    run.begin()?;
    let mut batches = (0..=case.micros).map(|_| run.draw()).collect::<Result<Vec<_>>>()?;
    if let Some(other) = other {
        batches.swap(other, case.micros);
    }
    let mut grads = Grads::default();
    for (micro, batch) in batches[..case.micros].iter().enumerate() {
        let ahead = usize::from(other == Some(micro));
        shift_streams(&mut run, |drawn| drawn + ahead);
        grads = grads.add_scaled(1., &run.micro(batch, micro)?.grads)?;
        shift_streams(&mut run, |drawn| drawn - ahead);
    }
    Ok(grads)
}

fn shift_streams(run: &mut Run, to: impl Fn(usize) -> usize) {
    let drawn = run.streams.drawn().into_iter().map(|(name, drawn)| (name, to(drawn))).collect();
    run.streams.seek(&drawn);
}

/// The stage runs on batches of one row.
pub(super) fn one_row(case: &Case) -> Result<Outcome> {
    runs(&Case { batch_size: 1, ..case.clone() })
}

/// The stage runs on a model of one layer.
pub(super) fn one_layer(case: &Case) -> Result<Outcome> {
    match case.shallow {
        Some(model) => runs(&Case { model, ..case.clone() }),
        None => Ok(Outcome::NotApplicable("there is no model of one layer at hand")),
    }
}

/// The stage runs if all parameters are trained.
pub(super) fn full(case: &Case) -> Result<Outcome> {
    runs(&Case { trained: Adapted::Full, ..case.clone() })
}

/// The stage runs over a base in half precision.
pub(super) fn bf16(case: &Case) -> Result<Outcome> {
    stored(case, DType::BF16.into())
}

/// The stage runs over a base in blocks of eight bits.
pub(super) fn q8_0(case: &Case) -> Result<Outcome> {
    stored(case, Precision::Blocks(GgmlDType::Q8_0))
}

fn stored(case: &Case, precision: Precision) -> Result<Outcome> {
    if precision.check_model(case.model).is_err() {
        return Ok(Outcome::NotApplicable("the model's sizes do not fit these blocks"));
    }
    runs(&Case { precision, ..case.clone() })
}

/// How far numbers may be apart that differ in the order of sums only, in double precision.
const ROUNDING: f64 = 1e-6;

/// More padding changes nothing that is trained.
pub(super) fn padding(case: &Case) -> Result<Outcome> {
    let case = case.precise();
    let wide = Case { padding: 3, ..case.clone() };
    if case.stage == Stage::Post {
        let [narrow, wide] = [case.run()?.whole()?, wide.run()?.whole()?];
        let gap = Numbers::of(&narrow.weights)?.distance(&Numbers::of(&wide.weights)?);
        return Ok(Outcome::judge(gap < ROUNDING, format!("the weights differ by {gap:.1e}")));
    }
    let (mut narrow, mut wide) = (case.under_way()?, wide.under_way()?);
    let batches = [narrow.draw()?, wide.draw()?];
    let shapes = [narrow.attempt(&batches[0], Vec::new())?.noise, wide.attempt(&batches[1], Vec::new())?.noise];
    let noise = noise_of(&shapes)?;
    let a = narrow.attempt(&batches[0], noise.iter().map(|pair| pair[0].clone()).collect())?.update;
    let b = wide.attempt(&batches[1], noise.into_iter().map(|[_, wide]| wide).collect())?.update;
    let (loss, other) = (a.loss.value()?, b.loss.value()?);
    let gap = distance(&a.grads, &b.grads)? / a.grads.norm()?.value()?;
    let holds = gap < ROUNDING && (loss - other).abs() < ROUNDING * loss.abs().max(1.);
    Ok(Outcome::judge(holds, format!("the loss is {loss} and {other}, the gradients differ by {gap:.1e}")))
}

/// For each noise of a step one of the first shape, and the same with more noise where the second shape is larger: at
/// the padding.
fn noise_of(shapes: &[Vec<Vec<usize>>; 2]) -> Result<Vec<[Tensor; 2]>> {
    if shapes[0].len() != shapes[1].len() {
        return Err(Error::run("a step draws noise more often when there is more padding"));
    }
    let pair = |(index, (small, large)): (usize, (&Vec<usize>, &Vec<usize>))| {
        let noise = normal(small, seed().named("noise").at(index))?;
        Ok([noise.clone(), grown(noise, large)?])
    };
    shapes[0].iter().zip(&shapes[1]).enumerate().map(pair).collect()
}

/// `noise` with more noise behind it along every axis that is longer in `dims`.
fn grown(mut noise: Tensor, dims: &[usize]) -> Result<Tensor> {
    for (axis, &size) in dims.iter().enumerate() {
        let mut more = noise.dims().to_vec();
        if size > more[axis] {
            more[axis] = size - more[axis];
            noise = Tensor::cat(&[&noise, &normal(&more, seed().named("more").at(axis))?], axis)?;
        }
    }
    Ok(noise)
}
