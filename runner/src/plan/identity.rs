//! What makes a number: which inputs enter the key of a stage, and the identity of a row of the table.
//!
//! Every input is written down here, field by field. The structs are taken apart without `..`, so a new field does not
//! compile until someone has decided whether it belongs to the identity. How a struct is serialised elsewhere changes
//! no key, and neither does the place of a file: data and checkpoints enter by the hash of their content.
//!
//! A *stage* is identified by what it computes: its specification, the key of the stage it starts from, and the
//! arithmetic. A *row* has three parts, each a readable manifest with a hash over it:
//!
//! | part | what it says | rows that differ in it |
//! |---|---|---|
//! | protocol | how it was measured: prompts, template, decoding, judge, scoring | never stand in one table |
//! | setting | what was attacked and how: base, alignment, attack, adapters, dtype, arithmetic | stand in blocks of their own |
//! | coordinates | where in the table: method, task, p, n, rate, seeds | are the cells of one block |

use std::collections::BTreeMap;

use serde_json::{Value, json};
use titer_core::optim::Schedule;
use titer_core::registry::{Entry, find};
use titer_core::weights::LoraConfig;
use titer_core::{JudgeEntry, Stage, TaskEntry};

use crate::experiment::axes::{Axis, Point};
use crate::experiment::config::FineTuneMode;
use crate::experiment::spec::{
    AdapterSpec, EncodingSpec, LoadSpec, OptimSpec, PATH, PluginSpec, PretrainSpec, RowsSpec, Steps, StreamSpec,
};
use crate::experiment::{Align, Base, Defense, Experiment, FineTune, Method, Probe, UserRows};
use crate::plan::{AnswerSpec, JudgeSpec, MixSpec, PostSpec, StageSpec, TrainSpec};
use crate::store::Key;

/// The version of a kind of stage. Raise it when stages of the same inputs would write another artifact than before.
fn version(spec: &StageSpec) -> u32 {
    match spec {
        StageSpec::Load(_) => 2,
        // Templates are rendered to the byte, any end token ends an answer, prompts may be too long.
        StageSpec::Pretrain(_)
        | StageSpec::Train(_)
        | StageSpec::Post(_)
        | StageSpec::Answer(_)
        | StageSpec::Judge(_) => 3,
    }
}

/// The version of the manifests of rows.
const ROW: u32 = 2;

/// Every input of a stage. `arithmetic` is [`titer_core::arithmetic::identity`].
pub fn of_stage(spec: &StageSpec, parent: Option<&Key>, arithmetic: &str) -> Value {
    let (kind, inputs) = match spec {
        StageSpec::Pretrain(spec) => ("pretrain", pretrain(spec)),
        StageSpec::Load(spec) => ("load", load(spec)),
        StageSpec::Train(spec) => ("train", train(spec)),
        StageSpec::Post(spec) => ("post", post(spec)),
        StageSpec::Answer(spec) => ("answer", answer(spec)),
        StageSpec::Judge(spec) => ("judge", judge(spec)),
    };
    json!({ "stage": kind, "version": version(spec), "parent": parent, "arithmetic": arithmetic, "inputs": inputs })
}

fn pretrain(spec: &PretrainSpec) -> Value {
    let PretrainSpec { model, data, max_length, optim, seed, dtype } = spec;
    json!({
        "model": plugin(model),
        "data": rows(data),
        "max_length": max_length,
        "train": training(optim),
        "seed": seed,
        "dtype": dtype,
    })
}

fn load(spec: &LoadSpec) -> Value {
    // The content stands for the folder.
    let LoadSpec { model, version, plugin, path: _, content, dtype, hub: _ } = spec;
    json!({ "model": { "name": model, "version": version, "plugin": plugin }, "content": content, "dtype": dtype })
}

fn train(spec: &TrainSpec) -> Value {
    let TrainSpec { phase, defense, data, harmful, streams, monitor, encoding, optim, adapter, seed } = spec;
    json!({
        "phase": phase_name(*phase),
        "defense": plugin(defense),
        "data": data.iter().map(rows).collect::<Vec<_>>(),
        "harmful": harmful.as_ref().map(|MixSpec { source, ratio }| json!({ "rows": rows(source), "ratio": ratio })),
        "streams": streams.iter().map(stream).collect::<Vec<_>>(),
        "monitor": monitor.as_ref().map(rows),
        "encoding": self::encoding(encoding),
        "train": training(optim),
        "adapter": self::adapter(adapter),
        "seed": seed,
    })
}

