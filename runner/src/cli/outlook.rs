//! How far a run is, and how long the rest will take.

use std::collections::BTreeMap;
use std::time::Instant;

use titer_core::event::Event;

use crate::plan::Plan;
use crate::plan::cost::{Measured, duration, kind, work};
use crate::store::{Key, Store};

/// What a reporter knows of a run: the work of its stages, and what the events have said.
#[derive(Debug, Clone, Default)]
pub struct Outlook {
    /// Kind and work of the stages that are not done.
    left: BTreeMap<Key, (&'static str, f64)>,
    running: BTreeMap<Key, StartedStage>,
    /// The speed of stages that are done, by kind.
    measured: BTreeMap<&'static str, Measured>,
    /// Stages at once.
    jobs: usize,
    /// Stages done and in all.
    count: Option<(usize, usize)>,
}

#[derive(Debug, Clone)]
struct StartedStage {
    started: Instant,
    resumed: usize,
    step: usize,
    total: usize,
}

impl StartedStage {
    /// The share of the stage that steps `from..to` are.
    fn share(&self, from: usize, to: usize) -> f64 {
        to.saturating_sub(from) as f64 / self.total.max(1) as f64
    }
}

impl Outlook {
    /// The outlook on running what the store lacks of a plan, `jobs` stages at once.
    pub fn new(plan: &Plan, store: &Store, jobs: usize) -> Self {
        let mut outlook = Self { jobs, ..Self::default() };
        for stage in &plan.stages {
            let (kind, work) = (kind(&stage.spec), work(&stage.spec));
            match store.artifact(&stage.key) {
                Ok(artifact) => outlook.measured.entry(kind).or_default().add(work, artifact.seconds()),
                Err(_) => drop(outlook.left.insert(stage.key.clone(), (kind, work))),
            }
        }
        outlook
    }

    /// Takes in what happened at `now`.
    pub fn observe(&mut self, event: &Event, now: Instant) {
        match event {
            Event::RunStarted { stages, cached, .. } => self.count = Some((*cached, *stages)),
            Event::StageStarted { key, total, resumed, .. } => {
                let running = StartedStage { started: now, resumed: *resumed, step: *resumed, total: *total };
                self.running.insert(key.clone(), running);
            }
            Event::Step { key, step, .. } => {
                if let Some(stage) = self.running.get_mut(key) {
                    stage.step = *step;
                }
            }
            Event::StageFinished { key, seconds, .. } => {
                // One that did not start here was run by another process: the time waited for it says nothing.
                if let (Some((kind, work)), Some(stage)) = (self.left.remove(key), self.running.remove(key)) {
                    let here = work * stage.share(stage.resumed, stage.total);
                    self.measured.entry(kind).or_default().add(here, *seconds);
                }
                self.advance();
            }
            Event::StageFailed { key, .. } | Event::StageSkipped { key, .. } => {
                self.running.remove(key);
                self.left.remove(key);
                self.advance();
            }
            _ => {}
        }
    }

    fn advance(&mut self) {
        if let Some((done, _)) = &mut self.count {
            *done += 1;
        }
    }

    /// `[12/60] `: stages done and in all; nothing for a stage that runs alone.
    pub fn counter(&self) -> String {
        let Some((done, all)) = self.count else { return String::new() };
        let width = all.to_string().len();
        format!("[{done:>width$}/{all}] ")
    }

    /// `about 3 min left`, once something is known about the speed and while something is left.
    pub fn time_left(&self, now: Instant) -> Option<String> {
        let seconds = self.seconds_left(now)?;
        (!self.left.is_empty()).then(|| format!("about {} left", duration(seconds)))
    }

    /// Work of each kind times the seconds per work measured on that kind, or on all kinds if there is no such measurement.
    fn seconds_left(&self, now: Instant) -> Option<f64> {
        let mut measured = self.measured.clone();
        let mut left: BTreeMap<&str, f64> = BTreeMap::new();
        for (key, (kind, work)) in &self.left {
            let mut share = 1.;
            if let Some(stage) = self.running.get(key) {
                share -= stage.share(0, stage.step);
                let seconds = now.duration_since(stage.started).as_secs_f64();
                measured.entry(kind).or_default().add(work * stage.share(stage.resumed, stage.step), seconds);
            }
            *left.entry(kind).or_default() += work * share;
        }
        let mut overall = Measured::default();
        for kind in measured.values() {
            overall.add(kind.work, kind.seconds);
        }
        let seconds = left.iter().map(|(kind, work)| {
            measured.get(kind).and_then(|kind| kind.seconds_of(*work)).or_else(|| overall.seconds_of(*work))
        });
        let at_once = self.jobs.min(self.left.len()).max(1);
        Some(seconds.sum::<Option<f64>>()? / at_once as f64)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn the_time_left_follows_work_and_speed() {
        let (plan, folder) = (crate::testing::plan(&[]), tempfile::tempdir().unwrap());
        let store = Store::open(folder.path()).unwrap();
        let start = Instant::now();
        let mut outlook = Outlook::new(&plan, &store, 1);
        assert_eq!(outlook.counter(), "");
        let stages = plan.stages.len();
        outlook.observe(&Event::RunStarted { experiment: "demo".into(), stages, cached: 0 }, start);
        assert_eq!((outlook.counter(), outlook.time_left(start)), (format!("[{:>3}/{stages}] ", 0), None));
        // Twice as fast as the work estimates: half of the first stage takes 5 seconds.
        let work_of = |stage: &crate::plan::PlannedStage| work(&stage.spec);
        let all: f64 = plan.stages.iter().map(work_of).sum();
        let (key, label) = (plan.stages[0].key.clone(), String::new());
        let first = work_of(&plan.stages[0]);
        outlook.observe(&Event::StageStarted { key: key.clone(), label: label.clone(), total: 10, resumed: 0 }, start);
        outlook.observe(&Event::Step { key: key.clone(), step: 5, loss: None }, start);
        let later = start + Duration::from_secs(5);
        let expected = |left: f64| 10. * left / first;
        let close = |a: f64, b: f64| (a - b).abs() < 1e-9 * b;
        assert!(close(outlook.seconds_left(later).unwrap(), expected(all - first / 2.)));
        outlook.observe(&Event::StageFinished { key, label, seconds: 10. }, later);
        assert!(close(outlook.seconds_left(later).unwrap(), expected(all - first)));
        assert_eq!(outlook.counter(), format!("[{:>3}/{stages}] ", 1));
        // What another process ran is no work that is left, and says nothing about the speed here.
        let mut elsewhere = outlook.clone();
        let (key, label) = (plan.stages[1].key.clone(), String::new());
        elsewhere.observe(&Event::StageFinished { key, label, seconds: 1e6 }, later);
        assert!(close(elsewhere.seconds_left(later).unwrap(), expected(all - first - work_of(&plan.stages[1]))));
        assert_eq!(elsewhere.counter(), format!("[{:>3}/{stages}] ", 2));
        // With more jobs it takes less, and another kind's own speed counts once it is known.
        let pair = Outlook { jobs: 2, ..outlook.clone() };
        assert!(close(pair.seconds_left(later).unwrap(), expected(all - first) / 2.));
        for stage in &plan.stages[1..] {
            let (key, label) = (stage.key.clone(), String::new());
            outlook.observe(&Event::StageFailed { key, label, error: String::new() }, later);
        }
        assert_eq!((outlook.counter(), outlook.time_left(later)), (format!("[{stages}/{stages}] "), None));
    }
}
