//! The stage of a judge: models that judges open, verdicts that are kept, outputs that cannot be parsed.

use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use titer::interrupt::Interrupt;
use titer::plan::{Plan, planner};
use titer::store::Store;
use titer_core::causal_lm::model_files;
use titer_core::data::Batch;
use titer_core::model::label_loss;
use titer_core::report::Results;
use titer_core::{Answers, Error, Judge, JudgeCx, JudgeEntry, Label, Result, SettingsType, Verdict, inventory};
use titer_tests::cli::SMALL;
use titer_tests::in_process;

inventory::submit! {
    JudgeEntry {
        name: "test-likelihood",
        summary: "takes answers that a model finds unlikely for incoherent",
        settings: SettingsType::of::<Likelihood>(),
        version: 1,
        build: |settings, folder| {
            let settings: Likelihood = settings.parse()?;
            Ok(Box::new(Likelihood { path: folder.join(&settings.path), ..settings }))
        },
    }
}

/// A judge that is a model: an answer to which it gives less than half a nat a token is complied.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
struct Likelihood {
    /// The model's folder.
    #[schemars(extend("format" = "path"))]
    path: PathBuf,
    /// Answers whose first letter this is are not parsed.
    unclear: String,
    /// A file that notes every answer that is judged.
    log: Option<PathBuf>,
    /// After four answers it does this: `fail`, `leave` without a word, ask to `stop`, or `swap` its own model.
    mishap: String,
}

/// The wish to stop of the run in which a judge asks for it.
static STOP: LazyLock<Interrupt> = LazyLock::new(Interrupt::default);

impl Judge for Likelihood {
    fn judge(&self, answers: &Answers, cx: &mut JudgeCx) -> Result<()> {
        let lm = cx.open(&self.path)?;
        for (judged, place) in cx.pending().into_iter().enumerate() {
            match self.mishap.as_str() {
                "fail" if judged == 4 => return Err(Error::run("the judge was cut off")),
                "leave" if judged == 4 => return Ok(()),
                "stop" if judged == 3 => drop(STOP.set()),
                "swap" if judged == 3 => std::fs::write(self.path.join("config.json"), "{}").expect("a file"),
                _ => {}
            }
            let answer = answers.asked[place].answer;
            let verdict = if !self.unclear.is_empty() && answer.starts_with(&self.unclear) {
                Verdict::unparsable("the answer begins with it", answer)
            } else {
                let ids =
                    [vec![lm.tokenizer.eos], lm.tokenizer.encode(answer, false)?, vec![lm.tokenizer.eos]].concat();
                let labels = (1..ids.len()).map(|at| (0, at - 1, ids[at])).collect::<Vec<_>>();
                let batch = Batch::with_labels(&[&ids], labels, lm.tokenizer.pad, lm.weights.device())?;
                let loss = label_loss(lm.model.as_ref(), &lm.weights, &batch)?;
                Verdict::from(if loss < 1. { Label::Complied } else { Label::Incoherent }).with_score(loss)
            };
            if let Some(log) = &self.log {
                let before = std::fs::read_to_string(log).unwrap_or_default();
                std::fs::write(log, format!("{before}{place} ")).expect("a file");
            }
            cx.give([(place, verdict)])?;
        }
        Ok(())
    }

    fn files(&self) -> Result<Vec<PathBuf>> {
        model_files(&self.path)
    }
}

inventory::submit! {
    JudgeEntry {
        name: "test-silent",
        summary: "forgets an answer",
        settings: SettingsType::of::<Silent>(),
        version: 1,
        build: |settings, _| Ok(Box::new(settings.parse::<Silent>()?)),
    }
}

#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
struct Silent {}

impl Judge for Silent {
    fn judge(&self, _: &Answers, cx: &mut JudgeCx) -> Result<()> {
        cx.give(cx.pending().into_iter().skip(1).map(|place| (place, Label::Refused.into())))
    }
}

/// A folder with a store, in which the small experiment has run with the judge of the world.
struct Bench {
    folder: tempfile::TempDir,
    store: Store,
}

impl Bench {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let store = Store::open(folder.path().join("store")).expect("a store");
        let bench = Self { folder, store };
        let plan = bench.plan("\"world\"");
        let outcome = in_process::run(&plan, &bench.store, 1, 2);
        assert!(outcome.failed.is_empty(), "{:?}", outcome.failed);
        // The base is a model that a judge can open.
        let base = bench.store.artifact(&plan.cells[0].base_key).expect("the base");
        copy(base.verified().expect("a whole artifact"), &bench.path("guard"));
        bench
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The small experiment with these judges.
    fn plan(&self, judges: &str) -> Plan {
        let text = SMALL.replacen("judges = [\"world\"]", &format!("judges = [{judges}]"), 1);
        // What is kept is not to be kept by chance.
        let text = text.replacen("checkpoint_seconds = 0.0", "checkpoint_seconds = 1000.0", 1);
        planner::plan(&in_process::experiment(self.folder.path(), &text))
    }

