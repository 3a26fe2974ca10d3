//! `titer pretrain`.

use std::fmt::Write;

use titer_core::device::DeviceChoice;
use titer_core::{Error, Kind};

use super::{ConfigArgs, Done};
use crate::cli::outlook::Outlook;
use crate::cli::progress::for_stderr;
use crate::diagnostics::Problems;
use crate::execute::{Jobs, Processes, execute};
use crate::interrupt::Interrupt;
use crate::logging::Logging;
use crate::plan::StageSpec;

/// The arguments.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// The experiment.
    #[command(flatten)]
    pub config: ConfigArgs,
    /// `auto`, `cpu`, `cuda` or `cuda:N`; overrides the configuration.
    #[arg(long)]
    pub device: Option<String>,
}

/// Runs the plan's pretraining stages and says where the models are.
///
/// # Errors
/// The experiment pretrains nothing, or a stage failed.
pub fn run(args: &Args, logging: Logging) -> Result<Done, Problems> {
    let (loaded, mut plan, store) = args.config.prepare(args.device.as_deref(), logging)?;
    plan.cells.clear();
    plan.stages.retain(|stage| matches!(stage.spec, StageSpec::Pretrain(_)));
    if plan.stages.is_empty() {
        let error = Error::config("the experiment pretrains no model").key("base");
        return Err(loaded.source.locate("", error.help("add [base.pretrain]")).into());
    }
    let device = DeviceChoice::of(&loaded.config.device).map_err(|error| loaded.source.locate("", error))?;
    // Several on one GPU would only compete for its memory.
    let jobs = Jobs::new((!device.is_cpu()).then_some(1));
    let interrupt = Interrupt::default();
    interrupt.on_signals()?;
    let crew = Processes { plan: &plan, store: &store, jobs, logging };
    let sink = for_stderr(logging.format, Outlook::new(&plan, &store, jobs.count));
    let outcome = execute(&plan, &store, &crew, &*sink, &interrupt, jobs.count);
    if outcome.interrupted {
        return Err(Error::interrupted().into());
    }
    let mut done = Done::default();
    for stage in &plan.stages {
        match outcome.failed.get(&stage.key) {
            Some(error) => {
                let _ = writeln!(done.text, "failed: {}\n  {error}", stage.label);
                done.code = Kind::Run.exit_code();
            }
            None => {
                let artifact = store.artifact(&stage.key)?;
                let _ = writeln!(done.text, "{}: {}", stage.label, artifact.folder().display());
            }
        }
    }
    Ok(done)
}