fn post(spec: &PostSpec) -> Value {
    let PostSpec { defense, streams, encoding, batch_size, seed } = spec;
    json!({
        "defense": plugin(defense),
        "streams": streams.iter().map(stream).collect::<Vec<_>>(),
        "encoding": self::encoding(encoding),
        "batch_size": batch_size,
        "seed": seed,
    })
}

fn answer(spec: &AnswerSpec) -> Value {
    // Answers do not depend on how many prompts are answered at once.
    let AnswerSpec { probe, prompts, template, max_new_tokens, batch_size: _ } = spec;
    json!({
        "probe": probe,
        "prompts": rows(prompts),
        "template": template,
        "max_new_tokens": max_new_tokens,
        "decoding": DECODING,
    })
}

fn judge(spec: &JudgeSpec) -> Value {
    let JudgeSpec { probe, judge, prompts, labels } = spec;
    json!({ "probe": probe, "judge": judge.as_ref().map(placeless::<JudgeEntry>), "prompts": rows(prompts), "labels": labels })
}

/// How answers are decoded.
const DECODING: &str = "greedy";

fn plugin(spec: &PluginSpec) -> Value {
    let PluginSpec { name, settings, version, plugin, content } = spec;
    let mut shown = json!({ "name": name, "version": version, "settings": settings, "plugin": plugin });
    // Most plugins read no files.
    if !content.is_empty() {
        shown["content"] = json!(content);
    }
    shown
}

/// A plugin. The content of its files stands for its settings that are paths: those say only whether they are given.
fn placeless<E: Entry>(spec: &PluginSpec) -> Value {
    let mut shown = plugin(spec);
    // A plugin that does not say which files it reads is known by their paths at least.
    if spec.content.is_empty() {
        return shown;
    }
    let schema = find::<E>(&spec.name).map(|entry| (entry.settings().schema)().to_value()).unwrap_or_default();
    for (name, value) in shown["settings"].as_object_mut().into_iter().flatten() {
        if schema["properties"][name]["format"] == PATH && !value.is_null() {
            *value = json!("given");
        }
    }
    shown
}

/// A task with its data by content.
fn task(spec: &PluginSpec, content: &str) -> Value {
    let mut shown = placeless::<TaskEntry>(spec);
    shown["content"] = content.into();
    shown
}

fn rows(spec: &RowsSpec) -> Value {
    let RowsSpec { task, rows } = spec;
    json!({ "task": self::task(task, &task.content), "rows": rows })
}

fn stream(spec: &StreamSpec) -> Value {
    let StreamSpec { name, rows, batch_size } = spec;
    json!({ "name": name, "rows": self::rows(rows), "batch_size": batch_size })
}

fn encoding(spec: &EncodingSpec) -> Value {
    let EncodingSpec { template, max_length } = spec;
    json!({ "template": template, "max_length": max_length })
}

fn training(spec: &OptimSpec) -> Value {
    // Checkpointing changes no bit: the conformance suite holds every defense to that.
    let OptimSpec {
        steps,
        batch_size,
        accumulate,
        bucket,
        learning_rate,
        schedule,
        warmup,
        weight_decay,
        betas,
        eps,
        clip,
        checkpointing: _,
    } = spec;
    let (unit, count) = match steps {
        Steps::Steps(count) => ("steps", count),
        Steps::Epochs(count) => ("epochs", count),
    };
    let schedule = match schedule {
        Schedule::Constant => "constant",
        Schedule::ConstantWithWarmup => "constant_with_warmup",
        Schedule::Linear => "linear",
        Schedule::Cosine => "cosine",
    };
    json!({
        unit: count,
        "batch_size": batch_size,
        "accumulate": accumulate,
        "bucket": bucket,
        "learning_rate": learning_rate,
        "schedule": schedule,
        "warmup": warmup,
        "weight_decay": weight_decay,
        "betas": betas,
        "eps": eps,
        "clip": clip,
    })
}

