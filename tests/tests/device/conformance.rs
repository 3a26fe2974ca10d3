//! The laws of every defense on the device, but for that of finite differences, which needs double precision. A share of
//! them is a test, so that several run at once.

use anyhow::{Result, ensure};
use titer_core::testing::{Fixture, check_defense};
use titer_core::{DefenseEntry, ModelEntry, registry};
use titer_tests as _;

use crate::standin::device;

/// How many tests share the defenses whose step takes few passes.
const SHARES: usize = 3;
/// More passes are many.
const MANY: f64 = 8.;

/// Whether a step of the defense takes many passes.
fn is_long(entry: &DefenseEntry) -> bool {
    (entry.passes)(&(entry.settings.defaults)()) > MANY
}

/// Some defenses, each on a Llama.
fn check(entries: impl Iterator<Item = &'static DefenseEntry>) -> Result<()> {
    let fixture = Fixture::small(registry::find::<ModelEntry>("llama")?)?.on(device()?);
    let mut failed = Vec::new();
    for entry in entries {
        for check in check_defense(entry, &fixture) {
            println!("{}: {check}", entry.name);
            if check.outcome.failed() {
                failed.push(format!("{}: {check}", entry.name));
            }
        }
    }
    ensure!(failed.is_empty(), "\n{}", failed.join("\n"));
    Ok(())
}

fn check_share(index: usize) -> Result<()> {
    let entries = registry::all::<DefenseEntry>()?;
    check(entries.into_iter().filter(|entry| !is_long(entry)).skip(index).step_by(SHARES))
}

#[test]
#[ignore = "needs a device: see .ci/device"]
fn long_steps() -> Result<()> {
    check(registry::all::<DefenseEntry>()?.into_iter().filter(|entry| is_long(entry)))
}

#[test]
#[ignore = "needs a device: see .ci/device"]
fn short_steps_1() -> Result<()> {
    check_share(0)
}

#[test]
#[ignore = "needs a device: see .ci/device"]
fn short_steps_2() -> Result<()> {
    check_share(1)
}

#[test]
#[ignore = "needs a device: see .ci/device"]
fn short_steps_3() -> Result<()> {
    check_share(2)
}
