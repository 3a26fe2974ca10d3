//! Stages that run within this process.

use std::time::Instant;

use titer_core::event::{Event, Sink};
use titer_core::{Error, Result};

use super::{Crew, Worker};
use crate::interrupt::Interrupt;
use crate::memory::Meter;
use crate::plan::PlannedStage;
use crate::stage::context::{StageContext, StageRunner};
use crate::stage::resident::Resident;
use crate::store::{Store, Turn};

/// Deep graphs are walked recursively on the backward pass.
const STACK_BYTES: usize = 64 << 20;

/// Workers within this process, each with threads of its own.
#[derive(Clone, Copy)]
pub struct InProcess<'a> {
    /// Where finished stages are.
    pub store: &'a Store,
    /// What a stage does.
    pub runner: &'a dyn StageRunner,
    /// Threads of a worker.
    pub threads: usize,
}

impl std::fmt::Debug for InProcess<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("InProcess").field("threads", &self.threads).finish_non_exhaustive()
    }
}

impl Crew for InProcess<'_> {
    fn worker(&self) -> Box<dyn Worker + '_> {
        Box::new(Local { crew: *self, resident: Resident::default() })
    }
}

struct Local<'a> {
    crew: InProcess<'a>,
    resident: Resident,
}

impl Worker for Local<'_> {
    /// Each stage gets new threads, so that what threads keep for themselves is counted for the stage that uses it, not for
    /// the first one that did.
    fn run(&mut self, chain: &[PlannedStage], sink: &dyn Sink, interrupt: &Interrupt) -> Result<bool> {
        let meter = Meter::begin(self.resident.keep_for(chain));
        pool(self.crew.threads, meter)?.install(|| self.crew.run(chain, &self.resident, sink, interrupt))
    }
}

impl InProcess<'_> {
    fn run(&self, chain: &[PlannedStage], resident: &Resident, sink: &dyn Sink, interrupt: &Interrupt) -> Result<bool> {
        let (stage, ancestors) = chain.split_first().ok_or_else(|| Error::run("there is no stage to run"))?;
        let waiting = |process| {
            let (key, label) = (stage.key.clone(), stage.label.clone());
            sink.emit(Event::StageWaiting { key, label, process });
        };
        let claim = match self.store.claim(&stage.key, || interrupt.is_set(), waiting)? {
            Turn::Done(_) => return Ok(false),
            Turn::Ours(claim) => claim,
        };
        let started = Instant::now();
        let (folder, partials) = (claim.folder(), claim.partials());
        let context = StageContext { folder, ancestors, partials, sink, resident, store: self.store, interrupt };
        self.runner.run(stage, &context)?;
        claim.commit(started.elapsed().as_secs_f64())?;
        Ok(true)
    }
}

/// The threads of one stage, which count for `meter`.
fn pool(threads: usize, meter: &'static Meter) -> Result<rayon::ThreadPool> {
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .stack_size(STACK_BYTES)
        .start_handler(move |_| meter.attach())
        .build()
        .map_err(|error| {
            Error::run("cannot start the threads of a stage")
                .source(error)
                .help("allow more memory or more threads (`ulimit -v`, `ulimit -u`), or run fewer stages at once with --jobs 1")
        })
}
