//! The model that stays loaded between the stages of a chain.

use std::sync::{Mutex, PoisonError};

use candle_core::Device;
use titer_core::{CausalLm, Result};

use crate::memory::available;
use crate::store::Key;

/// A model stays loaded if so many of its size fit into the memory that is left: stages that change the base hold a copy
/// beside it.
const ROOM: u64 = 3;

/// At most one model, by the key of the stage that stored its weights.
#[derive(Debug, Default)]
pub(super) struct Resident(Mutex<Option<(Key, CausalLm)>>);

impl Resident {
    /// The model of that key, loaded if it is not there. The former one goes first, so that only one is in memory.
    pub(super) fn get(&self, key: &str, device: &Device, load: impl FnOnce() -> Result<CausalLm>) -> Result<CausalLm> {
        // A panic while loading leaves nothing behind but an empty place.
        let mut place = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, model)) = place.as_ref().filter(|(known, _)| known == key) {
            return Ok(model.clone());
        }
        *place = None;
        let model = load()?;
        // What a device has left is not known here; a base is small beside what its training takes.
        let fits = !device.is_cpu() || available().is_none_or(|left| ROOM * model.weights.bytes() as u64 <= left);
        if fits {
            *place = Some((key.to_owned(), model.clone()));
        }
        Ok(model)
    }
}
