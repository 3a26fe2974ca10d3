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
use titer_core::defense::toolkit::{Kept, check_strength, label_rows, log_softmax};
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
        summary: "fine-tuning in which the first tokens of an answer may move away from the aligned model least",
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
        let (_, length) = batch.tokens.dims();
        let (mut row, mut at) = (None, 0);
        let betas = batch.positions.to_vec1::<u32>()?.into_iter().map(|position| {
            let own = Some(position as usize / length);
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
    Ok(log_softmax(&logits, 1)?.gather(&batch.targets.unsqueeze(1)?, 1)?.squeeze(1)?)
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
