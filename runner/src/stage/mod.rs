//! What each kind of stage does: one file each. A stage reads its parent's artifact and writes its own folder.

mod answer;
pub mod context;
mod export;
mod generate;
mod judge;
mod load;
mod post;
mod pretrain;
pub mod resident;
mod train;
pub mod train_loop;
mod watch;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use candle_core::Device;
use serde::Serialize;
use serde::de::DeserializeOwned;
use titer_core::data::Stream;
use titer_core::defense::{Ancestry, Streams};
use titer_core::device::{parse_dtype, restart_memory_peak};
use titer_core::rng::Seed;
use titer_core::text::{Encoder, Tokenizer};
use titer_core::weights::checkpoint::Checkpoint;
use titer_core::weights::peft::ADAPTER_WEIGHTS;
use titer_core::{
    AlignmentDefense, CausalLm, DefenseEntry, Error, Result, Row, Settings, Stage, Task, TaskEntry, Weights, registry,
};

use crate::disk;
use crate::experiment::spec::{AdapterSpec, EncodingSpec, LoadSpec, PluginSpec, RowsSpec, Runtime, StreamSpec};
use crate::inputs::UserFiles;
use crate::plan::{PlannedStage, StageSpec};
use crate::stage::context::{StageContext, StageRunner};
use crate::stage::train_loop::Watch;

use resident::Resident;
use watch::ContextWatch;

pub use answer::AnswerRecord;
pub use export::{ExportFormat, export};
pub use generate::{Generation, generate};
pub use judge::{JudgeRecord, read_answers};

/// Stored numbers of a stage, in every artifact.
pub const RECORD: &str = "record.json";
/// Every input of the stage, which its key is the hash of; in every artifact, for people.
const IDENTITY: &str = "identity.json";
/// The stage itself, with the key of its parent; in every artifact, so that a model can be taken out of the store alone.
const STAGE: &str = "stage.json";
/// Stored answers, one JSON object a line.
pub const ANSWERS: &str = "answers.jsonl";

/// All weights of a model, where a stage stores them whole.
const WEIGHTS: &str = "model.safetensors";

/// What a stage starts from, where it writes, and whom it tells.
#[expect(missing_debug_implementations, reason = "it holds closures and lives for one call")]
pub struct StageIo<'a> {
    /// The stages that it builds on: its parent first, the base last.
    pub ancestors: &'a [PlannedStage],
    /// The folder to write the artifact into.
    pub output: &'a Path,
    /// The artifact folder of a finished stage, verified.
    pub artifact: &'a dyn Fn(&str) -> Result<PathBuf>,
    /// The model that stays loaded.
    pub resident: &'a Resident,
    /// Progress, checkpoints, the wish to stop.
    pub watch: &'a mut dyn Watch,
}

impl<'a> StageIo<'a> {
    /// The models that the stage may start from.
    fn lineage<'s>(&self, stages: &'s Stages) -> Lineage<'s>
    where
        'a: 's,
    {
        Lineage { stages, ancestors: self.ancestors, artifact: self.artifact, resident: self.resident }
    }

    fn parent(&self) -> Result<&PlannedStage> {
        self.ancestors.first().ok_or_else(|| Error::run("the stage has no parent"))
    }
}

/// Runs stages.
#[derive(Debug)]
pub struct Stages {
    /// Relative data paths start here: the configuration's folder.
    folder: PathBuf,
    device: Device,
    /// How often training keeps a checkpoint.
    checkpoint_every: Duration,
    /// Data and checkpoints that stages have read.
    inputs: UserFiles,
}

impl StageRunner for Stages {
    fn run(&self, stage: &PlannedStage, context: &StageContext) -> Result<()> {
        let artifact = once(|key| Ok(context.artifact(&key.to_owned())?.verified()?.to_owned()));
        let (ancestors, output, resident) = (context.ancestors, &context.folder, context.resident);
        let watch = &mut ContextWatch::new(stage, context, self.checkpoint_every);
        self.run(stage, &mut StageIo { ancestors, output, artifact: &artifact, resident, watch })
    }
}

impl Stages {
    /// Runs the stages of plans with this runtime on `device`.
    pub fn new(runtime: &Runtime, device: Device) -> Self {
        let checkpoint_every = runtime.checkpoint_every();
        Self { folder: runtime.folder.clone(), device, checkpoint_every, inputs: UserFiles::default() }
    }

