//! What a pass gives, and what a step asks the train loop to apply.

use std::collections::BTreeMap;

use candle_core::Tensor;

use crate::data::batch::Batch;
use crate::error::{Error, Result};
use crate::tensor::grads::Grads;
use crate::tensor::scalar::Scalar;

/// What one forward-and-backward pass gave.
#[derive(Debug)]
pub struct Pass {
    /// The mean cross-entropy over the batch's labels, in nats.
    pub loss: Scalar,
    /// The gradient of each trained parameter that the loss reaches.
    pub grads: Grads,
    /// The gradient at each probed site.
    pub site_grads: Grads,
    /// The activation of each observed site.
    pub observed: BTreeMap<String, Tensor>,
}

/// What a step asks the train loop to apply.
///
/// ```
/// # include!(concat!(env!("CARGO_MANIFEST_DIR"), "/doc/bigram.rs"));
/// # fn main() -> titer_core::Result<()> {
/// # use candle_core::{DType, Device};
/// # use titer_core::data::Batch;
/// # use titer_core::defense::{Clock, StepCx, Streams};
/// # use titer_core::rng::Seed;
/// # use titer_core::Weights;
/// #
/// # let model = Bigram::new(8, 4);
/// # let mut weights = Weights::random(model.params(), Seed::new(0), DType::F32, &Device::Cpu)?;
/// # weights.train_full()?;
/// # // One row; position 0 predicts token 5, position 1 token 2.
/// # let batch = Batch::with_labels(&[[1, 5]], [(0, 0, 5), (0, 1, 2)], 0, &Device::Cpu)?;
/// # let mut streams = Streams::default();
/// # let mut cx = StepCx::new(&model, &weights, &mut streams, Seed::new(1), Clock::at(0, 1));
/// # use titer_core::Sites;
/// use titer_core::Update;
///
/// // What a defense's `step` returns: gradients for the optimiser, the loss, and further numbers to log.
/// let pass = cx.backward(&batch, Sites::none())?;
/// let norm = pass.grads.norm()?;
/// let update = Update::from(pass).with("gradient_norm", norm);
/// assert!(update.scalars["gradient_norm"].value()? > 0.);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Update {
    /// The gradients for the optimiser. A parameter that is absent is left alone: no decay, no moment update.
    pub grads: Grads,
    /// The loss to log.
    pub loss: Scalar,
    /// Further numbers to log, by name.
    pub scalars: BTreeMap<&'static str, Scalar>,
}

impl Update {
    /// An update without further numbers.
    pub fn new(grads: Grads, loss: impl Into<Scalar>) -> Self {
        Self { grads, loss: loss.into(), scalars: BTreeMap::new() }
    }

    /// The update over the micro batches `batches`: the mean of their updates, each weighed by the labels of its batch.
    /// `step` makes that of the micro batch of this index. Numbers to log are the first one's.
    ///
    /// # Errors
    /// `step` failed, there is no batch, or two gradients of one name differ in shape.
    pub fn over(batches: &[Batch], mut step: impl FnMut(usize) -> Result<Self>) -> Result<Self> {
        let labels: usize = batches.iter().map(Batch::labels).sum();
        let mut sum: Option<Self> = None;
        for (micro, batch) in batches.iter().enumerate() {
            let update = step(micro)?.weighed(batch.labels() as f64 / labels as f64)?;
            sum = Some(match sum {
                None => update,
                Some(sum) => {
                    Self { grads: sum.grads.add_scaled(1., &update.grads)?, loss: sum.loss.plus(&update.loss)?, ..sum }
                }
            });
        }
        sum.ok_or_else(|| Error::config("`accumulate` must be at least 1").key("accumulate"))
    }

    /// The update with its gradients and its loss times `factor`.
    ///
    /// # Errors
    /// A tensor operation failed.
    pub fn weighed(self, factor: f64) -> Result<Self> {
        if factor == 1. {
            return Ok(self);
        }
        Ok(Self { grads: self.grads.scale(factor)?, loss: self.loss.affine(factor, 0.)?, ..self })
    }

    /// Adds a number to log.
    #[must_use]
    pub fn with(mut self, name: &'static str, value: impl Into<Scalar>) -> Self {
        self.scalars.insert(name, value.into());
        self
    }
}

impl From<Pass> for Update {
    fn from(pass: Pass) -> Self {
        Self::new(pass.grads, pass.loss)
    }
}
