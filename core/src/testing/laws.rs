//! What a stage under a defense owes: declarations that hold, the laws about weights, and the comparison with plain
//! fine-tuning.

use std::collections::BTreeSet;

use super::case::{Case, Run};
use super::numbers::Numbers;
use super::watched::{PLANNED, Watched};
use super::{CheckOutcome, told};
use crate::defense::stage::Stage;
use crate::error::Result;
use crate::model::architecture::sites_of_kind;

/// A stage runs to its end on the declared streams, and its numbers stay finite.
pub(super) fn runs(case: &Case) -> Result<CheckOutcome> {
    if case.stage != Stage::Post && case.declared_passes()? == 0. {
        return Ok(CheckOutcome::NotApplicable("it makes no update: the stage is left out"));
    }
    let run = case.run()?.whole()?;
    if let Some(step) = run.losses.iter().position(|loss| !loss.is_finite()) {
        return Ok(CheckOutcome::Failed(format!("the loss of step {step} is {}", run.losses[step])));
    }
    if let Some(name) = Numbers::of(&run.weights)?.first_not_finite() {
        return Ok(CheckOutcome::Failed(format!("`{name}` holds a value that is not finite")));
    }
    let drawn = run.streams.drawn().into_iter().map(|(stream, count)| format!(", {count} batches of `{stream}`"));
    Ok(CheckOutcome::Passed(format!("{} updates{}", run.losses.len(), drawn.collect::<String>())))
}

/// Declared sites exist, and no other kind is touched.
pub(super) fn sites(case: &Case) -> Result<CheckOutcome> {
    for kind in case.entry.sites {
        sites_of_kind(case.model, kind)?;
    }
    let watched = Watched::new(case.model);
    Case { model: &watched, ..case.clone() }.run()?.whole()?;
    let kinds: BTreeSet<String> =
        watched.touched().iter().filter_map(|site| Some(site.rsplit('.').next()?.to_owned())).collect();
    Ok(match kinds.iter().find(|kind| !case.entry.sites.contains(&kind.as_str())) {
        Some(kind) => CheckOutcome::Failed(format!("acts on `{kind}`, but declares {:?}", case.entry.sites)),
        None => CheckOutcome::Passed(format!("acts on {kinds:?}")),
    })
}

/// A step makes as many passes as declared, with the default and the neutral settings.
pub(super) fn passes(case: &Case) -> Result<CheckOutcome> {
    let mut findings = Vec::new();
    for case in [Some(case.clone()), case.neutral()?].into_iter().flatten() {
        let declared = case.declared_passes()?;
        // Passes are counted to be sure on the host; elsewhere they are only seen to be made.
        let most = if case.device.is_cpu() { 200. } else { 8. };
        let total = (800. / declared).clamp(8., most) as usize;
        let case = Case { total, ..case };
        let mut run = case.run()?;
        run.begin()?;
        for _ in 0..total {
            run.update()?;
        }
        let finding = format!("{declared} declared, {} measured", run.passes as f64 / total as f64);
        // What happens in some steps only may be one time off.
        if (run.passes as f64 - declared * total as f64).abs() >= 1. {
            return Ok(CheckOutcome::Failed(finding));
        }
        findings.push(finding);
    }
    Ok(CheckOutcome::Passed(findings.join("; neutral: ")))
}

/// Law 3: with the neutral settings the stage equals plain fine-tuning bit for bit.
pub(super) fn neutral(case: &Case) -> Result<CheckOutcome> {
    let Some(neutral) = case.neutral()? else {
        return Ok(CheckOutcome::NotApplicable("it declares no neutral settings"));
    };
    for micros in [1, 2] {
        let case = Case { micros, ..neutral.clone() };
        if let Some(difference) = case.run()?.whole()?.difference(&case.plain()?.whole()?)? {
            return Ok(CheckOutcome::Failed(format!("with {micros} micro batches {difference}")));
        }
    }
    Ok(CheckOutcome::Passed(format!("{} updates equal to the last bit, also under accumulation", case.total)))
}

/// Law 3: with the default settings it does not.
pub(super) fn active(case: &Case) -> Result<CheckOutcome> {
    if case.neutral()?.is_some_and(|neutral| neutral.resolved().ok() == case.resolved().ok()) {
        return Ok(CheckOutcome::NotApplicable("its default settings are the neutral ones"));
    }
    let difference = case.run()?.whole()?.difference(&case.plain()?.whole()?)?;
    let idle = || CheckOutcome::Failed("with the default settings it does what plain fine-tuning does".to_owned());
    Ok(difference.map_or_else(idle, CheckOutcome::Passed))
}

/// Gradient checkpointing changes no bit, or the entry says why the two do not go together.
pub(super) fn checkpointing(case: &Case) -> Result<CheckOutcome> {
    let again = Case { checkpointing: true, ..case.clone() };
    let difference = |again: Run| again.difference(&case.run()?.whole()?);
    Ok(match (case.limits()?.checkpointing, again.run()?.whole().and_then(difference)) {
        (None, Ok(None)) => CheckOutcome::Passed("the same bits with and without".to_owned()),
        (None, Ok(Some(difference))) => CheckOutcome::Failed(format!("with gradient checkpointing {difference}")),
        (None, Err(error)) => {
            CheckOutcome::Failed(format!("fails with gradient checkpointing, undeclared: {}", told(&error)))
        }
        (Some(_), Ok(None)) => {
            CheckOutcome::Failed("goes with gradient checkpointing, but declares that it does not".to_owned())
        }
        (Some(why), _) => CheckOutcome::NotApplicable(why),
    })
}

/// Law 1: a step leaves the weights as it found them.
pub(super) fn untouched(case: &Case) -> Result<CheckOutcome> {
    let mut run = case.run()?;
    run.begin()?;
    while run.step < case.total {
        let (step, before) = (run.step, Numbers::of(&run.weights)?);
        run.update()?;
        if let Some(name) = before.first_difference(&Numbers::of(&run.weights)?) {
            return Ok(CheckOutcome::Failed(format!(
                "step {step} changes `{name}`: move weights inside `cx.scratch` only"
            )));
        }
    }
    Ok(CheckOutcome::Passed(format!("{} steps leave every bit", case.total)))
}

/// Law 1, also for a step in which a pass fails; and the failure reaches the caller.
pub(super) fn failure(case: &Case) -> Result<CheckOutcome> {
    let watched = Watched::new(case.model);
    let case = Case { model: &watched, ..case.clone() };
    let mut run = case.run()?;
    run.begin()?;
    run.update()?;
    let passes = run.passes;
    for pass in BTreeSet::from([0, passes / 2, passes.saturating_sub(1)]) {
        let mut run = case.run()?;
        run.begin()?;
        let before = Numbers::of(&run.weights)?;
        watched.fail_after(Some(pass));
        let result = run.update();
        watched.fail_after(None);
        if !result.is_err_and(|error| error.to_string().contains(PLANNED)) {
            return Ok(CheckOutcome::Failed(format!("pass {pass} of a step fails, and nobody is told")));
        }
        if let Some(name) = before.first_difference(&Numbers::of(&run.weights)?) {
            return Ok(CheckOutcome::Failed(format!("after pass {pass} of a step fails, `{name}` stays changed")));
        }
    }
    Ok(CheckOutcome::Passed(format!("a failure in any of {passes} passes is told and leaves every bit")))
}
