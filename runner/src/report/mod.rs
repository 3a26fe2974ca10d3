//! Renderings of `results.json`: for the terminal, for people, for papers and for programs.

mod between;
pub mod compare;
mod console;
mod cost;
mod csv;
pub mod differences;
pub mod folder;
mod headline;
mod html;
mod latex;
mod markdown;
mod plots;
mod published;
pub mod reproduction;
pub mod summary;
pub mod table;

use std::path::Path;

use titer_core::report::{Failure, Results};
use titer_core::{Error, Result};

use crate::disk;
use crate::names::{visible, visible_lines};
use crate::results::file::RESULTS;
use crate::results::pending_and_failed;
use table::Table;

/// A rendering.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// Markdown.
    Md,
    /// A self-contained page.
    Html,
    /// `results.json` itself.
    Json,
    /// One line per row.
    Csv,
    /// A table for a paper.
    Latex,
}

/// The files of a run's folder that hold its results.
pub const FILES: [(&str, Format); 4] =
    [(RESULTS, Format::Json), ("results.csv", Format::Csv), ("report.md", Format::Md), ("report.html", Format::Html)];

/// Writes every report of a run into its folder.
///
/// # Errors
/// The rows do not belong into one table, or a file cannot be written.
pub fn write_all(results: &Results, folder: &Path) -> Result<()> {
    for (name, format) in FILES {
        disk::replace(&folder.join(name), render(results, folder, format)?.as_bytes())?;
    }
    Ok(())
}

/// One rendering as text; `folder` is the run's, where sample answers lie.
///
/// # Errors
/// There is no row, or the rows do not belong into one table.
pub fn render(results: &Results, folder: &Path, format: Format) -> Result<String> {
    let readable = &readable(results);
    match format {
        Format::Json => serde_json::to_string_pretty(results)
            .map(|text| text + "\n")
            .map_err(|error| Error::run("results do not serialise").source(error)),
        Format::Csv => csv::render(readable),
        Format::Md => Ok(markdown::render(readable, &Table::or_failures(readable)?)),
        Format::Html => html::render(readable, &Table::or_failures(readable)?, folder),
        Format::Latex => Ok(latex::render(&Table::new(readable)?)),
    }
}

/// The results with every text as it is shown: names may come from a file that no one has checked.
fn readable(results: &Results) -> Results {
    let mut results = results.clone();
    let mut show = |text: &mut String| *text = visible(text);
    show(&mut results.experiment);
    for row in &mut results.rows {
        [&mut row.method, &mut row.task, &mut row.model, &mut row.lora, &mut row.protocol]
            .into_iter()
            .for_each(&mut show);
        let coordinates = row.coordinates.as_object_mut().into_iter().flatten();
        for (_, value) in coordinates {
            if let serde_json::Value::String(text) = value {
                show(text);
            }
        }
        row.notes.iter_mut().chain(row.ledger.privileged.values_mut()).for_each(&mut show);
    }
    for failure in &mut results.failures {
        show(&mut failure.cell);
        // The lines of an error in one, so that no text within it begins a line of its own.
        let lines = failure.error.lines().map(str::trim).filter(|line| !line.is_empty());
        failure.error = lines.map(visible).collect::<Vec<_>>().join("; ");
    }
    for published in &mut results.published {
        [&mut published.source, &mut published.method, &mut published.task].into_iter().for_each(&mut show);
        published.departs.iter_mut().chain(&mut published.sic).for_each(&mut show);
    }
    results
}

/// The table of the papers in Markdown, with what it says about its numbers: for a page of one's own.
///
/// # Errors
/// There is no row, or the rows do not belong into one table.
pub fn headline(results: &Results) -> Result<String> {
    let readable = &readable(results);
    Ok(markdown::headlines(&Table::new(readable)?))
}

/// HS and FA over the harmful ratio as SVG, of each task and setting: the title and the two plots.
///
/// # Errors
/// There is no row, or the rows do not belong into one table.
pub fn plots_of(results: &Results) -> Result<Vec<(String, [String; 2])>> {
    let results = &readable(results);
    let table = Table::new(results)?;
    let of = |block: &table::Block| -> Result<(String, [String; 2])> {
        let plot = |metric, label| plots::over_ratio(block, metric, label, true);
        Ok((block.title.clone(), [plot("harmful_score", "HS, %")?, plot("fine_tune_accuracy", "FA, %")?]))
    };
    table.blocks.iter().map(of).collect()
}

/// The table and the sentences that a run ends with on the terminal.
///
/// # Errors
/// There is no row, or the rows do not belong into one table.
pub fn console(results: &Results) -> Result<String> {
    let readable = &readable(results);
    Ok(console::render(readable, &Table::new(readable)?))
}

