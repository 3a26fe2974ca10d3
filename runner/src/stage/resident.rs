//! The model that stays loaded between the stages that a job runs.

use std::sync::{Mutex, PoisonError};

use candle_core::Device;
use titer_core::{CausalLm, Result};

use crate::memory::{available, sharing, stage_held};
use crate::plan::{PlannedStage, StageSpec};
use crate::store::Key;

/// A model stays loaded if so many of its size fit into the memory that is left: stages that change the base hold a copy
/// beside it.
const ROOM: u64 = 3;

/// At most one model. Each job has its own, whose memory counts for the stages of that job.
#[derive(Debug, Default)]
pub struct Resident(Mutex<Option<ResidentModel>>);

#[derive(Debug)]
struct ResidentModel {
    /// The key of the stage that stored the weights.
    key: Key,
    model: CausalLm,
    /// What loading it added to what its stage held.
    bytes: isize,
}

impl Resident {
    /// Drops the model unless a stage of `chain` stored it: what another chain has left is not to count for the stage that
    /// begins. A judge that opens a model of its own gets its room, too. The bytes of what stays.
    pub fn keep_for(&self, chain: &[PlannedStage]) -> isize {
        let needs_room = |stage: &PlannedStage| match &stage.spec {
            StageSpec::Judge(spec) => spec.judge.as_ref().is_some_and(|judge| !judge.content.is_empty()),
            _ => false,
        };
        let keeps = |key: &Key| !chain.first().is_some_and(needs_room) && chain.iter().any(|stage| stage.key == *key);
        let mut place = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *place = place.take().filter(|kept| keeps(&kept.key));
        place.as_ref().map_or(0, |kept| kept.bytes)
    }

    /// The model of that key, loaded if it is not there. The former one goes first, so that only one is in memory.
    pub(super) fn get(&self, key: &str, device: &Device, load: impl FnOnce() -> Result<CausalLm>) -> Result<CausalLm> {
        // A panic while loading leaves nothing behind but an empty place.
        let mut place = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kept) = place.as_ref().filter(|kept| kept.key == key) {
            return Ok(kept.model.clone());
        }
        *place = None;
        let before = stage_held();
        let model = load()?;
        let bytes = stage_held() - before;
        // What a device has left is not known here; one base is small beside what its training takes.
        let alone = !device.is_cpu() && sharing() == 1;
        let fits =
            alone || device.is_cpu() && available().is_none_or(|left| ROOM * model.weights.bytes() as u64 <= left);
        if fits {
            *place = Some(ResidentModel { key: key.to_owned(), model: model.clone(), bytes });
        }
        Ok(model)
    }
}
