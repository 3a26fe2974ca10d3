//! Random perturbation: noise where Vaccine puts its perturbation. The control that shows whether the direction
//! matters.

use candle_core::{DType, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use titer_core::data::Batch;
use titer_core::model::sites_of_kind;
use titer_core::rng::randn;
use titer_core::{
    AlignmentDefense, DefenseEntry, Error, Grads, Privilege, Result, SettingsType, Sites, Stage, StepCx, Update,
    inventory,
};

inventory::submit! {
    DefenseEntry {
        name: "random-perturbation",
        summary: "adds Gaussian noise to the attention outputs during alignment: the control for Vaccine",
        paper: "the random baseline (table 7) of Huang et al., Vaccine, NeurIPS 2024, arXiv:2402.01109",
        formula: "ε_l = √ρ z_l or ε = ρ z / ‖z‖, z ~ N(0, I),   g = ∇_w L(w; e_1 + ε_1, …, e_L + ε_L)",
        stages: &[Stage::Align],
        streams: &[],
        sites: &["attn_out"],
        passes: |_| 1.,
        privilege: Privilege::NONE,
        notes: "The published trainer never ran: one repository does not dispatch to it and runs plain fine-tuning, \
                another does not import it. `measure = \"variance\"` is what its code says, ρ being the variance of each \
                element; `measure = \"norm\"` gives the noise Vaccine's own total norm ρ, on real tokens only, which \
                is the fair control.",
        settings: SettingsType::of::<RandomPerturbation>(),
        neutral: Some(|| serde_json::json!({ "rho": 0.0 })),
        version: 1,
        build: |settings| {
            let random: RandomPerturbation = settings.parse()?;
            random.check()?;
            Ok(Box::new(random))
        },
    }
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
    fn check(&self) -> Result<()> {
        if self.rho.is_finite() && self.rho >= 0. {
            return Ok(());
        }
        Err(Error::config(format!("`rho` must be at least 0, found `{}`", self.rho)).key("rho"))
    }

    /// Standard normal noise `[batch, length, width]` by site, scaled to strength ρ. `lengths` says how many tokens of
    /// each row are real.
    ///
    /// # Errors
    /// A tensor operation failed.
    pub fn perturbation(&self, noise: &Grads, lengths: &[usize]) -> Result<Grads> {
        match self.measure {
            Measure::Variance => noise.scale(self.rho.sqrt()),
            Measure::Norm => noise.map(|z| mask_padding(z, lengths))?.normalized(self.rho, 1e-7),
        }
    }
}

/// `z` with zeros at padding.
fn mask_padding(z: &Tensor, lengths: &[usize]) -> Result<Tensor> {
    let (batch, length, _) = z.dims3()?;
    let real = lengths.iter().flat_map(|&real| (0..length).map(move |at| f32::from(u8::from(at < real))));
    let mask = Tensor::from_iter(real, z.device())?.reshape((batch, length, 1))?;
    Ok(z.broadcast_mul(&mask.to_dtype(z.dtype())?)?)
}

impl AlignmentDefense for RandomPerturbation {
    fn step(&mut self, cx: &mut StepCx, batch: &Batch) -> Result<Update> {
        let ((rows, length), width) = (batch.tokens.dims(), cx.model().spec().hidden_size);
        let (dtype, device): (DType, _) = (cx.weights().activation_dtype(), cx.weights().device().clone());
        let mut generator = cx.generator("noise");
        let draw = |site: String| -> Result<(String, Tensor)> {
            Ok((site, randn(&[rows, length, width], &mut generator, &device)?.to_dtype(dtype)?))
        };
        let noise = sites_of_kind(cx.model(), "attn_out")?.into_iter().map(draw).collect::<Result<Vec<_>>>()?;
        let noise = Grads::from_iter(noise);
        let perturbation = self.perturbation(&noise, &batch.tokens.lengths)?;
        Ok(cx.backward(batch, Sites::none().add(perturbation))?.into())
    }
}
