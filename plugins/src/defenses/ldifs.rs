//! LDIFS: the features of the user's rows must stay where they were before fine-tuning.
//!
//! Mukhoti, Gal, Torr, Dokania: Fine-tuning can cripple your foundation model; preserving features may be the solution,
//! TMLR 2024, arXiv:2308.13320; as a defense in Huang et al., Booster, ICLR 2025, arXiv:2409.01586.
//!
//! `L = f(w) + ρ/2 Σ_l mean_t ‖m_l(t; w) − m_l(t; w₀)‖²`, with `m_l` the output of the MLP of block `l` at token `t`
//! and `w₀` the weights at the start of the stage. The paper's distance is a mean over samples of the squared norm of
//! the concatenated features; here a sample is a token.

use std::collections::BTreeMap;

use candle_core::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use titer_core::data::{Batch, Tokens};
use titer_core::defense::Clock;
use titer_core::defense::toolkit::{Kept, Reduction, check_strength, wide};
use titer_core::model::sites_of_kind;
use titer_core::tensor::ops;
use titer_core::{
    AlignmentDefense, DefenseEntry, Error, Limits, Model, Privilege, Quirk, Result, Scalar, SettingsType, Sites, Stage,
    StageCx, State, StepCx, Update, inventory, no_conflict,
};

inventory::submit! {
    DefenseEntry {
        name: "ldifs",
        summary: "keeps the MLPs' outputs on the user's rows close to those of the model before fine-tuning",
        paper: "Mukhoti, Gal, Torr, Dokania: Fine-tuning can cripple your foundation model; preserving features may be \
                the solution, TMLR 2024, arXiv:2308.13320; as a defense in Huang et al., Booster, ICLR 2025, \
                arXiv:2409.01586",
        formula: "L = f(w) + ρ/2 Σ_l mean_t ‖m_l(t; w) − m_l(t; w_0)‖² over MLP outputs m_l at tokens t",
        stages: &[Stage::FineTune],
        streams: |_| &[],
        sites: &["mlp_out"],
        passes: |settings| if settings["rho"] == 0. { 1. } else { 2. },
        privilege: Privilege { harmful_answers: false, needs: "the aligned model, kept in memory while the user fine-tunes" },
        notes: "Both passes of a step share one dropout mask. It observes activations, so it does not go with gradient \
                checkpointing.",
        quirks: &[
            Quirk {
                setting: "gate",
                published: || json!(0.1),
                what: "drops a block's term where it is 0.1 or more, that is where the drift is largest",
            },
            Quirk {
                setting: "positions",
                published: || json!("all"),
                what: "counts padding",
            },
            Quirk {
                setting: "reduction",
                published: || json!("sum"),
                what: "sums over tokens, so that the penalty grows with the size of the batch",
            },
            Quirk {
                setting: "inner_clip",
                published: || json!(5.0),
                what: "clips the gradient's norm to 5 before the trainer's own clipping",
            },
            Quirk {
                setting: "blocks",
                published: || json!("named_mlp"),
                what: "looks for modules called `mlp`; on an architecture without (OPT) it is plain fine-tuning",
            },
            Quirk {
                setting: "rho",
                published: || json!(1e-4),
                what: "has the strength that goes with its sum over tokens",
            },
        ],
        conflicts: no_conflict,
        limits,
        settings: SettingsType::of::<Ldifs>(),
        neutral: Some(|| json!({ "rho": 0.0 })),
        version: 2,
        build: |settings| {
            let ldifs: Ldifs = settings.parse()?;
            ldifs.check()?;
            Ok(Box::new(ldifs))
        },
    }
}

fn limits(settings: &Value) -> Limits {
    let published = settings["positions"] == "all" || settings["reduction"] == "sum";
    let published = published || ["gate", "inner_clip"].iter().any(|key| !settings[key].is_null());
    Limits {
        checkpointing: (settings["rho"] != 0.).then_some("its loss reads activations inside the blocks"),
        accumulation: published.then_some("the published sum, gate and clipping are those of each micro batch"),
    }
}

/// Which positions count.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Positions {
    /// Those of real tokens.
    #[default]
    Real,
    /// Padding too.
    All,
}

