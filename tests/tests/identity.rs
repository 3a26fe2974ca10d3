//! What differs stays different (law 10): every key of the configuration changes the key of a stage, the identity of a
//! row, or stands on a short list of keys that cannot change a result, each with its reason.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde_json::{Value, json};
use titer::experiment::config::Config;
use titer::experiment::layers::Source;
use titer::experiment::resolve;
use titer::experiment::spec::{PluginSpec, RowsSpec};
use titer::manifest::differences;
use titer::plan::identity::of_stage;
use titer::plan::planner;
use titer::plan::{AnswerSpec, JudgeSpec, Plan, StageSpec};
use titer::reference::effects;
use titer_core::{DefenseEntry, Entry, JudgeEntry, ModelEntry, Settings, SettingsType, TaskEntry, registry};

/// One cell, in which every stage has a defense that draws from a stream.
const CONFIG: &str = r#"
experiment = "demo"

[base]
model = "llama"

[base.shape]
hidden_size = 16
intermediate_size = 24
num_hidden_layers = 2
num_attention_heads = 2
max_position_embeddings = 64
vocab_size = 100

[base.pretrain]
data = { task = "world-text", rows = 100 }
train = { steps = 10, batch_size = 4, learning_rate = 1e-3, warmup = 0.1 }

[encoding]
template = "chat"

[align]
data = [{ task = "world-safe", rows = 50 }]
train = { steps = 10, batch_size = 4, learning_rate = 1e-3, warmup = 0.1 }

[fine_tune]
tasks = [{ name = "news", task = "world-agnews" }]
samples = 40
harmful = { task = "world-harmful" }
harmful_ratios = [0.1]
monitor = { task = "world-harmful", rows = 5 }
train = { steps = 10, batch_size = 4, learning_rate = 1e-3, warmup = 0.1 }

[streams]
harmful = { task = "world-harmful", rows = 20 }
safe = { task = "world-safe", rows = 20 }

[evaluate]
harmful = { task = "world-harmful", rows = 10 }
benign = { task = "world-benign", rows = 10 }
task_prompts = 5
judges = ["world"]

[[methods]]
name = "Stack"
align = { defense = "booster", rho = 0.1 }
fine_tune = { defense = "vlguard" }
post = { defense = "antidote", keep_safe = true }
"#;

/// The first stage that a key reaches. That stage and all that follow it get new keys; none before it does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Reach {
    Base,
    Align,
    FineTune,
    Post,
    /// Answers to one probe, and the verdicts on them.
    Answers(&'static str),
    /// Verdicts on harmful and benign answers.
    Verdicts,
    /// No stage, for the reason given.
    Nothing(&'static str),
}

/// The part of a row's identity that a key changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    Protocol,
    Setting,
    Coordinates,
    /// Both: the template is what the model is trained with and asked with.
    ProtocolAndSetting,
    None,
}

use Part::{Coordinates, Protocol, ProtocolAndSetting, Setting};
use Reach::{Align, Answers, Base, FineTune, Nothing, Post, Verdicts};

const SHOWN: &str = "only how results are shown or where they are put";
const SAME_BITS: &str = "results do not depend on it: asserted by the tests of checkpoints, batches and devices";

