//! Checks of a defense in every form that its settings give it. The conformance suite sees the defaults only.

use candle_core::DType;
use serde_json::{Value, json};
use titer_core::data::Stream;
use titer_core::defense::Clock;
use titer_core::testing::dot;
use titer_core::{DefenseEntry, Entry, Grads, Result, Weights, registry};

use super::models::{all_tiny, tiny};
use super::steps::{begin, context, data, defense, gap, moved, noise, plain, same, settings, three_rows, update};

/// Fails unless `grads` is the slope of `loss` at the weights, by central differences along random directions.
pub fn check_slope(weights: &Weights, grads: &Grads, place: &str, mut loss: impl FnMut() -> Result<f64>) -> Result<()> {
    const STEP: f64 = 1e-5;
    let here = weights.snapshot()?;
    for seed in 20..22 {
        let direction = noise(&here, seed)?;
        let mut at = |offset: f64| {
            weights.set(&here.clone().add_scaled(offset, &direction)?)?;
            loss()
        };
        let slope = (at(STEP)? - at(-STEP)?) / (2. * STEP);
        weights.set(&here)?;
        let ours = dot(grads, &direction)?;
        assert!((slope - ours).abs() < 1e-6 * (1. + slope.abs()), "{place}: the slope is {slope}, the gradient {ours}");
    }
    Ok(())
}

/// Fails unless in every form the gradient is that of the loss that is logged, on every architecture.
pub fn check_slopes(name: &str, forms: &[Value]) -> Result<()> {
    for (model, mut weights) in all_tiny(DType::F64, 0.)? {
        let start = weights.snapshot()?;
        for given in forms {
            weights.set(&start)?;
            let (user, mut streams) = data()?;
            streams.insert("safe", Stream::of_batches(vec![three_rows(6)?])?);
            let mut defense = defense(name, given.clone())?;
            begin(defense.as_mut(), model.as_ref(), &mut weights, &mut streams)?;
            moved(&weights)?;
            let clock = Clock::at(1, 10);
            let mut step = || update(defense.as_mut(), model.as_ref(), &weights, &mut streams, &user, clock);
            let ours = step()?;
            let without = plain(model.as_ref(), &weights, &user, clock)?;
            assert!(gap(&ours.grads, &without.grads)? > 1e-3, "{name} {given} does nothing");
            check_slope(&weights, &ours.grads, &format!("{name} {given}"), || step()?.loss.value())?;
        }
    }
    Ok(())
}

/// Fails unless in every form a step makes as many passes as are declared.
pub fn check_passes(name: &str, forms: &[Value]) -> Result<()> {
    let entry = registry::find::<DefenseEntry>(name)?;
    let (model, mut weights) = tiny(DType::F32, 0.)?;
    for given in forms {
        let (user, mut streams) = data()?;
        let mut defense = defense(name, given.clone())?;
        begin(defense.as_mut(), model.as_ref(), &mut weights, &mut streams)?;
        let mut cx = context(model.as_ref(), &weights, &mut streams);
        defense.step(&mut cx, &user)?;
        let declared = (entry.passes)(&entry.resolve(&settings(given))?);
        assert_eq!(cx.passes() as f64, declared, "{name} {given}");
    }
    Ok(())
}

/// Fails unless the neutral settings are plain fine-tuning to the last bit, and draw nothing.
pub fn check_neutral(name: &str) -> Result<()> {
    let neutral = registry::find::<DefenseEntry>(name)?.neutral.expect("neutral settings");
    assert_eq!(beside_plain(name, neutral())?, (true, 0), "{name}: is it plain, and how often does it draw?");
    Ok(())
}

/// Whether a step in this form is one of plain fine-tuning to the last bit.
pub fn is_plain(name: &str, given: Value) -> Result<bool> {
    Ok(beside_plain(name, given)?.0)
}

/// Whether a step with dropout, after training has moved the weights, is one of plain fine-tuning; and how many batches
/// it draws.
fn beside_plain(name: &str, given: Value) -> Result<(bool, usize)> {
    let (model, mut weights) = tiny(DType::F32, 0.2)?;
    let (user, mut streams) = data()?;
    let mut defense = defense(name, given)?;
    begin(defense.as_mut(), model.as_ref(), &mut weights, &mut streams)?;
    moved(&weights)?;
    let clock = Clock::at(3, 10);
    let ours = update(defense.as_mut(), model.as_ref(), &weights, &mut streams, &user, clock)?;
    let plain = plain(model.as_ref(), &weights, &user, clock)?;
    Ok((same(&ours, &plain)?, streams.drawn()["safe"]))
}

/// Fails unless each value out of range is refused with its key.
pub fn check_refused(name: &str, wrong: &[(Value, &str)]) {
    for (given, key) in wrong {
        let error = defense(name, given.clone()).map(|_| ()).expect_err("a wrong value");
        assert!(format!("{error:?}").contains(key), "{name} {given}: {error:?}");
    }
}

/// Fails unless the published form has every quirk and can be built.
pub fn check_published(name: &str) -> Result<()> {
    let (entry, published) = (registry::find::<DefenseEntry>(name)?, json!({ "fidelity": "code-exact" }));
    let resolved = entry.resolve(&settings(&published))?;
    let correct = (entry.settings.defaults)();
    for quirk in entry.quirks {
        assert_eq!(resolved[quirk.setting], (quirk.published)(), "{name} {}", quirk.setting);
        assert_ne!(resolved[quirk.setting], correct[quirk.setting], "{name} {}", quirk.setting);
    }
    defense(name, published)?;
    Ok(())
}

/// Fails unless a step before the stage was begun, with nothing loaded, is an error that says so.
pub fn check_must_begin(name: &str) -> Result<()> {
    let (model, weights) = tiny(DType::F32, 0.)?;
    let (user, mut streams) = data()?;
    let mut defense = defense(name, json!({}))?;
    let step = update(defense.as_mut(), model.as_ref(), &weights, &mut streams, &user, Clock::at(0, 9));
    let error = step.expect_err("nothing to hold on to").to_string();
    assert!(error.contains("the defense has no"), "{name}: {error}");
    Ok(())
}
