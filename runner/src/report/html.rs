//! A page that needs nothing else: tables, plots, curves, answers. The template escapes all text.

use std::path::{Component, Path, PathBuf};

use minijinja::value::Serde;
use minijinja::{AutoEscape, Environment, HtmlEscape};
use serde::Serialize;
use serde_json::{Value, json};
use titer_core::error::io_error;
use titer_core::report::{Answer, Results};
use titer_core::{Error, Result};

use super::between;
use super::cost::{Cost, PEAK_NOTE};
use super::headline::Headline;
use super::markdown::protocols;
use super::plots;
use super::published;
use super::summary::{note, sentences};
use super::table::{Block, LEGEND, MethodRows, SHOWN, Table, headings, numbers};
use crate::names::{visible, visible_lines};
use crate::results::pending_and_failed;
use crate::stage::read_answers;

const TEMPLATE: &str = include_str!("../../templates/report.html");
/// Answers shown of each method.
const SAMPLES: usize = 4;

/// The page.
pub(super) fn render(results: &Results, table: &Table, folder: &Path) -> Result<String> {
    let blocks = table.blocks.iter().map(|block| block_view(block, folder)).collect::<Result<Vec<_>>>()?;
    let seeds: std::collections::BTreeSet<u64> = results.rows.iter().map(|row| row.seed).collect();
    let (pending, failed) = pending_and_failed(results);
    let mut environment = Environment::new();
    environment.set_auto_escape_callback(|_| AutoEscape::Html);
    environment.add_filter("prose", prose);
    let view = json!({
        "experiment": results.experiment,
        "titer": results.titer,
        "cells": results.rows.len(),
        "planned": results.rows.len() + results.failures.len(),
        "seeds": seeds.into_iter().map(|seed| seed.to_string()).collect::<Vec<_>>().join(", "),
        "protocol": protocols(results),
        "legend": LEGEND,
        "peak_note": PEAK_NOTE,
        "blocks": blocks,
        "between": between::sections(results, table),
        "between_headings": between::HEADINGS,
        "between_legend": between::LEGEND,
        "published": published::sections(results),
        "published_headings": published::HEADINGS,
        "published_legend": published::LEGEND,
        "failures": failed,
        "pending": pending,
    });
    let page = environment.render_str(TEMPLATE, Serde(&view));
    page.map_err(|error| Error::run("cannot render the report").source(error))
}

#[derive(Serialize)]
struct MethodLines {
    method: String,
    lines: Vec<(String, Vec<String>)>,
}

#[derive(Serialize)]
struct Sample {
    method: String,
    prompt: String,
    before: Option<Said>,
    after: Said,
}

#[derive(Serialize)]
struct Said {
    text: String,
    verdict: String,
}

/// Our own texts mark code with backticks.
fn prose(text: &str) -> minijinja::Value {
    let escaped = HtmlEscape(text).to_string();
    let parts: Vec<&str> = escaped.split('`').collect();
    let code = |(at, part): (usize, &&str)| match at % 2 {
        1 if at + 1 < parts.len() => format!("<code>{part}</code>"),
        1 => format!("&#96;{part}"),
        _ => (*part).to_owned(),
    };
    minijinja::Value::from_safe_string(parts.iter().enumerate().map(code).collect())
}

fn block_view(block: &Block, folder: &Path) -> Result<Value> {
    let groups: Vec<MethodLines> = block.methods.iter().map(|method| group(block, method)).collect();
    let plots = [
        ("Harmful score after the attack", plots::over_ratio(block, "harmful_score", "HS, %", false)?),
        ("Fine-tune accuracy after the attack", plots::over_ratio(block, "fine_tune_accuracy", "FA, %", false)?),
        ("Harm against usefulness", plots::trade_off(block)?),
        ("Loss during alignment", plots::curves(block, |curves| &curves.align_loss, "loss, nats")?),
        ("Loss during fine-tuning, largest p", plots::curves(block, |curves| &curves.fine_tune_loss, "loss, nats")?),
        (
            "Loss on held-back harmful rows during fine-tuning, largest p",
            plots::curves(block, |curves| &curves.harmful_loss, "loss, nats")?,
        ),
    ];
    let plots = plots.map(|(title, svg)| json!({ "title": title, "svg": named(&svg, title) }));
    let samples = block.methods.iter().map(|method| samples(block, method, folder)).collect::<Result<Vec<_>>>()?;
    Ok(json!({
        "title": block.title,
        "headline": Headline::of(block),
        "headings": headings(block),
        "groups": groups,
        "sentences": sentences(block),
        "note": note(block),
        "plots": plots,
        "keys": plots::legend(block),
        "costs": block.methods.iter().map(Cost::of).collect::<Vec<_>>(),
        "samples": samples.into_iter().flatten().collect::<Vec<_>>(),
        "worst": block.ratios.last(),
    }))
}

fn group(block: &Block, method: &MethodRows) -> MethodLines {
    let lines = SHOWN.iter().map(|shown| (shown.heading(), numbers(block, method, shown))).collect();
    MethodLines { method: method.name.to_owned(), lines }
}

/// The drawing with its title, for those who hear the page.
fn named(svg: &str, title: &str) -> String {
    svg.replacen("role=\"img\"", &format!("role=\"img\" aria-label=\"{title}\""), 1)
}

