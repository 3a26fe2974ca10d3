//! `LoX`: low-rank extrapolation of the alignment (Perin, Chen, Chen, Hirata, Wang, Hong; COLM 2025,
//! arXiv:2506.15606).
//!
//! `W ← W + α U_k U_kᵀ ΔW` with `ΔW = W_aligned − W_base` and `U_k` its `k` first left singular vectors: the strongest
//! directions of the alignment are followed further.

use candle_core::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;
use titer_core::defense::toolkit::check_strength;
use titer_core::tensor::ops::Gemm;
use titer_core::weights::factor_names;
use titer_core::{
    AlignmentDefense, Conflict, DefenseEntry, Grads, Privilege, Result, SettingsType, Stack, Stage, StageCx, inventory,
    no_limits,
};

use super::alignment_update::{AlignmentUpdates, MatrixUpdate, needs_alignment, placed, wide};

inventory::submit! {
    DefenseEntry {
        name: "lox",
        summary: "goes further along the strongest directions of the alignment's update, so that fine-tuning undoes less of it",
        paper: "Perin, Chen, Chen, Hirata, Wang, Hong: LoX: Low-Rank Extrapolation Robustifies LLM Safety Against \
                Fine-tuning, COLM 2025, arXiv:2506.15606",
        formula: "ΔW = W_aligned − W_base = U S Vᵀ,   W ← W + α U_k U_kᵀ ΔW",
        stages: &[Stage::Align, Stage::Post],
        streams: |_| &[],
        sites: &[],
        passes: |_| 1.,
        privilege: Privilege { harmful_answers: false, needs: "the weights before and after alignment" },
        notes: "The paper's place is after the alignment and before the user's fine-tuning: as an alignment defense it \
                trains plainly and extrapolates at the end; an adapter stays an adapter. At the stage `post` it adds \
                the same to the fine-tuned weights, which are stored with the adapter merged.",
        quirks: &[],
        conflicts,
        limits: no_limits,
        settings: SettingsType::of::<Lox>(),
        neutral: Some(|| json!({ "alpha": 0.0 })),
        version: 1,
        build: |settings| {
            let lox: Lox = settings.parse()?;
            check_strength("alpha", lox.alpha)?;
            Ok(Box::new(lox))
        },
    }
}

fn conflicts(stack: &Stack) -> Option<Conflict> {
    let twice = stack.align == Some("lox") && stack.post == Some("lox");
    let note = || Conflict::Noted("`lox` extrapolates twice: after the alignment and after the fine-tuning".into());
    needs_alignment("lox", stack).or_else(|| twice.then(note))
}

/// The settings, and the defense.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Lox {
    /// k: the rank of what is added; 0 adds the whole update of the alignment.
    pub rank: usize,
    /// α: how far the alignment is extrapolated; 0 or more.
    pub alpha: f64,
}

impl Default for Lox {
    fn default() -> Self {
        Self { rank: 6, alpha: 1.25 }
    }
}

impl Lox {
    /// `U_k U_kᵀ B` of an update `B A`, shaped as `B`.
    fn strongest(&self, update: &MatrixUpdate) -> Result<Tensor> {
        // A zero update has no directions.
        if self.rank == 0 || update.norm()? == 0. {
            return Ok(update.left().clone());
        }
        let u = update.left_singular_vectors(Some(self.rank))?;
        Gemm::NN.product(&u, &Gemm::TN.product(&u, update.left())?)
    }

    /// `B ← B + α U_k U_kᵀ B` in every adapter.
    fn extrapolate_adapters(&self, cx: &mut StageCx) -> Result<()> {
        let extrapolated = cx.weights.adapters().map(|(module, adapter)| {
            let more = self.strongest(&MatrixUpdate::of_adapter(adapter, 1.)?)?;
            let [_, name] = factor_names(module);
            Ok((name, placed(&(wide(&adapter.b)? + (more * self.alpha)?)?, &adapter.b)?))
        });
        let extrapolated: Grads = extrapolated.collect::<Result<_>>()?;
        cx.weights.set(&extrapolated)
    }

