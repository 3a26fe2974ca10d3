//! Runs the stages of a plan: parents first, several at once, each in a thread pool of its own.
//!
//! A stage that fails takes only its descendants with it. Results do not depend on the order or the number of jobs.

use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use titer_core::event::{Event, Sink};
use titer_core::{Error, Kind, Result};

use crate::diagnostics::panicked;
use crate::interrupt::Interrupt;
use crate::memory::Meter;
use crate::plan::cost::work;
use crate::plan::{Cell, Plan, PlannedStage};
use crate::stage::context::{StageContext, StageRunner};
use crate::store::{Artifact, Key, Store, Turn};

/// Deep graphs are walked recursively on the backward pass.
const STACK_BYTES: usize = 64 << 20;

/// What became of the stages.
#[derive(Debug, Default)]
pub struct Outcome {
    /// Stages taken from the store.
    pub cached: BTreeSet<Key>,
    /// Stages that ran.
    pub ran: BTreeSet<Key>,
    /// Stages that failed, with the reason; those skipped for an ancestor's sake name it.
    pub failed: BTreeMap<Key, Arc<Error>>,
    /// Whether the user stopped the run.
    pub interrupted: bool,
}

impl Outcome {
    /// The first stage of the cell that failed, and why.
    pub fn failure(&self, cell: &Cell) -> Option<(&Key, &Error)> {
        let found = cell.keys().find_map(|key| self.failed.get_key_value(key));
        found.map(|(key, error)| (key, error.as_ref()))
    }

    /// The exit code: 0 if all went well, 1 if a part failed. If nothing was left to show and all failed for one cause,
    /// such as a missing model, the code of that cause.
    pub fn exit_code(&self, any_result: bool) -> u8 {
        let mut kinds = self.failed.values().map(|error| error.kind());
        match kinds.next() {
            None => 0,
            Some(kind) if !any_result && kinds.all(|other| other == kind) => kind.exit_code(),
            Some(_) => Kind::Run.exit_code(),
        }
    }
}

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

