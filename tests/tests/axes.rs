//! A new axis is one entry: planner, labels, results, names of files, CSV, tables and comparison follow from it. Shown by the
//! rank of the adapters.

use std::collections::BTreeSet;
use std::path::Path;

use serde_json::json;
use titer::experiment::axes::{AXES, Axis, Coordinates, Place, Point, Since};
use titer::experiment::spec::AdapterSpec;
use titer::plan::planner;
use titer::report::{self, Format};
use titer::results::file::load;
use titer::store::Store;
use titer_core::report::Results;
use titer_tests::cli::SMALL;
use titer_tests::in_process;

/// The whole axis.
const LORA_RANK: Axis = Axis {
    name: "lora.r",
    prefix: "r=",
    title: "r = ",
    key: "lora.r",
    since: Since::Align,
    place: Place::Blocks,
    in_setting: &["align.adapter.lora.r", "attack.adapter.lora.r"],
    listed: |_| RANKS.len(),
    set: |point: &mut Point, index: usize| {
        let rank = *RANKS.get(index)?;
        for adapter in [point.align_adapter.as_mut(), Some(&mut point.user_adapter)].into_iter().flatten() {
            if let AdapterSpec::Fresh(lora) | AdapterSpec::Continue(lora) = adapter {
                lora.r = rank;
            }
        }
        Some(json!(rank))
    },
};

const RANKS: [usize; 2] = [4, 8];

/// The results of the small experiment, which were written to `folder`.
fn run(folder: &Path, axes: &[Axis]) -> Results {
    let plan = planner::plan_along(&in_process::experiment(folder, SMALL), axes);
    let keys: BTreeSet<&str> = plan.stages.iter().map(|stage| stage.key.as_str()).collect();
    assert_eq!(keys.len(), plan.stages.len());
    let store = Store::open(folder.join("store")).expect("a store");
    let outcome = in_process::run(&plan, &store, 1, 2);
    assert!(outcome.failed.is_empty(), "{:?}", outcome.failed);
    let results = in_process::assemble(&plan, &store, &outcome, folder);
    report::write_all(&results, folder).expect("reports");
    results
}

#[test]
fn the_rank_of_adapters_becomes_an_axis_by_one_entry() {
    let (plain, swept) = (tempfile::tempdir().expect("a folder"), tempfile::tempdir().expect("a folder"));
    let before = run(plain.path(), AXES);
    let results = run(swept.path(), &[AXES, &[LORA_RANK]].concat());

    // Every cell once for each rank, all in one setting, and each with an identity of its own.
    assert_eq!(results.rows.len(), RANKS.len() * before.rows.len());
    assert_eq!(results.settings.len(), before.settings.len());
    let ids: BTreeSet<&str> = results.rows.iter().map(|row| row.id.as_str()).collect();
    assert_eq!(ids.len(), results.rows.len());
    // The rank reaches the adapters.
    let metrics = |rank: usize| {
        let rows = results.rows.iter().filter(move |row| row.coordinates["lora.r"] == rank);
        rows.map(|row| json!([row.curves.align_loss, row.curves.fine_tune_loss])).collect::<Vec<_>>()
    };
    assert_ne!(metrics(RANKS[0]), metrics(RANKS[1]));
    assert_eq!(metrics(RANKS[0]).len(), before.rows.len());

    // Labels and names of files.
    let label = Coordinates::of_row(&results.rows[0]).label();
    assert!(label.ends_with("lora.r=4"), "{label}");
    let answers: Vec<&String> = results.rows.iter().flat_map(|row| row.answers.values()).collect();
    assert!(answers.iter().any(|name| name.contains("lora.r8")), "{answers:?}");
    assert_eq!(answers.iter().collect::<BTreeSet<_>>().len(), answers.len());

    // What is read again is what was written; a column in CSV, blocks in tables.
    let read = load(swept.path()).expect("results");
    assert_eq!(read, results);
    let csv = report::render(&read, swept.path(), Format::Csv).expect("CSV");
    assert!(csv.lines().next().is_some_and(|header| header.split(',').any(|column| column == "lora.r")), "{csv}");
    let markdown = report::render(&read, swept.path(), Format::Md).expect("Markdown");
    for rank in RANKS {
        assert!(markdown.contains(&format!("lora.r = {rank}")), "{markdown}");
    }

    // Compared with a run without the axis, rows of one task but of other ranks are not merged.
    let folders = [plain.path().to_owned(), swept.path().to_owned()];
    let merged = report::compare::merged(&folders).expect("a comparison");
    assert_eq!(merged.rows.len(), results.rows.len() + before.rows.len());
    let console = report::compare::compare(&folders).expect("a comparison");
    assert!(console.contains("lora.r = 8"), "{console}");
}
