//! What a training step and a generated token ask of the device, counted: `tests/device-budgets.toml` holds the numbers.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use titer_tests::cli::{stderr, titer};

const FILE: &str = include_str!("../../device-budgets.toml");

/// A count this far below its budget makes the file untrue.
const SLACK: f64 = 0.9;

/// How often what was asked, by the names of the file.
type Counts = BTreeMap<String, u64>;

/// What a run of `titer bench` asks of the device; nothing is computed.
fn counted(arguments: &[&str]) -> Result<Counts> {
    let folder = tempfile::tempdir()?;
    let summary = folder.path().join("summary.json");
    let mut command = titer();
    command.args(["bench"]).args(arguments).args(["--model", "quickstart", "--batch", "2", "--length", "24"]);
    command.args(["--warmup", "0", "--device", "cuda"]);
    command.env("STANDIN_SUMMARY", &summary).env("STANDIN_DRY", "1");
    let output = command.output()?;
    ensure!(output.status.success(), "{}", stderr(&output));
    let summary: Value = serde_json::from_slice(&std::fs::read(&summary)?)?;
    let names = ["kernels", "products", "allocations", "waits", "bytes_up", "bytes_down"];
    let count = |name: &str| Ok((name.to_owned(), summary[name].as_u64().with_context(|| format!("no `{name}`"))?));
    names.into_iter().map(count).collect()
}

/// What the second of two runs asks for beyond the first.
fn difference(less: &[&str], more: &[&str]) -> Result<Counts> {
    let (less, more) = (counted(less)?, counted(more)?);
    Ok(more.into_iter().map(|(name, count)| (name.clone(), count - less[&name])).collect())
}

#[test]
#[ignore = "needs the stand-in: see .ci/device"]
fn no_step_costs_more_than_it_may() -> Result<()> {
    let step = |method: &str| difference(&["step", "--method", method, "--repeat", "1"], &["step", "--method", method, "--repeat", "2"]);
    let measured = [
        ("sft", step("sft")?),
        ("vaccine", step("vaccine")?),
        ("token", difference(&["generate", "--repeat", "1", "--new", "5"], &["generate", "--repeat", "1", "--new", "6"])?),
    ];
    let budgets: BTreeMap<String, Counts> = toml::from_str(FILE)?;
    let mut wrong = Vec::new();
    for (what, counts) in &measured {
        let budget = budgets.get(*what).with_context(|| format!("no table [{what}] in tests/device-budgets.toml"))?;
        ensure!(budget.keys().eq(counts.keys()), "[{what}] has other lines than {:?}", counts.keys());
        for (name, &count) in counts {
            println!("{what}.{name} = {count}");
            let most = budget[name];
            if count > most {
                wrong.push(format!("{what}.{name} is {count}, and {most} at most is allowed"));
            } else if (count as f64) < SLACK * most as f64 {
                wrong.push(format!("{what}.{name} is {count} only: {most} is out of date"));
            }
        }
    }
    ensure!(
        wrong.is_empty(),
        "{}\nhelp: change the line in tests/device-budgets.toml, and say in its comment why",
        wrong.join("\n")
    );
    Ok(())
}
