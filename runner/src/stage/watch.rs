//! What the training loop tells and asks, passed on to the executor.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use titer_core::Result;
use titer_core::event::Event;

use crate::plan::PlannedStage;
use crate::stage::context::StageContext;
use crate::stage::train_loop::Watch;

/// Progress is reported at most this often.
const BREATH: Duration = Duration::from_millis(200);

/// Writing checkpoints takes at most one part in so many of a stage's time.
const SHARE: u32 = 50;

/// When checkpoints are due.
struct Checkpoints {
    /// As configured; zero means after every step.
    every: Duration,
    /// When the last one was done, at first the start.
    last: Instant,
    /// How long it took to write.
    took: Duration,
}

impl Checkpoints {
    fn new(every: Duration, now: Instant) -> Self {
        Self { every, last: now, took: Duration::ZERO }
    }

    fn due(&self, now: Instant) -> bool {
        let least = if self.every.is_zero() { Duration::ZERO } else { self.took.saturating_mul(SHARE) };
        now.duration_since(self.last) >= self.every.max(least)
    }

    fn written(&mut self, from: Instant, to: Instant) {
        (self.last, self.took) = (to, to.duration_since(from));
    }
}

/// The executor's context as the loop sees it.
pub(super) struct ContextWatch<'a> {
    stage: &'a PlannedStage,
    context: &'a StageContext<'a>,
    checkpoints: Checkpoints,
    total: usize,
    told: Instant,
}

impl<'a> ContextWatch<'a> {
    pub(super) fn new(stage: &'a PlannedStage, context: &'a StageContext<'a>, checkpoint_every: Duration) -> Self {
        let now = Instant::now();
        Self { stage, context, checkpoints: Checkpoints::new(checkpoint_every, now), total: 0, told: now }
    }

    fn tell(&mut self, step: usize, loss: Option<f64>) {
        if step == self.total || self.told.elapsed() >= BREATH {
            self.told = Instant::now();
            self.context.sink.emit(Event::Step { key: self.stage.key.clone(), step, loss });
        }
    }
}

impl Watch for ContextWatch<'_> {
    fn started(&mut self, total: usize, resumed: usize) {
        self.total = total;
        let (key, label) = (self.stage.key.clone(), self.stage.label.clone());
        self.context.sink.emit(Event::StageStarted { key, label, total, resumed });
    }

    fn step(&mut self, step: usize, loss: Option<f64>) {
        self.tell(step, loss);
    }

    fn answered(&mut self, done: usize) {
        self.tell(done, None);
    }

    fn must_stop(&self) -> bool {
        self.context.interrupted()
    }

    fn checkpoint_due(&self) -> bool {
        self.checkpoints.due(Instant::now())
    }

    fn save(&mut self, step: usize, write: &dyn Fn(&Path) -> Result<()>) -> Result<()> {
        let begun = Instant::now();
        self.context.partials.save(step, write)?;
        self.checkpoints.written(begun, Instant::now());
        Ok(())
    }

    fn resume(&self) -> Option<PathBuf> {
        self.context.partials.newest().map(|(_, folder)| folder)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checkpoints_take_at_most_a_fiftieth_of_the_time() {
        let start = Instant::now();
        let at = |seconds: f64| start + Duration::from_secs_f64(seconds);
        let mut checkpoints = Checkpoints::new(Duration::from_secs(10), start);
        assert!(!checkpoints.due(at(9.9)) && checkpoints.due(at(10.)));
        // A quick one leaves the interval as it is configured.
        checkpoints.written(at(10.), at(10.1));
        assert!(!checkpoints.due(at(20.)) && checkpoints.due(at(20.1)));
        // One that took two seconds pays for itself in a hundred.
        checkpoints.written(at(20.), at(22.));
        assert!(!checkpoints.due(at(121.9)) && checkpoints.due(at(122.)));
        // Every step, whatever it costs; and never.
        let mut always = Checkpoints::new(Duration::ZERO, start);
        always.written(at(0.), at(60.));
        assert!(always.due(at(60.)));
        assert!(!Checkpoints::new(Duration::MAX, start).due(at(1e6)));
    }
}
