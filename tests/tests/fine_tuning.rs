//! The defenses that act while the user fine-tunes: each in its correct form, against a computation of its own.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor};
use serde_json::{Value, json};
use titer_core::data::{Batch, Example, Stream, Tokens};
use titer_core::defense::{Clock, Orphan, StepCx, Streams};
use titer_core::model::sites_of_kind;
use titer_core::rng::{Seed, randn};
use titer_core::text::{TEMPLATES, Template};
use titer_core::{
    AlignmentDefense, DefenseEntry, Entry, Grads, Model, Row, Settings, Sites, StageCx, Update, Weights, registry,
};
use titer_tests::{all_tiny, context, tiny, values};

fn settings(given: &Value) -> Settings {
    given.as_object().cloned().unwrap_or_default().into()
}

/// The registered defense with `given`, resolved as a plan resolves it.
fn defense(name: &str, given: Value) -> Result<Box<dyn AlignmentDefense>> {
    let entry = registry::find::<DefenseEntry>(name)?;
    Ok((entry.build)(&settings(&entry.resolve(&settings(&given))?))?)
}

fn batch(seed: u64) -> Result<Batch> {
    titer_tests::batch(23, &[7, 4, 9], &mut Seed::new(seed).generator())
}

/// The user's batch of these tests, and a stream `safe` of two others.
fn data() -> Result<(Batch, Streams)> {
    let mut streams = Streams::default();
    streams.insert("safe", Stream::of_batches(vec![batch(6)?, batch(7)?])?);
    Ok((batch(5)?, streams))
}

fn begin(
    defense: &mut dyn AlignmentDefense,
    model: &dyn Model,
    weights: &mut Weights,
    streams: &mut Streams,
) -> Result<()> {
    let (seed, clock) = (Seed::new(4), Clock::at(0, 10));
    Ok(defense.begin(&mut StageCx { model, weights, streams, seed, clock, ancestry: &Orphan })?)
}

fn update(
    defense: &mut dyn AlignmentDefense,
    model: &dyn Model,
    weights: &Weights,
    streams: &mut Streams,
    batch: &Batch,
    clock: Clock,
) -> Result<Update> {
    Ok(defense.step(&mut StepCx::new(model, weights, streams, Seed::new(4), clock), batch)?)
}

/// Plain fine-tuning at the same place.
fn plain(model: &dyn Model, weights: &Weights, batch: &Batch, clock: Clock) -> Result<Update> {
    update(defense("sft", json!({}))?.as_mut(), model, weights, &mut Streams::default(), batch, clock)
}

/// Standard normal numbers in the shapes of `like`.
fn noise(like: &Grads, seed: u64) -> Result<Grads> {
    let draw = |(name, tensor): (&str, &Tensor)| -> Result<(String, Tensor)> {
        let z = randn(tensor.dims(), &mut Seed::new(seed).named(name).generator(), &Device::Cpu)?;
        Ok((name.to_owned(), z.to_dtype(tensor.dtype())?))
    };
    Ok(like.iter().map(draw).collect::<Result<Vec<_>>>()?.into_iter().collect())
}

/// Moves the weights away from where they are, as training would.
fn moved(weights: &Weights) -> Result<()> {
    let here = weights.snapshot()?;
    Ok(weights.set(&here.clone().add_scaled(0.05, &noise(&here, 11)?)?)?)
}

fn dot(a: &Grads, b: &Grads) -> Result<f64> {
    let mut sum = 0.;
    for (name, tensor) in a.iter() {
        let other = values(b.get(name).context("the same names")?)?;
        sum += values(tensor)?.iter().zip(&other).map(|(x, y)| x * y).sum::<f64>();
    }
    Ok(sum)
}

/// The largest difference of two gradients; a tensor that one side lacks is zero there.
fn gap(a: &Grads, b: &Grads) -> Result<f64> {
    let difference = a.clone().add_scaled(-1., b)?;
    let largest = |(_, tensor): (&str, &Tensor)| -> Result<f64> {
        Ok(values(tensor)?.into_iter().fold(0., |max, x| if x.is_nan() { f64::INFINITY } else { x.abs().max(max) }))
    };
    difference.iter().map(largest).try_fold(0f64, |max, gap| Ok(gap?.max(max)))
}

fn same(a: &Update, b: &Update) -> Result<bool> {
    Ok(a.grads.len() == b.grads.len() && gap(&a.grads, &b.grads)? == 0. && a.loss.value()? == b.loss.value()?)
}

