//! The table in Markdown.

use titer_core::report::Results;

use super::cost::Cost;
use super::published;
use super::summary::sentences;
use super::table::{Block, LEGEND, SHOWN, Table, headings, numbers};

/// A page.
pub(super) fn render(results: &Results, table: &Table) -> String {
    let mut text = format!("# {}\n", escape(&results.experiment));
    for block in &table.blocks {
        text += &format!("\n## {}\n\n", escape(&block.title));
        let columns = headings(block);
        text += &format!("| method | | {} |\n", columns.join(" | "));
        text += &format!("|---|---|{}\n", "--:|".repeat(columns.len()));
        for method in &block.methods {
            for (index, shown) in SHOWN.iter().enumerate() {
                let name = if index == 0 { format!("**{}**", escape(method.name)) } else { String::new() };
                let numbers = numbers(block, method, shown);
                text += &format!("| {name} | {} | {} |\n", shown.heading(), numbers.join(" | "));
            }
        }
        text.push('\n');
        for (method, sentence) in sentences(block) {
            text += &format!("- **{}**: {}\n", escape(method), escape(&sentence));
        }
        text += &costs(block);
    }
    text += &verdicts(results);
    if !results.failures.is_empty() {
        text += "\n## Failed\n\n";
        for failure in &results.failures {
            text += &format!("- {}: {}\n", escape(&failure.cell), escape(&failure.error));
        }
    }
    text + &format!("\n{LEGEND}\n\nProtocol {}.\n", protocols(results))
}

/// What each method cost and must know, and what its combination brings with it.
fn costs(block: &Block) -> String {
    let costs: Vec<Cost> = block.methods.iter().map(Cost::of).collect();
    let mut text = format!("\n| {} |\n|---|--:|--:|--:|---|\n", Cost::HEADINGS.join(" | "));
    for cost in &costs {
        text += &format!("| {} |\n", cost.cells().map(escape).join(" | "));
    }
    text.push('\n');
    for cost in costs.iter().filter(|cost| !cost.notes.is_empty()) {
        text += &format!("- **{}**: {}.\n", escape(&cost.method), escape(&cost.notes));
    }
    text
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
    for c in text.chars() {
        match c {
            '\n' => safe.push(' '),
            '|' | '*' | '_' | '`' | '<' | '[' | ']' | '#' | '\\' => {
                safe.push('\\');
                safe.push(c);
            }
            _ => safe.push(c),
        }
    }
    safe
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_cannot_break_the_table() -> titer_core::Result<()> {
        let mut results = crate::reporters::fixture::results(1);
        for row in results.rows.iter_mut().filter(|row| row.method == "SFT") {
            row.method = "a|b\n<script>".into();
        }
        let text = render(&results, &Table::new(&results)?);
        assert!(text.contains("**a\\|b \\<script>**"), "{text}");
        Ok(())
    }
}
