//! Representation noising: alignment that leaves nothing of harmful text in the representations (Rosati et al.;
//! NeurIPS 2024).

use candle_core::{DType, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use titer_core::data::{Batch, Tokens};
use titer_core::defense::toolkit::{check_strength, label_log_probabilities, wide};
use titer_core::model::sites_of_kind;
use titer_core::tensor::ops;
use titer_core::{
    AlignmentDefense, DefenseEntry, Limits, Privilege, Quirk, Result, Scalar, SettingsType, Sites, Stage, StepCx,
    Update, inventory, no_conflict,
};

inventory::submit! {
    DefenseEntry {
        name: "repnoise",
        summary: "turns the representations of harmful answers into noise, at every layer, while aligning",
        paper: "Rosati, Wehner, Williams, Bartoszcze, Atanasov, Gonzales, Majumdar, Maple, Sajjad, Rudzicz: \
                Representation Noising: A Defence Mechanism Against Harmful Finetuning, NeurIPS 2024, arXiv:2405.14577",
        formula: "L = f(w) + β 1/L Σ_l MMD(mlp_l(harmful), z_l) − α log( mean of CE(harmful) read out after each block ), \
                  z ~ N(0, I)",
        stages: &[Stage::Align],
        streams: |_| &["harmful"],
        sites: &["mlp_out", "block_out", "embed"],
        passes: |_| 2.,
        privilege: Privilege { harmful_answers: true, needs: "harmful answers during alignment" },
        notes: "The harmful term grows without bound as its logarithm's argument falls; its authors advise a search over \
                α and β. Published numbers of this method from other repositories come from a port with all quirks. The \
                original draws pairs of a harmful and a harmless answer to one prompt, to find the answers' tokens by \
                comparison; here labels say where the answers are, and any harmful rows will do.",
        quirks: &[
            Quirk {
                setting: "mask",
                published: || json!("differing_tokens"),
                what: "compares the tokens of a harmful and a harmless text at equal places and drops those that agree; \
                       their logits are set to zero but still count, and the token of id 0 never counts",
            },
            Quirk {
                setting: "readout",
                published: || json!("published"),
                what: "norms the last hidden state a second time, and divides the sum of L + 2 terms by L + 1 and adds 1 \
                       where the mean was meant",
            },
            Quirk {
                setting: "half_precision",
                published: || json!(true),
                what: "rounds hidden states to bf16 before they are read out, and the harmful labels too: token ids above \
                       256 become others",
            },
        ],
        conflicts: no_conflict,
        limits,
        settings: SettingsType::of::<RepNoise>(),
        neutral: Some(|| json!({ "alpha": 0.0, "beta": 0.0 })),
        version: 2,
        build: |settings| {
            let repnoise: RepNoise = settings.parse()?;
            check_strength("alpha", repnoise.alpha)?;
            check_strength("beta", repnoise.beta)?;
            Ok(Box::new(repnoise))
        },
    }
}

fn limits(settings: &Value) -> Limits {
    let active = settings["alpha"] != 0. || settings["beta"] != 0.;
    Limits {
        checkpointing: Some("its loss reads activations inside the blocks"),
        accumulation: active.then_some("the logarithm and the distance to noise are those of each micro batch"),
    }
}

/// Which tokens of the two texts count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Mask {
    /// Those of the answers.
    Answers,
    /// Those that differ from the other text's token at the same place.
    DifferingTokens,
}

/// How the losses after each block are put together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Readout {
    /// Their mean: each residual stream before a block, normed, and the model's own output.
    Mean,
    /// As the published code has it.
    Published,
}

/// The settings, and the defense.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct RepNoise {
    /// α: the weight of the gradient ascent on harmful answers.
    pub alpha: f64,
    /// β: the weight of the distance between representations and noise.
    pub beta: f64,
    /// Which tokens count: those of the answers, or those that differ from the other text's token at the same place.
    pub mask: Mask,
    /// How the losses after each block become one number: their mean, or as the published code has it.
    pub readout: Readout,
    /// Whether hidden states and harmful labels are rounded to bf16.
    pub half_precision: bool,
}

impl Default for RepNoise {
    fn default() -> Self {
        Self { alpha: 1., beta: 0.001, mask: Mask::Answers, readout: Readout::Mean, half_precision: false }
    }
}

impl RepNoise {
    /// The cross-entropy of `hidden`, the hidden states of `batch`, over the tokens that count. In the published form `mask`
    /// `[tokens, 1]` marks them, and rows are padded.
    fn loss(
        &self,
        cx: &mut StepCx,
        hidden: &Tensor,
        batch: &Batch,
        mask: Option<&Tensor>,
        round: bool,
    ) -> Result<Tensor> {
        match mask {
            None => cx.cross_entropy(hidden, batch),
            Some(mask) => masked_cross_entropy(cx, hidden, &batch.tokens, mask, round && self.half_precision),
        }
    }

