//! What an architecture owes: gradients of every parameter and site, padding that nothing sees, causality, decoding
//! that equals the full pass, and adapters that merge.

use std::collections::BTreeSet;
use std::path::Path;

use candle_core::quantized::GgmlDType;
use candle_core::{D, DType, Device, IndexOp, Tensor};

use super::case::seed;
use super::entries::survives;
use super::fixture::{Adapted, SEED, adapted, normal, sizes, stream};
use super::numbers::{difference, distance, values};
use super::{CheckOutcome, Listed};
use crate::data::batch::Batch;
use crate::defense::stage::Clock;
use crate::defense::step_context::StepCx;
use crate::defense::streams::Streams;
use crate::defense::update::Pass;
use crate::error::{Error, Result};
use crate::model::architecture::Model;
use crate::model::entry::ModelEntry;
use crate::model::loss::label_loss;
use crate::nn::cache::Cache;
use crate::nn::forward::Forward;
use crate::nn::sites::Sites;
use crate::rng::Seed;
use crate::tensor::grads::Grads;
use crate::tensor::tokens::Tokens;
use crate::weights::parameters::Weights;
use crate::weights::precision::Precision;

/// The checks of an entry.
pub(super) const ENTRY_CHECKS: &[Listed<ModelEntry>] =
    &[("defaults", defaults), ("unknown setting", super::entries::unknown_setting), ("config.json", config_json)];