/// Fails unless `grads` is the slope of `loss` at the weights, by central differences along random directions.
fn check_slope(weights: &Weights, grads: &Grads, place: &str, mut loss: impl FnMut() -> Result<f64>) -> Result<()> {
    const STEP: f64 = 1e-5;
    let here = weights.snapshot()?;
    for seed in 20..22 {
        let direction = noise(&here, seed)?;
        let mut at = |offset: f64| -> Result<f64> {
            weights.set(&here.clone().add_scaled(offset, &direction)?)?;
            loss()
        };
        let slope = (at(STEP)? - at(-STEP)?) / (2. * STEP);
        weights.set(&here)?;
        let zeros = here.scale(0.)?.add_scaled(1., grads)?;
        let ours = dot(&zeros, &direction)?;
        ensure!((slope - ours).abs() < 1e-6 * (1. + slope.abs()), "{place}: the slope is {slope}, the gradient {ours}");
    }
    Ok(())
}

/// Every gradient is that of the loss that is logged, in every form and on every architecture.
#[test]
fn gradients_are_the_slopes_of_the_declared_objectives() -> Result<()> {
    let cases = [
        ("ewc", json!({ "lambda": 30.0 })),
        ("ewc", json!({ "lambda": 30.0, "fisher": "batch", "reduction": "sum", "penalty": "full" })),
        ("kl", json!({ "lambda": 0.7 })),
        ("kl", json!({ "lambda": 0.7, "axis": "sequence" })),
        ("ldifs", json!({ "rho": 0.5 })),
        ("ldifs", json!({ "rho": 0.5, "positions": "all", "reduction": "sum", "gate": 1e9 })),
        ("vlguard", json!({ "algorithm": "weighted", "lambda": 0.3 })),
        ("lisa", json!({ "rho": 0.5, "align_steps": 2, "fine_tune_steps": 3, "warmup": 0.0 })),
    ];
    for (model, mut weights) in all_tiny(DType::F64, 0.)? {
        let start = weights.snapshot()?;
        for (name, given) in &cases {
            weights.set(&start)?;
            let (user, mut streams) = data()?;
            streams.insert("safe", Stream::of_batches(vec![batch(6)?])?);
            let mut defense = defense(name, given.clone())?;
            begin(defense.as_mut(), model.as_ref(), &mut weights, &mut streams)?;
            moved(&weights)?;
            let clock = Clock::at(1, 10);
            let mut step = || update(defense.as_mut(), model.as_ref(), &weights, &mut streams, &user, clock);
            let ours = step()?;
            let without = plain(model.as_ref(), &weights, &user, clock)?;
            ensure!(gap(&ours.grads, &without.grads)? > 1e-3, "{name} {given} does nothing");
            check_slope(&weights, &ours.grads, &format!("{name} {given}"), || Ok(step()?.loss.value()?))?;
        }
    }
    Ok(())
}

/// What a step costs is what is declared.
#[test]
fn declared_passes_are_those_made() -> Result<()> {
    let cases = [
        ("ewc", json!({})),
        ("kl", json!({})),
        ("kl", json!({ "lambda": 0.0 })),
        ("vlguard", json!({})),
        ("vlguard", json!({ "algorithm": "weighted" })),
        ("vlguard", json!({ "algorithm": "weighted", "lambda": 0.0 })),
        ("lisa", json!({})),
        ("ldifs", json!({})),
        ("ldifs", json!({ "rho": 0.0 })),
        ("constrained-sft", json!({})),
        ("constrained-sft", json!({ "beta": 0.0 })),
        ("prompt-template", json!({})),
    ];
    let (model, mut weights) = tiny(DType::F32, 0.)?;
    for (name, given) in cases {
        let (user, mut streams) = data()?;
        let mut defense = defense(name, given.clone())?;
        begin(defense.as_mut(), model.as_ref(), &mut weights, &mut streams)?;
        let mut cx = context(model.as_ref(), &weights, &mut streams);
        defense.step(&mut cx, &user)?;
        let entry = registry::find::<DefenseEntry>(name)?;
        let declared = (entry.passes)(&entry.resolve(&settings(&given))?);
        assert_eq!(cx.passes() as f64, declared, "{name} {given}");
    }
    Ok(())
}

