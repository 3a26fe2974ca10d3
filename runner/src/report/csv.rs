//! One line for each result row. Files of several runs can be joined: `id` and `setting` say what a row is, `experiment`
//! and `commit` (empty if Titer was not built from a checkout) where it comes from.

use serde_json::{Value, json};
use titer_core::report::{METRICS, Results};
use titer_core::{Error, Result};

use crate::experiment::axes::Coordinates;
use crate::names::{MISSING, visible, visible_json};

/// The columns behind the metrics.
const ORIGIN: [&str; 6] = ["judge", "protocol", "id", "setting", "experiment", "commit"];

/// The table, with a header line.
pub(super) fn render(results: &Results) -> Result<String> {
    let failed = |error: &dyn std::fmt::Display| Error::run(format!("cannot write CSV: {error}"));
    let mut writer = csv::Writer::from_writer(Vec::new());
    let rows: Vec<Coordinates> = results.rows.iter().map(Coordinates::of_row).collect();
    // Rows of other versions may have axes of their own.
    let mut axes: Vec<&str> = Vec::new();
    for coordinate in rows.iter().flat_map(Coordinates::iter) {
        if !axes.contains(&coordinate.name.as_str()) {
            axes.push(&coordinate.name);
        }
    }
    let settings = axes.iter().copied().chain(["model", "align", "fine_tune", "post", "lora"]);
    let header = settings.chain(METRICS.iter().map(|metric| metric.0)).chain(ORIGIN);
    writer.write_record(header).map_err(|error| failed(&error))?;
    for (row, coordinates) in results.rows.iter().zip(&rows) {
        let axes = axes.iter().map(|axis| {
            let found = coordinates.iter().find(|coordinate| coordinate.name == *axis);
            let stated = found.filter(|coordinate| !coordinate.value.is_empty());
            stated.map_or_else(String::new, |coordinate| text(&coordinate.value))
        });
        let settings =
            [text(&row.model), defense(&row.align), defense(&row.fine_tune), defense(&row.post), text(&row.lora)];
        let metric = |name: &str| row.metrics.get(name).map_or_else(String::new, |value| value.to_string());
        let metrics = METRICS.iter().map(|(name, ..)| metric(name));
        let origin = [
            text(&row.judge),
            text(&row.protocol),
            known(&row.id),
            known(&row.setting),
            text(&results.experiment),
            known(results.provenance.commit.as_deref().unwrap_or_default()),
        ];
        let record = axes.chain(settings).chain(metrics).chain(origin);
        writer.write_record(record).map_err(|error| failed(&error))?;
    }
    let bytes = writer.into_inner().map_err(|error| failed(&error))?;
    String::from_utf8(bytes).map_err(|error| failed(&error))
}

/// A defense with all its settings, as compact JSON.
fn defense(described: &Value) -> String {
    // An empty cell would be a missing value.
    let described = if described.is_null() { &json!({ "defense": "none" }) } else { described };
    text(&visible_json(&described.to_string()))
}

/// A hash, or a missing value where there is none.
fn known(hash: &str) -> String {
    if hash.is_empty() { String::new() } else { text(&visible(hash)) }
}

/// Text that no spreadsheet takes for a formula, also where it splits cells at other signs than commas, and no reader for
/// a missing value: an apostrophe goes before it, as people write it.
fn text(text: &str) -> String {
    let mut safe = if MISSING.contains(&text) { "'".to_owned() } else { String::new() };
    let mut starts = true;
    for c in text.chars() {
        if starts && "=+-@＝＋－＠".contains(c) {
            safe.push('\'');
        }
        starts = ";\t\r\n|".contains(c) || (starts && (c.is_whitespace() || c == '"'));
        safe.push(c);
    }
    safe
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::results::fixture;

    /// The first row's fields by their heading, with the method's name given.
    fn read(method: &str, post: Value) -> std::collections::BTreeMap<String, String> {
        let mut results = fixture::results(1);
        results.rows.truncate(1);
        results.rows[0].method = method.into();
        results.rows[0].post = post;
        results.experiment = method.into();
        results.provenance.commit = Some("c0ffee".into());
        let text = render(&results).expect("CSV");
        let mut reader = csv::Reader::from_reader(text.as_bytes());
        reader.deserialize().next().expect("a row").expect("fields")
    }

    #[test]
    fn formulas_are_tamed_wherever_a_cell_may_begin() {
        for (name, expected) in [
            ("=SUM(\"a\",\n1)", "'=SUM(\"a\",\n1)"),
            ("  =1+1", "  '=1+1"),
            ("\u{3000}＝1+1", "\u{3000}'＝1+1"),
            ("a;=1+1", "a;'=1+1"),
            ("\t@x", "\t'@x"),
            ("\"=x", "\"'=x"),
            ("Vaccine-2 (+ Lisa)", "Vaccine-2 (+ Lisa)"),
        ] {
            assert_eq!(read(name, Value::Null)["method"], expected);
        }
    }

    #[test]
    fn no_name_is_a_missing_value_to_pandas() {
        for name in MISSING {
            let row = read(name, Value::Null);
            for column in ["method", "align", "fine_tune", "post", "task", "judge", "protocol", "experiment"] {
                // No name is empty: this stands for an axis that the run does not have, such as the seed of a base that was loaded.
                let absent = name.is_empty() && ["method", "task"].contains(&column);
                assert!(
                    absent || !MISSING.contains(&row[column].as_str()),
                    "{column} is {:?} for {name:?}",
                    row[column]
                );
            }
        }
    }

    #[test]
    fn defenses_stand_with_all_their_settings() {
        let settings = json!({ "defense": "resta", "gamma": -0.5, "layers": ["a", "b"] });
        let row = read("SFT", settings.clone());
        assert_eq!(serde_json::from_str::<Value>(&row["post"]).expect("JSON"), settings);
        assert_eq!(row["align"], "{\"defense\":\"none\"}");
        assert_eq!(read("SFT", Value::Null)["post"], "{\"defense\":\"none\"}");
    }

    #[test]
    fn rows_of_several_runs_can_be_told_apart_and_joined() {
        let row = read("SFT", Value::Null);
        let origin = ["id", "setting", "experiment", "commit"].map(|column| row[column].as_str());
        assert_eq!(origin, ["Unaligned-0-0", "def", "SFT", "c0ffee"]);
    }

    proptest! {
        #[test]
        fn no_cell_is_a_formula(name in "[ \t\r\n;,|\"'=+@＝a1-]{0,12}") {
            let shown = &read(&name, Value::Null)["method"];
            for cell in shown.split([';', '\t', '\r', '\n', '|']) {
                let begins = cell.trim_start_matches(|c: char| c.is_whitespace() || c == '"');
                prop_assert!(!begins.starts_with(['=', '+', '-', '@', '＝']), "{cell:?} of {shown:?}");
            }
        }
    }
}
