//! What each kind of stage does: one file each. A stage reads its parent's artifact and writes its own folder.

mod answer;
pub mod context;
mod generate;
mod judge;
mod load;
mod post;
mod pretrain;
mod train;
pub mod train_loop;
mod watch;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use candle_core::Device;
use serde::Serialize;
use serde::de::DeserializeOwned;
use titer_core::data::Stream;
use titer_core::defense::{Ancestry, Streams};
use titer_core::device::parse_dtype;
use titer_core::rng::Seed;
use titer_core::text::{Encoder, Template, Tokenizer};
use titer_core::weights::checkpoint::Checkpoint;
use titer_core::{
    AlignmentDefense, DefenseEntry, Error, Result, Row, Settings, Stage, Task, TaskEntry, Weights, registry,
};

use crate::base_model::BaseModel;
use crate::disk;
use crate::experiment::config::Loaded;
use crate::experiment::spec::{AdapterSpec, EncodingSpec, PluginSpec, RowsSpec, StreamSpec};
use crate::plan::{Plan, PlannedStage, StageSpec};
use crate::stage::context::{StageContext, StageRunner};
use crate::stage::train_loop::Watch;
use crate::store::Key;

use watch::ContextWatch;

pub use answer::AnswerRecord;
pub use generate::{Generation, generate};
pub use judge::{JudgeRecord, read_answers};

/// Stored numbers of a stage, in every artifact.
pub const RECORD: &str = "record.json";
/// Every input of the stage, which its key is the hash of; in every artifact, for people.
const IDENTITY: &str = "identity.json";
/// Stored answers, one JSON object a line.
pub const ANSWERS: &str = "answers.jsonl";

/// The weights of an adapter, in PEFT's layout.
const ADAPTER: &str = "adapter_model.safetensors";

/// Where a stage writes, where it finds others' artifacts, and whom it tells.
#[expect(missing_debug_implementations, reason = "it holds closures and lives for one call")]
pub struct StageIo<'a> {
    /// The folder to write the artifact into.
    pub output: &'a Path,
    /// The artifact folder of a finished stage, verified.
    pub artifact: &'a dyn Fn(&str) -> Result<PathBuf>,
    /// Progress, checkpoints, the wish to stop.
    pub watch: &'a mut dyn Watch,
}

/// Runs the stages of one plan.
#[derive(Debug)]
pub struct Stages {
    by_key: BTreeMap<Key, PlannedStage>,
    /// Relative data paths start here: the configuration's folder.
    folder: PathBuf,
    device: Device,
    /// How often training keeps a checkpoint.
    checkpoint_every: Duration,
}

impl StageRunner for Stages {
    fn run(&self, stage: &PlannedStage, context: &StageContext) -> Result<()> {
        let artifact = |key: &str| Ok(context.artifact(&key.to_owned())?.verified()?.to_owned());
        let mut watch = ContextWatch::new(stage, context, self.checkpoint_every);
        let io = &mut StageIo { output: &context.folder, artifact: &artifact, watch: &mut watch };
        self.run(stage, io)
    }
}

impl Stages {
    /// The stages of `plan`, on `device`; relative data paths start at `folder`.
    pub fn new(plan: &Plan, folder: &Path, device: Device, checkpoint_every: Duration) -> Self {
        let by_key = plan.stages.iter().map(|stage| (stage.key.clone(), stage.clone())).collect();
        Self { by_key, folder: folder.to_owned(), device, checkpoint_every }
    }

    /// The stages of `plan`, which the configuration gave, on `device`.
    pub fn of(loaded: &Loaded, plan: &Plan, device: Device) -> Self {
        // Sub-zero or absurd values mean "at every step" and "never".
        let every = Duration::try_from_secs_f64(loaded.config.checkpoint_seconds.max(0.)).unwrap_or(Duration::MAX);
        Self::new(plan, loaded.source.folder(), device, every)
    }

    /// Runs one stage whose parent is done.
    ///
    /// # Errors
    /// The stage failed or was interrupted.
    pub fn run(&self, stage: &PlannedStage, io: &mut StageIo) -> Result<()> {
        let parent = || stage.parent.as_deref().ok_or_else(|| Error::run("the stage has no parent"));
        write_json(&io.output.join(IDENTITY), &stage.manifest)?;
        match &stage.spec {
            StageSpec::Pretrain(spec) => pretrain::run(self, spec, io),
            StageSpec::Load(spec) => load::run(self, spec, io),
            StageSpec::Train(spec) => train::run(self, spec, parent()?, io),
            StageSpec::Post(spec) => post::run(self, spec, parent()?, io),
            StageSpec::Answer(spec) => answer::run(self, spec, parent()?, io),
            StageSpec::Judge(spec) => judge::run(self, spec, parent()?, io),
        }
    }

