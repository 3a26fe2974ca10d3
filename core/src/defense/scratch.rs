//! Weights that a step may move for a while.

use std::ops::{Deref, DerefMut};

use super::step_context::StepCx;
use crate::error::{Error, Result};
use crate::tensor::grads::Grads;

impl<'a> StepCx<'a> {
    /// Runs `work` with weights that it may move; afterwards they are as before, bit for bit, also after an error.
    ///
    /// # Errors
    /// What `work` returned, or the weights could not be restored.
    pub fn scratch<T>(&mut self, work: impl FnOnce(&mut Scratch<'_, 'a>) -> Result<T>) -> Result<T> {
        let mut scratch = Scratch { before: self.weights.snapshot()?, cx: self };
        let result = work(&mut scratch);
        scratch.restore()?;
        result
    }
}

/// Weights that may be moved for a while, inside [`StepCx::scratch`]; all the verbs of a step are at hand.
#[derive(Debug)]
pub struct Scratch<'s, 'a> {
    cx: &'s mut StepCx<'a>,
    before: Grads,
}

impl Scratch<'_, '_> {
    /// Moves the weights by `scale * direction`.
    ///
    /// # Errors
    /// The direction names a parameter that is not under training.
    pub fn shift(&mut self, direction: &Grads, scale: f64) -> Result<()> {
        self.cx.weights.shift(direction, scale)
    }

    /// Puts the weights back. Training must not go on from moved ones, so a failure here outweighs all others.
    fn restore(&self) -> Result<()> {
        self.cx.weights.set(&self.before).map_err(|error| {
            Error::run("the weights could not be put back after a scratch pass")
                .at("step", self.cx.clock.step.to_string())
                .source(error)
                .help("start the stage anew; its last checkpoint is sound")
        })
    }
}

impl<'a> Deref for Scratch<'_, 'a> {
    type Target = StepCx<'a>;

    fn deref(&self) -> &StepCx<'a> {
        self.cx
    }
}

impl<'a> DerefMut for Scratch<'_, 'a> {
    fn deref_mut(&mut self) -> &mut StepCx<'a> {
        self.cx
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Tensor};

    use super::*;
    use crate::defense::stage::Clock;
    use crate::defense::streams::Streams;
    use crate::error::Result;
    use crate::model::architecture::Model;
    use crate::nn::forward::Forward;
    use crate::nn::spec::ModelSpec;
    use crate::rng::Seed;
    use crate::tensor::tape::Traced;
    use crate::tensor::tokens::Tokens;
    use crate::weights::parameters::Weights;
    use crate::weights::schema::{Init, ParamList};

    /// One parameter and no computation.
    #[derive(Debug)]
    struct Parameter(ParamList, ModelSpec);

    impl Parameter {
        fn new() -> Self {
            let mut params = ParamList::default();
            params.tensor("w", &[2], Init::Ones);
            let (vocab_size, hidden_size, layers, kv_heads, head_dim, max_positions) = (1, 1, 0, 1, 1, 1);
            Self(params, ModelSpec { vocab_size, hidden_size, layers, kv_heads, head_dim, max_positions })
        }
    }

    impl Model for Parameter {
        fn spec(&self) -> &ModelSpec {
            &self.1
        }
        fn params(&self) -> &ParamList {
            &self.0
        }
        fn config(&self) -> serde_json::Value {
            serde_json::Value::Null
        }
        fn sites(&self) -> Vec<String> {
            Vec::new()
        }
        fn embed(&self, _: &Tokens, _: &mut Forward) -> Result<Traced> {
            Err(Error::run("it computes nothing"))
        }
        fn block(&self, _: usize, x: &Traced, _: &mut Forward) -> Result<Traced> {
            Ok(x.clone())
        }
        fn final_norm(&self, x: &Traced, _: &mut Forward) -> Result<Traced> {
            Ok(x.clone())
        }
        fn logits(&self, x: &Traced, _: &mut Forward) -> Result<Traced> {
            Ok(x.clone())
        }
    }

    #[test]
    fn a_step_fails_if_the_weights_cannot_be_put_back() -> Result<()> {
        let (model, mut streams) = (Parameter::new(), Streams::default());
        let mut weights = Weights::random(model.params(), Seed::new(0), DType::F32, &Device::Cpu)?;
        weights.train_full()?;
        let mut cx = StepCx::new(&model, &weights, &mut streams, Seed::new(0), Clock::at(3, 9));
        let moved = cx.weights().snapshot()?;
        for outcome in [Ok(1), Err(Error::run("the work failed"))] {
            let result = cx.scratch(|scratch| {
                scratch.shift(&moved, 1.)?;
                // A snapshot that does not fit stands for a device that fails.
                scratch.before = Grads::from_iter([("w".to_owned(), Tensor::zeros(3, DType::F32, &Device::Cpu)?)]);
                outcome
            });
            let error = result.expect_err("the weights stay moved").to_string();
            assert!(error.contains("could not be put back") && error.contains("step: 3"), "{error}");
        }
        Ok(())
    }
}