/// Every key of the schema: the key, an assignment that changes it, what it reaches.
fn table() -> Vec<(String, String, Reach, Part)> {
    let mut table: Vec<(String, String, Reach, Part)> = [
        ("experiment", "experiment=other", Nothing(SHOWN), Part::None),
        ("seeds", "seeds=[7]", Align, Coordinates),
        ("device", "device=cpu", Nothing("what it changes is the arithmetic, which is part of every key"), Part::None),
        ("arithmetic", "arithmetic=native", Base, Setting),
        ("dtype", "dtype=bf16", Base, Setting),
        ("plugins.paths", "", Nothing("the hash of a plugin's code is part of each key it enters"), Part::None),
        ("plugins.paths.path", "", Nothing("as above"), Part::None),
        ("plugins.paths.blake3", "", Nothing("as above"), Part::None),
        ("checkpoint_seconds", "checkpoint_seconds=1.0", Nothing(SAME_BITS), Part::None),
        ("lora.r", "lora.r=4", Align, Setting),
        ("lora.alpha", "lora.alpha=4.0", Align, Setting),
        ("lora.dropout", "lora.dropout=0.1", Align, Setting),
        ("lora.target_modules", "lora.target_modules=[\"q_proj\"]", Align, Setting),
        ("base.model", "base.model=mistral", Base, Setting),
        ("base.path", "", Nothing("the content of the folder counts: see the test of content"), Part::None),
        ("base.revision", "", Nothing("the content of the files counts: see the tests of the hub"), Part::None),
        ("base.seeds", "base.seeds=[7]", Base, Coordinates),
        ("base.shape.*", "base.shape.hidden_size=32", Base, Setting),
        ("base.pretrain.max_length", "base.pretrain.max_length=48", Base, Setting),
        ("base.pretrain.data.task", "base.pretrain.data={ task = \"world-benign\", rows = 100 }", Base, Setting),
        ("base.pretrain.data.rows", "base.pretrain.data.rows=101", Base, Setting),
        (
            "base.pretrain.data.*",
            "base.pretrain.data={ task = \"world-safe\", rows = 100, benign_fraction = 0.5 }",
            Base,
            Setting,
        ),
        ("encoding.system", "", Align, ProtocolAndSetting),
        ("encoding.template", "encoding.template=alpaca", Align, ProtocolAndSetting),
        ("encoding.max_length", "encoding.max_length=48", Align, Setting),
        ("align.data.task", "align.data.0.task=world-benign", Align, Setting),
        ("align.data.rows", "align.data.0.rows=51", Align, Setting),
        ("align.data.*", "align.data.0.benign_fraction=0.5", Align, Setting),
        ("align.adapter", "align.adapter=full", Align, Setting),
        ("fine_tune.tasks.name", "fine_tune.tasks.0.name=other", Nothing(SHOWN), Coordinates),
        ("fine_tune.tasks.task", "fine_tune.tasks.0.task=world-sst2", FineTune, ProtocolAndSetting),
        ("fine_tune.tasks.max_new_tokens", "fine_tune.tasks.0.max_new_tokens=9", Answers("task"), Protocol),
        (
            "fine_tune.tasks.*",
            "",
            Nothing("the tasks of the embedded world have no settings: see the test of settings"),
            Part::None,
        ),
        ("fine_tune.samples", "fine_tune.samples=50", FineTune, Coordinates),
        ("fine_tune.harmful.task", "fine_tune.harmful.task=world-safe", FineTune, Setting),
        (
            "fine_tune.harmful.rows",
            "fine_tune.harmful.rows=9",
            Nothing("only bounds how many rows may be drawn"),
            Part::None,
        ),
        (
            "fine_tune.harmful.*",
            "fine_tune.harmful={ task = \"world-safe\", benign_fraction = 0.5 }",
            FineTune,
            Setting,
        ),
        ("fine_tune.harmful_ratios", "fine_tune.harmful_ratios=[0.2]", FineTune, Coordinates),
        ("fine_tune.learning_rates", "fine_tune.learning_rates=[2e-3]", FineTune, Coordinates),
        ("fine_tune.mode", "fine_tune.mode=single", FineTune, Setting),
        ("fine_tune.lora.r", "fine_tune.lora.r=4", FineTune, Setting),
        ("fine_tune.lora.alpha", "fine_tune.lora.alpha=4.0", FineTune, Setting),
        ("fine_tune.lora.dropout", "fine_tune.lora.dropout=0.1", FineTune, Setting),
        ("fine_tune.lora.target_modules", "fine_tune.lora.target_modules=[\"q_proj\"]", FineTune, Setting),
        ("fine_tune.monitor.task", "fine_tune.monitor.task=world-safe", FineTune, Part::None),
        ("fine_tune.monitor.rows", "fine_tune.monitor.rows=6", FineTune, Part::None),
        (
            "fine_tune.monitor.*",
            "fine_tune.monitor={ task = \"world-safe\", rows = 5, benign_fraction = 0.5 }",
            FineTune,
            Part::None,
        ),
        ("streams.batch_size", "streams.harmful.batch_size=2", Align, Coordinates),
        ("streams.task", "streams.safe.task=world-benign", FineTune, Coordinates),
        ("streams.rows", "streams.safe.rows=21", FineTune, Coordinates),
        ("streams.*", "streams.safe.benign_fraction=0.5", FineTune, Coordinates),
        ("evaluate.harmful.task", "evaluate.harmful.task=world-benign", Answers("harmful"), Protocol),
        ("evaluate.harmful.rows", "evaluate.harmful.rows=11", Answers("harmful"), Protocol),
        (
            "evaluate.harmful.*",
            "evaluate.harmful={ task = \"world-safe\", rows = 10, benign_fraction = 0.5 }",
            Answers("harmful"),
            Protocol,
        ),
        ("evaluate.benign.task", "evaluate.benign.task=world-harmful", Answers("benign"), Protocol),
        ("evaluate.benign.rows", "evaluate.benign.rows=11", Answers("benign"), Protocol),
        (
            "evaluate.benign.*",
            "evaluate.benign={ task = \"world-safe\", rows = 10, benign_fraction = 0.5 }",
            Answers("benign"),
            Protocol,
        ),
        ("evaluate.task_prompts", "evaluate.task_prompts=6", Answers("task"), Protocol),
        ("evaluate.max_new_tokens", "evaluate.max_new_tokens=9", Answers("judged"), Protocol),
        ("evaluate.judges", "evaluate.judges=[\"refusal-phrases\"]", Verdicts, Protocol),
        ("evaluate.judges.judge", "evaluate.judges=[{ judge = \"refusal-phrases\" }]", Verdicts, Protocol),
        ("evaluate.judges.*", "", Nothing("see the test of settings"), Part::None),
        ("evaluate.batch_size", "evaluate.batch_size=7", Nothing(SAME_BITS), Part::None),
        ("methods.name", "methods.0.name=other", Nothing(SHOWN), Coordinates),
        ("methods.align", "methods.0.align=vaccine", Align, Coordinates),
        ("methods.align.defense", "methods.0.align={ defense = \"repnoise\" }", Align, Coordinates),
        ("methods.align.*", "methods.0.align.rho=0.2", Align, Coordinates),
        ("methods.align_steps", "methods.0.align_steps=11", Align, Coordinates),
        ("methods.fine_tune", "methods.0.fine_tune=sft", FineTune, Coordinates),
        ("methods.fine_tune.defense", "methods.0.fine_tune.defense=lisa", FineTune, Coordinates),
        ("methods.fine_tune.*", "methods.0.fine_tune.algorithm=weighted", FineTune, Coordinates),
        ("methods.post", "methods.0.post=none", Post, Coordinates),
        ("methods.post.defense", "methods.0.post={ defense = \"resta\" }", Post, Coordinates),
        ("methods.post.*", "methods.0.post.ratio=0.2", Post, Coordinates),
    ]
    .map(|(key, assignment, from, part)| (key.to_owned(), assignment.to_owned(), from, part))
    .into();
    for (stage, from) in [("base.pretrain", Base), ("align", Align), ("fine_tune", FineTune)] {
        let rate = if stage == "fine_tune" { Coordinates } else { Setting };
        for (key, value, part) in [
            ("steps", "11", Setting),
            ("batch_size", "5", Setting),
            ("accumulate", "2", Setting),
            ("bucket", "2", Setting),
            ("learning_rate", "2e-3", rate),
            ("schedule", "linear", Setting),
            ("warmup", "0.2", Setting),
            ("weight_decay", "0.2", Setting),
            ("betas", "[0.8, 0.99]", Setting),
            ("eps", "1e-6", Setting),
            ("clip", "0.5", Setting),
        ] {
            let key = format!("{stage}.train.{key}");
            table.push((key.clone(), format!("{key}={value}"), from, part));
        }
        let key = format!("{stage}.train.checkpointing");
        table.push((key.clone(), format!("{key}=true"), Nothing(SAME_BITS), Part::None));
        // `--set` lays a table over the one that is there, and `steps` would stay beside `epochs`.
        table.push((format!("{stage}.train.epochs"), format!("{EPOCHS}{stage}"), from, Setting));
    }
    table
}