/// Neutral settings are plain fine-tuning to the last bit, with dropout, after training has moved the weights, and draw
/// nothing; the defaults are not.
#[test]
fn neutral_settings_are_plain_fine_tuning() -> Result<()> {
    let (model, mut weights) = tiny(DType::F32, 0.2)?;
    let start = weights.snapshot()?;
    for name in ["ewc", "kl", "vlguard", "lisa", "ldifs", "constrained-sft", "prompt-template"] {
        let entry = registry::find::<DefenseEntry>(name)?;
        let mut step = |given: Value| -> Result<(Update, Update, BTreeMap<String, usize>)> {
            weights.set(&start)?;
            let (user, mut streams) = data()?;
            let mut defense = defense(name, given)?;
            begin(defense.as_mut(), model.as_ref(), &mut weights, &mut streams)?;
            moved(&weights)?;
            let clock = Clock::at(3, 10);
            let ours = update(defense.as_mut(), model.as_ref(), &weights, &mut streams, &user, clock)?;
            Ok((ours, plain(model.as_ref(), &weights, &user, clock)?, streams.drawn()))
        };
        let (ours, plain, drawn) = step(entry.neutral.context("neutral settings")?())?;
        ensure!(same(&ours, &plain)?, "{name} is not neutral");
        assert_eq!(drawn["safe"], 0, "{name} draws");
        let (ours, plain, _) = step(json!({}))?;
        // These two act on the data and at inference.
        assert_eq!(same(&ours, &plain)?, ["vlguard", "prompt-template"].contains(&name), "{name} with its defaults");
    }
    Ok(())
}

/// The mean over rows of the squared gradient, and the published sum over batches.
#[test]
fn ewc_has_the_fisher_information_of_rows() -> Result<()> {
    let (model, mut weights) = tiny(DType::F64, 0.)?;
    let gradient = |weights: &Weights, batch: &Batch| -> Result<Grads> {
        Ok(context(model.as_ref(), weights, &mut Streams::default()).backward(batch, Sites::none())?.grads)
    };
    let safe = [batch(6)?, batch(7)?];
    let rows = safe.iter().map(Batch::rows).collect::<titer_core::Result<Vec<_>>>()?.concat();
    assert_eq!(rows.len(), 6);
    let squares = |parts: &[Batch], share: f64| -> Result<Grads> {
        parts.iter().try_fold(Grads::default(), |sum, part| {
            Ok(sum.add_scaled(share, &gradient(&weights, part)?.map(|g| Ok(g.sqr()?))?)?)
        })
    };
    let published = json!({ "fisher": "batch", "reduction": "sum" });
    let one = json!({ "fisher": "batch", "fisher_batches": 1 });
    let expected =
        [(json!({}), squares(&rows, 1. / 6.)?), (published, squares(&safe, 1.)?), (one, squares(&safe[..1], 1.)?)];
    for (given, expected) in expected {
        let (user, mut streams) = data()?;
        let mut ewc = defense("ewc", [given.clone(), json!({ "lambda": 8.0 })].into_iter().fold(json!({}), merged))?;
        begin(ewc.as_mut(), model.as_ref(), &mut weights, &mut streams)?;
        let start = weights.snapshot()?;
        let state = ewc.state();
        let fisher: Grads = state
            .tensors
            .iter()
            .filter_map(|(name, tensor)| Some((name.strip_prefix("fisher.")?.to_owned(), tensor.clone())))
            .collect();
        ensure!(gap(&fisher, &expected)? < 1e-12, "{given}");
        moved(&weights)?;
        let step = update(ewc.as_mut(), model.as_ref(), &weights, &mut streams, &user, Clock::at(2, 10))?;
        let drift = weights.snapshot()?.add_scaled(-1., &start)?.map(|d| Ok(d.sqr()?))?;
        let penalty = 4. * dot(&fisher, &drift)?;
        let ours = step.scalars["penalty"].value()?;
        ensure!((ours - penalty).abs() < 1e-12 * (1. + penalty) && penalty > 1e-4, "{ours} and {penalty}");
        weights.set(&start)?;
    }
    Ok(())
}

/// The keys of two tables.
fn merged(mut first: Value, second: Value) -> Value {
    let second = second.as_object().cloned().unwrap_or_default();
    first.as_object_mut().expect("a table").extend(second);
    first
}

/// Each pass of the Fisher information has a dropout mask of its own.
#[test]
fn ewc_draws_a_dropout_mask_for_each_pass() -> Result<()> {
    let (model, mut weights) = tiny(DType::F32, 0.5)?;
    let mut fisher = |batches: usize| -> Result<Grads> {
        let mut streams = Streams::default();
        streams.insert("safe", Stream::of_batches(vec![batch(6)?])?);
        let given = json!({ "fisher": "batch", "fisher_batches": batches });
        let mut ewc = defense("ewc", given)?;
        begin(ewc.as_mut(), model.as_ref(), &mut weights, &mut streams)?;
        let tensors = ewc.state().tensors.into_iter();
        Ok(tensors.filter(|(name, _)| name.starts_with("fisher.")).collect())
    };
    let (once, twice) = (fisher(1)?, fisher(2)?);
    ensure!(gap(&once, &twice)? > 1e-6, "the mean over one pass and over two are the same");
    Ok(())
}

