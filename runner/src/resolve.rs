//! From what the user wrote to what it means: names looked up, defaults filled in, data files hashed.
//!
//! Every mistake is collected with its key, so that one run of `titer plan` shows them all. What comes out holds no
//! mistake that can be known without a device.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path, PathBuf};

use serde_json::{Map, Value};
use titer_core::arithmetic;
use titer_core::bounds;
use titer_core::device::parse_device;
use titer_core::error::io_error;
use titer_core::model::sites_of_kind;
use titer_core::registry::{Entry, find, nearest};
use titer_core::report::Input;
use titer_core::rng::Seed;
use titer_core::text::Template;
use titer_core::weights::LoraConfig;
use titer_core::{
    AlignmentDefense, Conflict, DefenseEntry, Error, JudgeEntry, Kind, Limits, Model, ModelEntry, Precision, Result,
    Row, Settings, Stack, Stage, Task, TaskEntry,
};

use crate::base_model::{model_of, read_config};
use crate::config::{
    AlignAdapter, BaseConfig, Config, DefenseRef, EvaluateConfig, FineTuneConfig, FineTuneMode, JudgeRef, Loaded,
    Source, StreamConfig, TaskRef, TrainConfig, UserTask,
};
use crate::diagnostics::Problems;
use crate::disk;
use crate::identity::{PATH, of_rows};
use crate::names;
use crate::plan::{
    AdapterSpec, EncodingSpec, LoadSpec, OptimSpec, PluginSpec, PretrainSpec, RowsSpec, Steps, StreamSpec,
};
use crate::plugins::identity;

/// What rows are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Use {
    /// To train on.
    Train,
    /// To ask and compare with.
    Test,
}

/// How far the share of harmful rows may be from the ratio that tables and plots name.
const ROUNDED_RATIO: f64 = 0.005;
/// The defense of a stage for which the method names none.
const PLAIN: &str = "sft";
/// The word for "no defense here".
const NONE: &str = "none";

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
    /// Every file that was read, with its hash.
    pub inputs: Vec<Input>,
}

/// A base model.
#[derive(Debug, Clone)]
#[expect(clippy::large_enum_variant, reason = "there are a handful of these")]
pub enum Base {
    /// A checkpoint folder.
    Load(LoadSpec),
    /// One pretrained here.
    Pretrain(PretrainSpec),
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
    pub fn serving_template(&self, training: &str) -> String {
        let defenses = [self.align.as_ref(), Some(&self.fine_tune), self.post.as_ref()].into_iter().flatten();
        defenses.fold(training.to_owned(), |template, defense| defense.built.serving_template(&template))
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

/// Looks everything up.
///
/// # Errors
/// Every mistake that can be known without a device.
pub fn resolve(loaded: &Loaded) -> Result<Experiment, Problems> {
    let config = &loaded.config;
    let mut cx = Resolver { source: &loaded.source, problems: Problems::default(), hashes: BTreeMap::new() };

    if !cx.cells(config) {
        return Err(cx.problems);
    }
    cx.take("experiment", names::check(&config.experiment));
    cx.check(
        is_file_name(&config.experiment),
        "experiment",
        &format!("`{}` is not the name of one folder", config.experiment.escape_debug()),
        "use a plain name without `/` and `\\`, and place the results with --out DIR",
    );
    cx.seeds("seeds", &config.seeds);
    cx.take("", config.lora.check());
    let precision = cx.take("", Precision::parse(&config.dtype));
    cx.take("encoding", Template::new(&config.encoding.template).check());
    cx.positive("encoding.max_length", config.encoding.max_length, bounds::TOKENS);
    let encoding = EncodingSpec {
        template: Template::new(&config.encoding.template).text().to_owned(),
        max_length: config.encoding.max_length,
    };

    let (bases, model) = cx.base(&config.base, &config.dtype).unzip();
    if let Some(model) = &model {
        cx.lora_targets("lora", &config.lora, model.as_ref());
        cx.take("", precision.map_or(Ok(()), |precision| precision.check(model.params())));
    }
    let full = config.align.as_ref().is_some_and(|align| align.adapter == AlignAdapter::Full);
    if full || config.fine_tune.mode == FineTuneMode::Full {
        cx.take("", precision.map_or(Ok(()), Precision::check_trainable));
    }
    // A plan says in full what is trained, also where the configuration leaves it to the model.
    let spelled_out = |lora: &LoraConfig| model.as_ref().map_or_else(|| lora.clone(), |m| lora.for_params(m.params()));
    let lora = spelled_out(&config.lora);
    let user_lora = cx.user_lora(&config.fine_tune, model.as_deref()).map_or_else(|| lora.clone(), spelled_out);

    let streams = config.streams.iter().map(|(name, stream)| (name.as_str(), cx.stream(name, stream))).collect();
    let methods = cx.methods(config, &streams, model.as_deref());

    let aligns = methods.iter().any(|method| method.align.is_some());
    let align = config.align.as_ref().and_then(|align| {
        cx.check(!align.data.is_empty(), "align.data", "the list is empty", "name the alignment data");
        let data: Vec<_> = align
            .data
            .iter()
            .enumerate()
            .filter_map(|(index, rows)| cx.rows(&format!("align.data.{index}"), rows, Use::Train))
            .map(|drawn| drawn.spec)
            .collect();
        let adapter = match align.adapter {
            AlignAdapter::Lora => AdapterSpec::Fresh(lora.clone()),
            AlignAdapter::Full => AdapterSpec::Full,
        };
        Some(Align { data, adapter, optim: cx.optim("align.train", &align.train)? })
    });
    if aligns && config.align.is_none() {
        cx.problem(
            "methods",
            "a method aligns, but there is no alignment stage",
            "add [align] with data and train, or set align = \"none\"",
        );
    }
    let fine_tune = cx.fine_tune(&config.fine_tune, &user_lora, config.evaluate.task_prompts);
    let (probes, judges) = cx.evaluate(&config.evaluate);
    cx.published(config);

    let arithmetic = cx.arithmetic(config);
    let inputs = cx.hashes.iter().map(|(path, hash)| Input { path: path.display().to_string(), blake3: hash.clone() });
    let inputs = inputs.collect();
    match (bases, fine_tune) {
        (Some(bases), Some(fine_tune)) => cx.problems.into_result(Experiment {
            name: config.experiment.clone(),
            seeds: config.seeds.clone(),
            bases,
            model: config.base.model.clone(),
            encoding,
            align,
            fine_tune,
            methods,
            probes,
            judges,
            batch_size: config.evaluate.batch_size,
            arithmetic,
            inputs,
        }),
        // A missing part has left its reason behind.
        _ => Err(cx.problems),
    }
}

/// Rows of a task, drawn once.
struct Drawn {
    spec: RowsSpec,
    rows: Vec<Row>,
    task: Box<dyn Task>,
}

struct Resolver<'a> {
    source: &'a Source,
    problems: Problems,
    /// Content hashes of files already read.
    hashes: BTreeMap<PathBuf, String>,
}

impl Resolver<'_> {
    /// Keeps the value and collects the error, under the key.
    fn take<T>(&mut self, key: &str, result: Result<T>) -> Option<T> {
        result.map_err(|error| self.problems.push(self.source.locate(key, error))).ok()
    }

