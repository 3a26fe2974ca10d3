//! The device of these tests, and runs of them on a stand-in that is told to differ.

use std::path::PathBuf;
use std::process::{Command, Output};

use anyhow::{Context, Result, ensure};
use candle_core::Device;
use titer_core::device::parse_device;

/// Names the device, if it is not the first one.
pub(crate) const DEVICE: &str = "TEST_DEVICE";

/// The device of a GPU, or of the stand-in.
pub(crate) fn device() -> Result<Device> {
    let name = variable(DEVICE);
    parse_device(name.as_deref().unwrap_or("cuda")).context("these tests need a device: run .ci/device")
}

/// What one test asks of another that it runs alone.
pub(crate) fn variable(name: &str) -> Option<String> {
    std::env::var_os(name)?.into_string().ok()
}

/// Where the stand-in's libraries lie.
pub(crate) fn standin_folder() -> Result<PathBuf> {
    let paths = std::env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
    let found = std::env::split_paths(&paths).find(|folder| folder.join("libcuda.so.1").exists());
    found.context("no libcuda.so.1 in LD_LIBRARY_PATH: run .ci/device")
}

/// Runs one of these tests in a process of its own, with these variables.
pub(crate) fn alone(test: &str, variables: &[(&str, &str)]) -> Result<Output> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["--exact", test, "--ignored", "--nocapture"]).envs(variables.iter().copied());
    let output = command.output()?;
    let said = String::from_utf8_lossy(&output.stdout);
    ensure!(said.contains("running 1 test"), "there is no test `{test}`: {said}");
    Ok(output)
}
