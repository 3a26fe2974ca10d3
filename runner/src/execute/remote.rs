//! Stages that run in processes of their own: one for each job, which stays from stage to stage.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use titer_core::event::Sink;
use titer_core::{Error, Result};

use super::protocol::{Order, WorkerReply};
use super::{Crew, Jobs, Worker};
use crate::environment;
use crate::interrupt::Interrupt;
use crate::logging::Logging;
use crate::plan::{Plan, PlannedStage};
use crate::store::Store;

/// How often the user's wish to stop is looked at while a worker is busy.
const BREATH: Duration = Duration::from_millis(50);
/// How long the last words of a worker that has ended are waited for.
const PATIENCE: Duration = Duration::from_secs(1);
/// Lines of a worker that are kept, as a backtrace may follow what matters, and how many of them are told.
const KEPT_LINES: usize = 200;
const TOLD_LINES: usize = 5;
/// What Rust's standard library says when memory cannot be had.
const NO_MEMORY: &str = "memory allocation of";
const SIGKILL: i32 = 9;
const SIGABRT: i32 = 6;

/// Workers in processes of their own. One that dies fails the stage that it runs, and nothing else.
#[derive(Debug)]
pub struct Processes<'a> {
    /// The plan that the stages are of.
    pub plan: &'a Plan,
    /// Where finished stages are.
    pub store: &'a Store,
    /// How many workers there are, and threads of each.
    pub jobs: Jobs,
    /// What workers log, and how.
    pub logging: Logging,
}

impl Crew for Processes<'_> {
    fn worker(&self) -> Box<dyn Worker + '_> {
        Box::new(Remote { crew: self, process: None })
    }
}

struct Remote<'a> {
    crew: &'a Processes<'a>,
    /// Started for the first stage, and anew after one has died.
    process: Option<Process>,
}

impl Worker for Remote<'_> {
    fn run(&mut self, chain: &[PlannedStage], sink: &dyn Sink, interrupt: &Interrupt) -> Result<bool> {
        // One that has died while it waited has failed no stage.
        let mut waiting = self.process.take();
        let alive = waiting.as_mut().is_some_and(|process| !process.has_ended());
        let mut process = waiting.filter(|_| alive).map_or_else(|| Process::start(self.crew), Ok)?;
        process.order(&Order::Run { chain: chain.to_vec() })?;
        let (mut told, mut ended) = (false, false);
        // The process is put back only once it has answered: what a stage under way still says belongs to no other.
        loop {
            let dead = match process.replies.recv_timeout(BREATH) {
                Ok(WorkerReply::Progress { event }) => {
                    sink.emit(event);
                    false
                }
                Ok(WorkerReply::Done { ran }) => {
                    self.process = Some(process);
                    return Ok(ran);
                }
                Ok(WorkerReply::Failed(report)) => {
                    let error = Error::from(report);
                    // A process that has lost its device would fail every further stage as well.
                    self.process = Some(process).filter(|_| !error.is_device_lost());
                    return Err(error);
                }
                // Something that it has started may hold its standard output open. What it said last comes first.
                Err(RecvTimeoutError::Timeout) if ended => true,
                Err(RecvTimeoutError::Timeout) => {
                    ended = process.has_ended();
                    false
                }
                Err(RecvTimeoutError::Disconnected) => true,
            };
            if dead {
                let death = process.death();
                // The signal that stops the run may have reached the worker as well.
                return Err(if interrupt.is_set() { Error::interrupted() } else { death });
            }
            if interrupt.is_set() && !told {
                process.order(&Order::Stop)?;
                told = true;
            }
        }
    }
}

struct Process {
    child: Child,
    /// `None` once it is told to end.
    orders: Option<ChildStdin>,
    replies: Receiver<WorkerReply>,
    last_lines: Arc<Mutex<VecDeque<String>>>,
    /// Passes on what it says on standard error.
    listener: Option<std::thread::JoinHandle<()>>,
}

