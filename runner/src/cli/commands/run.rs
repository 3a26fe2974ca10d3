//! `titer run`.

use std::path::{Path, PathBuf};

use titer_core::device::{DeviceChoice, parse_dtype_for};
use titer_core::report::{Provenance, Results};
use titer_core::{Error, Kind};

use super::{ConfigArgs, Done};
use crate::cli::outlook::Outlook;
use crate::cli::progress::{Fanout, Journal, for_stderr};
use crate::diagnostics::Problems;
use crate::execute::{InProcess, Jobs, Processes, execute};
use crate::interrupt::Interrupt;
use crate::logging::{Logging, now};
use crate::plan::{Plan, StageSpec};
use crate::report::folder::OutputFolder;
use crate::results::provenance;
use crate::stage::Stages;
use crate::{environment, memory, report, results};

/// The arguments.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// The experiment.
    #[command(flatten)]
    pub config: ConfigArgs,
    /// The folder for results [default: `runs/` and the experiment's name].
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// `auto`, `cpu`, `cuda` or `cuda:N`; overrides the configuration.
    #[arg(long)]
    pub device: Option<String>,
    /// Stages to run at once, each in a worker process [default: one per core; one on a GPU or with a checkpoint].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub jobs: Option<u16>,
    /// Runs the stages within this process, for debuggers and emulators. One that runs out of memory then ends the run.
    #[arg(long)]
    pub in_process: bool,
}

/// Runs the experiment and writes its reports.
///
/// # Errors
/// The configuration is wrong, the device cannot be used, or the user interrupted the run.
pub fn run(args: &Args, logging: Logging) -> Result<Done, Problems> {
    let (loaded, plan, store) = args.config.prepare(args.device.as_deref(), logging)?;
    let config = &loaded.config;
    let device = DeviceChoice::of(&config.device).map_err(|error| loaded.source.locate("", error))?;
    parse_dtype_for(&config.dtype, device.is_cpu()).map_err(|error| loaded.source.locate("", error))?;
    let out = args.out.clone().unwrap_or_else(|| Path::new("runs").join(&config.experiment));
    let interrupt = Interrupt::default();
    interrupt.on_signals()?;
    let folder = OutputFolder::open(&out, &config.experiment, &interrupt)?;
    // Stages on one GPU would only compete for its memory, and large models on the CPU for its caches.
    let alone = !device.is_cpu() || plan.stages.iter().any(|stage| matches!(stage.spec, StageSpec::Load(_)));
    let jobs = Jobs::new(args.jobs.map(usize::from).or(alone.then_some(1)));
    if args.in_process {
        if !device.is_cpu() && jobs.count > 1 {
            return Err(Error::config("several jobs in one process cannot share a GPU")
                .key("--jobs")
                .help("leave --in-process out, so that each job has a process of its own, or use --jobs 1")
                .into());
        }
        environment::fix(jobs.threads);
    }
    let started = now();
    let (journal, progress) =
        (Journal::open(&out)?, for_stderr(logging.format, Outlook::new(&plan, &store, jobs.count)));
    let sink = Fanout(vec![&journal, &*progress]);
    let outcome = if args.in_process {
        memory::share(jobs.count);
        let stages = Stages::new(&plan.runtime, device.open()?);
        let crew = InProcess { store: &store, runner: &stages, threads: jobs.threads };
        execute(&plan, &store, &crew, &sink, &interrupt, jobs.count)
    } else {
        let crew = Processes { plan: &plan, store: &store, jobs, logging };
        execute(&plan, &store, &crew, &sink, &interrupt, jobs.count)
    };
    let provenance = Provenance { started, ..provenance::of(&loaded, &plan, &device.to_string())? };
    let assemble = |out: &Path| results::assemble(&plan, &config.published, provenance, &store, &outcome, out);
    if outcome.interrupted {
        let told = match folder.write_partial(&interrupt, assemble) {
            Ok(Some(partial)) => {
                let report = out.join("report.html");
                format!("{} of {} cells, in {}", partial.rows.len(), plan.cells.len(), report.display())
            }
            Ok(None) => format!("the former one is kept, in {}", out.display()),
            Err(error) => format!("not written: {}", error.message()),
        };
        return Err(Error::interrupted().at("report", told).into());
    }
    let results = folder.write(&interrupt, assemble)?;
    let mut text = if results.rows.is_empty() { String::new() } else { report::console(&results)? };
    text += &summary(&plan, &results, &out);
    let code = match outcome.exit_code(!results.rows.is_empty()) {
        // All stages are done, but what one of them stored cannot be read.
        0 if !results.failures.is_empty() => Kind::Run.exit_code(),
        code => code,
    };
    Ok(Done { text, code })
}

/// What is where, and what failed.
fn summary(plan: &Plan, results: &Results, out: &Path) -> String {
    let text = format!(
        "\n{} of {} cells, report in {}\nmetrics hash {}\n",
        results.rows.len(),
        plan.cells.len(),
        out.join("report.html").display(),
        results.metrics_hash
    );
    text + &report::failures(results)
}
