//! Settings that several defenses have, and checks of their ranges.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::defense::entry::Quirk;
use crate::defense::stage::Clock;
use crate::defense::update::Update;
use crate::error::{Error, Result};
use crate::tensor::grads::Grads;

/// Which micro batches of an update count under gradient accumulation.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum MicroBatches {
    /// All of them.
    #[default]
    All,
    /// The last one only.
    Last,
}

impl MicroBatches {
    /// The published trainers of several passes per step keep the last micro batch only.
    pub const QUIRK: Quirk = Quirk {
        setting: "micro_batches",
        published: || json!("last"),
        what: "clears the gradients between its passes, and with them those of the earlier micro batches",
    };

    /// Why accumulated batches are not one large batch under these settings, if by this one.
    pub fn limit(settings: &Value) -> Option<&'static str> {
        (settings["micro_batches"] == "last").then_some("the last micro batch alone counts")
    }

    /// `update` with the gradients that count.
    #[must_use]
    pub fn keep(self, update: Update, clock: Clock) -> Update {
        if self == Self::Last && !clock.last_micro() {
            return Update { grads: Grads::default(), ..update };
        }
        update
    }
}

/// How many numbers become one.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Reduction {
    /// Their mean.
    #[default]
    Mean,
    /// Their sum.
    Sum,
}

impl Reduction {
    /// The factor on a sum over `count` numbers.
    pub fn share(self, count: usize) -> f64 {
        match self {
            Self::Mean => 1. / count as f64,
            Self::Sum => 1.,
        }
    }
}

/// Fails unless the setting `key` is a finite number of at least 0.
///
/// # Errors
/// It is not.
pub fn check_strength(key: &str, value: f64) -> Result<()> {
    if value.is_finite() && value >= 0. {
        return Ok(());
    }
    let error = Error::config(format!("`{key}` must be at least 0, found `{value}`"));
    Err(error.key(key).help("0 switches it off"))
}

/// Fails unless the setting `key` lies in `[0, 1]`.
///
/// # Errors
/// It does not.
pub fn check_fraction(key: &str, value: f64) -> Result<()> {
    if (0. ..=1.).contains(&value) {
        return Ok(());
    }
    let error = Error::config(format!("`{key}` must lie in [0, 1], found `{value}`"));
    Err(error.key(key).help("0 switches it off, 0.1 is one in ten"))
}
