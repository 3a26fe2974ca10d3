//! Antidote: one-shot pruning of the weights that harmful data needs most (Huang, Bhattacharya, Joshi, Kimball, Liu;
//! ICML 2025, arXiv:2408.09600).
//!
//! After the user's fine-tuning every weight is scored on harmful rows, by Wanda (Sun et al., ICLR 2024):
//! `h_ij = |w_ij| · √(Σ x_j² / n)` over all tokens of the `n` rows. The share `α` with the highest scores of each output
//! row is set to zero: `ŵ = (1 − m) ∘ w`. The forward passes see the weights unpruned.

use candle_core::{DType, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;
use titer_core::data::Tokens;
use titer_core::defense::toolkit::check_fraction;
use titer_core::{
    AlignmentDefense, Conflict, DefenseEntry, Error, Grads, Privilege, Quirk, Result, SettingsType, Sites, Stack,
    Stage, StageCx, StepCx, Weights, inventory, no_limits,
};

inventory::submit! {
    DefenseEntry {
        name: "antidote",
        summary: "after fine-tuning, sets to zero the weights that matter most to harmful rows",
        paper: "Huang, Bhattacharya, Joshi, Kimball, Liu: Antidote: Post-fine-tuning Safety Alignment for Large \
                Language Models against Harmful Fine-tuning, ICML 2025, arXiv:2408.09600",
        formula: "h_ij = |w_ij| √(Σ x_j² / n),   m = 1 at the top α of each row of h,   ŵ = (1 − m) ∘ w",
        stages: &[Stage::Post],
        streams: |settings| match (settings["score"].as_str(), settings["keep_safe"] == true) {
            (Some("magnitude" | "random"), _) => &[],
            (_, false) => &["harmful"],
            (_, true) => &["harmful", "safe"],
        },
        sites: &[],
        passes: |_| 1.,
        privilege: Privilege { harmful_answers: true, needs: "harmful rows with their answers, after fine-tuning" },
        notes: "What is pruned is what the user's fine-tuning trained: both factors of its adapter, or the linear layers \
                of all blocks. Of each row of n weights all but the ⌊n (1 − α)⌋ lowest go, as published, so of the 8 \
                columns of a factor B of rank 8 one goes at α = 0.1, an eighth. The stream `harmful` is \
                read where the score looks at data, `safe` with `keep_safe`.",
        quirks: &[Quirk {
            setting: "padding",
            published: || json!("counted"),
            what: "passes no mask, so the padding of a batch counts as tokens",
        }],
        conflicts,
        limits: no_limits,
        settings: SettingsType::of::<Antidote>(),
        neutral: Some(|| json!({ "ratio": 0.0 })),
        version: 1,
        build: |settings| {
            let antidote: Antidote = settings.parse()?;
            antidote.check()?;
            Ok(Box::new(antidote))
        },
    }
}

fn conflicts(stack: &Stack) -> Option<Conflict> {
    let one = stack.align.is_some() && stack.lora == "single";
    one.then(|| Conflict::Noted("`antidote` prunes the alignment too: with `single` both are one adapter".into()))
}

/// What a weight's importance is taken to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Score {
    /// `|w| √(Σ x² / n)`: the paper's.
    Wanda,
    /// `|w|`, without data.
    Magnitude,
    /// Noise: the control.
    Random,
    /// `|w| · |Σ ∂L/∂w|`, with the top of each whole matrix instead of each row.
    Gradient,
}

/// Whether the padding of a batch counts as tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Padding {
    /// Real tokens only.
    Skipped,
    /// Every position.
    Counted,
}

/// The settings, and the defense.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Antidote {
    /// α: the share of weights to remove, of each output row, from 0 to 1 (the code's `dense_ratio`).
    pub ratio: f64,
    /// How important a weight is: `wanda`, `|w| √(Σ x² / n)`, as in the paper; `magnitude`, `|w|`, without data;
    /// `gradient`, `|w| · |Σ ∂L/∂w|`, ranked over the whole matrix; `random`, a control.
    pub score: Score,
    /// How many batches of the stream the importance is computed on; each of its rows once if absent.
    pub batches: Option<usize>,
    /// Whether weights stay that are among the most important ones to the stream `safe`, too.
    pub keep_safe: bool,
    /// Whether the padding of a batch counts as tokens.
    pub padding: Padding,
}

