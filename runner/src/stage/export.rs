//! Takes a model out of the store: as a folder for transformers, or as an adapter for PEFT.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use serde_json::json;
use titer_core::bounds;
use titer_core::causal_lm::read_config;
use titer_core::gguf::Gguf;
use titer_core::text::ChatTemplate;
use titer_core::weights::peft::{ADAPTER_CONFIG, ADAPTER_WEIGHTS, peft_config, read_peft_config};
use titer_core::weights::{Checkpoint, LoraConfig};
use titer_core::{CausalLm, Error, Result};

use super::resident::Resident;
use super::{Lineage, STAGE, Stages, WEIGHTS, base_of, once, read_json, write_json};
use crate::disk;
use crate::experiment::spec::AdapterSpec;
use crate::inputs::UserFiles;
use crate::plan::{PlannedStage, StageSpec};
use crate::store::Store;

/// What a model is written as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum ExportFormat {
    /// A folder with all weights, adapters merged, as transformers reads it.
    Hf,
    /// The adapters alone, as one, as PEFT reads it.
    Peft,
}

/// Files of a model folder beside its weights, as far as it has them.
const COMPANIONS: [&str; 12] = [
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
];

/// Writes the model that the stage of this key left into the folder `out`, which must not exist or be empty.
///
/// # Errors
/// The stage or one that it builds on is not in the store, it holds no model, or a file cannot be written. For
/// [`ExportFormat::Peft`] also: a stage changed the base's own weights.
pub fn export(store: &Store, key: &str, format: ExportFormat, out: &Path) -> Result<()> {
    let chain = chain(store, key)?;
    let refuse = |why: &str| Err(Error::config(why).file(out).help("name a new folder with --out"));
    let Some(name) = out.file_name() else { return refuse("the folder to export to has no name") };
    if out.is_symlink() || out.exists() && !out.is_dir() {
        return refuse("what is to be exported to is no folder");
    }
    if out.exists() && !disk::list(out)?.is_empty() {
        return refuse("the folder to export to is not empty");
    }
    // A name of its own until it is whole.
    let unfinished =
        out.with_file_name(format!(".{}.{}.unfinished-export", name.to_string_lossy(), std::process::id()));
    if unfinished.exists() {
        return Err(Error::config("the remains of an earlier export are in the way")
            .file(&unfinished)
            .help("remove that folder, or choose another one with --out"));
    }
    disk::make_folder(&unfinished)?;
    let artifact = once(|key| Ok(store.artifact(&key.to_owned())?.verified()?.to_owned()));
    let written = match format {
        ExportFormat::Hf => write_merged(&chain, &artifact, &unfinished),
        ExportFormat::Peft => write_adapter(&chain, &artifact, &unfinished),
    };
    // An empty folder gives way; one that has been filled since does not.
    let written = written.and_then(|()| disk::rename(&unfinished, out));
    if written.is_err() {
        let _ = disk::remove(&unfinished);
    }
    written
}

/// The stage with all that it builds on, as its artifacts say: itself first, the base last.
fn chain(store: &Store, key: &str) -> Result<Vec<PlannedStage>> {
    let mut chain: Vec<PlannedStage> = Vec::new();
    let mut next = Some(key.to_owned());
    while let Some(key) = next.take() {
        let artifact = store.artifact(&key)?;
        if chain.iter().any(|stage| stage.key == key) {
            return Err(Error::data("the stage builds on itself, by what the store says").file(artifact.folder()));
        }
        if !artifact.has(STAGE) {
            return Err(Error::data(
                "the stage was made by an older version of Titer, which did not note what it builds on",
            )
            .file(artifact.folder())
            .help("delete this folder and run the experiment again"));
        }
        let stage: PlannedStage = read_json(&artifact.file(STAGE)?)?;
        next.clone_from(&stage.parent);
        chain.push(stage);
    }
    match &chain[0].spec {
        StageSpec::Answer(_) | StageSpec::Judge(_) => {
            Err(Error::config(format!("the stage `{}` holds no model", chain[0].label))
                .key(key)
                .help("give the key of the stage that trained it"))
        }
        _ => Ok(chain),
    }
}