/// The published trainer's uncleared gradient reaches the first update, also over a checkpoint and once under
/// accumulation, and no other.
#[test]
fn the_stale_gradient_of_ewc_is_in_the_first_update_only() -> Result<()> {
    let (model, mut weights) = tiny(DType::F64, 0.)?;
    let (user, _) = data()?;
    let mut first_steps = |stale: bool, micros: usize| -> Result<(Grads, Grads)> {
        let (_, mut streams) = data()?;
        let given = json!({ "fisher": "batch", "lambda": 2.0, "stale_gradient": stale });
        let mut begun = defense("ewc", given.clone())?;
        begin(begun.as_mut(), model.as_ref(), &mut weights, &mut streams)?;
        let mut ewc = defense("ewc", given)?;
        ewc.load_state(begun.state())?;
        let mut step = |step: usize| -> Result<Grads> {
            (0..micros).try_fold(Grads::default(), |sum, micro| {
                let clock = Clock { step, total: 10, micro, micros };
                let update = update(ewc.as_mut(), model.as_ref(), &weights, &mut streams, &user, clock)?;
                Ok(sum.add_scaled(1. / micros as f64, &update.grads)?)
            })
        };
        Ok((step(0)?, step(1)?))
    };
    for micros in [1, 3] {
        let ((clean, later), (stale, later_stale)) = (first_steps(false, micros)?, first_steps(true, micros)?);
        let (model, weights) = tiny(DType::F64, 0.)?;
        let mut none = Streams::default();
        let last = context(model.as_ref(), &weights, &mut none).backward(&batch(7)?, Sites::none())?.grads;
        ensure!(gap(&stale, &clean.add_scaled(1., &last)?)? < 1e-12, "the first step of {micros}");
        ensure!(gap(&later, &later_stale)? == 0., "the second step of {micros}");
    }
    Ok(())
}

/// Log-probabilities over each of `groups` of equal length, in plain arithmetic.
fn log_softmax(logits: &[f64]) -> Vec<f64> {
    let total = logits.iter().map(|x| x.exp()).sum::<f64>().ln();
    logits.iter().map(|x| x - total).collect()
}

/// Logits of every position, `[rows · length][vocabulary]`.
fn logits(model: &dyn Model, weights: &Weights, tokens: &Tokens) -> Result<Vec<Vec<f64>>> {
    let mut streams = Streams::default();
    let mut cx = context(model, weights, &mut streams);
    let (hidden, _) = cx.hidden(tokens, Sites::none())?;
    Ok(cx.logits(&hidden.flatten(0, 1)?)?.detach().to_vec2()?)
}

#[test]
fn kl_is_the_divergence_of_the_answers_tokens() -> Result<()> {
    let (model, mut weights) = tiny(DType::F64, 0.)?;
    let teacher = weights.snapshot()?;
    for axis in ["vocabulary", "sequence"] {
        weights.set(&teacher)?;
        let (user, mut streams) = data()?;
        let mut kl = defense("kl", json!({ "axis": axis, "lambda": 0.7 }))?;
        begin(kl.as_mut(), model.as_ref(), &mut weights, &mut streams)?;
        let taught = logits(model.as_ref(), &weights, &user.tokens)?;
        moved(&weights)?;
        let learnt = logits(model.as_ref(), &weights, &user.tokens)?;
        let (rows, length) = user.tokens.dims();
        // The distributions as lists of logits: over words at each label, or over positions for each word of each row.
        let groups = |logits: &[Vec<f64>]| -> Result<Vec<Vec<f64>>> {
            if axis == "vocabulary" {
                let positions = user.positions.to_vec1::<u32>()?;
                return Ok(positions.into_iter().map(|at| logits[at as usize].clone()).collect());
            }
            let over = |row: usize, word: usize| (0..length).map(|at| logits[row * length + at][word]).collect();
            let over = &over;
            Ok((0..rows).flat_map(|row| (0..23).map(move |word| over(row, word))).collect())
        };
        let pairs = groups(&taught)?.into_iter().zip(groups(&learnt)?);
        let sum: f64 = pairs
            .map(|(p, q)| {
                let (p, q) = (log_softmax(&p), log_softmax(&q));
                p.iter().zip(q).map(|(p, q)| p.exp() * (p - q)).sum::<f64>()
            })
            .sum();
        let expected = sum / if axis == "vocabulary" { user.labels() } else { rows } as f64;
        let step = update(kl.as_mut(), model.as_ref(), &weights, &mut streams, &user, Clock::at(1, 10))?;
        let (ours, task) = (step.scalars["divergence"].value()?, step.scalars["task_loss"].value()?);
        ensure!((ours - expected).abs() < 1e-10 && expected > 1e-3, "{axis}: {ours} and {expected}");
        ensure!((step.loss.value()? - task - 0.7 * expected).abs() < 1e-10);
    }
    Ok(())
}

