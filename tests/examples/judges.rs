//! Writes `docs/measurements/judges.md`:
//!
//!     cargo run --release -p titer-tests --example judges

use std::path::Path;

fn main() -> anyhow::Result<()> {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/measurements/judges.md");
    Ok(std::fs::write(page, titer_tests::judges::page()?)?)
}
