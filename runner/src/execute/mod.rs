//! Runs the stages of a plan: parents first, several at once.
//!
//! [`execute`] decides what runs when; a [`Worker`] runs one stage after the other: [`InProcess`] within this process, or
//! [`Processes`] each in a process of its own. A stage that fails takes only its descendants with it, and so does one whose
//! process dies. Results do not depend on the order or the number of jobs.

mod board;
mod local;
mod outcome;
pub mod protocol;
mod remote;

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use titer_core::event::{Event, Sink};
use titer_core::{Kind, Result};

use crate::diagnostics::panicked;
use crate::interrupt::Interrupt;
use crate::plan::{Plan, PlannedStage};
use crate::store::Store;
use board::{Board, finished};

pub use local::InProcess;
pub use outcome::Outcome;
pub use remote::Processes;

/// How many stages run at once, and on how many threads each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Jobs {
    /// Stages at once.
    pub count: usize,
    /// Threads of each.
    pub threads: usize,
}

impl Jobs {
    /// `count` jobs that share the machine's cores; by default one per core.
    pub fn new(count: Option<usize>) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let count = count.unwrap_or(cores).max(1);
        Self { count, threads: (cores / count).max(1) }
    }
}

/// Runs stages, one after the other.
pub trait Worker {
    /// Runs the first stage of a chain, which goes on with all that it builds on, unless another process has done so. True
    /// if it ran here.
    ///
    /// # Errors
    /// The stage failed or was interrupted.
    fn run(&mut self, chain: &[PlannedStage], sink: &dyn Sink, interrupt: &Interrupt) -> Result<bool>;
}

/// Makes workers.
pub trait Crew: Sync {
    /// A worker for one job.
    fn worker(&self) -> Box<dyn Worker + '_>;
}

/// Runs every stage of the plan that the store does not have, by `jobs` workers of the crew. A failing stage is no error
/// here: see [`Outcome::failed`].
pub fn execute(
    plan: &Plan,
    store: &Store,
    crew: &dyn Crew,
    sink: &dyn Sink,
    interrupt: &Interrupt,
    jobs: usize,
) -> Outcome {
    let started = Instant::now();
    let cached = finished(plan, store);
    store.sweep(&cached);
    sink.emit(Event::RunStarted {
        experiment: plan.experiment.clone(),
        stages: plan.stages.len(),
        cached: cached.len(),
    });
    let execution = Execution {
        sink,
        interrupt,
        stages: plan.stages.iter().map(|stage| (stage.key.as_str(), stage)).collect(),
        bases: bases(plan),
        board: Mutex::new(Board::new(plan, cached)),
        changed: Condvar::new(),
    };
    std::thread::scope(|scope| {
        for _ in 0..jobs {
            scope.spawn(|| execution.work(&mut *crew.worker()));
        }
    });
    let mut outcome = execution.board.into_inner().unwrap_or_else(PoisonError::into_inner).outcome;
    outcome.interrupted = interrupt.is_set();
    sink.emit(Event::RunFinished {
        seconds: started.elapsed().as_secs_f64(),
        ran: outcome.ran.len(),
        cached: outcome.cached.len(),
        failed: outcome.failed.len(),
    });
    outcome
}

/// The base of every stage, by the stage's key. A plan has parents before their children.
fn bases(plan: &Plan) -> BTreeMap<&str, &str> {
    let mut bases: BTreeMap<&str, &str> = BTreeMap::new();
    for stage in &plan.stages {
        let of_parent = stage.parent.as_deref().and_then(|parent| bases.get(parent).copied());
        bases.insert(&stage.key, of_parent.unwrap_or(&stage.key));
    }
    bases
}

struct Execution<'a> {
    sink: &'a dyn Sink,
    interrupt: &'a Interrupt,
    /// The plan's stages by key.
    stages: BTreeMap<&'a str, &'a PlannedStage>,
    /// The base that each stage builds on.
    bases: BTreeMap<&'a str, &'a str>,
    board: Mutex<Board<'a>>,
    changed: Condvar,
}

impl<'a> Execution<'a> {
    fn board(&self) -> MutexGuard<'_, Board<'a>> {
        // The board is whole at every unlock, so a panic elsewhere does not spoil it.
        self.board.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The life of one job: take the most urgent ready stage, run it, say how it went.
    fn work(&self, worker: &mut dyn Worker) {
        let mut base = None;
        while let Some(stage) = self.next(base) {
            let started = Instant::now();
            let chain = self.chain(stage);
            base = self.base(stage);
            let run = || worker.run(&chain, self.sink, self.interrupt);
            let result =
                catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|panic| Err(panicked("stage", panic.as_ref())));
            self.settle(stage, result, started);
            self.changed.notify_all();
        }
    }

