//! Cells of a run by what the user calls them, and their provenance as text.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use titer_core::report::{METRICS, ResultRow, Results};
use titer_core::{Error, Result};

use crate::experiment::axes::Coordinates;
use crate::manifest::differences;
use crate::report;
use crate::results::file::load;

/// Digits of an id that are shown, and the fewest that name a cell.
const SHOWN_DIGITS: usize = 8;
const FEWEST_DIGITS: usize = 4;
/// How many cells an error lists.
const LISTED: usize = 12;

/// A row, the run it is of, and that run's folder.
#[derive(Debug)]
pub struct Found {
    folder: PathBuf,
    results: Results,
    row: ResultRow,
}

/// The one cell of the run in `folder` that `words` name: the first digits of its id, or parts of its label, as in
/// `Vaccine, p=0.1, seed=0`.
///
/// # Errors
/// The folder holds no results, or `words` name no cell or several.
pub fn find(folder: &Path, words: &str) -> Result<Found> {
    let results = load(folder)?;
    let those = |fits: &dyn Fn(&ResultRow) -> bool| results.rows.iter().filter(|row| fits(row)).collect::<Vec<_>>();
    let mut rows = those(&|row| label(row) == words);
    if rows.is_empty() && words.len() >= FEWEST_DIGITS {
        rows = those(&|row| row.id.starts_with(&words.to_lowercase()));
    }
    if rows.is_empty() {
        rows = those(&|row| Coordinates::of_row(row).has(words));
    }
    match rows.as_slice() {
        [row] => {
            let row = (*row).clone();
            Ok(Found { folder: folder.to_owned(), results, row })
        }
        several => {
            let (found, candidates) = match several.len() {
                0 => ("no cell".to_owned(), results.rows.iter().collect()),
                n => (format!("{n} cells"), several.to_vec()),
            };
            let shown = candidates.iter().take(LISTED).map(|row| format!("{}  {}", id(row), label(row)));
            let mut list = shown.collect::<Vec<_>>().join("\n");
            if candidates.len() > LISTED {
                list += &format!("\nand {} more", candidates.len() - LISTED);
            }
            Err(Error::config(format!("`{words}` names {found} of this run")).file(folder.join("results.json")).help(
                format!("give the id of one cell, or parts of its label as in `Vaccine, p=0.1, seed=0`:\n{list}"),
            ))
        }
    }
}

/// The cells of the run in `folder`, and how one is explained.
///
/// # Errors
/// The folder holds no results.
pub fn list(folder: &Path) -> Result<String> {
    let results = load(folder)?;
    let mut text = format!("{} cells in {}\n", results.rows.len(), folder.display());
    for row in &results.rows {
        let _ = writeln!(text, "  {}  {}", id(row), label(row));
    }
    text += &report::failures(&results);
    if let Some(row) = results.rows.first() {
        let _ = writeln!(text, "\nwhere a cell's numbers come from: titer explain {} {}", folder.display(), id(row));
    }
    Ok(text)
}

fn label(row: &ResultRow) -> String {
    Coordinates::of_row(row).label()
}

fn id(row: &ResultRow) -> &str {
    row.id.get(..SHOWN_DIGITS).unwrap_or(&row.id)
}

