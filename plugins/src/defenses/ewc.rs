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
        summary: "holds every parameter at its aligned value, the harder the more the safe answers depend on it",
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