    /// Runs one stage whose parent is done.
    ///
    /// # Errors
    /// The stage failed or was interrupted.
    pub fn run(&self, stage: &PlannedStage, io: &mut StageIo) -> Result<()> {
        // At the level of errors, so that every line of a stage says whose it is.
        let _span = tracing::error_span!("stage", key = &stage.key[..8], label = stage.label).entered();
        tracing::info!("begins");
        restart_memory_peak(&self.device);
        write_json(&io.output.join(IDENTITY), &stage.manifest)?;
        write_json(&io.output.join(STAGE), stage)?;
        match &stage.spec {
            StageSpec::Pretrain(spec) => pretrain::run(self, spec, io),
            StageSpec::Load(_) => load::run(self, stage, io),
            StageSpec::Train(spec) => train::run(self, spec, io),
            StageSpec::Post(spec) => post::run(self, spec, io),
            StageSpec::Answer(spec) => answer::run(self, spec, io),
            StageSpec::Judge(spec) => judge::run(self, spec, io),
        }
    }

    /// Reads the weights that the first stage of a chain stores whole.
    fn load(&self, chain: &[PlannedStage], artifact: &dyn Fn(&str) -> Result<PathBuf>) -> Result<CausalLm> {
        let BaseOf { key, checkpoint, model, dtype } = base_of(chain)?;
        let folder = checkpoint.map_or_else(|| artifact(key), |spec| Ok(spec.path.clone()))?;
        let weights = if chain.len() == 1 { folder.clone() } else { artifact(&chain[0].key)?.join(WEIGHTS) };
        let dtype = parse_dtype(dtype, &self.device)?;
        let read = || CausalLm::with_weights(&folder, Some(model), &weights, dtype, &self.device);
        match checkpoint {
            Some(spec) => self.inputs.read(Some(&folder), &spec.files()?, &spec.content, read),
            None => read(),
        }
    }

    fn task(&self, spec: &PluginSpec) -> Result<Box<dyn Task>> {
        let entry = registry::find::<TaskEntry>(&spec.name)?;
        (entry.build)(&settings(spec), &self.folder)
    }

    /// What is read from a task, if its files are those of the plan.
    fn read<T>(&self, spec: &PluginSpec, read: impl FnOnce(&dyn Task) -> Result<T>) -> Result<T> {
        let task = self.task(spec)?;
        self.inputs.read(None, &task.files(), &spec.content, || read(task.as_ref()))
    }

    /// Training rows in the order of `seed`.
    fn train_rows(&self, spec: &RowsSpec, seed: Seed) -> Result<Vec<Row>> {
        self.read(&spec.task, |task| task.train(spec.rows, seed.named("rows").named(&spec.task.name)))
    }

    /// Rows to ask.
    fn test_rows(&self, spec: &RowsSpec) -> Result<Vec<Row>> {
        self.read(&spec.task, |task| task.test(spec.rows))
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

/// What `find` gives for a key, for which it is asked once: it hashes every file of the artifact.
fn once(find: impl Fn(&str) -> Result<PathBuf>) -> impl Fn(&str) -> Result<PathBuf> {
    let found: RefCell<BTreeMap<String, PathBuf>> = RefCell::default();
    move |key| {
        if let Some(folder) = found.borrow().get(key) {
            return Ok(folder.clone());
        }
        let folder = find(key)?;
        found.borrow_mut().insert(key.to_owned(), folder.clone());
        Ok(folder)
    }
}

/// The models that the artifact of a stage comes from.
struct Lineage<'a> {
    stages: &'a Stages,
    /// The stages that it builds on, its parent first.
    ancestors: &'a [PlannedStage],
    artifact: &'a dyn Fn(&str) -> Result<PathBuf>,
    resident: &'a Resident,
}

impl std::fmt::Debug for Lineage<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Lineage").field("ancestors", &self.ancestors.len()).finish_non_exhaustive()
    }
}

