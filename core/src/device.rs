//! The only place that knows about devices: parsing `auto|cpu|cuda[:N]` and element types.

use std::sync::Once;

use candle_core::{DType, Device};

use crate::error::{Error, Result};
use crate::weights::precision::Precision;

/// The device that `name` asks for: `cpu`, `cuda`, `cuda:N`, or `auto`, which takes the first CUDA device, and the CPU if
/// there is none that works. A device that is there and does not work is warned of.
///
/// # Errors
/// The name is malformed, or the device cannot be opened.
pub fn parse_device(name: &str) -> Result<Device> {
    match name {
        "cpu" => Ok(Device::Cpu),
        "auto" => Ok(open_cuda(0).unwrap_or_else(|error| {
            static TOLD: Once = Once::new();
            if is_present() {
                let told = error.to_string().replace("\n  ", "; ");
                TOLD.call_once(|| tracing::warn!("there is a GPU, but the CPU is used: {told}"));
            }
            Device::Cpu
        })),
        "cuda" => open_cuda(0),
        _ => {
            let index = name.strip_prefix("cuda:").and_then(|index| index.parse().ok());
            open_cuda(index.ok_or_else(|| {
                Error::config(format!("unknown device `{name}`")).key("device").help("use auto, cpu, cuda or cuda:N")
            })?)
        }
    }
}

#[cfg(feature = "cuda")]
fn open_cuda(index: usize) -> Result<Device> {
    crate::tensor::cuda::open(index).map_err(|error| error.at("device", format!("cuda:{index}")))
}

#[cfg(not(feature = "cuda"))]
fn open_cuda(index: usize) -> Result<Device> {
    Err(Error::device(format!("cannot open `cuda:{index}`"))
        .help("this binary was built without CUDA: build it with `--features cuda`, or use --device cpu"))
}

#[cfg(feature = "cuda")]
use crate::tensor::cuda::is_present;

#[cfg(not(feature = "cuda"))]
fn is_present() -> bool {
    false
}

/// How the base is stored that `name` asks for: see [`Precision`].
///
/// # Errors
/// The name is unknown, or `device` cannot compute in that type.
pub fn parse_dtype(name: &str, device: &Device) -> Result<Precision> {
    let precision = Precision::parse(name)?;
    if !device.is_cpu() && precision == Precision::Plain(DType::F16) {
        return Err(Error::device("`f16` has no kernels on CUDA devices")
            .key("dtype")
            .help("use dtype = \"bf16\", or the CPU"));
    }
    Ok(precision)
}

/// A name for people: `cpu` or `cuda:0`.
pub fn device_name(device: &Device) -> String {
    match device.location() {
        candle_core::DeviceLocation::Cpu => "cpu".into(),
        candle_core::DeviceLocation::Cuda { gpu_id } => format!("cuda:{gpu_id}"),
        candle_core::DeviceLocation::Metal { gpu_id } => format!("metal:{gpu_id}"),
    }
}
