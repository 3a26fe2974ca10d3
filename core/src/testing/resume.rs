//! Law 2: an interrupted and resumed stage ends as an uninterrupted one.

use super::CheckOutcome;
use super::case::Case;
use crate::error::Result;

/// Stopped and put together again from what is stored, the stage ends in the same bits.
pub(super) fn resume(case: &Case) -> Result<CheckOutcome> {
    for micros in [1, 2] {
        let case = Case { micros, ..case.clone() };
        let whole = case.run()?.whole()?;
        for stop in stops(case.total) {
            let mut first = case.run()?;
            first.begin()?;
            first.train_to(stop)?;
            let resumed = first.resumed()?.finished()?;
            if let Some(difference) = whole.difference(&resumed)? {
                return Ok(CheckOutcome::Failed(format!("resumed after step {stop}, {difference}")));
            }
            if whole.streams.drawn() != resumed.streams.drawn() {
                return Ok(CheckOutcome::Failed(format!("resumed after step {stop}, it draws other batches")));
            }
        }
    }
    Ok(CheckOutcome::Passed(format!("the same bits after stops at {:?} of {} steps", stops(case.total), case.total)))
}

/// Where a stage of `total` steps is stopped: early and late.
fn stops(total: usize) -> [usize; 2] {
    [1, total / 2 + 1]
}
