//! VLGuard: safe rows beside the user's, in the data or in the loss.
//!
//! Zong, Bohdal, Yu, Yang, Hospedales: Safety Fine-Tuning at (Almost) No Cost: A Baseline for Vision Large Language
//! Models, ICML 2024, arXiv:2402.02207. Two algorithms carry the name in the comparisons with it: safe rows appended to
//! the user's (Huang et al., Vaccine, as in the paper's mixed fine-tuning), and `g = ∇ f(w) + λ ∇ h(w)` with `h` the loss
//! of a safe batch (Huang et al., Booster, ICLR 2025, arXiv:2409.01586).

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;
use titer_core::data::{Batch, Stream};
use titer_core::defense::Streams;
use titer_core::defense::toolkit::check_strength;
use titer_core::{
    AlignmentDefense, DefenseEntry, Privilege, Result, SettingsType, Sites, Stage, StepCx, Update, inventory,
    no_conflict, no_limits,
};

inventory::submit! {
    DefenseEntry {
        name: "vlguard",
        summary: "trains on safe rows beside the user's",
        paper: "Zong et al.: Safety Fine-Tuning at (Almost) No Cost, ICML 2024, arXiv:2402.02207; for language models in \
                Huang et al., Vaccine, NeurIPS 2024, and Booster, ICLR 2025, arXiv:2409.01586",
        formula: "appended: g = ∇ f(w) on the user's rows and n safe ones;   weighted: g = ∇ f(w) + λ ∇ h(w; safe batch)",
        stages: &[Stage::FineTune],
        streams: |_| &["safe"],
        sites: &[],
        passes: |settings| {
            let weighted = settings["algorithm"] == "weighted" && settings["lambda"] != 0.;
            if weighted { 2. } else { 1. }
        },
        privilege: Privilege { harmful_answers: false, needs: "safe answers while the user fine-tunes" },
        notes: "`appended` lengthens an epoch by the safe rows: a stage measured in epochs takes more steps under it, one \
                measured in steps sees fewer of the user's rows. `weighted` draws a safe batch of the stream's own size \
                at every step; the published trainer fixes it to 4 rows.",
        quirks: &[],
        conflicts: no_conflict,
        limits: no_limits,
        settings: SettingsType::of::<Vlguard>(),
        neutral: Some(|| json!({ "algorithm": "weighted", "lambda": 0.0 })),
        version: 2,
        build: |settings| {
            let vlguard: Vlguard = settings.parse()?;
            check_strength("lambda", vlguard.lambda)?;
            Ok(Box::new(vlguard))
        },
    }
}

/// Which of the two algorithms of this name.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Algorithm {
    /// Safe rows are appended to the user's.
    #[default]
    Appended,
    /// The loss of a safe batch is added to that of the user's.
    Weighted,
}

/// The settings, and the defense.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Vlguard {
    /// Whether safe rows are appended to the user's rows, or their loss is added to the user's loss.
    pub algorithm: Algorithm,
    /// How many rows of the stream `safe` are appended (all it has, if it has fewer); 0 for none. With `appended` only.
    pub rows: usize,
    /// λ: the weight of the safe batch's loss. With `weighted` only.
    pub lambda: f64,
}

impl Default for Vlguard {
    /// The Vaccine paper's 500 rows and the Booster scripts' λ.
    fn default() -> Self {
        Self { algorithm: Algorithm::Appended, rows: 500, lambda: 0.1 }
    }
}

impl AlignmentDefense for Vlguard {
    fn data(&self, own: Stream, streams: &Streams) -> Result<Stream> {
        if self.algorithm == Algorithm::Weighted || self.rows == 0 {
            return Ok(own);
        }
        own.with_rows_of(streams.get("safe")?, self.rows)
    }

