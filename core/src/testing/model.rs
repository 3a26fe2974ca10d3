//! What an architecture owes.

use super::Outcome;
use crate::Result;
use crate::model::{Model, ModelEntry};

pub(super) const ENTRY_CHECKS: &[(&str, fn(&ModelEntry) -> Result<Outcome>)] = &[];
pub(super) const CHECKS: &[(&str, fn(&dyn Model) -> Result<Outcome>)] = &[];
