//! The base model, and the adapters that it can take.

use std::path::{Path, PathBuf};

use serde_json::Value;
use titer_core::bounds;
use titer_core::causal_lm::{WEIGHTS, file_of, model_files, model_of, read_config};
use titer_core::gguf::Gguf;
use titer_core::registry::{did_you_mean, find};
use titer_core::text::Template;
use titer_core::weights::LoraConfig;
use titer_core::{Error, Model, ModelEntry, Result, Settings, Task};

use super::checks::{Resolver, explained};
use super::data::{Drawn, Use};
use crate::experiment::Base;
use crate::experiment::config::{BaseConfig, EncodingConfig};
use crate::experiment::exclusive::ORIGIN;
use crate::experiment::spec::{LoadSpec, PluginSpec, PretrainSpec, absolute};
use crate::hub::{self, HubName};
use crate::plugins::identity;

const NO_REVISION: &str = "only a model of the hub has a revision";

impl Resolver<'_> {
    pub(super) fn base(&mut self, base: &BaseConfig, dtype: &str) -> Option<(Vec<Base>, Box<dyn Model>)> {
        let entry = self.take("base.model", find::<ModelEntry>(&base.model));
        match (&base.path, &base.pretrain) {
            (Some(path), None) => {
                self.check(
                    base.shape.is_empty(),
                    "base.shape",
                    "a checkpoint has its own shape",
                    "remove [base.shape]",
                );
                let (spec, model) = self.checkpoint(entry?, path, base.revision.as_deref(), dtype)?;
                Some((vec![Base::Load(spec)], model))
            }
            (None, Some(pretrain)) => {
                self.check(base.revision.is_none(), "base.revision", NO_REVISION, "remove it");
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
                let (name, version) = (base.model.clone(), entry?.version);
                let model_spec = PluginSpec { name, settings, version, plugin, content: String::new() };
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
                self.not_one("base", &ORIGIN, path.is_some());
                None
            }
        }
    }

    pub(super) fn checkpoint(
        &mut self,
        entry: &ModelEntry,
        path: &Path,
        revision: Option<&str>,
        dtype: &str,
    ) -> Option<(LoadSpec, Box<dyn Model>)> {
        let folder = self.source.folder_of("base.path").join(path);
        let (hub, folder) = match self.take("base", hub_name(&folder, path, revision))? {
            Some(name) => {
                let (model, folder) = self.take("base.path", hub::open(&name))?;
                (Some(model), folder)
            }
            None => (None, folder),
        };
        let start = self.source.start_of("base.path", path).map_or_else(String::new, |start| start + "; ");
        let files = model_files(&folder).map_err(|error| {
            error.help(format!("{start}set it to a folder with config.json, model.safetensors and tokenizer.json"))
        });
        let files = self.take("base.path", files)?;
        let config = self.take("base.path", read_config(&folder))?;
        let model = self.take("base.path", model_of(entry, &config, &file_of(&folder, "config.json")))?;
        let holds_weights =
            |file: &PathBuf| Gguf::is(file) || file.extension().is_some_and(|extension| extension == WEIGHTS);
        // Weights of the hub come when nothing else is wrong: see `Experiment::fetch_weights`.
        let content = if hub.is_none() && files.iter().any(holds_weights) {
            let content = self.content(&files, |_, _| "check the path".to_owned());
            self.take("base.path", content)?
        } else {
            LoadSpec::UNKNOWN.to_owned()
        };
        let plugin = self.take("base.model", identity(entry))?;
        let (model_name, version, dtype) = (entry.name.to_owned(), entry.version, dtype.to_owned());
        Some((LoadSpec { model: model_name, version, plugin, path: absolute(&folder), content, dtype, hub }, model))
    }

    /// The template of prompts: a built-in one, a Jinja text, or that of the base model.
    pub(super) fn template(&mut self, encoding: &EncodingConfig, bases: &[Base]) -> Template {
        let plain = Template::new(&encoding.template).spelled_out();
        let template = if encoding.template == Template::MODEL {
            match bases {
                [Base::Load(spec), ..] => {
                    let template = Template::of_model(&spec.path, encoding.system.clone());
                    self.take("encoding.template", template).unwrap_or(plain)
                }
                _ => {
                    let message = "a model that is pretrained here has no chat template";
                    self.problem("encoding.template", message, "set it to \"chat\", or `base.path` to a checkpoint");
                    plain
                }
            }
        } else {
            self.check(
                encoding.system.is_none(),
                "encoding.system",
                "only a chat template has a place for a system prompt",
                "set `encoding.template` to \"model\", or write the prompt into the template",
            );
            plain
        };
        self.take("encoding", template.check());
        template
    }

    pub(super) fn lora_targets(&mut self, key: &str, lora: &LoraConfig, model: &dyn Model) {
        let linears = model.params().linear_names();
        let targets = lora.target_modules.iter().flatten().enumerate();
        for (index, target) in targets.filter(|(_, target)| !linears.contains(&target.as_str())) {
            let hint = did_you_mean(target, linears.iter().copied());
            let known = linears.join(", ");
            self.problem(
                &format!("{key}.target_modules.{index}"),
                &format!("the model has no linear layer `{target}`{hint}"),
                &format!("its linear layers: {known}"),
            );
        }
    }
}

/// The model of the hub that `path` names, if it does not lead to a folder.
fn hub_name(folder: &Path, path: &Path, revision: Option<&str>) -> Result<Option<HubName>> {
    match (HubName::of(path, folder).map_err(|error| error.key("path"))?, revision) {
        (Some(name), Some(revision)) => name.at(revision).map(Some).map_err(|error| error.key("revision")),
        (None, Some(_)) => {
            let help = "remove it, or name a model of the hub by base.path";
            Err(Error::config(NO_REVISION).key("revision").help(help))
        }
        (name, None) => Ok(name),
    }
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
