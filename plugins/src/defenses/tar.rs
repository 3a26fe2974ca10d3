//! TAR: alignment that survives simulated attacks (Tamirisa et al.; ICLR 2025).

use candle_core::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use titer_core::data::Batch;
use titer_core::defense::toolkit::{Kept, check_strength, label_rows, log_softmax, wide};
use titer_core::model::sites_of_kind;
use titer_core::optim::{AdamW, AdamWConfig};
use titer_core::tensor::ops;
use titer_core::{
    AlignmentDefense, DefenseEntry, Error, Grads, Limits, Privilege, Quirk, Result, Scalar, SettingsType, Sites, Stage,
    StageCx, State, StepCx, Update, inventory, no_conflict,
};

inventory::submit! {
    DefenseEntry {
        name: "tar",
        summary: "attacks a copy of the weights within each step, and keeps harmful answers unlikely along the attack",
        paper: "Tamirisa et al.: Tamper-Resistant Safeguards for Open-Weight LLMs, ICLR 2025, arXiv:2408.00761",
        formula: "w_0 = w, w_{i+1} = AdamW(w_i, ∇h(w_i)),   g = λ Σ_{i ∈ tested} e^{γ (i − K)} ∇(−H(w_i)) + ∇f(w) \
                  + μ ∇ mean ‖s(w) − s(w_start)‖,   H the entropy on harmful answers, s the hidden states",
        stages: &[Stage::Align],
        streams: |_| &["harmful", "harmful_held_out"],
        sites: &["block_out"],
        passes: |settings| {
            let count = |key: &str| settings[key].as_u64().unwrap_or(1).max(1) as f64;
            let retain = if settings["retain"].as_f64() == Some(0.) { 1. } else { 2. };
            count("inner_steps") + (count("inner_steps") / count("test_every")).floor() + retain
        },
        privilege: Privilege {
            harmful_answers: true,
            needs: "harmful answers during alignment, to simulate the attack and to test it",
        },
        notes: "First order, as published. Its authors start from a randomly mapped model, train every parameter and \
                draw among several kinds of adversary; here the adversary is AdamW on the stream `harmful`, at a rate \
                drawn anew for each step, and is tested on the stream `harmful_held_out`. Its rates on an adapter are \
                ours. A port of it that other papers compare with writes its gradients to a place where no optimiser \
                looks: numbers of that port are plain fine-tuning.",
        quirks: &[Quirk {
            setting: "inner_learning_rates",
            published: || json!(FULL_RATES),
            what: "trains every parameter, and has rates for that alone",
        }],
        conflicts: no_conflict,
        limits,
        settings: SettingsType::of::<TarSettings>(),
        neutral: Some(|| json!({ "lambda": 0.0, "retain": 0.0, "inner_steps": 2, "test_every": 1 })),
        version: 2,
        build: |settings| {
            let settings: TarSettings = settings.parse()?;
            settings.check()?;
            Ok(Box::new(Tar { settings, kept: Kept::default() }))
        },
    }
}

fn limits(settings: &Value) -> Limits {
    Limits {
        checkpointing: (settings["retain"] != 0.).then_some("its loss reads activations inside the blocks"),
        accumulation: (settings["lambda"] != 0.).then_some("each micro batch simulates an attack of its own"),
    }
}

/// The learning rates of an attack on all parameters: the published ones.
const FULL_RATES: [f64; 3] = [2e-6, 2e-5, 4e-5];
/// Those of an attack on an adapter: ours, ten times the published ones. On the embedded world's aligned model, 64 steps at
/// the published rates take the harmful loss from 0.74 to 0.72, 0.57 and 0.41 if all parameters are trained, but to 0.73,
/// 0.65 and 0.56 on an adapter; at ten times these to 0.65, 0.24 and 0.22.
const LORA_RATES: [f64; 3] = [2e-5, 2e-4, 4e-4];

/// The settings.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct TarSettings {
    /// K: steps of the simulated attack.
    pub inner_steps: usize,
    /// The attacked weights are tested after every so many steps of the attack.
    pub test_every: usize,
    /// The learning rates that an attack draws from. If absent, the published 2e-6, 2e-5 and 4e-5 where all parameters
    /// are trained, and ten times as much where an adapter is, on which the published rates attack much less.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub inner_learning_rates: Option<Vec<f64>>,
    /// λ: the weight of tamper resistance.
    pub lambda: f64,
    /// γ: how much more a later test counts: after step i by `e^{γ (i − K)}`; 0 for equal weights.
    pub gamma: f64,
    /// μ: the weight of keeping hidden states on safe data where they were before alignment.
    pub retain: f64,
}