/// The folder that the base model of the chain is read from.
fn base_folder(chain: &[PlannedStage], artifact: &dyn Fn(&str) -> Result<PathBuf>) -> Result<PathBuf> {
    let base = base_of(chain)?;
    base.checkpoint.map_or_else(|| artifact(base.key), |spec| Ok(spec.path.clone()))
}

/// Writes the merged model, beside the files of the base that its users need.
fn write_merged(chain: &[PlannedStage], artifact: &dyn Fn(&str) -> Result<PathBuf>, out: &Path) -> Result<()> {
    let base = base_folder(chain, artifact)?;
    let stages = Stages {
        folder: PathBuf::new(),
        device: Device::Cpu,
        checkpoint_every: std::time::Duration::MAX,
        inputs: UserFiles::default(),
    };
    let (stages, resident) = (&stages, &Resident::default());
    let mut lm = Lineage { stages, ancestors: &[], artifact, resident }.open(chain)?;
    lm.weights.merge()?;
    let tensors = lm.weights.base_tensors()?;
    // What an adapter was merged into is f32, and a folder has one type.
    let dtype = tensors.first().map_or(DType::F32, |(_, tensor)| tensor.dtype());
    let dtype = if tensors.iter().all(|(_, tensor)| tensor.dtype() == dtype) { dtype } else { DType::F32 };
    let name = match dtype {
        DType::BF16 => "bfloat16",
        DType::F16 => "float16",
        _ => "float32",
    };
    let mut config = read_config(&base)?;
    if let Some(keys) = config.as_object_mut() {
        let key = if keys.contains_key("dtype") { "dtype" } else { "torch_dtype" };
        keys.insert(key.to_owned(), json!(name));
    }
    write_json(&out.join("config.json"), &config)?;
    if Gguf::is(&base) {
        write_tokenizer(&base, &lm, out)?;
    }
    for file in COMPANIONS.into_iter().filter(|file| base.join(file).is_file()) {
        disk::write(&out.join(file), &bounds::read_file("copy", &base.join(file), bounds::JSON_BYTES)?)?;
    }
    let tensors = tensors.into_iter().map(|(name, tensor)| Ok((name, tensor.to_dtype(dtype)?)));
    disk::write_tensors_for_torch(&out.join(WEIGHTS), tensors.collect::<Result<Vec<_>>>()?)
}

/// Writes what a GGUF file says about text in the files of a folder.
fn write_tokenizer(base: &Path, lm: &CausalLm, out: &Path) -> Result<()> {
    let tokenizer = &lm.tokenizer;
    disk::write(&out.join("tokenizer.json"), tokenizer.to_json()?.as_bytes())?;
    let mut config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": tokenizer.token(tokenizer.eos),
        "pad_token": tokenizer.token(tokenizer.pad),
    });
    if let Some(chat) = ChatTemplate::of_folder(base)? {
        config["chat_template"] = json!(chat.text());
    }
    write_json(&out.join("tokenizer_config.json"), &config)
}

/// Writes the adapters of the chain as one: under double LoRA, the sum of the alignment's and the user's has their summed
/// rank, and stands on the original base.
fn write_adapter(chain: &[PlannedStage], artifact: &dyn Fn(&str) -> Result<PathBuf>, out: &Path) -> Result<()> {
    let base = std::path::absolute(base_folder(chain, artifact)?)
        .map_err(|error| Error::run("no current folder").source(error))?;
    // The folder may have moved since the run.
    read_config(&base)?;
    let mut stack: Vec<StoredAdapter> = Vec::new();
    let (_, later) = chain.split_last().ok_or_else(|| Error::run("the chain is empty"))?;
    for stage in later.iter().rev() {
        let folder = artifact(&stage.key)?;
        if !folder.join(ADAPTER_WEIGHTS).exists() {
            let message = format!("the stage `{}` changed the base's own weights, which no adapter holds", stage.label);
            return Err(Error::config(message).help("export the whole model with --to hf"));
        }
        let fresh = matches!(&stage.spec, StageSpec::Train(spec) if matches!(spec.adapter, AdapterSpec::Fresh(_)));
        if !fresh {
            // The adapter of the stage before, trained on or changed.
            stack.pop();
        }
        stack.push(StoredAdapter::read(&folder)?);
    }
    let adapter = match stack.len() {
        0 => return Err(Error::config("the base model has no adapter").help("export it with --to hf")),
        1 => stack.remove(0),
        _ => StoredAdapter::sum(&stack)?,
    };
    let mut config = peft_config(&adapter.config, Some(&base.to_string_lossy()));
    // Others find a model of the hub by its name.
    if let Some(model) = base_of(chain)?.checkpoint.and_then(|spec| spec.hub.as_ref()) {
        config["base_model_name_or_path"] = json!(model.repository);
        config["revision"] = json!(model.commit);
    }
    write_json(&out.join(ADAPTER_CONFIG), &config)?;
    disk::write_tensors_for_torch(&out.join(ADAPTER_WEIGHTS), adapter.factors)
}

