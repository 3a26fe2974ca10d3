//! Random perturbation: noise where Vaccine puts its perturbation. The control that shows whether the direction
//! matters.

use candle_core::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use titer_core::data::Batch;
use titer_core::defense::toolkit::check_strength;
use titer_core::model::sites_of_kind;
use titer_core::{
    AlignmentDefense, DefenseEntry, Grads, Limits, Privilege, Quirk, Result, SettingsType, Sites, Stage, StepCx,
    Update, inventory, no_conflict,
};

inventory::submit! {
    DefenseEntry {
        name: "random-perturbation",
        summary: "adds Gaussian noise to the attention outputs during alignment: the control for Vaccine",
        paper: "the random baseline (table 7) of Huang et al., Vaccine, NeurIPS 2024, arXiv:2402.01109",
        formula: "ε_l = √ρ z_l or ε = ρ z / ‖z‖, z ~ N(0, I),   g = ∇_w L(w; e_1 + ε_1, …, e_L + ε_L)",
        stages: &[Stage::Align],
        streams: |_| &[],
        sites: &["attn_out"],
        passes: |_| 1.,
        privilege: Privilege::NONE,
        notes: "The published trainer never ran: one repository does not dispatch to it and runs plain fine-tuning, \
                another does not import it. `measure = \"norm\"` gives the noise Vaccine's own total norm ρ, on real \
                tokens only, which is the fair control.",
        quirks: &[Quirk {
            setting: "measure",
            published: || json!("variance"),
            what: "ρ is the variance of each element, so the noise is hundreds of times as long as Vaccine's perturbation",
        }],
        conflicts: no_conflict,
        limits,
        settings: SettingsType::of::<RandomPerturbation>(),
        neutral: Some(|| serde_json::json!({ "rho": 0.0 })),
        version: 2,
        build: |settings| {
            let random: RandomPerturbation = settings.parse()?;
            check_strength("rho", random.rho)?;
            Ok(Box::new(random))
        },
    }
}

fn limits(settings: &Value) -> Limits {
    let noise = (settings["rho"] != 0.).then_some("each micro batch draws noise of its own, of the full strength");
    Limits { accumulation: noise, ..Limits::default() }
}

/// What ρ measures.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Measure {
    /// The variance of each element of the noise.
    Variance,
    /// The L2 norm of the noise over all layers, rows and real tokens, as Vaccine's ρ.
    Norm,
}

/// The settings, and the defense.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct RandomPerturbation {
    /// ρ: how strong the noise is.
    pub rho: f64,
    /// What ρ measures: the variance of each element, or the norm of the whole.
    pub measure: Measure,
}

impl Default for RandomPerturbation {
    fn default() -> Self {
        Self { rho: 2., measure: Measure::Norm }
    }
}

impl RandomPerturbation {
    /// Standard normal noise `[tokens, width]` by site, scaled to strength ρ.
    ///
    /// # Errors
    /// A tensor operation failed.
    pub fn perturbation(&self, noise: &Grads) -> Result<Grads> {
        match self.measure {
            Measure::Variance => noise.scale(self.rho.sqrt()),
            Measure::Norm => noise.normalized(self.rho, 1e-7),
        }
    }
}

impl AlignmentDefense for RandomPerturbation {
    fn step(&mut self, cx: &mut StepCx, batch: &Batch) -> Result<Update> {
        let (tokens, width) = (batch.tokens.count(), cx.model().spec().hidden_size);
        let sites = sites_of_kind(cx.model(), "attn_out")?;
        let draw = |site: String| Ok((site.clone(), cx.noise(&site, &[tokens, width])?));
        let noise: Grads =
            sites.into_iter().map(draw).collect::<Result<Vec<(String, Tensor)>>>()?.into_iter().collect();
        let perturbation = self.perturbation(&noise)?;
        Ok(cx.backward(batch, Sites::none().add(perturbation))?.into())
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        /// The noise has norm rho over the batch.
        #[test]
        fn a_perturbation_has_norm_rho(tokens in 1usize..50, rho in 0.01f64..20.) {
            let noise = Tensor::full(0.5f32, (tokens, 16), &Device::Cpu)?;
            let noise = ["layer.0.attn_out", "layer.1.attn_out"].map(|site| (site.to_owned(), noise.clone()));
            let random = RandomPerturbation { rho, measure: Measure::Norm };
            let noise = random.perturbation(&noise.into_iter().collect())?;
            prop_assert!((noise.norm()?.value()? - rho).abs() < 1e-4 * rho);
        }
    }
}
