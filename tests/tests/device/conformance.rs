//! The laws of every defense on the device, but for that of finite differences, which needs double precision. A quarter of them
//! is a test, so that several run at once.

use anyhow::{Result, ensure};
use titer_core::testing::{Fixture, check_defense};
use titer_core::{DefenseEntry, ModelEntry, registry};
use titer_tests as _;

use crate::standin::device;

/// How many tests share the defenses.
const SHARES: usize = 4;

/// The defenses of one share, each on a Llama.
fn check_share(index: usize) -> Result<()> {
    let fixture = Fixture::small(registry::find::<ModelEntry>("llama")?)?.on(device()?);
    let mut failed = Vec::new();
    for entry in registry::all::<DefenseEntry>()?.into_iter().skip(index).step_by(SHARES) {
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

#[test]
#[ignore = "needs a device: see .ci/device"]
fn first_quarter() -> Result<()> {
    check_share(0)
}

#[test]
#[ignore = "needs a device: see .ci/device"]
fn second_quarter() -> Result<()> {
    check_share(1)
}

#[test]
#[ignore = "needs a device: see .ci/device"]
fn third_quarter() -> Result<()> {
    check_share(2)
}

#[test]
#[ignore = "needs a device: see .ci/device"]
fn fourth_quarter() -> Result<()> {
    check_share(3)
}
