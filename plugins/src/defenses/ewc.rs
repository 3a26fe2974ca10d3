//! Elastic weight consolidation: the user's fine-tuning may move only what alignment does not need.
//!
//! Kirkpatrick et al.: Overcoming catastrophic forgetting in neural networks, PNAS 2017, arXiv:1612.00796; as a defense
//! in Huang et al., Vaccine, NeurIPS 2024, arXiv:2402.01109.
//!
//! `g = ∇ f(w) + λ F ⊙ (w − w₀)`, with `F` the mean over safe rows of the squared gradient of the row's loss, and `w₀`
//! the parameters, both at the start of the stage.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use titer_core::data::Batch;
use titer_core::defense::toolkit::{Kept, Reduction, check_strength, pull};
use titer_core::{
    AlignmentDefense, Conflict, DefenseEntry, Error, Grads, Limits, Privilege, Quirk, Result, SettingsType, Sites,
    Stack, Stage, StageCx, State, StepCx, Update, inventory,
};

inventory::submit! {
    DefenseEntry {
        name: "ewc",
        summary: "pulls every parameter to its aligned value, the more strongly the more the safe answers depend on it",
        paper: "Kirkpatrick et al.: Overcoming catastrophic forgetting in neural networks, PNAS 2017, \
                arXiv:1612.00796; as a defense in Huang et al., Vaccine, NeurIPS 2024",
        formula: "F = E[(∇ log p(y|x; w_0))²] over safe rows,   g = ∇ f(w) + λ F ⊙ (w − w_0)",
        stages: &[Stage::FineTune],
        streams: |_| &["safe"],
        sites: &[],
        passes: |_| 1.,
        privilege: Privilege { harmful_answers: false, needs: "safe answers while the user fine-tunes" },
        notes: "The Fisher information is that of the safe rows' own labels (the empirical one), of each row's mean loss \
                per token; its pass over the stream `safe` before the first step is not part of the passes per step.",
        quirks: &[
            Quirk {
                setting: "fisher",
                published: || json!("batch"),
                what: "squares the gradient of a whole batch, in which the rows' gradients cancel",
            },
            Quirk {
                setting: "reduction",
                published: || json!("sum"),
                what: "sums the squares, so that the penalty grows with the number of safe batches",
            },
            Quirk { setting: "penalty", published: || json!("full"), what: "leaves out the factor 1/2" },
            Quirk {
                setting: "stale_gradient",
                published: || json!(true),
                what: "does not clear the last Fisher gradient, which is added to that of the first step",
            },
            Quirk {
                setting: "lambda",
                published: || json!(1e9),
                what: "has the strength that goes with its sum over batches",
            },
        ],
        conflicts: fresh_adapter,
        limits,
        settings: SettingsType::of::<Ewc>(),
        neutral: Some(|| json!({ "lambda": 0.0 })),
        version: 1,
        build: |settings| {
            let ewc: Ewc = settings.parse()?;
            ewc.check()?;
            Ok(Box::new(ewc))
        },
    }
}

fn limits(settings: &Value) -> Limits {
    let stale = settings["stale_gradient"] == true && settings["lambda"] != 0.;
    let stale = stale.then_some("the uncleared gradient enters with the first micro batch");
    Limits { accumulation: stale, ..Limits::default() }
}

/// With a second adapter the anchor is no aligned value of anything.
fn fresh_adapter(stack: &Stack) -> Option<Conflict> {
    (stack.lora == "double").then(|| {
        Conflict::Noted(
            "`ewc` on a fresh second adapter: B = 0 makes the Fisher information of A zero, so A moves freely and B is \
             held at 0; `single` continues the alignment's adapter"
                .to_owned(),
        )
    })
}

/// Whose gradient is squared.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Fisher {
    /// That of each row.
    #[default]
    Sample,
    /// That of each batch.
    Batch,
}

impl Fisher {
    /// The parts of `batch` whose gradients are squared.
    fn parts(self, batch: Batch) -> Result<Vec<Batch>> {
        match self {
            Self::Sample => batch.rows(),
            Self::Batch => Ok(vec![batch]),
        }
    }
}

/// The factor before the penalty.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Penalty {
    /// λ/2, as in the paper.
    #[default]
    Half,
    /// λ.
    Full,
}

/// The settings, and the defense.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Ewc {
    /// λ: how strong the pull to the start is. The default is the published scripts' 1e9, for a sum over 400 batches of
    /// 5 rows without the factor 1/2, brought to this form (2 · 400 / 5 as much), as if the rows of a batch were
    /// independent.
    pub lambda: f64,
    /// How many batches of the stream `safe` the Fisher information is taken over; all of them once if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fisher_batches: Option<usize>,
    /// Whose gradient is squared: each row's or each batch's.
    pub fisher: Fisher,
    /// Whether the Fisher information is the mean or the sum of the squares.
    pub reduction: Reduction,
    /// Whether the penalty is λ/2 (half) or λ (full) times Σ F (w − w₀)².
    pub penalty: Penalty,
    /// Whether the last Fisher gradient is added to the gradient of the first step.
    pub stale_gradient: bool,
    #[serde(skip)]
    kept: Kept,
}

