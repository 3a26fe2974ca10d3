//! Reading `results.json`.

use std::collections::BTreeSet;
use std::path::Path;

use serde_json::json;
use titer_core::bounds;
use titer_core::report::{ResultRow, Results, SCHEMA};
use titer_core::{Error, Result};

use super::metrics_hash;
use crate::manifest::digest;

/// The file that all others are made from.
pub const RESULTS: &str = "results.json";

/// The results in a run's folder.
///
/// # Errors
/// There are none, or they are malformed or of another version.
pub fn load(folder: &Path) -> Result<Results> {
    let path = folder.join(RESULTS);
    let bytes = bounds::read_file("read the results", &path, bounds::JSON_BYTES)
        .map_err(|error| error.help("give the folder of a finished `titer run`"))?;
    let value: serde_json::Value = serde_json::from_slice(&bytes).map_err(|error| {
        Error::data("results.json is damaged")
            .file(&path)
            .source(error)
            .help("run `titer run` again: nothing is computed twice")
    })?;
    let schema = &value["schema"];
    if *schema != SCHEMA && *schema != 1 {
        return Err(Error::data(format!(
            "results.json has schema `{schema}`, this version of Titer reads 1 and {SCHEMA}"
        ))
        .file(&path)
        .key("schema")
        .help("run `titer run` again with this version"));
    }
    let mut results: Results = serde_json::from_value(value).map_err(|error| {
        Error::data("results.json is damaged")
            .file(&path)
            .source(error)
            .help("run `titer run` again: nothing is computed twice")
    })?;
    if results.schema == 1 {
        results.rows.iter_mut().for_each(identify);
    } else if !results.metrics_hash.is_empty() && results.metrics_hash != metrics_hash(&results.rows) {
        return Err(Error::data("the metrics in results.json are not those that the run wrote")
            .file(&path)
            .key("metrics_hash")
            .help("run `titer run` again: nothing is computed twice"));
    }
    let mut ids = BTreeSet::new();
    if let Some(row) = results.rows.iter().find(|row| !ids.insert(&row.id)) {
        return Err(Error::data(format!("results.json has the row `{}` twice", row.id))
            .file(&path)
            .key("rows")
            .help("run `titer run` again: nothing is computed twice"));
    }
    Ok(results)
}

/// Gives a row of schema 1 what it says of its identity. Its setting stays unknown.
fn identify(row: &mut ResultRow) {
    row.coordinates = json!({
        "method": row.method,
        "defenses": { "align": row.align, "fine_tune": row.fine_tune, "post": row.post },
        "task": row.task,
        "harmful_ratio": row.harmful_ratio,
        "samples": row.samples,
        "learning_rate": row.learning_rate,
        "seed": row.seed,
        "base_seed": row.base_seed,
    });
    row.id = digest(&json!(["schema 1", row.protocol, row.model, row.lora, row.coordinates]));
    // It names no artifact: what was measured stands for it.
    row.artifacts.insert("measured".into(), digest(&json!([row.metrics, row.curves])));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::fixture;

    #[test]
    fn results_that_cannot_be_read_say_why() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("results.json");
        let error = load(folder.path()).expect_err("no file");
        assert!(error.to_string().contains("results.json"), "{error}");
        for (content, expected) in [("{", "damaged"), ("{\"schema\": 9}", "schema `9`"), ("{\"schema\": 1}", "damaged")]
        {
            std::fs::write(&path, content).expect("a file");
            let error = load(folder.path()).expect_err(expected);
            assert!(error.to_string().contains(expected), "{error}");
        }
        // Numbers that somebody edited.
        let mut results = fixture::results(1);
        results.metrics_hash = metrics_hash(&results.rows);
        let write = |results: &Results| std::fs::write(&path, json!(results).to_string()).expect("a file");
        write(&results);
        assert_eq!(load(folder.path()).expect("results"), results);
        let twice = Results { rows: [results.rows.clone(), vec![results.rows[0].clone()]].concat(), ..results.clone() };
        write(&twice);
        assert!(load(folder.path()).expect_err("a row twice").to_string().contains("twice"));
        results.rows[0].metrics.harmful_score = Some(1.);
        write(&results);
        let error = load(folder.path()).expect_err("edited").to_string();
        assert!(error.contains("not those that the run wrote"), "{error}");
    }
}
