//! From an experiment to its plan: which stages, in what order, shared by which cells. Pure: no files, no device.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use titer_core::Stage;
use titer_core::data::harmful_count;
use titer_core::text::Template;

use super::identity;
use crate::experiment::axes::{AXES, Axis, Coordinates, DEFENSES, Place, Point, Since};
use crate::experiment::spec::{OptimSpec, PluginSpec, RowsSpec, Steps};
use crate::experiment::{Base, Defense, Experiment, Probe, UserRows};
use crate::manifest::digest;
use crate::plan::{AnswerSpec, Cell, JudgeSpec, MixSpec, Plan, PlannedStage, PostSpec, StageSpec, TrainSpec};
use crate::store::Key;

/// The plan of an experiment.
pub fn plan(experiment: &Experiment) -> Plan {
    plan_along(experiment, AXES)
}

/// The plan of an experiment that has these axes.
pub fn plan_along(experiment: &Experiment, axes: &[Axis]) -> Plan {
    let mut planner = Planner {
        experiment,
        axes,
        stages: Vec::new(),
        index: BTreeMap::new(),
        protocols: BTreeMap::new(),
        settings: BTreeMap::new(),
    };
    let points = Point::all(experiment, axes);
    let swept =
        |axis: &Axis| points.iter().any(|point| point.coordinates[axis.name] != points[0].coordinates[axis.name]);
    let swept: Vec<&str> = axes.iter().filter(|axis| swept(axis)).map(|axis| axis.name).collect();
    let cells = points.iter().map(|point| planner.cell(point, &swept)).collect();
    Plan {
        experiment: experiment.name.clone(),
        arithmetic: experiment.arithmetic.clone(),
        runtime: experiment.runtime.clone(),
        inputs: experiment.inputs.clone(),
        hub_data: experiment.hub_data.clone(),
        protocols: planner.protocols,
        settings: planner.settings,
        stages: planner.stages,
        cells,
    }
}

struct Planner<'a> {
    experiment: &'a Experiment,
    axes: &'a [Axis],
    stages: Vec<PlannedStage>,
    /// Where each stage already stands in the list.
    index: BTreeMap<Key, usize>,
    protocols: BTreeMap<String, Value>,
    settings: BTreeMap<String, Value>,
}

/// Judge stages: `(probe, judge, key)`.
type Judgements = Vec<(String, String, Key)>;

