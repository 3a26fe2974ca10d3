//! T-Vaccine: Vaccine on the layers that matter to harmful data (Liu, Lin, Huang, Mo, Mu, Shen; 2024).

use candle_core::DType;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use titer_core::data::Batch;
use titer_core::defense::toolkit::{MicroBatches, check_strength};
use titer_core::model::sites_of_kind;
use titer_core::{
    AlignmentDefense, DefenseEntry, Error, Limits, Privilege, Quirk, Result, SettingsType, Sites, Stage, State, StepCx,
    Update, inventory, no_conflict,
};

use super::vaccine::Vaccine;

inventory::submit! {
    DefenseEntry {
        name: "t-vaccine",
        summary: "Vaccine on a few layers at a time, drawn by the norm of the gradient of harmful data at each",
        paper: "Liu, Lin, Huang, Mo, Mu, Shen: Targeted Vaccine: Safety Alignment for Large Language Models against \
                Harmful Fine-Tuning via Layer-wise Perturbation, 2024, arXiv:2410.09760",
        formula: "p_l = ‖∇_{e_l} h‖ / Σ_k ‖∇_{e_k} h‖,   A ~ S layers without replacement ∝ p,   \
                  ε_l = ρ ∇_{e_l} L / ‖(∇_{e_k} L)_{k ∈ A}‖ for l ∈ A and 0 otherwise,   g = ∇_w L(w; e + ε)",
        stages: &[Stage::Align],
        streams: |_| &["harmful"],
        sites: &["attn_out"],
        passes: |settings| 2. + 1. / settings["probe_every"].as_f64().unwrap_or(200.).max(1.),
        privilege: Privilege { harmful_answers: true, needs: "harmful answers during alignment, to weigh layers" },
        notes: "The attention adapters of layers that are not drawn are left alone until they are drawn; everything \
                else trains. The published script weighs the layers on a single harmful row, which is noisy: give the \
                stream `harmful` `batch_size = 1` to copy it.",
        quirks: &[
            Quirk {
                setting: "freeze_below",
                published: || json!(true),
                what: "leaves all layers below the lowest drawn one untrained, their MLPs included, since checkpointing \
                       cuts the graph there",
            },
            MicroBatches::QUIRK,
        ],
        conflicts: no_conflict,
        limits,
        settings: SettingsType::of::<TVaccineSettings>(),
        neutral: Some(|| json!({ "rho": 0.0, "layers": 1_000_000 })),
        version: 1,
        build: |settings| {
            let settings: TVaccineSettings = settings.parse()?;
            settings.check()?;
            Ok(Box::new(TVaccine { settings, probabilities: Vec::new(), active: Vec::new() }))
        },
    }
}

fn limits(settings: &Value) -> Limits {
    let norm = "the perturbation has one norm for each micro batch, and layers are weighed on the first";
    Limits { accumulation: MicroBatches::limit(settings).or(Some(norm)), ..Limits::default() }
}

/// The settings.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct TVaccineSettings {
    /// ρ: the L2 norm of the perturbation over the drawn layers and all tokens.
    pub rho: f64,
    /// S: how many layers are drawn; all of them, if the model has fewer.
    pub layers: usize,
    /// J: layers are drawn anew every J-th step.
    pub sample_every: usize,
    /// K: the chances of the layers are computed anew every K-th step.
    pub probe_every: usize,
    /// Whether layers below the lowest drawn one are not trained at all.
    pub freeze_below: bool,
    /// Which micro batches count under gradient accumulation: all, or the last one only.
    pub micro_batches: MicroBatches,
}

impl Default for TVaccineSettings {
    fn default() -> Self {
        Self {
            rho: 3.,
            layers: 8,
            sample_every: 20,
            probe_every: 200,
            freeze_below: false,
            micro_batches: MicroBatches::All,
        }
    }
}

impl TVaccineSettings {
    fn check(&self) -> Result<()> {
        check_strength("rho", self.rho)?;
        let counts = [("layers", self.layers), ("sample_every", self.sample_every), ("probe_every", self.probe_every)];
        match counts.into_iter().find(|(_, count)| *count == 0) {
            Some((key, _)) => Err(Error::config(format!("`{key}` must be at least 1, found `0`")).key(key)),
            None => Ok(()),
        }
    }
}

/// The defense.
#[derive(Debug)]
pub struct TVaccine {
    settings: TVaccineSettings,
    /// p, by layer.
    probabilities: Vec<f64>,
    /// A, ascending.
    active: Vec<usize>,
}

/// What a resume needs.
#[derive(Debug, Serialize, Deserialize)]
struct Chosen {
    probabilities: Vec<f64>,
    active: Vec<usize>,
}

impl TVaccine {
    /// Weighs the layers by the norms of the gradients of harmful data at their attention outputs.
    fn probe(&mut self, cx: &mut StepCx) -> Result<()> {
        let harmful = cx.next("harmful")?;
        let sites = sites_of_kind(cx.model(), "attn_out")?;
        let found = cx.site_gradients(&harmful, Sites::none().probe(sites.clone()))?.site_grads;
        let norm = |site: &String| found.clone().restrict(|name| name == site).norm()?.value();
        let norms = sites.iter().map(norm).collect::<Result<Vec<f64>>>()?;
        let total: f64 = norms.iter().sum();
        self.probabilities = norms.iter().map(|norm| norm / total).collect();
        Ok(())
    }