impl Lineage<'_> {
    /// The model that the stage starts from.
    fn parent(&self) -> Result<CausalLm> {
        self.open(self.ancestors)
    }

    /// The model as the last finished stage of a chain left it; the chain goes from that stage to the base.
    fn open(&self, chain: &[PlannedStage]) -> Result<CausalLm> {
        let Self { stages, artifact, resident, .. } = self;
        let whole = |stage: &PlannedStage| -> Result<bool> {
            Ok(match &stage.spec {
                StageSpec::Pretrain(_) | StageSpec::Load(_) => true,
                StageSpec::Train(spec) => spec.adapter == AdapterSpec::Full,
                // A defense may have merged the adapter to change the base.
                StageSpec::Post(_) => !artifact(&stage.key)?.join(ADAPTER_WEIGHTS).exists(),
                StageSpec::Answer(_) | StageSpec::Judge(_) => {
                    return Err(Error::run("this stage holds answers, not a model"));
                }
            })
        };
        let mut at = 0;
        while !whole(chain.get(at).ok_or_else(|| Error::run("the stage has no parent"))?)? {
            at += 1;
        }
        let mut model = resident.get(&chain[at].key, &stages.device, || stages.load(&chain[at..], artifact))?;
        for stage in chain[..at].iter().rev() {
            let lora = match &stage.spec {
                StageSpec::Train(spec) => spec.adapter.clone(),
                _ => AdapterSpec::Continue(
                    model
                        .weights
                        .lora()
                        .cloned()
                        .ok_or_else(|| Error::run("a defense has left an adapter for a model that had none"))?,
                ),
            };
            attach(&mut model, &artifact(&stage.key)?, &lora)?;
        }
        Ok(model)
    }

    fn find(&self, what: &str, fits: impl Fn(&StageSpec) -> bool) -> Result<Weights> {
        let at = self.ancestors.iter().position(|stage| fits(&stage.spec)).ok_or_else(|| {
            Error::run(format!("the defense compares with the {what} model, and this method has none"))
                .help("give the method an alignment defense, such as `sft`")
        })?;
        Ok(self.open(&self.ancestors[at..])?.weights)
    }
}

/// The base model that a chain of stages begins with.
struct BaseOf<'a> {
    key: &'a str,
    /// None for a model that was pretrained here, which is the stage's artifact.
    checkpoint: Option<&'a LoadSpec>,
    /// The registered model that reads it.
    model: &'a str,
    /// How its weights are stored.
    dtype: &'a str,
}

fn base_of(chain: &[PlannedStage]) -> Result<BaseOf<'_>> {
    let base = chain.last().ok_or_else(|| Error::run("the chain is empty"))?;
    let (checkpoint, model, dtype) = match &base.spec {
        StageSpec::Pretrain(spec) => (None, &spec.model.name, &spec.dtype),
        StageSpec::Load(spec) => (Some(spec), &spec.model, &spec.dtype),
        _ => return Err(Error::run("the chain does not begin with a base model")),
    };
    Ok(BaseOf { key: &base.key, checkpoint, model, dtype })
}

/// Puts the adapter that a stage stored on its parent's model.
fn attach(model: &mut CausalLm, folder: &Path, adapter: &AdapterSpec) -> Result<()> {
    let config = match adapter {
        AdapterSpec::Full => return Err(Error::run("the stage stored no adapter")),
        AdapterSpec::Fresh(config) => {
            model.weights.merge()?;
            config
        }
        AdapterSpec::Continue(config) => {
            model.weights.discard_adapter();
            config
        }
    };
    model.weights.continue_lora(config, &mut Checkpoint::open(&folder.join(ADAPTER_WEIGHTS))?)
}

impl Ancestry for Lineage<'_> {
    fn base(&self) -> Result<Weights> {
        self.find("base", |spec| matches!(spec, StageSpec::Pretrain(_) | StageSpec::Load(_)))
    }

    fn aligned(&self) -> Result<Weights> {
        self.find("aligned", |spec| matches!(spec, StageSpec::Train(spec) if spec.phase == Stage::Align))
    }
}

fn settings(spec: &PluginSpec) -> Settings {
    Settings::from(spec.settings.as_object().cloned().unwrap_or_default())
}

fn defense(spec: &PluginSpec) -> Result<Box<dyn AlignmentDefense>> {
    (registry::find::<DefenseEntry>(&spec.name)?.build)(&settings(spec))
}

fn encoder(spec: &EncodingSpec, tokenizer: &Tokenizer) -> Encoder {
    Encoder { tokenizer: tokenizer.clone(), template: spec.template.clone(), max_length: spec.max_length }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_artifact_is_looked_at_once() {
        let looked = RefCell::new(Vec::new());
        let find = once(|key| {
            looked.borrow_mut().push(key.to_owned());
            Ok(PathBuf::from(key))
        });
        let found = ["a", "b", "a", "a"].map(|key| find(key).unwrap());
        assert_eq!(found, ["a", "b", "a", "a"].map(PathBuf::from));
        assert_eq!(*looked.borrow(), ["a", "b"]);
    }
}
