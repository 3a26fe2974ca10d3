//! The device of these tests.

use anyhow::{Context, Result};
use candle_core::Device;

/// The first device: a GPU, or the stand-in.
pub(crate) fn device() -> Result<Device> {
    titer_core::device::parse_device("cuda").context("these tests need a device: run .ci/device")
}
