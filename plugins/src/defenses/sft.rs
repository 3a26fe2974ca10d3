//! Plain supervised fine-tuning: what every defense is compared with.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use titer_core::{AlignmentDefense, DefenseEntry, Privilege, SettingsType, Stage, inventory, no_conflict, no_limits};

inventory::submit! {
    DefenseEntry {
        name: "sft",
        summary: "plain supervised fine-tuning, no defense",
        paper: "the baseline of Huang et al., Vaccine, NeurIPS 2024",
        formula: "g = ∇ L(w)",
        stages: &[Stage::Align, Stage::FineTune],
        streams: |_| &[],
        sites: &[],
        passes: |_| 1.,
        privilege: Privilege::NONE,
        notes: "",
        quirks: &[],
        conflicts: no_conflict,
        limits: no_limits,
        settings: SettingsType::of::<NoSettings>(),
        neutral: Some(|| serde_json::json!({})),
        version: 1,
        build: |_| Ok(Box::new(Sft)),
    }
}

/// The settings of a defense that has none.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
pub struct NoSettings {}

/// The defaults of the trait are plain fine-tuning.
#[derive(Debug)]
pub struct Sft;

impl AlignmentDefense for Sft {}
