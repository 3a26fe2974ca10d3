//! Lisa: fine-tuning that takes turns between safe rows and the user's, each turn tied to where the other ended.
//!
//! Huang, Hu, Ilhan, Tekin, Liu: Lazy Safety Alignment for Large Language Models against Harmful Fine-tuning, NeurIPS
//! 2024, arXiv:2405.18641.
//!
//! `K_a` updates `g = ∇ h(w) + ρ (w − w_f)` on safe rows, then `K_f` updates `g = ∇ f(w) + ρ (w − w_a)` on the user's,
//! and so on; `w_a` and `w_f` are the weights at the end of the last turn of alignment and of fine-tuning. The safe
//! updates take the place of the user's: the user batch that comes in such a step is not used.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use titer_core::data::Batch;
use titer_core::defense::Clock;
use titer_core::defense::toolkit::{Kept, check_strength, pull};
use titer_core::{
    AlignmentDefense, DefenseEntry, Error, Limits, Privilege, Quirk, Result, SettingsType, Sites, Stage, StageCx,
    State, StepCx, Update, Weights, inventory, no_conflict,
};

inventory::submit! {
    DefenseEntry {
        name: "lisa",
        summary: "trains in turns on safe rows and on the user's, each turn close to the weights at the end of the other",
        paper: "Huang, Hu, Ilhan, Tekin, Liu: Lazy Safety Alignment for Large Language Models against Harmful \
                Fine-tuning, NeurIPS 2024, arXiv:2405.18641",
        formula: "K_a × g = ∇ h(w; safe) + ρ (w − w_f),   then K_f × g = ∇ f(w) + ρ (w − w_a),   and so on",
        stages: &[Stage::FineTune],
        streams: |_| &["safe"],
        sites: &[],
        passes: |_| 1.,
        privilege: Privilege { harmful_answers: false, needs: "safe answers while the user fine-tunes" },
        notes: "The safe updates replace the user's, so the user's task is trained in K_f of K_a + K_f updates only. The \
                optimiser's moments are shared by the two kinds of turn. No tie in the first tenth of the updates is the \
                published code's; the paper does not mention it (`warmup = 0`). The README of the published code swaps \
                the two anchors.",
        quirks: &[Quirk {
            setting: "count",
            published: || json!("micro_batches"),
            what: "counts micro batches, so that under gradient accumulation a turn can change within an update",
        }],
        conflicts: no_conflict,
        limits,
        settings: SettingsType::of::<Lisa>(),
        neutral: Some(|| json!({ "align_steps": 0, "rho": 0.0 })),
        version: 2,
        build: |settings| {
            let lisa: Lisa = settings.parse()?;
            lisa.check()?;
            Ok(Box::new(lisa))
        },
    }
}

fn limits(settings: &Value) -> Limits {
    let within = settings["count"] == "micro_batches";
    Limits { accumulation: within.then_some("a turn can change within an update"), ..Limits::default() }
}

/// What the lengths of turns are counted in.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Count {
    /// Updates.
    #[default]
    Updates,
    /// Micro batches.
    MicroBatches,
}

impl Count {
    /// How many are done, and the share of all that this is.
    fn done(self, clock: Clock) -> (usize, f64) {
        let (micro, micros) = match self {
            Self::Updates => (0, 1),
            Self::MicroBatches => (clock.micro, clock.micros),
        };
        let done = clock.step * micros + micro;
        (done, done as f64 / (clock.total as f64 * micros as f64))
    }
}

/// Whose turn it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum LisaTurn {
    Align,
    FineTune,
}

impl LisaTurn {
    /// The role of the weights at the end of the last such turn.
    fn anchor(self) -> &'static str {
        match self {
            Self::Align => "aligned",
            Self::FineTune => "fine_tuned",
        }
    }

    fn other(self) -> Self {
        match self {
            Self::Align => Self::FineTune,
            Self::FineTune => Self::Align,
        }
    }
}

