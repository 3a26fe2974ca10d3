//! The command line: arguments, logging, exit codes.

pub mod commands;
pub mod outlook;
pub mod progress;

use std::ffi::OsString;
use std::io::{IsTerminal, Write};
use std::panic::catch_unwind;
use std::process::ExitCode;

use clap::{Parser, Subcommand, ValueEnum};
use titer_core::Error;
use titer_core::arithmetic::{self, Level};

use crate::diagnostics::Problems;
use crate::diagnostics::panicked;
use crate::hub;
use crate::logging::{self, LogFormat, Logging};
use crate::names::visible_lines;
use crate::plugins;
use crate::plugins::PluginFile;
use commands::Done;

/// Compares defenses against harmful fine-tuning of language models, head to head.
#[derive(Debug, Parser)]
#[command(name = "titer", version, propagate_version = true, arg_required_else_help = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
    /// Says more; repeat it for even more.
    #[arg(short, long, action = clap::ArgAction::Count, global = true)]
    pub verbose: u8,
    /// The form of log lines and progress on standard error [default: `TITER_LOG_FORMAT`, else text].
    #[arg(long, value_enum, global = true)]
    pub log_format: Option<LogFormat>,
    /// Loads a plugin from a shared library and thereby runs its code; may be repeated. With a BLAKE3 hash, only if the
    /// file has it.
    #[arg(long = "plugin", value_name = "PATH[=BLAKE3]", global = true)]
    pub plugins: Vec<PluginFile>,
    /// Downloads nothing: models of the Hugging Face hub come from its cache, as with `HF_HUB_OFFLINE=1`.
    #[arg(long, global = true)]
    pub offline: bool,
}

impl Cli {
    fn logging(&self) -> Result<Logging, Error> {
        let format = match (self.log_format, std::env::var_os(logging::FORMAT)) {
            (Some(format), _) => format,
            (None, Some(name)) => LogFormat::from_str(&name.to_string_lossy(), true).map_err(|_| {
                Error::config(format!("`{}` is no form of log lines", name.to_string_lossy()))
                    .at("from", format!("environment variable {}", logging::FORMAT))
                    .help("use text or json, or unset it")
            })?,
            (None, None) => LogFormat::default(),
        };
        Ok(Logging { verbose: self.verbose, format })
    }
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Runs an experiment; finished stages are reused, so the same command resumes an interrupted run.
    Run(commands::run::Args),
    /// Shows the stages of an experiment, what is cached and what the rest costs; runs nothing.
    Plan(commands::plan::Args),
    /// Renders the results of a run.
    Report(commands::report::Args),
    /// Puts the results of several runs side by side.
    Compare(commands::compare::Args),
    /// Shows what separates two cells: metrics, and every input that differs.
    Diff(commands::diff::Args),
    /// Lists the plugins.
    List(commands::list::Args),
    /// Explains a plugin, a term, a key of the configuration, or where a number comes from: `explain NAME` or `explain RUN
    /// [CELL]`.
    Explain(commands::explain::Args),
    /// Runs one stage of a plan in this process; the stages that it builds on must be finished.
    Worker(commands::worker::Args),
    /// Pretrains the base models of an experiment and nothing else.
    Pretrain(commands::pretrain::Args),
    /// Lets a model answer prompts.
    Generate(commands::generate::Args),
    /// Takes the model of a cell out of the store, for transformers or PEFT.
    Export(commands::export::Args),
    /// Measures a training step or greedy answers on random weights of a named shape.
    Bench(commands::bench::Args),
    /// Prints the JSON schema of configurations, with the settings of every plugin.
    Schema,
    /// Checks the machine: cores, memory, device, stage store.
    Doctor(commands::doctor::Args),
    /// Makes, builds and checks plugins outside of Titer.
    Plugin(commands::plugin::Args),
}

/// Runs the command of this process's arguments.
pub fn main() -> ExitCode {
    // A plugin may panic where no stage runs, as when it is built.
    let result = catch_unwind(|| run(std::env::args_os()));
    let result = result.unwrap_or_else(|panic| Err(panicked("command", panic.as_ref()).into()));
    let failure = match result {
        Ok(done) => match print(&done.text) {
            // A reader that has gone away, as in `titer list | head`, is no error of ours.
            Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
                let help = "free space where standard output goes, or send it elsewhere";
                Error::run("cannot write to standard output").source(error).help(help).into()
            }
            _ => return ExitCode::from(done.code),
        },
        Err(problems) => problems,
    };
    let _ = write!(std::io::stderr(), "{}", visible_lines(&failure.to_string()));
    failure.exit_code()
}

/// Writes to standard output. A terminal gets no control characters, whatever names, files and models say.
fn print(text: &str) -> std::io::Result<()> {
    let mut out = std::io::stdout();
    let text = if out.is_terminal() { &visible_lines(text) } else { text };
    out.write_all(text.as_bytes())?;
    out.flush()
}

/// Runs a command line.
///
/// # Errors
/// What the command could not do. Malformed arguments end the process, as clap does.
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> Result<Done, Problems> {
    let cli = Cli::parse_from(arguments);
    let logging = cli.logging()?;
    logging.start();
    if let Some(name) = std::env::var_os("TITER_SIMD") {
        arithmetic::limit(vectors(&name.to_string_lossy())?);
    }
    if cli.offline {
        hub::stay_offline();
    }
    cli.plugins.iter().try_for_each(plugins::load)?;
    match &cli.command {
        Command::Run(args) => commands::run::run(args, logging),
        Command::Plan(args) => commands::plan::run(args, logging),
        Command::Report(args) => commands::report::run(args),
        Command::Compare(args) => commands::compare::run(args),
        Command::Diff(args) => commands::diff::run(args),
        Command::List(args) => commands::list::run(args),
        Command::Explain(args) => commands::explain::run(args),
        Command::Worker(args) => commands::worker::run(args, logging),
        Command::Pretrain(args) => commands::pretrain::run(args, logging),
        Command::Generate(args) => commands::generate::run(args, logging),
        Command::Export(args) => commands::export::run(args),
        Command::Bench(args) => commands::bench::run(args, logging),
        Command::Schema => commands::schema(),
        Command::Doctor(args) => commands::doctor::run(args),
        Command::Plugin(args) => commands::plugin::run(args),
    }
}

/// `TITER_SIMD` keeps the kernels from vectors wider than it says, to check that results do not depend on them.
fn vectors(name: &str) -> Result<Level, Problems> {
    let unknown = || Error::config(format!("`{name}` names no vectors")).at("from", "environment variable TITER_SIMD");
    Ok(Level::parse(name).ok_or_else(|| unknown().help("use scalar, 128, 256 or 512, or unset it"))?)
}
