//! What became of the stages of a plan.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use titer_core::{Error, Kind};

use crate::plan::Cell;
use crate::store::Key;

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

    /// Whether every stage of the cell is done.
    pub fn is_complete(&self, cell: &Cell) -> bool {
        cell.keys().all(|key| self.cached.contains(key) || self.ran.contains(key))
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
