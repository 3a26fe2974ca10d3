//! What each stage does. A placeholder until the engine arrives: every stage fails.

use std::path::PathBuf;

use candle_core::Device;
use titer_core::{Error, Result};

use crate::executor::{StageContext, StageRunner};
use crate::plan::PlannedStage;

/// Runs stages on one device.
#[derive(Debug)]
pub struct Stages {
    device: Device,
}

impl Stages {
    /// Stages on `device`.
    pub fn new(device: Device) -> Self {
        Self { device }
    }
}

impl StageRunner for Stages {
    fn run(&self, stage: &PlannedStage, _context: &StageContext) -> Result<()> {
        let device = titer_core::device::device_name(&self.device);
        Err(Error::run(format!("the engine is missing: cannot run `{}` on {device}", stage.label)))
    }
}

/// Prompts to continue with a model from a folder.
#[derive(Debug, Clone, PartialEq)]
pub struct Generation {
    /// The model's folder.
    pub model: PathBuf,
    /// The prompts.
    pub prompts: Vec<String>,
    /// The template they are put in.
    pub template: String,
    /// Longest answer.
    pub max_new_tokens: usize,
    /// 0 for greedy decoding.
    pub temperature: f64,
    /// Mass of the tokens to sample from.
    pub top_p: f64,
    /// Seed of sampling.
    pub seed: u64,
    /// Element type of the weights.
    pub dtype: String,
}

/// Answers to the prompts.
///
/// # Errors
/// The model cannot be loaded.
pub fn generate(request: &Generation, _device: &Device) -> Result<Vec<String>> {
    Err(Error::run("the engine is missing").file(&request.model))
}
