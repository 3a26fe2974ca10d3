//! KL regularisation: on the user's rows the model must keep the answers' distribution of the model it started from.
//!
//! The function-space baseline of Huang et al., Vaccine, NeurIPS 2024, arXiv:2402.01109.
//!
//! `L = f(w) + λ mean_t KL(p_T(·|t) ‖ p_w(·|t))` over response tokens `t`, with the teacher `T` the model at the start
//! of the stage.

use candle_core::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use titer_core::data::Batch;
use titer_core::defense::toolkit::{Kept, check_strength, label_rows, log_softmax};
use titer_core::tensor::ops;
use titer_core::{
    AlignmentDefense, DefenseEntry, Limits, Privilege, Quirk, Result, Scalar, SettingsType, Sites, Stage, StageCx,
    State, StepCx, Update, Weights, inventory, no_conflict,
};

inventory::submit! {
    DefenseEntry {
        name: "kl",
        summary: "keeps the distribution of answers close to that of the model before the user's fine-tuning",
        paper: "the KL baseline of Huang et al., Vaccine, NeurIPS 2024, arXiv:2402.01109",
        formula: "L = f(w) + λ mean_t KL(p_{w_0}(·|t) ‖ p_w(·|t)) over response tokens t",
        stages: &[Stage::FineTune],
        streams: |_| &[],
        sites: &[],
        passes: |settings| if settings["lambda"] == 0. { 1. } else { 2. },
        privilege: Privilege { harmful_answers: false, needs: "the aligned model, kept in memory while the user fine-tunes" },
        notes: "Unlike in the published trainer, which makes a third pass, the cross-entropy and the divergence are of one \
                pass, and teacher and student share its dropout mask. λ is its script's; its paper says 1e-3.",
        quirks: &[Quirk {
            setting: "axis",
            published: || json!("sequence"),
            what: "normalises each word's logits over the positions of the sequence, prompt and padding included, and sums",
        }],
        conflicts: no_conflict,
        limits,
        settings: SettingsType::of::<Kl>(),
        neutral: Some(|| json!({ "lambda": 0.0 })),
        version: 2,
        build: |settings| {
            let kl: Kl = settings.parse()?;
            check_strength("lambda", kl.lambda)?;
            Ok(Box::new(kl))
        },
    }
}

fn limits(settings: &Value) -> Limits {
    let published = settings["axis"] == "sequence" && settings["lambda"] != 0.;
    let padded = published.then_some("the published divergence is a mean over rows, and sees their padding");
    Limits { accumulation: padded, ..Limits::default() }
}

/// What the compared distributions are over.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum DistributionAxis {
    /// The vocabulary, at each response token; the mean over these.
    #[default]
    Vocabulary,
    /// All positions of a row, for each entry of the vocabulary; the sum over these, the mean over rows.
    Sequence,
}

/// The settings, and the defense.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Kl {
    /// λ: the weight of the divergence, in nats per token, beside the loss.
    pub lambda: f64,
    /// What the compared distributions are over: the vocabulary or the sequence.
    pub axis: DistributionAxis,
    #[serde(skip)]
    kept: Kept,
}

impl Default for Kl {
    fn default() -> Self {
        Self { lambda: 0.1, axis: DistributionAxis::Vocabulary, kept: Kept::default() }
    }
}

impl Kl {
    /// Log-probabilities of hidden states `[tokens, width]` under the head of `weights`: `[labels, vocabulary]`,
    /// or `[rows, length, vocabulary]`, normalised over dimension 1.
    fn log_probabilities(&self, cx: &mut StepCx, weights: &Weights, hidden: &Tensor, batch: &Batch) -> Result<Tensor> {
        let logits = match self.axis {
            DistributionAxis::Vocabulary => cx.logits_with(weights, &label_rows(hidden, batch)?)?,
            DistributionAxis::Sequence => {
                let logits = cx.logits_with(weights, hidden)?;
                let (rows, (tokens, vocabulary)) = (batch.tokens.lengths.len(), logits.dims2()?);
                logits.reshape((rows, tokens / rows, vocabulary))?
            }
        };
        log_softmax(&logits, 1)
    }
}

/// `Σ p (log p − log q) / n` of log-probabilities of equal shape, `n` being their first dimension.
fn divergence(log_p: &Tensor, log_q: &Tensor) -> Result<Tensor> {
    let sum = ops::sum_all(&(ops::exp(log_p)? * (log_p - log_q)?)?)?;
    Ok((sum / log_p.dim(0)? as f64)?)
}

impl AlignmentDefense for Kl {
    fn begin(&mut self, cx: &mut StageCx) -> Result<()> {
        if self.lambda > 0. {
            self.kept.keep("teacher", cx.weights.snapshot()?);
        }
        Ok(())
    }

