//! `AsFT`: the user's update is penalised where it leaves the direction of the alignment's (Yang et al.; AAAI 2026,
//! arXiv:2506.08473).
//!
//! `L = f(w) + λ Σ_l ‖(I − C) ΔW‖²` over adapted layers l, with the user's `ΔW = B A`, what the alignment changed in the
//! layer, `V = W_aligned − W_base`, and the projector `C` onto the columns of `V`.

use candle_core::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use titer_core::data::Batch;
use titer_core::defense::toolkit::{Kept, check_strength};
use titer_core::tensor::ops;
use titer_core::tensor::ops::Gemm;
use titer_core::weights::{Adapter, LoraConfig, factor_names};
use titer_core::{
    AlignmentDefense, Conflict, DefenseEntry, Grads, Limits, Privilege, Quirk, Result, Scalar, SettingsType, Sites,
    Stack, Stage, StageCx, State, StepCx, Update, inventory,
};

use super::alignment_update::{AlignmentUpdates, MatrixUpdate, needs_alignment, placed};
use super::safe_lora::Projection;

inventory::submit! {
    DefenseEntry {
        name: "asft",
        summary: "penalises the part of the user's update that lies outside of what the alignment changed in the layer",
        paper: "Yang, Zhang, Liu, Huang, Jia, Ning, Yao, Wang, Dai, Song, Yuan: AsFT: Anchoring Safety During LLM \
                Fine-Tuning Within Narrow Safety Basin, AAAI 2026, arXiv:2506.08473",
        formula: "L = f(w) + λ Σ_l ‖(I − C) ΔW‖²,   C = V (Vᵀ V)⁻¹ Vᵀ,   V = W_aligned − W_base",
        stages: &[Stage::FineTune],
        streams: |_| &[],
        sites: &[],
        passes: |_| 1.,
        privilege: Privilege { harmful_answers: false, needs: "the weights before and after alignment" },
        notes: "An alignment of full rank leaves nothing outside of its columns, so that `projection = \"orthogonal\"` \
                does nothing there. Layers that the alignment left as they were have no direction and are not held.",
        quirks: &[
            Quirk {
                setting: "projection",
                published: || json!("approximate"),
                what: "divides `V Vᵀ` by ‖V‖, which is no projector: an update along the alignment is penalised too",
            },
            Quirk {
                setting: "scaled",
                published: || json!(false),
                what: "leaves the adapter's scale out of ΔW, so that the penalty depends on alpha",
            },
            Quirk {
                setting: "every_micro_batch",
                published: || json!(true),
                what: "divides the loss by the number of accumulated batches, and not the penalty",
            },
        ],
        conflicts,
        limits,
        settings: SettingsType::of::<AsFt>(),
        neutral: Some(|| json!({ "lambda": 0.0 })),
        version: 1,
        build: |settings| {
            let asft: AsFt = settings.parse()?;
            check_strength("lambda", asft.lambda)?;
            Ok(Box::new(asft))
        },
    }
}

fn conflicts(stack: &Stack) -> Option<Conflict> {
    let refused = match stack.lora {
        "single" => "`asft` penalises the user's update, which `single` mixes with the alignment's in one adapter",
        "full" => "`asft` penalises the product of an adapter's factors, and full fine-tuning has none",
        _ => return needs_alignment("asft", stack),
    };
    Some(Conflict::Refused(refused.into()))
}

fn limits(settings: &Value) -> Limits {
    let published = settings["every_micro_batch"] == true && settings["lambda"] != 0.;
    let published = published.then_some("the published penalty counts once for each micro batch");
    Limits { accumulation: published, ..Limits::default() }
}

/// The settings, and the defense.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct AsFt {
    /// λ: the weight of the penalty.
    pub lambda: f64,
    /// C: the orthogonal projector onto the columns of V, or `V Vᵀ / ‖V‖_F` (`approximate`).
    pub projection: Projection,
    /// Whether ΔW has the adapter's scale.
    pub scaled: bool,
    /// Whether the whole penalty is added in each accumulated batch, instead of once an update.
    pub every_micro_batch: bool,
    #[serde(skip)]
    kept: Kept,
}

