//! Named activation points inside a model: observe them, read the gradient there, or add an offset.
//!
//! A model calls [`Sites::visit`] at each of its points. Names are `embed`, `layer.{i}.attn_out` (the attention
//! block's output after its output projection, before the residual sum), `layer.{i}.mlp_out` (likewise for the MLP)
//! and `layer.{i}.block_out` (after both residual sums).

use std::collections::{BTreeMap, BTreeSet};

use candle_core::{Tensor, Var};

use crate::{Error, Result};

/// What a pass does at each named site. The default does nothing anywhere.
#[derive(Debug, Default)]
pub struct Sites {
    observe: BTreeSet<String>,
    probe: BTreeSet<String>,
    add: BTreeMap<String, Tensor>,
    probes: BTreeMap<String, Var>,
    observed: BTreeMap<String, Tensor>,
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
    ///
    /// Candle keeps no gradient of an intermediate tensor; a zero variable added there has the same one.
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
    pub fn visit(&mut self, name: &str, value: Tensor) -> Result<Tensor> {
        if self.is_idle() {
            return Ok(value);
        }
        self.visited.insert(name.to_owned());
        let mut value = value;
        if let Some(offset) = self.add.get(name) {
            value = (&value + offset.to_dtype(value.dtype())?)?;
        }
        if self.probe.contains(name) {
            let probe = Var::zeros(value.shape(), value.dtype(), value.device())?;
            value = (&value + probe.as_tensor())?;
            self.probes.insert(name.to_owned(), probe);
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

    /// The variables whose gradients are the site gradients, after the forward pass.
    pub(crate) fn probes(&self) -> &BTreeMap<String, Var> {
        &self.probes
    }

    /// The activations that were asked for.
    pub fn into_observed(self) -> BTreeMap<String, Tensor> {
        self.observed
    }

    /// Fails if a site was asked for that the model never visited: a defense that perturbs nothing must not pass
    /// for one that does.
    ///
    /// # Errors
    /// A requested site was not visited.
    pub fn check_visited(&self) -> Result<()> {
        let asked = self.observe.iter().chain(&self.probe).chain(self.add.keys());
        match asked.into_iter().find(|site| !self.visited.contains(*site)) {
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
        let mut sites = Sites::none().probe(["a"]).observe(["a"]).add([("a".to_owned(), offset)]);
        let y = sites.visit("a", x)?.sqr()?.sum_all()?;
        let grads = y.backward()?;
        let gradient = grads.get(&sites.probes()["a"]).expect("a gradient").to_vec1::<f32>()?;
        assert_eq!(gradient, [3., 4., 6.]);
        sites.check_visited()?;
        assert_eq!(sites.into_observed()["a"].to_vec1::<f32>()?, [1.5, 2., 3.]);
        Ok(())
    }

    #[test]
    fn a_site_that_does_not_exist_is_an_error() -> Result<()> {
        let mut sites = Sites::none().probe(["layer.0.attn_out", "layer.9.attn_out"]);
        sites.visit("layer.0.attn_out", Tensor::zeros(1, DType::F32, &Device::Cpu)?)?;
        let error = sites.check_visited().expect_err("layer 9 was never visited");
        assert!(error.to_string().contains("no site `layer.9.attn_out`"), "{error}");
        Ok(())
    }
}
