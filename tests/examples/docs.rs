//! Writes the pages of docs/reference and the table of defenses, and the measured figures into README.md and
//! docs/measurements from the folders of finished runs, if any are given:
//!
//!     cargo run --release -p titer-tests --example docs -- runs/quickstart runs/world-bench
//!
//! The quickstart must have been run with an empty store: its figures are those of a whole run.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::CommandFactory;
use titer::cli::Cli;
use titer::reference::pages::all_pages;
use titer::report;
use titer::report::Format;
use titer::results::file::load;
use titer_core::report::Results;

fn main() -> Result<()> {
    let folders: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let measurements = root.join("docs/measurements");
    std::fs::create_dir_all(&measurements)?;
    for folder in folders {
        let results = load(&folder)?;
        let name = results.experiment.clone();
        let timing = Timing::read(&folder)?;
        if name == "quickstart" {
            timing.ensure_cold(&folder)?;
        }
        let table = report::render(&results, &folder, Format::Md)?;
        let mut page = format!("{table}\n{}\n", timing.words(&results));
        std::fs::write(measurements.join(format!("{name}.csv")), report::render(&results, &folder, Format::Csv)?)?;
        if name == "quickstart" {
            let plots = report::plots_of(&results)?;
            let (_, [harm, accuracy]) = plots.first().context("a plot")?;
            std::fs::write(measurements.join("quickstart-hs.svg"), harm)?;
            std::fs::write(measurements.join("quickstart-fa.svg"), accuracy)?;
            let plots = [("Harmful score", "hs"), ("Fine-tune accuracy", "fa")]
                .map(|(what, file)| format!("![{what} over the harmful ratio](quickstart-{file}.svg)"));
            page += &format!("\n{}\n", plots.join("\n"));
            insert(&root.join("README.md"), "quickstart", &headline(&results, &timing)?)?;
        }
        // A page averages over bases; of the choice of a base, only the rows tell.
        if name != "quickstart-bases" {
            std::fs::write(measurements.join(format!("{name}.md")), &page)?;
        }
    }
    insert(&root.join("docs/defenses.md"), "defenses", &defenses()?)?;
    let reference = root.join("docs/reference");
    std::fs::create_dir_all(&reference)?;
    for (name, page) in all_pages(&Cli::command())? {
        std::fs::write(reference.join(name), page)?;
    }
    Ok(())
}

/// One table and one plot; all else is on the page.
fn headline(results: &Results, timing: &Timing) -> Result<String> {
    Ok(format!(
        "{}\n![Harmful score over the harmful ratio](docs/measurements/quickstart-hs.svg)\n\n{} \
         [Every metric, its spread, and what the differences say](docs/measurements/quickstart.md).",
        report::headline(results)?,
        timing.words(results)
    ))
}

/// The table of registered defenses.
fn defenses() -> Result<String> {
    let mut text =
        String::from("| defense | stages | what it does | passes a step | must know |\n|---|---|---|--:|---|\n");
    for entry in titer_core::registry::all::<titer_core::DefenseEntry>()? {
        if entry.name == "sam" {
            continue; // the example below
        }
        let stages: Vec<&str> = entry.stages.iter().map(|stage| stage.name()).collect();
        let passes = (entry.passes)(&(entry.settings.defaults)());
        let (name, summary, needs) = (entry.name, entry.summary, entry.privilege.needs);
        text += &format!("| `{name}` | {} | {summary} | {passes} | {needs} |\n", stages.join(", "));
    }
    Ok(text)
}

/// How long the last run of a folder took.
struct Timing {
    ran: u64,
    cached: u64,
    seconds: f64,
}

impl Timing {
    fn read(folder: &Path) -> Result<Self> {
        // A line that a killed process left torn, be it within a letter, is passed over.
        let events = std::fs::read(folder.join("events.jsonl"))?;
        let events = String::from_utf8_lossy(&events);
        let mut events = events.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
        let last = events.rfind(|event| event["event"] == "run_finished");
        let last = last.context("no finished run in events.jsonl")?;
        let number = |key: &str| last[key].as_u64().with_context(|| format!("`{key}` is missing in events.jsonl"));
        Ok(Self { ran: number("ran")?, cached: number("cached")?, seconds: last["seconds"].as_f64().unwrap_or(0.) })
    }

