//! A checkpoint folder as the base: checked once, and used where it lies.

use titer_core::Result;
use titer_core::device::parse_dtype;

use super::{RECORD, StageIo, Stages, write_json};
use crate::base_model::BaseModel;
use crate::experiment::spec::LoadSpec;
use crate::stage::train_loop::Record;

pub(super) fn run(stages: &Stages, spec: &LoadSpec, io: &mut StageIo) -> Result<()> {
    io.watch.started(1, 0);
    let dtype = parse_dtype(&spec.dtype, &stages.device)?;
    BaseModel::open(&spec.path, Some(&spec.model), dtype, &stages.device)?;
    write_json(&io.output.join(RECORD), &Record::default())
}