    fn problem(&mut self, key: &str, message: &str, help: &str) {
        self.take::<()>(key, Err(Error::config(message).help(help)));
    }

    fn check(&mut self, holds: bool, key: &str, message: &str, help: &str) {
        if !holds {
            self.problem(key, message, help);
        }
    }

    /// Whether `number` lies between 1 and `most`; if not, nothing may be made of that size.
    fn positive(&mut self, key: &str, number: usize, most: usize) -> bool {
        self.check(number > 0, key, "expected at least 1, found `0`", "set it to 1 or more");
        let message = format!("expected at most {most}, found `{number}`");
        self.check(number <= most, key, &message, &format!("set it to {most} or less; this is a limit of Titer"));
        (1..=most).contains(&number)
    }

    /// The product of everything that is swept over.
    fn cells(&mut self, config: &Config) -> bool {
        let FineTuneConfig { tasks, samples, harmful_ratios, learning_rates, .. } = &config.fine_tune;
        let axes = [
            ("methods", config.methods.len()),
            ("seeds", config.seeds.len()),
            ("base.seeds", if config.base.pretrain.is_some() { config.base.seeds.len() } else { 1 }),
            ("fine_tune.tasks", tasks.len()),
            ("fine_tune.samples", samples.as_slice().len()),
            ("fine_tune.harmful_ratios", harmful_ratios.len()),
            ("fine_tune.learning_rates", learning_rates.len().max(1)),
        ];
        let cells = axes.iter().fold(1usize, |cells, (_, length)| cells.saturating_mul(*length));
        let longest = axes.iter().max_by_key(|(_, length)| *length).map_or("methods", |(key, _)| key);
        let message = format!("the experiment has {cells} cells, at most {} are possible", bounds::CELLS);
        self.check(cells <= bounds::CELLS, longest, &message, "shorten this list, or split the experiment");
        cells <= bounds::CELLS
    }

    fn fraction(&mut self, key: &str, number: f64, help: &str) {
        self.check((0. ..=1.).contains(&number), key, &format!("must lie in [0, 1], found `{number}`"), help);
    }

    fn seeds(&mut self, key: &str, seeds: &[u64]) {
        self.check(!seeds.is_empty(), key, "the list is empty: nothing would run", "give at least one seed, as in [0]");
        self.distinct(key, seeds.iter().map(u64::to_string));
    }

    fn distinct(&mut self, key: &str, names: impl IntoIterator<Item = String>) {
        let mut seen = BTreeSet::new();
        for name in names {
            if seen.contains(&name) {
                self.problem(key, &format!("`{name}` appears twice"), "remove or rename one of them");
            }
            seen.insert(name);
        }
    }

    /// Looks a plugin up and fills its settings in.
    fn plugin<E: Entry>(
        &mut self,
        key: &str,
        name_key: &str,
        name: &str,
        settings: &Map<String, Value>,
    ) -> Option<(&'static E, PluginSpec)> {
        let entry = self.take(name_key, find::<E>(name))?;
        let settings = entry.resolve(&Settings::from(settings.clone()));
        let settings = self.take(key, settings.map_err(|error| explained(name, error)))?;
        let plugin = self.take(name_key, identity(entry))?;
        Some((entry, PluginSpec { name: name.to_owned(), settings, version: entry.version(), plugin }))
    }

    /// The settings of a task in which each path that does not come from the file is a whole one: a task takes relative
    /// paths from the file's folder.
    fn placed(&self, key: &str, name: &str, settings: &Map<String, Value>) -> Map<String, Value> {
        let mut settings = settings.clone();
        let schema = find::<TaskEntry>(name).map(|entry| (entry.settings.schema)().to_value()).unwrap_or_default();
        for (setting, value) in &mut settings {
            if schema["properties"][setting]["format"] != PATH {
                continue;
            }
            let start = self.source.folder_of(&format!("{key}.{setting}"));
            if start == Path::new("")
                && let Some(Ok(path)) = value.as_str().map(std::path::absolute)
            {
                *value = Value::from(path.to_string_lossy());
            }
        }
        settings
    }

