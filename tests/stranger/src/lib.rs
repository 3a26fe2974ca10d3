//! Gradient centralization (Yong et al. 2020) as a defense, with two traps for the tests of the plugin loader: it tells
//! when it is loaded, and panics when it is told to.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use titer_core::data::Batch;
use titer_core::{
    AlignmentDefense, DefenseEntry, Privilege, Result, SettingsType, Sites, Stage, StepCx, Update, inventory,
    no_conflict, no_limits,
};

titer_core::plugin!();

inventory::submit! {
    DefenseEntry {
        name: "gradient-centralization",
        summary: "takes the mean out of each row of a weight's gradient",
        paper: "Yong, Huang, Hua, Zhang: Gradient Centralization, ECCV 2020, arXiv:2004.01461",
        formula: "g_i ← g_i − α mean(g_i) for each row i of ∇ L(W)",
        stages: &[Stage::Align, Stage::FineTune],
        streams: |_| &[],
        sites: &[],
        passes: |_| 1.,
        privilege: Privilege::NONE,
        notes: "",
        quirks: &[],
        conflicts: no_conflict,
        limits: no_limits,
        settings: SettingsType::of::<GradientCentralization>(),
        neutral: Some(|| serde_json::json!({ "alpha": 0.0 })),
        version: 1,
        build: |settings| Ok(Box::new(settings.parse::<GradientCentralization>()?)),
    }
}

/// The settings, and the defense.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct GradientCentralization {
    /// α: how much of the mean is taken out, in [0, 1].
    pub alpha: f64,
    /// The step at which it panics.
    pub panic_at: Option<usize>,
}

impl Default for GradientCentralization {
    fn default() -> Self {
        Self { alpha: 1., panic_at: None }
    }
}

impl AlignmentDefense for GradientCentralization {
    fn step(&mut self, cx: &mut StepCx, batch: &Batch) -> Result<Update> {
        assert_ne!(self.panic_at, Some(cx.clock().step), "the stranger panics as it was told");
        let mut update = Update::from(cx.backward(batch, Sites::none())?);
        if self.alpha != 0. {
            update.grads = update.grads.map(|g| match g.rank() {
                0 | 1 => Ok(g.clone()),
                rank => Ok(g.broadcast_sub(&(g.mean_keepdim(rank - 1)? * self.alpha)?)?),
            })?;
        }
        Ok(update)
    }

    /// What is left of the gradient is not that of the loss.
    fn loss_is_objective(&self) -> bool {
        false
    }
}

/// Runs when the file is loaded, before anything in it is called.
#[used]
#[unsafe(link_section = ".init_array")]
static LOADED: extern "C" fn() = {
    extern "C" fn tell() {
        if let Some(path) = std::env::var_os("STRANGER_MARK") {
            let _ = std::fs::write(path, "loaded");
        }
    }
    tell
};
