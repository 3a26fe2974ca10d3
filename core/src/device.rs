//! The only place that knows about devices: parsing `auto|cpu|cuda[:N]` and element types, and a device's memory.

use std::fmt;
use std::sync::Once;

use candle_core::{DType, Device};

use crate::error::{Error, Result};
use crate::weights::precision::Precision;

/// A device that can be used, as far as that can be told without opening it. To open a GPU takes a part of its memory, and
/// where it is set to serve one process at a time, no other can open it then.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The host.
    Cpu,
    /// A GPU.
    Cuda {
        /// Its number.
        index: usize,
        /// Its compute capability, such as 9.0.
        capability: (i32, i32),
    },
}

impl DeviceChoice {
    /// The device that `name` asks for: `cpu`, `cuda`, `cuda:N`, or `auto`, which takes the first CUDA device, and the CPU
    /// if there is none that can be used, as far as the driver tells. A device that is there and cannot be used is warned of.
    /// One that turns out later not to open is an error.
    ///
    /// # Errors
    /// The name is malformed, or the device cannot be used.
    pub fn of(name: &str) -> Result<Self> {
        match name {
            "cpu" => Ok(Self::Cpu),
            "auto" => Ok(Self::cuda(0).unwrap_or_else(|error| {
                static TOLD: Once = Once::new();
                if cuda::is_present() {
                    let told = error.to_string().replace("\n  ", "; ");
                    TOLD.call_once(|| tracing::warn!("there is a GPU, but the CPU is used: {told}"));
                }
                Self::Cpu
            })),
            "cuda" => Self::cuda(0),
            _ => {
                let index = name.strip_prefix("cuda:").and_then(|index| index.parse().ok());
                Self::cuda(index.ok_or_else(|| {
                    let message = format!("unknown device `{name}`");
                    Error::config(message).key("device").help("use auto, cpu, cuda or cuda:N")
                })?)
            }
        }
    }

    fn cuda(index: usize) -> Result<Self> {
        let capability = cuda::find(index).map_err(|error| error.at("device", format!("cuda:{index}")))?;
        Ok(Self::Cuda { index, capability })
    }

    /// Opens the device.
    ///
    /// # Errors
    /// It cannot be opened.
    pub fn open(self) -> Result<Device> {
        match self {
            Self::Cpu => Ok(Device::Cpu),
            Self::Cuda { index, .. } => cuda::open(index).map_err(|error| error.at("device", self.to_string())),
        }
    }

    /// Whether this is the host.
    pub fn is_cpu(self) -> bool {
        self == Self::Cpu
    }
}

/// A name for people: `cpu` or `cuda:0`.
impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda { index, .. } => write!(f, "cuda:{index}"),
        }
    }
}

/// The device that `name` asks for, opened: see [`DeviceChoice::of`].
///
/// # Errors
/// The name is malformed, or the device cannot be opened.
pub fn parse_device(name: &str) -> Result<Device> {
    DeviceChoice::of(name)?.open()
}

/// The GPUs of this machine by number, each with its name, compute capability and memory; none without a driver, or in a
/// build without CUDA.
pub fn gpus() -> Vec<String> {
    cuda::list()
}

/// The most bytes that tensors held at once on `device`, since it was opened or since [`restart_memory_peak`]: without
/// the driver's and cuBLAS's own. `None` for the host, whose allocator is the program's own.
pub fn memory_peak(device: &Device) -> Option<u64> {
    cuda::memory_peak(device)
}

/// Forgets what `device` held before.
pub fn restart_memory_peak(device: &Device) {
    cuda::restart_memory_peak(device);
}

#[cfg(feature = "cuda")]
use crate::tensor::cuda;

#[cfg(not(feature = "cuda"))]
mod cuda {
    use candle_core::Device;

    use crate::error::{Error, Result};

    fn missing<T>(index: usize) -> Result<T> {
        Err(Error::device(format!("cannot use `cuda:{index}`"))
            .help("this binary was built without CUDA: build it with `--features cuda`, or use --device cpu"))
    }

    pub(super) fn find(index: usize) -> Result<(i32, i32)> {
        missing(index)
    }

    pub(super) fn open(index: usize) -> Result<Device> {
        missing(index)
    }

    pub(super) fn is_present() -> bool {
        false
    }

    pub(super) fn list() -> Vec<String> {
        Vec::new()
    }

    pub(super) fn memory_peak(_: &Device) -> Option<u64> {
        None
    }

    pub(super) fn restart_memory_peak(_: &Device) {}
}

/// How the base is stored that `name` asks for: see [`Precision`].
///
/// # Errors
/// The name is unknown, or `device` cannot compute in that type.
pub fn parse_dtype(name: &str, device: &Device) -> Result<Precision> {
    parse_dtype_for(name, device.is_cpu())
}

/// As [`parse_dtype`], before a device is opened.
///
/// # Errors
/// As [`parse_dtype`].
pub fn parse_dtype_for(name: &str, cpu: bool) -> Result<Precision> {
    let precision = Precision::parse(name)?;
    if !cpu && precision == Precision::Plain(DType::F16) {
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