    /// Builds a task, which checks that its files are there, and hashes them.
    fn task(
        &mut self,
        key: &str,
        name: &str,
        settings: &Map<String, Value>,
    ) -> Option<(PluginSpec, String, Box<dyn Task>)> {
        let settings = &self.placed(key, name, settings);
        let (entry, spec) = self.plugin::<TaskEntry>(key, &format!("{key}.task"), name, settings)?;
        let task = (entry.build)(&Settings::from(settings.clone()), self.source.folder());
        let task = self.take(key, task)?;
        let content = self.content(&task.files());
        Some((spec, self.take(key, content)?, task))
    }

    /// Rows to train on (`Use::Train`) or to ask (`Use::Test`). They are drawn once, so that missing or malformed data
    /// is known before any work is done.
    fn rows(&mut self, key: &str, rows: &TaskRef, purpose: Use) -> Option<Drawn> {
        let built = self.task(key, &rows.task, &rows.settings);
        let count = rows
            .rows
            .ok_or_else(|| Error::config("the number of rows is missing").key("rows").help("add it, as in rows = 500"));
        let count = self.take(key, count)?;
        if !self.positive(&format!("{key}.rows"), count, bounds::ROWS) {
            return None;
        }
        let (task, content, built) = built?;
        let drawn = self.drawn(key, built.as_ref(), count, purpose)?;
        Some(Drawn { spec: RowsSpec { task, rows: count, content }, rows: drawn, task: built })
    }

    fn stream(&mut self, name: &str, stream: &StreamConfig) -> Option<StreamSpec> {
        let key = format!("streams.{name}");
        if let Some(size) = stream.batch_size {
            self.positive(&format!("{key}.batch_size"), size, bounds::BATCH);
        }
        let rows = self.rows(&key, &stream.rows, Use::Train)?.spec;
        Some(StreamSpec { name: name.to_owned(), rows, batch_size: stream.batch_size })
    }

    fn drawn(&mut self, key: &str, task: &dyn Task, count: usize, purpose: Use) -> Option<Vec<Row>> {
        let rows = match purpose {
            Use::Train => task.train(count, Seed::new(0)),
            Use::Test => task.test(count),
        };
        self.take(key, rows)
    }

    /// What decides the rounding. A device that cannot be opened here has keys of its own: its numbers are not ours.
    fn arithmetic(&mut self, config: &Config) -> String {
        match parse_device(&config.device) {
            Ok(device) => arithmetic::identity(config.arithmetic, &device),
            Err(error) if error.kind() == Kind::Device => format!("{} (not opened)", config.device),
            Err(error) => {
                self.take::<()>("", Err(error));
                String::new()
            }
        }
    }

    fn content(&mut self, files: &[PathBuf]) -> Result<String> {
        if files.is_empty() {
            return Ok(String::new());
        }
        let mut whole = blake3::Hasher::new();
        for file in files {
            let hash = match self.hashes.get(file) {
                Some(hash) => hash,
                None => {
                    let hash = disk::hash(file);
                    let hash = hash.map_err(|error| if file.exists() { error } else { error.help(PATHS) })?;
                    self.hashes.entry(file.clone()).or_insert(hash)
                }
            };
            whole.update(hash.as_bytes());
        }
        Ok(whole.finalize().to_hex().to_string())
    }

    fn base(&mut self, base: &BaseConfig, dtype: &str) -> Option<(Vec<Base>, Box<dyn Model>)> {
        let entry = self.take("base.model", find::<ModelEntry>(&base.model));
        match (&base.path, &base.pretrain) {
            (Some(path), None) => {
                self.check(
                    base.shape.is_empty(),
                    "base.shape",
                    "a checkpoint has its own shape",
                    "remove [base.shape]",
                );
                let (spec, model) = self.checkpoint(entry?, path, dtype)?;
                Some((vec![Base::Load(spec)], model))
            }
            (None, Some(pretrain)) => {
                self.seeds("base.seeds", &base.seeds);
                self.positive("base.pretrain.max_length", pretrain.max_length, bounds::TOKENS);
                let rows = self.rows("base.pretrain.data", &pretrain.data, Use::Train);
                let optim = self.optim("base.pretrain.train", &pretrain.train);
                let explain = |error| explained(&base.model, error);
                let settings = entry?.settings.resolve(&Settings::from(base.shape.clone()));
                let settings = self.take("base.shape", settings.map_err(explain))?;
                let Drawn { spec: data, task, .. } = rows?;
                let model = build_model(entry?, &settings, task.as_ref()).map_err(explain);
                let model = self.take("base.shape", model)?;
                let plugin = self.take("base.model", identity(entry?))?;
                let model_spec = PluginSpec { name: base.model.clone(), settings, version: entry?.version, plugin };
                let optim = optim?;
                let spec = |&seed: &u64| {
                    Base::Pretrain(PretrainSpec {
                        model: model_spec.clone(),
                        data: data.clone(),
                        max_length: pretrain.max_length,
                        optim: optim.clone(),
                        seed,
                        dtype: dtype.to_owned(),
                    })
                };
                Some((base.seeds.iter().map(spec).collect(), model))
            }
            (path, _) => {
                let found = if path.is_some() { "both are given" } else { "neither is given" };
                self.problem(
                    "base",
                    &format!("a base model comes from either `path` or `pretrain`; {found}"),
                    "set base.path to a checkpoint folder, or add [base.pretrain]",
                );
                None
            }
        }
    }

    fn checkpoint(&mut self, entry: &ModelEntry, path: &Path, dtype: &str) -> Option<(LoadSpec, Box<dyn Model>)> {
        let folder = self.source.folder_of("base.path").join(path);
        let files = self.take("base.path", model_files(&folder))?;
        let config = self.take("base.path", read_config(&folder))?;
        let model = self.take("base.path", model_of(entry, &config, &folder.join("config.json")))?;
        let content = self.content(&files);
        let content = self.take("base.path", content)?;
        let plugin = self.take("base.model", identity(entry))?;
        let (model_name, version, dtype) = (entry.name.to_owned(), entry.version, dtype.to_owned());
        Some((LoadSpec { model: model_name, version, plugin, path: folder, content, dtype }, model))
    }

