//! `titer worker`: runs one stage of a plan, or the stages that a run orders.

use std::io::{BufRead, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::mpsc::channel;

use titer_core::device::DeviceChoice;
use titer_core::event::{Event, Sink};
use titer_core::{Error, Result, arithmetic};

use super::{Done, open_store};
use crate::cli::outlook::Outlook;
use crate::cli::progress::for_stderr;
use crate::diagnostics::{Problems, panicked};
use crate::execute::protocol::{Order, Report, WorkerReply};
use crate::execute::{Crew, InProcess, Jobs};
use crate::experiment::spec::Runtime;
use crate::interrupt::Interrupt;
use crate::logging::Logging;
use crate::manifest::digest;
use crate::plan::{Plan, PlannedStage, identity};
use crate::stage::Stages;
use crate::store::Store;
use crate::{disk, environment, memory, plugins};

/// The arguments.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// The plan, as `titer plan --json` prints it; `-` for standard input.
    #[arg(required_unless_present = "serve")]
    pub plan: Option<PathBuf>,
    /// The key of the stage, or its first digits.
    #[arg(long, value_name = "KEY", required_unless_present = "serve")]
    pub stage: Option<String>,
    /// The folder of the stage store [default: `TITER_CACHE_DIR`, else titer in the user's cache folder].
    #[arg(long, value_name = "DIR")]
    pub store: Option<PathBuf>,
    /// `auto`, `cpu`, `cuda` or `cuda:N`; overrides the plan's.
    #[arg(long, conflicts_with = "serve")]
    pub device: Option<String>,
    /// Threads [default: all cores].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub threads: Option<u16>,
    /// Workers of the run, which share the memory.
    #[arg(long, value_name = "N", default_value = "1", hide = true, requires = "serve")]
    pub jobs: usize,
    /// Runs what standard input orders, as `titer run` does.
    #[arg(long, hide = true, conflicts_with_all = ["plan", "stage"])]
    pub serve: bool,
}

/// Runs one stage, whose parent must be finished, or serves a run.
///
/// # Errors
/// The plan cannot be read or is not one of this version, or the stage failed or was interrupted.
pub fn run(args: &Args, logging: Logging) -> Result<Done, Problems> {
    let threads = Jobs::new(Some(1)).threads;
    let threads = args.threads.map_or(threads, usize::from);
    let store = open_store(args.store.as_ref())?;
    if args.serve {
        memory::share(args.jobs);
        serve(&store, threads);
        return Ok(Done::default());
    }
    environment::fix(threads);
    let (Some(path), Some(key)) = (&args.plan, &args.stage) else {
        return Err(Error::config("a plan and a stage are needed").help("titer worker PLAN --stage KEY").into());
    };
    let mut plan = read(path)?;
    if let Some(device) = &args.device {
        plan.runtime.device.clone_from(device);
    }
    let stages = open(&plan.runtime, &plan.arithmetic)?;
    let chain = chain(&plan, key)?;
    let interrupt = Interrupt::default();
    interrupt.on_signals()?;
    let crew = InProcess { store: &store, runner: &stages, threads };
    let sink = for_stderr(logging.format, Outlook::default());
    let ran = crew.worker().run(&chain, &*sink, &interrupt)?;
    let folder = store.artifact(&chain[0].key)?;
    let state = if ran { "done" } else { "was done" };
    Ok(format!("{state}: {}\n{}\n", chain[0].label, folder.folder().display()).into())
}

/// A plan from a file.
fn read(path: &Path) -> Result<Plan> {
    let bytes = if path == Path::new("-") {
        let mut bytes = Vec::new();
        std::io::Read::read_to_end(&mut std::io::stdin(), &mut bytes)
            .map_err(|error| Error::data("cannot read the plan from standard input").source(error))?;
        bytes
    } else {
        disk::read(path)?
    };
    serde_json::from_slice(&bytes).map_err(|error| {
        Error::data("the plan cannot be read")
            .file(path)
            .source(error)
            .help("make it with `titer plan CONFIG --json` of this version")
    })
}

