//! No alignment: the user fine-tunes the base model as it is.

use titer_core::data::Batch;
use titer_core::{
    AlignmentDefense, DefenseEntry, Error, Privilege, Result, SettingsType, Stage, StepCx, Update, inventory,
    no_conflict, no_limits,
};

use super::sft::NoSettings;

inventory::submit! {
    DefenseEntry {
        name: "none",
        summary: "no alignment: the base model goes to the user as it is",
        paper: "the \"non-aligned\" baseline of Huang et al., Vaccine, NeurIPS 2024",
        formula: "w ← w",
        stages: &[Stage::Align],
        streams: |_| &[],
        sites: &[],
        passes: |_| 0.,
        privilege: Privilege::NONE,
        notes: "The planner leaves the alignment stage out.",
        quirks: &[],
        conflicts: no_conflict,
        limits: no_limits,
        settings: SettingsType::of::<NoSettings>(),
        neutral: None,
        version: 1,
        build: |_| Ok(Box::new(NoAlignment)),
    }
}

/// Leaves the stage out. It has no update to give: one that trained all the same would be another method under a
/// false name.
#[derive(Debug)]
pub struct NoAlignment;

impl AlignmentDefense for NoAlignment {
    fn step(&mut self, _cx: &mut StepCx, _batch: &Batch) -> Result<Update> {
        Err(Error::run("`none` makes no update: a stage under it must not be trained"))
    }
}