    fn lora_targets(&mut self, key: &str, lora: &LoraConfig, model: &dyn Model) {
        let linears = model.params().linear_names();
        let targets = lora.target_modules.iter().flatten().enumerate();
        for (index, target) in targets.filter(|(_, target)| !linears.contains(&target.as_str())) {
            let hint = nearest(target, linears.iter().copied());
            let hint = hint.map_or_else(String::new, |near| format!("; did you mean `{near}`?"));
            let known = linears.join(", ");
            self.problem(
                &format!("{key}.target_modules.{index}"),
                &format!("the model has no linear layer `{target}`{hint}"),
                &format!("its linear layers: {known}"),
            );
        }
    }

    /// The shape of the user's adapter where the configuration gives it one of its own.
    fn user_lora<'c>(&mut self, config: &'c FineTuneConfig, model: Option<&dyn Model>) -> Option<&'c LoraConfig> {
        let lora = config.lora.as_ref()?;
        self.take("fine_tune", lora.check());
        self.check(
            config.mode == FineTuneMode::Double,
            "fine_tune.lora",
            &format!("mode `{}` has no adapter of the user's own", config.mode.name()),
            "remove it, or set fine_tune.mode = \"double\"",
        );
        if let Some(model) = model {
            self.lora_targets("fine_tune.lora", lora, model);
        }
        Some(lora)
    }

    fn optim(&mut self, key: &str, train: &TrainConfig) -> Option<OptimSpec> {
        let at = |name: &str| format!("{key}.{name}");
        for (name, count) in
            [("batch_size", train.batch_size), ("accumulate", train.accumulate), ("bucket", train.bucket)]
        {
            self.positive(&at(name), count, bounds::BATCH);
        }
        self.fraction(&at("warmup"), train.warmup, "0.1 means that the rate rises over the first tenth of the steps");
        self.learning_rate(&at("learning_rate"), train.learning_rate);
        for (name, number) in [("weight_decay", train.weight_decay), ("eps", train.eps), ("clip", train.clip)] {
            let message = format!("must be a finite number, at least 0, found `{number}`");
            self.check(number >= 0. && number.is_finite(), &at(name), &message, "0 switches it off");
        }
        for (index, beta) in train.betas.iter().enumerate() {
            let message = format!("must lie in [0, 1), found `{beta}`");
            self.check((0. ..1.).contains(beta), &at(&format!("betas.{index}")), &message, "usual are [0.9, 0.999]");
        }
        let steps = match (train.steps, train.epochs) {
            (Some(steps), None) => ("steps", steps, Steps::Steps(steps)),
            (None, Some(epochs)) => ("epochs", epochs, Steps::Epochs(epochs)),
            (steps, _) => {
                let found = if steps.is_some() { "both are given" } else { "neither is given" };
                let message = format!("training takes either `steps` or `epochs`; {found}");
                self.problem(key, &message, "keep one of them, as in steps = 400");
                return None;
            }
        };
        self.positive(&at(steps.0), steps.1, bounds::STEPS);
        Some(OptimSpec {
            steps: steps.2,
            batch_size: train.batch_size,
            accumulate: train.accumulate,
            checkpointing: train.checkpointing,
            bucket: train.bucket,
            learning_rate: train.learning_rate,
            schedule: train.schedule,
            warmup: train.warmup,
            weight_decay: train.weight_decay,
            betas: train.betas,
            eps: train.eps,
            clip: Some(train.clip).filter(|clip| *clip > 0.),
        })
    }

    fn learning_rate(&mut self, key: &str, rate: f64) {
        let message = format!("must be a positive number, found `{rate}`");
        self.check(rate > 0. && rate.is_finite(), key, &message, "1e-3 is usual for LoRA, 1e-5 for all parameters");
    }

    fn methods(
        &mut self,
        config: &Config,
        streams: &BTreeMap<&str, Option<StreamSpec>>,
        model: Option<&dyn Model>,
    ) -> Vec<Method> {
        let methods = &config.methods;
        self.check(!methods.is_empty(), "methods", "the list is empty: nothing would run", "add a [[methods]] table");
        self.distinct("methods", methods.iter().map(|method| method.name.clone()));
        let mut resolved = Vec::new();
        for (index, method) in methods.iter().enumerate() {
            self.take(&format!("methods.{index}.name"), names::check(&method.name));
            let mut defense = |stage: Stage, given: Option<&DefenseRef>| {
                self.defense(&format!("methods.{index}.{}", stage.name()), stage, given, streams, model)
            };
            let plain = DefenseRef::Name(PLAIN.into());
            let align = defense(Stage::Align, Some(&method.align));
            let fine_tune = defense(Stage::FineTune, Some(method.fine_tune.as_ref().unwrap_or(&plain)));
            let post = defense(Stage::Post, method.post.as_ref());
            if let Some(steps) = method.align_steps {
                self.positive(&format!("methods.{index}.align_steps"), steps, bounds::STEPS);
            }
            if let Some(fine_tune) = fine_tune {
                let (name, align_steps, notes) = (method.name.clone(), method.align_steps, Vec::new());
                let mut method = Method { name, align, align_steps, fine_tune, post, notes };
                self.conflicts(&format!("methods.{index}"), config.fine_tune.mode, &mut method);
                self.limits(&format!("methods.{index}"), config, &mut method);
                resolved.push(method);
            }
        }
        resolved
    }

    /// Asks each defense of a method what stands against the combination.
    fn conflicts(&mut self, key: &str, mode: FineTuneMode, method: &mut Method) {
        fn name(defense: &Defense) -> &str {
            &defense.spec.name
        }
        let Method { align, fine_tune, post, .. } = &*method;
        let (align, fine_tune, post) = (align.as_ref().map(name), name(fine_tune), post.as_ref().map(name));
        let stack = Stack { align, fine_tune, post, lora: mode.name() };
        let mut notes = Vec::new();
        for name in [align, Some(fine_tune), post].into_iter().flatten() {
            match find::<DefenseEntry>(name).ok().and_then(|entry| (entry.conflicts)(&stack)) {
                None => {}
                Some(Conflict::Noted(note)) => notes.push(note),
                Some(Conflict::Refused(why)) => {
                    self.problem(key, &why, &format!("`titer explain {name}` says what it needs"));
                }
            }
        }
        method.notes = notes;
    }

    /// Holds the defenses of a method against how their stages train.
    fn limits(&mut self, key: &str, config: &Config, method: &mut Method) {
        let align = method.align.as_ref().zip(config.align.as_ref()).map(|(defense, align)| (defense, &align.train));
        let stages = [(Stage::Align, align), (Stage::FineTune, Some((&method.fine_tune, &config.fine_tune.train)))];
        let mut notes = Vec::new();
        for (stage, defense, train) in stages.into_iter().filter_map(|(stage, found)| Some((stage, found?.0, found?.1)))
        {
            let (name, stage) = (&defense.spec.name, stage.name());
            if let Some(why) = defense.limits.checkpointing.filter(|_| train.checkpointing) {
                let message = format!("`{name}` cannot be trained with gradient checkpointing: {why}");
                let help = format!("remove `checkpointing` from {stage}.train, or take another defense");
                self.problem(&format!("{key}.{stage}"), &message, &help);
            }
            if let Some(why) = defense.limits.accumulation.filter(|_| train.accumulate > 1) {
                let (count, size) = (train.accumulate, train.batch_size);
                notes.push(format!(
                    "`{name}` with {count} accumulated batches of {size} rows is not one batch of {}: {why}",
                    count.saturating_mul(size)
                ));
            }
        }
        method.notes.extend(notes);
    }

    fn defense(
        &mut self,
        key: &str,
        stage: Stage,
        given: Option<&DefenseRef>,
        streams: &BTreeMap<&str, Option<StreamSpec>>,
        model: Option<&dyn Model>,
    ) -> Option<Defense> {
        let no_settings = Map::new();
        let (name, name_key, settings) = match given? {
            DefenseRef::Name(name) => (name, key.to_owned(), &no_settings),
            DefenseRef::Table { defense, settings } => (defense, format!("{key}.defense"), settings),
        };
        if name == NONE && stage != Stage::FineTune {
            return None;
        }
        let (entry, spec) = self.plugin::<DefenseEntry>(key, &name_key, name, settings)?;
        // What building refuses is a setting out of range.
        let built = (entry.build)(&Settings::from(spec.settings.as_object().cloned().unwrap_or_default()));
        let built = self.take(key, built.map_err(|error| explained(name, error)));
        if !entry.stages.contains(&stage) {
            let stages: Vec<_> = entry.stages.iter().map(|stage| stage.name()).collect();
            let message = format!("`{name}` does not act at the stage `{}`", stage.name());
            self.problem(&name_key, &message, &format!("use it at {}", stages.join(" or ")));
        }
        if let Some(model) = model {
            for kind in entry.sites.iter().filter(|kind| sites_of_kind(model, kind).is_err()) {
                let message = format!("`{name}` acts on the sites `{kind}`, which this model does not have");
                self.problem(&name_key, &message, "use another model or another defense");
            }
        }
        let mut drawn = Vec::new();
        for stream in (entry.streams)(&spec.settings) {
            match streams.get(stream) {
                Some(spec) => drawn.extend(spec.clone()),
                None => self.problem(
                    &name_key,
                    &format!("`{name}` draws from the stream `{stream}`, which is not configured"),
                    &format!("add `{stream} = {{ task = \"…\", rows = … }}` under [streams]"),
                ),
            }
        }
        let (passes, limits) = ((entry.passes)(&spec.settings), (entry.limits)(&spec.settings));
        Some(Defense { passes, limits, spec, built: built?, streams: drawn })
    }

    fn fine_tune(&mut self, config: &FineTuneConfig, lora: &LoraConfig, prompts: usize) -> Option<FineTune> {
        let samples = config.samples.as_slice();
        self.check(!samples.is_empty(), "fine_tune.samples", "the list is empty", "give at least one number of rows");
        for &samples in samples {
            self.positive("fine_tune.samples", samples, bounds::ROWS);
        }
        let ratios = &config.harmful_ratios;
        self.check(!ratios.is_empty(), "fine_tune.harmful_ratios", "the list is empty", "0 is the clean run");
        for (index, &ratio) in ratios.iter().enumerate() {
            let key = format!("fine_tune.harmful_ratios.{index}");
            self.fraction(&key, ratio, "0.1 means that one row in ten is harmful");
        }
        self.distinct("fine_tune.harmful_ratios", ratios.iter().map(f64::to_string));
        for (index, &ratio) in ratios.iter().enumerate() {
            for &samples in samples {
                let Ok(count) = titer_core::data::harmful_count(samples, ratio) else { continue };
                let share = count as f64 / samples.max(1) as f64;
                self.check(
                    (share - ratio).abs() <= ROUNDED_RATIO,
                    &format!("fine_tune.harmful_ratios.{index}"),
                    &format!("`{ratio}` of {samples} rows would be {count} rows, which is {share:.3} of them"),
                    "choose `samples` so that each ratio of them is a whole number of rows",
                );
            }
        }
        for (index, &rate) in config.learning_rates.iter().enumerate() {
            self.learning_rate(&format!("fine_tune.learning_rates.{index}"), rate);
        }
        self.check(!config.tasks.is_empty(), "fine_tune.tasks", "the list is empty", "name at least one task");
        let askable = self.positive("evaluate.task_prompts", prompts, bounds::ROWS);
        let tasks = config.tasks.iter().enumerate().filter(|_| askable);
        let tasks: Vec<_> = tasks.filter_map(|(index, task)| self.user_task(index, task, prompts)).collect();
        self.distinct("fine_tune.tasks", tasks.iter().map(|task| task.name.clone()));
        let harmful = self.harmful_rows(config);
        let monitor = config.monitor.as_ref().and_then(|rows| self.rows("fine_tune.monitor", rows, Use::Test));
        let adapter = match config.mode {
            FineTuneMode::Double => AdapterSpec::Fresh(lora.clone()),
            FineTuneMode::Single => AdapterSpec::Continue(lora.clone()),
            FineTuneMode::Full => AdapterSpec::Full,
        };
        let optim = self.optim("fine_tune.train", &config.train)?;
        let rates =
            if config.learning_rates.is_empty() { vec![optim.learning_rate] } else { config.learning_rates.clone() };
        Some(FineTune {
            tasks,
            samples: samples.to_vec(),
            harmful,
            ratios: ratios.clone(),
            learning_rates: rates,
            mode: config.mode,
            adapter,
            monitor: monitor.map(|drawn| drawn.spec),
            optim,
        })
    }

    /// The harmful rows that the largest mixture needs.
    fn harmful_rows(&mut self, config: &FineTuneConfig) -> Option<RowsSpec> {
        let most = config.samples.as_slice().iter().copied().max().unwrap_or(0).min(bounds::ROWS);
        let ratio = config.harmful_ratios.iter().copied().fold(0., f64::max);
        let needed = titer_core::data::harmful_count(most, ratio.min(1.)).unwrap_or(0);
        let Some(source) = &config.harmful else {
            self.check(
                needed == 0,
                "fine_tune.harmful_ratios",
                "a ratio above 0 needs harmful rows, and `fine_tune.harmful` is missing",
                "add `harmful = { task = \"…\" }` under [fine_tune]",
            );
            return None;
        };
        let (task, content, built) = self.task("fine_tune.harmful", &source.task, &source.settings)?;
        self.drawn("fine_tune.harmful", built.as_ref(), needed, Use::Train)?;
        let available = source.rows.unwrap_or(needed);
        let message = format!("{needed} harmful rows are needed (samples × ratio), `rows` allows {available}");
        self.check(available >= needed, "fine_tune.harmful.rows", &message, "leave `rows` out, or raise it");
        Some(RowsSpec { task, rows: needed, content })
    }

    fn user_task(&mut self, index: usize, user: &UserTask, prompts: usize) -> Option<UserRows> {
        let key = format!("fine_tune.tasks.{index}");
        self.take(&format!("{key}.name"), names::check(table_name(user)));
        let (task, content, built) = self.task(&key, &user.task, &user.settings)?;
        let max_new_tokens = user.max_new_tokens.unwrap_or_else(|| built.max_new_tokens());
        self.positive(&format!("{key}.max_new_tokens"), max_new_tokens, bounds::TOKENS);
        let asked = self.drawn(&key, built.as_ref(), prompts, Use::Test)?;
        let scored = asked.first().is_none_or(|row| built.score(row, &row.output).is_some());
        let message = format!("`{}` does not score answers, so there would be no fine-tune accuracy", user.task);
        self.check(scored, &format!("{key}.scoring"), &message, "give it a scoring rule, or take another task");
        let prompts = RowsSpec { task, rows: prompts, content };
        let probe = Probe { name: "task", prompts, prompts_content: of_rows(&asked), max_new_tokens };
        let labels = self.take(&key, built.labels())?;
        Some(UserRows { name: table_name(user).to_owned(), probe, labels })
    }

    /// Published values must be of a method and a task that the experiment names; ratios and samples may be others.
    fn published(&mut self, config: &Config) {
        let methods: Vec<&str> = config.methods.iter().map(|method| method.name.as_str()).collect();
        let tasks: Vec<&str> = config.fine_tune.tasks.iter().map(table_name).collect();
        let modes = [FineTuneMode::Double, FineTuneMode::Single, FineTuneMode::Full].map(FineTuneMode::name);
        for (index, published) in config.published.iter().enumerate() {
            let key = format!("published.{index}");
            self.take(&key, published.check());
            self.one_of(&format!("{key}.method"), &published.method, &methods);
            self.one_of(&format!("{key}.task"), &published.task, &tasks);
            if let Some(lora) = &published.lora {
                self.one_of(&format!("{key}.lora"), lora, &modes);
            }
        }
    }

    fn one_of(&mut self, key: &str, name: &str, known: &[&str]) {
        let hint = nearest(name, known.iter().copied());
        let hint = hint.map_or_else(String::new, |near| format!("; did you mean `{near}`?"));
        let message = format!("`{name}` is not in this configuration{hint}");
        self.check(known.contains(&name), key, &message, &format!("use one of {}", known.join(", ")));
    }

    fn evaluate(&mut self, config: &EvaluateConfig) -> (Vec<Probe>, Vec<PluginSpec>) {
        self.positive("evaluate.batch_size", config.batch_size, bounds::BATCH);
        self.positive("evaluate.max_new_tokens", config.max_new_tokens.unwrap_or(1), bounds::TOKENS);
        let mut probes = Vec::new();
        for (name, rows) in [("harmful", &config.harmful), ("benign", &config.benign)] {
            let rows = rows.as_ref().and_then(|rows| self.rows(&format!("evaluate.{name}"), rows, Use::Test));
            probes.extend(rows.map(|Drawn { spec: prompts, rows, task }| Probe {
                name,
                prompts,
                prompts_content: of_rows(&rows),
                max_new_tokens: config.max_new_tokens.unwrap_or_else(|| task.max_new_tokens()),
            }));
        }
        let no_settings = Map::new();
        let mut judges = Vec::new();
        for (index, judge) in config.judges.iter().enumerate() {
            let key = format!("evaluate.judges.{index}");
            let (name, name_key, settings) = match judge {
                JudgeRef::Name(name) => (name, key.clone(), &no_settings),
                JudgeRef::Table { judge, settings } => (judge, format!("{key}.judge"), settings),
            };
            let Some((entry, spec)) = self.plugin::<JudgeEntry>(&key, &name_key, name, settings) else { continue };
            // What building refuses is a setting out of range.
            let built = (entry.build)(&Settings::from(settings.clone()));
            self.take(&key, built.map_err(|error| explained(name, error)));
            judges.push(spec);
        }
        let judged = config.harmful.is_some() || config.benign.is_some();
        self.check(
            !judged || !config.judges.is_empty(),
            "evaluate.judges",
            "harmful and benign answers need a judge",
            "name one, as in judges = [\"…\"]; `titer list judges` shows them",
        );
        self.distinct("evaluate.judges", judges.iter().map(|judge| judge.name.clone()));
        (probes, judges)
    }
}

