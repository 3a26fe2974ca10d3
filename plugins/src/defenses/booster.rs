//! Booster: alignment that makes one harmful step worth little (Huang, Hu, Ilhan, Tekin, Liu; ICLR 2025).

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use titer_core::data::Batch;
use titer_core::defense::toolkit::{MicroBatches, check_strength};
use titer_core::{
    AlignmentDefense, Conflict, DefenseEntry, Limits, Privilege, Result, SettingsType, Sites, Stack, Stage, StepCx,
    Update, inventory,
};

use super::vaccine::Vaccine;

inventory::submit! {
    DefenseEntry {
        name: "booster",
        summary: "aligns while keeping small how much one normalised step on harmful data lowers the harmful loss",
        paper: "Huang, Hu, Ilhan, Tekin, Liu: Booster: Tackling Harmful Fine-tuning for Large Language Models via \
                Attenuating Harmful Perturbation, ICLR 2025, arXiv:2409.01586",
        formula: "L(w) = f(w) + λ (h(w) − h(w − α ∇h(w) / ‖∇h(w)‖)),   g = ∇f(w) + λ (∇h(w) − ∇h(w − α ∇h(w) / ‖∇h(w)‖))",
        stages: &[Stage::Align],
        streams: |_| &["harmful"],
        sites: &["attn_out"],
        passes: |settings| if settings["rho"].as_f64() == Some(0.) { 3. } else { 4. },
        privilege: Privilege { harmful_answers: true, needs: "harmful answers during alignment" },
        notes: "First order, as published: the second gradient is taken at the moved weights and not differentiated \
                through the move. Moved weights are restored bit for bit (the published code adds the step back, which \
                leaves rounding behind). `rho` above 0 is the perturbation-aware variant: the pass over safe data is \
                Vaccine's. The paper finds good λ between 10 and 20; its scripts set 5.",
        quirks: &[MicroBatches::QUIRK],
        conflicts,
        limits,
        settings: SettingsType::of::<Booster>(),
        neutral: Some(|| serde_json::json!({ "lambda": 0.0 })),
        version: 2,
        build: |settings| {
            let booster: Booster = settings.parse()?;
            check_strength("lambda", booster.lambda)?;
            check_strength("alpha", booster.alpha)?;
            check_strength("rho", booster.rho)?;
            Ok(Box::new(booster))
        },
    }
}

fn limits(settings: &Value) -> Limits {
    let step = "each micro batch takes a harmful step of its own, of the full length";
    let active = settings["lambda"] != 0. || settings["rho"] != 0.;
    Limits { accumulation: MicroBatches::limit(settings).or(active.then_some(step)), ..Limits::default() }
}

fn conflicts(stack: &Stack) -> Option<Conflict> {
    (stack.lora == "double").then(|| {
        Conflict::Noted(
            "Booster shapes what a step on its own adapter gains; the user trains a fresh one (double LoRA), where its \
             authors report that it does not carry over: they fine-tune with single LoRA"
                .into(),
        )
    })
}

/// The settings, and the defense.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Booster {
    /// λ: the weight of what a harmful step gains.
    pub lambda: f64,
    /// α: the length of that step, over all trained parameters.
    pub alpha: f64,
    /// ρ: the norm of Vaccine's perturbation in the pass over safe data; 0 for the plain variant.
    pub rho: f64,
    /// Which micro batches count under gradient accumulation: all, or the last one only.
    pub micro_batches: MicroBatches,
}

impl Default for Booster {
    fn default() -> Self {
        Self { lambda: 5., alpha: 0.1, rho: 0., micro_batches: MicroBatches::All }
    }
}

impl Booster {
    /// The update on safe data: plain, or under Vaccine's perturbation.
    fn safe(&self, cx: &mut StepCx, batch: &Batch) -> Result<Update> {
        if self.rho == 0. {
            return Ok(cx.backward(batch, Sites::none())?.into());
        }
        Vaccine { rho: self.rho, ..Vaccine::default() }.step(cx, batch)
    }
}

impl AlignmentDefense for Booster {
    fn step(&mut self, cx: &mut StepCx, batch: &Batch) -> Result<Update> {
        let (harmful, weight) = cx.next_weighed("harmful")?;
        let here = cx.backward(&harmful, Sites::none())?;
        let there = cx.scratch(|moved| {
            moved.shift(&here.grads.normalized(self.alpha, 1e-7)?, -1.)?;
            moved.backward(&harmful, Sites::none())
        })?;
        let safe = self.safe(cx, batch)?;
        let gain = here.loss.plus(&there.loss.affine(-1., 0.)?)?;
        let attenuation = here.grads.add_scaled(-1., &there.grads)?;
        let update = Update { grads: safe.grads.add_scaled(self.lambda * weight, &attenuation)?, ..safe };
        let update = update.with("harmful_loss", here.loss).with("harmful_gain", gain);
        Ok(self.micro_batches.keep(update, cx.clock()))
    }

    fn loss_is_objective(&self) -> bool {
        false
    }
}
