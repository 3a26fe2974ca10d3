//! `titer plan`.

use std::collections::BTreeMap;
use std::fmt::Write;

use serde_json::json;

use super::{ConfigArgs, Done, pretty};
use crate::diagnostics::Problems;
use crate::plan::cost::work;
use crate::plan::{Plan, StageSpec};
use crate::store::Store;

/// The arguments.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// The experiment.
    #[command(flatten)]
    pub config: ConfigArgs,
    /// For programs: every stage with its resolved settings, and every cell.
    #[arg(long)]
    pub json: bool,
}

/// Shows the plan.
///
/// # Errors
/// Every mistake in the configuration.
pub fn run(args: &Args) -> Result<Done, Problems> {
    let (_, plan, store) = args.config.prepare(None)?;
    Ok(if args.json { as_json(&plan, &store) } else { as_text(&plan, &store) }.into())
}

fn as_json(plan: &Plan, store: &Store) -> String {
    let mut value = json!(plan);
    let shown = value["stages"].as_array_mut().into_iter().flatten();
    for (shown, stage) in shown.zip(&plan.stages) {
        shown["cached"] = json!(store.is_committed(&stage.key));
        shown["work"] = json!(work(&stage.spec));
    }
    pretty(&value)
}

/// Totals of one kind of stage.
#[derive(Default)]
struct Total {
    stages: usize,
    cached: usize,
    /// Work left.
    work: f64,
    /// Work and seconds of the cached stages, which tell the speed.
    known: (f64, f64),
}

impl Total {
    /// Seconds that the work left takes at the speed of the cached stages; `None` if there are none.
    fn seconds(&self) -> Option<f64> {
        let (work, seconds) = self.known;
        if self.work == 0. { Some(0.) } else { (work > 0.).then(|| self.work * seconds / work) }
    }
}

fn as_text(plan: &Plan, store: &Store) -> String {
    let mut text = String::new();
    let mut totals: BTreeMap<&str, Total> = BTreeMap::new();
    for stage in &plan.stages {
        let (artifact, work) = (store.artifact(&stage.key).ok(), work(&stage.spec));
        let cached = artifact.is_some();
        let total = totals.entry(kind(&stage.spec)).or_default();
        total.stages += 1;
        total.cached += usize::from(cached);
        match artifact {
            Some(artifact) => total.known = (total.known.0 + work, total.known.1 + artifact.seconds()),
            None => total.work += work,
        }
        let state = if cached { "cached" } else { "to run" };
        let _ = writeln!(text, "{state}  {}  {:>10}  {}", &stage.key[..8], amount(work), stage.label);
    }
    let left: f64 = totals.values().map(|total| total.work).sum();
    let _ = writeln!(text, "\n{}: {} cells, {} stages", plan.experiment, plan.cells.len(), plan.stages.len());
    for (kind, total) in &totals {
        let share = if left > 0. { 100. * total.work / left } else { 0. };
        let _ = writeln!(
            text,
            "  {kind:<9} {:>5}, {:>5} cached, {share:>3.0} % of the work left",
            total.stages, total.cached
        );
    }
    let _ = writeln!(text, "work left: {} forward passes of one example", amount(left));
    match totals.values().map(Total::seconds).sum::<Option<f64>>() {
        Some(seconds) => {
            let _ = writeln!(text, "time left: about {:.0} s of one job, judging by the cached stages", seconds.ceil());
        }
        None => text += "time left: unknown until a stage of each kind is cached\n",
    }
    let _ = writeln!(text, "arithmetic: {}", plan.arithmetic);
    let _ = writeln!(text, "store: {}", store.root().display());
    text
}

fn kind(spec: &StageSpec) -> &'static str {
    match spec {
        StageSpec::Pretrain(_) => "pretrain",
        StageSpec::Load(_) => "load",
        StageSpec::Train(spec) => spec.phase.name(),
        StageSpec::Post(_) => "post",
        StageSpec::Answer(_) => "answer",
        StageSpec::Judge(_) => "judge",
    }
}

fn amount(work: f64) -> String {
    match work {
        work if work >= 1e6 => format!("{:.1} M", work / 1e6),
        work if work >= 1e3 => format!("{:.1} k", work / 1e3),
        work => format!("{work:.0}"),
    }
}