    fn step(&mut self, cx: &mut StepCx, batch: &Batch) -> Result<Update> {
        let user = cx.backward(batch, Sites::none())?;
        if self.algorithm == Algorithm::Appended || self.lambda == 0. {
            return Ok(user.into());
        }
        let (batch, weight) = cx.next_weighed("safe")?;
        let (safe, lambda) = (cx.backward(&batch, Sites::none())?, self.lambda * weight);
        let grads = user.grads.add_scaled(lambda, &safe.grads)?;
        let loss = user.loss.plus(&safe.loss.affine(lambda, 0.)?)?;
        Ok(Update::new(grads, loss).with("task_loss", user.loss).with("safe_loss", safe.loss))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};
    use titer_core::data::Example;
    use titer_core::defense::Clock;
    use titer_core::rng::Seed;

    use super::*;
    use crate::testing::{
        check_neutral, check_passes, check_published, check_refused, check_slopes, data, defense, gap, is_plain, plain,
        three_rows, tiny, update,
    };

    #[test]
    fn gradients_are_the_slopes_of_the_declared_objective() -> Result<()> {
        let forms = [json!({ "algorithm": "weighted", "lambda": 0.3 })];
        check_slopes("vlguard", &forms)
    }

    #[test]
    fn it_appends_rows_or_adds_a_loss() -> Result<()> {
        let rows = |count: usize, token: u32| -> Vec<Example> {
            (0..count).map(|_| Example { tokens: vec![token; 4], first_label: 1 }).collect()
        };
        let stream = |count, token| Stream::new(rows(count, token).into(), 1, 1, Seed::new(7), 0);
        for (given, expected) in [
            (json!({ "rows": 3 }), 3),
            (json!({ "rows": 0 }), 0),
            (json!({}), 4),
            (json!({ "algorithm": "weighted" }), 0),
        ] {
            let mut streams = Streams::default();
            streams.insert("safe", stream(4, 2)?);
            let mut joint = defense("vlguard", given.clone())?.data(stream(5, 1)?, &streams)?;
            let epoch = (0..joint.batches_per_epoch()).map(|_| joint.next_batch(&Device::Cpu));
            let epoch = epoch.map(|batch| Ok(batch?.targets.to_vec1::<u32>()?[0])).collect::<Result<Vec<_>>>()?;
            let [user, safe] = [1, 2].map(|token| epoch.iter().filter(|&&first| first == token).count());
            assert_eq!((user, safe), (5, expected), "{given}");
        }
        let (model, weights) = tiny(DType::F64, 0.)?;
        let (user, mut streams) = data()?;
        let (clock, none) = (Clock::at(1, 10), json!({ "algorithm": "weighted", "lambda": 0.3 }));
        let step = update(defense("vlguard", none)?.as_mut(), model.as_ref(), &weights, &mut streams, &user, clock)?;
        let of_user = plain(model.as_ref(), &weights, &user, clock)?;
        let of_safe = plain(model.as_ref(), &weights, &three_rows(6)?, clock)?;
        assert!(gap(&step.grads, &of_user.grads.add_scaled(0.3, &of_safe.grads)?)? < 1e-14);
        assert!((step.loss.value()? - of_user.loss.value()? - 0.3 * of_safe.loss.value()?).abs() < 1e-14);
        Ok(())
    }

    #[test]
    fn declared_passes_are_those_made() -> Result<()> {
        check_passes(
            "vlguard",
            &[json!({}), json!({ "algorithm": "weighted" }), json!({ "algorithm": "weighted", "lambda": 0.0 })],
        )
    }

    #[test]
    fn neutral_settings_are_plain_fine_tuning() -> Result<()> {
        check_neutral("vlguard")?;
        assert!(is_plain("vlguard", json!({}))?, "it acts on the data");
        Ok(())
    }

    #[test]
    fn settings_out_of_range_are_refused() {
        check_refused("vlguard", &[(json!({ "lambda": -1.0 }), "lambda")]);
    }

    #[test]
    fn the_published_form_has_its_quirks() -> Result<()> {
        check_published("vlguard")
    }
}