/// In place of an assignment: that the stage named after it counts epochs instead of steps.
const EPOCHS: &str = "epochs: ";

fn plan(folder: &Path, assignments: &[String]) -> Plan {
    let mut path = folder.join("demo.toml");
    if !path.exists() {
        std::fs::write(&path, CONFIG).expect("the configuration can be written");
    }
    let stage = assignments.first().and_then(|assignment| assignment.strip_prefix(EPOCHS));
    if let Some(stage) = stage {
        let table = CONFIG.find(&format!("[{stage}]")).expect("the table of the stage");
        let text = CONFIG[..table].to_owned() + &CONFIG[table..].replacen("steps = 10", "epochs = 1", 1);
        path = folder.join("epochs.toml");
        std::fs::write(&path, text).expect("the configuration can be written");
    }
    let assignments = if stage.is_some() { &[] } else { assignments };
    let assignments: Vec<String> = assignments.iter().filter(|text| !text.is_empty()).cloned().collect();
    let source = Source::read(&path, [], &assignments).unwrap_or_else(|error| panic!("{assignments:?}: {error}"));
    let loaded = Config::from_source(source).unwrap_or_else(|problems| panic!("{assignments:?}: {problems}"));
    planner::plan(&resolve::resolve(&loaded).unwrap_or_else(|problems| panic!("{assignments:?}: {problems}")))
}

