//! Safe LoRA: the user's update is projected onto what the alignment changed (Hsu, Tsai, Lin, Chen, Yu, Huang;
//! NeurIPS 2024, arXiv:2405.16833).
//!
//! Per layer, with `V = W_aligned − W_base` and the user's `ΔW = B A`: where `cos(P ΔW, ΔW) ≤ τ`, `ΔW ← P ΔW`, that is
//! `B ← P B`, with `P = V Vᵀ / ‖V‖_F`.

use candle_core::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;
use titer_core::tensor::ops::Gemm;
use titer_core::weights::factor_names;
use titer_core::{
    AlignmentDefense, Conflict, DefenseEntry, Error, Privilege, Quirk, Result, SettingsType, Stack, Stage, StageCx,
    inventory, no_limits,
};

use super::alignment_update::{AlignmentUpdates, MatrixUpdate, matrix, needs_alignment, placed, wide};

inventory::submit! {
    DefenseEntry {
        name: "safe-lora",
        summary: "after fine-tuning, projects the user's update of a layer onto what the alignment changed there",
        paper: "Hsu, Tsai, Lin, Chen, Yu, Huang: Safe LoRA: the Silver Lining of Reducing Safety Risks when Fine-tuning \
                Large Language Models, NeurIPS 2024, arXiv:2405.16833",
        formula: "V = W_aligned − W_base,   P = V Vᵀ / ‖V‖_F,   ΔW ← P ΔW where cos(P ΔW, ΔW) ≤ τ",
        stages: &[Stage::Post],
        streams: |_| &[],
        sites: &[],
        passes: |_| 1.,
        privilege: Privilege { harmful_answers: false, needs: "the weights before and after alignment" },
        notes: "The paper's `P` is no projector: it scales the update with the size of the alignment's. `projection = \
                \"orthogonal\"` is the exact V (Vᵀ V)⁻¹ Vᵀ of its derivation, which is the identity for an alignment of \
                full rank, that is, of all parameters. `V` stays in the alignment's factors. Layers that the alignment \
                left as they were are not projected. With full fine-tuning, ΔW is the difference from the aligned model.",
        quirks: &[Quirk {
            setting: "rounded",
            published: || json!(true),
            what: "rounds the cosines to five digits, so that more than `layers` of them can be among the lowest",
        }],
        conflicts,
        limits: no_limits,
        settings: SettingsType::of::<SafeLora>(),
        neutral: Some(|| json!({ "mode": "threshold", "threshold": -1.0 })),
        version: 1,
        build: |settings| {
            let safe: SafeLora = settings.parse()?;
            safe.check()?;
            Ok(Box::new(safe))
        },
    }
}

fn conflicts(stack: &Stack) -> Option<Conflict> {
    let why = "`safe-lora` projects the user's update, which `single` mixes with the alignment's in one adapter";
    let mixed = stack.lora == "single";
    needs_alignment("safe-lora", stack).or_else(|| mixed.then(|| Conflict::Refused(why.into())))
}

/// How the layers to project are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// All whose cosine is at most `threshold`.
    Threshold,
    /// The `layers` with the lowest cosines, and any whose cosine equals the last of them.
    Number,
}

/// What `P` is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Projection {
    /// `V Vᵀ / ‖V‖_F`: the paper's, and its code's.
    Approximate,
    /// The orthogonal projector onto the columns of `V`.
    Orthogonal,
}

/// The settings, and the defense.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct SafeLora {
    /// Which layers are projected: those whose cosine is at most `threshold`, or the `layers` with the lowest cosines
    /// (`number`).
    pub mode: Mode,
    /// τ: the cosine up to which a layer is projected, with `mode = "threshold"`; -1 projects none, 1 all.
    pub threshold: f64,
    /// How many layers are projected, with `mode = "number"`.
    pub layers: usize,
    /// P: `V Vᵀ / ‖V‖_F` (`approximate`, as in the paper), or the orthogonal projector onto the columns of V.
    pub projection: Projection,
    /// Whether cosines are rounded to five digits before they are compared.
    pub rounded: bool,
}

impl Default for SafeLora {
    fn default() -> Self {
        let (mode, projection) = (Mode::Threshold, Projection::Approximate);
        Self { mode, threshold: 0.5, layers: 10, projection, rounded: false }
    }
}

/// A layer that may be projected.
struct Candidate {
    /// `cos(P ΔW, ΔW)`.
    cosine: f64,
    /// The parameter that would change.
    name: String,
    /// What it would become.
    projected: Tensor,
}

