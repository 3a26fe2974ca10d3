//! `titer plan`.

use std::collections::BTreeMap;
use std::fmt::Write;

use serde_json::json;

use super::{ConfigArgs, Done, pretty};
use crate::diagnostics::Problems;
use crate::plan::{Plan, StageSpec};
use crate::planner::work;
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
    work: f64,
}

fn as_text(plan: &Plan, store: &Store) -> String {
    let mut text = String::new();
    let mut totals: BTreeMap<&str, Total> = BTreeMap::new();
    for stage in &plan.stages {
        let cached = store.is_committed(&stage.key);
        let total = totals.entry(kind(&stage.spec)).or_default();
        total.stages += 1;
        total.cached += usize::from(cached);
        total.work += if cached { 0. } else { work(&stage.spec) };
        let state = if cached { "cached" } else { "to run" };
        let _ = writeln!(text, "{state}  {}  {:>10}  {}", &stage.key[..8], amount(work(&stage.spec)), stage.label);
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