/// What runs stages on this machine. A machine that rounds otherwise would store other numbers under the same keys.
fn open(runtime: &Runtime, expected: &str) -> Result<Stages> {
    runtime.plugins.iter().try_for_each(plugins::load)?;
    arithmetic::choose(runtime.arithmetic);
    let device = DeviceChoice::of(&runtime.device)?;
    let ours = arithmetic::identity(runtime.arithmetic, device);
    if expected != ours {
        return Err(Error::device(format!("the plan is for the arithmetic `{expected}`, this machine has `{ours}`"))
            .help("make the plan on this machine, or choose the device with --device"));
    }
    Ok(Stages::new(runtime, device.open()?))
}

/// The stage that `key` names with all that it builds on. Each must be what its key says.
fn chain(plan: &Plan, key: &str) -> Result<Vec<PlannedStage>> {
    let found: Vec<&PlannedStage> = plan.stages.iter().filter(|stage| stage.key.starts_with(key)).collect();
    let [stage] = found.as_slice() else {
        let found = if found.is_empty() { "no stage".to_owned() } else { format!("{} stages", found.len()) };
        return Err(Error::config(format!("`{key}` names {found} of the plan"))
            .help("give the key of one stage, as `titer plan CONFIG --json` lists them"));
    };
    let chain = plan.chain(&stage.key);
    if let Some(spec) = plan.without_weights() {
        return Err(Error::data("the plan was made without the weights of the base model")
            .file(&spec.path)
            .help("put the weights there and make the plan anew with `titer plan CONFIG --json`"));
    }
    for stage in &chain {
        let manifest = identity::of_stage(&stage.spec, stage.parent.as_ref(), &plan.arithmetic);
        if manifest != stage.manifest || digest(&manifest) != stage.key {
            return Err(Error::data(format!("the stage `{}` is not what its key says", stage.label))
                .key(&stage.key)
                .help("the plan was edited or made by another version; make it anew with `titer plan CONFIG --json`"));
        }
    }
    Ok(chain)
}

/// Runs one stage after the other, until there are no more orders.
fn serve(store: &Store, threads: usize) {
    let interrupt = Interrupt::default();
    // A job that ends by its time limit gets the signal in every process: a checkpoint is kept here as well.
    if let Err(error) = interrupt.on_signals() {
        tracing::warn!("{error}");
    }
    let (sender, orders) = channel();
    let stop = interrupt.clone();
    std::thread::spawn(move || {
        let lines = std::io::stdin().lock().lines().map_while(std::io::Result::ok);
        for order in lines.map(|line| serde_json::from_str::<Order>(&line)) {
            match order {
                Err(error) => {
                    let error = Error::run("a worker process cannot read its order").source(error);
                    Replies::send(&WorkerReply::Failed(Report::from(&error)));
                }
                Ok(Order::Stop) => drop(stop.set()),
                Ok(order) => {
                    if sender.send(order).is_err() {
                        return;
                    }
                }
            }
        }
        // Without a run, nobody waits for the stage.
        stop.set();
    });
    let Ok(Order::Begin { runtime, arithmetic }) = orders.recv() else { return };
    let chains = orders.iter().filter_map(|order| match order {
        Order::Run { chain } => Some(chain),
        Order::Begin { .. } | Order::Stop => None,
    });
    let stages = match open(&runtime, &arithmetic) {
        Ok(stages) => stages,
        Err(error) => {
            // What stands against working at all is the answer to every order.
            let failed = WorkerReply::Failed(Report::from(&error));
            return chains.for_each(|_| Replies::send(&failed));
        }
    };
    let crew = InProcess { store, runner: &stages, threads };
    let mut worker = crew.worker();
    for chain in chains {
        let run = || worker.run(&chain, &Replies, &interrupt);
        let result = catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|panic| Err(panicked("stage", panic.as_ref())));
        Replies::send(&match result {
            Ok(ran) => WorkerReply::Done { ran },
            Err(error) => WorkerReply::Failed(Report::from(&error)),
        });
    }
}

/// Standard output as the way to the run. If that is gone, so are the orders, which ends the worker.
struct Replies;

impl Replies {
    fn send(reply: &WorkerReply) {
        let line = serde_json::to_string(reply).expect("replies serialise");
        let mut out = std::io::stdout().lock();
        // A plugin may have printed without an end of line.
        let _ = writeln!(out, "\n{line}").and_then(|()| out.flush());
    }
}

impl Sink for Replies {
    fn emit(&self, event: Event) {
        Self::send(&WorkerReply::Progress { event });
    }
}