    /// What the harmful answers cost after each block, in one number.
    fn harmful(&self, cx: &mut StepCx, states: &[Tensor], batch: &Batch, mask: Option<&Tensor>) -> Result<Tensor> {
        let (last, streams) = states.split_last().expect("a model has an output");
        let mut sum = self.loss(cx, last, batch, mask, true)?;
        let again = (self.readout == Readout::Published).then_some(last);
        for stream in streams.iter().chain(again) {
            let state = if self.half_precision { finish_in_half(cx, stream)? } else { cx.final_norm(stream)? };
            sum = (sum + self.loss(cx, &state, batch, mask, true)?)?;
        }
        let blocks = states.len() as f64;
        match self.readout {
            Readout::Mean => Ok((sum / blocks)?),
            Readout::Published => Ok(((sum / blocks)? + 1.)?),
        }
    }
}

/// `x` through bf16 and back.
fn rounded(x: &Tensor) -> Result<Tensor> {
    Ok(x.to_dtype(DType::BF16)?.to_dtype(x.dtype())?)
}

/// The final norm as it is taken of states in bf16: what goes in is rounded, and so is the normed state before the norm's
/// scale, which is what the norm makes of a vector of ones (of a root-mean-square norm, as the published code needs).
fn finish_in_half(cx: &mut StepCx, stream: &Tensor) -> Result<Tensor> {
    let scale = cx.final_norm(&stream.ones_like()?)?.detach();
    Ok((rounded(&(cx.final_norm(&rounded(stream)?)? / &scale)?)? * scale)?)
}

/// The published cross-entropy over next tokens: logits are zeroed where the predicting token is masked, labels where
/// the predicted one is, and a label of 0 does not count.
fn masked_cross_entropy(
    cx: &mut StepCx,
    hidden: &Tensor,
    tokens: &Tokens,
    mask: &Tensor,
    round: bool,
) -> Result<Tensor> {
    let (rows, length) = (tokens.lengths.len(), tokens.lengths[0]);
    let all_but_last = |x: &Tensor| -> Result<Tensor> {
        Ok(x.reshape((rows, length, ()))?.narrow(1, 0, length - 1)?.contiguous()?.flatten(0, 1)?)
    };
    let logits = cx.logits(&all_but_last(hidden)?)?.broadcast_mul(&all_but_last(mask)?)?;
    let labels = tokens.ids.to_dtype(DType::F32)?.mul(&mask.squeeze(1)?)?.reshape((rows, length))?;
    let labels = labels.narrow(1, 1, length - 1)?.flatten_all()?;
    let labels = if round { rounded(&labels)? } else { labels };
    let labels = labels.to_vec1::<f32>()?.into_iter().map(|label| label as u32);
    let (at, labels): (Vec<u32>, Vec<u32>) = (0..).zip(labels).filter(|(_, label)| *label != 0).unzip();
    // Rounded, a label may lie outside of the vocabulary.
    let (count, largest) = (labels.len(), labels.iter().copied().max().unwrap_or(0));
    let (at, labels) =
        (Tensor::from_vec(at, count, logits.device())?, Tensor::from_vec(labels, count, logits.device())?);
    let chosen = label_log_probabilities(&logits.index_select(&at, 0)?, &labels, largest)?;
    Ok(ops::mean_all(&chosen)?.neg()?)
}

/// Which tokens of `own`, padding included, differ from that of `other` at the same place, which is 0 beyond its end.
fn differing(own: &Tokens, other: &Tokens) -> Result<Vec<bool>> {
    let (ours, theirs) = (own.ids.to_vec1::<u32>()?, other.ids.to_vec1::<u32>()?);
    let others: Vec<&[u32]> = other.ranges().map(|row| &theirs[row]).collect();
    let id = |row: usize, at: usize| others.get(row).and_then(|row| row.get(at)).copied().unwrap_or(0);
    let rows = own.ranges().enumerate();
    Ok(rows
        .flat_map(|(row, range)| ours[range].iter().enumerate().map(move |(at, own)| (row, at, *own)))
        .map(|(row, at, own)| own != id(row, at))
        .collect())
}

/// Which tokens predict a label.
fn predicts_label(batch: &Batch) -> Result<Vec<bool>> {
    let mut counts = vec![false; batch.tokens.count()];
    for position in batch.positions.to_vec1::<u32>()? {
        counts[position as usize] = true;
    }
    Ok(counts)
}