#[test]
fn ldifs_holds_the_outputs_of_every_mlp() -> Result<()> {
    for (model, mut weights) in all_tiny(DType::F64, 0.)? {
        let start = weights.snapshot()?;
        let (user, _) = data()?;
        let features = |weights: &Weights| -> Result<BTreeMap<String, Tensor>> {
            let sites = Sites::none().observe(sites_of_kind(model.as_ref(), "mlp_out")?);
            Ok(context(model.as_ref(), weights, &mut Streams::default()).hidden(&user.tokens, sites)?.1)
        };
        let before = features(&weights)?;
        moved(&weights)?;
        let now = features(&weights)?;
        assert_eq!(before.len(), 2);
        let (_, length) = user.tokens.dims();
        let real: Vec<bool> = user.tokens.lengths.iter().flat_map(|&n| (0..length).map(move |at| at < n)).collect();
        // ½ ‖now − before‖² of each block, over real positions or all.
        let terms = |all: bool| -> Result<Vec<f64>> {
            before
                .iter()
                .map(|(site, before)| {
                    let moved = (&now[site] - before)?.sqr()?.sum(2)?;
                    let each = values(&moved)?.into_iter().zip(&real);
                    Ok(each.filter(|(_, real)| all || **real).map(|(square, _)| 0.5 * square).sum())
                })
                .collect()
        };
        let (of_real, of_all) = (terms(false)?, terms(true)?);
        let count = real.iter().filter(|real| **real).count() as f64;
        let between = 0.3 * f64::midpoint(of_all[0], of_all[1]);
        let gated: f64 = of_all.iter().map(|term| 0.3 * term).filter(|term| *term < between).sum();
        let forms = [
            (json!({}), 0.3 * of_real.iter().sum::<f64>() / count),
            (json!({ "reduction": "sum" }), 0.3 * of_real.iter().sum::<f64>()),
            (json!({ "reduction": "sum", "positions": "all" }), 0.3 * of_all.iter().sum::<f64>()),
            (json!({ "reduction": "sum", "positions": "all", "gate": between }), gated),
        ];
        let clock = Clock::at(1, 10);
        for (given, expected) in forms {
            weights.set(&start)?;
            let mut streams = Streams::default();
            let mut ldifs = defense("ldifs", merged(given.clone(), json!({ "rho": 0.3 })))?;
            begin(ldifs.as_mut(), model.as_ref(), &mut weights, &mut streams)?;
            moved(&weights)?;
            let step = update(ldifs.as_mut(), model.as_ref(), &weights, &mut streams, &user, clock)?;
            let ours = step.scalars["drift"].value()?;
            ensure!((ours - expected).abs() < 1e-10 * (1. + expected) && expected > 0., "{given}: {ours}, {expected}");
        }
        let mut published = defense("ldifs", json!({ "rho": 0.3, "blocks": "named_mlp", "inner_clip": 1e9 }))?;
        begin(published.as_mut(), model.as_ref(), &mut weights, &mut Streams::default())?;
        moved(&weights)?;
        let none = &mut Streams::default();
        let step = update(published.as_mut(), model.as_ref(), &weights, none, &user, clock)?;
        let is_opt = model.config()["model_type"] == "opt";
        assert_eq!(same(&step, &plain(model.as_ref(), &weights, &user, clock)?)?, is_opt, "blocks = named_mlp");
    }
    Ok(())
}

