//! Sharpness-aware minimisation (Foret et al., ICLR 2021) as an alignment defense: the example of docs/own-defense.md.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use titer_core::data::Batch;
use titer_core::{
    AlignmentDefense, DefenseEntry, Limits, Privilege, Result, SettingsType, Sites, Stage, StepCx, Update, inventory,
    no_conflict,
};

inventory::submit! {
    DefenseEntry {
        name: "sam",
        summary: "moves the weights where the loss is highest nearby, and takes the gradient there",
        paper: "Foret, Kleiner, Mobahi, Neyshabur: Sharpness-Aware Minimization, ICLR 2021",
        formula: "g = ∇ L(w + ρ ∇L(w) / ‖∇L(w)‖)",
        stages: &[Stage::Align, Stage::FineTune],
        streams: |_| &[],
        sites: &[],
        passes: |_| 2.,
        privilege: Privilege::NONE,
        notes: "",
        quirks: &[],
        conflicts: no_conflict,
        limits: |_| Limits {
            accumulation: Some("each micro batch moves the weights by itself, by the full length"),
            ..Limits::default()
        },
        settings: SettingsType::of::<Sam>(),
        neutral: Some(|| serde_json::json!({ "rho": 0.0 })),
        version: 1,
        build: |settings| Ok(Box::new(settings.parse::<Sam>()?)),
    }
}

/// The settings, and the defense.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Sam {
    /// ρ: how far the weights are moved, as an L2 norm.
    pub rho: f64,
}

impl Default for Sam {
    fn default() -> Self {
        Self { rho: 0.05 }
    }
}

impl AlignmentDefense for Sam {
    fn step(&mut self, cx: &mut StepCx, batch: &Batch) -> Result<Update> {
        let here = cx.backward(batch, Sites::none())?.grads;
        let direction = here.normalized(self.rho, 1e-12)?;
        let there = cx.scratch(|weights| {
            weights.shift(&direction, 1.)?;
            weights.backward(batch, Sites::none())
        })?;
        Ok(there.into())
    }

    /// The loss is taken at weights that depend on the weights, and that dependence is not differentiated.
    fn loss_is_objective(&self) -> bool {
        false
    }
}