    /// Figures for the README are those of a run that computed everything.
    fn ensure_cold(&self, folder: &Path) -> Result<()> {
        ensure!(
            self.cached == 0,
            "{} of {} stages of the last run in {} came from the store, so its time is not that of the whole: run it again \
             with an empty store (`--store DIR`)",
            self.cached,
            self.ran + self.cached,
            folder.display()
        );
        Ok(())
    }

    fn words(&self, results: &Results) -> String {
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let cold = match self.cached {
            0 => "all of them computed in this run".to_owned(),
            cached => format!("{cached} more came from the store, so this is not the time of the whole"),
        };
        let peak = results.rows.iter().filter_map(|row| row.ledger.peak_bytes).max();
        let peak = peak.map_or_else(String::new, |peak| {
            format!("; at most {:.0} MiB held by a stage of training", peak as f64 / f64::from(1 << 20))
        });
        format!(
            "Measured on {cores} CPU cores: {} stages in {:.0} s ({cold}){peak}. Metrics hash: `{}`.",
            self.ran, self.seconds, results.metrics_hash
        )
    }
}

/// Replaces what stands between the markers of `name`.
fn insert(path: &Path, name: &str, body: &str) -> Result<()> {
    let text = std::fs::read_to_string(path)?;
    let (begin, end) = (format!("<!-- {name}: begin -->\n"), format!("<!-- {name}: end -->"));
    let (head, rest) = text.split_once(&begin).with_context(|| format!("{begin} is missing"))?;
    let (_, tail) = rest.split_once(&end).with_context(|| format!("{end} is missing"))?;
    std::fs::write(path, format!("{head}{begin}\n{}\n\n{end}{tail}", body.trim()))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The timing of a folder with a first run that computed all, and a last one that took `cached` stages from the store.
    fn timing(cached: u64) -> Result<(Timing, tempfile::TempDir)> {
        let folder = tempfile::tempdir()?;
        let event = |ran: u64, cached: u64| {
            format!("{{\"event\":\"run_finished\",\"seconds\":68.4,\"ran\":{ran},\"cached\":{cached},\"failed\":0}}\n")
        };
        std::fs::write(folder.path().join("events.jsonl"), event(511, 0) + &event(511 - cached, cached))?;
        Ok((Timing::read(folder.path())?, folder))
    }

    #[test]
    fn a_torn_line_is_passed_over() -> Result<()> {
        let (_, folder) = timing(0)?;
        let path = folder.path().join("events.jsonl");
        let mut bytes = std::fs::read(&path)?;
        bytes.extend(&"{\"event\":\"stage_started\",\"label\":\"é".as_bytes()[..35]);
        assert!(std::str::from_utf8(&bytes).is_err(), "torn within a letter");
        std::fs::write(&path, bytes)?;
        assert_eq!(Timing::read(folder.path())?.ran, 511);
        Ok(())
    }

    #[test]
    fn a_partly_cached_run_is_called_so_and_is_not_for_the_readme() -> Result<()> {
        let results: Results = serde_json::from_value(serde_json::json!({
            "schema": titer_core::report::SCHEMA, "experiment": "quickstart", "titer": "0", "rows": []
        }))?;
        let (cold, folder) = timing(0)?;
        cold.ensure_cold(folder.path())?;
        assert!(cold.words(&results).contains("511 stages in 68 s (all of them computed in this run)"));
        let (cached, folder) = timing(322)?;
        let error = cached.ensure_cold(folder.path()).expect_err("a partly cached run").to_string();
        assert!(error.contains("322 of 511 stages") && error.contains("empty store"), "{error}");
        assert!(cached.words(&results).contains("189 stages in 68 s (322 more came from the store"));
        Ok(())
    }
}
