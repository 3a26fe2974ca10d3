//! The same cells in several settings, side by side: what the difference between two runs does to the numbers.

use serde::Serialize;
use titer_core::report::{ResultRow, Results};

use super::differences::{TESTED, Test, Tested, correct, signed, test};
use super::table::{Block, MethodRows, Runs, Table, labels};
use crate::experiment::axes::{Coordinate, Coordinates};

/// The columns of a line.
pub(super) const HEADINGS: [&str; 7] = ["method", "p", "metric", "A", "B", "B − A", "what follows"];

/// What the columns mean, for the foot of a table.
pub(super) const LEGEND: &str = "Values are those of the table of each setting, where all other metrics stand. B − A is \
                                 tested as differences to plain fine-tuning are, where both settings have the same seeds on \
                                 the same bases; its p value is corrected for all tests of its table. Where there are \
                                 several bases, B − A is a mean over them, each with its seeds averaged; with one base, what \
                                 is said holds for that base only.";

/// Two settings of one task.
#[derive(Debug, Serialize)]
pub(super) struct BetweenSection {
    /// What they share.
    pub title: String,
    /// What tells them apart.
    pub settings: [String; 2],
    /// One line for each cell and metric, in the order of [`HEADINGS`].
    pub lines: Vec<[String; 7]>,
}

/// The first setting of each task against each other one that has a method and ratio in common with it.
pub(super) fn sections(results: &Results, table: &Table) -> Vec<BetweenSection> {
    // Blocks of one place, each with one of its rows.
    let mut places: Vec<Vec<(&Block, &ResultRow)>> = Vec::new();
    for block in &table.blocks {
        let row = block.methods.first().and_then(|method| method.rows.first());
        // Rows of schema 1 do not say what their setting was.
        let Some(row) = row.filter(|_| !block.setting.is_empty()) else { continue };
        match places.iter_mut().find(|blocks| place(blocks[0].1) == place(row)) {
            Some(blocks) => blocks.push((block, row)),
            None => places.push(vec![(block, row)]),
        }
    }
    places.iter().flat_map(|blocks| of_place(results, blocks)).collect()
}

fn of_place(results: &Results, blocks: &[(&Block, &ResultRow)]) -> Vec<BetweenSection> {
    let (first, row) = blocks[0];
    let ResultRow { model, lora, .. } = row;
    let shared = Coordinates::of_row(row).of_block().map(Coordinate::titled).collect::<Vec<_>>().join(" · ");
    let settings: Vec<&str> = blocks.iter().map(|(block, _)| block.setting).collect();
    // The differing keys name models too, but among many others.
    let models = blocks.iter().any(|(_, row)| row.model != *model);
    let loras = blocks.iter().any(|(_, row)| row.lora != *lora);
    let label = |((_, row), keys): (&(&Block, &ResultRow), String)| {
        let parts = [models.then(|| row.model.clone()), loras.then(|| format!("{} LoRA", row.lora)), Some(keys)];
        parts.into_iter().flatten().collect::<Vec<_>>().join(", ")
    };
    let labels: Vec<String> = blocks.iter().zip(labels(results, &settings)).map(label).collect();
    let section = |((block, _), label): (&(&Block, &ResultRow), &String)| BetweenSection {
        title: shared.clone(),
        settings: [labels[0].clone(), label.clone()],
        lines: lines(first, block),
    };
    blocks.iter().zip(&labels).skip(1).map(section).filter(|section| !section.lines.is_empty()).collect()
}

/// What rows must share to be compared: the coordinates that tell blocks apart, and how they are measured.
fn place(row: &ResultRow) -> (Vec<Coordinate>, &str) {
    (Coordinates::of_row(row).of_block().cloned().collect(), &row.protocol)
}

/// One cell and metric in two settings.
struct Line<'a> {
    a: &'a MethodRows<'a>,
    b: &'a MethodRows<'a>,
    ratio: f64,
    tested: Tested,
    test: Option<Test<'a>>,
}

fn lines(a: &Block, b: &Block) -> Vec<[String; 7]> {
    let mut cells = Vec::new();
    for ours in &a.methods {
        let Some(theirs) = b.methods.iter().find(|method| method.name == ours.name) else { continue };
        for &ratio in a.ratios.iter().filter(|ratio| b.ratios.contains(ratio)) {
            let paired = runs(ours, ratio) == runs(theirs, ratio);
            let cell = |tested| Line {
                a: ours,
                b: theirs,
                ratio,
                tested,
                test: paired.then(|| test(theirs, ours, ratio, tested)).flatten(),
            };
            cells.extend(TESTED.map(cell));
        }
    }
    correct(cells.iter_mut().filter_map(|cell| cell.test.as_mut()).collect());
    let family = cells.iter().filter(|cell| cell.test.is_some()).count();
    cells.iter().filter_map(|cell| cell.columns([a, b], family)).collect()
}

