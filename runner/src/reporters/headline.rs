//! The table that papers print: harmful score and accuracy after the attack, over the harmful ratios, with the average.

use std::collections::BTreeSet;

use serde::Serialize;

use super::table::{Block, Method, SHOWN, Shown};

/// The metrics of the table.
const METRICS: [&str; 2] = ["harmful_score", "fine_tune_accuracy"];

/// The table, ready to be shown.
#[derive(Debug, Serialize)]
pub(super) struct Headline<'a> {
    /// The metrics, each over all [`columns`](Self::columns).
    pub groups: Vec<Group>,
    /// The columns of each metric: the harmful ratios, and their average.
    pub columns: Vec<String>,
    /// Each method with its values of the first metric, then of the second.
    pub lines: Vec<(&'a str, Vec<String>)>,
    /// What the numbers are means of.
    pub legend: String,
}

/// A metric of the table.
#[derive(Debug, Serialize)]
pub(super) struct Group {
    /// Its short form.
    pub short: &'static str,
    /// Its short form with an arrow towards the better side.
    pub heading: String,
    /// Whether higher is better.
    pub higher: bool,
}

impl<'a> Headline<'a> {
    pub(super) fn of(block: &'a Block) -> Self {
        let shown: Vec<&Shown> = SHOWN.iter().filter(|shown| METRICS.contains(&shown.after)).collect();
        let group = |shown: &&Shown| Group { short: shown.short, heading: shown.heading(), higher: shown.higher };
        let ratios = block.ratios.iter().map(|p| format!("p = {p}"));
        let line = |method: &'a Method| {
            (method.name, shown.iter().flat_map(|shown| values(block, method, shown.after)).collect())
        };
        Self {
            groups: shown.iter().map(group).collect(),
            columns: ratios.chain(["average".to_owned()]).collect(),
            lines: block.methods.iter().map(line).collect(),
            legend: format!(
                "HS harmful score, FA fine-tune accuracy, after the attack, in percent: means over {}, and their average \
                 over p.",
                runs(block)
            ),
        }
    }
}

/// The means at each ratio and their average; a dash where a value is missing.
fn values(block: &Block, method: &Method, metric: &str) -> Vec<String> {
    let means: Vec<Option<f64>> = block.ratios.iter().map(|&ratio| Some(method.summary(ratio, metric)?.mean)).collect();
    let all: Option<Vec<f64>> = means.iter().copied().collect();
    let average = all.map(|all| all.iter().sum::<f64>() / all.len() as f64);
    let number = |mean: Option<f64>| mean.map_or_else(|| "–".to_owned(), |mean| format!("{mean:.1}"));
    means.into_iter().chain([average]).map(number).collect()
}

/// `3 seeds on one base`, or `5 bases with 3 seeds each`.
fn runs(block: &Block) -> String {
    let rows = || block.methods.iter().flat_map(|method| &method.rows);
    let seeds = rows().map(|row| row.seed).collect::<BTreeSet<_>>().len();
    let bases = rows().map(|row| row.base_seed).collect::<BTreeSet<_>>().len();
    let seeds = if seeds == 1 { "one seed".to_owned() } else { format!("{seeds} seeds") };
    if bases == 1 { format!("{seeds} on one base") } else { format!("{bases} bases with {seeds} each") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reporters::fixture;
    use crate::reporters::table::Table;

    #[test]
    fn each_metric_has_its_average_and_what_is_missing_has_none() {
        let mut results = fixture::results(3);
        for row in results.rows.iter_mut().filter(|row| row.method == "SFT" && row.harmful_ratio == 0.1) {
            row.metrics.fine_tune_accuracy = None;
        }
        let table = Table::new(&results).expect("a table");
        let headline = Headline::of(&table.blocks[0]);
        assert_eq!(headline.columns, ["p = 0", "p = 0.1", "average"]);
        assert_eq!(headline.lines[1], ("SFT", ["2.0", "60.0", "31.0", "80.0", "–", "–"].map(str::to_owned).to_vec()));
        assert!(headline.legend.contains("3 seeds on one base"), "{}", headline.legend);
    }
}
