//! A checkpoint folder as the base: checked once, and used where it lies.

use titer_core::Result;

use super::{RECORD, StageIo, Stages, write_json};
use crate::plan::PlannedStage;
use crate::stage::train_loop::TrainRecord;

pub(super) fn run(stages: &Stages, stage: &PlannedStage, io: &mut StageIo) -> Result<()> {
    io.watch.started(1, 0);
    io.lineage(stages).open(std::slice::from_ref(stage))?;
    write_json(&io.output.join(RECORD), &TrainRecord::default())
}
