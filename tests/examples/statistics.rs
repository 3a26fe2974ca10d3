//! Writes how often the rule for differences errs into docs/measurements/statistics.md:
//!
//!     cargo run --release -p titer-tests --example statistics

use std::path::Path;

use titer_tests::simulation;

/// Experiments for each figure.
const COUNT: usize = 1000;

fn main() -> std::io::Result<()> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/measurements/statistics.md");
    std::fs::write(path, simulation::page(COUNT))
}