impl SafeLora {
    fn check(&self) -> Result<()> {
        if (-1. ..=1.).contains(&self.threshold) {
            return Ok(());
        }
        Err(Error::config(format!("`threshold` must lie in [-1, 1], found `{}`", self.threshold))
            .key("threshold")
            .help("it is a cosine: -1 projects no layer, 1 all"))
    }

    /// `P X` for a left factor `x: [out, k]`.
    fn project(&self, alignment: &MatrixUpdate, x: &Tensor) -> Result<Tensor> {
        match self.projection {
            Projection::Approximate => Ok((alignment.outer(x)? / alignment.norm()?)?),
            Projection::Orthogonal => {
                let u = alignment.left_singular_vectors(None)?;
                Gemm::NN.product(&u, &Gemm::TN.product(&u, x)?)
            }
        }
    }

    /// `P B`, and `cos(P ΔW, ΔW)`; zero if one of them is.
    fn projected(&self, alignment: &MatrixUpdate, update: &MatrixUpdate) -> Result<(Tensor, f64)> {
        let left = self.project(alignment, update.left())?;
        let lengths = update.product(&left, &left)?.max(0.).sqrt() * update.norm()?;
        let cosine = if lengths > 0. { update.product(&left, update.left())? / lengths } else { 0. };
        Ok((left, if self.rounded { (cosine * 1e5).round() / 1e5 } else { cosine }))
    }

    fn candidates(&self, cx: &StageCx) -> Result<Vec<Candidate>> {
        if cx.weights.lora().is_some() { self.adapters(cx) } else { self.matrices(cx) }
    }

    fn adapters(&self, cx: &StageCx) -> Result<Vec<Candidate>> {
        let alignment = AlignmentUpdates::of(cx.ancestry)?;
        let mut candidates = Vec::new();
        for (module, adapter) in cx.weights.adapters() {
            let Some(alignment) = alignment.get(&format!("{module}.weight"))? else { continue };
            let (left, cosine) = self.projected(&alignment, &MatrixUpdate::of_adapter(adapter, 1.)?)?;
            let [_, name] = factor_names(module);
            candidates.push(Candidate { cosine, name, projected: placed(&left, &adapter.b)? });
        }
        Ok(candidates)
    }

    fn matrices(&self, cx: &StageCx) -> Result<Vec<Candidate>> {
        let (alignment, aligned) = (AlignmentUpdates::of(cx.ancestry)?, cx.ancestry.aligned()?.merged()?);
        let mut candidates = Vec::new();
        for name in alignment.names() {
            let Some(alignment) = alignment.get(&name)? else { continue };
            let (before, after) = (matrix(&aligned, &name)?, matrix(cx.weights, &name)?);
            let (left, cosine) = self.projected(&alignment, &MatrixUpdate::of_difference(&after, &before)?)?;
            let projected = placed(&(wide(&before)? + left)?, &after)?;
            candidates.push(Candidate { cosine, name, projected });
        }
        Ok(candidates)
    }

    /// The cosine up to which layers are projected.
    fn limit(&self, candidates: &[Candidate]) -> f64 {
        match self.mode {
            Mode::Threshold => self.threshold,
            Mode::Number => {
                let mut cosines: Vec<f64> = candidates.iter().map(|candidate| candidate.cosine).collect();
                cosines.sort_by(f64::total_cmp);
                let last = self.layers.min(cosines.len()).checked_sub(1);
                last.map_or(f64::NEG_INFINITY, |last| cosines[last])
            }
        }
    }
}

impl AlignmentDefense for SafeLora {
    fn finish(&mut self, cx: &mut StageCx) -> Result<()> {
        // P has no negative eigenvalue, so no cosine is below zero.
        if self.mode == Mode::Threshold && self.threshold < 0. {
            return Ok(());
        }
        let candidates = self.candidates(cx)?;
        let limit = self.limit(&candidates);
        let chosen = candidates.into_iter().filter(|candidate| candidate.cosine <= limit);
        cx.weights.set(&chosen.map(|candidate| (candidate.name, candidate.projected)).collect())
    }
}

#[cfg(test)]
mod tests {
    use candle_core::DType;
    use serde_json::Value;
    use titer_core::{Model, Weights};

    use super::*;
    use crate::testing::{TrainedLineage, basis, bits, check_untouched, close, dense, matrices, norm, post, small};

