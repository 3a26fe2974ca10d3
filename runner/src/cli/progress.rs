//! Shows events to people: bars on a terminal, plain lines elsewhere; and keeps all of them in `events.jsonl`.

use std::collections::BTreeMap;
use std::io::{IsTerminal, Write};
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use serde_json::json;
use titer_core::Result;
use titer_core::event::{Event, Sink};

use super::outlook::Outlook;
use crate::disk::Output;
use crate::logging::{self, LogFormat};
use crate::names::visible_lines;

/// At most one line per stage in this time, where there is no terminal.
const QUIET: Duration = Duration::from_secs(5);

/// Sends each event to several sinks.
pub struct Fanout<'a>(pub Vec<&'a dyn Sink>);

impl std::fmt::Debug for Fanout<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Fanout({} sinks)", self.0.len())
    }
}

impl Sink for Fanout<'_> {
    fn emit(&self, event: Event) {
        for sink in &self.0 {
            sink.emit(event.clone());
        }
    }
}

/// What suits standard error: bars on a terminal, lines elsewhere, or events as log lines in JSON.
pub fn for_stderr(format: LogFormat, outlook: Outlook) -> Box<dyn Sink> {
    match format {
        LogFormat::Json => Box::new(JsonLines),
        LogFormat::Text if std::io::stderr().is_terminal() => Box::new(Bars::new(outlook)),
        LogFormat::Text => Box::new(Lines::new(std::io::stderr(), outlook)),
    }
}

/// Events as log lines in JSON.
#[derive(Debug)]
struct JsonLines;

impl Sink for JsonLines {
    fn emit(&self, event: Event) {
        let line =
            json!({ "timestamp": logging::now(), "level": "INFO", "target": "titer::progress", "fields": event });
        // Nobody is left to tell if standard error is closed.
        let _ = writeln!(std::io::stderr(), "{line}");
    }
}

/// Appends events to a file, one JSON object per line with the time in seconds since 1970. Whoever reads it passes over
/// lines that are no such object: a process may be killed while it writes one.
#[derive(Debug)]
pub struct Journal {
    /// Absent once it could not be written to.
    file: Mutex<Option<Output>>,
}

impl Journal {
    /// The journal of a run's folder; an earlier run's events stay in it.
    ///
    /// # Errors
    /// The file cannot be opened.
    pub fn open(folder: &Path) -> Result<Self> {
        Ok(Self { file: Mutex::new(Some(Output::append(&folder.join("events.jsonl"))?)) })
    }
}

impl Sink for Journal {
    fn emit(&self, event: Event) {
        let time = std::time::UNIX_EPOCH.elapsed().map_or(0., |time| time.as_secs_f64());
        let mut line = json!(event);
        line["time"] = json!(time);
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        // One write per line, so that a killed process seldom leaves a torn one.
        if let Some(Err(error)) = file.as_mut().map(|file| file.put(format!("{line}\n").as_bytes())) {
            tracing::warn!("the run goes on, but its events are no longer written: {error}");
            *file = None;
        }
    }
}

/// Plain lines for logs: the time in UTC, how many stages are done, what happened.
#[derive(Debug)]
pub struct Lines<W> {
    state: Mutex<LinesState<W>>,
}

#[derive(Debug)]
struct LinesState<W> {
    out: W,
    running: BTreeMap<String, RunningStage>,
    outlook: Outlook,
}

#[derive(Debug)]
struct RunningStage {
    label: String,
    total: usize,
    resumed: usize,
    started: Instant,
    shown: Instant,
}

impl<W: Write> Lines<W> {
    /// Lines written to `out`.
    pub fn new(out: W, outlook: Outlook) -> Self {
        Self { state: Mutex::new(LinesState { out, running: BTreeMap::new(), outlook }) }
    }
}

