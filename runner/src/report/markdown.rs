//! The table in Markdown.

use titer_core::report::Results;

use super::between;
use super::cost::{Cost, PEAK_NOTE};
use super::headline::Headline;
use super::published;
use super::summary::{note, sentences};
use super::table::{Block, LEGEND, SHOWN, Table, headings, numbers};
use crate::names::visible;
use crate::results::pending_and_failed;

/// A page.
pub(super) fn render(results: &Results, table: &Table) -> String {
    let mut text = format!("# {}\n", escape(&results.experiment));
    for block in &table.blocks {
        text += &format!("\n## {}\n\n{}\n", escape(&block.title), headline(block));
        for (method, sentence) in sentences(block) {
            text += &format!("- **{}**: {}\n", escape(method), escape(&sentence));
        }
        text += &note(block).map_or_else(String::new, |note| format!("\n{}\n", escape(&note)));
        text += &every_metric(block);
        text += &costs(block);
    }
    text += &between_settings(results, table);
    text += &verdicts(results);
    let (pending, failed) = pending_and_failed(results);
    if !pending.is_empty() {
        text += "\n## Not run yet\n\nThe run was interrupted. The same command goes on.\n\n";
        for failure in pending {
            text += &format!("- {}\n", escape(&failure.cell));
        }
    }
    if !failed.is_empty() {
        text += "\n## Failed\n\n";
        for failure in failed {
            text += &format!("- {}: {}\n", escape(&failure.cell), escape(&failure.error));
        }
    }
    if !table.blocks.is_empty() {
        text += &format!("\n{LEGEND}\n\nProtocol {}.\n", escape(&protocols(results)));
    }
    text
}

/// The table of the papers for each block, under its title where there are several.
pub(super) fn headlines(table: &Table) -> String {
    let title = |block: &Block| format!("### {}\n\n", escape(&block.title));
    let several = table.blocks.len() > 1;
    let one = |block| if several { title(block) + &headline(block) } else { headline(block) };
    table.blocks.iter().map(one).collect::<Vec<_>>().join("\n")
}

/// The table of the papers.
fn headline(block: &Block) -> String {
    let headline = Headline::of(block);
    let columns = headline.groups.iter().flat_map(|group| {
        let first = |(at, column)| if at == 0 { format!("{} {column}", group.heading) } else { String::clone(column) };
        headline.columns.iter().enumerate().map(first)
    });
    let columns: Vec<String> = columns.collect();
    let mut text = format!("| method | {} |\n|---|{}\n", columns.join(" | "), "--:|".repeat(columns.len()));
    for (method, values) in &headline.lines {
        text += &format!("| {} | {} |\n", escape(method), values.join(" | "));
    }
    text + "\n" + &escape(&headline.legend) + "\n"
}

/// Every metric with its spread.
fn every_metric(block: &Block) -> String {
    let columns = headings(block);
    let mut text = format!("\n| method | | {} |\n", columns.join(" | "));
    text += &format!("|---|---|{}\n", "--:|".repeat(columns.len()));
    for method in &block.methods {
        for (index, shown) in SHOWN.iter().enumerate() {
            let name = if index == 0 { format!("**{}**", escape(method.name)) } else { String::new() };
            let numbers = numbers(block, method, shown);
            text += &format!("| {name} | {} | {} |\n", shown.heading(), numbers.join(" | "));
        }
    }
    text
}

/// What each method cost and must know, and what its combination brings with it.
fn costs(block: &Block) -> String {
    let costs: Vec<Cost> = block.methods.iter().map(Cost::of).collect();
    let mut text = format!("\n| {} |\n|---|--:|--:|--:|---|\n", Cost::HEADINGS.join(" | "));
    for cost in &costs {
        text += &format!("| {} |\n", cost.cells().map(escape).join(" | "));
    }
    text += &format!("\n{PEAK_NOTE}\n");
    text += if costs.iter().all(|cost| cost.notes.is_empty()) { "" } else { "\n" };
    for cost in costs.iter().filter(|cost| !cost.notes.is_empty()) {
        text += &format!("- **{}**: {}.\n", escape(&cost.method), escape(&cost.notes));
    }
    text
}

/// The same cells in several settings.
fn between_settings(results: &Results, table: &Table) -> String {
    let sections = between::sections(results, table);
    let mut text = String::new();
    for between::BetweenSection { title, settings: [a, b], lines } in &sections {
        text += &format!("\n## Between settings: {}\n\n- A: {}\n- B: {}\n\n", escape(title), escape(a), escape(b));
        text += &format!("| {} |\n|---|--:|---|--:|--:|--:|---|\n", between::HEADINGS.join(" | "));
        for line in lines {
            text += &format!("| {} |\n", line.each_ref().map(|text| escape(text)).join(" | "));
        }
    }
    if sections.is_empty() { text } else { text + "\n" + between::LEGEND + "\n" }
}

/// Ours against published values.
fn verdicts(results: &Results) -> String {
    let sections = published::sections(results);
    let mut text = String::new();
    for section in &sections {
        text += &format!("\n## Against {}\n\n{}.\n\n", escape(&section.source), section.count);
        text += &format!("| {} |\n|---|---|---|--:|--:|--:|---|---|\n", published::HEADINGS.join(" | "));
        for line in &section.lines {
            text += &format!("| {} |\n", line.each_ref().map(|text| escape(text)).join(" | "));
        }
        text += if section.notes.is_empty() { "" } else { "\n" };
        for note in &section.notes {
            text += &format!("- {}\n", escape(note));
        }
    }
    if sections.is_empty() { text } else { text + "\n" + published::LEGEND + "\n" }
}

/// The protocol ids of all rows.
pub(super) fn protocols(results: &Results) -> String {
    let ids: std::collections::BTreeSet<&str> = results.rows.iter().map(|row| row.protocol.as_str()).collect();
    ids.into_iter().collect::<Vec<_>>().join(", ")
}

/// Text that Markdown shows as it is, on one line.
fn escape(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in visible(text).chars() {
        if "|*_`<>[]{}#\\~$&!".contains(c) {
            safe.push('\\');
        }
        safe.push(c);
    }
    safe
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_cannot_break_the_table() -> titer_core::Result<()> {
        let mut results = crate::results::fixture::results(1);
        for row in results.rows.iter_mut().filter(|row| row.method == "SFT") {
            row.method = "a|b\n<script>".into();
        }
        let text = render(&results, &Table::new(&results)?);
        assert!(text.contains("**a\\|b\\\\n\\<script\\>**"), "{text}");
        Ok(())
    }
}