/// The runs of a cell.
fn runs(method: &MethodRows, ratio: f64) -> Runs {
    Runs::of(&method.cell(ratio))
}

impl Line<'_> {
    /// Its columns, if both settings have the value.
    fn columns(&self, [a, b]: [&Block; 2], family: usize) -> Option<[String; 7]> {
        let Self { a: ours, b: theirs, ratio, tested: Tested { metric, short, .. }, test } = self;
        let mean = |method: &MethodRows| Some(method.summary(*ratio, metric)?.mean);
        let difference = mean(theirs)? - mean(ours)?;
        let (size, verdict) = match test {
            Some(test) => (test.size(), test.verdict(family)),
            None => {
                let [a, b] = [ours, theirs].map(|method| runs(method, *ratio).words());
                let why = if a == b { "other seeds or bases".into() } else { format!("A is over {a}, B over {b}") };
                (signed(difference), format!("not tested: {why}"))
            }
        };
        let (in_a, in_b) = (a.after(ours, *ratio, metric), b.after(theirs, *ratio, metric));
        Some([ours.name.to_owned(), ratio.to_string(), (*short).to_owned(), in_a, in_b, size, verdict])
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::json;

    use super::*;
    use crate::report::{Format, console, render};
    use crate::results::fixture;

    /// The fixture with eight seeds in two settings; in the second, `change` is made.
    fn two_settings(change: impl Fn(&mut ResultRow)) -> Results {
        let mut results = fixture::results(8);
        let mut second = results.rows.clone();
        for row in &mut second {
            row.setting = "other".into();
            row.id += "-other";
            change(row);
        }
        results.rows.extend(second);
        results.settings =
            [("def".to_owned(), json!({ "steps": 10 })), ("other".to_owned(), json!({ "steps": 20 }))].into();
        results
    }

    #[test]
    fn cells_stand_side_by_side_with_their_difference() -> titer_core::Result<()> {
        let results = two_settings(|row| {
            if row.method == "Vaccine" && row.harmful_ratio > 0. {
                row.metrics.harmful_score = row.metrics.harmful_score.map(|value| value - 30.);
            }
        });
        let sections = sections(&results, &Table::new(&results)?);
        let [section] = sections.as_slice() else { panic!("one pair of settings: {sections:?}") };
        assert_eq!(section.settings, ["steps = 10", "steps = 20"]);
        assert_eq!(section.lines.len(), 3 * 2 * 2, "methods, ratios, metrics");
        let line = section.lines.iter().find(|line| line[..3] == ["Vaccine", "0.1", "HS"]).expect("the cell");
        assert!(line[3].starts_with("47.5 ±") && line[4].starts_with("17.5 ±"), "{line:?}");
        assert!(line[5].starts_with("−30.0 (95 % CI"), "{line:?}");
        assert!(line[6].starts_with("cannot be told from chance with n = 8 seeds"), "12 tests: {line:?}");
        for text in [
            console(&results)?,
            render(&results, Path::new("."), Format::Md)?,
            render(&results, Path::new("."), Format::Html)?,
        ] {
            for part in ["Between settings", "steps = 20", "−30.0", LEGEND] {
                assert!(text.contains(part), "no `{part}` in\n{text}");
            }
        }
        assert!(!console(&fixture::results(1))?.contains("Between settings"), "one setting, nothing between");
        Ok(())
    }

    #[test]
    fn other_seeds_are_not_tested_and_other_protocols_not_compared() -> titer_core::Result<()> {
        let mut results = two_settings(|row| row.seed += 1);
        let sections_of = |results: &Results| Table::new(results).map(|table| sections(results, &table));
        let section = sections_of(&results)?.remove(0);
        assert!(section.lines.iter().all(|line| line[6] == "not tested: other seeds or bases"), "{:?}", section.lines);
        let mut fewer = results.clone();
        fewer.rows.retain(|row| row.setting == "def" || row.seed == 1);
        let section = sections_of(&fewer)?.remove(0);
        let why = "not tested: A is over 8 seeds on one base, B over one seed on one base";
        assert!(section.lines.iter().all(|line| line[6] == why), "{:?}", section.lines);
        // Another model has a title of its own, so it may be measured in another way.
        for row in results.rows.iter_mut().filter(|row| row.setting == "other") {
            row.model = "qwen2".into();
        }
        assert_eq!(sections_of(&results)?.len(), 1);
        for row in results.rows.iter_mut().filter(|row| row.setting == "other") {
            row.protocol = "other".into();
        }
        assert!(sections_of(&results)?.is_empty());
        Ok(())
    }
}
