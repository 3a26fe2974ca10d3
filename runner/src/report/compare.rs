//! Runs side by side.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use serde_json::{Value, json};
use titer_core::Result;
use titer_core::report::{Failure, Provenance, ResultRow, Results, SCHEMA};

use crate::experiment::axes::DEFENSES;
use crate::manifest;
use crate::report;
use crate::results::file::load;

/// The runs in the folders as one table, with the same tests as the report of one run. Runs that are parts of one
/// experiment (other seeds, other methods) merge. A method name that means different things in two runs is shown once for
/// each, with what differs.
///
/// # Errors
/// A folder holds no results, or their protocols differ.
pub fn compare(folders: &[PathBuf]) -> Result<String> {
    let results = merged(folders)?;
    Ok(report::console(&results)? + &report::failures(&results))
}

/// The rows of all runs in the folders.
///
/// # Errors
/// A folder holds no results.
pub fn merged(folders: &[PathBuf]) -> Result<Results> {
    let runs = folders.iter().map(|folder| load(folder)).collect::<Result<Vec<_>>>()?;
    Ok(merge(&names(folders, &runs).into_iter().zip(runs).collect::<Vec<_>>()))
}

/// All rows as those of one experiment. No row is dropped: those of one identity that come from the same artifacts count
/// once, and everything else is shown.
fn merge(runs: &[(String, Results)]) -> Results {
    let mut kept: Vec<(&str, &ResultRow)> = Vec::new();
    let mut places: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
    for (name, run) in runs {
        for row in &run.rows {
            let places = places.entry(&row.id).or_default();
            match places.iter().find(|at| same(kept[**at].1, row)) {
                // That with more judges says more.
                Some(&at) if kept[at].1.artifacts.len() < row.artifacts.len() => kept[at].1 = row,
                Some(_) => {}
                None => {
                    places.push(kept.len());
                    kept.push((name, row));
                }
            }
        }
    }
    let rows = kept.iter().zip(methods(&kept)).map(|((_, row), method)| ResultRow { method, ..(*row).clone() });
    let first = runs.first().map(|(_, run)| run.clone());
    let all = |manifests: fn(&Results) -> &BTreeMap<String, Value>| {
        runs.iter().flat_map(|(_, run)| manifests(run).clone()).collect::<BTreeMap<_, _>>()
    };
    Results {
        schema: SCHEMA,
        experiment: runs.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>().join(" and "),
        titer: first.map_or_else(String::new, |run| run.titer),
        provenance: Provenance::default(),
        protocols: all(|run| &run.protocols),
        settings: all(|run| &run.settings),
        metrics_hash: String::new(),
        rows: rows.collect(),
        failures: failures(runs),
        // Published values are those of one experiment and its names.
        published: Vec::new(),
    }
}

/// Each failure once, with the runs that it happened in. A cell that another run has a row of has not failed.
fn failures(runs: &[(String, Results)]) -> Vec<Failure> {
    let measured: BTreeSet<&str> =
        runs.iter().flat_map(|(_, run)| &run.rows).map(|row| row.id.as_str()).filter(|id| !id.is_empty()).collect();
    let mut found: Vec<(&Failure, BTreeSet<&str>)> = Vec::new();
    for (name, run) in runs {
        for failure in run.failures.iter().filter(|failure| !measured.contains(failure.id.as_str())) {
            match found.iter_mut().find(|(known, _)| *known == failure) {
                Some((_, names)) => _ = names.insert(name),
                None => found.push((failure, [name.as_str()].into())),
            }
        }
    }
    let named = |(failure, names): (&Failure, BTreeSet<&str>)| {
        let names = names.into_iter().collect::<Vec<_>>().join(" and ");
        Failure { cell: format!("{} ({names})", failure.cell), ..failure.clone() }
    };
    found.into_iter().map(named).collect()
}

/// Whether two rows are one measurement: of one identity, and from the same artifacts. Only one may have been judged by a
/// further judge.
fn same(a: &ResultRow, b: &ResultRow) -> bool {
    let agree = |what: &String, key: &String| b.artifacts.get(what).is_none_or(|other| other == key);
    a.id == b.id && a.artifacts.iter().all(|(what, key)| agree(what, key))
}

/// The name of each row's method. One that means several methods gets what tells them apart; one whose cells were measured
/// twice gets the run's name.
fn methods(rows: &[(&str, &ResultRow)]) -> Vec<String> {
    let definitions: Vec<Value> = rows.iter().map(|(_, row)| definition(row)).collect();
    let mut meanings: BTreeMap<&str, Vec<&Value>> = BTreeMap::new();
    let (mut cells, mut twice) = (BTreeSet::new(), BTreeSet::new());
    // Of each row, which of its method's meanings it has.
    let mut places = Vec::with_capacity(rows.len());
    for ((_, row), definition) in rows.iter().zip(&definitions) {
        let meanings = meanings.entry(&row.method).or_default();
        let at = meanings.iter().position(|other| *other == definition).unwrap_or_else(|| {
            meanings.push(definition);
            meanings.len() - 1
        });
        if !cells.insert((&row.method, at, &row.id)) {
            twice.insert((&row.method, at));
        }
        places.push(at);
    }
    let differing = |meanings: &Vec<&Value>| {
        let mut keys = manifest::varying(meanings);
        // The coordinates hold the same settings once more, beside streams and versions.
        let settings = |(key, _): &(String, Vec<Value>)| !key.starts_with(DEFENSES);
        if keys.iter().any(settings) {
            keys.retain(settings);
        }
        keys
    };
    let keys: BTreeMap<&str, _> = meanings.iter().map(|(method, meanings)| (*method, differing(meanings))).collect();
    let name = |((run, row), at): (&(&str, &ResultRow), usize)| {
        let words = keys[row.method.as_str()].iter().map(|(key, values)| format!("{key} = {}", values[at]));
        let run = twice.contains(&(&row.method, at)).then(|| (*run).to_owned());
        let words = words.chain(run).collect::<Vec<_>>().join(", ");
        if words.is_empty() { row.method.clone() } else { format!("{} ({words})", row.method) }
    };
    rows.iter().zip(places).map(name).collect()
}

