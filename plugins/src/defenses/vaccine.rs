//! Vaccine: perturbation-aware alignment (Huang, Hu, Liu; NeurIPS 2024).

use candle_core::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use titer_core::data::{Batch, Tokens};
use titer_core::defense::toolkit::{MicroBatches, check_strength};
use titer_core::model::sites_of_kind;
use titer_core::{
    AlignmentDefense, DefenseEntry, Error, Grads, Limits, Privilege, Result, SettingsType, Sites, Stage, StepCx,
    Update, inventory, no_conflict,
};

inventory::submit! {
    DefenseEntry {
        name: "vaccine",
        summary: "aligns under a perturbation of the attention outputs in the direction that raises the loss most",
        paper: "Huang, Hu, Liu: Vaccine: Perturbation-aware Alignment for Large Language Models against Harmful \
                Fine-tuning Attack, NeurIPS 2024, arXiv:2402.01109",
        formula: "ε_l = ρ ∇_{e_l} L / ‖(∇_{e_1} L, …, ∇_{e_L} L)‖,   g = ∇_w L(w; e_1 + ε_1, …, e_L + ε_L)",
        stages: &[Stage::Align],
        streams: |_| &[],
        sites: &["attn_out"],
        passes: |settings| 1. + 1. / settings["every"].as_f64().unwrap_or(1.).max(1.),
        privilege: Privilege::NONE,
        notes: "Unlike in the published trainer, both passes of a step share one dropout mask, and a model without the \
                sites is an error. `every` is the paper's accelerated variant (appendix A), which its repository lacks. \
                With `norm = \"batch\"`, as published, the perturbation per row shrinks with the batch size.",
        quirks: &[MicroBatches::QUIRK],
        conflicts: no_conflict,
        limits,
        settings: SettingsType::of::<Vaccine>(),
        neutral: Some(|| serde_json::json!({ "rho": 0.0 })),
        version: 1,
        build: |settings| {
            let vaccine: Vaccine = settings.parse()?;
            vaccine.check()?;
            Ok(Box::new(vaccine))
        },
    }
}

fn limits(settings: &Value) -> Limits {
    let whole = settings["norm"] == "batch" && settings["rho"] != 0.;
    let norm =
        whole.then_some("the perturbation has one norm for each micro batch (`norm = \"sample\"`: for each row)");
    Limits { accumulation: MicroBatches::limit(settings).or(norm), ..Limits::default() }
}

/// Over what the perturbation's norm is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Norm {
    /// One norm for the whole batch, as published.
    Batch,
    /// One norm for each row, so that the batch size does not matter.
    Sample,
}

/// The settings, and the defense.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Vaccine {
    /// ρ: the L2 norm of the perturbation over all layers and tokens.
    pub rho: f64,
    /// What that norm is taken over: the whole batch (as published), or each row by itself.
    pub norm: Norm,
    /// Which micro batches count under gradient accumulation: all, or the last one only.
    pub micro_batches: MicroBatches,
    /// τ: perturbs on every τ-th step only; the other steps are plain fine-tuning.
    pub every: usize,
}

impl Default for Vaccine {
    fn default() -> Self {
        Self { rho: 2., norm: Norm::Batch, micro_batches: MicroBatches::All, every: 1 }
    }
}

impl Vaccine {
    fn check(&self) -> Result<()> {
        check_strength("rho", self.rho)?;
        if self.every == 0 {
            return Err(Error::config("`every` must be at least 1, found `0`")
                .key("every")
                .help("1 perturbs on every step"));
        }
        Ok(())
    }