/// In which blocks the features are held.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Blocks {
    /// In all.
    #[default]
    All,
    /// In those whose MLP is a module called `model.layers.{i}.mlp`, as in Llama.
    NamedMlp,
}

/// The settings, and the defense.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Ldifs {
    /// ρ: the weight of the squared distance. The default is the published 1e-4, for a sum over a batch of about 1000
    /// tokens, brought to a mean.
    pub rho: f64,
    /// A block's term counts only while it is below this; always if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gate: Option<f64>,
    /// Which positions count: those of real tokens, or padding too.
    pub positions: Positions,
    /// Whether squared distances are averaged or summed over positions.
    pub reduction: Reduction,
    /// The L2 norm that the gradient is clipped to before the loop's own clipping; not at all if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub inner_clip: Option<f64>,
    /// In which blocks the features are held: in all, or where the MLP is a module called `mlp`.
    pub blocks: Blocks,
    #[serde(skip)]
    kept: Kept,
}

impl Default for Ldifs {
    fn default() -> Self {
        Self {
            rho: 0.1,
            gate: None,
            positions: Positions::Real,
            reduction: Reduction::Mean,
            inner_clip: None,
            blocks: Blocks::All,
            kept: Kept::default(),
        }
    }
}

/// Activations `[tokens, width]` by site.
type Features = BTreeMap<String, Tensor>;

impl Ldifs {
    fn check(&self) -> Result<()> {
        check_strength("rho", self.rho)?;
        for (key, limit) in [("gate", self.gate), ("inner_clip", self.inner_clip)] {
            if limit.is_some_and(|limit| limit.is_nan() || limit <= 0.) {
                return Err(Error::config(format!("`{key}` must be above 0, found `{}`", limit.unwrap_or_default()))
                    .key(key)
                    .help("leave it out for none"));
            }
        }
        Ok(())
    }

    /// Where the features are read.
    fn sites(&self, model: &dyn Model) -> Result<Vec<String>> {
        let named = || model.params().iter().any(|param| param.name.starts_with("model.layers.0.mlp."));
        if self.blocks == Blocks::NamedMlp && !named() {
            return Ok(Vec::new());
        }
        sites_of_kind(model, "mlp_out")
    }

    /// `ρ/2 Σ_l ‖now_l − before_l‖²`, a tensor without dimensions. `weight` is that of a mean over tokens.
    fn drift(&self, before: &Features, now: &Features, tokens: &Tokens, weight: f64) -> Result<Tensor> {
        let terms = before.iter().map(|(site, before)| self.term(before, &now[site], tokens));
        let sum = terms.reduce(|sum, term| Ok((sum? + term?)?));
        let sum = sum.unwrap_or_else(|| Err(Error::run("there are no features to hold")))?;
        match (self.reduction, self.positions) {
            (Reduction::Mean, Positions::Real) => Ok((sum * weight)?),
            _ => Ok(sum),
        }
    }

    /// The term of one block.
    fn term(&self, before: &Tensor, now: &Tensor, tokens: &Tokens) -> Result<Tensor> {
        let moved = (wide(now)? - wide(before)?)?;
        let factor = 0.5 * self.rho * self.reduction.share(tokens.count());
        let term = (ops::sum_all(&moved.sqr()?)? * factor)?;
        match self.gate {
            None => Ok(term),
            // A selection, not a product: it also drops a term that is not a number.
            Some(gate) => Ok(term.lt(gate)?.where_cond(&term, &term.zeros_like()?)?),
        }
    }

    /// `update` such that the mean over the micro batches so far has at most the norm of the inner clipping, which the
    /// published trainer applies to what is accumulated, after every micro batch.
    fn clipped(&mut self, update: Update, clock: Clock) -> Result<Update> {
        let Some(limit) = self.inner_clip else { return Ok(update) };
        let (before, micros) = (self.kept.take("accumulated").unwrap_or_default(), clock.micros as f64);
        let sum = before.clone().add_scaled(1. / micros, &update.grads)?;
        let factor = sum.clip_factor(limit)?;
        let sum = sum.map(|gradient| factor.times(gradient))?;
        let grads = sum.clone().add_scaled(-1., &before)?.scale(micros)?;
        if !clock.last_micro() {
            self.kept.keep("accumulated", sum);
        }
        Ok(Update { grads, ..update })
    }
}