/// Every key of the schema, without the indices of lists. `*` stands for the settings of a plugin.
fn schema_keys() -> BTreeSet<String> {
    fn walk(root: &Value, schema: &Value, path: &str, keys: &mut BTreeSet<String>) {
        let schema = match schema["$ref"].as_str() {
            Some(reference) => root.pointer(&reference[1..]).expect("a reference within the schema"),
            None => schema,
        };
        let below = |name: &str| if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") };
        let branches = ["anyOf", "allOf"].iter().flat_map(|word| schema[*word].as_array().into_iter().flatten());
        let mut leaf = true;
        for branch in branches.filter(|branch| branch["type"] != "null") {
            walk(root, branch, path, keys);
            leaf = false;
        }
        if let Some(properties) = schema["properties"].as_object() {
            properties.iter().for_each(|(name, property)| walk(root, property, &below(name), keys));
            if schema["additionalProperties"] != false {
                keys.insert(below("*"));
            }
            leaf = false;
        } else if schema["items"].is_object() {
            walk(root, &schema["items"], path, keys);
            leaf = false;
        } else if schema["additionalProperties"].is_object() {
            // A table by name: streams, prompts of published values.
            walk(root, &schema["additionalProperties"], path, keys);
            leaf = false;
        } else if schema["type"] == "object" {
            keys.insert(below("*"));
            leaf = false;
        }
        if leaf && !path.is_empty() {
            keys.insert(path.to_owned());
        }
    }
    let schema = Config::schema().to_value();
    let mut keys = BTreeSet::new();
    walk(&schema, &schema, "", &mut keys);
    // Values to compare with change no result, whatever they say.
    keys.retain(|key| !key.starts_with("published"));
    keys
}

#[test]
fn the_table_has_every_key_of_the_schema_and_no_other() {
    let listed: BTreeSet<String> = table().into_iter().map(|(key, ..)| key).collect();
    let known = schema_keys();
    let missing: Vec<_> = known.difference(&listed).collect();
    let gone: Vec<_> = listed.difference(&known).collect();
    assert!(
        missing.is_empty() && gone.is_empty(),
        "say in `table` what these keys change: {missing:?}\nthese are no keys any more: {gone:?}"
    );
}

/// What `titer explain KEY` and the reference say a key changes is what this table says, and what the next test shows.
#[test]
fn the_reference_agrees_with_the_table() {
    for (key, assignment, from, part) in table() {
        let (reach, documented) = effects::of(&key).unwrap_or_else(|| panic!("the reference lacks `{key}`"));
        // What cannot be assigned in this configuration is shown by other tests.
        if assignment.is_empty() {
            continue;
        }
        let same_reach = match (from, reach) {
            (Nothing(_), effects::Reach::Nothing(_)) => true,
            (_, effects::Reach::Drawing) => key.starts_with("streams."),
            _ => format!("{from:?}") == format!("{reach:?}"),
        };
        assert!(same_reach, "`{key}` reaches {from:?}, and the reference says {reach:?}");
        assert_eq!(format!("{part:?}"), format!("{documented:?}"), "the part of the row that `{key}` changes");
    }
}

