//! Experiments within the process of the test, which sees the plugins that the test registers.

use std::path::Path;

use candle_core::Device;
use titer::execute::{InProcess, Outcome, execute};
use titer::experiment::config::Config;
use titer::experiment::layers::Source;
use titer::experiment::{Experiment, resolve};
use titer::interrupt::Interrupt;
use titer::plan::Plan;
use titer::results;
use titer::stage::Stages;
use titer::store::Store;
use titer_core::event::{Event, Sink};
use titer_core::report::{Provenance, Results};

struct Silent;

impl Sink for Silent {
    fn emit(&self, _: Event) {}
}

/// The experiment of the configuration `text`, which is written into `folder`.
pub fn experiment(folder: &Path, text: &str) -> Experiment {
    let path = folder.join("experiment.toml");
    std::fs::write(&path, text).expect("a file");
    let loaded = Config::from_source(Source::read(&path, [], &[]).expect("a configuration"));
    let loaded = loaded.unwrap_or_else(|problems| panic!("{problems}"));
    resolve::resolve(&loaded).unwrap_or_else(|problems| panic!("{problems}"))
}

/// Runs what `store` does not have of a plan.
pub fn run(plan: &Plan, store: &Store, threads: usize, jobs: usize) -> Outcome {
    run_until(plan, store, threads, jobs, &Interrupt::default())
}

/// Likewise, until the wish to stop.
pub fn run_until(plan: &Plan, store: &Store, threads: usize, jobs: usize, interrupt: &Interrupt) -> Outcome {
    let stages = Stages::new(&plan.runtime, Device::Cpu);
    let crew = InProcess { store, runner: &stages, threads };
    execute(plan, store, &crew, &Silent, interrupt, jobs)
}

/// The results of a plan, with its answers in `folder`.
pub fn assemble(plan: &Plan, store: &Store, outcome: &Outcome, folder: &Path) -> Results {
    results::assemble(plan, &[], Provenance::default(), store, outcome, folder).expect("results")
}
