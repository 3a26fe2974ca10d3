//! The table of the papers in LaTeX, with the rules of `booktabs`.

use super::headline::Headline;
use super::table::{Block, Table};
use crate::names::visible;

/// One `table` environment for each block.
pub(super) fn render(table: &Table) -> String {
    let blocks: String = table.blocks.iter().map(environment).collect();
    format!("% \\usepackage{{booktabs}}\n{blocks}")
}

fn environment(block: &Block) -> String {
    let headline = Headline::of(block);
    let width = headline.columns.len();
    let columns = "r".repeat(width * headline.groups.len());
    let mut text = format!("\\begin{{table}}\n\\centering\n\\begin{{tabular}}{{l{columns}}}\n\\toprule\n");
    let (mut names, mut rules) = (String::new(), String::new());
    for (index, group) in headline.groups.iter().enumerate() {
        let arrow = if group.higher { "$\\uparrow$" } else { "$\\downarrow$" };
        let (first, last) = (2 + index * width, 1 + (index + 1) * width);
        names += &format!(" & \\multicolumn{{{width}}}{{c}}{{{} {arrow}}}", group.short);
        rules += &format!("\\cmidrule(lr){{{first}-{last}}}");
    }
    let columns: String =
        headline.groups.iter().flat_map(|_| &headline.columns).map(|c| format!(" & {}", escape(c))).collect();
    text += &format!("{names} \\\\\n{rules}\nMethod{columns} \\\\\n\\midrule\n");
    for (method, values) in &headline.lines {
        let values: String = values.iter().map(|value| format!(" & {}", escape(value))).collect();
        text += &format!("{}{values} \\\\\n", escape(method));
    }
    let caption = escape(&format!("{}. {}", block.title, headline.legend));
    text + &format!("\\bottomrule\n\\end{{tabular}}\n\\caption{{{caption}}}\n\\end{{table}}\n")
}

/// Text that LaTeX shows as it is.
fn escape(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in visible(text).chars() {
        match c {
            '&' | '%' | '$' | '#' | '_' | '{' | '}' => {
                safe.push('\\');
                safe.push(c);
            }
            '\\' => safe.push_str("\\textbackslash{}"),
            '~' => safe.push_str("\\textasciitilde{}"),
            '^' => safe.push_str("\\textasciicircum{}"),
            '<' => safe.push_str("\\textless{}"),
            '>' => safe.push_str("\\textgreater{}"),
            '|' => safe.push_str("\\textbar{}"),
            '"' => safe.push_str("\\textquotedbl{}"),
            '`' => safe.push_str("\\textasciigrave{}"),
            // After the end of a row they would be its arguments.
            '[' | ']' | '*' => safe.extend(['{', c, '}']),
            '±' => safe.push_str("$\\pm$"),
            '·' => safe.push_str("$\\cdot$"),
            '−' => safe.push_str("$-$"),
            '–' => safe.push_str("--"),
            '†' => safe.push_str("\\textdagger{}"),
            _ => safe.push(c),
        }
    }
    safe
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn special_characters_are_escaped() {
        assert_eq!(escape("a_b & 5% {x} \\y"), "a\\_b \\& 5\\% \\{x\\} \\textbackslash{}y");
        assert_eq!(escape("1 ± 2†"), "1 $\\pm$ 2\\textdagger{}");
    }
}