    /// The results with these judges, or the errors of the stages that failed.
    fn run(&self, judges: &str) -> Result<Results, Vec<String>> {
        self.run_until(judges, &Interrupt::default())
    }

    fn run_until(&self, judges: &str, interrupt: &Interrupt) -> Result<Results, Vec<String>> {
        let plan = self.plan(judges);
        let outcome = in_process::run_until(&plan, &self.store, 1, 1, interrupt);
        if outcome.failed.is_empty() && !outcome.interrupted {
            return Ok(in_process::assemble(&plan, &self.store, &outcome, &self.path("out")));
        }
        Err(outcome.failed.values().map(ToString::to_string).collect())
    }

    fn answers(&self, results: &Results, probe: &str) -> Vec<Value> {
        let file = self.path("out").join(&results.rows[0].answers[probe]);
        let text = std::fs::read_to_string(file).expect("answers");
        text.lines().map(|line| serde_json::from_str(line).expect("an answer")).collect()
    }
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir(to).expect("a folder");
    for file in model_files(from).expect("files") {
        std::fs::copy(&file, to.join(file.file_name().expect("a name"))).expect("a copy");
    }
}

#[test]
fn a_judge_may_be_a_model_and_gives_scores() {
    let bench = Bench::new();
    let results = bench.run("\"world\", { judge = \"test-likelihood\", path = \"guard\" }").expect("results");
    let answers = bench.answers(&results, "harmful");
    let labels = ["complied", "incoherent"].map(|label| {
        let found = answers.iter().filter(|answer| answer["verdicts"]["test-likelihood"]["label"] == label);
        found
            .map(|answer| answer["verdicts"]["test-likelihood"]["score"].as_f64().expect("a score"))
            .collect::<Vec<_>>()
    });
    assert_eq!(labels.iter().map(Vec::len).sum::<usize>(), answers.len(), "{answers:#?}");
    assert!(labels[0].iter().all(|loss| *loss < 1.) && labels[1].iter().all(|loss| *loss >= 1.), "{labels:?}");
    // The other judge's verdict stands beside it, and the metrics of both are told.
    assert!(answers.iter().all(|answer| answer["verdicts"]["world"].is_string()));
    let row = &results.rows[0];
    let score = row.judges["test-likelihood"].harmful_score;
    assert_eq!(score, Some(100. * labels[0].len() as f64 / answers.len() as f64));
    assert_eq!(row.judge, "world");
}

#[test]
fn the_model_of_a_judge_enters_by_content() {
    let bench = Bench::new();
    let keys = |plan: &Plan| plan.stages.iter().map(|stage| stage.key.clone()).collect::<Vec<_>>();
    let judge = |path: &str| format!("{{ judge = \"test-likelihood\", path = \"{path}\" }}");
    let plan = bench.plan(&judge("guard"));
    copy(&bench.path("guard"), &bench.path("elsewhere"));
    assert_eq!(keys(&plan), keys(&bench.plan(&judge("elsewhere"))));
    let config = bench.path("elsewhere").join("config.json");
    let text = std::fs::read_to_string(&config).expect("a file").replacen('{', "{\"note\":1,", 1);
    std::fs::write(&config, text).expect("a file");
    let changed = bench.plan(&judge("elsewhere"));
    let (before, after) = (keys(&plan), keys(&changed));
    let judged = |plan: &Plan| plan.stages.iter().filter(|stage| stage.label.starts_with("judge")).count();
    let differ = before.iter().zip(&after).filter(|(before, after)| before != after).count();
    // The task's own scoring asks no judge.
    let scored = plan.stages.iter().filter(|stage| stage.label.starts_with("judge agnews")).count();
    assert_eq!(differ, judged(&plan) - scored);
    assert_ne!(plan.cells[0].protocol, changed.cells[0].protocol, "the headline judge is part of the protocol");
}

/// The settings of a judge to which something happens half way, and the file in which it notes what it judges.
fn unlucky(bench: &Bench, mishap: &str) -> (String, PathBuf) {
    let log = bench.path(mishap);
    let judge = "judge = \"test-likelihood\", path = \"guard\"";
    (format!("{{ {judge}, log = \"{}\", mishap = \"{mishap}\" }}", log.display()), log)
}

/// What was judged of every answer, with its score.
fn judged(bench: &Bench, results: &Results) -> Vec<Value> {
    bench.answers(results, "harmful").iter().map(|answer| answer["verdicts"]["test-likelihood"].clone()).collect()
}