impl Default for Antidote {
    fn default() -> Self {
        Self { ratio: 0.1, score: Score::Wanda, batches: None, keep_safe: false, padding: Padding::Skipped }
    }
}

impl Antidote {
    fn check(&self) -> Result<()> {
        check_fraction("ratio", self.ratio)?;
        if self.batches == Some(0) {
            return Err(Error::config("`batches` must be at least 1, found `0`")
                .key("batches")
                .help("leave it out to use every row once"));
        }
        if self.keep_safe && matches!(self.score, Score::Magnitude | Score::Random) {
            return Err(Error::config(
                "`keep_safe` needs a score that looks at data: by this one, both masks are equal",
            )
            .key("keep_safe")
            .help("use score = \"wanda\" or \"gradient\""));
        }
        Ok(())
    }

    /// What the weights are multiplied with: the sum of squares over the tokens of a row, `Σ x_j²`, averaged over the
    /// rows of `batches` batches of `stream`. `[in]` by the parameter's name.
    ///
    /// # Errors
    /// The stream was not declared, or a tensor operation failed.
    pub fn input_means(&self, cx: &mut StepCx, stream: &str, batches: usize) -> Result<Grads> {
        let (mut sums, mut rows) = (Grads::default(), 0);
        for _ in 0..batches {
            let batch = cx.next(stream)?;
            let tokens = match self.padding {
                Padding::Skipped => batch.tokens,
                Padding::Counted => {
                    let tokens = batch.padded(None)?.tokens;
                    Tokens { real: tokens.lengths.clone(), ..tokens }
                }
            };
            rows += tokens.lengths.len();
            sums = sums.add_scaled(1., &cx.input_squares(&tokens)?)?;
        }
        sums.scale((rows as f64).recip())
    }

    /// The score of each prunable weight on `stream`, by the parameter's name.
    fn scores(&self, cx: &mut StageCx, stream: &str) -> Result<Grads> {
        let batches = match (self.score, self.batches) {
            (Score::Magnitude | Score::Random, _) => 0,
            (_, Some(batches)) => batches,
            (_, None) => cx.streams.get(stream)?.batches_per_epoch(),
        };
        let mut cx = cx.step();
        let matrices = prunable(cx.weights())?;
        match self.score {
            Score::Magnitude => matrices.map(|w| Ok(w.abs()?)),
            Score::Random => matrices.iter().map(|(name, w)| Ok((name.into(), cx.noise(name, w.dims())?))).collect(),
            Score::Wanda => {
                let means = self.input_means(&mut cx, stream, batches)?;
                weighed(&matrices, &means.map(|mean| Ok(mean.sqrt()?))?)
            }
            Score::Gradient => {
                let mut sum = Grads::default();
                for _ in 0..batches {
                    let batch = cx.next(stream)?;
                    sum = sum.add_scaled(1., &cx.backward(&batch, Sites::none())?.grads)?;
                }
                weighed(&matrices, &sum.map(|gradient| Ok(gradient.abs()?))?)
            }
        }
    }

    /// One (u8) at the weights that `stream` needs most, zero elsewhere, by the parameter's name.
    fn mask(&self, cx: &mut StageCx, stream: &str) -> Result<Grads> {
        self.scores(cx, stream)?.map(|scores| match self.score {
            Score::Gradient => {
                let all = scores.elem_count();
                highest(scores, all, all - (all as f64 * self.ratio) as usize)
            }
            _ => {
                let columns = scores.dim(1)?;
                highest(scores, columns, (columns as f64 * (1. - self.ratio)) as usize)
            }
        })
    }
}

/// The matrices under training in the blocks: the factors of adapters, or the weights of linear layers.
fn prunable(weights: &Weights) -> Result<Grads> {
    let blocks = weights.blocks();
    let matrices: Grads = weights
        .trainable()
        .iter()
        .filter(|(name, var)| blocks.contains_key(*name) && var.rank() == 2)
        .map(|(name, var)| (name.clone(), var.as_detached_tensor()))
        .collect();
    if matrices.is_empty() {
        return Err(Error::run("no matrix is under training, so there is nothing to prune"));
    }
    Ok(matrices)
}

