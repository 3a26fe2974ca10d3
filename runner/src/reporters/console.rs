//! The table on the terminal.

use comfy_table::presets::UTF8_HORIZONTAL_ONLY;
use comfy_table::{CellAlignment, ContentArrangement, Table as Grid};

use super::summary::sentences;
use super::table::{LEGEND, SHOWN, Table, headings, numbers};

/// Every block with its sentences.
pub(super) fn render(table: &Table) -> String {
    let mut text = String::new();
    for block in &table.blocks {
        let mut grid = Grid::new();
        grid.load_style(UTF8_HORIZONTAL_ONLY).set_content_arrangement(ContentArrangement::Disabled);
        grid.set_header([String::new(), String::new()].into_iter().chain(headings(block)));
        for method in &block.methods {
            for (index, shown) in SHOWN.iter().enumerate() {
                let name = if index == 0 { method.name } else { "" };
                let head = [name.to_owned(), shown.heading()];
                grid.add_row(head.into_iter().chain(numbers(block, method, shown)));
            }
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