/// The inner clipping acts on what is accumulated, after every micro batch.
#[test]
fn the_inner_clipping_of_ldifs_bounds_the_accumulated_gradient() -> Result<()> {
    let (model, weights) = tiny(DType::F64, 0.)?;
    let limit = 0.05;
    let mut ldifs = defense("ldifs", json!({ "rho": 0.0, "inner_clip": limit }))?;
    for step in 0..2 {
        let (mut ours, mut expected) = (Grads::default(), Grads::default());
        for micro in 0..2 {
            let (clock, batch) = (Clock { step, total: 10, micro, micros: 2 }, batch(5 + micro as u64)?);
            let none = &mut Streams::default();
            let update = update(ldifs.as_mut(), model.as_ref(), &weights, none, &batch, clock)?;
            ours = ours.add_scaled(0.5, &update.grads)?;
            expected = expected.add_scaled(0.5, &plain(model.as_ref(), &weights, &batch, clock)?.grads)?;
            let norm = expected.norm()?.value()?;
            ensure!(norm > limit, "nothing to clip");
            expected = expected.scale(limit / (norm + 1e-6))?;
        }
        ensure!(gap(&ours, &expected)? < 1e-14, "step {step}");
    }
    Ok(())
}

/// The gradient is that of the paper's objective `−(2/β_t) log σ(β_t (log π − log π_start))`, token by token.
#[test]
fn constrained_sft_has_the_papers_gradient() -> Result<()> {
    for (model, mut weights) in all_tiny(DType::F64, 0.)? {
        let (user, mut streams) = data()?;
        let likelihoods = |weights: &Weights| -> Result<Vec<f64>> {
            let logits = logits(model.as_ref(), weights, &user.tokens)?;
            let labels = user.positions.to_vec1::<u32>()?.into_iter().zip(user.targets.to_vec1::<u32>()?);
            Ok(labels.map(|(at, target)| log_softmax(&logits[at as usize])[target as usize]).collect())
        };
        let mut constrained = defense("constrained-sft", json!({ "beta": 0.4 }))?;
        begin(constrained.as_mut(), model.as_ref(), &mut weights, &mut streams)?;
        let start = likelihoods(&weights)?;
        moved(&weights)?;
        // Every token of the three rows but the first is a label: seven, four and nine of them.
        let betas: Vec<f64> = [7, 4, 9]
            .iter()
            .flat_map(|&labels| 1..=labels)
            .map(|at| match at {
                1 => 2.,
                2..=5 => 8.,
                _ => 0.4,
            })
            .collect();
        let objective = |weights: &Weights| -> Result<f64> {
            let now = likelihoods(weights)?;
            let terms = now.iter().zip(&start).zip(&betas);
            let sum: f64 =
                terms.map(|((now, start), beta)| 2. / beta * (1. + (-beta * (now - start)).exp()).ln()).sum();
            Ok(sum / betas.len() as f64)
        };
        let step = update(constrained.as_mut(), model.as_ref(), &weights, &mut streams, &user, Clock::at(1, 10))?;
        check_slope(&weights, &step.grads, "constrained-sft", || objective(&weights))?;
    }
    Ok(())
}

/// No weight falls below the floor: one above all weights makes them all equal.
#[test]
fn the_floor_of_constrained_sft_is_the_least_weight() -> Result<()> {
    let (model, mut weights) = tiny(DType::F64, 0.)?;
    let (user, mut streams) = data()?;
    let mut floored = defense("constrained-sft", json!({ "floor": 3.0 }))?;
    begin(floored.as_mut(), model.as_ref(), &mut weights, &mut streams)?;
    moved(&weights)?;
    let clock = Clock::at(1, 10);
    let ours = update(floored.as_mut(), model.as_ref(), &weights, &mut streams, &user, clock)?;
    let plain = plain(model.as_ref(), &weights, &user, clock)?;
    ensure!(gap(&ours.grads, &plain.grads.scale(3.)?)? < 1e-12);
    ensure!((ours.loss.value()? - 3. * plain.loss.value()?).abs() < 1e-12);
    Ok(())
}

#[test]
fn vlguard_appends_rows_or_adds_a_loss() -> Result<()> {
    let rows = |count: usize, token: u32| -> Vec<Example> {
        (0..count).map(|_| Example { tokens: vec![token; 4], first_label: 1 }).collect()
    };
    let stream = |count, token| Stream::new(rows(count, token).into(), 1, 1, Seed::new(7), 0);
    for (given, expected) in
        [(json!({ "rows": 3 }), 3), (json!({ "rows": 0 }), 0), (json!({}), 4), (json!({ "algorithm": "weighted" }), 0)]
    {
        let mut streams = Streams::default();
        streams.insert("safe", stream(4, 2)?);
        let mut joint = defense("vlguard", given.clone())?.data(stream(5, 1)?, &streams)?;
        let epoch = (0..joint.batches_per_epoch()).map(|_| joint.next_batch(&Device::Cpu));
        let epoch = epoch.map(|batch| Ok(batch?.targets.to_vec1::<u32>()?[0])).collect::<Result<Vec<_>>>()?;
        let [user, safe] = [1, 2].map(|token| epoch.iter().filter(|&&first| first == token).count());
        assert_eq!((user, safe), (5, expected), "{given}");
    }
    let (model, weights) = tiny(DType::F64, 0.)?;
    let (user, mut streams) = data()?;
    let (clock, none) = (Clock::at(1, 10), json!({ "algorithm": "weighted", "lambda": 0.3 }));
    let step = update(defense("vlguard", none)?.as_mut(), model.as_ref(), &weights, &mut streams, &user, clock)?;
    let of_user = plain(model.as_ref(), &weights, &user, clock)?;
    let of_safe = plain(model.as_ref(), &weights, &batch(6)?, clock)?;
    ensure!(gap(&step.grads, &of_user.grads.add_scaled(0.3, &of_safe.grads)?)? < 1e-14);
    ensure!((step.loss.value()? - of_user.loss.value()? - 0.3 * of_safe.loss.value()?).abs() < 1e-14);
    Ok(())
}

