//! Where every stage of a plan stands: finished, running, ready, waiting, failed.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use titer_core::Error;

use super::outcome::Outcome;
use crate::plan::cost::work;
use crate::plan::{Plan, PlannedStage};
use crate::store::{Key, Store};

/// Stages that need not run. What is about to be read is checked to the last byte, since a damaged stage must be computed
/// again: of every stage what results are made of, and everything that a missing stage builds on.
pub(super) fn finished(plan: &Plan, store: &Store) -> BTreeSet<Key> {
    let mut cached = BTreeSet::new();
    for stage in plan.stages.iter().filter(|stage| store.is_committed(&stage.key)) {
        match store.artifact(&stage.key).and_then(|artifact| artifact.check_records()) {
            Ok(()) => drop(cached.insert(stage.key.clone())),
            Err(error) => tracing::warn!("{} will be computed again: {error}", stage.key),
        }
    }
    let parents: BTreeMap<&Key, &Key> =
        plan.stages.iter().filter_map(|stage| Some((&stage.key, stage.parent.as_ref()?))).collect();
    let mut whole: BTreeMap<&Key, bool> = BTreeMap::new();
    for stage in &plan.stages {
        if cached.contains(&stage.key) {
            continue;
        }
        let above: Vec<&Key> =
            std::iter::successors(parents.get(&stage.key).copied(), |key| parents.get(key).copied()).collect();
        let sound = |key: &&Key| cached.contains(*key) && store.artifact(key).is_ok_and(|a| a.verified().is_ok());
        let broken = above.iter().rposition(|key| !*whole.entry(*key).or_insert_with(|| sound(key)));
        // What stands between waits for the repair, since a stage reads all that it builds on.
        for key in &above[..broken.map_or(0, |at| at + 1)] {
            cached.remove(*key);
        }
    }
    cached
}

/// Where every stage stands.
pub(super) struct Board<'a> {
    /// The order of urgency: 0 runs first.
    rank: BTreeMap<&'a str, usize>,
    /// Stages that could run now, by rank.
    ready: BTreeMap<usize, &'a PlannedStage>,
    /// Stages that wait for their parent, by its key.
    waiting: BTreeMap<&'a str, Vec<&'a PlannedStage>>,
    pub(super) running: usize,
    pub(super) outcome: Outcome,
}

impl<'a> Board<'a> {
    pub(super) fn new(plan: &'a Plan, cached: BTreeSet<Key>) -> Self {
        let mut order: Vec<(&str, f64)> = urgency(plan).into_iter().collect();
        order.sort_by(|a, b| b.1.total_cmp(&a.1));
        let rank: BTreeMap<_, _> = order.iter().enumerate().map(|(rank, (key, _))| (*key, rank)).collect();
        let (mut ready, mut waiting) = (BTreeMap::new(), BTreeMap::<_, Vec<_>>::new());
        for stage in plan.stages.iter().filter(|stage| !cached.contains(&stage.key)) {
            match stage.parent.as_ref().filter(|parent| !cached.contains(*parent)) {
                Some(parent) => waiting.entry(parent.as_str()).or_default().push(stage),
                None => drop(ready.insert(rank[stage.key.as_str()], stage)),
            }
        }
        Self { rank, ready, waiting, running: 0, outcome: Outcome { cached, ..Outcome::default() } }
    }

    /// The most urgent stage that could run, of those that are preferred if there are such.
    pub(super) fn take(&mut self, preferred: impl Fn(&PlannedStage) -> bool) -> Option<&'a PlannedStage> {
        let found = self.ready.iter().find(|(_, stage)| preferred(stage)).or_else(|| self.ready.iter().next());
        let rank = *found?.0;
        self.running += 1;
        self.ready.remove(&rank)
    }

    /// Lets the children of a finished stage run.
    pub(super) fn release(&mut self, finished: &PlannedStage) {
        for stage in self.waiting.remove(finished.key.as_str()).unwrap_or_default() {
            self.ready.insert(self.rank[stage.key.as_str()], stage);
        }
    }

    /// Marks every descendant of a failed stage as failed and returns them.
    pub(super) fn fail(&mut self, failed: &PlannedStage, error: Error) -> Vec<&'a PlannedStage> {
        let (kind, error) = (error.kind(), Arc::new(error));
        self.outcome.failed.insert(failed.key.clone(), error.clone());
        let mut skipped = self.waiting.remove(failed.key.as_str()).unwrap_or_default();
        let mut next = 0;
        while let Some(stage) = skipped.get(next).copied() {
            let skipped_for =
                Error::new(kind, format!("skipped, because `{}` failed", failed.label)).source(error.clone());
            self.outcome.failed.insert(stage.key.clone(), Arc::new(skipped_for));
            skipped.extend(self.waiting.remove(stage.key.as_str()).unwrap_or_default());
            next += 1;
        }
        skipped
    }
}

/// For each stage the work on the longest path from its start to the end of the plan. Running the most urgent first
/// packs the jobs well.
fn urgency(plan: &Plan) -> BTreeMap<&str, f64> {
    let mut urgency: BTreeMap<&str, f64> = BTreeMap::new();
    for stage in plan.stages.iter().rev() {
        let own = urgency.entry(&stage.key).or_default();
        *own += work(&stage.spec) + 1e-6;
        let own = *own;
        if let Some(parent) = &stage.parent {
            let below = urgency.entry(parent).or_default();
            *below = below.max(own);
        }
    }
    urgency
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn longer_paths_are_more_urgent() {
        let plan = crate::testing::plan(&[]);
        let urgency = urgency(&plan);
        for stage in &plan.stages {
            assert!(stage.parent.iter().all(|parent| urgency[parent.as_str()] > urgency[stage.key.as_str()]));
        }
    }
}