impl Process {
    fn start(crew: &Processes) -> Result<Self> {
        let cannot = |error: std::io::Error| {
            Error::run("cannot start a worker process")
                .source(error)
                .help("allow more processes or memory (`ulimit -u`, `ulimit -v`), or use --in-process")
        };
        let mut command = Command::new(program().map_err(cannot)?);
        let Jobs { count, threads } = crew.jobs;
        command.args(["worker", "--serve", "--jobs", &count.to_string(), "--threads", &threads.to_string()]);
        command.arg("--store").arg(crew.store.root());
        command.args(crew.logging.arguments());
        command.envs(environment::variables(threads));
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        // Ctrl-C is for the run, which then tells its workers to stop.
        #[cfg(unix)]
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        let mut child = command.spawn().map_err(cannot)?;
        let orders = child.stdin.take();
        let (sender, replies) = channel();
        if let Some(output) = child.stdout.take() {
            std::thread::spawn(move || {
                let lines = BufReader::new(output).split(b'\n').map_while(std::io::Result::ok);
                for line in lines.filter(|line| !line.is_empty()) {
                    match serde_json::from_slice::<WorkerReply>(&line) {
                        Ok(reply) => {
                            if sender.send(reply).is_err() {
                                return;
                            }
                        }
                        // A plugin prints.
                        Err(_) => tell(&String::from_utf8_lossy(&line)),
                    }
                }
            });
        }
        let last_lines = Arc::new(Mutex::new(VecDeque::new()));
        let kept = last_lines.clone();
        let listener = child.stderr.take().map(|errors| {
            std::thread::spawn(move || {
                for line in BufReader::new(errors).split(b'\n').map_while(std::io::Result::ok) {
                    let line = String::from_utf8_lossy(&line).into_owned();
                    tell(&line);
                    let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
                    kept.push_back(line);
                    if kept.len() > KEPT_LINES {
                        kept.pop_front();
                    }
                }
            })
        });
        let mut process = Self { child, orders, replies, last_lines, listener };
        let (runtime, arithmetic) = (Box::new(crew.plan.runtime.clone()), crew.plan.arithmetic.clone());
        process.order(&Order::Begin { runtime, arithmetic })?;
        Ok(process)
    }

    /// If nobody listens any more, the end of the replies tells.
    fn order(&mut self, order: &Order) -> Result<()> {
        let line = serde_json::to_string(order).map_err(|error| {
            Error::config("a path of the experiment cannot be told to a worker process")
                .source(error)
                .help("use paths whose names are Unicode, or --in-process")
        })?;
        if let Some(orders) = &mut self.orders {
            let _ = writeln!(orders, "{line}").and_then(|()| orders.flush());
        }
        Ok(())
    }

    fn has_ended(&mut self) -> bool {
        self.child.try_wait().is_ok_and(|status| status.is_some())
    }

    /// Waits until what it said on standard error is passed on; not for long, since something that it has started may hold
    /// that open.
    fn listen_to_the_end(&mut self) {
        let until = Instant::now() + PATIENCE;
        while self.listener.as_ref().is_some_and(|listener| !listener.is_finished()) && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Why the worker ended without an answer.
    fn death(mut self) -> Error {
        self.orders = None;
        let status = self.child.wait();
        self.listen_to_the_end();
        let last_lines =
            Vec::from(std::mem::take(&mut *self.last_lines.lock().unwrap_or_else(PoisonError::into_inner)));
        match status {
            Ok(status) => death(status, &last_lines),
            Err(error) => Error::run("the worker process is gone").source(error),
        }
    }
}

/// A worker ends when its orders do. It may have to keep a checkpoint first.
impl Drop for Process {
    fn drop(&mut self) {
        self.orders = None;
        let _ = self.child.wait();
        self.listen_to_the_end();
    }
}

/// The remedy where memory is short.
const SHORT_OF_MEMORY: &str = "lower `batch_size`, `encoding.max_length` or `evaluate.batch_size`, set `checkpointing = \
                               true`, take a smaller `dtype`, or run fewer stages at once with --jobs 1; what is finished \
                               is kept";

/// What the end of a process means.
fn death(status: ExitStatus, last_lines: &[String]) -> Error {
    let ended_by = signal(status);
    let no_memory = last_lines.iter().find(|line| line.contains(NO_MEMORY));
    let last = &last_lines[last_lines.len().saturating_sub(TOLD_LINES)..];
    let cause = no_memory.map_or_else(|| last.join("\n"), Clone::clone);
    let error = match ended_by {
        Some(SIGABRT) if no_memory.is_some() => Error::run("the stage ran out of memory").help(SHORT_OF_MEMORY),
        Some(SIGKILL) => {
            Error::run("the worker process was killed (signal 9), as the system does when memory is short")
                .help(SHORT_OF_MEMORY)
        }
        Some(signal) => Error::run(format!("the worker process died of signal {signal}")).help(
            "if nobody has sent it, this is a defect of Titer or of a plugin; please report it with the configuration",
        ),
        None => Error::run(format!("the worker process ended early ({status})"))
            .help("this is a defect of Titer or of a plugin; please report it with the configuration"),
    };
    if cause.is_empty() { error } else { error.source(cause) }
}

#[cfg(unix)]
fn signal(status: ExitStatus) -> Option<i32> {
    std::os::unix::process::ExitStatusExt::signal(&status)
}

#[cfg(not(unix))]
fn signal(_: ExitStatus) -> Option<i32> {
    None
}

/// The program that runs: on Linux the very file, even if another one lies under its name by now.
fn program() -> std::io::Result<PathBuf> {
    let running = PathBuf::from("/proc/self/exe");
    if running.exists() { Ok(running) } else { std::env::current_exe() }
}

/// Passes a worker's line on. Nobody is left to tell if standard error is closed.
fn tell(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}