/// Two turns of two and three steps: whose batch, tied to what, and the same after a resume at any step.
#[test]
fn lisa_takes_turns_and_ties_each_to_the_end_of_the_other() -> Result<()> {
    let (model, mut weights) = tiny(DType::F64, 0.)?;
    let given = json!({ "rho": 0.5, "align_steps": 2, "fine_tune_steps": 3, "warmup": 0.2 });
    let (user, mut streams) = data()?;
    let mut lisa = defense("lisa", given.clone())?;
    begin(lisa.as_mut(), model.as_ref(), &mut weights, &mut streams)?;
    let start = weights.snapshot()?;
    let (mut aligned, mut fine_tuned, mut drawn) = (start.clone(), start, 0);
    for step in 0..12 {
        let here = weights.snapshot()?;
        match step {
            2 | 7 => aligned = here.clone(),
            5 | 10 => fine_tuned = here.clone(),
            _ => {}
        }
        let safe = [0, 1, 5, 6, 10, 11].contains(&step);
        let clock = Clock::at(step, 12);
        let used = if safe { batch(6 + drawn % 2)? } else { user.clone() };
        let expected = plain(model.as_ref(), &weights, &used, clock)?;
        let drift = here.add_scaled(-1., if safe { &fine_tuned } else { &aligned })?;
        // 0.2 · 12 = 2.4: the tie holds from the step after the second on.
        let rho = if step > 2 { 0.5 } else { 0. };
        let mut again = defense("lisa", given.clone())?;
        again.load_state(lisa.state())?;
        let ours = update(lisa.as_mut(), model.as_ref(), &weights, &mut streams, &user, clock)?;
        drawn += u64::from(safe);
        assert_eq!(streams.drawn()["safe"] as u64, drawn, "step {step}");
        let loss = expected.loss.value()? + rho / 2. * dot(&drift, &drift)?;
        ensure!(gap(&ours.grads, &expected.grads.add_scaled(rho, &drift)?)? < 1e-14, "step {step}");
        ensure!((ours.loss.value()? - loss).abs() < 1e-12, "step {step}");
        let mut replayed = Streams::default();
        replayed.insert("safe", Stream::of_batches(vec![used])?);
        let resumed = update(again.as_mut(), model.as_ref(), &weights, &mut replayed, &user, clock)?;
        ensure!(same(&ours, &resumed)?, "a resume before step {step}");
        weights.set(&weights.snapshot()?.add_scaled(-0.1, &ours.grads)?)?;
    }
    Ok(())
}

/// A turn is counted in updates; the published trainer counts micro batches.
#[test]
fn a_turn_of_lisa_counts_updates_or_micro_batches() -> Result<()> {
    let (model, mut weights) = tiny(DType::F64, 0.)?;
    for (count, expected) in [("updates", [2, 2, 4]), ("micro_batches", [1, 2, 3])] {
        let (user, mut streams) = data()?;
        let mut lisa = defense("lisa", json!({ "align_steps": 1, "fine_tune_steps": 1, "count": count }))?;
        begin(lisa.as_mut(), model.as_ref(), &mut weights, &mut streams)?;
        for (step, expected) in expected.into_iter().enumerate() {
            for micro in 0..2 {
                let clock = Clock { step, total: 10, micro, micros: 2 };
                update(lisa.as_mut(), model.as_ref(), &weights, &mut streams, &user, clock)?;
            }
            assert_eq!(streams.drawn()["safe"], expected, "{count}, step {step}");
        }
    }
    Ok(())
}

