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

/// The executor's context as the loop sees it.
pub(super) struct ContextWatch<'a> {
    stage: &'a PlannedStage,
    context: &'a StageContext<'a>,
    checkpoint_every: Duration,
    total: usize,
    told: Instant,
    saved: Instant,
}

impl<'a> ContextWatch<'a> {
    pub(super) fn new(stage: &'a PlannedStage, context: &'a StageContext<'a>, checkpoint_every: Duration) -> Self {
        let now = Instant::now();
        Self { stage, context, checkpoint_every, total: 0, told: now, saved: now }
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
        self.saved.elapsed() >= self.checkpoint_every
    }

    fn save(&mut self, step: usize, write: &dyn Fn(&Path) -> Result<()>) -> Result<()> {
        self.context.partials.save(step, write)?;
        self.saved = Instant::now();
        Ok(())
    }

    fn resume(&self) -> Option<PathBuf> {
        self.context.partials.newest().map(|(_, folder)| folder)
    }
}
