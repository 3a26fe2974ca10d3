//! The table on the terminal.

use comfy_table::presets::UTF8_HORIZONTAL_ONLY;
use comfy_table::{CellAlignment, ContentArrangement, Table as Grid};

use titer_core::report::Results;

use super::between;
use super::headline::Headline;
use super::published;
use super::summary::{note, sentences};
use super::table::{Block, LEGEND, SHOWN, Shown, Table, headings, numbers};

/// Every block with its sentences, and the verdicts on published values.
pub(super) fn render(results: &Results, table: &Table) -> String {
    let mut text = String::new();
    for block in &table.blocks {
        let headline = Headline::of(block);
        text += &format!("{}\n{}\n{}\n", block.title, headline_grid(&headline), headline.legend);
        for (method, sentence) in sentences(block) {
            text += &format!("• {method}: {sentence}\n");
        }
        text += &note(block).map_or_else(String::new, |note| note + "\n");
        text += &format!("\n{}\n", every_metric(block));
    }
    text + LEGEND + "\n" + &between_settings(results, table) + &verdicts(results)
}

/// The same cells in several settings.
fn between_settings(results: &Results, table: &Table) -> String {
    let sections = between::sections(results, table);
    let mut text = String::new();
    for between::BetweenSection { title, settings: [a, b], lines } in &sections {
        let mut grid = grid();
        grid.set_header(between::HEADINGS).add_rows(lines);
        text += &format!("\nBetween settings: {title}\nA: {a}\nB: {b}\n{grid}\n");
    }
    if sections.is_empty() { text } else { text + between::LEGEND + "\n" }
}

/// The table of the papers.
fn headline_grid(headline: &Headline) -> Grid {
    let mut grid = grid();
    let headings = headline.groups.iter().flat_map(|group| {
        let first = |(at, column)| if at == 0 { format!("{}  {column}", group.heading) } else { String::clone(column) };
        headline.columns.iter().enumerate().map(first)
    });
    grid.set_header(std::iter::once(String::new()).chain(headings));
    for (method, values) in &headline.lines {
        grid.add_row(std::iter::once(*method).chain(values.iter().map(String::as_str)));
    }
    align_right(&mut grid, 1);
    grid
}

/// One row of several lines for each method: its metrics stand together.
fn every_metric(block: &Block) -> Grid {
    let mut grid = grid();
    grid.set_header([String::new(), String::new()].into_iter().chain(headings(block)));
    for method in &block.methods {
        let metrics: Vec<Vec<String>> = SHOWN.iter().map(|shown| numbers(block, method, shown)).collect();
        let names = SHOWN.iter().map(Shown::heading).collect::<Vec<_>>().join("\n");
        let column = |at: usize| metrics.iter().map(|line| line[at].as_str()).collect::<Vec<_>>().join("\n");
        let columns = (0..=block.ratios.len()).map(column);
        grid.add_row([method.name.to_owned(), names].into_iter().chain(columns));
    }
    align_right(&mut grid, 2);
    grid
}

/// Numbers stand to the right; they begin at column `first`.
fn align_right(grid: &mut Grid, first: usize) {
    for column in grid.column_iter_mut().skip(first) {
        column.set_cell_alignment(CellAlignment::Right);
    }
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
