//! Gradient noise (Neelakantan et al. 2015): `g = ∇ L(w) + σ_t z` with `z ~ N(0, I)` and `σ_t² = η / (1 + t)^γ`.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use titer_core::data::Batch;
use titer_core::rng::randn;
use titer_core::{
    AlignmentDefense, DefenseEntry, Error, Limits, Privilege, Result, SettingsType, Sites, Stage, StepCx, Update, inventory,
    no_conflict,
};

titer_core::plugin!();

inventory::submit! {
    DefenseEntry {
        name: "my-plugin",
        summary: "adds Gaussian noise to the gradient, less with every step",
        paper: "Neelakantan et al., Adding Gradient Noise Improves Learning for Very Deep Networks, arXiv:1511.06807",
        formula: "g = ∇ L(w) + σ_t z,  z ~ N(0, I),  σ_t² = η / (1 + t)^γ",
        stages: &[Stage::Align, Stage::FineTune],
        streams: |_| &[],
        sites: &[],
        passes: |_| 1.,
        privilege: Privilege::NONE,
        notes: "",
        quirks: &[],
        conflicts: no_conflict,
        limits: |_| Limits {
            accumulation: Some("each micro batch draws noise of its own, which averages out"),
            ..Limits::default()
        },
        settings: SettingsType::of::<MyPlugin>(),
        neutral: Some(|| serde_json::json!({ "eta": 0.0 })),
        version: 1,
        build: |settings| {
            let defense: MyPlugin = settings.parse()?;
            defense.check()?;
            Ok(Box::new(defense))
        },
    }
}

/// The settings, and the defense.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct MyPlugin {
    /// η: the variance of the noise at the first step; 0 for plain fine-tuning.
    pub eta: f64,
    /// γ: how fast the variance falls.
    pub gamma: f64,
}

impl Default for MyPlugin {
    fn default() -> Self {
        Self { eta: 1e-4, gamma: 0.55 }
    }
}

impl MyPlugin {
    fn check(&self) -> Result<()> {
        if self.eta >= 0. && self.eta.is_finite() {
            return Ok(());
        }
        Err(Error::config(format!("`eta` must be at least 0, found `{}`", self.eta)).key("eta").help("set eta = 1e-4"))
    }

    /// σ at step `t`, counted from 0.
    fn deviation(&self, t: usize) -> f64 {
        (self.eta / (1. + t as f64).powf(self.gamma)).sqrt()
    }
}

impl AlignmentDefense for MyPlugin {
    fn step(&mut self, cx: &mut StepCx, batch: &Batch) -> Result<Update> {
        let mut update = Update::from(cx.backward(batch, Sites::none())?);
        let sigma = self.deviation(cx.clock().step);
        if sigma > 0. {
            let mut generator = cx.generator("noise");
            let mut noise = |shape: &[usize]| randn(shape, &mut generator, cx.weights().device());
            update.grads = update.grads.map(|g| Ok((g + (noise(g.dims())? * sigma)?.to_dtype(g.dtype())?)?))?;
        }
        Ok(update.with("sigma", sigma))
    }

    /// The gradient of the logged loss is the update without the noise.
    fn loss_is_objective(&self) -> bool {
        false
    }
}

#[cfg(test)]
mod tests {
    use titer_core::registry::find;

    use super::*;

    #[test]
    fn the_noise_falls_with_the_steps() {
        let defense = MyPlugin { eta: 0.04, gamma: 0.5 };
        assert_eq!(defense.deviation(0), 0.2);
        assert!((defense.deviation(15) - 0.1).abs() < 1e-12);
    }

    #[test]
    fn it_is_registered_and_refuses_nonsense() {
        let entry = find::<DefenseEntry>("my-plugin").expect("registered");
        let build = |eta: f64| (entry.build)(&titer_core::Settings::of(&MyPlugin { eta, ..Default::default() }));
        assert!(build(0.01).is_ok());
        assert_eq!(build(-1.).unwrap_err().place("key"), Some("eta"));
    }
}