    /// `P` by dense matrices.
    fn projector(v: &Tensor, projection: &str) -> Result<Tensor> {
        if projection == "approximate" {
            return Ok((v.matmul(&v.t()?)? / norm(v)?)?);
        }
        let basis = basis(v)?;
        Ok(basis.matmul(&basis.t()?)?)
    }

    /// Per matrix that the alignment changed: its name, `P ΔW`, and `cos(P ΔW, ΔW)`.
    fn projections(
        lineage: &TrainedLineage,
        user: &Weights,
        projection: &str,
        model: &dyn Model,
    ) -> Result<Vec<(String, Tensor, f64)>> {
        let mut found = Vec::new();
        for name in matrices(model) {
            let (v, update) = (lineage.update(&name)?, (dense(user, &name)? - dense(&lineage.aligned, &name)?)?);
            if norm(&v)? > 0. && norm(&update)? > 0. {
                let projected = projector(&v, projection)?.matmul(&update)?;
                let cosine =
                    (&projected * &update)?.sum_all()?.to_scalar::<f64>()? / (norm(&projected)? * norm(&update)?);
                found.push((name, projected, cosine));
            }
        }
        Ok(found)
    }

    #[test]
    fn it_projects_the_layers_whose_update_points_elsewhere() -> Result<()> {
        let model = small()?;
        let model = model.as_ref();
        let lineages = [TrainedLineage::by_adapter(model, DType::F64)?, TrainedLineage::in_full(model)?];
        for (lineage, full) in lineages.iter().flat_map(|lineage| [(lineage, false), (lineage, true)]) {
            for projection in ["approximate", "orthogonal"] {
                let start = || if full { lineage.user_in_full() } else { lineage.user() };
                let reference = projections(lineage, &start()?, projection, model)?;
                let mut cosines: Vec<f64> = reference.iter().map(|(_, _, cosine)| *cosine).collect();
                cosines.sort_by(f64::total_cmp);
                let between = f64::midpoint(cosines[2], cosines[3]);
                // The orthogonal projector onto all directions changes nothing, so that its cosines are all one.
                let distinct = cosines[3] - cosines[2] > 1e-9;
                for settings in [
                    json!({ "mode": "threshold", "threshold": between.min(1.), "projection": projection }),
                    json!({ "mode": "number", "layers": 3, "projection": projection }),
                ] {
                    let mut weights = start()?;
                    post(("safe-lora", settings.clone()), model, &mut weights, lineage)?;
                    for (name, projected, cosine) in &reference {
                        let chosen = *cosine < between || !distinct;
                        let expected = if chosen {
                            (dense(&lineage.aligned, name)? + projected)?
                        } else {
                            dense(&start()?, name)?
                        };
                        close(&dense(&weights, name)?, &expected, &format!("{settings} {full} {name}"))?;
                    }
                }
            }
        }
        Ok(())
    }

    #[test]
    fn it_projects_as_many_layers_as_asked_for() -> Result<()> {
        let model = small()?;
        let lineage = TrainedLineage::by_adapter(model.as_ref(), DType::F64)?;
        let changed = |settings: Value| -> Result<usize> {
            let (mut weights, before) = (lineage.user()?, bits(&lineage.user()?)?);
            post(("safe-lora", settings), model.as_ref(), &mut weights, &lineage)?;
            Ok(bits(&weights)?.iter().zip(&before).filter(|(after, before)| after != before).count())
        };
        for (layers, expected) in [(0, 0), (1, 1), (4, 4), (99, 6)] {
            assert_eq!(changed(json!({ "mode": "number", "layers": layers }))?, expected);
        }
        // Between a cosine and its five digits, rounding decides.
        for (_, _, cosine) in projections(&lineage, &lineage.user()?, "approximate", model.as_ref())? {
            let threshold = f64::midpoint(cosine, (cosine * 1e5).round() / 1e5);
            let count = |rounded: bool| changed(json!({ "threshold": threshold, "rounded": rounded }));
            assert_eq!(count(true)?.abs_diff(count(false)?), 1, "{cosine}");
        }
        Ok(())
    }

    #[test]
    fn neutral_settings_leave_the_weights_bit_for_bit() -> Result<()> {
        check_untouched("safe-lora", &json!({ "mode": "threshold", "threshold": -1.0 }))?;
        check_untouched("safe-lora", &json!({ "mode": "number", "layers": 0 }))
    }
}