impl Found {
    /// The parts of the row's provenance, in the order of reading. A part that is not known is null.
    fn parts(&self) -> [(&'static str, Value); 5] {
        let Self { results, row, .. } = self;
        let manifest = |of: &BTreeMap<String, Value>, id: &str| of.get(id).cloned().unwrap_or_default();
        let made = &results.provenance;
        let mut run = json!({
            "titer": results.titer,
            "commit": made.commit,
            "plugins": made.plugins,
            "processor": made.processor,
            "device": made.device,
            "arithmetic": made.arithmetic,
            "started": made.started,
            "finished": made.finished,
            "inputs": made.inputs,
        });
        if let Some(model) = &made.hub {
            run["hub"] = json!(model);
        }
        if !made.hub_data.is_empty() {
            run["hub_data"] = json!(made.hub_data);
        }
        [
            ("coordinates", row.coordinates.clone()),
            ("setting", manifest(&results.settings, &row.setting)),
            ("protocol", manifest(&results.protocols, &row.protocol)),
            ("artifacts", if row.artifacts.is_empty() { Value::Null } else { json!(row.artifacts) }),
            ("run", run),
        ]
    }

    /// The key of the stage that left one of the cell's models: `base`, `align`, `fine_tune` or `post`, or the last of them.
    ///
    /// # Errors
    /// The cell has no such stage.
    pub fn artifact(&self, stage: Option<&str>) -> Result<&str> {
        const STAGES: [&str; 4] = ["post", "fine_tune", "align", "base"];
        let artifacts = &self.row.artifacts;
        let mut found = STAGES.into_iter().filter(|name| stage.is_none_or(|stage| stage == *name));
        found.find_map(|name| artifacts.get(name)).map(String::as_str).ok_or_else(|| {
            let has: Vec<&str> = STAGES.into_iter().rev().filter(|name| artifacts.contains_key(*name)).collect();
            let error = match stage {
                Some(stage) => Error::config(format!("the cell has no model of the stage `{stage}`")).key("--stage"),
                None => Error::config("the results do not say which models the cell is made of"),
            };
            let help = if has.is_empty() {
                "the run was made by an older version of Titer; run it again".to_owned()
            } else {
                format!("its models: {}", has.join(", "))
            };
            error.file(self.folder.join("results.json")).help(help)
        })
    }

    fn title(&self) -> String {
        format!("{}  {}  ({})", id(&self.row), label(&self.row), self.folder.display())
    }

    /// Everything that is known about where the row comes from.
    pub fn explained(&self) -> String {
        let mut text = self.title() + "\n\n  in percent; in brackets the 95 % Wilson interval over prompts\n";
        for (name, short, _) in METRICS {
            if let Some(value) = self.row.metrics.get(name) {
                let interval = self.row.intervals.get(name);
                let interval = interval.map_or_else(String::new, |[low, high]| format!("  [{low:.1}, {high:.1}]"));
                let _ = writeln!(text, "  {short:<18} {value:>5.1}{interval}");
            }
        }
        for (part, manifest) in self.parts() {
            let id = match part {
                "setting" => format!(" {}", self.row.setting),
                "protocol" => format!(" {}", self.row.protocol),
                "coordinates" => format!(" {}", self.row.id),
                _ => String::new(),
            };
            let _ = writeln!(text, "\n{part}{id}");
            let leaves = leaves("", &manifest);
            let unknown = "  not known: the run was made by an older version of Titer\n";
            text += if leaves.is_empty() { unknown } else { &leaves };
        }
        text
    }

    /// What separates the two numbers: the metrics, then every key that differs.
    pub fn against(&self, other: &Self) -> String {
        let mut text = format!("a  {}\nb  {}\n\n", self.title(), other.title());
        for (name, short, _) in METRICS {
            if let (Some(a), Some(b)) = (self.row.metrics.get(name), other.row.metrics.get(name)) {
                let _ = writeln!(text, "  {short:<18} a {a:>5.1}  b {b:>5.1}  b − a {:>+6.1}", b - a);
            }
        }
        for ((part, ours), (_, theirs)) in self.parts().iter().zip(&other.parts()) {
            let found = differences(ours, theirs);
            if ours.is_null() || theirs.is_null() {
                let _ = writeln!(text, "\n{part}: not known, since a run was made by an older version of Titer");
            } else if found.is_empty() {
                let _ = writeln!(text, "\n{part}: the same");
            } else {
                let _ = writeln!(text, "\n{part}");
                for (key, a, b) in found {
                    let _ = writeln!(text, "  {key}\n    a {a}\n    b {b}");
                }
            }
        }
        if self.row.protocol != other.row.protocol {
            text += "\nThe protocols differ: the two numbers do not compare.\n";
        }
        text
    }
}

/// A line for each leaf of a manifest.
fn leaves(path: &str, value: &Value) -> String {
    let below = |name: &str| if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") };
    match value {
        Value::Object(map) if !map.is_empty() => map.iter().map(|(name, value)| leaves(&below(name), value)).collect(),
        Value::Array(list) if list.iter().any(|item| item.is_object() || item.is_array()) => {
            list.iter().enumerate().map(|(at, value)| leaves(&below(&at.to_string()), value)).collect()
        }
        Value::Null if path.is_empty() => String::new(),
        leaf => format!("  {path:<44} {leaf}\n"),
    }
}
