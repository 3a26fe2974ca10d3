//! Low-rank adapters: their configuration and their factors.

use std::collections::BTreeMap;

use candle_core::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::schema::{ParamList, Role};
use crate::bounds::{self, at_most};
use crate::error::{Error, Result};

/// A low-rank adapter: `W + (alpha / r) · B A` with `A: [r, in]`, `B: [out, r]` (Hu et al. 2021).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct LoraConfig {
    /// The rank `r`.
    pub r: usize,
    /// The numerator of the scale `alpha / r`.
    pub alpha: f64,
    /// Probability of dropping an input of the adapter in training.
    pub dropout: f32,
    /// The linear layers to adapt, by the last part of their name; all of the model's but its head if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target_modules: Option<Vec<String>>,
}

impl Default for LoraConfig {
    /// The Vaccine repository's shape (r = 8 on every linear layer but the head), with the customary `alpha = 2 r`.
    fn default() -> Self {
        Self { r: 8, alpha: 16., dropout: 0., target_modules: None }
    }
}

impl LoraConfig {
    /// The factor on `B A`.
    pub fn scale(&self) -> f64 {
        self.alpha / self.r as f64
    }

    /// The same, its targets spelled out: those that were left to the model are the model's own. Published code has
    /// one list for all architectures, and on most of them trains less than it says.
    #[must_use]
    pub fn for_params(&self, params: &ParamList) -> Self {
        let all = || params.names_of(&[Role::Linear]).into_iter().map(str::to_owned).collect();
        Self { target_modules: Some(self.target_modules.clone().unwrap_or_else(all)), ..self.clone() }
    }

    /// Checks ranges.
    ///
    /// # Errors
    /// A rank of zero, a dropout outside `[0, 1)`, or no target.
    pub fn check(&self) -> Result<()> {
        if self.r == 0 {
            return Err(Error::config("`r` must be at least 1, found `0`").key("lora.r").help("8 is customary"));
        }
        at_most("lora.r", self.r, bounds::RANK)?;
        if !self.alpha.is_finite() {
            let message = format!("`alpha` must be a finite number, found `{}`", self.alpha);
            return Err(Error::config(message).key("lora.alpha").help("twice the rank is customary"));
        }
        if !(0. ..1.).contains(&self.dropout) {
            let message = format!("`dropout` must lie in [0, 1), found `{}`", self.dropout);
            return Err(Error::config(message).key("lora.dropout").help("0 for none"));
        }
        if self.target_modules.as_ref().is_some_and(Vec::is_empty) {
            return Err(Error::config("`target_modules` is empty: LoRA would train nothing")
                .key("lora.target_modules")
                .help("name layers such as `q_proj`, or leave the key out"));
        }
        Ok(())
    }
}

/// The two factors of one adapted layer.
#[derive(Debug, Clone)]
pub struct Adapter {
    /// `A: [r, in]`.
    pub a: Tensor,
    /// `B: [out, r]`.
    pub b: Tensor,
}

/// An attached adapter: the factors by the index of the parameter that they adapt.
#[derive(Debug, Clone)]
pub(super) struct Lora {
    pub(super) config: LoraConfig,
    pub(super) adapters: BTreeMap<usize, Adapter>,
}