/// The stages of a plan by where in the chain they stand: `(kind, probe)`, with their keys.
fn stages(plan: &Plan) -> BTreeMap<(Reach, String), BTreeSet<&str>> {
    let mut stages: BTreeMap<(Reach, String), BTreeSet<&str>> = BTreeMap::new();
    for stage in &plan.stages {
        let mut name = String::new();
        let kind = match &stage.spec {
            StageSpec::Pretrain(_) | StageSpec::Load(_) => Base,
            StageSpec::Train(spec) if spec.phase == titer_core::Stage::Align => Align,
            StageSpec::Train(_) => FineTune,
            StageSpec::Post(_) => Post,
            // Those of the aligned model are asked before the attack, which changes nothing about them.
            StageSpec::Answer(AnswerSpec { probe, .. }) => {
                name = format!("{probe} {}", aligned(plan, stage.parent.as_deref()));
                Answers("")
            }
            StageSpec::Judge(JudgeSpec { probe, .. }) => {
                let answer = plan.stages.iter().find(|other| Some(&other.key) == stage.parent.as_ref());
                name = format!("{probe} {}", aligned(plan, answer.and_then(|answer| answer.parent.as_deref())));
                Verdicts
            }
        };
        stages.entry((kind, name)).or_default().insert(&stage.key);
    }
    stages
}

fn aligned(plan: &Plan, model: Option<&str>) -> &'static str {
    let align = plan.cells.first().and_then(|cell| cell.align_key.as_deref());
    if model.is_some() && model == align { "aligned" } else { "final" }
}

/// Whether a stage of this kind follows from one that `from` reaches.
fn reached(from: Reach, kind: Reach, name: &str) -> bool {
    match from {
        Nothing(_) => false,
        Answers("judged") => kind >= Answers("") && !name.starts_with("task"),
        Answers(probe) => kind >= Answers("") && name.starts_with(probe),
        Verdicts => kind == Verdicts && !name.starts_with("task"),
        FineTune | Post => kind >= from && !name.ends_with("aligned"),
        Base | Align => kind >= from,
    }
}

#[test]
fn every_key_changes_what_it_reaches_and_nothing_else() {
    let folder = tempfile::tempdir().expect("a folder");
    let before = plan(folder.path(), &[]);
    let (stages_before, cell_before) = (stages(&before), &before.cells[0]);
    for (key, assignment, from, part) in table() {
        if assignment.is_empty() {
            continue;
        }
        let after = plan(folder.path(), std::slice::from_ref(&assignment));
        let (stages_after, cell) = (stages(&after), &after.cells[0]);
        for ((kind, name), keys) in &stages_before {
            let now = stages_after.get(&(*kind, name.clone()));
            if reached(from, *kind, name) {
                let kept = now.map_or(0, |now| now.intersection(keys).count());
                // A test task of another kind asks other questions of the aligned model, too.
                assert_eq!(kept, 0, "`{assignment}` should change every key of {kind:?} {name}");
            } else if key != "fine_tune.tasks.task" && key != "encoding.template" {
                assert_eq!(now, Some(keys), "`{assignment}` should change no key of {kind:?} {name}");
            }
        }
        let changed = |what: &str, differs: bool, expected: bool| {
            assert_eq!(differs, expected, "`{assignment}` and the {what} of the row");
        };
        changed("protocol", cell.protocol != cell_before.protocol, matches!(part, Protocol | ProtocolAndSetting));
        changed("setting", cell.setting != cell_before.setting, matches!(part, Setting | ProtocolAndSetting));
        changed("coordinates", cell.coordinates != cell_before.coordinates, part == Coordinates);
        changed("id", cell.id != cell_before.id, part != Part::None);
    }
}

