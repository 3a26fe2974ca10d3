//! RESTA: safety is added back to the fine-tuned weights as a vector (Bhardwaj, Do, Poria; ACL 2024, arXiv:2402.11746).
//!
//! `W ← W + γ δ` with the safety vector `δ = W_aligned − W_base`. With DARE (Yu et al., ICML 2024), each weight of the
//! user's update is dropped with probability `p` before, and the others are divided by `1 − p`.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;
use titer_core::defense::toolkit::check_strength;
use titer_core::rng::dropout_mask;
use titer_core::{
    AlignmentDefense, DefenseEntry, Error, Privilege, Result, SettingsType, Stage, StageCx, inventory, no_limits,
};

use super::alignment_update::{AlignmentUpdates, matrix, needs_alignment, placed, wide};

inventory::submit! {
    DefenseEntry {
        name: "resta",
        summary: "after fine-tuning, adds the alignment's change of the weights to them once more",
        paper: "Bhardwaj, Do, Poria: Language Models are Homer Simpson! Safety Re-Alignment of Fine-tuned Language \
                Models through Task Arithmetic, ACL 2024, arXiv:2402.11746",
        formula: "δ = W_aligned − W_base,   W ← W + γ δ",
        stages: &[Stage::Post],
        streams: |_| &[],
        sites: &[],
        passes: |_| 1.,
        privilege: Privilege { harmful_answers: false, needs: "the weights before and after alignment" },
        notes: "The paper takes δ from the aligned model to one that it fine-tunes on harmful rows; here the unaligned \
                model is the base, so no harmful row is needed. The result is stored with the adapter merged.",
        quirks: &[],
        conflicts: |stack| needs_alignment("resta", stack),
        limits: no_limits,
        settings: SettingsType::of::<Resta>(),
        neutral: Some(|| json!({ "gamma": 0.0, "drop": 0.0 })),
        version: 1,
        build: |settings| {
            let resta: Resta = settings.parse()?;
            resta.check()?;
            Ok(Box::new(resta))
        },
    }
}

/// The settings, and the defense.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Resta {
    /// γ: how many times the safety vector is added; 0 or more.
    pub gamma: f64,
    /// p: the probability with which DARE drops each weight of the user's update, in [0, 1); 0 switches DARE off.
    pub drop: f32,
}

impl Default for Resta {
    fn default() -> Self {
        Self { gamma: 0.5, drop: 0. }
    }
}

impl Resta {
    fn check(&self) -> Result<()> {
        check_strength("gamma", self.gamma)?;
        if (0. ..1.).contains(&self.drop) {
            return Ok(());
        }
        Err(Error::config(format!("`drop` must be at least 0 and below 1, found `{}`", self.drop))
            .key("drop")
            .help("0 switches it off"))
    }

    /// DARE: `W ← W_aligned + m ∘ (W − W_aligned) / (1 − p)`, merged.
    fn drop_and_rescale(&self, cx: &mut StageCx) -> Result<()> {
        if cx.weights.precision().check_trainable().is_err() {
            return Err(Error::config(format!(
                "`drop` changes single weights, but they are stored as {}",
                cx.weights.precision()
            ))
            .key("drop")
            .help("use dtype = \"f32\", or leave `drop` out"));
        }
        let aligned = cx.ancestry.aligned()?.merged()?;
        cx.weights.train_full()?;
        for (name, var) in cx.weights.trainable() {
            let (before, after) = (matrix(&aligned, name)?, var.as_detached_tensor());
            let mut generator = cx.seed.named("dare").named(name).generator();
            let mask = dropout_mask(after.dims(), self.drop, &mut generator, after.device())?;
            let kept = ((wide(&after)? - wide(&before)?)? * wide(&mask)?)?;
            var.set(&placed(&(wide(&before)? + kept)?, &after)?)?;
        }
        Ok(())
    }
}

impl AlignmentDefense for Resta {
    fn finish(&mut self, cx: &mut StageCx) -> Result<()> {
        if self.drop > 0. {
            self.drop_and_rescale(cx)?;
        }
        if self.gamma == 0. {
            return Ok(());
        }
        let alignment = AlignmentUpdates::of(cx.ancestry)?;
        cx.weights.merge()?;
        for name in alignment.names() {
            if let Some(safety) = alignment.get(&name)? {
                safety.add_to(cx.weights, &name, self.gamma)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use candle_core::DType;
    use titer_core::testing::values;

    use super::*;
    use crate::testing::{
        TrainedLineage, check_kept_beside_frozen, check_untouched, close, dense, matrices, post, small,
    };

    #[test]
    fn it_adds_the_alignment_once_more() -> Result<()> {
        let model = small()?;
        let model = model.as_ref();
        for lineage in [TrainedLineage::by_adapter(model, DType::F64)?, TrainedLineage::in_full(model)?] {
            for full in [false, true] {
                let start = || if full { lineage.user_in_full() } else { lineage.user() };
                let (mut weights, before) = (start()?, start()?);
                post(("resta", json!({ "gamma": 0.7 })), model, &mut weights, &lineage)?;
                assert!(weights.lora().is_none());
                for name in matrices(model) {
                    let expected = (dense(&before, &name)? + (lineage.update(&name)? * 0.7)?)?;
                    close(&dense(&weights, &name)?, &expected, &name)?;
                }
            }
        }
        Ok(())
    }

    /// DARE keeps the update's mean: each weight is the aligned one, or moved `1 / (1 − p)` times as far.
    #[test]
    fn it_drops_and_rescales_the_users_update() -> Result<()> {
        let model = small()?;
        let lineage = TrainedLineage::by_adapter(model.as_ref(), DType::F64)?;
        let (mut weights, before) = (lineage.user()?, lineage.user()?);
        post(("resta", json!({ "gamma": 0.0, "drop": 0.25 })), model.as_ref(), &mut weights, &lineage)?;
        let (mut dropped, mut all) = (0, 0);
        for name in matrices(model.as_ref()).iter().filter(|name| name.contains("q_proj") || name.contains("down_proj"))
        {
            let aligned = values(&dense(&lineage.aligned, name)?)?;
            let update = values(&(dense(&before, name)? - dense(&lineage.aligned, name)?)?)?;
            for ((after, aligned), update) in values(&dense(&weights, name)?)?.into_iter().zip(aligned).zip(update) {
                let moved = (after - aligned) / update;
                assert!(moved.abs() < 1e-6 || (moved - 1. / 0.75).abs() < 1e-6, "{name}: {moved}");
                dropped += usize::from(moved.abs() < 1e-6);
                all += 1;
            }
        }
        let share = f64::from(dropped as u32) / f64::from(all);
        assert!((share - 0.25).abs() < 0.05, "{share}");
        Ok(())
    }

    #[test]
    fn neutral_settings_leave_the_weights_bit_for_bit() -> Result<()> {
        check_untouched("resta", &json!({ "gamma": 0.0, "drop": 0.0 }))
    }

    #[test]
    fn frozen_bases_keep_what_is_added_beside_them() -> Result<()> {
        check_kept_beside_frozen("resta", json!({ "gamma": 0.5 }))
    }

    #[test]
    fn nothing_is_dropped_from_a_frozen_base() -> Result<()> {
        let model = small()?;
        let lineage = TrainedLineage::by_adapter(model.as_ref(), DType::BF16)?;
        let dropped = post(("resta", json!({ "drop": 0.5 })), model.as_ref(), &mut lineage.user()?, &lineage);
        assert!(dropped.expect_err("bf16 is frozen").to_string().contains("`drop`"));
        Ok(())
    }
}
