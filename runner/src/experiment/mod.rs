//! From the file that the user writes to an experiment in which nothing is left to look up.

pub mod axes;
pub mod config;
mod exclusive;
pub mod layers;
pub mod resolve;
pub(crate) mod schema;
pub mod spec;

use titer_core::event::Sink;
use titer_core::report::{HubFiles, Input};
use titer_core::text::Template;
use titer_core::{AlignmentDefense, Limits, Result};

use crate::{disk, hub, inputs};
use config::FineTuneMode;
use spec::{AdapterSpec, EncodingSpec, LoadSpec, OptimSpec, PluginSpec, PretrainSpec, RowsSpec, Runtime, StreamSpec};

/// A configuration with everything looked up.
#[derive(Debug)]
pub struct Experiment {
    /// The name.
    pub name: String,
    /// Seeds of everything after the base.
    pub seeds: Vec<u64>,
    /// The bases.
    pub bases: Vec<Base>,
    /// The registered model.
    pub model: String,
    /// Text to tokens.
    pub encoding: EncodingSpec,
    /// The alignment stage, if the configuration has one.
    pub align: Option<Align>,
    /// The fine-tuning stage.
    pub fine_tune: FineTune,
    /// The methods.
    pub methods: Vec<Method>,
    /// Prompts that judges look at: `harmful`, `benign`.
    pub probes: Vec<Probe>,
    /// The judges, the headline one first.
    pub judges: Vec<PluginSpec>,
    /// Prompts per batch of generation.
    pub batch_size: usize,
    /// What decides the rounding: see [`titer_core::arithmetic`].
    pub arithmetic: String,
    /// What running it needs.
    pub runtime: Runtime,
    /// Every file that was read, with its hash.
    pub inputs: Vec<Input>,
    /// Data sets of the hub that were read.
    pub hub_data: Vec<HubFiles>,
}

impl Experiment {
    /// Downloads the weights of a base model of the hub, now that no mistake stands against using them. They then count as
    /// those of a folder do, by their content.
    ///
    /// # Errors
    /// They cannot be downloaded or read.
    pub fn fetch_weights(&mut self, sink: &dyn Sink) -> Result<()> {
        for base in &mut self.bases {
            let Base::Load(spec) = base else { continue };
            let Some(model) = &spec.hub else { continue };
            hub::fetch_weights(model, sink)?;
            spec.content = inputs::content(&spec.files()?, |file| {
                let blake3 = disk::hash(file)?;
                self.inputs.push(Input { path: file.display().to_string(), blake3: blake3.clone() });
                Ok(blake3)
            })?;
        }
        self.inputs.sort();
        Ok(())
    }
}

/// A base model.
#[derive(Debug, Clone)]
pub enum Base {
    /// A checkpoint folder.
    Load(LoadSpec),
    /// One pretrained here.
    Pretrain(PretrainSpec),
}

impl Base {
    /// The seed that it is pretrained with; a checkpoint has none.
    pub fn seed(&self) -> Option<u64> {
        match self {
            Base::Load(_) => None,
            Base::Pretrain(spec) => Some(spec.seed),
        }
    }
}

/// The alignment stage, without its defense.
#[derive(Debug, Clone)]
pub struct Align {
    /// The rows.
    pub data: Vec<RowsSpec>,
    /// What is trained.
    pub adapter: AdapterSpec,
    /// How.
    pub optim: OptimSpec,
}

/// The fine-tuning stage, without its defense and without what is swept over.
#[derive(Debug, Clone)]
pub struct FineTune {
    /// The users' tasks.
    pub tasks: Vec<UserRows>,
    /// Row counts to sweep over.
    pub samples: Vec<usize>,
    /// The source of harmful rows; its `rows` are those that the largest mixture needs.
    pub harmful: Option<RowsSpec>,
    /// Their shares.
    pub ratios: Vec<f64>,
    /// Peak learning rates.
    pub learning_rates: Vec<f64>,
    /// What is trained.
    pub mode: FineTuneMode,
    /// The adapter of that mode.
    pub adapter: AdapterSpec,
    /// Rows whose loss is tracked.
    pub monitor: Option<RowsSpec>,
    /// How; the learning rate is that of the sweep.
    pub optim: OptimSpec,
}

/// A user's task.
#[derive(Debug, Clone)]
pub struct UserRows {
    /// Its name in the table.
    pub name: String,
    /// Its test prompts; training rows are of the same task.
    pub probe: Probe,
    /// What it is answered with; empty for open answers.
    pub labels: Vec<String>,
}

/// Prompts and how they are answered.
#[derive(Debug, Clone)]
pub struct Probe {
    /// `harmful`, `benign` or `task`.
    pub name: &'static str,
    /// The prompts.
    pub prompts: RowsSpec,
    /// The hash of the prompts themselves.
    pub prompts_content: String,
    /// Longest answer.
    pub max_new_tokens: usize,
}

/// A method.
#[derive(Debug)]
pub struct Method {
    /// The name in the table.
    pub name: String,
    /// The alignment defense; `None` for an attack straight on the base.
    pub align: Option<Defense>,
    /// Updates of its alignment, if not those of all methods.
    pub align_steps: Option<usize>,
    /// The fine-tuning defense.
    pub fine_tune: Defense,
    /// The post-fine-tuning defense.
    pub post: Option<Defense>,
    /// What a reader must know about their combination.
    pub notes: Vec<String>,
}

impl Method {
    /// The template that the final model is served with, given the one it was trained with.
    pub fn serving_template(&self, training: &Template) -> Template {
        let defenses = [self.align.as_ref(), Some(&self.fine_tune), self.post.as_ref()].into_iter().flatten();
        defenses.fold(training.clone(), |template, defense| defense.built.serving_template(&template))
    }
}

/// A defense and the streams it draws from.
#[derive(Debug)]
pub struct Defense {
    /// The defense.
    pub spec: PluginSpec,
    /// The same, built: to ask it what the plan depends on.
    pub built: Box<dyn AlignmentDefense>,
    /// Its streams.
    pub streams: Vec<StreamSpec>,
    /// Passes per step with these settings.
    pub passes: f64,
    /// What it does not go with in training, with these settings.
    pub limits: Limits,
}