/// Where a path that is not whole starts.
const PATHS: &str =
    "check the path; in a configuration, paths start at its folder, after --set at the working directory";

/// Whether files and folders can have this name, anywhere, without meaning another place.
fn is_file_name(name: &str) -> bool {
    let mut parts = Path::new(name).components();
    let alone = matches!((parts.next(), parts.next()), (Some(Component::Normal(part)), None) if part == name);
    alone && !name.contains(['\\', '\0'])
}

/// The name of a user's task in the table.
fn table_name(user: &UserTask) -> &str {
    user.name.as_deref().unwrap_or(&user.task)
}

/// Points to the plugin's documentation, unless the plugin gave a remedy of its own.
fn explained(name: &str, error: Error) -> Error {
    if error.remedy().is_some() { error } else { error.help(format!("`titer explain {name}` shows its settings")) }
}

/// The architecture of a model pretrained here. The vocabulary comes from the task when training begins; here it only
/// has to be one that the task could have.
fn build_model(entry: &ModelEntry, settings: &Value, task: &dyn Task) -> Result<Box<dyn Model>> {
    let mut settings = settings.as_object().cloned().unwrap_or_default();
    if let (Some(size), Some(words)) = (settings.get_mut("vocab_size"), task.vocabulary()) {
        *size = Value::from(words.len());
    }
    (entry.build)(&Settings::from(settings))
}