impl AlignmentDefense for Ldifs {
    fn begin(&mut self, cx: &mut StageCx) -> Result<()> {
        if self.rho > 0. {
            self.kept.keep("reference", cx.weights.snapshot()?);
        }
        Ok(())
    }

    fn step(&mut self, cx: &mut StepCx, batch: &Batch) -> Result<Update> {
        let sites = self.sites(cx.model())?;
        if self.rho == 0. || sites.is_empty() {
            return self.clipped(cx.backward(batch, Sites::none())?.into(), cx.clock());
        }
        let padded = if self.positions == Positions::All { Some(batch.padded(None)?) } else { None };
        let batch = padded.as_ref().unwrap_or(batch);
        let reference = cx.weights().at(self.kept.get("reference")?);
        let observed = || Sites::none().observe(sites.iter().cloned());
        let (_, before) = cx.hidden_with(&reference, &batch.tokens, observed())?;
        let (hidden, now) = cx.hidden(&batch.tokens, observed())?;
        let drift = self.drift(&before, &now, &batch.tokens, cx.token_weight())?;
        let task = cx.cross_entropy(&hidden, batch)?.to_dtype(drift.dtype())?;
        let loss = (&task + &drift)?;
        let update = Update::new(cx.backward_loss(&loss)?, Scalar::of(&loss)?);
        let update = update.with("task_loss", Scalar::of(&task)?).with("drift", Scalar::of(&drift)?);
        self.clipped(update, cx.clock())
    }