/// An adapter as a stage stored it.
struct StoredAdapter {
    config: LoraConfig,
    /// By PEFT's names.
    factors: BTreeMap<String, Tensor>,
}

impl StoredAdapter {
    fn read(folder: &Path) -> Result<Self> {
        let config = read_peft_config(folder)?;
        let mut checkpoint = Checkpoint::open(&folder.join(ADAPTER_WEIGHTS))?;
        let names: Vec<String> = checkpoint.names().map(str::to_owned).collect();
        let read = |name: String| Ok((name.clone(), checkpoint.read(&name, &Device::Cpu)?.to_dtype(DType::F32)?));
        Ok(Self { config, factors: names.into_iter().map(read).collect::<Result<_>>()? })
    }

    /// `Σ sᵢ Bᵢ Aᵢ` as one product: the `Aᵢ` below each other, the `sᵢ Bᵢ` beside each other. A layer that only some of them
    /// adapt has zeros for the others.
    fn sum(all: &[Self]) -> Result<Self> {
        const A: &str = ".lora_A.weight";
        let rank: usize = all.iter().map(|adapter| adapter.config.r).sum();
        let mut factors = BTreeMap::new();
        let layers = all.iter().flat_map(|adapter| adapter.factors.keys()).filter_map(|name| name.strip_suffix(A));
        for layer in layers.collect::<BTreeSet<_>>() {
            let names = [format!("{layer}{A}"), format!("{layer}.lora_B.weight")];
            let [a_of, b_of] = names.each_ref().map(|name| move |adapter: &Self| adapter.factors.get(name).cloned());
            let width = |of: &dyn Fn(&Self) -> Option<Tensor>, at: usize| {
                all.iter()
                    .find_map(of)
                    .map(|factor| factor.dims()[at])
                    .ok_or_else(|| Error::data("a factor is missing"))
            };
            let (input, output) = (width(&a_of, 1)?, width(&b_of, 0)?);
            let (mut below, mut beside) = (Vec::new(), Vec::new());
            for adapter in all {
                if a_of(adapter).is_some() != b_of(adapter).is_some() {
                    return Err(Error::data(format!("a stored adapter has only one factor of `{layer}`")));
                }
                let (r, scale) = (adapter.config.r, adapter.config.scale());
                let missing = |shape: (usize, usize)| Tensor::zeros(shape, DType::F32, &Device::Cpu);
                below.push(a_of(adapter).map_or_else(|| missing((r, input)), Ok)?);
                beside.push((b_of(adapter).map_or_else(|| missing((output, r)), Ok)? * scale)?);
            }
            let [a, b] = names;
            factors.insert(a, Tensor::cat(&below, 0)?);
            factors.insert(b, Tensor::cat(&beside, 1)?);
        }
        let targets = all.iter().flat_map(|adapter| adapter.config.target_modules.clone().unwrap_or_default());
        let targets: BTreeSet<String> = targets.collect();
        let config = LoraConfig {
            r: rank,
            alpha: rank as f64,
            dropout: 0.,
            target_modules: Some(targets.into_iter().collect()),
        };
        Ok(Self { config, factors })
    }
}
