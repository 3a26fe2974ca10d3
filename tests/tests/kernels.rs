//! The device kernels, run on the host against plain double-precision references.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// The kernels are C++ but for a few keywords, so a C++ compiler can build them and threads can play a block.
#[test]
fn device_kernels_equal_their_references() -> Result<()> {
    let (folder, source) = (tempfile::tempdir()?, Path::new(env!("CARGO_MANIFEST_DIR")).join("cuda/emulate.cpp"));
    let program = folder.path().join("emulate");
    let compiled = Command::new("c++")
        .args(["-std=c++20", "-O1", "-pthread", "-o"])
        .args([&program, &source])
        .output()
        .context("cannot start `c++`: install a C++ compiler (g++ 11 or later)")?;
    ensure!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
    let ran = Command::new(program).output()?;
    let shown = String::from_utf8_lossy(&ran.stdout).into_owned();
    ensure!(ran.status.success(), "{shown}");
    // Every kernel of the source is on the list, in both types where it has two.
    let kernels = include_str!("../../core/src/tensor/cuda/kernels.cu");
    let typed = kernels.lines().filter_map(|line| line.strip_prefix("KERNEL(")?.split(',').next());
    for name in typed {
        for suffix in ["f32", "bf16"] {
            ensure!(shown.contains(&format!("{name}_{suffix} ")), "{name}_{suffix} is not tested:\n{shown}");
        }
    }
    Ok(())
}