/// The settings, and the defense.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Lisa {
    /// ρ: how strong the pull to the weights at the end of the other turn is.
    pub rho: f64,
    /// `K_a`: updates on safe rows per turn; 0 for none at all.
    pub align_steps: usize,
    /// `K_f`: updates on the user's rows per turn; 0 for none at all.
    pub fine_tune_steps: usize,
    /// The share of all updates before that pull begins, in [0, 1].
    pub warmup: f64,
    /// What the lengths of turns and warm-up are counted in.
    pub count: Count,
    #[serde(skip)]
    kept: Kept,
}

impl Default for Lisa {
    fn default() -> Self {
        let (rho, align_steps, fine_tune_steps) = (1., 100, 900);
        Self { rho, align_steps, fine_tune_steps, warmup: 0.1, count: Count::Updates, kept: Kept::default() }
    }
}

impl Lisa {
    fn check(&self) -> Result<()> {
        check_strength("rho", self.rho)?;
        if self.align_steps == 0 && self.fine_tune_steps == 0 {
            return Err(Error::config("`align_steps` and `fine_tune_steps` are both `0`: nobody has a turn")
                .key("align_steps")
                .help("100 and 900 are customary"));
        }
        if !(0. ..=1.).contains(&self.warmup) {
            return Err(Error::config(format!("`warmup` must lie in [0, 1], found `{}`", self.warmup))
                .key("warmup")
                .help("0.1 leaves out the tie in the first tenth of the updates"));
        }
        Ok(())
    }

    /// Whose turn it is after `done` steps.
    fn turn(&self, done: usize) -> LisaTurn {
        if done % (self.align_steps + self.fine_tune_steps) < self.align_steps {
            LisaTurn::Align
        } else {
            LisaTurn::FineTune
        }
    }

    /// Where one turn has ended and the other begins, keeps the weights as the ended turn's anchor.
    fn change_turns(&mut self, done: usize, weights: &Weights) -> Result<()> {
        let now = self.turn(done);
        if done > 0 && self.turn(done - 1) != now {
            self.kept.keep(now.other().anchor(), weights.snapshot()?);
        }
        Ok(())
    }
}

impl AlignmentDefense for Lisa {
    fn begin(&mut self, cx: &mut StageCx) -> Result<()> {
        for turn in [LisaTurn::Align, LisaTurn::FineTune] {
            self.kept.keep(turn.anchor(), cx.weights.snapshot()?);
        }
        Ok(())
    }

