//! The table in LaTeX, with the rules of `booktabs`.

use super::table::{LEGEND, SHOWN, Table, headings, numbers};

/// One `table` environment for each block.
pub(super) fn render(table: &Table) -> String {
    let mut text = String::from("% \\usepackage{booktabs}\n");
    for block in &table.blocks {
        let columns = headings(block);
        text += &format!(
            "\\begin{{table}}\n\\centering\n\\begin{{tabular}}{{ll{}}}\n\\toprule\n",
            "r".repeat(columns.len())
        );
        let columns: Vec<String> = columns.iter().map(|column| escape(column)).collect();
        text += &format!("Method & & {} \\\\\n", columns.join(" & "));
        for method in &block.methods {
            text += "\\midrule\n";
            for (index, shown) in SHOWN.iter().enumerate() {
                let name = if index == 0 { escape(method.name) } else { String::new() };
                let arrow = if shown.higher { "$\\uparrow$" } else { "$\\downarrow$" };
                let numbers: Vec<String> = numbers(block, method, shown).iter().map(|text| escape(text)).collect();
                text += &format!("{name} & {} {arrow} & {} \\\\\n", shown.short, numbers.join(" & "));
            }
        }
        let caption = format!("{}. {LEGEND}", block.title);
        text += &format!("\\bottomrule\n\\end{{tabular}}\n\\caption{{{}}}\n\\end{{table}}\n", escape(&caption));
    }
    text
}

/// Text that LaTeX shows as it is.
fn escape(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' | '%' | '$' | '#' | '_' | '{' | '}' => {
                safe.push('\\');
                safe.push(c);
            }
            '\\' => safe.push_str("\\textbackslash{}"),
            '~' => safe.push_str("\\textasciitilde{}"),
            '^' => safe.push_str("\\textasciicircum{}"),
            '±' => safe.push_str("$\\pm$"),
            '·' => safe.push_str("$\\cdot$"),
            '–' => safe.push_str("--"),
            '`' => safe.push_str("\\textasciigrave{}"),
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
        assert_eq!(escape("1 ± 2"), "1 $\\pm$ 2");
    }
}
