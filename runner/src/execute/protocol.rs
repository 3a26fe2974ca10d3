//! What a run and its worker processes tell each other: one JSON object a line.

use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use titer_core::event::Event;
use titer_core::{Error, Kind};

use crate::experiment::spec::Runtime;
use crate::plan::PlannedStage;

/// To a worker, on its standard input. Its end means that the run is gone.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "order", rename_all = "snake_case")]
pub enum Order {
    /// The first order.
    Begin {
        /// What the stages need.
        runtime: Box<Runtime>,
        /// How the run rounds. A worker that rounds otherwise, as on another device, must not store anything.
        arithmetic: String,
    },
    /// Run the first stage of a chain.
    Run {
        /// The stage, then all that it builds on.
        chain: Vec<PlannedStage>,
    },
    /// Keep a checkpoint and stop.
    Stop,
}

/// From a worker, on its standard output.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "snake_case")]
pub enum WorkerReply {
    /// Progress.
    Progress {
        /// What happened.
        event: Event,
    },
    /// The stage is done.
    Done {
        /// Whether it ran in this worker; else another process has run it.
        ran: bool,
    },
    /// The stage failed or was interrupted.
    Failed(Report),
}

/// An error on its way between processes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    exit_code: u8,
    message: String,
    places: Vec<(String, String)>,
    causes: Vec<String>,
    help: Option<String>,
}

impl From<&Error> for Report {
    fn from(error: &Error) -> Self {
        Self {
            exit_code: error.kind().exit_code(),
            message: error.message().to_owned(),
            places: error.places().iter().map(|(what, value)| ((*what).to_owned(), value.clone())).collect(),
            causes: error.causes(),
            help: error.remedy().map(str::to_owned),
        }
    }
}

impl From<Report> for Error {
    fn from(report: Report) -> Self {
        let kinds = [Kind::Config, Kind::Data, Kind::Device, Kind::Interrupted];
        let kind = kinds.into_iter().find(|kind| kind.exit_code() == report.exit_code).unwrap_or(Kind::Run);
        let mut error = Error::new(kind, report.message);
        for (what, value) in report.places {
            error = error.at(interned(what), value);
        }
        if let Some(help) = report.help {
            error = error.help(help);
        }
        let cause = report.causes.into_iter().rev().fold(None, |source, text| Some(Box::new(Cause { text, source })));
        match cause {
            Some(cause) => error.source(cause as Box<dyn std::error::Error + Send + Sync>),
            None => error,
        }
    }
}

/// A cause of which only the text is left.
#[derive(Debug)]
struct Cause {
    text: String,
    source: Option<Box<Cause>>,
}

impl std::fmt::Display for Cause {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for Cause {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_deref().map(|cause| cause as &(dyn std::error::Error + 'static))
    }
}

/// The names of places are constants of the program. Those that come as text are kept once for the life of the process.
fn interned(name: String) -> &'static str {
    static NAMES: Mutex<BTreeSet<&'static str>> = Mutex::new(BTreeSet::new());
    let mut names = NAMES.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(known) = names.get(name.as_str()) {
        return known;
    }
    let kept: &'static str = Box::leak(name.into_boxed_str());
    names.insert(kept);
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_arrives_as_it_was_sent() {
        let inner = Error::data("the file is damaged").source(Error::run("a byte is missing"));
        let sent = Error::run("the stage failed").file("a.bin").key("lora.r").help("take another file").source(inner);
        for sent in [sent, Error::interrupted(), Error::device("no memory is left on the device")] {
            let line = serde_json::to_string(&WorkerReply::Failed(Report::from(&sent))).unwrap();
            let WorkerReply::Failed(report) = serde_json::from_str(&line).unwrap() else { panic!("{line}") };
            let arrived = Error::from(report);
            assert_eq!((arrived.kind(), arrived.to_string()), (sent.kind(), sent.to_string()));
        }
    }
}