/// Runs every stage of the plan that the store does not have.
///
/// # Errors
/// None today. A failing stage is no error here: see [`Outcome::failed`].
pub fn execute(
    plan: &Plan,
    store: &Store,
    runner: &dyn StageRunner,
    sink: &dyn Sink,
    interrupt: &Interrupt,
    jobs: Jobs,
) -> Result<Outcome> {
    let started = Instant::now();
    let cached = finished(plan, store);
    store.sweep(&cached);
    sink.emit(Event::RunStarted {
        experiment: plan.experiment.clone(),
        stages: plan.stages.len(),
        cached: cached.len(),
    });
    let execution = Execution {
        store,
        runner,
        sink,
        interrupt,
        stages: plan.stages.iter().map(|stage| (stage.key.as_str(), stage)).collect(),
        board: Mutex::new(Board::new(plan, cached)),
        changed: Condvar::new(),
    };
    std::thread::scope(|scope| {
        for _ in 0..jobs.count {
            scope.spawn(|| execution.work(jobs.threads));
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
    Ok(outcome)
}

/// The threads of one stage, which count for `meter`.
fn pool(threads: usize, meter: &'static Meter) -> Result<rayon::ThreadPool> {
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .stack_size(STACK_BYTES)
        .start_handler(move |_| meter.attach())
        .build()
        .map_err(|error| Error::run("cannot start the worker threads").source(error))
}

/// Stages that need not run. What is about to be read is checked to the last byte, since a damaged stage must be computed
/// again: of every stage what results are made of, and everything that a missing stage builds on.
fn finished(plan: &Plan, store: &Store) -> BTreeSet<Key> {
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

struct Execution<'a> {
    store: &'a Store,
    runner: &'a dyn StageRunner,
    sink: &'a dyn Sink,
    interrupt: &'a Interrupt,
    /// The plan's stages by key.
    stages: BTreeMap<&'a str, &'a PlannedStage>,
    board: Mutex<Board<'a>>,
    changed: Condvar,
}

/// Where every stage stands.
struct Board<'a> {
    /// The order of urgency: 0 runs first.
    rank: BTreeMap<&'a str, usize>,
    /// Stages that could run now, by rank.
    ready: BTreeMap<usize, &'a PlannedStage>,
    /// Stages that wait for their parent, by its key.
    waiting: BTreeMap<&'a str, Vec<&'a PlannedStage>>,
    running: usize,
    outcome: Outcome,
}

impl<'a> Board<'a> {
    fn new(plan: &'a Plan, cached: BTreeSet<Key>) -> Self {
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

    /// The most urgent stage that could run.
    fn take(&mut self) -> Option<&'a PlannedStage> {
        let (_, stage) = self.ready.pop_first()?;
        self.running += 1;
        Some(stage)
    }

    /// Lets the children of a finished stage run.
    fn release(&mut self, finished: &PlannedStage) {
        for stage in self.waiting.remove(finished.key.as_str()).unwrap_or_default() {
            self.ready.insert(self.rank[stage.key.as_str()], stage);
        }
    }

    /// Marks every descendant of a failed stage as failed and returns them.
    fn fail(&mut self, failed: &PlannedStage, error: Error) -> Vec<&'a PlannedStage> {
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

impl<'a> Execution<'a> {
    fn board(&self) -> MutexGuard<'_, Board<'a>> {
        // The board is whole at every unlock, so a panic elsewhere does not spoil it.
        self.board.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The life of one worker: take the most urgent ready stage, run it, say how it went. Each stage gets new threads, so
    /// that what threads keep for themselves is counted for the stage that uses it, not for the first one that did.
    fn work(&self, threads: usize) {
        let meter = Meter::leak();
        while let Some(stage) = self.next() {
            let started = Instant::now();
            meter.begin();
            let run = || pool(threads, meter)?.install(|| self.run(stage));
            let result =
                catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|panic| Err(panicked("stage", panic.as_ref())));
            self.settle(stage, result, started);
            self.changed.notify_all();
        }
    }

    fn next(&self) -> Option<&'a PlannedStage> {
        let mut board = self.board();
        while !self.interrupt.is_set() {
            if let Some(stage) = board.take() {
                return Some(stage);
            }
            if board.running == 0 {
                return None;
            }
            board = self.changed.wait(board).unwrap_or_else(PoisonError::into_inner);
        }
        None
    }

    /// Runs one stage, unless another process has done so. True if it ran here.
    fn run(&self, stage: &PlannedStage) -> Result<bool> {
        let waiting = |process| {
            let (key, label) = (stage.key.clone(), stage.label.clone());
            self.sink.emit(Event::StageWaiting { key, label, process });
        };
        let claim = match self.store.claim(&stage.key, || self.interrupt.is_set(), waiting)? {
            Turn::Done(_) => return Ok(false),
            Turn::Ours(claim) => claim,
        };
        let started = Instant::now();
        let context = StageContext {
            folder: claim.folder(),
            ancestors: self.ancestors(stage)?,
            partials: claim.partials(),
            sink: self.sink,
            store: self.store,
            interrupt: self.interrupt,
        };
        self.runner.run(stage, &context)?;
        claim.commit(started.elapsed().as_secs_f64())?;
        Ok(true)
    }

    fn ancestors(&self, stage: &PlannedStage) -> Result<Vec<Artifact>> {
        let parent = |key: &&Key| self.stages.get(key.as_str())?.parent.as_ref();
        let chain = std::iter::successors(stage.parent.as_ref(), parent);
        chain.map(|key| self.store.artifact(key)).collect()
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

    use super::*;
    use crate::plan::StageSpec;

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
            let jobs = Jobs { count, threads: 1 };
            execute(&self.plan, &self.store, &Fake(run), &Silent, &self.interrupt, jobs).unwrap()
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
    fn longer_paths_are_more_urgent() {
        let plan = crate::testing::plan(&[]);
        let urgency = urgency(&plan);
        for stage in &plan.stages {
            assert!(stage.parent.iter().all(|parent| urgency[parent.as_str()] > urgency[stage.key.as_str()]));
        }
    }
}
