//! Runs side by side.

use std::path::PathBuf;

use titer_core::Result;
use titer_core::report::{ResultRow, Results};

use crate::reporters;

/// The runs in the folders as one table, with the same tests as the report of one run. A method that several runs have
/// is shown once for each, with the run's name.
///
/// # Errors
/// A folder holds no results, or their protocols differ.
pub fn compare(folders: &[PathBuf]) -> Result<String> {
    let runs = folders.iter().map(|folder| reporters::load(folder)).collect::<Result<Vec<_>>>()?;
    let merged = merge(runs);
    reporters::console(&merged)
}

/// All rows as those of one experiment.
fn merge(runs: Vec<Results>) -> Results {
    // The same name for other settings would mix two methods.
    let ambiguous = |row: &ResultRow| {
        let others = runs.iter().flat_map(|results| &results.rows).filter(|other| other.method == row.method);
        others.map(settings).any(|other| other != settings(row))
    };
    let mut rows: Vec<ResultRow> = Vec::new();
    for run in &runs {
        for row in &run.rows {
            let name = if ambiguous(row) { format!("{} ({})", row.method, run.experiment) } else { row.method.clone() };
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
    // Published values are those of one experiment and its names.
    Results { schema, experiment, titer, rows, failures, published: Vec::new() }
}

/// What a method is: its defenses and their settings.
fn settings(row: &ResultRow) -> [&serde_json::Value; 3] {
    [&row.align, &row.fine_tune, &row.post]
}

/// Whether two rows are the same measurement of the same settings.
fn same_cell(a: &ResultRow, b: &ResultRow) -> bool {
    let key = |row: &ResultRow| {
        let numbers = (row.base_seed, row.seed, row.samples, row.harmful_ratio.to_bits(), row.learning_rate.to_bits());
        (row.protocol.clone(), row.model.clone(), row.task.clone(), row.lora.clone(), numbers)
    };
    settings(a) == settings(b) && key(a) == key(b)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reporters::fixture;

    #[test]
    fn equal_cells_count_once_and_equal_names_for_other_settings_are_told_apart() {
        let (first, mut second) = (fixture::results(2), fixture::results(3));
        let merged = merge(vec![first.clone(), second.clone()]);
        assert_eq!(merged.rows.len(), second.rows.len(), "the third seed is new, the others are not");
        assert!(merged.rows.iter().all(|row| !row.method.contains('(')));

        second.experiment = "other".into();
        for row in second.rows.iter_mut().filter(|row| row.method == "Vaccine") {
            row.align["rho"] = 9.into();
        }
        let merged = merge(vec![first, second]);
        let names: std::collections::BTreeSet<&str> = merged.rows.iter().map(|row| row.method.as_str()).collect();
        assert!(names.contains("Vaccine (other)") && names.contains("Vaccine (made-up)"), "{names:?}");
        assert!(names.contains("SFT"));
    }
}
