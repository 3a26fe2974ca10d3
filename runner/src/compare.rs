//! Runs side by side.

use std::path::PathBuf;

use titer_core::Result;
use titer_core::report::{ResultRow, Results};

use crate::reporters::{self, table::Table};
use crate::statistics::{Summary, sign_flip};

/// The runs in the folders as one table, with paired tests of each method against plain fine-tuning. A method that
/// several runs have is shown once for each, with the run's name.
///
/// # Errors
/// A folder holds no results, or their protocols differ.
pub fn compare(folders: &[PathBuf]) -> Result<String> {
    let runs = folders.iter().map(|folder| reporters::load(folder)).collect::<Result<Vec<_>>>()?;
    let merged = merge(runs);
    let table = Table::new(&merged.rows)?;
    let mut text = reporters::console(&merged)?;
    for block in &table.blocks {
        let Some(reference) = block.reference() else { continue };
        text += &format!("\n{}: differences to {}, paired by seed\n", block.title, reference.name);
        for method in block.methods.iter().filter(|method| method.name != reference.name) {
            for &ratio in &block.ratios {
                let paired = |metric| method.paired(reference, ratio, metric);
                let (harm, accuracy) = (paired("harmful_score"), paired("fine_tune_accuracy"));
                let shown = |values: &[f64]| reporters::table::number(Summary::of(values));
                text += &format!(
                    "  {:24} p = {ratio:<5} HS {:>14}  FA {:>14}  n = {}, sign-flip p = {:.3}\n",
                    method.name,
                    shown(&harm),
                    shown(&accuracy),
                    harm.len(),
                    sign_flip(&harm)
                );
            }
        }
    }
    Ok(text)
}

/// All rows as those of one experiment.
fn merge(runs: Vec<Results>) -> Results {
    let shared = |run: usize, row: &ResultRow| {
        runs.iter().enumerate().any(|(other, results)| {
            other != run && results.rows.iter().any(|theirs| theirs.method == row.method && !same_cell(theirs, row))
        })
    };
    let mut rows: Vec<ResultRow> = Vec::new();
    for (index, run) in runs.iter().enumerate() {
        for row in &run.rows {
            let name =
                if shared(index, row) { format!("{} ({})", row.method, run.experiment) } else { row.method.clone() };
            let row = ResultRow { method: name, ..row.clone() };
            // The same cell in two runs comes from one artifact and counts once.
            if !rows.iter().any(|known| known.method == row.method && same_cell(known, &row)) {
                rows.push(row);
            }
        }
    }
    let names: Vec<&str> = runs.iter().map(|run| run.experiment.as_str()).collect();
    let experiment = names.join(" and ");
    let failures = runs.iter().flat_map(|run| run.failures.clone()).collect();
    let (schema, titer) = runs.first().map_or((0, String::new()), |run| (run.schema, run.titer.clone()));
    Results { schema, experiment, titer, rows, failures }
}

/// Whether two rows are the same measurement of the same settings.
fn same_cell(a: &ResultRow, b: &ResultRow) -> bool {
    let key = |row: &ResultRow| {
        (
            (row.align.clone(), row.fine_tune.clone(), row.post.clone(), row.protocol.clone()),
            (row.model.clone(), row.task.clone(), row.lora.clone(), row.samples),
            (row.base_seed, row.seed, row.harmful_ratio.to_bits(), row.learning_rate.to_bits()),
        )
    };
    key(a) == key(b)
}