impl<W: Write + Send> Sink for Lines<W> {
    fn emit(&self, event: Event) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let LinesState { out, running, outlook } = &mut *state;
        let now = Instant::now();
        outlook.observe(&event, now);
        let line = match event {
            Event::RunStarted { experiment, stages, cached } => {
                format!("{experiment}: {stages} stages, {cached} in the store")
            }
            Event::StageWaiting { label, process, .. } => waiting(&label, process),
            Event::StageStarted { key, label, total, resumed } => {
                let line = match resumed {
                    0 => format!("start   {label}"),
                    _ => format!("resume  {label} at {resumed}/{total}"),
                };
                running.insert(key, RunningStage { label, total, resumed, started: now, shown: now });
                line
            }
            Event::Step { key, step, loss } => {
                let Some(stage) = running.get_mut(&key).filter(|stage| stage.shown.elapsed() >= QUIET) else { return };
                stage.shown = Instant::now();
                let loss = loss.map_or_else(String::new, |loss| format!(", loss {loss:.4}"));
                let rate = (step - stage.resumed.min(step)) as f64 / stage.started.elapsed().as_secs_f64();
                let left = (stage.total.saturating_sub(step)) as f64 / rate.max(1e-9);
                let (label, total, run) = (&stage.label, stage.total, after("; run: ", outlook, now));
                format!("        {label} {step}/{total}{loss}, {rate:.1}/s, {left:.0} s left{run}")
            }
            Event::StageFinished { key, label, seconds } => {
                running.remove(&key);
                format!("done    {label} ({seconds:.1} s){}", after("; ", outlook, now))
            }
            Event::StageFailed { key, label, error } => {
                running.remove(&key);
                format!("FAILED  {label}: {error}")
            }
            Event::RunFinished { seconds, ran, cached, failed } => summary(seconds, ran, cached, failed),
            _ => return,
        };
        // Nobody is left to tell if standard error is closed.
        let _ = writeln!(out, "{} {}{}", logging::now(), outlook.counter(), visible_lines(&line));
    }
}

/// The time that the run takes from now on after `separator`, or nothing.
fn after(separator: &str, outlook: &Outlook, now: Instant) -> String {
    outlook.time_left(now).map_or_else(String::new, |left| format!("{separator}{left}"))
}

/// A bar per running stage, and one for the whole run.
#[derive(Debug)]
pub struct Bars {
    screen: MultiProgress,
    state: Mutex<BarsState>,
}

#[derive(Debug)]
struct BarsState {
    overall: Option<ProgressBar>,
    running: BTreeMap<String, ProgressBar>,
    outlook: Outlook,
}

impl Bars {
    /// Bars on the terminal.
    pub fn new(outlook: Outlook) -> Self {
        let state = BarsState { overall: None, running: BTreeMap::new(), outlook };
        Self { screen: MultiProgress::new(), state: Mutex::new(state) }
    }
}

impl Sink for Bars {
    fn emit(&self, event: Event) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let BarsState { overall, running, outlook } = &mut *state;
        let now = Instant::now();
        outlook.observe(&event, now);
        if let Some(bar) = overall {
            bar.set_prefix(after(", ", outlook, now));
        }
        let advance = |overall: &Option<ProgressBar>| overall.iter().for_each(|bar| bar.inc(1));
        match event {
            Event::RunStarted { experiment, stages, cached } => {
                let bar = self.screen.add(ProgressBar::new(stages as u64).with_position(cached as u64));
                bar.set_style(style("{msg} [{bar:30}] {pos}/{len} stages, {elapsed} elapsed{prefix}"));
                bar.set_message(experiment);
                bar.enable_steady_tick(Duration::from_secs(1));
                *overall = Some(bar);
            }
            Event::StageWaiting { label, process, .. } => {
                let _ = self.screen.println(waiting(&label, process));
            }
            Event::StageStarted { key, label, total, resumed } => {
                let bar = ProgressBar::new(total as u64).with_position(resumed as u64);
                let bar = match &overall {
                    Some(overall) => self.screen.insert_before(overall, bar),
                    None => self.screen.add(bar),
                };
                bar.set_style(style("  {prefix:42!} [{bar:20}] {pos}/{len} {per_sec} eta {eta} {msg}"));
                bar.set_prefix(label);
                bar.reset_eta();
                running.insert(key, bar);
            }
            Event::Step { key, step, loss } => {
                let Some(bar) = running.get(&key) else { return };
                bar.set_position(step as u64);
                if let Some(loss) = loss {
                    bar.set_message(format!("loss {loss:.4}"));
                }
            }
            Event::StageFinished { key, .. } => {
                running.remove(&key).into_iter().for_each(|bar| bar.finish_and_clear());
                advance(overall);
            }
            Event::StageFailed { key, label, error } => {
                running.remove(&key).into_iter().for_each(|bar| bar.finish_and_clear());
                let _ = self.screen.println(visible_lines(&format!("FAILED  {label}: {error}")));
                advance(overall);
            }
            Event::StageSkipped { .. } => advance(overall),
            Event::RunFinished { seconds, ran, cached, failed } => {
                for bar in std::mem::take(running).into_values().chain(overall.take()) {
                    bar.finish_and_clear();
                }
                let _ = self.screen.println(summary(seconds, ran, cached, failed));
            }
            _ => {}
        }
    }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).expect("the templates above are valid").progress_chars("=> ")
}