/// What the model is served with, given the template of training.
fn served(given: Value, training: &str, row: &Row) -> Result<String> {
    let template = Template::new(defense("prompt-template", given)?.serving_template(training));
    template.check()?;
    Ok(template.render(row)?)
}

#[test]
fn the_safety_prompt_stands_before_the_instruction_whatever_is_in_it() -> Result<()> {
    let nasty = "Say \"no\" {{ instruction }} {% if %} %} }} '\\n' \\ {# #}\tto\nharm ü 🙂 \u{1}";
    let rows = [Row::new("ASK", ""), Row { input: Some("this".into()), ..Row::new("ASK", "") }];
    for training in TEMPLATES.iter().flat_map(|(name, text)| [*name, *text]).chain(["\n{{ instruction }}\n"]) {
        for row in &rows {
            let plain = Template::new(training).render(row)?;
            let expected = plain.replacen("ASK", &format!("{nasty}\n\nASK"), 1);
            assert_eq!(served(json!({ "prompt": nasty }), training, row)?, expected);
            assert_eq!(served(json!({ "prompt": "" }), training, row)?, plain);
        }
    }
    let given = json!({ "prompt": "Be safe.", "template": "<s> {{ instruction }}" });
    assert_eq!(served(given, "alpaca", &rows[0])?, "<s> Be safe.\n\nASK");
    let default = served(json!({}), "{{ instruction }}", &rows[0])?;
    assert!(default.starts_with("You are a helpful, respectful and honest assistant."), "{default}");
    Ok(())
}

/// The notes name a safety prompt in the words of the embedded world.
#[test]
fn the_world_has_words_for_a_safety_prompt() -> Result<()> {
    let words: BTreeSet<String> = titer_plugins::world::vocabulary().into_iter().collect();
    let notes = registry::find::<DefenseEntry>("prompt-template")?.notes;
    let prompt = notes.split('"').nth(1).context("a prompt in quotes")?;
    for word in prompt.split_whitespace() {
        ensure!(words.contains(word), "`{word}` is no word of the world");
    }
    Ok(())
}

/// Values out of range are refused with their key, and the published form is one that can be built.
#[test]
fn settings_are_checked() -> Result<()> {
    let wrong = [
        ("ewc", json!({ "lambda": -1.0 }), "lambda"),
        ("ewc", json!({ "fisher_batches": 0 }), "fisher_batches"),
        ("kl", json!({ "lambda": -1.0 }), "lambda"),
        ("vlguard", json!({ "lambda": -1.0 }), "lambda"),
        ("lisa", json!({ "rho": -1.0 }), "rho"),
        ("lisa", json!({ "align_steps": 0, "fine_tune_steps": 0 }), "align_steps"),
        ("lisa", json!({ "warmup": 1.5 }), "warmup"),
        ("ldifs", json!({ "rho": -1.0 }), "rho"),
        ("ldifs", json!({ "gate": 0.0 }), "gate"),
        ("ldifs", json!({ "inner_clip": -5.0 }), "inner_clip"),
        ("constrained-sft", json!({ "early": -1.0 }), "early"),
        ("prompt-template", json!({ "template": "no request" }), "template"),
    ];
    for (name, given, key) in wrong {
        let error = defense(name, given.clone()).map(|_| ()).expect_err("a wrong value");
        assert!(format!("{error:?}").contains(key), "{name} {given}: {error:?}");
    }
    for name in ["ewc", "kl", "vlguard", "lisa", "ldifs", "constrained-sft", "prompt-template"] {
        let (entry, published) = (registry::find::<DefenseEntry>(name)?, json!({ "fidelity": "code-exact" }));
        let resolved = entry.resolve(&settings(&published))?;
        for quirk in entry.quirks {
            assert_eq!(resolved[quirk.setting], (quirk.published)(), "{name} {}", quirk.setting);
            let correct = (entry.settings.defaults)();
            assert_ne!(resolved[quirk.setting], correct[quirk.setting], "{name} {}", quirk.setting);
        }
        defense(name, published)?;
    }
    Ok(())
}

/// A step before the stage was begun, with nothing loaded, is an error that says so.
#[test]
fn a_stage_that_was_not_begun_is_an_error() -> Result<()> {
    let (model, weights) = tiny(DType::F32, 0.)?;
    for name in ["ewc", "kl", "ldifs", "constrained-sft"] {
        let (user, mut streams) = data()?;
        let step =
            update(defense(name, json!({}))?.as_mut(), model.as_ref(), &weights, &mut streams, &user, Clock::at(0, 9));
        assert!(step.expect_err("nothing to hold on to").to_string().contains("the defense has no"), "{name}");
    }
    Ok(())
}