/// `|w| · factor` for every matrix; a factor `[in]` holds for all rows.
fn weighed(matrices: &Grads, factors: &Grads) -> Result<Grads> {
    let scored = matrices.iter().map(|(name, w)| {
        let factor = factors.get(name).ok_or_else(|| Error::run(format!("no pass went through `{name}`")))?;
        Ok((name.to_owned(), w.abs()?.broadcast_mul(&factor.to_dtype(w.dtype())?)?))
    });
    scored.collect()
}

/// One (u8) at the highest of `scores` in each run of `length`, zero at the `low` lowest; of equals, the first count as
/// lower.
fn highest(scores: &Tensor, length: usize, low: usize) -> Result<Tensor> {
    let values: Vec<f64> = scores.flatten_all()?.to_dtype(DType::F64)?.to_vec1()?;
    let mut mask = vec![1u8; values.len()];
    for (run, mask) in values.chunks(length).zip(mask.chunks_mut(length)) {
        let mut order: Vec<usize> = (0..run.len()).collect();
        order.sort_by(|&i, &j| run[i].total_cmp(&run[j]));
        for &index in &order[..low] {
            mask[index] = 0;
        }
    }
    Ok(Tensor::from_vec(mask, scores.dims(), scores.device())?)
}

impl AlignmentDefense for Antidote {
    fn finish(&mut self, cx: &mut StageCx) -> Result<()> {
        if self.ratio == 0. {
            return Ok(());
        }
        let harmful = self.mask(cx, "harmful")?;
        let safe = if self.keep_safe { self.mask(cx, "safe")? } else { Grads::default() };
        let pruned = prunable(cx.weights)?.into_iter().map(|(name, w)| {
            let mut kept = w.zeros_like()?;
            if let Some(mask) = safe.get(&name) {
                kept = mask.where_cond(&w, &kept)?;
            }
            let mask = harmful.get(&name).ok_or_else(|| Error::run(format!("`{name}` was not scored")))?;
            Ok((name, mask.where_cond(&kept, &w)?))
        });
        cx.weights.set(&pruned.collect::<Result<_>>()?)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;
    use serde_json::Value;
    use titer_core::data::{Batch, Stream};
    use titer_core::defense::Streams;
    use titer_core::rng::Seed;
    use titer_core::testing::values;

    use super::*;
    use crate::testing::{TrainedLineage, batch, check_untouched, context, finish, small};

    #[test]
    fn the_lowest_of_each_run_stay_and_of_equals_the_first() -> Result<()> {
        let scores = Tensor::new(&[[2f32, 1., 2., 3.], [0., 0., 0., 0.]], &Device::Cpu)?;
        assert_eq!(highest(&scores, 4, 2)?.to_vec2::<u8>()?, [[0, 0, 1, 1], [0, 0, 1, 1]]);
        assert_eq!(highest(&scores, 8, 6)?.to_vec2::<u8>()?, [[0, 0, 1, 1], [0, 0, 0, 0]]);
        Ok(())
    }

    fn some_batches(seed: u64) -> Result<Vec<Batch>> {
        (0..3).map(|index| batch(23, &[4, 9, 6], &mut Seed::new(seed).at(index).generator())).collect()
    }

    fn streams(harmful: Vec<Batch>, safe: Vec<Batch>) -> Result<Streams> {
        let mut streams = Streams::default();
        streams.insert("harmful", Stream::of_batches(harmful)?);
        streams.insert("safe", Stream::of_batches(safe)?);
        Ok(streams)
    }

    /// Which weights of a fine-tuned model Antidote removes, by the parameter's name, as zeros and ones.
    fn removed(settings: Value, harmful: Vec<Batch>, safe: Vec<Batch>, full: bool) -> Result<Vec<(String, Vec<f64>)>> {
        let model = small()?;
        let lineage = TrainedLineage::by_adapter(model.as_ref(), DType::F64)?;
        let mut weights = if full { lineage.user_in_full()? } else { lineage.user()? };
        let before = weights.snapshot()?;
        let streams = &mut streams(harmful, safe)?;
        finish(("antidote", settings), model.as_ref(), &mut weights, &lineage, streams, 0)?;
        let masks = before.iter().map(|(name, before)| {
            let after = values(weights.trainable()[name].as_tensor())?;
            for (after, before) in after.iter().zip(values(before)?) {
                assert!(*after == 0. || *after == before, "{name}: {before} became {after}");
            }
            Ok((name.to_owned(), after.iter().map(|after| f64::from(u8::from(*after == 0.))).collect()))
        });
        masks.collect()
    }

    #[test]
    fn it_keeps_what_safe_data_needs() -> Result<()> {
        let settings = |keep: bool| json!({ "ratio": 0.4, "keep_safe": keep });
        let (harmful, safe) = (some_batches(1)?, some_batches(2)?);
        let by_harmful = removed(settings(false), harmful.clone(), safe.clone(), false)?;
        let by_safe = removed(settings(false), safe.clone(), harmful.clone(), false)?;
        let both = removed(settings(true), harmful, safe, false)?;
        let mut spared = 0;
        for ((harmful, safe), both) in by_harmful.iter().zip(&by_safe).zip(&both) {
            let expected: Vec<f64> = harmful.1.iter().zip(&safe.1).map(|(h, s)| h * (1. - s)).collect();
            assert_eq!(both.1, expected, "{}", both.0);
            spared += expected.iter().zip(&harmful.1).filter(|(both, harmful)| both < harmful).count();
        }
        assert!(spared > 0 && by_harmful != by_safe);
        Ok(())
    }

    /// Without the padding, how rows are batched does not matter; with it, it does.
    #[test]
    fn it_sees_no_padding() -> Result<()> {
        let settings = |padding: &str| json!({ "ratio": 0.4, "padding": padding });
        let batches = some_batches(1)?;
        let rows: Vec<Batch> = batches.iter().flat_map(|batch| batch.rows().expect("rows")).collect();
        let alone = removed(settings("skipped"), rows, some_batches(2)?, false)?;
        assert_eq!(alone, removed(settings("skipped"), batches.clone(), some_batches(2)?, false)?);
        assert_ne!(alone, removed(settings("counted"), batches, some_batches(2)?, false)?);
        Ok(())
    }

    #[test]
    fn it_removes_the_share_it_was_told() -> Result<()> {
        let data = || Ok::<_, titer_core::Error>((some_batches(1)?, some_batches(2)?));
        for score in ["wanda", "magnitude", "random", "gradient"] {
            for full in [false, true] {
                let (harmful, safe) = data()?;
                let masks = removed(json!({ "ratio": 0.3, "score": score }), harmful, safe, full)?;
                for (name, mask) in &masks {
                    let count = mask.iter().sum::<f64>() as usize;
                    let prunable = name.contains("_proj");
                    let columns = match name {
                        name if name.contains("lora_B") => 2,
                        name if name.contains("down_proj") => 20,
                        _ => 16,
                    };
                    let (rows, of_row) = (mask.len() / columns, columns - (columns as f64 * 0.7) as usize);
                    let expected = match score {
                        _ if !prunable => 0,
                        "gradient" => (mask.len() as f64 * 0.3) as usize,
                        _ => rows * of_row,
                    };
                    assert_eq!(count, expected, "{score} {name}");
                }
                assert!(masks.iter().any(|(_, mask)| mask.contains(&1.)), "{score}");
            }
        }
        Ok(())
    }

    #[test]
    fn the_gradient_scores_weight_times_summed_gradient() -> Result<()> {
        let model = small()?;
        let weights = TrainedLineage::by_adapter(model.as_ref(), DType::F64)?.user()?;
        let harmful = some_batches(1)?;
        let mut sum = Grads::default();
        for batch in &harmful {
            let mut none = Streams::default();
            let mut cx = context(model.as_ref(), &weights, &mut none);
            sum = sum.add_scaled(1., &cx.backward(batch, Sites::none())?.grads)?;
        }
        for (name, mask) in removed(json!({ "ratio": 0.3, "score": "gradient" }), harmful, some_batches(2)?, false)? {
            let product = (weights.trainable()[&name].as_tensor() * sum.get(&name).expect("a gradient"))?.abs()?;
            let scores = values(&product)?;
            let of =
                |kind: f64| scores.iter().zip(&mask).filter(move |(_, mask)| **mask == kind).map(|(score, _)| *score);
            assert!(of(1.).fold(f64::INFINITY, f64::min) >= of(0.).fold(0., f64::max), "{name}");
        }
        Ok(())
    }

    #[test]
    fn neutral_settings_leave_the_weights_bit_for_bit() -> Result<()> {
        check_untouched("antidote", &json!({ "ratio": 0.0 }))
    }
}
