//! How much work a stage is, and how long what is left takes: for ordering, for `titer plan` and for progress. No result
//! depends on it.

use std::collections::BTreeMap;

use super::{Plan, StageSpec};
use crate::experiment::spec::{OptimSpec, PluginSpec};
use crate::store::Store;

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

/// The kind of a stage, for people.
pub fn kind(spec: &StageSpec) -> &'static str {
    match spec {
        StageSpec::Pretrain(_) => "pretrain",
        StageSpec::Load(_) => "load",
        StageSpec::Train(spec) => spec.phase.name(),
        StageSpec::Post(_) => "post",
        StageSpec::Answer(_) => "answer",
        StageSpec::Judge(_) => "judge",
    }
}

/// Work that is done, with the seconds that it took.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Measured {
    /// Work.
    pub work: f64,
    /// Seconds of one job.
    pub seconds: f64,
}

impl Measured {
    /// Counts one more stage, or a part of it.
    pub fn add(&mut self, work: f64, seconds: f64) {
        // The time of stages without work, such as loading, says nothing about others.
        if work > 0. {
            (self.work, self.seconds) = (self.work + work, self.seconds + seconds);
        }
    }

    /// Seconds that `work` takes at this speed.
    pub fn seconds_of(&self, work: f64) -> Option<f64> {
        if work == 0. { Some(0.) } else { (self.work > 0.).then(|| work * self.seconds / self.work) }
    }
}

/// Stages and work of one kind.
#[derive(Debug, Clone, Default)]
pub struct Total {
    /// Stages.
    pub stages: usize,
    /// Stages that the store has.
    pub cached: usize,
    /// Work left.
    pub left: f64,
    /// What the cached stages tell about the speed.
    pub measured: Measured,
}

/// The totals of a plan by the kind of stage.
pub fn totals(plan: &Plan, store: &Store) -> BTreeMap<&'static str, Total> {
    let mut totals: BTreeMap<&str, Total> = BTreeMap::new();
    for stage in &plan.stages {
        let work = work(&stage.spec);
        let total = totals.entry(kind(&stage.spec)).or_default();
        total.stages += 1;
        match store.artifact(&stage.key) {
            Ok(artifact) => {
                total.cached += 1;
                total.measured.add(work, artifact.seconds());
            }
            Err(_) => total.left += work,
        }
    }
    totals
}

/// Seconds as people say them: `50 s`, `3 min`, `2 h 10 min`.
pub fn duration(seconds: f64) -> String {
    const MINUTE: f64 = 60.;
    const HOUR: f64 = 60. * MINUTE;
    match seconds {
        seconds if seconds < 1.5 * MINUTE => format!("{:.0} s", seconds.ceil()),
        seconds if seconds < 1.5 * HOUR => format!("{:.0} min", (seconds / MINUTE).ceil()),
        seconds => {
            let minutes = (seconds / MINUTE).ceil();
            format!("{} h {} min", (minutes / 60.).floor(), minutes % 60.)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_told_in_units_that_fit() {
        let told = [0.2, 50., 150., 4_000., 7_800.].map(duration);
        assert_eq!(told, ["1 s", "50 s", "3 min", "67 min", "2 h 10 min"]);
    }
}