    fn loss_is_objective(&self) -> bool {
        self.inner_clip.is_none()
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
    use titer_core::defense::Streams;
    use titer_core::testing::values;
    use titer_core::{Grads, Weights};

    use super::*;
    use crate::testing::{
        all_tiny, begin, check_must_begin, check_neutral, check_passes, check_published, check_refused, check_slopes,
        context, data, defense, gap, is_plain, moved, plain, same, three_rows, tiny, update,
    };

    #[test]
    fn gradients_are_the_slopes_of_the_declared_objective() -> Result<()> {
        let forms = [json!({ "rho": 0.5 }), json!({ "rho": 0.5, "positions": "all", "reduction": "sum", "gate": 1e9 })];
        check_slopes("ldifs", &forms)
    }

    #[test]
    fn it_holds_the_outputs_of_every_mlp() -> Result<()> {
        for (model, mut weights) in all_tiny(DType::F64, 0.)? {
            let start = weights.snapshot()?;
            let (user, _) = data()?;
            let padded = user.padded(None)?;
            let features = |weights: &Weights| -> Result<BTreeMap<String, Tensor>> {
                let sites = Sites::none().observe(sites_of_kind(model.as_ref(), "mlp_out")?);
                Ok(context(model.as_ref(), weights, &mut Streams::default()).hidden(&padded.tokens, sites)?.1)
            };
            let before = features(&weights)?;
            moved(&weights)?;
            let now = features(&weights)?;
            assert_eq!(before.len(), 2);
            let rows = padded.tokens.lengths.iter().zip(&padded.tokens.real);
            let real: Vec<bool> = rows.flat_map(|(&length, &real)| (0..length).map(move |at| at < real)).collect();
            // ½ ‖now − before‖² of each block, over real positions or all.
            let terms = |all: bool| -> Result<Vec<f64>> {
                before
                    .iter()
                    .map(|(site, before)| {
                        let moved = (&now[site] - before)?.sqr()?.sum(1)?;
                        let each = values(&moved)?.into_iter().zip(&real);
                        Ok(each.filter(|(_, real)| all || **real).map(|(square, _)| 0.5 * square).sum())
                    })
                    .collect()
            };
            let (of_real, of_all) = (terms(false)?, terms(true)?);
            let count = real.iter().filter(|real| **real).count() as f64;
            let between = 0.3 * f64::midpoint(of_all[0], of_all[1]);
            let gated: f64 = of_all.iter().map(|term| 0.3 * term).filter(|term| *term < between).sum();
            let forms = [
                (json!({ "rho": 0.3 }), 0.3 * of_real.iter().sum::<f64>() / count),
                (json!({ "rho": 0.3, "reduction": "sum" }), 0.3 * of_real.iter().sum::<f64>()),
                (json!({ "rho": 0.3, "reduction": "sum", "positions": "all" }), 0.3 * of_all.iter().sum::<f64>()),
                (json!({ "rho": 0.3, "reduction": "sum", "positions": "all", "gate": between }), gated),
            ];
            let clock = Clock::at(1, 10);
            for (given, expected) in forms {
                weights.set(&start)?;
                let mut streams = Streams::default();
                let mut ldifs = defense("ldifs", given.clone())?;
                begin(ldifs.as_mut(), model.as_ref(), &mut weights, &mut streams)?;
                moved(&weights)?;
                let step = update(ldifs.as_mut(), model.as_ref(), &weights, &mut streams, &user, clock)?;
                let ours = step.scalars["drift"].value()?;
                assert!(
                    (ours - expected).abs() < 1e-10 * (1. + expected) && expected > 0.,
                    "{given}: {ours}, {expected}"
                );
            }
            let mut published = defense("ldifs", json!({ "rho": 0.3, "blocks": "named_mlp", "inner_clip": 1e9 }))?;
            begin(published.as_mut(), model.as_ref(), &mut weights, &mut Streams::default())?;
            moved(&weights)?;
            let none = &mut Streams::default();
            let step = update(published.as_mut(), model.as_ref(), &weights, none, &user, clock)?;
            let is_opt = model.config()["model_type"] == "opt";
            assert_eq!(same(&step, &plain(model.as_ref(), &weights, &user, clock)?)?, is_opt, "blocks = named_mlp");
        }
        Ok(())
    }

    /// The inner clipping acts on what is accumulated, after every micro batch.
    #[test]
    fn the_inner_clipping_bounds_the_accumulated_gradient() -> Result<()> {
        let (model, weights) = tiny(DType::F64, 0.)?;
        let limit = 0.05;
        let mut ldifs = defense("ldifs", json!({ "rho": 0.0, "inner_clip": limit }))?;
        for step in 0..2 {
            let (mut ours, mut expected) = (Grads::default(), Grads::default());
            for micro in 0..2 {
                let (clock, batch) = (Clock { step, total: 10, micro, micros: 2 }, three_rows(5 + micro as u64)?);
                let none = &mut Streams::default();
                let update = update(ldifs.as_mut(), model.as_ref(), &weights, none, &batch, clock)?;
                ours = ours.add_scaled(0.5, &update.grads)?;
                expected = expected.add_scaled(0.5, &plain(model.as_ref(), &weights, &batch, clock)?.grads)?;
                let norm = expected.norm()?.value()?;
                assert!(norm > limit, "nothing to clip");
                expected = expected.scale(limit / (norm + 1e-6))?;
            }
            assert!(gap(&ours, &expected)? < 1e-14, "step {step}");
        }
        Ok(())
    }

    #[test]
    fn declared_passes_are_those_made() -> Result<()> {
        check_passes("ldifs", &[json!({}), json!({ "rho": 0.0 })])
    }

    #[test]
    fn neutral_settings_are_plain_fine_tuning() -> Result<()> {
        check_neutral("ldifs")?;
        assert!(!is_plain("ldifs", json!({}))?);
        Ok(())
    }

    #[test]
    fn settings_out_of_range_are_refused() {
        check_refused(
            "ldifs",
            &[
                (json!({ "rho": -1.0 }), "rho"),
                (json!({ "gate": 0.0 }), "gate"),
                (json!({ "inner_clip": -5.0 }), "inner_clip"),
            ],
        );
    }

    #[test]
    fn the_published_form_has_its_quirks() -> Result<()> {
        check_published("ldifs")
    }

    #[test]
    fn a_stage_that_was_not_begun_is_an_error() -> Result<()> {
        check_must_begin("ldifs")
    }
}
