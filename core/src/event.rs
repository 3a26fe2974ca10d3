//! What the engine says while it works. Reporters draw from these events and from nothing else.

use serde::{Deserialize, Serialize};

/// One thing that happened.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
#[non_exhaustive]
pub enum Event {
    /// The run begins.
    RunStarted {
        /// The experiment's name.
        experiment: String,
        /// Stages in the plan.
        stages: usize,
        /// Of which already in the store.
        cached: usize,
    },
    /// A stage begins.
    StageStarted {
        /// The stage's key.
        key: String,
        /// What it is, for people: `align Vaccine seed 0`.
        label: String,
        /// Steps (or prompts) it will take.
        total: usize,
        /// Steps already done by an interrupted run.
        resumed: usize,
    },
    /// A stage waits, because another process runs it in the same store.
    StageWaiting {
        /// The stage's key.
        key: String,
        /// What it is.
        label: String,
        /// The other process's number, if it is known.
        process: Option<u32>,
    },
    /// A step (or a batch of answers) is done.
    Step {
        /// The stage's key.
        key: String,
        /// Steps done so far.
        step: usize,
        /// The loss, if the stage trains.
        #[serde(skip_serializing_if = "Option::is_none")]
        loss: Option<f64>,
    },
    /// A stage is done and stored.
    StageFinished {
        /// The stage's key.
        key: String,
        /// What it was.
        label: String,
        /// Seconds it took, without what an interrupted run did before.
        seconds: f64,
    },
    /// A stage was skipped, because one that it needs failed.
    StageSkipped {
        /// The stage's key.
        key: String,
        /// What it was.
        label: String,
        /// The label of the stage that failed.
        because: String,
    },
    /// A stage failed; stages that need it are skipped.
    StageFailed {
        /// The stage's key.
        key: String,
        /// What it was.
        label: String,
        /// Why.
        error: String,
    },
    /// The run is over.
    RunFinished {
        /// Seconds since it began.
        seconds: f64,
        /// Stages that were run.
        ran: usize,
        /// Stages taken from the store.
        cached: usize,
        /// Stages that failed or were skipped.
        failed: usize,
    },
}

/// Receives events, from any thread.
pub trait Sink: Sync {
    /// Takes one event. It must not fail: a reporter that cannot write says so in the log.
    fn emit(&self, event: Event);
}
