//! Law 4: the gradients of a declared objective against finite differences.

use super::CheckOutcome;
use super::case::{Case, seed};
use super::fixture::noise_like;
use super::numbers::dot;
use crate::error::Result;

/// Half the distance of the two points of a central difference, along a direction of unit deviation.
const REACH: f64 = 1e-6;
/// How far the two slopes may be apart, as a share of the gradient's norm.
const TOLERANCE: f64 = 1e-5;

/// The gradients are the slope of the logged loss along random directions, in double precision.
pub(super) fn gradient(case: &Case) -> Result<CheckOutcome> {
    if !case.device.is_cpu() {
        return Ok(CheckOutcome::NotApplicable("finite differences need double precision, which only the host has"));
    }
    if !case.defense()?.loss_is_objective() {
        return Ok(CheckOutcome::NotApplicable("its update is no gradient of the loss that it logs"));
    }
    let case = case.precise();
    let mut run = case.under_way()?;
    let batch = run.draw()?;
    let (here, grads) = (run.weights.snapshot()?, run.attempt(&batch)?.grads);
    let norm = grads.norm()?.value()?;
    let mut worst = Vec::new();
    for index in 0..3 {
        let direction = noise_like(&run.weights, seed().named("direction").at(index))?;
        let loss = |by: f64| {
            run.weights.set(&here.clone().add_scaled(by, &direction)?)?;
            run.attempt(&batch)?.loss.value()
        };
        let slope = (loss(REACH)? - loss(-REACH)?) / (2. * REACH);
        worst.push((dot(&grads, &direction)? - slope).abs() / norm);
    }
    let off = worst.iter().copied().fold(0., f64::max);
    let holds = norm > 0. && worst.iter().all(|gap| *gap < TOLERANCE);
    Ok(CheckOutcome::judge(holds, format!("slopes differ by {off:.1e} of the gradient's norm {norm:.2e}")))
}
