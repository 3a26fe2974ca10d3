//! The table on the terminal.

use comfy_table::presets::UTF8_HORIZONTAL_ONLY;
use comfy_table::{CellAlignment, ContentArrangement, Table as Grid};

use super::summary::sentences;
use super::table::{LEGEND, SHOWN, Shown, Table, headings, numbers};

/// Every block with its sentences.
pub(super) fn render(table: &Table) -> String {
    let mut text = String::new();
    for block in &table.blocks {
        let mut grid = Grid::new();
        grid.load_style(UTF8_HORIZONTAL_ONLY).set_content_arrangement(ContentArrangement::Disabled);
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
    text + LEGEND + "\n"
}