impl Planner<'_> {
    fn cell(&mut self, point: &Point, swept: &[&str]) -> Cell {
        let Point { method, task, base, .. } = point;
        let (verb, base_spec) = match base {
            Base::Load(spec) => ("load", StageSpec::Load(spec.clone())),
            Base::Pretrain(spec) => ("pretrain", StageSpec::Pretrain(spec.clone())),
        };
        let since = |stage| self.terms(point, swept, stage);
        let (of_base, of_align, of_all) = (since(Since::Base), since(Since::Align), since(Since::FineTune));
        let name =
            |verb: &str, terms: &[String]| [&[verb.to_owned()], terms].concat().join(", ").replacen(", ", " ", 1);
        let based = [vec![self.experiment.model.clone()], of_base.clone()].concat();
        let base_key = self.add(None, base_spec, name(verb, &based));

        let align_key = self.align(point, &base_key, name("align", &of_align));
        let aligned = align_key.as_ref().unwrap_or(&base_key);
        let aligned_label = match align_key {
            Some(_) => format!("{} aligned", of_align.join(", ")),
            None => [vec!["base model".to_owned()], of_base].concat().join(", "),
        };
        let template = &self.experiment.encoding.template;
        let aligned_judgements = self.judgements(task, aligned, template, &aligned_label);

        let fine_tune_key = self.fine_tune(point, aligned, name("fine-tune", &of_all));
        let post_key = method.post.as_ref().map(|post| {
            let spec = self.post_spec(post, point.seed);
            self.add(Some(&fine_tune_key), StageSpec::Post(spec), name("repair", &of_all))
        });
        let last = post_key.as_ref().unwrap_or(&fine_tune_key);
        let template = method.serving_template(template);
        let judgements = self.judgements(task, last, &template, &of_all.join(", "));

        let protocol = noted(&mut self.protocols, identity::protocol(self.experiment, task));
        let setting = noted(&mut self.settings, identity::setting(point, self.axes));
        let mut coordinates = point.coordinates.clone();
        coordinates.insert(DEFENSES.to_owned(), identity::method(method));
        Cell {
            align: method.align.as_ref().map_or_else(|| json!({ "defense": "none" }), |align| described(&align.spec)),
            fine_tune: described(&method.fine_tune.spec),
            post: method.post.as_ref().map_or(Value::Null, |post| described(&post.spec)),
            model: self.experiment.model.clone(),
            lora: self.experiment.fine_tune.mode.name().to_owned(),
            id: digest(&json!([protocol, setting, coordinates])),
            protocol,
            setting,
            coordinates,
            notes: method.notes.clone(),
            base_key,
            align_key,
            fine_tune_key,
            post_key,
            aligned_judgements,
            judgements,
        }
    }

    /// What tells a stage from its neighbours, for people: of the axes that it depends on, those that the experiment sweeps
    /// over, and always method, task, harmful ratio and seeds.
    fn terms(&self, point: &Point, swept: &[&str], stage: Since) -> Vec<String> {
        let always = |place: Place, name: &str| place != Place::Blocks || name == "task";
        let depends = |name: &str| self.axes.iter().any(|axis| axis.name == name && axis.since <= stage);
        let coordinates = Coordinates::of(&point.coordinates);
        let shown = coordinates.iter().filter(|coordinate| {
            let name = coordinate.name.as_str();
            depends(name) && !coordinate.value.is_empty() && (always(coordinate.place, name) || swept.contains(&name))
        });
        shown.map(ToString::to_string).collect()
    }

    fn align(&mut self, point: &Point, base: &Key, label: String) -> Option<Key> {
        let (defense, align) = (point.method.align.as_ref()?, self.experiment.align.as_ref()?);
        let spec = TrainSpec {
            phase: Stage::Align,
            defense: defense.spec.clone(),
            data: align.data.clone(),
            harmful: None,
            streams: defense.streams.clone(),
            monitor: None,
            encoding: self.experiment.encoding.clone(),
            optim: OptimSpec {
                steps: point.method.align_steps.map_or(align.optim.steps, Steps::Steps),
                ..align.optim.clone()
            },
            adapter: point.align_adapter.clone()?,
            seed: point.seed,
        };
        Some(self.add(Some(base), StageSpec::Train(spec), label))
    }

    fn fine_tune(&mut self, point: &Point, parent: &Key, label: String) -> Key {
        let (config, defense) = (&self.experiment.fine_tune, &point.method.fine_tune);
        // The resolver has refused ratios outside [0, 1].
        let bad = harmful_count(point.samples, point.harmful_ratio).unwrap_or(0);
        let user = RowsSpec { rows: point.samples - bad, ..point.task.probe.prompts.clone() };
        let harmful = config.harmful.as_ref().filter(|_| bad > 0);
        let spec = TrainSpec {
            phase: Stage::FineTune,
            defense: defense.spec.clone(),
            data: if user.rows > 0 { vec![user] } else { Vec::new() },
            harmful: harmful
                .map(|source| MixSpec { source: RowsSpec { rows: bad, ..source.clone() }, ratio: point.harmful_ratio }),
            streams: defense.streams.clone(),
            monitor: config.monitor.clone(),
            encoding: self.experiment.encoding.clone(),
            optim: OptimSpec { learning_rate: point.learning_rate, ..config.optim.clone() },
            adapter: point.user_adapter.clone(),
            seed: point.seed,
        };
        self.add(Some(parent), StageSpec::Train(spec), label)
    }

    fn post_spec(&self, post: &Defense, seed: u64) -> PostSpec {
        PostSpec {
            defense: post.spec.clone(),
            streams: post.streams.clone(),
            encoding: self.experiment.encoding.clone(),
            batch_size: self.experiment.fine_tune.optim.batch_size,
            seed,
        }
    }

    /// Answers to every probe by the model of stage `model`, served with `template`, and the verdicts on them.
    fn judgements(&mut self, task: &UserRows, model: &Key, template: &Template, label: &str) -> Judgements {
        let experiment = self.experiment;
        let mut judgements = Vec::new();
        for probe in experiment.probes.iter().chain([&task.probe]) {
            let what = if probe.name == "task" { &task.name } else { probe.name };
            let answer = self.add(
                Some(model),
                StageSpec::Answer(AnswerSpec {
                    probe: probe.name.to_owned(),
                    prompts: probe.prompts.clone(),
                    template: template.clone(),
                    max_new_tokens: probe.max_new_tokens,
                    batch_size: experiment.batch_size,
                }),
                format!("answer {what}, {label}"),
            );
            for judge in judges_of(experiment, probe) {
                let name = judge.map_or_else(String::new, |judge| judge.name.clone());
                let spec = JudgeSpec {
                    probe: probe.name.to_owned(),
                    judge: judge.cloned(),
                    prompts: probe.prompts.clone(),
                    labels: judge.map_or_else(Vec::new, |_| task.labels.clone()),
                };
                let key = self.add(Some(&answer), StageSpec::Judge(spec), format!("judge {what}, {label}"));
                judgements.push((probe.name.to_owned(), name, key));
            }
        }
        judgements
    }

    /// Adds a stage once and returns its key.
    fn add(&mut self, parent: Option<&Key>, spec: StageSpec, label: String) -> Key {
        let manifest = identity::of_stage(&spec, parent, &self.experiment.arithmetic);
        let key = digest(&manifest);
        if !self.index.contains_key(&key) {
            self.index.insert(key.clone(), self.stages.len());
            self.stages.push(PlannedStage { key: key.clone(), label, parent: parent.cloned(), spec, manifest });
        }
        key
    }
}