    /// `W ← W + α U_k U_kᵀ ΔW` for every matrix that the alignment changed.
    fn extrapolate(&self, cx: &mut StageCx, alignment: &AlignmentUpdates) -> Result<()> {
        for name in alignment.names() {
            if let Some(update) = alignment.get(&name)? {
                update.with_left(self.strongest(&update)?).add_to(cx.weights, &name, self.alpha)?;
            }
        }
        Ok(())
    }
}

impl AlignmentDefense for Lox {
    fn finish(&mut self, cx: &mut StageCx) -> Result<()> {
        if self.alpha == 0. {
            return Ok(());
        }
        // Post-fine-tuning has no steps; where there were some, they were the alignment's.
        let aligning = cx.clock.total > 0;
        if aligning && cx.weights.lora().is_some() {
            return self.extrapolate_adapters(cx);
        }
        let alignment = if aligning { AlignmentUpdates::of_stage(cx)? } else { AlignmentUpdates::of(cx.ancestry)? };
        cx.weights.merge()?;
        self.extrapolate(cx, &alignment)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};
    use titer_core::Weights;
    use titer_core::defense::Streams;
    use titer_core::rng::{Seed, randn};

    use super::*;
    use crate::testing::{
        TrainedLineage, check_kept_beside_frozen, check_untouched, close, dense, finish, matrices, norm, post, small,
    };

    /// The `rank` strongest left singular vectors of `v`, by power iteration.
    fn strongest(v: &Tensor, rank: usize) -> Result<Tensor> {
        let square = v.matmul(&v.t()?)?;
        let mut found: Vec<Tensor> = Vec::new();
        for index in 0..rank {
            let mut u =
                randn(&[v.dim(0)?, 1], &mut Seed::new(index as u64).generator(), &Device::Cpu)?.to_dtype(DType::F64)?;
            for _ in 0..3000 {
                u = square.matmul(&u)?;
                for before in &found {
                    u = (&u - before.matmul(&before.t()?.matmul(&u)?)?)?;
                }
                u = (&u / norm(&u)?)?;
            }
            found.push(u);
        }
        Ok(Tensor::cat(&found, 1)?)
    }

    #[test]
    fn it_follows_the_strongest_directions() -> Result<()> {
        let model = small()?;
        let model = model.as_ref();
        for (lineage, full) in
            [(TrainedLineage::by_adapter(model, DType::F64)?, false), (TrainedLineage::in_full(model)?, true)]
        {
            for rank in [2, 0] {
                let settings = json!({ "rank": rank, "alpha": 0.5 });
                let mut aligned = if full {
                    TrainedLineage::in_full(model)?.aligned
                } else {
                    TrainedLineage::by_adapter(model, DType::F64)?.aligned
                };
                finish(("lox", settings.clone()), model, &mut aligned, &lineage, &mut Streams::default(), 7)?;
                assert_eq!(aligned.lora().is_some(), !full, "an adapter stays one");
                let (mut tuned, before) = (lineage.user()?, lineage.user()?);
                post(("lox", settings), model, &mut tuned, &lineage)?;
                let changed =
                    matrices(model).into_iter().filter(|name| name.contains("q_proj") || name.contains("o_proj"));
                for name in changed {
                    let v = lineage.update(&name)?;
                    let more = match rank {
                        0 => v.clone(),
                        _ => {
                            let u = strongest(&v, rank)?;
                            u.matmul(&u.t()?.matmul(&v)?)?
                        }
                    };
                    let extrapolated =
                        |from: &Weights| Ok::<_, titer_core::Error>((dense(from, &name)? + (&more * 0.5)?)?);
                    close(&dense(&aligned, &name)?, &extrapolated(&lineage.aligned)?, &format!("align {rank} {name}"))?;
                    close(&dense(&tuned, &name)?, &extrapolated(&before)?, &format!("post {rank} {name}"))?;
                }
            }
        }
        Ok(())
    }

    #[test]
    fn neutral_settings_leave_the_weights_bit_for_bit() -> Result<()> {
        check_untouched("lox", &json!({ "alpha": 0.0 }))
    }

    #[test]
    fn frozen_bases_keep_what_is_added_beside_them() -> Result<()> {
        check_kept_beside_frozen("lox", json!({ "rank": 0, "alpha": 0.5 }))
    }
}
