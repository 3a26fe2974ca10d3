//! Constrained fine-tuning: the first tokens of an answer may move away from the aligned model least.
//!
//! Qi, Panda, Lyu, Ma, Roy, Beirami, Mittal, Henderson: Safety Alignment Should Be Made More Than Just a Few Tokens
//! Deep, ICLR 2025, arXiv:2406.05946.
//!
//! `L = − mean_t (2/β_t) log σ(β_t log(π_w(y_t) / π_{w₀}(y_t)))` over response tokens `t`, whose gradient is that of
//! the cross-entropy with each token weighed by `w_t = 2 (1 − σ(β_t log(π_w(y_t) / π_{w₀}(y_t))))`: a token that has
//! become more likely than it was counts less, and the more so the larger `β_t`.

use candle_core::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;
use titer_core::data::Batch;
use titer_core::defense::toolkit::{Kept, check_strength, label_log_probabilities, label_rows};
use titer_core::tensor::ops;
use titer_core::{
    AlignmentDefense, DefenseEntry, Privilege, Quirk, Result, Scalar, SettingsType, Sites, Stage, StageCx, State,
    StepCx, Update, Weights, inventory, no_conflict, no_limits,
};

/// The last of the early tokens of an answer, counted from 1.
const EARLY: usize = 5;

inventory::submit! {
    DefenseEntry {
        name: "constrained-sft",
        summary: "fine-tuning that holds the first tokens of an answer closest to the aligned model",
        paper: "Qi, Panda, Lyu, Ma, Roy, Beirami, Mittal, Henderson: Safety Alignment Should Be Made More Than Just a \
                Few Tokens Deep, ICLR 2025, arXiv:2406.05946",
        formula: "w_t = 2 (1 − σ(β_t log(π_w(y_t) / π_{w_0}(y_t)))),   g = mean_t −w_t ∇ log π_w(y_t)",
        stages: &[Stage::FineTune],
        streams: |_| &[],
        sites: &[],
        passes: |settings| if settings["beta"] == 0. { 1. } else { 2. },
        privilege: Privilege { harmful_answers: false, needs: "the aligned model, kept in memory while the user fine-tunes" },
        notes: "The loss that is logged is the weighted cross-entropy whose gradient is applied. The published code \
                computes the start's log-probabilities once for all rows, without dropout; here they are of the same step \
                and dropout mask. Its optimiser (Adam with β₁ = 0.5, 10 steps of warm-up) is the experiment's to choose.",
        quirks: &[Quirk {
            setting: "floor",
            published: || json!(1e-3),
            what: "lets no token's weight fall below 1e-3",
        }],
        conflicts: no_conflict,
        limits: no_limits,
        settings: SettingsType::of::<ConstrainedSft>(),
        neutral: Some(|| json!({ "beta": 0.0 })),
        version: 1,
        build: |settings| {
            let constrained: ConstrainedSft = settings.parse()?;
            constrained.check()?;
            Ok(Box::new(constrained))
        },
    }
}

/// The settings, and the defense.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct ConstrainedSft {
    /// β: how strongly a token is held where it was, from the sixth of an answer on. 0 is plain fine-tuning.
    pub beta: f64,
    /// `β_1` / β: how much more strongly the first token of an answer is held.
    pub first: f64,
    /// `β_t` / β for the second to the fifth token.
    pub early: f64,
    /// The least weight `w_t` of a token.
    pub floor: f64,
    #[serde(skip)]
    kept: Kept,
}

impl Default for ConstrainedSft {
    /// The paper's 0.5 for the first token of an answer, 2 for the next four, 0.1 for the others.
    fn default() -> Self {
        Self { beta: 0.1, first: 5., early: 20., floor: 0., kept: Kept::default() }
    }
}

impl ConstrainedSft {
    fn check(&self) -> Result<()> {
        let strengths = [("beta", self.beta), ("first", self.first), ("early", self.early), ("floor", self.floor)];
        strengths.into_iter().try_for_each(|(key, value)| check_strength(key, value))
    }

    /// `β_t` of each label of `batch`, `[labels]`.
    fn betas(&self, batch: &Batch) -> Result<Tensor> {
        let (mut row, mut at) = (None, 0);
        let betas = batch.positions.to_vec1::<u32>()?.into_iter().map(|position| {
            let own = batch.tokens.ranges().position(|row| row.contains(&(position as usize)));
            at = if own == row { at + 1 } else { 1 };
            row = own;
            self.beta * self.factor(at)
        });
        Ok(Tensor::from_iter(betas.collect::<Vec<f64>>(), batch.positions.device())?)
    }

    /// `β_t` / β of token `at` of an answer, counted from 1.
    fn factor(&self, at: usize) -> f64 {
        match at {
            1 => self.first,
            2..=EARLY => self.early,
            _ => 1.,
        }
    }

    /// `w_t` of each label, given its log-probability now and at the start, `[labels]`.
    fn label_weights(&self, now: &Tensor, start: &Tensor, batch: &Batch) -> Result<Tensor> {
        let betas = self.betas(batch)?.to_dtype(now.dtype())?;
        // 1 − σ(x) = 1 / (1 + eˣ)
        let odds = ops::exp(&(betas * (now.detach() - start)?)?)?;
        Ok(((odds + 1.)?.recip()? * 2.)?.maximum(self.floor)?)
    }
}

/// The log-probability of each label of `batch` under the head of `weights`, `[labels]`, given hidden states.
fn log_likelihood(cx: &mut StepCx, weights: &Weights, hidden: &Tensor, batch: &Batch) -> Result<Tensor> {
    let logits = cx.logits_with(weights, &label_rows(hidden, batch)?)?;
    label_log_probabilities(&logits, &batch.targets, batch.largest_target)
}