    /// ε of the gradients `[tokens, width]` at the sites: of norm ρ, along the gradient.
    ///
    /// # Errors
    /// A tensor operation failed.
    pub fn perturbation(&self, site_grads: &Grads, tokens: &Tokens) -> Result<Grads> {
        match self.norm {
            Norm::Batch => site_grads.normalized(self.rho, 1e-7),
            Norm::Sample => {
                let rows = tokens
                    .ranges()
                    .map(|row| site_grads.map(|g| Ok(g.narrow(0, row.start, row.len())?))?.normalized(self.rho, 1e-7));
                let rows = rows.collect::<Result<Vec<Grads>>>()?;
                let all = |(site, _): (&str, &Tensor)| {
                    let parts: Vec<&Tensor> = rows.iter().filter_map(|row| row.get(site)).collect();
                    Ok((site.to_owned(), Tensor::cat(&parts, 0)?))
                };
                site_grads.iter().map(all).collect()
            }
        }
    }
}

impl Vaccine {
    /// The update of a step that perturbs these sites.
    ///
    /// # Errors
    /// A pass failed.
    pub fn step_at(&self, cx: &mut StepCx, batch: &Batch, sites: Vec<String>) -> Result<Update> {
        let first = cx.site_gradients(batch, Sites::none().probe(sites))?;
        let perturbation = self.perturbation(&first.site_grads, &batch.tokens)?;
        let second = cx.backward(batch, Sites::none().add(perturbation))?;
        Ok(Update::from(second).with("unperturbed_loss", first.loss))
    }
}

impl AlignmentDefense for Vaccine {
    fn step(&mut self, cx: &mut StepCx, batch: &Batch) -> Result<Update> {
        if !cx.clock().step.is_multiple_of(self.every) {
            return Ok(cx.backward(batch, Sites::none())?.into());
        }
        let update = self.step_at(cx, batch, sites_of_kind(cx.model(), "attn_out")?)?;
        Ok(self.micro_batches.keep(update, cx.clock()))
    }

    fn loss_is_objective(&self) -> bool {
        false
    }
}

#[cfg(test)]
mod tests {
    use candle_core::DType;
    use proptest::collection::vec;
    use proptest::prelude::*;
    use serde_json::json;
    use titer_core::defense::Streams;
    use titer_core::rng::Seed;

    use super::*;
    use crate::testing::{batch, context, defense, same, step, three_rows, tiny};

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        /// Law 4: the perturbation's norm is rho, over the batch or over each row.
        #[test]
        fn a_perturbation_has_norm_rho(lengths in vec(1usize..12, 1..5), rho in 0.01f64..20., seed: u64) {
            let (model, weights) = tiny(DType::F32, 0.)?;
            let batch = batch(23, &lengths, &mut Seed::new(seed).generator())?;
            let probed = Sites::none().probe(sites_of_kind(model.as_ref(), "attn_out")?);
            let mut none = Streams::default();
            let grads = context(model.as_ref(), &weights, &mut none).site_gradients(&batch, probed)?.site_grads;
            let joint = Vaccine { rho, ..Vaccine::default() }.perturbation(&grads, &batch.tokens)?;
            prop_assert!((joint.norm()?.value()? - rho).abs() < 1e-4 * rho);
            let each = Vaccine { rho, norm: Norm::Sample, ..Vaccine::default() }.perturbation(&grads, &batch.tokens)?;
            for row in batch.tokens.ranges() {
                let norm = each.map(|g| Ok(g.narrow(0, row.start, row.len())?))?.norm()?.value()?;
                prop_assert!((norm - rho).abs() < 1e-4 * rho);
            }
        }
    }

    #[test]
    fn it_perturbs_every_tau_steps_only() -> Result<()> {
        let (model, weights) = tiny(DType::F32, 0.)?;
        let batch = three_rows(5)?;
        let plain = step(model.as_ref(), &weights, defense("sft", json!({}))?.as_mut(), &batch, 0)?;
        let mut vaccine = defense("vaccine", json!({ "every": 3 }))?;
        for at in 0..7 {
            let update = step(model.as_ref(), &weights, vaccine.as_mut(), &batch, at)?;
            assert_eq!(same(&update, &plain)?, at % 3 != 0, "step {at}");
        }
        Ok(())
    }
}
