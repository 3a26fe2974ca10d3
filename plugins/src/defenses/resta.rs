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

use super::alignment_update::{AlignmentUpdates, matrix, needs_alignment, wide};

inventory::submit! {
    DefenseEntry {
        name: "resta",
        summary: "after fine-tuning, adds what the alignment changed to the weights once more",
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
            var.set(&(wide(&before)? + kept)?.to_dtype(after.dtype())?)?;
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