impl AlignmentDefense for ConstrainedSft {
    fn begin(&mut self, cx: &mut StageCx) -> Result<()> {
        if self.beta > 0. {
            self.kept.keep("start", cx.weights.snapshot()?);
        }
        Ok(())
    }

    fn step(&mut self, cx: &mut StepCx, batch: &Batch) -> Result<Update> {
        if self.beta == 0. {
            return Ok(cx.backward(batch, Sites::none())?.into());
        }
        let (student, start) = (cx.weights(), cx.weights().at(self.kept.get("start")?));
        let (hidden, _) = cx.hidden_with(&start, &batch.tokens, Sites::none())?;
        let before = log_likelihood(cx, &start, &hidden, batch)?;
        let (hidden, _) = cx.hidden(&batch.tokens, Sites::none())?;
        let now = log_likelihood(cx, student, &hidden, batch)?;
        let weights = self.label_weights(&now, &before, batch)?;
        let loss = ops::mean_all(&(weights.detach() * &now)?)?.neg()?;
        let grads = cx.backward_loss(&loss)?;
        let (task, weight) = (ops::mean_all(&now.detach())?.neg()?, ops::mean_all(&weights)?);
        let update = Update::new(grads, Scalar::of(&loss)?).with("task_loss", Scalar::of(&task)?);
        Ok(update.with("mean_weight", Scalar::of(&weight)?))
    }

    fn loss_is_objective(&self) -> bool {
        self.beta == 0.
    }

    fn state(&self) -> State {
        self.kept.state()
    }

    fn load_state(&mut self, state: State) -> Result<()> {
        self.kept.load(state)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::DType;
    use titer_core::defense::Clock;

    use super::*;
    use crate::testing::{
        all_tiny, begin, check_must_begin, check_neutral, check_passes, check_published, check_refused, check_slope,
        data, defense, gap, is_plain, log_softmax, logits, moved, plain, tiny, update,
    };

    /// The gradient is that of the paper's objective `−(2/β_t) log σ(β_t (log π − log π_start))`, token by token.
    #[test]
    fn it_has_the_papers_gradient() -> Result<()> {
        for (model, mut weights) in all_tiny(DType::F64, 0.)? {
            let (user, mut streams) = data()?;
            let likelihoods = |weights: &Weights| -> Result<Vec<f64>> {
                let logits = logits(model.as_ref(), weights, &user.tokens)?;
                let labels = user.positions.to_vec1::<u32>()?.into_iter().zip(user.targets.to_vec1::<u32>()?);
                Ok(labels.map(|(at, target)| log_softmax(&logits[at as usize])[target as usize]).collect())
            };
            let mut constrained = defense("constrained-sft", json!({ "beta": 0.4 }))?;
            begin(constrained.as_mut(), model.as_ref(), &mut weights, &mut streams)?;
            let start = likelihoods(&weights)?;
            moved(&weights)?;
            // Every token of the three rows but the first is a label: seven, four and nine of them.
            let betas: Vec<f64> = [7, 4, 9]
                .iter()
                .flat_map(|&labels| 1..=labels)
                .map(|at| match at {
                    1 => 2.,
                    2..=5 => 8.,
                    _ => 0.4,
                })
                .collect();
            let objective = |weights: &Weights| -> Result<f64> {
                let now = likelihoods(weights)?;
                let terms = now.iter().zip(&start).zip(&betas);
                let sum: f64 =
                    terms.map(|((now, start), beta)| 2. / beta * (1. + (-beta * (now - start)).exp()).ln()).sum();
                Ok(sum / betas.len() as f64)
            };
            let step = update(constrained.as_mut(), model.as_ref(), &weights, &mut streams, &user, Clock::at(1, 10))?;
            check_slope(&weights, &step.grads, "constrained-sft", || objective(&weights))?;
        }
        Ok(())
    }

    /// No weight falls below the floor: one above all weights makes them all equal.
    #[test]
    fn the_floor_is_the_least_weight() -> Result<()> {
        let (model, mut weights) = tiny(DType::F64, 0.)?;
        let (user, mut streams) = data()?;
        let mut floored = defense("constrained-sft", json!({ "floor": 3.0 }))?;
        begin(floored.as_mut(), model.as_ref(), &mut weights, &mut streams)?;
        moved(&weights)?;
        let clock = Clock::at(1, 10);
        let ours = update(floored.as_mut(), model.as_ref(), &weights, &mut streams, &user, clock)?;
        let plain = plain(model.as_ref(), &weights, &user, clock)?;
        assert!(gap(&ours.grads, &plain.grads.scale(3.)?)? < 1e-12);
        assert!((ours.loss.value()? - 3. * plain.loss.value()?).abs() < 1e-12);
        Ok(())
    }

    #[test]
    fn declared_passes_are_those_made() -> Result<()> {
        check_passes("constrained-sft", &[json!({}), json!({ "beta": 0.0 })])
    }

    #[test]
    fn neutral_settings_are_plain_fine_tuning() -> Result<()> {
        check_neutral("constrained-sft")?;
        assert!(!is_plain("constrained-sft", json!({}))?);
        Ok(())
    }

    #[test]
    fn settings_out_of_range_are_refused() {
        check_refused("constrained-sft", &[(json!({ "early": -1.0 }), "early")]);
    }

    #[test]
    fn the_published_form_has_its_quirks() -> Result<()> {
        check_published("constrained-sft")
    }

    #[test]
    fn a_stage_that_was_not_begun_is_an_error() -> Result<()> {
        check_must_begin("constrained-sft")
    }
}