/// The judges of a probe; the task's own scoring (`None`) for the user's task.
fn judges_of<'a>(experiment: &'a Experiment, probe: &Probe) -> Vec<Option<&'a PluginSpec>> {
    if probe.name == "task" { vec![None] } else { experiment.judges.iter().map(Some).collect() }
}

/// A defense as `results.json` shows it.
fn described(spec: &PluginSpec) -> Value {
    let mut shown = json!({ "defense": spec.name });
    if let (Value::Object(shown), Value::Object(settings)) = (&mut shown, &spec.settings) {
        shown.extend(settings.clone());
    }
    shown
}

/// Keeps a manifest under its hash, which is returned.
fn noted(manifests: &mut BTreeMap<String, Value>, manifest: Value) -> String {
    let id = digest(&manifest);
    manifests.insert(id.clone(), manifest);
    id
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::plan::cost::work;
    use crate::testing::plan;

    fn count(plan: &Plan, fits: impl Fn(&StageSpec) -> bool) -> usize {
        plan.stages.iter().filter(|stage| fits(&stage.spec)).count()
    }

    fn keys(plan: &Plan) -> BTreeSet<Key> {
        plan.stages.iter().map(|stage| stage.key.clone()).collect()
    }

    #[test]
    fn shared_stages_appear_once() {
        let plan = plan(&[]);
        // Two methods × two ratios × two seeds × two bases.
        assert_eq!(plan.cells.len(), 16);
        assert_eq!(count(&plan, |spec| matches!(spec, StageSpec::Pretrain(_))), 2);
        // Only one method aligns: once per seed and base, for both ratios.
        assert_eq!(count(&plan, |spec| matches!(spec, StageSpec::Train(spec) if spec.phase == Stage::Align)), 4);
        assert_eq!(count(&plan, |spec| matches!(spec, StageSpec::Train(spec) if spec.phase == Stage::FineTune)), 16);
        // Two bases, four aligned and sixteen final models; a harmful and a task probe each.
        assert_eq!(count(&plan, |spec| matches!(spec, StageSpec::Answer(_))), 2 * (2 + 4 + 16));
        assert_eq!(count(&plan, |spec| matches!(spec, StageSpec::Judge(_))), 2 * (2 + 4 + 16));
    }

    #[test]
    fn parents_come_first_and_keys_are_unique() {
        let plan = plan(&[]);
        let mut seen = BTreeSet::new();
        for stage in &plan.stages {
            assert!(stage.parent.iter().all(|parent| seen.contains(parent)), "{}", stage.label);
            assert!(seen.insert(stage.key.clone()), "{}", stage.label);
        }
        assert!(plan.cells.iter().flat_map(Cell::keys).all(|key| seen.contains(key)));
    }

    #[test]
    fn cells_are_in_the_order_of_the_axes() {
        let order: Vec<_> = plan(&[]).cells.iter().map(Cell::label).take(5).collect();
        let expected = [
            "p=0, n=40, lr=0.001, base 0, seed 0",
            "p=0, n=40, lr=0.001, base 0, seed 1",
            "p=0, n=40, lr=0.001, base 1, seed 0",
            "p=0, n=40, lr=0.001, base 1, seed 1",
            "p=0.1, n=40, lr=0.001, base 0, seed 0",
        ];
        assert_eq!(order, expected.map(|rest| format!("none, chat, {rest}")));
    }

    #[test]
    fn what_cannot_change_a_result_changes_no_key() {
        let before = keys(&plan(&[]));
        for (from, to) in [
            ("name = \"Shield\"", "name = \"Armour\""),
            ("experiment = \"demo\"", "experiment = \"other\""),
            ("experiment = \"demo\"", "experiment = \"demo\"\ndevice = \"cpu\""),
            ("task_prompts = 5", "task_prompts = 5\nbatch_size = 7"),
            ("name = \"chat\", ", ""),
        ] {
            assert_eq!(keys(&plan(&[(from, to)])), before, "{to}");
        }
    }

    #[test]
    fn a_change_reaches_what_follows_and_nothing_before() {
        let before = plan(&[]);
        let kept = |from: &str, to: &str| {
            let after = keys(&plan(&[(from, to)]));
            before.stages.iter().filter(|stage| after.contains(&stage.key)).count()
        };
        let all = before.stages.len();
        let training = "train = { steps = 10, batch_size = 4, learning_rate = 1e-3 }\n\n[align]";
        assert_eq!(kept(training, &training.replace("10", "11")), 0);
        // The defense's setting: its four alignments, their eight attacks, and what is asked of those twelve models.
        assert_eq!(kept("rho = 2.0", "rho = 3.0"), all - 12 * (1 + 4));
        // One ratio: eight attacks.
        assert_eq!(kept("[0.0, 0.1]", "[0.0, 0.2]"), all - 8 * (1 + 4));
        // The prompts' count: half of the answers and verdicts.
        assert_eq!(kept("task_prompts = 5", "task_prompts = 6"), all - 22 * 2);
    }

    #[test]
    fn data_content_is_part_of_the_key() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("rows.csv");
        let with = |text: &str| {
            std::fs::write(&file, text).unwrap();
            keys(&plan(&[("word = \"hello\"", &format!("file = {file:?}"))]))
        };
        let (one, two) = (with("a"), with("b"));
        assert_eq!(with("a"), one);
        // Attacks and their probes differ, and so do the task's probes of bases and aligned models.
        assert_eq!(one.difference(&two).count(), 16 * 5 + (2 + 4) * 2);
    }

    #[test]
    fn the_protocol_says_how_numbers_were_taken() {
        let protocol = |from: &str, to: &str| plan(&[(from, to)]).cells[0].protocol.clone();
        let before = protocol("rho", "rho");
        assert_eq!(protocol("rho = 2.0", "rho = 3.0"), before);
        assert_eq!(protocol("[0.0, 0.1]", "[0.0, 0.2]"), before);
        assert_ne!(protocol("task_prompts = 5", "task_prompts = 6"), before);
        assert_eq!(protocol("seeds = [0, 1]\n\n[lora]", "seeds = [0]\n\n[lora]"), before, "seeds are coordinates");
        assert_ne!(protocol("experiment = \"demo\"", "experiment = \"demo\"\nencoding.template = \"chat\""), before);
    }

    #[test]
    fn published_values_change_no_plan() {
        let published = "judges = [\"fake-judge\"]\n\n[[published]]\nsource = \"a table\"\nmethod = \"Shield\"\n\
                         task = \"chat\"\nsamples = 40\nharmful_ratios = [0.1]\nharmful_score = [50.0]\n\
                         n_prompts = { harmful = 500, task = 500 }\njudge = \"other\"\n";
        assert_eq!(plan(&[("judges = [\"fake-judge\"]\n", published)]).cells, plan(&[]).cells);
    }

    #[test]
    fn epochs_become_updates() {
        let plan = plan(&[]);
        let align = plan.stages.iter().find_map(|stage| match &stage.spec {
            StageSpec::Train(spec) if spec.phase == Stage::Align => Some(spec),
            _ => None,
        });
        // 50 rows in batches of 4 are 13 updates; twice.
        let align = align.unwrap();
        assert_eq!(align.optim.updates(13), 26);
        assert!((work(&StageSpec::Train(align.clone())) - f64::from(26 * 4 * 3 * 2)).abs() < 1e-9);
        // 10 rows in batches of 4 are 3 batches; of three times 3, two make an update, and the last one is half.
        let optim = OptimSpec { steps: Steps::Epochs(3), accumulate: 2, ..align.optim.clone() };
        let aligning = |rows: usize, optim: OptimSpec| -> f64 {
            let data = vec![RowsSpec { rows, ..align.data[0].clone() }];
            work(&StageSpec::Train(TrainSpec { data, optim, ..align.clone() }))
        };
        assert!((aligning(10, optim) - f64::from(5 * 2 * 4 * 3 * 2)).abs() < 1e-9);
    }
}