    fn step(&mut self, cx: &mut StepCx, batch: &Batch) -> Result<Update> {
        let (done, share) = self.count.done(cx.clock());
        self.change_turns(done, cx.weights())?;
        let turn = self.turn(done);
        let update = match turn {
            LisaTurn::Align => {
                let (safe, weight) = cx.next_weighed("safe")?;
                Update::from(cx.backward(&safe, Sites::none())?).weighed(weight)?
            }
            LisaTurn::FineTune => cx.backward(batch, Sites::none())?.into(),
        };
        if self.rho == 0. || share <= self.warmup {
            return Ok(update);
        }
        let (drift, force) = pull(cx.weights(), self.kept.get(turn.other().anchor())?, None)?;
        let penalty = drift.affine(self.rho, 0.)?;
        let grads = update.grads.add_scaled(self.rho, &force)?;
        Ok(Update::new(grads, update.loss.plus(&penalty)?).with("penalty", penalty))
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
    use titer_core::data::Stream;
    use titer_core::defense::Streams;
    use titer_core::testing::dot;

    use super::*;
    use crate::testing::{
        begin, check_neutral, check_passes, check_published, check_refused, check_slopes, data, defense, gap, is_plain,
        plain, same, three_rows, tiny, update,
    };

    #[test]
    fn gradients_are_the_slopes_of_the_declared_objective() -> Result<()> {
        let forms = [json!({ "rho": 0.5, "align_steps": 2, "fine_tune_steps": 3, "warmup": 0.0 })];
        check_slopes("lisa", &forms)
    }

    /// Two turns of two and three steps: whose batch, tied to what, and the same after a resume at any step.
    #[test]
    fn it_takes_turns_and_ties_each_to_the_end_of_the_other() -> Result<()> {
        let (model, mut weights) = tiny(DType::F64, 0.)?;
        let given = json!({ "rho": 0.5, "align_steps": 2, "fine_tune_steps": 3, "warmup": 0.2 });
        let (user, mut streams) = data()?;
        let mut lisa = defense("lisa", given.clone())?;
        begin(lisa.as_mut(), model.as_ref(), &mut weights, &mut streams)?;
        let start = weights.snapshot()?;
        let (mut aligned, mut fine_tuned, mut drawn) = (start.clone(), start, 0);
        for step in 0..12 {
            let here = weights.snapshot()?;
            match step {
                2 | 7 => aligned = here.clone(),
                5 | 10 => fine_tuned = here.clone(),
                _ => {}
            }
            let safe = [0, 1, 5, 6, 10, 11].contains(&step);
            let clock = Clock::at(step, 12);
            let used = if safe { three_rows(6 + drawn % 2)? } else { user.clone() };
            let expected = plain(model.as_ref(), &weights, &used, clock)?;
            let drift = here.add_scaled(-1., if safe { &fine_tuned } else { &aligned })?;
            // 0.2 · 12 = 2.4: the tie holds from the step after the second on.
            let rho = if step > 2 { 0.5 } else { 0. };
            let mut again = defense("lisa", given.clone())?;
            again.load_state(lisa.state())?;
            let ours = update(lisa.as_mut(), model.as_ref(), &weights, &mut streams, &user, clock)?;
            drawn += u64::from(safe);
            assert_eq!(streams.drawn()["safe"] as u64, drawn, "step {step}");
            let loss = expected.loss.value()? + rho / 2. * dot(&drift, &drift)?;
            assert!(gap(&ours.grads, &expected.grads.add_scaled(rho, &drift)?)? < 1e-14, "step {step}");
            assert!((ours.loss.value()? - loss).abs() < 1e-12, "step {step}");
            let mut replayed = Streams::default();
            replayed.insert("safe", Stream::of_batches(vec![used])?);
            let resumed = update(again.as_mut(), model.as_ref(), &weights, &mut replayed, &user, clock)?;
            assert!(same(&ours, &resumed)?, "a resume before step {step}");
            weights.set(&weights.snapshot()?.add_scaled(-0.1, &ours.grads)?)?;
        }
        Ok(())
    }

    /// A turn is counted in updates; the published trainer counts micro batches.
    #[test]
    fn a_turn_counts_updates_or_micro_batches() -> Result<()> {
        let (model, mut weights) = tiny(DType::F64, 0.)?;
        for (count, expected) in [("updates", [2, 2, 4]), ("micro_batches", [1, 2, 3])] {
            let (user, mut streams) = data()?;
            let mut lisa = defense("lisa", json!({ "align_steps": 1, "fine_tune_steps": 1, "count": count }))?;
            begin(lisa.as_mut(), model.as_ref(), &mut weights, &mut streams)?;
            for (step, expected) in expected.into_iter().enumerate() {
                for micro in 0..2 {
                    let clock = Clock { step, total: 10, micro, micros: 2 };
                    update(lisa.as_mut(), model.as_ref(), &weights, &mut streams, &user, clock)?;
                }
                assert_eq!(streams.drawn()["safe"], expected, "{count}, step {step}");
            }
        }
        Ok(())
    }

    #[test]
    fn declared_passes_are_those_made() -> Result<()> {
        check_passes("lisa", &[json!({})])
    }

    #[test]
    fn neutral_settings_are_plain_fine_tuning() -> Result<()> {
        check_neutral("lisa")?;
        assert!(!is_plain("lisa", json!({}))?);
        Ok(())
    }

    #[test]
    fn settings_out_of_range_are_refused() {
        check_refused(
            "lisa",
            &[
                (json!({ "rho": -1.0 }), "rho"),
                (json!({ "align_steps": 0, "fine_tune_steps": 0 }), "align_steps"),
                (json!({ "warmup": 1.5 }), "warmup"),
            ],
        );
    }

    #[test]
    fn the_published_form_has_its_quirks() -> Result<()> {
        check_published("lisa")
    }
}