    /// The model as a finished stage left it: its base, and its adapter attached.
    fn open(&self, key: &str, artifact: &dyn Fn(&str) -> Result<PathBuf>) -> Result<BaseModel> {
        let stage = self.by_key.get(key).ok_or_else(|| Error::run(format!("stage `{key}` is not part of the plan")))?;
        let parent = || {
            let parent = stage.parent.as_deref().ok_or_else(|| Error::run("the stage has no parent"))?;
            self.open(parent, artifact)
        };
        match &stage.spec {
            StageSpec::Pretrain(spec) => {
                let dtype = parse_dtype(&spec.dtype, &self.device)?;
                BaseModel::open(&artifact(key)?, Some(&spec.model.name), dtype, &self.device)
            }
            StageSpec::Load(spec) => {
                let dtype = parse_dtype(&spec.dtype, &self.device)?;
                BaseModel::open(&spec.path, Some(&spec.model), dtype, &self.device)
            }
            StageSpec::Train(spec) => self.apply(parent()?, &artifact(key)?, &spec.adapter),
            StageSpec::Post(_) => {
                let (parent, folder) = (parent()?, artifact(key)?);
                // A defense may have merged the adapter to change the base.
                let adapter = parent.weights.lora().filter(|_| folder.join(ADAPTER).exists()).cloned();
                self.apply(parent, &folder, &adapter.map_or(AdapterSpec::Full, AdapterSpec::Continue))
            }
            StageSpec::Answer(_) | StageSpec::Judge(_) => Err(Error::run("this stage holds answers, not a model")),
        }
    }

    /// The nearest stage, from `key` upwards, that `fits`.
    fn ancestor<'s>(&'s self, mut key: &'s str, fits: impl Fn(&StageSpec) -> bool) -> Option<&'s str> {
        loop {
            let stage = self.by_key.get(key)?;
            if fits(&stage.spec) {
                return Some(&stage.key);
            }
            key = stage.parent.as_deref()?;
        }
    }

    /// Puts a stage's stored weights on its parent's.
    fn apply(&self, mut parent: BaseModel, folder: &Path, adapter: &AdapterSpec) -> Result<BaseModel> {
        let attach = |parent: &mut BaseModel, config| {
            parent.weights.continue_lora(config, &mut Checkpoint::open(&folder.join(ADAPTER))?)
        };
        match adapter {
            AdapterSpec::Full => {
                let mut file = Checkpoint::open(&folder.join("model.safetensors"))?;
                let dtype = parent.weights.precision();
                parent.weights = titer_core::Weights::load(parent.model.params(), &mut file, dtype, &self.device)?;
            }
            AdapterSpec::Fresh(config) => {
                parent.weights.merge()?;
                attach(&mut parent, config)?;
            }
            AdapterSpec::Continue(config) => {
                parent.weights.discard_adapter();
                attach(&mut parent, config)?;
            }
        }
        Ok(parent)
    }

    fn task(&self, spec: &PluginSpec) -> Result<Box<dyn Task>> {
        let entry = registry::find::<TaskEntry>(&spec.name)?;
        (entry.build)(&settings(spec), &self.folder)
    }

    /// Training rows in the order of `seed`.
    fn train_rows(&self, spec: &RowsSpec, seed: Seed) -> Result<Vec<Row>> {
        self.task(&spec.task)?.train(spec.rows, seed.named("rows").named(&spec.task.name))
    }

    /// The defense's extra streams.
    fn streams(&self, specs: &[StreamSpec], encoder: &Encoder, batch_size: usize, seed: Seed) -> Result<Streams> {
        let mut streams = Streams::default();
        for StreamSpec { name, rows, batch_size: own } in specs {
            let seed = seed.named("stream").named(name);
            let examples = encoder.examples(&self.train_rows(rows, seed)?).map_err(|error| error.at("stream", name))?;
            let batch_size = own.unwrap_or(batch_size);
            streams.insert(name, Stream::new(examples.into(), batch_size, 1, seed, encoder.tokenizer.pad)?);
        }
        Ok(streams)
    }
}

/// The models that the artifact of a stage comes from.
struct Lineage<'a> {
    stages: &'a Stages,
    /// The stage itself, or its parent while it runs.
    key: &'a str,
    artifact: &'a dyn Fn(&str) -> Result<PathBuf>,
}

impl std::fmt::Debug for Lineage<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Lineage").field("key", &self.key).finish_non_exhaustive()
    }
}

impl Lineage<'_> {
    fn open(&self, what: &str, fits: impl Fn(&StageSpec) -> bool) -> Result<Weights> {
        let key = self.stages.ancestor(self.key, fits).ok_or_else(|| {
            Error::run(format!("the defense compares with the {what} model, and this method has none"))
                .help("give the method an alignment defense, such as `sft`")
        })?;
        Ok(self.stages.open(key, self.artifact)?.weights)
    }
}

impl Ancestry for Lineage<'_> {
    fn base(&self) -> Result<Weights> {
        self.open("base", |spec| matches!(spec, StageSpec::Pretrain(_) | StageSpec::Load(_)))
    }

    fn aligned(&self) -> Result<Weights> {
        self.open("aligned", |spec| matches!(spec, StageSpec::Train(spec) if spec.phase == Stage::Align))
    }
}

fn settings(spec: &PluginSpec) -> Settings {
    Settings::from(spec.settings.as_object().cloned().unwrap_or_default())
}

fn defense(spec: &PluginSpec) -> Result<Box<dyn AlignmentDefense>> {
    (registry::find::<DefenseEntry>(&spec.name)?.build)(&settings(spec))
}

fn encoder(spec: &EncodingSpec, tokenizer: &Tokenizer) -> Encoder {
    Encoder { tokenizer: tokenizer.clone(), template: Template::new(&spec.template), max_length: spec.max_length }
}

/// Writes a value as JSON.
fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let text = serde_json::to_vec(value).map_err(|error| Error::run("cannot serialise").source(error))?;
    disk::write(path, &text)
}

/// Reads a value that a stage wrote.
///
/// # Errors
/// The file is missing or damaged.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    serde_json::from_slice(&disk::read(path)?).map_err(|error| {
        Error::data(format!("`{}` is damaged", path.display()))
            .file(path)
            .source(error)
            .help("delete the stage's folder in the store and run again")
    })
}