    /// Draws S layers without replacement, with the chances p: the winners of a race of exponential clocks of rates p
    /// are such a draw, and half the squared length of a standard normal pair is such a clock of rate 1.
    fn draw(&mut self, cx: &mut StepCx) -> Result<()> {
        let layers = self.probabilities.len();
        let clocks = cx.noise("layers", &[2, layers])?.to_dtype(DType::F64)?.sqr()?.sum(0)?.to_vec1::<f64>()?;
        let finish = |layer: usize| clocks[layer] / self.probabilities[layer];
        let mut order: Vec<usize> = (0..layers).collect();
        order.sort_by(|&a, &b| finish(a).total_cmp(&finish(b)));
        order.truncate(self.settings.layers);
        order.sort_unstable();
        self.active = order;
        Ok(())
    }

    /// Whether a parameter of `layer` trains while these layers are drawn.
    fn trains(&self, parameter: &str, layer: Option<usize>) -> bool {
        let Some(layer) = layer else { return true };
        let below = self.settings.freeze_below && self.active.first().is_some_and(|&lowest| layer < lowest);
        let idle = parameter.contains(".self_attn.") && !self.active.contains(&layer);
        !below && !idle
    }
}

impl AlignmentDefense for TVaccine {
    fn step(&mut self, cx: &mut StepCx, batch: &Batch) -> Result<Update> {
        let (clock, settings) = (cx.clock(), &self.settings);
        let (probe, draw) =
            (clock.step.is_multiple_of(settings.probe_every), clock.step.is_multiple_of(settings.sample_every));
        if probe && clock.micro == 0 {
            self.probe(cx)?;
        }
        if draw && clock.micro == 0 {
            self.draw(cx)?;
        }
        let sites = sites_of_kind(cx.model(), "attn_out")?;
        let active = self.active.iter().filter_map(|&layer| sites.get(layer).cloned());
        let vaccine = Vaccine { rho: self.settings.rho, ..Vaccine::default() };
        let update = vaccine.step_at(cx, batch, active.collect())?;
        let blocks = cx.weights().blocks();
        if blocks.is_empty() {
            return Err(Error::run(
                "the model does not say which parameters are in which block, so none can be frozen",
            )
            .help("declare the parameters of each block within `ParamList::block`"));
        }
        let grads = update.grads.restrict(|name| self.trains(name, blocks.get(name).copied()));
        let update = Update { grads, ..update };
        Ok(self.settings.micro_batches.keep(update, clock))
    }

    fn loss_is_objective(&self) -> bool {
        false
    }

    fn state(&self) -> State {
        let kept = Chosen { probabilities: self.probabilities.clone(), active: self.active.clone() };
        State { value: json!(kept), ..State::default() }
    }

    fn load_state(&mut self, state: State) -> Result<()> {
        let kept: Chosen = serde_json::from_value(state.value)
            .map_err(|error| Error::data("the state is not T-Vaccine's").source(error))?;
        (self.probabilities, self.active) = (kept.probabilities, kept.active);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use titer_core::data::Stream;
    use titer_core::defense::{Clock, Streams};

    use super::*;
    use crate::testing::{all_tiny, defense, three_rows, update};

    /// The attention of layers that are not drawn rests, and on request all that lies below those drawn.
    #[test]
    fn layers_that_are_not_drawn_rest() -> Result<()> {
        let mut seen = [0, 0];
        for (model, weights) in all_tiny(DType::F32, 0.)? {
            let blocks = weights.blocks();
            for (below, step) in [(false, 0), (false, 1), (true, 0), (true, 1), (true, 2), (true, 3)] {
                let mut streams = Streams::default();
                streams.insert("harmful", Stream::of_batches(vec![three_rows(6)?])?);
                let every_step = json!({ "layers": 1, "sample_every": 1, "probe_every": 1, "freeze_below": below });
                let (mut defense, user) = (defense("t-vaccine", every_step)?, three_rows(5)?);
                let clock = Clock::at(step, 10);
                let update = update(defense.as_mut(), model.as_ref(), &weights, &mut streams, &user, clock)?;
                let drawn = defense.state().value["active"][0].as_u64().expect("a layer") as usize;
                for name in weights.trainable().keys() {
                    let layer = blocks.get(name).copied();
                    let idle = name.contains("self_attn") && layer.is_some_and(|layer| layer != drawn);
                    let lower = layer.is_some_and(|layer| layer < drawn);
                    let rests = idle || (below && lower);
                    assert_eq!(update.grads.get(name).is_none(), rests, "{name} while layer {drawn} is drawn");
                    seen[0] += usize::from(idle);
                    seen[1] += usize::from(below && lower && !idle);
                }
            }
        }
        assert!(seen.iter().all(|&count| count > 0), "{seen:?}");
        Ok(())
    }
}