impl Default for Ewc {
    fn default() -> Self {
        Self {
            lambda: 1.6e11,
            fisher_batches: None,
            fisher: Fisher::Sample,
            reduction: Reduction::Mean,
            penalty: Penalty::Half,
            stale_gradient: false,
            kept: Kept::default(),
        }
    }
}

impl Ewc {
    fn check(&self) -> Result<()> {
        check_strength("lambda", self.lambda)?;
        if self.fisher_batches == Some(0) {
            return Err(Error::config("`fisher_batches` must be at least 1, found `0`")
                .key("fisher_batches")
                .help("leave it out for one pass over all safe rows"));
        }
        Ok(())
    }

    /// The Fisher information by parameter, and the last gradient that went into it.
    fn fisher(&self, cx: &mut StageCx) -> Result<(Grads, Grads)> {
        let (clock, device) = (cx.clock, cx.weights.device().clone());
        let batches = self.fisher_batches.unwrap_or(cx.streams.get("safe")?.batches_per_epoch());
        let (mut squares, mut count, mut last) = (Grads::default(), 0, Grads::default());
        for _ in 0..batches {
            for part in self.fisher.parts(cx.streams.next("safe", &device)?)? {
                // Each pass has a dropout mask of its own.
                cx.clock.micro = count;
                last = cx.step().backward(&part, Sites::none())?.grads;
                squares = squares.add_scaled(1., &last.map(|gradient| Ok(gradient.sqr()?))?)?;
                count += 1;
            }
        }
        cx.clock = clock;
        Ok((squares.scale(self.reduction.share(count))?, last))
    }

    /// The factor before `½ Σ F (w − w₀)²`.
    fn strength(&self) -> f64 {
        match self.penalty {
            Penalty::Half => self.lambda,
            Penalty::Full => 2. * self.lambda,
        }
    }
}

impl AlignmentDefense for Ewc {
    fn begin(&mut self, cx: &mut StageCx) -> Result<()> {
        if self.lambda == 0. {
            return Ok(());
        }
        let (fisher, last) = self.fisher(cx)?;
        self.kept.keep("fisher", fisher);
        self.kept.keep("anchor", cx.weights.snapshot()?);
        if self.stale_gradient {
            self.kept.keep("stale", last);
        }
        Ok(())
    }

    fn step(&mut self, cx: &mut StepCx, batch: &Batch) -> Result<Update> {
        let plain = cx.backward(batch, Sites::none())?;
        if self.lambda == 0. {
            return Ok(plain.into());
        }
        let (penalty, force) = pull(cx.weights(), self.kept.get("anchor")?, Some(self.kept.get("fisher")?))?;
        let penalty = penalty.affine(self.strength(), 0.)?;
        let mut grads = plain.grads.add_scaled(self.strength(), &force)?;
        if let Some(stale) = self.kept.take("stale") {
            // Of this batch's gradients the update takes a share, of the stale ones the whole.
            grads = grads.add_scaled(cx.clock().micros as f64, &stale)?;
        }
        Ok(Update::new(grads, plain.loss.plus(&penalty)?).with("task_loss", plain.loss).with("penalty", penalty))
    }