impl Default for AsFt {
    fn default() -> Self {
        Self {
            lambda: 1.,
            projection: Projection::Orthogonal,
            scaled: true,
            every_micro_batch: false,
            kept: Kept::default(),
        }
    }
}

impl AsFt {
    /// `L` and `S` of `C = L S Lᵀ`, in f64: `L: [out, k]`, `S: [k, k]`.
    fn factors(&self, alignment: &MatrixUpdate) -> Result<[Tensor; 2]> {
        match self.projection {
            Projection::Orthogonal => {
                let basis = alignment.left_singular_vectors(None)?;
                let identity = Tensor::eye(basis.dim(1)?, basis.dtype(), basis.device())?;
                Ok([basis, identity])
            }
            Projection::Approximate => Ok([alignment.left().clone(), (alignment.right_gram()? / alignment.norm()?)?]),
        }
    }

    /// `(I − C) x` for the layer `module` and `x: [out, n]`; `None` if the layer is not held.
    fn outside(&self, module: &str, x: &Tensor) -> Result<Option<Tensor>> {
        let [Some(left), Some(middle)] = [self.kept.get("left")?.get(module), self.kept.get("middle")?.get(module)]
        else {
            return Ok(None);
        };
        let inner = Gemm::NN.product(middle, &Gemm::TN.product(left, x)?)?;
        Ok(Some((x - Gemm::NN.product(left, &inner)?)?))
    }

    /// `‖(I − C) ΔW‖²` of one layer, and its gradients by `A` and `B`.
    fn penalty(&self, module: &str, adapter: &Adapter, scale: f64) -> Result<Option<(Tensor, [Tensor; 2])>> {
        let [a, b] = [&adapter.a, &adapter.b].map(Tensor::detach);
        // ΔW enters as R A with R = (I − C) s B, so that no matrix is larger than a factor.
        let Some(outside) = self.outside(module, &(b * scale)?)? else { return Ok(None) };
        let (left, right) = (Gemm::TN.product(&outside, &outside)?, Gemm::NT.product(&a, &a)?);
        let value = ops::sum_all(&(&left * &right)?)?;
        let by_a = (Gemm::NN.product(&left, &a)? * 2.)?;
        // C is symmetric.
        let by_outside = Gemm::NN.product(&outside, &right)?;
        let by_b = self.outside(module, &by_outside)?.map(|gradient| gradient * (2. * scale)).transpose()?;
        Ok(by_b.map(|by_b| (value, [by_a, by_b])))
    }
}

impl AlignmentDefense for AsFt {
    fn begin(&mut self, cx: &mut StageCx) -> Result<()> {
        if self.lambda == 0. {
            return Ok(());
        }
        let alignment = AlignmentUpdates::of(cx.ancestry)?;
        let (mut lefts, mut middles) = (Vec::new(), Vec::new());
        for (module, adapter) in cx.weights.adapters() {
            let Some(update) = alignment.get(&format!("{module}.weight"))? else { continue };
            let [left, middle] = self.factors(&update)?;
            lefts.push((module.to_owned(), placed(&left, &adapter.b)?));
            middles.push((module.to_owned(), placed(&middle, &adapter.b)?));
        }
        self.kept.keep("left", lefts.into_iter().collect());
        self.kept.keep("middle", middles.into_iter().collect());
        Ok(())
    }