    fn step(&mut self, cx: &mut StepCx, batch: &Batch) -> Result<Update> {
        if self.lambda == 0. {
            return Ok(cx.backward(batch, Sites::none())?.into());
        }
        let padded = if self.axis == DistributionAxis::Sequence { Some(batch.padded(None)?) } else { None };
        let batch = padded.as_ref().unwrap_or(batch);
        let (student, teacher) = (cx.weights(), cx.weights().at(self.kept.get("teacher")?));
        let (hidden, _) = cx.hidden_with(&teacher, &batch.tokens, Sites::none())?;
        let taught = self.log_probabilities(cx, &teacher, &hidden, batch)?;
        let (hidden, _) = cx.hidden(&batch.tokens, Sites::none())?;
        let learnt = self.log_probabilities(cx, student, &hidden, batch)?;
        let divergence = divergence(&taught, &learnt)?;
        let task = cx.cross_entropy(&hidden, batch)?.to_dtype(divergence.dtype())?;
        let loss = (&task + (&divergence * self.lambda)?)?;
        let grads = cx.backward_loss(&loss)?;
        let (task, divergence) = (Scalar::of(&task)?, Scalar::of(&divergence)?);
        Ok(Update::new(grads, Scalar::of(&loss)?).with("task_loss", task).with("divergence", divergence))
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
        begin, check_must_begin, check_neutral, check_passes, check_published, check_refused, check_slopes, data,
        defense, is_plain, log_softmax, logits, moved, tiny, update,
    };

    #[test]
    fn gradients_are_the_slopes_of_the_declared_objective() -> Result<()> {
        let forms = [json!({ "lambda": 0.7 }), json!({ "lambda": 0.7, "axis": "sequence" })];
        check_slopes("kl", &forms)
    }

    #[test]
    fn it_is_the_divergence_of_the_answers_tokens() -> Result<()> {
        let (model, mut weights) = tiny(DType::F64, 0.)?;
        let teacher = weights.snapshot()?;
        for axis in ["vocabulary", "sequence"] {
            weights.set(&teacher)?;
            let (user, mut streams) = data()?;
            let seen = if axis == "vocabulary" { user.clone() } else { user.padded(None)? };
            let mut kl = defense("kl", json!({ "axis": axis, "lambda": 0.7 }))?;
            begin(kl.as_mut(), model.as_ref(), &mut weights, &mut streams)?;
            let taught = logits(model.as_ref(), &weights, &seen.tokens)?;
            moved(&weights)?;
            let learnt = logits(model.as_ref(), &weights, &seen.tokens)?;
            let (rows, length) = (seen.tokens.lengths.len(), seen.tokens.lengths[0]);
            // The distributions as lists of logits: over words at each label, or over positions for each word of each row.
            let groups = |logits: &[Vec<f64>]| -> Result<Vec<Vec<f64>>> {
                if axis == "vocabulary" {
                    let positions = user.positions.to_vec1::<u32>()?;
                    return Ok(positions.into_iter().map(|at| logits[at as usize].clone()).collect());
                }
                let over = |row: usize, word: usize| (0..length).map(|at| logits[row * length + at][word]).collect();
                let over = &over;
                Ok((0..rows).flat_map(|row| (0..23).map(move |word| over(row, word))).collect())
            };
            let pairs = groups(&taught)?.into_iter().zip(groups(&learnt)?);
            let sum: f64 = pairs
                .map(|(p, q)| {
                    let (p, q) = (log_softmax(&p), log_softmax(&q));
                    p.iter().zip(q).map(|(p, q)| p.exp() * (p - q)).sum::<f64>()
                })
                .sum();
            let expected = sum / if axis == "vocabulary" { user.labels() } else { rows } as f64;
            let step = update(kl.as_mut(), model.as_ref(), &weights, &mut streams, &user, Clock::at(1, 10))?;
            let (ours, task) = (step.scalars["divergence"].value()?, step.scalars["task_loss"].value()?);
            assert!((ours - expected).abs() < 1e-10 && expected > 1e-3, "{axis}: {ours} and {expected}");
            assert!((step.loss.value()? - task - 0.7 * expected).abs() < 1e-10);
        }
        Ok(())
    }

    #[test]
    fn declared_passes_are_those_made() -> Result<()> {
        check_passes("kl", &[json!({}), json!({ "lambda": 0.0 })])
    }

    #[test]
    fn neutral_settings_are_plain_fine_tuning() -> Result<()> {
        check_neutral("kl")?;
        assert!(!is_plain("kl", json!({}))?);
        Ok(())
    }

    #[test]
    fn settings_out_of_range_are_refused() {
        check_refused("kl", &[(json!({ "lambda": -1.0 }), "lambda")]);
    }

    #[test]
    fn the_published_form_has_its_quirks() -> Result<()> {
        check_published("kl")
    }

    #[test]
    fn a_stage_that_was_not_begun_is_an_error() -> Result<()> {
        check_must_begin("kl")
    }
}