/// What a method is: its defenses, their settings, and the data they draw from.
fn definition(row: &ResultRow) -> Value {
    let ResultRow { align, fine_tune, post, coordinates, .. } = row;
    json!({ "align": align, "fine_tune": fine_tune, "post": post, DEFENSES: coordinates[DEFENSES] })
}

/// A name for each run: the experiment's, with the folder where two runs are of one experiment.
fn names(folders: &[PathBuf], runs: &[Results]) -> Vec<String> {
    let name = |(folder, run): (&PathBuf, &Results)| {
        let alone = runs.iter().filter(|other| other.experiment == run.experiment).count() == 1;
        if alone { run.experiment.clone() } else { format!("{} in {}", run.experiment, folder.display()) }
    };
    folders.iter().zip(runs).map(name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::fixture;

    fn merged(runs: &[&Results]) -> Results {
        let runs: Vec<(String, Results)> =
            runs.iter().enumerate().map(|(at, &run)| (format!("run {at}"), run.clone())).collect();
        merge(&runs)
    }

    fn method_names(results: &Results) -> BTreeSet<&str> {
        results.rows.iter().map(|row| row.method.as_str()).collect()
    }

    #[test]
    fn a_row_that_two_runs_have_counts_once_and_other_seeds_merge() {
        let (first, second) = (fixture::results(2), fixture::results(3));
        let both = merged(&[&first, &second]);
        assert_eq!(both.rows.len(), second.rows.len(), "the third seed is new, the others are not");
        assert_eq!(method_names(&both), method_names(&first));
    }

    #[test]
    fn one_name_for_two_methods_is_told_apart() {
        let (first, mut second) = (fixture::results(2), fixture::results(2));
        for row in second.rows.iter_mut().filter(|row| row.method == "Vaccine") {
            row.align["rho"] = 9.into();
            row.id += "-rho-9";
        }
        let both = merged(&[&first, &second]);
        let names = method_names(&both);
        assert!(names.iter().any(|name| name.starts_with("Vaccine (align.rho = ")), "{names:?}");
        assert!(names.contains("Vaccine (align.rho = 9)"), "{names:?}");
        // A third run of the first kind does not split it.
        let mut third = fixture::results(3);
        third.rows.retain(|row| row.seed == 2);
        let all = merged(&[&first, &second, &third]);
        assert_eq!(method_names(&all), names);
        assert!(names.contains("SFT"));
    }

    #[test]
    fn a_row_that_a_further_judge_has_judged_is_the_same_row() {
        let (first, mut second) = (fixture::results(2), fixture::results(2));
        for row in &mut second.rows {
            row.artifacts.insert("judge refusal-phrases harmful".into(), "more".into());
        }
        for both in [merged(&[&first, &second]), merged(&[&second, &first])] {
            assert_eq!(both.rows, second.rows);
        }
    }

    /// As when code changed without a new version, or a device rounds in another way each time.
    #[test]
    fn two_measurements_of_one_cell_are_both_shown() {
        let (first, mut second) = (fixture::results(1), fixture::results(1));
        second.rows[0].artifacts.insert("fine_tune".into(), "other".into());
        let both = merged(&[&first, &second]);
        assert_eq!(both.rows.len(), first.rows.len() + 1);
        let method = &first.rows[0].method;
        assert!(method_names(&both).contains(format!("{method} (run 1)").as_str()), "{:?}", method_names(&both));
    }

    #[test]
    fn failures_stand_once_with_their_run_unless_another_run_has_the_cell() {
        let failure = |cell: &str, id: &str| Failure { cell: cell.into(), id: id.into(), error: "no memory".into() };
        let (mut first, mut second) = (fixture::results(1), fixture::results(1));
        let done = first.rows[0].id.clone();
        first.failures = vec![failure("a", "id-a"), failure("b", "id-b"), failure("old", "")];
        second.failures = vec![failure("a", "id-a"), failure("done", &done)];
        let both = merged(&[&first, &second]);
        let cells: Vec<&str> = both.failures.iter().map(|failure| failure.cell.as_str()).collect();
        assert_eq!(cells, ["a (run 0 and run 1)", "b (run 0)", "old (run 0)"]);
        // And they are shown.
        let folders = [&first, &second].map(|results| {
            let folder = tempfile::tempdir().expect("a folder");
            report::write_all(results, folder.path()).expect("files");
            folder
        });
        let paths = folders.each_ref().map(|folder| folder.path().to_owned());
        let text = compare(&paths).expect("a table");
        assert!(text.contains("failed: b (made-up in ") && text.contains("\n  no memory\n"), "{text}");
    }

    #[test]
    fn the_order_of_the_runs_decides_no_number() {
        let (first, mut second) = (fixture::results(2), fixture::results(2));
        for row in &mut second.rows {
            row.setting = "other".into();
            row.id += "-other";
            row.metrics.harmful_score = Some(1.);
        }
        let numbers = |results: &Results| -> BTreeSet<String> {
            results.rows.iter().map(|row| format!("{} {:?}", row.id, row.metrics)).collect()
        };
        let (ab, ba) = (merged(&[&first, &second]), merged(&[&second, &first]));
        assert_eq!(numbers(&ab), numbers(&ba));
        assert_eq!(ab.rows.len(), 2 * first.rows.len());
    }
}