    fn loss_is_objective(&self) -> bool {
        !self.stale_gradient
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
    use titer_core::Weights;
    use titer_core::data::Stream;
    use titer_core::defense::{Clock, Streams};
    use titer_core::testing::dot;

    use super::*;
    use crate::testing::{
        begin, check_must_begin, check_neutral, check_passes, check_published, check_refused, check_slopes, context,
        data, defense, gap, is_plain, moved, three_rows, tiny, update,
    };

    #[test]
    fn gradients_are_the_slopes_of_the_declared_objective() -> Result<()> {
        let forms = [
            json!({ "lambda": 30.0 }),
            json!({ "lambda": 30.0, "fisher": "batch", "reduction": "sum", "penalty": "full" }),
        ];
        check_slopes("ewc", &forms)
    }

    /// The mean over rows of the squared gradient, and the published sum over batches.
    #[test]
    fn it_has_the_fisher_information_of_rows() -> Result<()> {
        let (model, mut weights) = tiny(DType::F64, 0.)?;
        let gradient = |weights: &Weights, batch: &Batch| -> Result<Grads> {
            Ok(context(model.as_ref(), weights, &mut Streams::default()).backward(batch, Sites::none())?.grads)
        };
        let safe = [three_rows(6)?, three_rows(7)?];
        let rows = safe.iter().map(Batch::rows).collect::<Result<Vec<_>>>()?.concat();
        assert_eq!(rows.len(), 6);
        let squares = |parts: &[Batch], share: f64| -> Result<Grads> {
            parts.iter().try_fold(Grads::default(), |sum, part| {
                sum.add_scaled(share, &gradient(&weights, part)?.map(|g| Ok(g.sqr()?))?)
            })
        };
        let published = json!({ "lambda": 8.0, "fisher": "batch", "reduction": "sum" });
        let one = json!({ "lambda": 8.0, "fisher": "batch", "fisher_batches": 1 });
        let expected = [
            (json!({ "lambda": 8.0 }), squares(&rows, 1. / 6.)?),
            (published, squares(&safe, 1.)?),
            (one, squares(&safe[..1], 1.)?),
        ];
        for (given, expected) in expected {
            let (user, mut streams) = data()?;
            let mut ewc = defense("ewc", given.clone())?;
            begin(ewc.as_mut(), model.as_ref(), &mut weights, &mut streams)?;
            let start = weights.snapshot()?;
            let state = ewc.state();
            let fisher: Grads = state
                .tensors
                .iter()
                .filter_map(|(name, tensor)| Some((name.strip_prefix("fisher.")?.to_owned(), tensor.clone())))
                .collect();
            assert!(gap(&fisher, &expected)? < 1e-12, "{given}");
            moved(&weights)?;
            let step = update(ewc.as_mut(), model.as_ref(), &weights, &mut streams, &user, Clock::at(2, 10))?;
            let drift = weights.snapshot()?.add_scaled(-1., &start)?.map(|d| Ok(d.sqr()?))?;
            let penalty = 4. * dot(&fisher, &drift)?;
            let ours = step.scalars["penalty"].value()?;
            assert!((ours - penalty).abs() < 1e-12 * (1. + penalty) && penalty > 1e-4, "{ours} and {penalty}");
            weights.set(&start)?;
        }
        Ok(())
    }

    /// Each pass of the Fisher information has a dropout mask of its own.
    #[test]
    fn it_draws_a_dropout_mask_for_each_pass() -> Result<()> {
        let (model, mut weights) = tiny(DType::F32, 0.5)?;
        let mut fisher = |batches: usize| -> Result<Grads> {
            let mut streams = Streams::default();
            streams.insert("safe", Stream::of_batches(vec![three_rows(6)?])?);
            let given = json!({ "fisher": "batch", "fisher_batches": batches });
            let mut ewc = defense("ewc", given)?;
            begin(ewc.as_mut(), model.as_ref(), &mut weights, &mut streams)?;
            let tensors = ewc.state().tensors.into_iter();
            Ok(tensors.filter(|(name, _)| name.starts_with("fisher.")).collect())
        };
        let (once, twice) = (fisher(1)?, fisher(2)?);
        assert!(gap(&once, &twice)? > 1e-6, "the mean over one pass and over two are the same");
        Ok(())
    }

    /// The published trainer's uncleared gradient reaches the first update, also over a checkpoint and once under
    /// accumulation, and no other.
    #[test]
    fn the_stale_gradient_is_in_the_first_update_only() -> Result<()> {
        let (model, mut weights) = tiny(DType::F64, 0.)?;
        let (user, _) = data()?;
        let mut first_steps = |stale: bool, micros: usize| -> Result<(Grads, Grads)> {
            let (_, mut streams) = data()?;
            let given = json!({ "fisher": "batch", "lambda": 2.0, "stale_gradient": stale });
            let mut begun = defense("ewc", given.clone())?;
            begin(begun.as_mut(), model.as_ref(), &mut weights, &mut streams)?;
            let mut ewc = defense("ewc", given)?;
            ewc.load_state(begun.state())?;
            let mut step = |step: usize| -> Result<Grads> {
                (0..micros).try_fold(Grads::default(), |sum, micro| {
                    let clock = Clock { step, total: 10, micro, micros };
                    let update = update(ewc.as_mut(), model.as_ref(), &weights, &mut streams, &user, clock)?;
                    sum.add_scaled(1. / micros as f64, &update.grads)
                })
            };
            Ok((step(0)?, step(1)?))
        };
        for micros in [1, 3] {
            let ((clean, later), (stale, later_stale)) = (first_steps(false, micros)?, first_steps(true, micros)?);
            let (model, weights) = tiny(DType::F64, 0.)?;
            let mut none = Streams::default();
            let last = context(model.as_ref(), &weights, &mut none).backward(&three_rows(7)?, Sites::none())?.grads;
            assert!(gap(&stale, &clean.add_scaled(1., &last)?)? < 1e-12, "the first step of {micros}");
            assert!(gap(&later, &later_stale)? == 0., "the second step of {micros}");
        }
        Ok(())
    }

    #[test]
    fn declared_passes_are_those_made() -> Result<()> {
        check_passes("ewc", &[json!({})])
    }

    #[test]
    fn neutral_settings_are_plain_fine_tuning() -> Result<()> {
        check_neutral("ewc")?;
        assert!(!is_plain("ewc", json!({}))?);
        Ok(())
    }

    #[test]
    fn settings_out_of_range_are_refused() {
        check_refused(
            "ewc",
            &[(json!({ "lambda": -1.0 }), "lambda"), (json!({ "fisher_batches": 0 }), "fisher_batches")],
        );
    }

    #[test]
    fn the_published_form_has_its_quirks() -> Result<()> {
        check_published("ewc")
    }

    #[test]
    fn a_stage_that_was_not_begun_is_an_error() -> Result<()> {
        check_must_begin("ewc")
    }
}
