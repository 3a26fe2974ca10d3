//! `titer plan`.

use std::fmt::Write;

use serde_json::json;

use super::{ConfigArgs, Done, pretty};
use crate::diagnostics::Problems;
use crate::logging::Logging;
use crate::plan::Plan;
use crate::plan::cost::{duration, totals, work};
use crate::store::Store;

/// The arguments.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// The experiment.
    #[command(flatten)]
    pub config: ConfigArgs,
    /// Lists every stage, as `-v` does.
    #[arg(long)]
    pub stages: bool,
    /// For programs: every stage with its resolved settings, and every cell.
    #[arg(long)]
    pub json: bool,
}

/// Shows the plan.
///
/// # Errors
/// Every mistake in the configuration.
pub fn run(args: &Args, logging: Logging) -> Result<Done, Problems> {
    let (_, plan, store) = args.config.sketch(None, logging)?;
    let stages = args.stages || logging.verbose > 0;
    Ok(if args.json { as_json(&plan, &store) } else { as_text(&plan, &store, stages) }.into())
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

fn as_text(plan: &Plan, store: &Store, stages: bool) -> String {
    let mut text = String::new();
    for stage in plan.stages.iter().filter(|_| stages) {
        let state = if store.is_committed(&stage.key) { "cached" } else { "to run" };
        let (key, work) = (&stage.key[..8], amount(work(&stage.spec)));
        let _ = writeln!(text, "{state}  {key}  {work:>10}  {}", stage.label);
    }
    if stages {
        text.push('\n');
    }
    let totals = totals(plan, store);
    let left: f64 = totals.values().map(|total| total.left).sum();
    let cached: usize = totals.values().map(|total| total.cached).sum();
    let _ = writeln!(
        text,
        "{}: {} cells, {} stages, {cached} cached",
        plan.experiment,
        plan.cells.len(),
        plan.stages.len()
    );
    for (kind, total) in &totals {
        let share = if left > 0. { 100. * total.left / left } else { 0. };
        let _ = writeln!(
            text,
            "  {kind:<9} {:>5}, {:>5} cached, {share:>3.0} % of the work left",
            total.stages, total.cached
        );
    }
    let _ = writeln!(text, "work left: {} forward passes of one example", amount(left));
    let seconds = totals.values().map(|total| total.measured.seconds_of(total.left)).sum::<Option<f64>>();
    let _ = match seconds {
        Some(seconds) => {
            writeln!(text, "time left: about {} of one job, judging by the cached stages", duration(seconds))
        }
        None => writeln!(text, "time left: unknown until a stage of each kind is cached"),
    };
    let _ = writeln!(text, "arithmetic: {}", plan.arithmetic);
    let _ = writeln!(text, "store: {}", store.root().display());
    if let Some(spec) = plan.without_weights() {
        let folder = spec.path.display();
        let _ = writeln!(
            text,
            "note: {folder} holds no weights; the run will need them, and until then the keys of the stages are provisional"
        );
    }
    if !stages {
        text += "`titer plan --stages` lists the stages\n";
    }
    text
}

fn amount(work: f64) -> String {
    match work {
        work if work >= 1e6 => format!("{:.1} M", work / 1e6),
        work if work >= 1e3 => format!("{:.1} k", work / 1e3),
        work => format!("{work:.0}"),
    }
}