/// A check of a model, and the name it goes by.
type ModelCheck = (&'static str, fn(&dyn Model) -> Result<CheckOutcome>);

/// The checks of a small model.
pub(super) const CHECKS: &[ModelCheck] = &[
    ("blocks", blocks),
    ("parameters", parameters),
    ("sites", sites),
    ("padding", padding),
    ("causality", causality),
    ("decoding", decoding),
    ("adapter", adapter),
    ("checkpointing", checkpointing),
    ("bf16", bf16),
    ("q8_0", q8_0),
];

/// Half the distance of the two points of a central difference.
const REACH: f64 = 1e-5;
/// How far a slope may be from the gradient, as a share of it.
const TOLERANCE: f64 = 1e-5;

fn defaults(entry: &ModelEntry) -> Result<CheckOutcome> {
    (entry.build)(&sizes(entry, 2))?;
    survives(entry, &(entry.settings.defaults)())
}

/// The configuration that a model writes builds the same model.
fn config_json(entry: &ModelEntry) -> Result<CheckOutcome> {
    let model = (entry.build)(&sizes(entry, 2))?;
    let again = (entry.from_config)(&model.config(), Path::new("config.json"))?;
    let same = again.params() == model.params() && again.spec() == model.spec() && again.config() == model.config();
    Ok(CheckOutcome::judge(same, format!("{} parameters", model.params().count())))
}

fn random(model: &dyn Model, precision: impl Into<Precision>) -> Result<Weights> {
    Weights::random(model.params(), Seed::new(SEED).named("base"), precision, &Device::Cpu)
}

fn batch(model: &dyn Model) -> Result<Batch> {
    stream(model, "own", 3)?.next_batch(&Device::Cpu)
}

/// One pass with dropout, where the weights have such.
fn pass(model: &dyn Model, weights: &Weights, batch: &Batch, sites: Sites, checkpointing: bool) -> Result<Pass> {
    let mut streams = Streams::default();
    let cx = StepCx::new(model, weights, &mut streams, seed(), Clock::at(0, 1));
    cx.with_checkpointing(checkpointing).backward(batch, sites)
}

/// Whether a slope is that of the gradient.
fn agrees(gradient: f64, slope: f64) -> bool {
    (gradient - slope).abs() < TOLERANCE * (gradient.abs() + 1e-4)
}

/// Every block declares parameters of its own.
#[expect(clippy::unnecessary_wraps, reason = "all checks of a model have the same signature")]
fn blocks(model: &dyn Model) -> Result<CheckOutcome> {
    let found: BTreeSet<usize> = model.params().iter().filter_map(|param| param.block).collect();
    let layers = model.spec().layers;
    let finding = format!("the model has {layers} blocks, its parameters belong to {found:?}");
    Ok(CheckOutcome::judge(found.into_iter().eq(0..layers), finding))
}

/// Law 5: every parameter gets a gradient, the slope of the loss along its largest component.
fn parameters(model: &dyn Model) -> Result<CheckOutcome> {
    let mut weights = random(model, DType::F64)?;
    weights.train_full()?;
    let batch = batch(model)?;
    let grads = pass(model, &weights, &batch, Sites::none(), false)?.grads;
    let excused = model.without_gradient();
    for (name, var) in weights.trainable() {
        if excused.iter().any(|(excused, _)| excused == name) {
            continue;
        }
        let gradient = grads.get(name).map(values).transpose()?.unwrap_or_default();
        let largest = (0..gradient.len()).max_by(|&i, &j| gradient[i].abs().total_cmp(&gradient[j].abs()));
        let Some(largest) = largest.filter(|&at| gradient[at] != 0.) else {
            return Ok(CheckOutcome::Failed(format!("no gradient reaches `{name}`")));
        };
        let start = values(var.as_tensor())?;
        let loss = |by: f64| {
            let mut point = start.clone();
            point[largest] += by;
            var.set(&Tensor::from_vec(point, var.dims(), &Device::Cpu)?)?;
            label_loss(model, &weights, &batch)
        };
        let slope = (loss(REACH)? - loss(-REACH)?) / (2. * REACH);
        loss(0.)?;
        if !agrees(gradient[largest], slope) {
            return Ok(CheckOutcome::Failed(format!(
                "the gradient of `{name}` is {}, the slope {slope}",
                gradient[largest]
            )));
        }
    }
    Ok(CheckOutcome::Passed(format!(
        "{} parameters, {} excused",
        weights.trainable().len() - excused.len(),
        excused.len()
    )))
}

/// Every site is visited, and its gradient is the slope of the loss along a random offset there.
fn sites(model: &dyn Model) -> Result<CheckOutcome> {
    let (weights, batch) = (random(model, DType::F64)?, batch(model)?);
    let grads = pass(model, &weights, &batch, Sites::none().probe(model.sites()), false)?.site_grads;
    for site in model.sites() {
        let direction = normal(&[batch.tokens.count(), model.spec().hidden_size], seed().named(&site), &Device::Cpu)?
            .to_dtype(DType::F64)?;
        let loss = |by: f64| {
            let offset = Sites::none().add([(site.clone(), (&direction * by)?)]);
            pass(model, &weights, &batch, offset, false)?.loss.value()
        };
        let slope = (loss(REACH)? - loss(-REACH)?) / (2. * REACH);
        let gradient = grads.get(&site).ok_or_else(|| Error::run(format!("no gradient reaches the site `{site}`")))?;
        let along = (gradient * direction)?.sum_all()?.to_scalar::<f64>()?;
        if !agrees(along, slope) {
            return Ok(CheckOutcome::Failed(format!("the gradient at `{site}` gives {along}, the slope is {slope}")));
        }
    }
    Ok(CheckOutcome::Passed(format!("{} sites", model.sites().len())))
}

/// A batch with padding, and its rows one by one, give the loss and the gradients of the batch.
fn padding(model: &dyn Model) -> Result<CheckOutcome> {
    let mut weights = random(model, DType::F64)?;
    weights.train_full()?;
    let batch = batch(model)?;
    let whole = pass(model, &weights, &batch, Sites::none(), false)?;
    let wide = pass(model, &weights, &batch.padded(Some(batch.tokens.count()))?, Sites::none(), false)?;
    let mut rows = Grads::default();
    for row in batch.rows()? {
        let share = row.labels() as f64 / batch.labels() as f64;
        rows = rows.add_scaled(share, &pass(model, &weights, &row, Sites::none(), false)?.grads)?;
    }
    let norm = whole.grads.norm()?.value()?;
    let gaps = [distance(&whole.grads, &wide.grads)? / norm, distance(&whole.grads, &rows)? / norm];
    let holds = gaps.iter().all(|gap| *gap < 1e-9);
    Ok(CheckOutcome::judge(holds, format!("gradients differ by {:.1e}, row by row by {:.1e}", gaps[0], gaps[1])))
}

fn hidden(model: &dyn Model, weights: &Weights, ids: &[u32]) -> Result<Tensor> {
    let tokens = Tokens::new(&[ids], &Device::Cpu)?;
    Ok(model.hidden(&tokens, &mut Forward::new(weights, &mut Sites::none()))?.tensor().clone())
}

/// Some tokens, the same for all checks.
fn text(model: &dyn Model) -> Vec<u32> {
    let vocabulary = model.spec().vocab_size as u32;
    (0..9u32).map(|at| (at * 7 + 3) % vocabulary).collect()
}

/// Another last token changes its own hidden state and no earlier one.
fn causality(model: &dyn Model) -> Result<CheckOutcome> {
    let (weights, ids) = (random(model, DType::F32)?, text(model));
    let mut other = ids.clone();
    let last = ids.len() - 1;
    other[last] = (other[last] + 1) % model.spec().vocab_size as u32;
    let [a, b] = [hidden(model, &weights, &ids)?, hidden(model, &weights, &other)?];
    let before = difference(&a.i(..last)?, &b.i(..last)?)?;
    let own = difference(&a.i(last)?, &b.i(last)?)?;
    Ok(CheckOutcome::judge(
        before == 0. && own > 0.,
        format!("its own state moves by {own:.1e}, earlier ones by {before:.1e}"),
    ))
}

/// Token by token with a cache, the hidden states are those of one pass.
fn decoding(model: &dyn Model) -> Result<CheckOutcome> {
    let (weights, ids) = (random(model, DType::F32)?, text(model));
    let whole = hidden(model, &weights, &ids)?;
    let mut cache = Cache::new(model.spec(), 1, ids.len(), DType::F32, &Device::Cpu)?;
    let (prompt, rest) = ids.split_at(4);
    let mut parts = Vec::new();
    for part in std::iter::once(prompt).chain(rest.chunks(1)) {
        let (tokens, mut idle) = (Tokens::new(&[part], &Device::Cpu)?, Sites::none());
        let mut pass = Forward { cache: Some(&mut cache), ..Forward::new(&weights, &mut idle) };
        parts.push(model.hidden(&tokens, &mut pass)?.tensor().clone());
    }
    let gap = difference(&whole, &Tensor::cat(&parts, D::Minus2)?)?;
    Ok(CheckOutcome::judge(gap < 1e-4, format!("hidden states differ by {gap:.1e}")))
}

/// An adapter on every linear layer but the head trains, and merged it computes the same.
fn adapter(model: &dyn Model) -> Result<CheckOutcome> {
    let weights = adapted(random(model, DType::F32)?, Adapted::Lora { dropout: 0. }, "adapter")?;
    let batch = batch(model)?;
    let found = pass(model, &weights, &batch, Sites::none(), false)?.grads;
    if let Some(name) = weights.trainable().keys().find(|name| found.get(name).is_none()) {
        return Ok(CheckOutcome::Failed(format!("no gradient reaches `{name}`")));
    }
    let merged = weights.merged()?;
    let gap = difference(&hidden(model, &weights, &text(model))?, &hidden(model, &merged, &text(model))?)?;
    Ok(CheckOutcome::judge(gap < 1e-4, format!("{} factors; merged, hidden states differ by {gap:.1e}", found.len())))
}

/// Running blocks again in the backward pass changes no bit, dropout included.
fn checkpointing(model: &dyn Model) -> Result<CheckOutcome> {
    let weights = adapted(random(model, DType::F32)?, Adapted::Lora { dropout: 0.2 }, "adapter")?;
    let batch = batch(model)?;
    let [kept, again] = [false, true].map(|on| pass(model, &weights, &batch, Sites::none(), on));
    let gap = distance(&kept?.grads, &again?.grads)?;
    Ok(CheckOutcome::judge(gap == 0., format!("gradients differ by {gap:.1e}")))
}

fn bf16(model: &dyn Model) -> Result<CheckOutcome> {
    stored(model, DType::BF16.into())
}

fn q8_0(model: &dyn Model) -> Result<CheckOutcome> {
    stored(model, Precision::Quantized(GgmlDType::Q8_0))
}

/// A base in low precision computes nearly the same.
fn stored(model: &dyn Model, precision: Precision) -> Result<CheckOutcome> {
    if precision.check(model.params()).is_err() {
        return Ok(CheckOutcome::NotApplicable("the sizes do not fit these blocks"));
    }
    let batch = batch(model)?;
    let [full, stored] =
        [DType::F32.into(), precision].map(|precision| label_loss(model, &random(model, precision)?, &batch));
    let (full, stored) = (full?, stored?);
    Ok(CheckOutcome::judge((full - stored).abs() < 0.05 * full.abs(), format!("the loss is {stored}, in full {full}")))
}