/// The files of a checkpoint folder that can change what it computes, sorted by name.
fn model_files(folder: &Path) -> Result<Vec<PathBuf>> {
    const EXTENSIONS: [&str; 5] = ["safetensors", "json", "model", "jinja", "txt"];
    let listing = std::fs::read_dir(folder).map_err(|error| {
        io_error("read the checkpoint folder", folder, error)
            .help("set `base.path` to a folder with config.json, model.safetensors and tokenizer.json")
    })?;
    let mut files: Vec<PathBuf> = listing
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().and_then(std::ffi::OsStr::to_str).is_some_and(|ext| EXTENSIONS.contains(&ext)))
        .collect();
    files.sort();
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::AdapterSpec;
    use crate::testing::{load, problems};

    #[test]
    fn the_sample_resolves() {
        let experiment = super::resolve(&load(&[], &[]).unwrap()).unwrap_or_else(|problems| panic!("{problems}"));
        assert_eq!(experiment.methods[1].align.as_ref().unwrap().spec.settings["rho"], 2.0);
        assert_eq!(experiment.fine_tune.harmful.unwrap().rows, 4);
    }

    #[test]
    fn the_user_may_train_another_shape_than_the_alignment() {
        let loaded = load(&[("samples = 40", "samples = 40\nlora = { r = 3 }")], &[]).unwrap();
        let experiment = super::resolve(&loaded).unwrap_or_else(|problems| panic!("{problems}"));
        let rank = |adapter: &AdapterSpec| match adapter {
            AdapterSpec::Fresh(lora) => lora.r,
            other => panic!("{other:?}"),
        };
        assert_eq!(rank(&experiment.fine_tune.adapter), 3);
        assert_eq!(rank(&experiment.align.unwrap().adapter), 8);
    }

    #[test]
    fn each_mistake_is_told() {
        let train = "train = { epochs = 2, batch_size = 4, learning_rate = 1e-3 }";
        for (from, to, expected) in [
            ("\"demo\"", "\"../demo\"", "key: experiment"),
            ("\"demo\"", "\"/tmp/demo\"", "is not the name of one folder"),
            ("\"demo\"", "\"a/b\"", "is not the name of one folder"),
            ("\"demo\"", "\"demo/\"", "is not the name of one folder"),
            ("\"demo\"", "\"..\"", "is not the name of one folder"),
            ("\"demo\"", "'a\\b'", "is not the name of one folder"),
            ("seeds = [0, 1]\n\n[lora]", "seeds = []\n\n[lora]", "the list is empty: nothing would run"),
            ("seeds = [0, 1]\n\n[lora]", "seeds = [1, 1]\n\n[lora]", "`1` appears twice"),
            ("harmful_ratios = [0.0, 0.1]", "harmful_ratios = [0.0, 1.1]", "must lie in [0, 1], found `1.1`"),
            ("samples = 40", "samples = 3", "`0.1` of 3 rows would be 0 rows, which is 0.000 of them"),
            ("\"q_proj\"", "\"q_prj\"", "no linear layer `q_prj`; did you mean `q_proj`?"),
            ("\"fake-model\"", "\"fake-modl\"", "unknown model `fake-modl`; did you mean `fake-model`?"),
            ("\"fake-judge\"", "\"fake-juge\"", "unknown judge `fake-juge`; did you mean `fake-judge`?"),
            ("task = \"fake-rows\", rows = 50", "task = \"fake-row\", rows = 50", "key: align.data.0.task"),
            ("\"fake-shield\"", "\"fake-shild\"", "unknown defense `fake-shild`; did you mean `fake-shield`?"),
            ("rho = 2.0", "roh = 2.0", "key: methods.1.align.roh"),
            ("rho = 2.0", "rho = -2.0", "`rho` must be at least 0"),
            ("rho = 2.0", "rho = \"a\"", "key: methods.1.align.rho"),
            ("fine_tune = \"fake-plain\"", "fine_tune = \"fake-shield\"", "does not act at the stage `fine_tune`"),
            ("fine_tune = \"fake-plain\"", "fine_tune = \"fake-elsewhere\"", "acts on the sites `expert_out`"),
            ("[streams]\nharmful", "[streams]\nother", "draws from the stream `harmful`, which is not configured"),
            ("name = \"Shield\"", "name = \"none\"", "`none` appears twice"),
            (train, &train.replace("epochs", "steps = 3, epochs"), "either `steps` or `epochs`; both are given"),
            (train, &train.replace("epochs = 2, ", ""), "either `steps` or `epochs`; neither is given"),
            (train, &train.replace("size = 4", "size = 0"), "expected at least 1, found `0`"),
            (train, &train.replace("1e-3", "1e-3, warmup = 2"), "key: align.train.warmup"),
            (train, &train.replace("1e-3", "1e-3, checkpointing = true"), "gradient checkpointing: it looks inside"),
            (
                "align = \"none\"\n",
                "",
                "lacks the key `align`: `align = \"sft\"` for plain alignment, `align = \"none\"` for none",
            ),
            ("rows = 100", "word = \"x\"", "the number of rows is missing"),
            ("word = \"hello\"", "wrd = \"hello\"", "unknown setting `wrd`; did you mean `word`?"),
            ("word = \"hello\"", "file = \"no.csv\"", "cannot read"),
            ("judges = [\"fake-judge\"]", "", "need a judge"),
            ("samples = 40", "samples = 40\nlora = { r = 0 }", "key: fine_tune.lora.r"),
            ("samples = 40", "samples = 40\nlora = { target_modules = [\"q_prj\"] }", "did you mean `q_proj`?"),
            ("samples = 40", "samples = 40\nmode = \"single\"\nlora = {}", "no adapter of the user's own"),
        ] {
            let text = problems(&[(from, to)]);
            assert!(text.contains(expected), "`{to}` should give `{expected}`, gave\n{text}");
            assert!(text.contains("help: "), "no remedy in\n{text}");
        }
    }

    #[test]
    fn what_accumulation_makes_of_a_defense_is_noted() {
        let notes = |changes: &[(&str, &str)]| {
            let experiment =
                super::resolve(&load(changes, &[]).unwrap()).unwrap_or_else(|problems| panic!("{problems}"));
            experiment.methods.into_iter().map(|method| method.notes).collect::<Vec<_>>()
        };
        assert!(notes(&[]).concat().is_empty());
        let noted = notes(&[("epochs = 2, batch_size = 4", "epochs = 2, accumulate = 3, batch_size = 4")]);
        let expected = "`fake-shield` with 3 accumulated batches of 4 rows is not one batch of 12: it sees batches";
        assert_eq!(noted, [vec![], vec![expected.to_owned()]]);
    }

    #[test]
    fn published_values_are_checked() {
        let judges = "judges = [\"fake-judge\"]\n";
        let row = "[[published]]\nsource = \"a table\"\nmethod = \"Shield\"\ntask = \"chat\"\nsamples = 40\n\
                   harmful_ratios = [0.1]\nharmful_score = [50.0]\nn_prompts = { harmful = 5, task = 5 }\njudge = \"x\"\n";
        for (from, to, expected) in [
            ("\"Shield\"", "\"Sheild\"", "`Sheild` is not in this configuration; did you mean `Shield`?"),
            ("\"chat\"", "\"chatter\"", "key: published.0.task"),
            ("samples = 40", "samples = 40\nlora = \"duble\"", "did you mean `double`?"),
            ("[50.0]", "[50.0, 51.0]", "2 values for 1 harmful ratios"),
            ("[50.0]", "[150.0]", "must lie in [0, 100], found `150`"),
            ("task = 5", "task = 0", "key: published.0.n_prompts"),
            ("source", "sauce", "did you mean `source`?"),
        ] {
            let text = problems(&[(judges, &format!("{judges}\n{}", row.replacen(from, to, 1)))]);
            assert!(text.contains(expected), "`{to}` should give `{expected}`, gave\n{text}");
            assert!(text.contains("help: "), "no remedy in\n{text}");
        }
    }

    #[test]
    fn missing_data_and_a_wrong_key_have_their_own_exit_codes() {
        let missing = super::resolve(&load(&[("word = \"hello\"", "file = \"no.csv\"")], &[]).unwrap()).unwrap_err();
        assert_eq!(missing.exit_code(), std::process::ExitCode::from(3));
        let wrong = super::resolve(&load(&[("rho = 2.0", "roh = 2.0")], &[]).unwrap()).unwrap_err();
        assert_eq!(wrong.exit_code(), std::process::ExitCode::from(2));
    }

    #[test]
    fn all_mistakes_come_at_once() {
        let text = problems(&[("rho = 2.0", "roh = 2.0"), ("\"q_proj\"", "\"q_prj\""), ("[0.0, 0.1]", "[0.0, 3.0]")]);
        assert!(text.contains("\n3 errors\n"), "{text}");
    }
}
