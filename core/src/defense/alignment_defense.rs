//! The `AlignmentDefense` trait: how one update is made.

use std::collections::BTreeMap;
use std::fmt::Debug;

use candle_core::Tensor;
use serde_json::Value;

use crate::data::batch::Batch;
use crate::data::stream::Stream;
use crate::defense::stage_context::StageCx;
use crate::defense::step_context::StepCx;
use crate::defense::streams::Streams;
use crate::defense::update::Update;
use crate::error::Result;
use crate::nn::sites::Sites;
use crate::text::Template;

/// What a defense keeps between steps, for an exact resume: tensors and one JSON value.
#[derive(Debug, Clone, Default)]
pub struct State {
    /// Tensors by name.
    pub tensors: BTreeMap<String, Tensor>,
    /// Everything else.
    pub value: Value,
}

/// A defense against harmful fine-tuning.
///
/// It owns *how one update is made* and nothing else: not the loop, the optimiser, the schedule, logging or files. It
/// calls the engine through [`StepCx`]. Every method has a default, and the defaults together are plain supervised
/// fine-tuning.
pub trait AlignmentDefense: Debug + Send {
    /// The rows that the stage trains on, given its own and the declared streams: where a defense adds to the data.
    /// Called whenever the stage starts, also to go on after an interruption.
    ///
    /// # Errors
    /// A stream is missing.
    fn data(&self, own: Stream, _streams: &Streams) -> Result<Stream> {
        Ok(own)
    }

    /// The prompt template that the model is served with, given the one it was trained with: where a defense acts at
    /// inference.
    fn serving_template(&self, training: &Template) -> Template {
        training.clone()
    }

    /// Before the first step: a Fisher pass, a frozen reference, a snapshot.
    ///
    /// # Errors
    /// The preparation failed.
    fn begin(&mut self, _cx: &mut StageCx) -> Result<()> {
        Ok(())
    }

    /// One update for `batch`. It must leave the weights as it found them (law 1).
    ///
    /// # Errors
    /// A pass failed.
    fn step(&mut self, cx: &mut StepCx, batch: &Batch) -> Result<Update> {
        Ok(Update::from(cx.backward(batch, Sites::none())?))
    }

    /// Whether the gradients of an update are those of the loss that it logs, as a function of the weights: with the
    /// batches, the noise and all that the defense keeps held fixed. Law 4 is then checked against finite differences.
    /// `false` for an update that is a rule of its own, such as one that takes a perturbation for a constant.
    fn loss_is_objective(&self) -> bool {
        true
    }

    /// After the last step: prune, project, merge. Post-fine-tuning defenses live here; they may change the weights.
    ///
    /// # Errors
    /// The work failed.
    fn finish(&mut self, _cx: &mut StageCx) -> Result<()> {
        Ok(())
    }

    /// What an exact resume needs.
    fn state(&self) -> State {
        State::default()
    }

    /// Goes on from what [`AlignmentDefense::state`] gave.
    ///
    /// # Errors
    /// The state belongs to another defense.
    fn load_state(&mut self, _state: State) -> Result<()> {
        Ok(())
    }
}