/// Another value of the type that a setting has.
fn other(schema: &Value, property: &Value, value: &Value) -> Value {
    let definition = property["$ref"].as_str().and_then(|path| schema.pointer(&path[1..])).unwrap_or(property);
    let words = |schema: &Value| -> Vec<Value> {
        let listed = schema["enum"].as_array().into_iter().flatten().cloned();
        let described = schema["oneOf"].as_array().into_iter().flatten();
        let described = described.flat_map(|one| {
            one.get("const").cloned().into_iter().chain(one["enum"].as_array().cloned().unwrap_or_default())
        });
        listed.chain(described).collect()
    };
    match value {
        Value::Bool(on) => json!(!on),
        Value::Number(number) if number.is_u64() => json!(number.as_u64().unwrap_or(0) + 1),
        Value::Number(number) => json!(number.as_f64().unwrap_or(0.) + 0.5),
        Value::String(word) => words(definition).into_iter().find(|other| other != word).unwrap_or(json!("other")),
        _ => json!("another value"),
    }
}

/// Every setting of every plugin is part of the keys of the stages that the plugin works in; a path is not.
#[test]
fn every_setting_of_every_plugin_changes_a_key() {
    fn entries<E: Entry>() -> Vec<(&'static str, &'static str, &'static SettingsType)> {
        let entries = registry::all::<E>().expect("no name twice");
        entries.into_iter().map(|entry| (E::KIND, entry.name(), entry.settings())).collect()
    }
    let folder = tempfile::tempdir().expect("a folder");
    let samples: BTreeMap<Reach, StageSpec> = plan(folder.path(), &[])
        .stages
        .into_iter()
        .filter_map(|stage| match &stage.spec {
            StageSpec::Pretrain(_) => Some((Base, stage.spec)),
            StageSpec::Train(spec) if spec.phase == titer_core::Stage::Align => Some((Align, stage.spec)),
            StageSpec::Answer(_) => Some((Answers(""), stage.spec)),
            StageSpec::Judge(spec) if spec.judge.is_some() => Some((Verdicts, stage.spec)),
            _ => None,
        })
        .collect();
    let with = |kind: &str, plugin: PluginSpec| -> Value {
        let spec = match kind {
            "model" => match samples[&Base].clone() {
                StageSpec::Pretrain(spec) => {
                    StageSpec::Pretrain(titer::experiment::spec::PretrainSpec { model: plugin, ..spec })
                }
                other => other,
            },
            "defense" => match samples[&Align].clone() {
                StageSpec::Train(spec) => StageSpec::Train(titer::plan::TrainSpec { defense: plugin, ..spec }),
                other => other,
            },
            "judge" => match samples[&Verdicts].clone() {
                StageSpec::Judge(spec) => StageSpec::Judge(JudgeSpec { judge: Some(plugin), ..spec }),
                other => other,
            },
            _ => match samples[&Answers("")].clone() {
                StageSpec::Answer(spec) => {
                    let prompts = RowsSpec { task: plugin, ..spec.prompts };
                    StageSpec::Answer(AnswerSpec { prompts, ..spec })
                }
                other => other,
            },
        };
        of_stage(&spec, None, "portable/1")
    };
    let all = [entries::<DefenseEntry>(), entries::<ModelEntry>(), entries::<TaskEntry>(), entries::<JudgeEntry>()];
    let mut walked = 0;
    for (kind, name, settings) in all.concat() {
        let (schema, defaults) = ((settings.schema)().to_value(), (settings.defaults)());
        let spec = |settings: Value| PluginSpec {
            name: name.into(),
            settings,
            version: 1,
            plugin: None,
            content: "hash".into(),
        };
        let before = with(kind, spec(defaults.clone()));
        for (setting, value) in defaults.as_object().into_iter().flatten() {
            let mut changed = defaults.clone();
            let property = &schema["properties"][setting];
            changed[setting] = other(&schema, property, value);
            let found = differences(&before, &with(kind, spec(changed)));
            let path = property["format"] == "path";
            // That a path is given at all still counts.
            let expected = usize::from(!path || value.is_null());
            assert_eq!(found.len(), expected, "{kind} {name}: {setting} changes {found:?}");
            walked += 1;
        }
        let version = PluginSpec { version: 2, ..spec(defaults.clone()) };
        assert_eq!(differences(&before, &with(kind, version)).len(), 1, "{kind} {name}: its version");
        let code = PluginSpec { plugin: Some("hash".into()), ..spec(defaults.clone()) };
        assert_eq!(differences(&before, &with(kind, code)).len(), 1, "{kind} {name}: the hash of its code");
        let files = PluginSpec { content: "other".into(), ..spec(defaults.clone()) };
        assert_eq!(differences(&before, &with(kind, files)).len(), 1, "{kind} {name}: its files");
        // Of a plugin that names no files, a path counts.
        let pathless = |settings: Value| with(kind, PluginSpec { content: String::new(), ..spec(settings) });
        for (setting, _) in defaults.as_object().into_iter().flatten() {
            let mut changed = defaults.clone();
            changed[setting] = other(&schema, &schema["properties"][setting], &defaults[setting]);
            let found = differences(&pathless(defaults.clone()), &pathless(changed));
            assert_eq!(found.len(), 1, "{kind} {name}: {setting} changes {found:?}");
        }
    }
    assert!(walked > 100, "only {walked} settings were found");
}

