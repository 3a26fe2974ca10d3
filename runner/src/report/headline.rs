//! The table that papers print: harmful score and accuracy after the attack, over the harmful ratios, with the average.

use serde::Serialize;

use super::table::{Block, INCOHERENT_NOTE, MethodRows, SHOWN, Shown, number};

/// The metrics of the table.
const METRICS: [&str; 2] = ["harmful_score", "fine_tune_accuracy"];

/// The table, ready to be shown.
#[derive(Debug, Serialize)]
pub(super) struct Headline<'a> {
    /// The metrics, each over all [`columns`](Self::columns).
    pub groups: Vec<Column>,
    /// The columns of each metric: the harmful ratios, and their average.
    pub columns: Vec<String>,
    /// Each method with its values of the first metric, then of the second.
    pub lines: Vec<(&'a str, Vec<String>)>,
    /// What the numbers are means of.
    pub legend: String,
}

/// A metric of the table.
#[derive(Debug, Serialize)]
pub(super) struct Column {
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
        let group = |shown: &&Shown| Column { short: shown.short, heading: shown.heading(), higher: shown.higher };
        let ratios = block.ratios.iter().map(|p| format!("p = {p}"));
        let line = |method: &'a MethodRows| {
            (method.name, shown.iter().flat_map(|shown| values(block, method, shown.after)).collect())
        };
        Self {
            groups: shown.iter().map(group).collect(),
            columns: ratios.chain(["average".to_owned()]).collect(),
            lines: block.methods.iter().map(line).collect(),
            legend: legend(block),
        }
    }
}

/// The means at each ratio and their average; a dash where a value is missing.
fn values(block: &Block, method: &MethodRows, metric: &str) -> Vec<String> {
    let means: Vec<Option<f64>> = block.ratios.iter().map(|&ratio| Some(method.summary(ratio, metric)?.mean)).collect();
    let cells: Vec<_> = block.ratios.iter().map(|&ratio| method.cell(ratio)).collect();
    let all: Option<Vec<f64>> = means.iter().copied().collect();
    let average = all.map(|all| all.iter().sum::<f64>() / all.len() as f64);
    let shown = |mean: Option<f64>, cells| match mean {
        None => number(None),
        Some(mean) => block.marked(&format!("{mean:.1}"), cells, metric),
    };
    let each = means.into_iter().zip(cells.chunks(1)).map(|(mean, cell)| shown(mean, cell));
    each.chain([shown(average, &cells)]).collect()
}

/// What the numbers are, and what their marks mean.
fn legend(block: &Block) -> String {
    let others = if block.uneven() { ", or over those that stand behind the number" } else { "" };
    let note = if block.incoherent() { format!(" {INCOHERENT_NOTE}") } else { String::new() };
    format!(
        "HS harmful score, FA fine-tune accuracy, after the attack, in percent: means over {}{others}, and their average \
         over p.{note}",
        block.runs.words()
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::table::Table;
    use crate::results::fixture;

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
        assert!(
            headline.legend.ends_with("means over 3 seeds on one base, and their average over p."),
            "{}",
            headline.legend
        );
    }

    #[test]
    fn marks_stand_at_the_value_and_its_average_and_are_explained() {
        let mut results = fixture::results(3);
        results.rows.retain(|row| row.method != "Vaccine" || row.seed == 0);
        let garbage = results.rows.iter_mut().find(|row| row.method == "SFT" && row.harmful_ratio > 0.);
        fixture::incoherent(garbage.expect("a row"), 3.);
        let table = Table::new(&results).expect("a table");
        let headline = Headline::of(&table.blocks[0]);
        assert_eq!(headline.lines[1].1[..4], ["2.0", "42.0†", "22.0†", "80.0"]);
        assert_eq!(headline.lines[2].1[..3], ["2.0 (1 seed)", "37.0 (1 seed)", "19.5 (1 seed)"]);
        for part in ["3 seeds on one base, or over those that stand behind the number", INCOHERENT_NOTE] {
            assert!(headline.legend.contains(part), "{}", headline.legend);
        }
    }
}
