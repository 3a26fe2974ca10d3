//! Methods: the defenses of each stage and what stands against their combination.

use std::collections::BTreeMap;

use serde_json::Map;
use titer_core::bounds;
use titer_core::model::sites_of_kind;
use titer_core::registry::find;
use titer_core::{Conflict, DefenseEntry, Model, Settings, Stack, Stage};

use super::checks::{Resolver, explained};
use crate::experiment::config::{Config, DefenseRef, FineTuneMode};
use crate::experiment::spec::StreamSpec;
use crate::experiment::{Defense, Method};
use crate::names;

/// The defense of a stage for which the method names none.
const PLAIN: &str = "sft";
/// The word for "no defense here".
const NONE: &str = "none";

impl Resolver<'_> {
    pub(super) fn methods(
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
    pub(super) fn conflicts(&mut self, key: &str, mode: FineTuneMode, method: &mut Method) {
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
    pub(super) fn limits(&mut self, key: &str, config: &Config, method: &mut Method) {
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

    pub(super) fn defense(
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
}
