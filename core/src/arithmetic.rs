//! What decides the rounding of a result: see [`titer_kernels::arithmetic`]. [`identity`] is its name in the keys of
//! stages, so results of different arithmetic are never taken for one another.

use candle_core::Device;
use titer_kernels::arithmetic::VERSION;
pub use titer_kernels::arithmetic::{Arithmetic, Level, choose, chosen, limit};
use titer_kernels::gemm::instructions;

/// What decides the rounding on `device` if `arithmetic` is chosen: `portable/2`, `native/2 avx512+amx`,
/// `cuda/2 sm_90`.
pub fn identity(arithmetic: Arithmetic, device: &Device) -> String {
    if !device.is_cpu() {
        return format!("cuda/{VERSION} {}", compute_capability(device));
    }
    match arithmetic {
        Arithmetic::Portable => format!("portable/{VERSION}"),
        Arithmetic::Native => format!("native/{VERSION} {}", instructions()),
    }
}

#[cfg(feature = "cuda")]
fn compute_capability(device: &Device) -> String {
    use candle_core::cuda_backend::cudarc::driver::sys::CUdevice_attribute as Attribute;
    let attribute =
        |what| device.as_cuda_device().ok().and_then(|device| device.cuda_stream().context().attribute(what).ok());
    let major = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR);
    let minor = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
    match (major, minor) {
        (Some(major), Some(minor)) => format!("sm_{major}{minor}"),
        _ => "unknown".to_owned(),
    }
}

#[cfg(not(feature = "cuda"))]
fn compute_capability(_: &Device) -> String {
    "unknown".to_owned()
}