impl Default for TarSettings {
    fn default() -> Self {
        Self { inner_steps: 64, test_every: 4, inner_learning_rates: None, lambda: 4., gamma: 0.0625, retain: 1. }
    }
}

impl TarSettings {
    fn check(&self) -> Result<()> {
        for (key, strength) in [("lambda", self.lambda), ("gamma", self.gamma), ("retain", self.retain)] {
            check_strength(key, strength)?;
        }
        if self.test_every == 0 || self.inner_steps < self.test_every {
            let message = format!("`test_every` is {} and `inner_steps` {}", self.test_every, self.inner_steps);
            return Err(Error::config(format!("{message}: the attack would never be tested"))
                .key("test_every")
                .help("let it lie between 1 and `inner_steps`"));
        }
        let rates = self.inner_learning_rates.as_ref();
        if rates.is_some_and(|rates| rates.is_empty() || !rates.iter().all(|rate| *rate > 0. && rate.is_finite())) {
            let message = "`inner_learning_rates` must hold at least one rate, all finite and above 0";
            return Err(Error::config(message)
                .key("inner_learning_rates")
                .help("leave it out for rates that fit what is trained"));
        }
        Ok(())
    }
}

impl TarSettings {
    /// The rates that an attack draws from: on an adapter, or on all parameters.
    fn rates(&self, adapter: bool) -> &[f64] {
        self.inner_learning_rates.as_deref().unwrap_or(if adapter { &LORA_RATES } else { &FULL_RATES })
    }
}

/// The defense.
#[derive(Debug)]
pub struct Tar {
    settings: TarSettings,
    /// `start`: the trained parameters before alignment.
    kept: Kept,
}

/// What one simulated attack gave.
struct Attack {
    /// Its learning rate.
    rate: f64,
    /// The weighted gradients of the tests along it.
    resistance: Grads,
    /// The entropy at its end.
    entropy: Scalar,
}

impl Tar {
    /// Simulates an attack.
    fn resist(&self, cx: &mut StepCx) -> Result<Attack> {
        let TarSettings { inner_steps, test_every, gamma, .. } = self.settings;
        let rates = self.settings.rates(cx.weights().lora().is_some());
        let drawn = cx.noise("rate", &[rates.len()])?.to_vec1::<f32>()?;
        let rate = rates.iter().zip(drawn).max_by(|a, b| a.1.total_cmp(&b.1)).map_or(0., |(rate, _)| *rate);
        cx.scratch(|attacked| {
            let mut adversary = AdamW::new(AdamWConfig { weight_decay: 0., ..AdamWConfig::default() });
            let (mut sum, mut last) = (Grads::default(), Scalar::from(0.));
            for step in 1..=inner_steps {
                let batch = attacked.next("harmful")?;
                let attack = attacked.backward(&batch, Sites::none())?;
                adversary.step(attacked.weights(), &attack.grads, &Scalar::from(1.), rate)?;
                if step.is_multiple_of(test_every) {
                    let held_out = attacked.next("harmful_held_out")?;
                    let entropy = entropy(attacked, &held_out)?;
                    let grads = attacked.backward_loss(&entropy.neg()?)?;
                    let weight = libm::exp(gamma * (step as f64 - inner_steps as f64));
                    sum = sum.add_scaled(weight, &grads)?;
                    last = Scalar::of(&entropy)?;
                }
            }
            Ok(Attack { rate, resistance: sum, entropy: last })
        })
    }