/// The states `x` `[tokens, width]` of the tokens that count, row by row: `[rows, longest · width]`, zero at all others.
fn by_rows(x: &Tensor, tokens: &Tokens, counts: &[bool]) -> Result<Tensor> {
    let (longest, zero) = (tokens.lengths.iter().copied().max().unwrap_or(0), tokens.count());
    let index: Vec<u32> = tokens
        .ranges()
        .flat_map(|row| {
            (row.start..row.start + longest)
                .map(move |at| if row.contains(&at) && counts[at] { at } else { zero } as u32)
        })
        .collect();
    let zeros = Tensor::zeros((1, x.dim(1)?), x.dtype(), x.device())?;
    let index = Tensor::from_vec(index, tokens.lengths.len() * longest, x.device())?;
    Ok(Tensor::cat(&[x, &zeros], 0)?.index_select(&index, 0)?.reshape((tokens.lengths.len(), ()))?)
}

/// The maximum mean discrepancy of two samples `[n, d]` under the sum of five Gaussian kernels, whose widths are 1/4 to 4
/// times the mean squared distance.
fn discrepancy(x: &Tensor, y: &Tensor) -> Result<Tensor> {
    let n = x.dim(0)?;
    let all = Tensor::cat(&[x, y], 0)?;
    // Spread over columns by a product, whose backward pass sums in one order, unlike that of a broadcast.
    let squares = ops::matmul(&ops::sum_last(&all.sqr()?)?, &Tensor::ones((1, 2 * n), all.dtype(), all.device())?)?;
    let products = (ops::matmul(&all, &all.t()?)? * 2.)?;
    let distances = ((&squares + squares.t()?)? - products)?;
    let pairs = (4 * n * n - 2 * n) as f64;
    let width = (ops::sum_all(&distances.detach())? / (4. * pairs))?;
    let kernel = |power: i32| ops::exp(&distances.broadcast_div(&(&width * 2f64.powi(power))?)?.neg()?);
    let kernels = (0..5).map(kernel).collect::<Result<Vec<Tensor>>>()?;
    let kernel = Tensor::stack(&kernels, 0)?.sum(0)?;
    let block = |row: usize, column: usize| ops::mean_all(&kernel.narrow(0, row * n, n)?.narrow(1, column * n, n)?);
    Ok((((block(0, 0)? + block(1, 1)?)? - block(0, 1)?)? - block(1, 0)?)?)
}

impl AlignmentDefense for RepNoise {
    fn step(&mut self, cx: &mut StepCx, batch: &Batch) -> Result<Update> {
        let (harmful, weight) = cx.next_weighed("harmful")?;
        let published = self.mask == Mask::DifferingTokens;
        let [batch, harmful] =
            if published { [batch.padded(None)?, harmful.padded(None)?] } else { [batch.clone(), harmful] };
        let counts = if published { differing(&harmful.tokens, &batch.tokens)? } else { predicts_label(&harmful)? };
        let column = |counts: &[bool]| -> Result<Tensor> {
            let ones = counts.iter().map(|&counts| f32::from(u8::from(counts)));
            Ok(Tensor::from_iter(ones, batch.tokens.ids.device())?.unsqueeze(1)?)
        };
        let mask = if published { Some(column(&counts)?) } else { None };
        let safe_mask = if published { Some(column(&differing(&batch.tokens, &harmful.tokens)?)?) } else { None };

        let (hidden, _) = cx.hidden(&batch.tokens, Sites::none())?;
        let safe = self.loss(cx, &hidden, &batch, safe_mask.as_ref(), false)?;

        let (mlps, mut streams) = (sites_of_kind(cx.model(), "mlp_out")?, sites_of_kind(cx.model(), "block_out")?);
        streams.pop();
        streams.insert(0, "embed".to_owned());
        let sites = Sites::none().observe(mlps.iter().chain(&streams).cloned());
        let (hidden, observed) = cx.hidden(&harmful.tokens, sites)?;
        let mut states: Vec<Tensor> = streams.iter().map(|site| observed[site].clone()).collect();
        states.push(hidden);
        let ascent = self.harmful(cx, &states, &harmful, mask.as_ref())?;

        let mut noise = None;
        for site in &mlps {
            let x = wide(&observed[site])?;
            let z = cx.noise(site, x.dims())?.to_dtype(x.dtype())?;
            let [x, z] = [by_rows(&x, &harmful.tokens, &counts)?, by_rows(&z, &harmful.tokens, &counts)?];
            let distance = discrepancy(&x, &z)?;
            noise = Some(match noise {
                Some(sum) => (sum + distance)?,
                None => distance,
            });
        }
        let noise = (noise.expect("a model has layers") / mlps.len() as f64)?;
        let (alpha, beta) = (self.alpha * weight, self.beta * weight);
        let loss = ((&safe + (&noise * beta)?)? - (ops::ln(&ascent)? * alpha)?)?;
        let update = Update::new(cx.backward_loss(&loss)?, Scalar::of(&loss)?);
        Ok(update.with("safe_loss", Scalar::of(&safe)?).with("harmful_loss", Scalar::of(&ascent)?))
    }

    fn loss_is_objective(&self) -> bool {
        // The widths of the kernels follow the weights and count as constants.
        self.beta == 0.
    }
}