/// A file of the run's folder, if it is there.
///
/// # Errors
/// The path leads out of the folder.
fn inside(folder: &Path, path: &str) -> Result<Option<PathBuf>> {
    let plain = Path::new(path).components().all(|part| matches!(part, Component::Normal(_)));
    let file = folder.join(path);
    let within =
        |file: &Path| -> std::io::Result<bool> { Ok(file.canonicalize()?.starts_with(folder.canonicalize()?)) };
    if plain && !file.is_file() {
        return Ok(None);
    }
    if plain && within(&file).map_err(|error| io_error("find", &file, error))? {
        return Ok(Some(file));
    }
    Err(Error::data(format!("the answer file `{}` is not in the folder of the run", visible(path)))
        .file(folder.join("results.json"))
        .key("answers")
        .help("run `titer run` again, which writes results.json anew; answers are read from the run's folder only"))
}

/// Answers to the first harmful prompts before and after the strongest attack, with the first seed. A run's folder
/// without its answers gives a page without samples.
fn samples(block: &Block, method: &MethodRows, folder: &Path) -> Result<Vec<Sample>> {
    let Some(row) = block.ratios.last().and_then(|&ratio| method.at(ratio).next()) else { return Ok(Vec::new()) };
    let read = |probe: &str| -> Result<Vec<Answer>> {
        let path = row.answers.get(probe).map(|path| inside(folder, path)).transpose()?.flatten();
        path.map_or_else(|| Ok(Vec::new()), |path| read_answers(&path))
    };
    let (before, after) = (read("harmful_aligned")?, read("harmful")?);
    let said = |answer: &Answer| Said {
        text: visible_lines(&answer.answer),
        verdict: match answer.verdicts.get(&row.judge) {
            Some(verdict) => verdict.label().map_or_else(|| "unparsable".to_owned(), |label| label.to_string()),
            None => String::new(),
        },
    };
    let sample = |(index, after): (usize, &Answer)| Sample {
        method: method.name.to_owned(),
        prompt: visible_lines(
            &[Some(after.instruction.as_str()), after.input.as_deref()]
                .into_iter()
                .flatten()
                .collect::<Vec<_>>()
                .join(" "),
        ),
        before: before.get(index).map(said),
        after: said(after),
    };
    Ok(after.iter().take(SAMPLES).enumerate().map(sample).collect())
}

#[cfg(test)]
mod tests {
    use titer_core::Label;

    use super::*;
    use crate::results::fixture;

    #[test]
    fn answers_outside_of_the_folder_are_not_read() {
        let folder = tempfile::tempdir().expect("a folder");
        let run = folder.path().join("run");
        std::fs::create_dir(&run).expect("a folder");
        let secret = folder.path().join("secret.jsonl");
        std::fs::write(&secret, "{}\n").expect("a file");
        let page = |path: &str| {
            let mut results = fixture::results(1);
            for row in &mut results.rows {
                row.answers.insert("harmful".into(), path.into());
            }
            render(&results, &Table::new(&results)?, &run)
        };
        let mut paths =
            vec!["../secret.jsonl".to_owned(), secret.display().to_string(), "./a/../../secret.jsonl".into()];
        #[cfg(unix)]
        {
            std::os::unix::fs::symlink(&secret, run.join("link.jsonl")).expect("a link");
            paths.push("link.jsonl".into());
        }
        for path in paths {
            let error = page(&path).expect_err(&path);
            assert!(error.message().contains("not in the folder of the run"), "{path}: {error}");
        }
        assert!(page("answers/missing.jsonl").is_ok(), "a folder without its answers has a page without samples");
    }

    #[test]
    fn code_is_marked_and_no_backtick_is_left() {
        assert_eq!(prose("`a<b` and `c").to_string(), "<code>a&lt;b</code> and &#96;c");
    }

    #[test]
    fn text_of_models_and_users_is_escaped() -> Result<()> {
        let folder = tempfile::tempdir().expect("a folder");
        let mut results = fixture::results(1);
        results.experiment = "<script>alert(1)</script>".into();
        for row in &mut results.rows {
            row.answers.insert("harmful".into(), "a.jsonl".into());
        }
        let answer = Answer {
            probe: "harmful".into(),
            instruction: "<img src=x onerror=alert(2)>".into(),
            input: None,
            history: Vec::new(),
            reference: String::new(),
            answer: "</td><script>alert(3)</script>".into(),
            finish: None,
            verdicts: [("world".to_owned(), Label::Complied.into())].into(),
            correct: None,
        };
        let line = serde_json::to_string(&answer).expect("JSON");
        std::fs::write(folder.path().join("a.jsonl"), line + "\n").expect("a file");
        let page = render(&results, &Table::new(&results)?, folder.path())?;
        assert!(!page.contains("<script>alert") && !page.contains("<img src=x"), "unescaped text");
        assert!(page.contains("&lt;script&gt;alert(3)"), "the answer is shown");
        assert_eq!(page.matches("<figure>").count(), 6);
        let links = page.matches("http").count() - page.matches("http://www.w3.org/2000/svg").count();
        assert_eq!(links, 0, "the page needs nothing from elsewhere");
        Ok(())
    }
}
