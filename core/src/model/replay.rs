//! Running blocks again in the backward pass: gradient checkpointing.

use candle_core::Tensor;

use crate::error::Result;
use crate::model::architecture::Model;
use crate::nn::forward::BlockContext;
use crate::tensor::tape::{Replay, Tape, TapeGradients, Traced};

/// The backward pass of one forward pass, whose blocks run again if they kept nothing but their input.
pub(crate) fn run_back(
    model: &dyn Model,
    tape: Tape,
    blocks: &BlockContext,
    seeds: Vec<(Traced, Tensor)>,
) -> Result<TapeGradients> {
    tape.backward_with(seeds, &mut |replay, gradient| run_again(model, blocks, replay, gradient))
}

/// Runs a block again and then backwards.
fn run_again(model: &dyn Model, blocks: &BlockContext, replay: &Replay, gradient: Tensor) -> Result<TapeGradients> {
    let mut sites = blocks.sites();
    let mut pass = blocks.pass(&mut sites, replay.dropout.clone());
    let x = pass.tape.source(&replay.input);
    let y = model.block(replay.index, &x, &mut pass)?;
    pass.tape.backward(vec![(y, gradient)])
}