/// Settings that are paths are marked as such, or moving a file would compute everything again.
#[test]
fn paths_among_the_settings_are_marked() {
    for entry in registry::all::<TaskEntry>().expect("no name twice") {
        let (schema, defaults) = ((entry.settings.schema)().to_value(), (entry.settings.defaults)());
        for setting in defaults.as_object().into_iter().flatten().map(|(name, _)| name) {
            if ["path", "train", "test", "file", "folder"].contains(&setting.as_str()) {
                assert_eq!(schema["properties"][setting]["format"], "path", "{}: {setting}", entry.name);
            }
        }
    }
}

/// Files enter by content: the same rows in another place change no key, other rows in the same place do.
#[test]
fn data_and_checkpoints_enter_by_content() {
    let keys = |plan: &Plan| plan.stages.iter().map(|stage| stage.key.clone()).collect::<Vec<_>>();
    let identity = |plan: &Plan| (keys(plan), plan.cells.iter().map(|cell| cell.id.clone()).collect::<Vec<_>>());
    let folder = tempfile::tempdir().expect("a folder");
    let write = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
        std::fs::write(path, text).expect("a file");
    };
    let row = |answer: &str| format!("{{\"instruction\": \"ask\", \"output\": \"{answer}\"}}\n").repeat(60);
    write("a/rows.jsonl", &row("yes"));
    write("b/moved.jsonl", &row("yes"));
    write("c/rows.jsonl", &row("no"));
    let with = |path: &str| {
        let path = folder.path().join(path);
        let data = format!("align.data=[{{ task = \"rows\", rows = 50, train = {path:?} }}]");
        identity(&plan(folder.path(), &[data]))
    };
    assert_eq!(with("a/rows.jsonl"), with("b/moved.jsonl"));
    assert_ne!(with("a/rows.jsonl"), with("c/rows.jsonl"));

    let config = r#"{"model_type": "llama", "vocab_size": 11, "hidden_size": 8, "intermediate_size": 12,
        "num_hidden_layers": 2, "num_attention_heads": 2}"#;
    for (name, weights) in [("model", "one"), ("elsewhere", "one"), ("other", "two")] {
        write(&format!("{name}/config.json"), config);
        write(&format!("{name}/model.safetensors"), weights);
    }
    let pretrain = CONFIG.find("[base.shape]").expect("the shape")..CONFIG.find("[encoding]").expect("the encoding");
    let mut text = CONFIG.to_owned();
    text.replace_range(pretrain, "");
    let with = |name: &str| {
        let text = text.replace("[base]\n", &format!("[base]\npath = \"{name}\"\n"));
        let folder = folder.path();
        std::fs::write(folder.join("demo.toml"), text).expect("a file");
        identity(&plan(folder, &[]))
    };
    assert_eq!(with("model"), with("elsewhere"));
    assert_ne!(with("model"), with("other"));
}

/// Settings of plugins are resolved before they enter a key: a default that is written out changes nothing.
#[test]
fn a_default_that_is_written_out_changes_no_key() {
    let folder = tempfile::tempdir().expect("a folder");
    let before = plan(folder.path(), &[]);
    let default = Settings::empty();
    let settings = registry::find::<TaskEntry>("world-safe").expect("the task").resolve(&default).expect("defaults");
    let written = format!("align.data.0.benign_fraction={}", settings["benign_fraction"]);
    assert_eq!(plan(folder.path(), &[written]).cells, before.cells);
}
