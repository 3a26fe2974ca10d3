//! The only place that knows about devices: parsing `auto|cpu|cuda[:N]` and element types.

use candle_core::{DType, Device};

use crate::{Error, Result};

/// The device that `name` asks for: `cpu`, `cuda`, `cuda:N`, or `auto`, which takes the first CUDA device that
/// works and the CPU otherwise.
///
/// # Errors
/// The name is malformed, or the device cannot be opened.
pub fn parse_device(name: &str) -> Result<Device> {
    match name {
        "cpu" => Ok(Device::Cpu),
        "auto" => Ok(open_cuda(0).unwrap_or(Device::Cpu)),
        "cuda" => open_cuda(0),
        _ => {
            let index = name.strip_prefix("cuda:").and_then(|index| index.parse().ok());
            open_cuda(index.ok_or_else(|| {
                Error::config(format!("unknown device `{name}`")).key("device").help("use auto, cpu, cuda or cuda:N")
            })?)
        }
    }
}

fn open_cuda(index: usize) -> Result<Device> {
    Device::new_cuda(index).map_err(|error| {
        let help = if cfg!(feature = "cuda") {
            "check the driver with `nvidia-smi`, or use --device cpu"
        } else {
            "this binary was built without CUDA: build it with `--features cuda`, or use --device cpu"
        };
        Error::device(format!("cannot open `cuda:{index}`")).source(error).help(help)
    })
}

/// The element type that `name` asks for.
///
/// # Errors
/// The name is unknown, or `device` cannot compute in that type.
pub fn parse_dtype(name: &str, device: &Device) -> Result<DType> {
    let dtype = match name {
        "f32" => DType::F32,
        "f16" => DType::F16,
        "bf16" => DType::BF16,
        _ => {
            return Err(Error::config(format!("unknown element type `{name}`"))
                .key("dtype")
                .help("use f32, f16 or bf16"));
        }
    };
    if device.is_cpu() && dtype != DType::F32 {
        return Err(Error::device(format!("`{name}` is not supported on the CPU"))
            .key("dtype")
            .help("use dtype = \"f32\" on the CPU, or a CUDA device"));
    }
    Ok(dtype)
}

/// A name for people: `cpu` or `cuda:0`.
pub fn device_name(device: &Device) -> String {
    match device.location() {
        candle_core::DeviceLocation::Cpu => "cpu".into(),
        candle_core::DeviceLocation::Cuda { gpu_id } => format!("cuda:{gpu_id}"),
        candle_core::DeviceLocation::Metal { gpu_id } => format!("metal:{gpu_id}"),
    }
}