/// The cells that failed, for the terminal: a line for each and its error below. Then how many are not run yet.
pub fn failures(results: &Results) -> String {
    let (pending, failed) = pending_and_failed(results);
    let one = |failure: &Failure| {
        let error = visible_lines(&failure.error).replace('\n', "\n  ");
        format!("failed: {}\n  {error}\n", visible(&failure.cell))
    };
    let mut text: String = failed.into_iter().map(one).collect();
    if !pending.is_empty() {
        text += &format!("{} cells are not run yet: the run was interrupted\n", pending.len());
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::file::load;
    use crate::results::fixture;

    #[test]
    fn what_is_written_is_read_again() -> Result<()> {
        let folder = tempfile::tempdir().expect("a folder");
        let results = fixture::results(3);
        write_all(&results, folder.path())?;
        assert_eq!(load(folder.path())?, results);
        for name in ["results.csv", "report.md", "report.html"] {
            assert!(folder.path().join(name).is_file(), "{name}");
        }
        Ok(())
    }

    #[test]
    fn every_rendering_refuses_an_empty_table() {
        let results = titer_core::report::Results { rows: Vec::new(), ..fixture::results(1) };
        for format in [Format::Md, Format::Html, Format::Latex] {
            assert!(render(&results, Path::new("."), format).is_err());
        }
    }

    #[test]
    fn the_renderings_look_as_they_should() -> Result<()> {
        let results = fixture::results(3);
        let folder = Path::new(".");
        insta::assert_snapshot!("console", console(&results)?);
        insta::assert_snapshot!("markdown", render(&results, folder, Format::Md)?);
        insta::assert_snapshot!("latex", render(&results, folder, Format::Latex)?);
        insta::assert_snapshot!("csv", render(&fixture::results(1), folder, Format::Csv)?);
        Ok(())
    }

    /// Results in which every text from elsewhere is `text`.
    fn with_texts(text: &str) -> Results {
        let mut results = fixture::results(1);
        results.experiment = text.into();
        for row in &mut results.rows {
            row.task = text.into();
            row.notes = vec![text.into()];
            row.ledger.privileged.insert("align".into(), text.into());
            row.align["note"] = text.into();
            // The others keep their names: one name for all would be one method.
            if row.method == "Vaccine" {
                row.method = text.into();
            }
        }
        results.failures =
            vec![titer_core::report::Failure { cell: text.into(), id: String::new(), error: text.into() }];
        // A second setting, so that the settings are compared.
        let mut others = results.rows.clone();
        for row in &mut others {
            row.setting = "other".into();
            row.model = text.into();
        }
        let manifest = |value: &str| serde_json::json!({ text: value });
        let settings = [(results.rows[0].setting.clone(), manifest("plain")), ("other".to_owned(), manifest(text))];
        results.settings = settings.into();
        results.rows.extend(others);
        results
    }

    proptest::proptest! {
        #![proptest_config(proptest::prelude::ProptestConfig::with_cases(64))]
        #[test]
        fn no_text_breaks_out_of_its_place(
            text in "([\\x00-\\x1f\\x7f-\\x9f\u{200b}\u{202e}\u{2028}\u{feff}]|[|`<>\"'&*_#$%{}~^=+@;!\\[\\]\\\\-]|[a-zé無]){1,12}"
        ) {
            let (results, plain) = (with_texts(&text), with_texts("plain"));
            let shown = |results: &Results, format| render(results, Path::new("."), format).expect("a rendering");

            // No rendering has a character that cannot be seen. Settings in CSV are JSON, which escapes controls its own way.
            let hidden = |c: char| c.is_control() && c != '\n' || "\u{200b}\u{202e}\u{2028}\u{feff}".contains(c);
            let pages = [Format::Md, Format::Html, Format::Latex].map(|format| shown(&results, format));
            for page in pages.into_iter().chain([console(&results).expect("a table")]) {
                proptest::prop_assert!(!page.contains(hidden), "{:?}", page);
            }
            proptest::prop_assert!(!shown(&results, Format::Csv).contains(|c: char| c.is_control() && c != '\n'));

            // Markdown: the same lines, each with the same cells.
            let cells = |results| -> Vec<usize> {
                let page = shown(results, Format::Md).replace("\\\\", "").replace("\\|", "");
                page.lines().map(|line| line.matches('|').count()).collect()
            };
            proptest::prop_assert_eq!(cells(&results), cells(&plain));

            // HTML: the same tags with the same attributes, but for code in texts.
            let tags = |results| -> Vec<String> {
                let page = shown(results, Format::Html);
                let tags = page.split('<').skip(1).map(|tag| tag.split('>').next().unwrap_or_default().to_owned());
                tags.filter(|tag| !tag.ends_with("code")).collect()
            };
            proptest::prop_assert_eq!(tags(&results), tags(&plain));

            // LaTeX: balanced braces, and nothing active beyond our own.
            let bare = |results| {
                let page = shown(results, Format::Latex).replace("\\textbackslash{}", "");
                "&%$#_{}".chars().fold(page, |page, special| page.replace(&format!("\\{special}"), ""))
            };
            let (found, expected) = (bare(&results), bare(&plain));
            proptest::prop_assert_eq!(found.matches('{').count(), found.matches('}').count());
            for special in "&$#_%~^`\"<>|".chars() {
                let count = |page: &str| page.matches(special).count();
                proptest::prop_assert_eq!(count(&found), count(&expected), "{} in {}", special, found);
            }
        }
    }
}