    /// The update on safe data: the cross-entropy, and the distance of the hidden states to what they were.
    fn keep(&self, cx: &mut StepCx, batch: &Batch) -> Result<Update> {
        if self.settings.retain == 0. {
            return Ok(cx.backward(batch, Sites::none())?.into());
        }
        let sites = || sites_of_kind(cx.model(), "block_out");
        let (now, before) = (Sites::none().observe(sites()?), Sites::none().observe(sites()?));
        let start = cx.weights().at(self.kept.get("start")?);
        let (_, before) = cx.hidden_with(&start, &batch.tokens, before)?;
        let (hidden, now) = cx.hidden(&batch.tokens, now)?;
        let mut drift = Vec::with_capacity(now.len());
        for (site, state) in &now {
            let gap = wide(&(state - before[site].detach())?)?;
            // Not at zero, where the norm has no gradient.
            let norms = (ops::sum_last(&gap.sqr()?)? + 1e-12)?.sqrt()?;
            drift.push(ops::mean_all(&norms)?);
        }
        let drift = ops::mean_all(&Tensor::stack(&drift, 0)?)?;
        let retain = self.settings.retain * cx.token_weight();
        let loss = (cx.cross_entropy(&hidden, batch)? + (&drift * retain)?)?;
        let update = Update::new(cx.backward_loss(&loss)?, Scalar::of(&loss)?);
        Ok(update.with("drift", Scalar::of(&drift)?))
    }
}

/// The mean entropy, in nats, of the predictions at the labels of `batch`.
fn entropy(cx: &mut StepCx, batch: &Batch) -> Result<Tensor> {
    let (hidden, _) = cx.hidden(&batch.tokens, Sites::none())?;
    let logits = cx.logits(&label_rows(&hidden, batch)?)?;
    let log_probabilities = log_softmax(&logits, 1)?;
    Ok(ops::mean_all(&ops::sum_last(&(ops::exp(&log_probabilities)? * log_probabilities)?)?)?.neg()?)
}

impl AlignmentDefense for Tar {
    fn begin(&mut self, cx: &mut StageCx) -> Result<()> {
        self.kept.keep("start", cx.weights.snapshot()?);
        Ok(())
    }

    fn step(&mut self, cx: &mut StepCx, batch: &Batch) -> Result<Update> {
        let Attack { rate, resistance, entropy } = self.resist(cx)?;
        let kept = self.keep(cx, batch)?;
        let update = Update { grads: kept.grads.add_scaled(self.settings.lambda, &resistance)?, ..kept };
        Ok(update.with("entropy_attacked", entropy).with("attack_rate", rate))
    }

    fn loss_is_objective(&self) -> bool {
        false
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
    use titer_core::defense::{Clock, Streams};
    use titer_core::{Model, Weights};

    use super::*;
    use crate::testing::{begin, defense, three_rows, tiny, update};

    #[test]
    fn the_rates_of_an_attack_fit_what_is_trained() {
        let own = TarSettings { inner_learning_rates: Some(vec![1e-3]), ..TarSettings::default() };
        assert_eq!(TarSettings::default().rates(true), LORA_RATES);
        assert_eq!(TarSettings::default().rates(false), FULL_RATES);
        assert_eq!([own.rates(true), own.rates(false)], [[1e-3], [1e-3]]);
    }

    /// Simulated attacks train on one stream and are tested on another, at rates that fit what is trained.
    #[test]
    fn it_tests_its_attacks_on_rows_that_they_did_not_see() -> Result<()> {
        let (model, weights) = tiny(DType::F32, 0.)?;
        let mut full = weights.merged()?;
        full.train_full()?;
        for (mut weights, rates) in [(weights, [2e-5, 2e-4, 4e-4]), (full, [2e-6, 2e-5, 4e-5])] {
            let (rate, drawn) = attacked(model.as_ref(), &mut weights)?;
            assert!(rates.contains(&rate), "{rate} is none of {rates:?}");
            assert_eq!(drawn, [("harmful".to_owned(), 6), ("harmful_held_out".to_owned(), 3)]);
        }
        Ok(())
    }

    /// The rate of the first attack that TAR simulates, and the batches that it draws.
    fn attacked(model: &dyn Model, weights: &mut Weights) -> Result<(f64, Vec<(String, usize)>)> {
        let mut streams = Streams::default();
        for (seed, stream) in (30..).zip(["harmful", "harmful_held_out"]) {
            streams.insert(stream, Stream::of_batches(vec![three_rows(seed)?])?);
        }
        let mut tar = defense("tar", json!({ "inner_steps": 6, "test_every": 2 }))?;
        begin(tar.as_mut(), model, weights, &mut streams)?;
        let update = update(tar.as_mut(), model, weights, &mut streams, &three_rows(5)?, Clock::at(0, 10))?;
        Ok((update.scalars["attack_rate"].value()?, streams.drawn().into_iter().collect()))
    }
}