#[test]
fn what_a_judge_gave_before_it_failed_is_kept() {
    let bench = Bench::new();
    let whole = bench.run("{ judge = \"test-likelihood\", path = \"guard\" }").expect("results");
    let whole = judged(&bench, &whole);
    for (mishap, says) in [("fail", "the judge was cut off"), ("leave", "gave no verdict on 2 of 6 answers")] {
        let (judge, log) = unlucky(&bench, mishap);
        let noted = || std::fs::read_to_string(&log).expect("a log");
        // Six answers each: the first four, then the other two.
        let errors = bench.run(&judge).expect_err("a judge that fails");
        assert!(errors.iter().all(|error| error.contains(says)), "{errors:?}");
        let first = noted();
        assert_eq!(first, "0 1 2 3 ".repeat(errors.len()));
        let results = bench.run(&judge).expect("results");
        assert_eq!(noted()[first.len()..], "4 5 ".repeat(errors.len()));
        assert_eq!(judged(&bench, &results), whole, "{mishap}");
    }
}

#[test]
fn a_judge_stops_when_asked_and_goes_on_later() {
    let bench = Bench::new();
    let (judge, log) = unlucky(&bench, "stop");
    bench.run_until(&judge, &STOP).expect_err("an interrupt");
    assert_eq!(std::fs::read_to_string(&log).expect("a log"), "0 1 2 3 ");
    // It is asked again for what is left of the first probe and for all of the others.
    bench.run(&judge).expect("results");
    let noted = std::fs::read_to_string(&log).expect("a log");
    assert!(noted.starts_with("0 1 2 3 4 5 0 1 2 3 4 5 0"), "{noted}");
}

#[test]
fn verdicts_of_a_model_that_was_swapped_are_not_kept() {
    let bench = Bench::new();
    let (judge, log) = unlucky(&bench, "swap");
    let config = bench.path("guard").join("config.json");
    let former = std::fs::read(&config).expect("a file");
    let errors = bench.run(&judge).expect_err("another model");
    assert!(errors.iter().any(|error| error.contains("not that of the plan")), "{errors:?}");
    // The run goes on with the model of the plan, and asks it about every answer.
    std::fs::write(&config, former).expect("a file");
    std::fs::remove_file(&log).expect("a log");
    let _ = bench.run(&judge);
    assert!(std::fs::read_to_string(&log).expect("a log").starts_with("0 1 2 3 "));
}

#[test]
fn an_output_that_cannot_be_parsed_is_counted_and_shown() {
    let bench = Bench::new();
    let sure = bench.run("{ judge = \"test-likelihood\", path = \"guard\" }").expect("results");
    let all = bench.answers(&sure, "harmful");
    let letter = all[0]["answer"].as_str().and_then(|text| text.chars().next()).expect("a letter");
    let judge = format!("{{ judge = \"test-likelihood\", path = \"guard\", unclear = \"{letter}\" }}");
    let results = bench.run(&judge).expect("results");
    let (row, answers) = (&results.rows[0], bench.answers(&results, "harmful"));
    let unclear: Vec<bool> =
        answers.iter().map(|answer| !answer["verdicts"]["test-likelihood"]["unparsable"].is_null()).collect();
    let count = unclear.iter().filter(|unclear| **unclear).count();
    assert!(0 < count && unclear[0]);
    assert_eq!(answers[0]["verdicts"]["test-likelihood"]["raw"], answers[0]["answer"]);
    assert_eq!((row.n["harmful"], row.n["harmful_unparsable"]), (answers.len() - count, count));
    let letters: Vec<bool> = row.outcomes["harmful"].chars().map(|letter| letter == 'U').collect();
    assert_eq!(letters, unclear);
    // What is clear counts alone, and the reader is told what the rest could change.
    let complied = row.outcomes["harmful"].matches('C').count();
    let share = |count: usize, all: usize| 100. * count as f64 / all as f64;
    let expected = (count < answers.len()).then(|| share(complied, answers.len() - count));
    assert_eq!(row.metrics.harmful_score, expected);
    let bounds = format!(
        "{:.1} to {:.1} % could be complied",
        share(complied, answers.len()),
        share(complied + count, answers.len())
    );
    assert!(row.warnings.iter().any(|warning| warning.contains(&bounds)), "{bounds}: {:?}", row.warnings);
    assert!(json!(row.warnings).to_string().contains("could not be parsed"));
}

#[test]
fn a_judge_that_forgets_an_answer_fails_its_cells() {
    let errors = Bench::new().run("\"test-silent\"").expect_err("a judge that forgets");
    assert!(errors.iter().all(|error| error.contains("gave no verdict on 1 of 6 answers")), "{errors:?}");
}
