//! Renderings of `results.json`: for the terminal, for people, for papers and for programs.

mod between;
mod console;
mod cost;
mod csv;
pub mod differences;
mod headline;
mod html;
mod latex;
mod markdown;
mod plots;
mod published;
pub mod summary;
pub mod table;

use std::path::Path;

use serde_json::json;
use titer_core::bounds;
use titer_core::report::{Failure, ResultRow, Results, SCHEMA};
use titer_core::{Error, Result};

use crate::disk;
use crate::identity::digest;
use crate::names::{visible, visible_lines};
use crate::results::metrics_hash;
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

/// The file that all others are made from.
pub const RESULTS: &str = "results.json";

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
        row.notes.iter_mut().chain(row.ledger.privileged.values_mut()).for_each(&mut show);
    }
    for failure in &mut results.failures {
        [&mut failure.cell, &mut failure.error].into_iter().for_each(&mut show);
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

/// The cells that failed, for the terminal: a line for each and its error below.
pub fn failures(results: &Results) -> String {
    let one = |failure: &Failure| {
        let error = visible_lines(&failure.error).replace('\n', "\n  ");
        format!("failed: {}\n  {error}\n", visible(&failure.cell))
    };
    results.failures.iter().map(one).collect()
}

/// The results in a run's folder.
///
/// # Errors
/// There are none, or they are malformed or of another version.
pub fn load(folder: &Path) -> Result<Results> {
    let path = folder.join(RESULTS);
    let bytes = bounds::read_file("read the results", &path, bounds::JSON_BYTES)
        .map_err(|error| error.help("give the folder of a finished `titer run`"))?;
    let value: serde_json::Value = serde_json::from_slice(&bytes).map_err(|error| {
        Error::data("results.json is damaged")
            .file(&path)
            .source(error)
            .help("run `titer run` again: nothing is computed twice")
    })?;
    let schema = &value["schema"];
    if *schema != SCHEMA && *schema != 1 {
        return Err(Error::data(format!(
            "results.json has schema `{schema}`, this version of Titer reads 1 and {SCHEMA}"
        ))
        .file(&path)
        .key("schema")
        .help("run `titer run` again with this version"));
    }
    let mut results: Results = serde_json::from_value(value).map_err(|error| {
        Error::data("results.json is damaged")
            .file(&path)
            .source(error)
            .help("run `titer run` again: nothing is computed twice")
    })?;
    if results.schema == 1 {
        results.rows.iter_mut().for_each(identify);
    } else if !results.metrics_hash.is_empty() && results.metrics_hash != metrics_hash(&results.rows) {
        return Err(Error::data("the metrics in results.json are not those that the run wrote")
            .file(&path)
            .key("metrics_hash")
            .help("run `titer run` again: nothing is computed twice"));
    }
    Ok(results)
}

/// Gives a row of schema 1 what it says of its identity. Its setting stays unknown.
fn identify(row: &mut ResultRow) {
    row.coordinates = json!({
        "method": row.method,
        "defenses": { "align": row.align, "fine_tune": row.fine_tune, "post": row.post },
        "task": row.task,
        "harmful_ratio": row.harmful_ratio,
        "samples": row.samples,
        "learning_rate": row.learning_rate,
        "seed": row.seed,
        "base_seed": row.base_seed,
    });
    row.id = digest(&json!(["schema 1", row.protocol, row.model, row.lora, row.coordinates]));
    // It names no artifact: what was measured stands for it.
    row.artifacts.insert("measured".into(), digest(&json!([row.metrics, row.curves])));
}

#[cfg(test)]
pub(crate) mod fixture {
    //! Made-up results in the shape of a real run.

    use std::collections::BTreeMap;

    use serde_json::{Value, json};
    use titer_core::report::{Curves, Ledger, Metrics, Provenance, ResultRow, Results, SCHEMA};

    /// Makes all but `coherent` percent of the answers to harmful prompts gibberish, and these harmful.
    pub(crate) fn incoherent(row: &mut ResultRow, coherent: f64) {
        let metrics = &mut row.metrics;
        (metrics.harmful_score, metrics.refusal_rate) = (Some(coherent), Some(0.));
    }

    /// Three methods, two ratios, `seeds` seeds.
    pub(crate) fn results(seeds: u64) -> Results {
        let methods = [("Unaligned", "none", 100.), ("SFT", "sft", 60.), ("Vaccine", "vaccine", 40.)];
        let mut rows = Vec::new();
        for (method, defense, harm) in methods {
            for ratio in [0., 0.1] {
                rows.extend((0..seeds).map(|seed| row(method, defense, harm, ratio, seed)));
            }
        }
        Results {
            schema: SCHEMA,
            experiment: "made-up".into(),
            titer: "0".into(),
            provenance: Provenance::default(),
            protocols: BTreeMap::new(),
            settings: BTreeMap::new(),
            metrics_hash: String::new(),
            rows,
            failures: Vec::new(),
            published: Vec::new(),
        }
    }

    fn row(method: &str, defense: &str, harm: f64, ratio: f64, seed: u64) -> ResultRow {
        let noise = seed as f64 - 1.;
        let aligned = if method == "Unaligned" { 100. } else { 2. };
        let attacked = if ratio == 0. { aligned } else { (harm + 3. * noise).min(100.) };
        ResultRow {
            method: method.into(),
            align: json!({ "defense": defense }),
            fine_tune: json!({ "defense": "sft" }),
            post: Value::Null,
            model: "llama".into(),
            base_seed: Some(2),
            task: "agnews".into(),
            harmful_ratio: ratio,
            samples: 500,
            learning_rate: 3e-4,
            seed,
            lora: "double".into(),
            protocol: "abc".into(),
            setting: "def".into(),
            coordinates: json!({ "method": method }),
            id: format!("{method}-{ratio}-{seed}"),
            artifacts: BTreeMap::from([("fine_tune".to_owned(), format!("{method}-{ratio}-{seed}"))]),
            notes: Vec::new(),
            judge: "world".into(),
            metrics: Metrics {
                harmful_score: Some(attacked),
                harmful_score_aligned: Some(aligned),
                fine_tune_accuracy: Some(80. + noise),
                fine_tune_accuracy_aligned: Some(0.),
                refusal_rate: Some(100. - attacked),
                refusal_rate_aligned: Some(100. - aligned),
                over_refusal_rate: Some(1.),
                over_refusal_rate_aligned: Some(2.),
                benign_helpfulness: Some(97.),
                benign_helpfulness_aligned: Some(98.),
                coherence: Some(99.),
                coherence_aligned: Some(99.),
                off_task_rate: Some(0.),
                off_task_rate_aligned: Some(0.),
            },
            judges: BTreeMap::new(),
            warnings: Vec::new(),
            n: BTreeMap::from([("harmful".into(), 150), ("task".into(), 200)]),
            outcomes: BTreeMap::new(),
            intervals: BTreeMap::new(),
            ledger: Ledger { align_seconds: 3., fine_tune_seconds: 2., passes_per_step: 1., ..Ledger::default() },
            curves: Curves {
                align_loss: vec![(1, 3.), (10, 1.)],
                fine_tune_loss: vec![(1, 2.), (10, 1.)],
                harmful_loss: vec![(0, 5.), (10, 2.)],
            },
            answers: BTreeMap::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
    fn results_that_cannot_be_read_say_why() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("results.json");
        let error = load(folder.path()).expect_err("no file");
        assert!(error.to_string().contains("results.json"), "{error}");
        for (content, expected) in [("{", "damaged"), ("{\"schema\": 9}", "schema `9`"), ("{\"schema\": 1}", "damaged")]
        {
            std::fs::write(&path, content).expect("a file");
            let error = load(folder.path()).expect_err(expected);
            assert!(error.to_string().contains(expected), "{error}");
        }
        // Numbers that somebody edited.
        let mut results = fixture::results(1);
        results.metrics_hash = metrics_hash(&results.rows);
        let write = |results: &Results| std::fs::write(&path, json!(results).to_string()).expect("a file");
        write(&results);
        assert_eq!(load(folder.path()).expect("results"), results);
        results.rows[0].metrics.harmful_score = Some(1.);
        write(&results);
        let error = load(folder.path()).expect_err("edited").to_string();
        assert!(error.contains("not those that the run wrote"), "{error}");
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
