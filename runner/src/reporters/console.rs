//! The table on the terminal.

use comfy_table::presets::UTF8_HORIZONTAL_ONLY;
use comfy_table::{CellAlignment, ContentArrangement, Table as Grid};

use titer_core::report::Results;

use super::published;
use super::summary::sentences;
use super::table::{LEGEND, SHOWN, Shown, Table, headings, numbers};

/// Every block with its sentences, and the verdicts on published values.
pub(super) fn render(results: &Results, table: &Table) -> String {
    let mut text = String::new();
    for block in &table.blocks {
        let mut grid = grid();
        grid.set_header([String::new(), String::new()].into_iter().chain(headings(block)));
        for method in &block.methods {
            // One row of several lines for each method: its five metrics stand together.
            let metrics: Vec<Vec<String>> = SHOWN.iter().map(|shown| numbers(block, method, shown)).collect();
            let names = SHOWN.iter().map(Shown::heading).collect::<Vec<_>>().join("\n");
            let column = |at: usize| metrics.iter().map(|line| line[at].as_str()).collect::<Vec<_>>().join("\n");
            let columns = (0..=block.ratios.len()).map(column);
            grid.add_row([method.name.to_owned(), names].into_iter().chain(columns));
        }
        for column in grid.column_iter_mut().skip(2) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        text += &format!("{}\n{grid}\n", block.title);
        for (method, sentence) in sentences(block) {
            text += &format!("• {method}: {sentence}\n");
        }
        text.push('\n');
    }
    text + LEGEND + "\n" + &verdicts(results)
}

fn verdicts(results: &Results) -> String {
    let sections = published::sections(results);
    let mut text = String::new();
    for section in &sections {
        let mut grid = grid();
        grid.set_header(published::HEADINGS).add_rows(&section.lines);
        text += &format!("\n{}: {}\n{grid}\n", section.source, section.count);
        for note in &section.notes {
            text += &format!("• {note}\n");
        }
    }
    if sections.is_empty() { text } else { text + published::LEGEND + "\n" }
}

fn grid() -> Grid {
    let mut grid = Grid::new();
    grid.load_style(UTF8_HORIZONTAL_ONLY).set_content_arrangement(ContentArrangement::Disabled);
    grid
}
