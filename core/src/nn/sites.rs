//! Named activation points inside a model: observe them, read the gradient there, or add an offset.
//!
//! A model calls [`Sites::visit`] at each of its points. Names are `embed`, `layer.{i}.attn_out` (the attention
//! block's output after its output projection, before the residual sum), `layer.{i}.mlp_out` (likewise for the MLP)
//! and `layer.{i}.block_out` (after both residual sums).

use std::collections::{BTreeMap, BTreeSet};

use candle_core::Tensor;

use crate::error::{Error, Result};
use crate::tensor::elementwise::sum;
use crate::tensor::tape::{Tape, Traced};

/// What a pass does at each named site. The default does nothing anywhere.
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
/// use titer_core::Sites;
///
/// // The gradient at a site, and then a second pass with an offset of norm 0.1 along it: Vaccine's step.
/// let first = cx.backward(&batch, Sites::none().probe(["embed"]))?;
/// let direction = first.site_grads.normalized(0.1, 1e-12)?;
/// let offsets = direction.iter().map(|(site, offset)| (site.to_owned(), offset.clone()));
/// let second = cx.backward(&batch, Sites::none().add(offsets))?;
/// assert!(second.loss.value()? > first.loss.value()?);
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Default)]
pub struct Sites {
    observe: BTreeSet<String>,
    probe: BTreeSet<String>,
    add: BTreeMap<String, Tensor>,
    observed: BTreeMap<String, Traced>,
    visited: BTreeSet<String>,
}

impl Sites {
    /// Does nothing at any site.
    pub fn none() -> Self {
        Self::default()
    }

    /// Keeps the activation of each named site (attached to the graph, so a loss may use it).
    #[must_use]
    pub fn observe<S: Into<String>>(mut self, sites: impl IntoIterator<Item = S>) -> Self {
        self.observe.extend(sites.into_iter().map(Into::into));
        self
    }

    /// Reads the gradient of the loss with respect to each named site.
    #[must_use]
    pub fn probe<S: Into<String>>(mut self, sites: impl IntoIterator<Item = S>) -> Self {
        self.probe.extend(sites.into_iter().map(Into::into));
        self
    }

    /// Adds a constant offset to each named site. No gradient flows into the offset.
    #[must_use]
    #[expect(clippy::should_implement_trait, reason = "one of the three modes of a site: observe, probe, add")]
    pub fn add(mut self, offsets: impl IntoIterator<Item = (String, Tensor)>) -> Self {
        self.add.extend(offsets.into_iter().map(|(site, offset)| (site, offset.detach())));
        self
    }

    /// Called by the model with the activation `value` of the site `name`; returns the activation to go on with.
    ///
    /// # Errors
    /// An offset of another shape than the activation.
    pub fn visit(&mut self, name: &str, mut value: Traced, tape: &mut Tape) -> Result<Traced> {
        if self.is_idle() {
            return Ok(value);
        }
        self.visited.insert(name.to_owned());
        if let Some(offset) = self.add.get(name) {
            value = value.with_tensor(sum(value.tensor(), &offset.to_dtype(value.tensor().dtype())?)?);
        }
        if self.probe.contains(name) {
            value = tape.probe(name, &value);
        }
        if self.observe.contains(name) {
            self.observed.insert(name.to_owned(), value.clone());
        }
        Ok(value)
    }

    /// Whether there is nothing to do at any site.
    pub fn is_idle(&self) -> bool {
        self.observe.is_empty() && self.probe.is_empty() && self.add.is_empty()
    }

    /// Whether activations are to be kept.
    pub(crate) fn observes(&self) -> bool {
        !self.observe.is_empty()
    }

    /// Whether gradients are to be read.
    pub(crate) fn probes(&self) -> bool {
        !self.probe.is_empty()
    }

    /// What another pass over the same network does at each site: the same, from the start.
    pub(crate) fn again(&self) -> Self {
        Self { observe: self.observe.clone(), probe: self.probe.clone(), add: self.add.clone(), ..Self::default() }
    }

    /// The activations that were asked for.
    pub fn observed(&self) -> &BTreeMap<String, Traced> {
        &self.observed
    }

    /// Every site that something is to be done at; one may come up more than once.
    pub(crate) fn asked(&self) -> impl Iterator<Item = &String> {
        self.observe.iter().chain(&self.probe).chain(self.add.keys())
    }

    /// Fails if a site was asked for that the model never visited: a defense that perturbs nothing must not pass
    /// for one that does.
    ///
    /// # Errors
    /// A requested site was not visited.
    pub fn check_visited(&self) -> Result<()> {
        match self.asked().find(|site| !self.visited.contains(*site)) {
            Some(site) => {
                let seen: Vec<&str> = self.visited.iter().map(String::as_str).collect();
                Err(Error::run(format!("the model has no site `{site}`"))
                    .help(format!("sites of this model: {}", seen.join(", "))))
            }
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{DType, Device};

    #[test]
    fn probe_reads_the_gradient_and_add_shifts_the_value() -> Result<()> {
        let x = Tensor::new(&[1f32, 2., 3.], &Device::Cpu)?;
        let offset = Tensor::new(&[0.5f32, 0., 0.], &Device::Cpu)?;
        let mut tape = Tape::default();
        let mut sites = Sites::none().probe(["a"]).observe(["a"]).add([("a".to_owned(), offset)]);
        let value = sites.visit("a", Traced::constant(x), &mut tape)?;
        let y =
            crate::tensor::ops::swiglu(&mut tape, &Traced::constant(Tensor::full(20f32, 3, &Device::Cpu)?), &value)?;
        let seed = Tensor::new(&[1f32, 0.5, 0.25], &Device::Cpu)?;
        let gradients = tape.backward(vec![(y, seed)])?.into_probes();
        let gradient = gradients.get("a").expect("a gradient").to_vec1::<f32>()?;
        assert_eq!(gradient, [20., 10., 5.]);
        sites.check_visited()?;
        assert_eq!(sites.observed()["a"].tensor().to_vec1::<f32>()?, [1.5, 2., 3.]);
        Ok(())
    }

    #[test]
    fn a_site_that_does_not_exist_is_an_error() -> Result<()> {
        let mut sites = Sites::none().probe(["layer.0.attn_out", "layer.9.attn_out"]);
        let value = Traced::constant(Tensor::zeros(1, DType::F32, &Device::Cpu)?);
        sites.visit("layer.0.attn_out", value, &mut Tape::default())?;
        let error = sites.check_visited().expect_err("layer 9 was never visited");
        assert!(error.to_string().contains("no site `layer.9.attn_out`"), "{error}");
        Ok(())
    }
}