    /// The next stage to run, if possible one that builds on `base`, which the worker has loaded.
    fn next(&self, base: Option<&str>) -> Option<&'a PlannedStage> {
        let builds_on_it = |stage: &PlannedStage| base.is_some() && self.base(stage) == base;
        let mut board = self.board();
        while !self.interrupt.is_set() {
            if let Some(stage) = board.take(builds_on_it) {
                return Some(stage);
            }
            if board.running == 0 {
                return None;
            }
            board = self.changed.wait(board).unwrap_or_else(PoisonError::into_inner);
        }
        None
    }

    /// A stage and all that it builds on, the base last.
    fn chain(&self, stage: &PlannedStage) -> Vec<PlannedStage> {
        let parent = |stage: &&PlannedStage| self.stages.get(stage.parent.as_deref()?).copied();
        std::iter::successors(Some(stage), parent).cloned().collect()
    }

    fn base(&self, stage: &PlannedStage) -> Option<&'a str> {
        self.bases.get(stage.key.as_str()).copied()
    }

    fn settle(&self, stage: &PlannedStage, result: Result<bool>, started: Instant) {
        let (key, label) = (stage.key.clone(), stage.label.clone());
        let mut board = self.board();
        board.running -= 1;
        match result {
            Ok(ran) => {
                board.release(stage);
                let done = if ran { &mut board.outcome.ran } else { &mut board.outcome.cached };
                done.insert(key.clone());
                drop(board);
                self.sink.emit(Event::StageFinished { key, label, seconds: started.elapsed().as_secs_f64() });
            }
            Err(error) if error.kind() == Kind::Interrupted => {
                // Also when the stage stopped of its own accord: its descendants cannot run now.
                self.interrupt.set();
            }
            Err(error) => {
                let mut events = vec![Event::StageFailed { key, label, error: error.to_string() }];
                for skipped in board.fail(stage, error) {
                    let (key, label) = (skipped.key.clone(), skipped.label.clone());
                    events.push(Event::StageSkipped { key, label, because: stage.label.clone() });
                }
                drop(board);
                for event in events {
                    self.sink.emit(event);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;
    use std::sync::atomic::{AtomicBool, Ordering};

    use titer_core::Error;

    use super::*;
    use crate::plan::StageSpec;
    use crate::stage::context::{StageContext, StageRunner};
    use crate::store::Key;

    /// A runner made of a closure. It writes one file after the closure agreed.
    struct Fake<F>(F);

    impl<F: Fn(&PlannedStage, &StageContext) -> Result<()> + Sync> StageRunner for Fake<F> {
        fn run(&self, stage: &PlannedStage, context: &StageContext) -> Result<()> {
            (self.0)(stage, context)?;
            crate::disk::write(&context.folder.join("label.txt"), stage.label.as_bytes())
        }
    }

    struct Silent;

    impl Sink for Silent {
        fn emit(&self, _event: Event) {}
    }

    struct Bench {
        _folder: tempfile::TempDir,
        plan: Plan,
        store: Store,
        interrupt: Interrupt,
    }

    impl Bench {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let store = Store::open(folder.path()).unwrap();
            Self { _folder: folder, plan: crate::testing::plan(&[]), store, interrupt: Interrupt::default() }
        }

        fn run(&self, count: usize, run: impl Fn(&PlannedStage, &StageContext) -> Result<()> + Sync) -> Outcome {
            let runner = Fake(run);
            let crew = InProcess { store: &self.store, runner: &runner, threads: 1 };
            execute(&self.plan, &self.store, &crew, &Silent, &self.interrupt, count)
        }
    }

    fn is_align(stage: &PlannedStage) -> bool {
        matches!(&stage.spec, StageSpec::Train(spec) if spec.phase == titer_core::Stage::Align)
    }

    #[test]
    fn parents_run_first_and_nothing_runs_twice() {
        let bench = Bench::new();
        let order = Mutex::new(Vec::new());
        let outcome = bench.run(2, |stage, context| {
            if stage.parent.is_some() {
                assert!(context.parent()?.join("label.txt").exists());
            }
            order.lock().unwrap().push(stage.key.clone());
            Ok(())
        });
        assert_eq!((outcome.ran.len(), outcome.failed.len()), (bench.plan.stages.len(), 0));
        let order = order.into_inner().unwrap();
        let at = |key: &Key| order.iter().position(|other| other == key).unwrap();
        for stage in &bench.plan.stages {
            assert!(stage.parent.iter().all(|parent| at(parent) < at(&stage.key)));
        }
        let again = bench.run(2, |_, _| panic!("everything is cached"));
        assert_eq!((again.ran.len(), again.cached.len()), (0, bench.plan.stages.len()));
    }

    #[test]
    fn two_jobs_run_two_stages_at_once() {
        let (bench, meeting) = (Bench::new(), Barrier::new(2));
        let outcome = bench.run(2, |stage, _| {
            // The two bases; alone, the first would wait for ever.
            if stage.parent.is_none() {
                meeting.wait();
            }
            Ok(())
        });
        assert!(outcome.failed.is_empty());
    }

    #[test]
    fn a_failure_takes_only_its_descendants() {
        let bench = Bench::new();
        let outcome = bench.run(2, |stage, _| match stage.spec {
            StageSpec::Train(_) if is_align(stage) => Err(Error::run("the loss is not finite")),
            _ => Ok(()),
        });
        // Four alignments; eight attacks on them; two answers and two verdicts for each of those twelve.
        assert_eq!(outcome.failed.len(), 12 * 5);
        assert_eq!(outcome.ran.len(), bench.plan.stages.len() - 12 * 5);
        let (failed, kept): (Vec<_>, Vec<_>) =
            bench.plan.cells.iter().partition(|cell| outcome.failure(cell).is_some());
        assert!(
            failed.iter().all(|cell| cell.coordinates["method"] == "Shield")
                && kept.iter().all(|cell| cell.coordinates["method"] == "none")
        );
        let (_, error) = outcome.failure(failed[0]).unwrap();
        assert_eq!(error.message(), "the loss is not finite");
        let retry = bench.run(1, |_, _| Ok(()));
        assert_eq!(retry.ran.len(), 12 * 5);
    }

    #[test]
    fn a_panic_is_a_failure_with_its_message() {
        let bench = Bench::new();
        let outcome = bench.run(2, |stage, _| if is_align(stage) { panic!("index out of bounds") } else { Ok(()) });
        let messages: Vec<_> = outcome.failed.values().map(|error| error.message().to_owned()).collect();
        assert!(messages.iter().any(|message| message == "the stage panicked: index out of bounds"), "{messages:?}");
        assert_eq!(outcome.failed.len(), 12 * 5);
    }

    #[test]
    fn an_interrupted_run_resumes_with_what_is_missing() {
        let bench = Bench::new();
        let outcome = bench.run(1, |stage, context| {
            if is_align(stage) {
                context.partials.save(7, |_| Ok(()))?;
                bench.interrupt.set();
            }
            if context.interrupted() { Err(Error::interrupted()) } else { Ok(()) }
        });
        assert!(outcome.interrupted && outcome.failed.is_empty());
        let before = outcome.ran.len();
        assert!(before > 0 && before < bench.plan.stages.len());

        let resumed = AtomicBool::new(false);
        let bench = Bench { interrupt: Interrupt::default(), ..bench };
        let outcome = bench.run(1, |stage, context| {
            if is_align(stage) && context.partials.newest().is_some_and(|(step, _)| step == 7) {
                resumed.store(true, Ordering::Relaxed);
            }
            Ok(())
        });
        assert_eq!((outcome.cached.len(), outcome.ran.len()), (before, bench.plan.stages.len() - before));
        assert!(resumed.into_inner(), "the checkpoint is there");
    }

    #[test]
    fn a_stage_that_stops_by_itself_ends_the_run() {
        let bench = Bench::new();
        let outcome = bench.run(2, |_, _| Err(Error::interrupted()));
        assert!(outcome.interrupted && outcome.ran.is_empty());
    }

    #[test]
    fn a_damaged_parent_is_computed_again() {
        let bench = Bench::new();
        bench.run(1, |stage, _| if is_align(stage) { Err(Error::run("later")) } else { Ok(()) });
        let base = bench.plan.stages.iter().find(|stage| stage.parent.is_none()).unwrap();
        let file = bench.store.artifact(&base.key).unwrap().folder().join("label.txt");
        let size = std::fs::metadata(&file).unwrap().len();
        std::fs::write(&file, "x".repeat(usize::try_from(size).unwrap())).unwrap();
        let outcome = bench.run(1, |_, _| Ok(()));
        assert!(outcome.ran.contains(&base.key) && outcome.failed.is_empty());
    }

    #[test]
    fn a_worker_stays_with_the_base_that_it_has_loaded() {
        let bench = Bench::new();
        let bases = Mutex::new(Vec::new());
        bench.run(1, |stage, context| {
            bases.lock().unwrap().push(context.ancestors.last().map_or(&stage.key, |base| &base.key).clone());
            Ok(())
        });
        let mut bases = bases.into_inner().unwrap();
        bases.dedup();
        // The first base is there until nothing builds on it any more; without that, the two would alternate.
        assert_eq!(bases.len(), 2, "{bases:?}");
    }
}