    fn step(&mut self, cx: &mut StepCx, batch: &Batch) -> Result<Update> {
        let plain = cx.backward(batch, Sites::none())?;
        if self.lambda == 0. {
            return Ok(plain.into());
        }
        let scale = cx.weights().lora().filter(|_| self.scaled).map_or(1., LoraConfig::scale);
        let strength = if self.every_micro_batch { self.lambda * cx.clock().micros as f64 } else { self.lambda };
        let (mut penalty, mut gradients) = (Scalar::from(0.), Vec::new());
        for (module, adapter) in cx.weights().adapters() {
            if let Some((value, by_factor)) = self.penalty(module, adapter, scale)? {
                penalty = penalty.plus(&Scalar::of(&value)?)?;
                gradients.extend(factor_names(module).into_iter().zip(by_factor));
            }
        }
        let penalty = penalty.affine(strength, 0.)?;
        let grads = plain.grads.add_scaled(strength, &gradients.into_iter().collect::<Grads>())?;
        Ok(Update::new(grads, plain.loss.plus(&penalty)?).with("task_loss", plain.loss).with("penalty", penalty))
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
    use titer_core::defense::{Clock, Streams};
    use titer_core::rng::Seed;
    use titer_core::testing::values;
    use titer_core::{Model, Weights};

    use super::*;
    use crate::testing::{
        TrainedLineage, basis, check_must_begin, check_neutral, check_published, check_refused, check_slope, defense,
        dense, norm, small, three_rows, update,
    };

    /// The defense after it began a stage of `weights`, which were aligned as `lineage` says.
    fn begun(
        given: Value,
        model: &dyn Model,
        weights: &mut Weights,
        ancestry: &TrainedLineage,
    ) -> Result<Box<dyn AlignmentDefense>> {
        let mut defense = defense("asft", given)?;
        let (seed, clock, streams) = (Seed::new(4), Clock::at(0, 10), &mut Streams::default());
        defense.begin(&mut StageCx { model, weights, streams, seed, clock, ancestry })?;
        Ok(defense)
    }

    fn step(defense: &mut dyn AlignmentDefense, model: &dyn Model, weights: &Weights, micros: usize) -> Result<Update> {
        let clock = Clock { micros, ..Clock::at(1, 10) };
        update(defense, model, weights, &mut Streams::default(), &three_rows(5)?, clock)
    }

    /// `Σ ‖(I − C) ΔW‖²` by dense matrices; `scale` is taken out of ΔW.
    fn reference(lineage: &TrainedLineage, user: &Weights, projection: &str, scale: f64) -> Result<f64> {
        let mut sum = 0.;
        for (module, _) in user.adapters() {
            let name = format!("{module}.weight");
            let v = lineage.update(&name)?;
            let update = ((dense(user, &name)? - dense(&lineage.aligned, &name)?)? / scale)?;
            let inside = if projection == "approximate" {
                (v.matmul(&v.t()?)? / norm(&v)?)?.matmul(&update)?
            } else {
                let basis = basis(&v)?;
                basis.matmul(&basis.t()?.matmul(&update)?)?
            };
            sum += norm(&(update - inside)?)?.powi(2);
        }
        Ok(sum)
    }

    #[test]
    fn the_penalty_is_that_of_dense_matrices() -> Result<()> {
        let model = small()?;
        let lineage = TrainedLineage::by_adapter(model.as_ref(), DType::F64)?;
        for projection in ["orthogonal", "approximate"] {
            // The adapters' scale is 2.
            for (scaled, scale) in [(true, 1.), (false, 2.)] {
                let mut user = lineage.user()?;
                let given = json!({ "lambda": 0.3, "projection": projection, "scaled": scaled });
                let mut asft = begun(given.clone(), model.as_ref(), &mut user, &lineage)?;
                let ours = step(asft.as_mut(), model.as_ref(), &user, 1)?.scalars["penalty"].value()?;
                let expected = 0.3 * reference(&lineage, &user, projection, scale)?;
                assert!((ours - expected).abs() < 1e-9 * expected && expected > 1e-3, "{given}: {ours} and {expected}");
            }
        }
        Ok(())
    }

    #[test]
    fn gradients_are_the_slopes_of_the_declared_objective() -> Result<()> {
        let model = small()?;
        let lineage = TrainedLineage::by_adapter(model.as_ref(), DType::F64)?;
        for given in [json!({ "lambda": 3.0 }), json!({ "projection": "approximate", "scaled": false, "lambda": 3.0 })]
        {
            let mut user = lineage.user()?;
            let mut asft = begun(given.clone(), model.as_ref(), &mut user, &lineage)?;
            let grads = step(asft.as_mut(), model.as_ref(), &user, 1)?.grads;
            let loss = || step(asft.as_mut(), model.as_ref(), &user, 1)?.loss.value();
            check_slope(&user, &grads, &given.to_string(), loss)?;
        }
        Ok(())
    }

    /// The published `C` is no projector.
    #[test]
    fn an_update_along_the_alignment_is_free_unless_published() -> Result<()> {
        let model = small()?;
        let lineage = TrainedLineage::by_adapter(model.as_ref(), DType::F64)?;
        let mut user = lineage.user()?;
        let aligned: Vec<(String, Tensor)> = lineage
            .aligned
            .adapters()
            .map(|(module, adapter)| Ok((factor_names(module)[1].clone(), adapter.b.narrow(1, 0, 2)?.contiguous()?)))
            .collect::<Result<_>>()?;
        user.set(&aligned.into_iter().collect())?;
        let mut penalty = |projection: &str| -> Result<f64> {
            let mut asft = begun(json!({ "projection": projection }), model.as_ref(), &mut user, &lineage)?;
            step(asft.as_mut(), model.as_ref(), &user, 1)?.scalars["penalty"].value()
        };
        let (orthogonal, approximate) = (penalty("orthogonal")?, penalty("approximate")?);
        assert!(orthogonal.abs() < 1e-12 * approximate && approximate > 1e-3, "{orthogonal} and {approximate}");
        Ok(())
    }

    /// The published trainer divides the loss by the number of micro batches, and not the penalty.
    #[test]
    fn the_published_penalty_counts_in_each_micro_batch() -> Result<()> {
        let model = small()?;
        let lineage = TrainedLineage::by_adapter(model.as_ref(), DType::F64)?;
        let mut user = lineage.user()?;
        let mut penalty = |every: bool, micros: usize| -> Result<f64> {
            let mut asft = begun(json!({ "every_micro_batch": every }), model.as_ref(), &mut user, &lineage)?;
            step(asft.as_mut(), model.as_ref(), &user, micros)?.scalars["penalty"].value()
        };
        let once = penalty(false, 4)?;
        assert_eq!(penalty(true, 1)?, once);
        assert_eq!(penalty(true, 4)?, 4. * once);
        Ok(())
    }

    /// Where the alignment changed nothing there is no direction to keep to.
    #[test]
    fn layers_that_the_alignment_left_are_not_held() -> Result<()> {
        let model = small()?;
        let lineage = TrainedLineage::by_adapter(model.as_ref(), DType::F64)?;
        let zeros: Grads = lineage
            .aligned
            .trainable()
            .iter()
            .filter(|(name, _)| name.contains("lora_B"))
            .map(|(name, var)| Ok((name.clone(), var.zeros_like()?)))
            .collect::<Result<_>>()?;
        lineage.aligned.set(&zeros)?;
        let mut user = lineage.user()?;
        let mut asft = begun(json!({}), model.as_ref(), &mut user, &lineage)?;
        let update = step(asft.as_mut(), model.as_ref(), &user, 1)?;
        assert_eq!(update.scalars["penalty"].value()?, 0.);
        assert!(update.grads.iter().all(|(_, grad)| values(grad).is_ok_and(|all| all.iter().all(|x| x.is_finite()))));
        Ok(())
    }

    #[test]
    fn neutral_settings_are_plain_fine_tuning() -> Result<()> {
        check_neutral("asft")
    }

    #[test]
    fn settings_out_of_range_are_refused() {
        check_refused("asft", &[(json!({ "lambda": -1.0 }), "lambda"), (json!({ "lambda": null }), "lambda")]);
    }

    #[test]
    fn the_published_form_has_its_quirks() -> Result<()> {
        check_published("asft")
    }

    #[test]
    fn a_stage_that_was_not_begun_is_an_error() -> Result<()> {
        check_must_begin("asft")
    }
}
