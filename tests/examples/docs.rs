//! Writes the measured figures into README.md and docs/measurements, from the folders of finished runs:
//!
//!     cargo run --release -p titer-tests --example docs -- runs/quickstart runs/world-bench

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use titer::reporters::{self, Format};
use titer_core::report::Results;

fn main() -> Result<()> {
    let folders: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    ensure!(!folders.is_empty(), "give the folders of finished runs");
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let measurements = root.join("docs/measurements");
    std::fs::create_dir_all(&measurements)?;
    for folder in folders {
        let results = reporters::load(&folder)?;
        let name = results.experiment.clone();
        let table = reporters::render(&results, &folder, Format::Md)?;
        let page = format!("{table}\n{}", machine(&results, &folder)?);
        // A page averages over bases; of the choice of a base, only the rows tell.
        if name != "quickstart-bases" {
            std::fs::write(measurements.join(format!("{name}.md")), &page)?;
        }
        std::fs::write(measurements.join(format!("{name}.csv")), reporters::render(&results, &folder, Format::Csv)?)?;
        if name == "quickstart" {
            let plots = reporters::plots_of(&results)?;
            let (_, [harm, accuracy]) = plots.first().context("a plot")?;
            std::fs::write(measurements.join("quickstart-hs.svg"), harm)?;
            std::fs::write(measurements.join("quickstart-fa.svg"), accuracy)?;
            let (_, body) = page.split_once('\n').context("a title")?;
            let body = body.replace("\n## ", "\n### ");
            insert(&root.join("README.md"), "quickstart", &body)?;
        }
    }
    let list = defenses()?;
    insert(&root.join("README.md"), "defenses", &list)
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

/// How long the last run of this folder took, and its memory.
fn machine(results: &Results, folder: &Path) -> Result<String> {
    let events = std::fs::read_to_string(folder.join("events.jsonl"))?;
    let finished = events.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    let longest = finished
        .filter(|event| event["event"] == "run_finished")
        .max_by_key(|event| event["ran"].as_u64())
        .context("no finished run in events.jsonl")?;
    let peak = results.rows.iter().map(|row| row.ledger.peak_bytes).max().unwrap_or(0);
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    Ok(format!(
        "Measured on {cores} CPU cores: {} stages in {:.0} s (of {} cells; the others came from the store), peak memory \
         {:.0} MiB.\n",
        longest["ran"],
        longest["seconds"].as_f64().unwrap_or(0.),
        results.rows.len(),
        peak as f64 / f64::from(1 << 20),
    ))
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
