//! From judged answers to `results.json`. A placeholder: only failures are filled in.

use std::path::Path;

use titer_core::Result;
use titer_core::report::{Failure, Results, SCHEMA};

use crate::executor::Outcome;
use crate::plan::Plan;
use crate::store::Store;

/// The results of a plan whose stages are in the store; answers are copied to `out`.
///
/// # Errors
/// An artifact cannot be read.
pub fn assemble(plan: &Plan, _store: &Store, outcome: &Outcome, _out: &Path) -> Result<Results> {
    let failures = plan.cells.iter().filter_map(|cell| {
        let (_, error) = outcome.failure(cell)?;
        Some(Failure { cell: cell.label(), error: error.to_string() })
    });
    Ok(Results {
        schema: SCHEMA,
        experiment: plan.experiment.clone(),
        titer: env!("CARGO_PKG_VERSION").to_owned(),
        rows: Vec::new(),
        failures: failures.collect(),
    })
}
