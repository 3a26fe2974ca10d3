//! How rotary frequencies are stretched for contexts longer than those of the pretraining.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use titer_core::{Error, Result};

/// `rope_scaling` of `config.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "rope_type", rename_all = "snake_case")]
pub enum RopeScaling {
    /// None.
    Default,
    /// Every frequency divided by `factor`.
    Linear {
        /// The factor.
        factor: f64,
    },
    /// Llama 3.1: low frequencies divided by `factor`, high ones kept, a smooth change between.
    Llama3 {
        /// The factor on low frequencies.
        factor: f64,
        /// Wavelengths above `original_max_position_embeddings / low_freq_factor` are low frequencies.
        low_freq_factor: f64,
        /// Wavelengths below `original_max_position_embeddings / high_freq_factor` are high frequencies.
        high_freq_factor: f64,
        /// Context length of the pretraining.
        original_max_position_embeddings: f64,
    },
}

impl RopeScaling {
    /// Fails on numbers that give no frequencies.
    pub(super) fn check(&self) -> Result<()> {
        let refuse = |key: &str, message: String, usual: &str| {
            Err(Error::config(message).key(format!("rope_scaling.{key}")).help(format!("{usual} is usual")))
        };
        let (factor, llama3) = match *self {
            RopeScaling::Default => return Ok(()),
            RopeScaling::Linear { factor } => (factor, None),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
                (factor, Some((low_freq_factor, high_freq_factor, original_max_position_embeddings)))
            }
        };
        if !(1e-6..=1e6).contains(&factor) {
            return refuse("factor", format!("`factor` must lie in [1e-6, 1e6], found `{factor}`"), "8");
        }
        let Some((low, high, context)) = llama3 else { return Ok(()) };
        if !(low > 0. && high > low && high.is_finite()) {
            let message =
                format!("`high_freq_factor` must be above `low_freq_factor` above 0, found `{high}` and `{low}`");
            return refuse("high_freq_factor", message, "4, with a low one of 1,");
        }
        if !(context >= 1. && context.is_finite()) {
            let message = format!("`original_max_position_embeddings` must be at least 1, found `{context}`");
            return refuse("original_max_position_embeddings", message, "8192");
        }
        Ok(())
    }

    /// What becomes of one frequency, in radians per position.
    pub fn apply(&self, frequency: f32) -> f32 {
        match *self {
            RopeScaling::Default => frequency,
            RopeScaling::Linear { factor } => frequency / factor as f32,
            RopeScaling::Llama3 {
                factor,
                low_freq_factor: low,
                high_freq_factor: high,
                original_max_position_embeddings: context,
            } => {
                let wavelength = std::f64::consts::TAU / f64::from(frequency);
                if wavelength < context / high {
                    frequency
                } else if wavelength > context / low {
                    frequency / factor as f32
                } else {
                    let smooth = ((context / wavelength - low) / (high - low)) as f32;
                    (1. - smooth) * frequency / factor as f32 + smooth * frequency
                }
            }
        }
    }
}

/// Brings the spellings of different library versions to one: `rope_parameters` (newer) to `rope_theta` and
/// `rope_scaling`, `type` (older) to `rope_type`; a null is a key left out. Of parameters by kind of block, those of blocks
/// with a window become `rope_local_base_freq`.
pub(super) fn normalise(config: &mut Value) {
    let Some(map) = config.as_object_mut() else { return };
    map.retain(|_, value| !value.is_null());
    if let Some(mut rope) = map.remove("rope_parameters") {
        if let Some(local) = rope["sliding_attention"]["rope_theta"].as_f64() {
            map.insert("rope_local_base_freq".into(), local.into());
        }
        if let Some(full) = rope.get_mut("full_attention") {
            rope = full.take();
        }
        for key in ["rope_theta", "partial_rotary_factor"] {
            if let Some(value) = rope.as_object_mut().and_then(|rope| rope.remove(key)) {
                map.insert(key.into(), value);
            }
        }
        map.insert("rope_scaling".into(), rope);
    }
    if let Some(rope) = map.get_mut("rope_scaling").and_then(Value::as_object_mut)
        && let Some(kind) = rope.remove("type")
    {
        rope.entry("rope_type").or_insert(kind);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn llama_3_scaling_keeps_high_frequencies_and_stretches_low_ones() {
        let scaling = RopeScaling::Llama3 {
            factor: 8.,
            low_freq_factor: 1.,
            high_freq_factor: 4.,
            original_max_position_embeddings: 8192.,
        };
        assert_eq!(scaling.apply(1.), 1.);
        assert_eq!(scaling.apply(1e-5), 1e-5 / 8.);
        let between = scaling.apply(0.0015);
        assert!(between < 0.0015 && between > 0.0015 / 8., "{between}");
    }
}
