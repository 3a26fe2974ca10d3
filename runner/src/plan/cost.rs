//! How much work a stage is: for ordering and for `titer plan`. No result depends on it.

use super::StageSpec;
use crate::experiment::spec::{OptimSpec, PluginSpec};

/// How much work a stage is: tokens or examples through the model, in forward passes of one example. Only for
/// ordering and for `titer plan`; no result depends on it.
pub fn work(spec: &StageSpec) -> f64 {
    // A training pass costs about three forward passes.
    let training = |optim: &OptimSpec, rows: usize, passes: f64| {
        (optim.updates(rows.div_ceil(optim.batch_size)) * optim.batch_size * optim.accumulate) as f64 * 3. * passes
    };
    match spec {
        StageSpec::Load(_) => 0.,
        StageSpec::Pretrain(spec) => training(&spec.optim, spec.data.rows, 1.),
        StageSpec::Train(spec) => training(&spec.optim, spec.rows(), passes(&spec.defense)),
        StageSpec::Post(spec) => spec.streams.iter().map(|stream| stream.rows.rows as f64 * 3.).sum(),
        // With a cache, an answer of n tokens costs about as much as n more tokens of prompt.
        StageSpec::Answer(spec) => spec.prompts.rows as f64 * (1. + spec.max_new_tokens as f64 / 16.),
        StageSpec::Judge(spec) => spec.prompts.rows as f64 * 1e-3,
    }
}

fn passes(defense: &PluginSpec) -> f64 {
    titer_core::registry::find::<titer_core::DefenseEntry>(&defense.name)
        .map_or(1., |entry| (entry.passes)(&defense.settings))
}