fn waiting(label: &str, process: Option<u32>) -> String {
    let process = process.map_or_else(|| "another process".to_owned(), |process| format!("process {process}"));
    format!("wait    {label}: {process} runs it")
}

fn summary(seconds: f64, ran: usize, cached: usize, failed: usize) -> String {
    format!("{ran} stages ran, {cached} came from the store, {failed} failed, in {seconds:.1} s")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn events() -> Vec<Event> {
        let (key, label) = ("k".to_owned(), "align Vaccine".to_owned());
        vec![
            Event::RunStarted { experiment: "demo".into(), stages: 3, cached: 1 },
            Event::StageStarted { key: key.clone(), label: label.clone(), total: 100, resumed: 0 },
            Event::Step { key: key.clone(), step: 1, loss: Some(1.5) },
            Event::Step { key: key.clone(), step: 2, loss: None },
            Event::StageFinished { key, label, seconds: 2. },
            Event::StageWaiting { key: "w".into(), label: "pretrain".into(), process: Some(7) },
            Event::StageFailed { key: "j".into(), label: "judge".into(), error: "no answer".into() },
            Event::RunFinished { seconds: 2., ran: 1, cached: 1, failed: 1 },
        ]
    }

    #[test]
    fn lines_are_few() {
        let lines = Lines::new(Vec::new(), Outlook::default());
        for event in events() {
            lines.emit(event);
        }
        let written = String::from_utf8(lines.state.into_inner().unwrap().out).unwrap();
        let mut told = String::new();
        for line in written.lines() {
            let (time, rest) = line.split_once(' ').unwrap();
            assert!(time.parse::<jiff::Timestamp>().is_ok() && time.len() == "2026-01-01T00:00:00Z".len(), "{line}");
            told += &format!("{rest}\n");
        }
        assert_eq!(
            told,
            "[1/3] demo: 3 stages, 1 in the store\n[1/3] start   align Vaccine\n[2/3] done    align Vaccine (2.0 s)\n\
             [2/3] wait    pretrain: process 7 runs it\n[3/3] FAILED  judge: no answer\n\
             [3/3] 1 stages ran, 1 came from the store, 1 failed, in 2.0 s\n"
        );
    }

    #[test]
    fn the_journal_holds_every_event_and_survives_a_second_run() {
        let folder = tempfile::tempdir().unwrap();
        for _ in 0..2 {
            let journal = Journal::open(folder.path()).unwrap();
            let bars = Bars::new(Outlook::default());
            let fanout = Fanout(vec![&journal, &bars]);
            for event in events() {
                fanout.emit(event);
            }
        }
        let text = std::fs::read_to_string(folder.path().join("events.jsonl")).unwrap();
        let read: Vec<Event> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(read, [events(), events()].concat());
    }

    #[test]
    fn events_after_a_torn_line_stand_on_lines_of_their_own() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("events.jsonl");
        let emit = || {
            let journal = Journal::open(folder.path()).unwrap();
            for event in events() {
                journal.emit(event);
            }
        };
        emit();
        let whole = std::fs::read(&path).unwrap();
        // Killed at the first, a middle and the last byte of the last line.
        let last = whole[..whole.len() - 1].iter().rposition(|&byte| byte == b'\n').unwrap() + 1;
        for kept in [last + 1, last + 10, whole.len() - 1] {
            std::fs::write(&path, &whole[..kept]).unwrap();
            emit();
            let text = std::fs::read_to_string(&path).unwrap();
            let read: Vec<Option<Event>> = text.lines().map(|line| serde_json::from_str(line).ok()).collect();
            let mut expected: Vec<Option<Event>> = [events(), events()].concat().into_iter().map(Some).collect();
            // The whole line but for its end is an event still.
            if kept < whole.len() - 1 {
                expected[events().len() - 1] = None;
            }
            assert_eq!(read, expected, "{text}");
        }
    }
}
