//! What a defense sees before the first and after the last step of a stage.

use crate::defense::ancestry::Ancestry;
use crate::defense::stage::Clock;
use crate::defense::step_context::StepCx;
use crate::defense::streams::Streams;
use crate::model::architecture::Model;
use crate::rng::Seed;
use crate::weights::parameters::Weights;

/// What a defense sees in [`begin`](crate::AlignmentDefense::begin) and
/// [`finish`](crate::AlignmentDefense::finish): the weights may be changed here.
#[derive(Debug)]
pub struct StageCx<'a> {
    /// The architecture.
    pub model: &'a dyn Model,
    /// The weights under training.
    pub weights: &'a mut Weights,
    /// The declared streams.
    pub streams: &'a mut Streams,
    /// The stage's seed.
    pub seed: Seed,
    /// Where the stage stands.
    pub clock: Clock,
    /// The models that the weights come from.
    pub ancestry: &'a dyn Ancestry,
}

impl StageCx<'_> {
    /// The verbs of a step, for passes outside the loop.
    pub fn step(&mut self) -> StepCx<'_> {
        StepCx::new(self.model, self.weights, self.streams, self.seed.named("stage"), self.clock)
    }
}
