//! What decides the rounding of a result: see [`titer_kernels::arithmetic`]. [`identity`] is its name in the keys of
//! stages, so results of different arithmetic are never taken for one another.

use titer_kernels::arithmetic::VERSION;
pub use titer_kernels::arithmetic::{Arithmetic, Level, choose, chosen, limit};
use titer_kernels::gemm::instructions;

use crate::device::DeviceChoice;

/// The version of the device's kernels, to be raised with any change of a bit.
const CUDA_VERSION: u32 = 5;

/// What decides the rounding on `device` if `arithmetic` is chosen: `portable/4`, `native/4 avx512+amx bf16 int8`,
/// `cuda/5 sm_90`. `bf16` says that the tile unit multiplies weights in bf16 as they are stored, `int8` that answers with
/// quantized weights are computed from activations rounded to 8 bits.
pub fn identity(arithmetic: Arithmetic, device: DeviceChoice) -> String {
    if let DeviceChoice::Cuda { capability: (major, minor), .. } = device {
        return format!("cuda/{CUDA_VERSION} sm_{major}{minor}");
    }
    match arithmetic {
        Arithmetic::Portable => format!("portable/{VERSION}"),
        Arithmetic::Native => format!("native/{VERSION} {} int8", instructions()),
    }
}