fn adapter(spec: &AdapterSpec) -> Value {
    let (mode, lora) = match spec {
        AdapterSpec::Fresh(lora) => ("fresh", Some(lora)),
        AdapterSpec::Continue(lora) => ("continue", Some(lora)),
        AdapterSpec::Full => ("full", None),
    };
    let lora = lora.map(|LoraConfig { r, alpha, dropout, target_modules }| {
        let mut lora = json!({ "r": r, "alpha": alpha, "dropout": dropout, "target_modules": target_modules });
        if *dropout > 0. {
            lora["dropout_generator"] = json!("philox4x32-10");
        }
        lora
    });
    json!({ "mode": mode, "lora": lora })
}

fn phase_name(phase: Stage) -> &'static str {
    match phase {
        Stage::Align => "align",
        Stage::FineTune => "fine_tune",
        Stage::Post => "post",
    }
}

/// How the rows of a task are measured. Only the headline judge counts: the others' numbers stand beside its own.
pub fn protocol(experiment: &Experiment, task: &UserRows) -> Value {
    let mut probes = BTreeMap::new();
    for probe in experiment.probes.iter().chain([&task.probe]) {
        let Probe { name, prompts, prompts_content, max_new_tokens } = probe;
        probes.insert(
            *name,
            json!({
                "prompts": prompts_content,
                "rows": prompts.rows,
                "max_new_tokens": max_new_tokens,
            }),
        );
    }
    // Only of the user's task does the task itself say which answer is right.
    json!({
        "version": ROW,
        "probes": probes,
        "template": experiment.encoding.template,
        "decoding": DECODING,
        "judge": experiment.judges.first().map(placeless::<JudgeEntry>),
        "labels": task.labels,
        "scoring": self::task(&task.probe.prompts.task, ""),
    })
}

/// What is attacked, and how: all that the cells of a block share. What is a coordinate on one of `axes` is left out.
pub fn setting(point: &Point, axes: &[Axis]) -> Value {
    let Experiment { encoding, align, fine_tune, arithmetic, .. } = point.experiment;
    // The lists and what follows from them are coordinates, and the monitor only looks on.
    let FineTune { tasks: _, samples: _, harmful, ratios: _, learning_rates: _, mode, adapter: _, monitor: _, optim } =
        fine_tune;
    let base = match point.base {
        Base::Load(spec) => load(spec),
        Base::Pretrain(spec) => pretrain(spec),
    };
    let align = align.as_ref().map(|Align { data, adapter: _, optim }| {
        json!({
            "data": data.iter().map(rows).collect::<Vec<_>>(),
            "adapter": point.align_adapter.as_ref().map(adapter),
            "train": training(optim),
        })
    });
    // How many rows are drawn is a coordinate.
    let source = |spec: &RowsSpec| task(&spec.task, &spec.task.content);
    let mut setting = json!({
        "version": ROW,
        "base": base,
        "encoding": self::encoding(encoding),
        "align": align,
        "attack": {
            "user": source(&point.task.probe.prompts),
            "harmful": harmful.as_ref().map(source),
            "mode": FineTuneMode::name(*mode),
            "adapter": adapter(&point.user_adapter),
            "train": training(optim),
        },
        "arithmetic": arithmetic,
    });
    axes.iter().flat_map(|axis| axis.in_setting).for_each(|path| remove(&mut setting, path));
    setting
}

/// What a method is: its defenses with their settings and the data they draw from besides the stage's own.
pub fn method(method: &Method) -> Value {
    // Notes and what is built follow from the rest; the name is a coordinate of its own.
    let Method { name: _, align, align_steps, fine_tune, post, notes: _ } = method;
    let defense = |Defense { spec, built: _, streams, passes: _, limits: _ }: &Defense| json!({ "defense": plugin(spec), "streams": streams.iter().map(stream).collect::<Vec<_>>() });
    json!({
        "align": align.as_ref().map(defense),
        "align_steps": align_steps,
        "fine_tune": defense(fine_tune),
        "post": post.as_ref().map(defense),
    })
}

/// Takes the value at a path such as `attack.train.learning_rate` out of a manifest.
fn remove(manifest: &mut Value, path: &str) {
    let (parents, name) = path.rsplit_once('.').map_or((None, path), |(parents, name)| (Some(parents), name));
    let mut parts = parents.into_iter().flat_map(|parents| parents.split('.'));
    let parent = parts.try_fold(manifest, |value, part| value.get_mut(part));
    if let Some(fields) = parent.and_then(Value::as_object_mut) {
        fields.remove(name);
    }
}
