//! The driver's pool of memory, out of which all tensors of a device come.

use candle_core::Device;
use candle_core::cuda_backend::cudarc::driver::result::{device, mem_pool};
use candle_core::cuda_backend::cudarc::driver::sys::{CUmemPool_attribute as Attribute, CUmemoryPool};
use candle_core::cuda_backend::cudarc::driver::{DriverError, sys};

fn pool(of: &Device) -> Option<Result<CUmemoryPool, DriverError>> {
    let handle = of.as_cuda_device().ok()?.cuda_stream().context().cu_device();
    // SAFETY: the device is open.
    Some(unsafe { device::get_default_mem_pool(handle) })
}

fn set(device: &Device, attribute: sys::CUmemPool_attribute, mut value: u64) -> Result<(), DriverError> {
    // SAFETY: each attribute that is set here is a number of 64 bits.
    pool(device).map_or(Ok(()), |pool| unsafe { mem_pool::set_attribute(pool?, attribute, (&raw mut value).cast()) })
}

/// Lets the pool keep what is freed: by default it is given back at every wait, and mapped anew.
pub(super) fn keep_memory(device: &Device) -> Result<(), DriverError> {
    set(device, Attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD, u64::MAX)
}

/// The most bytes in use at once since the pool was made, or since [`restart_memory_peak`].
pub(crate) fn memory_peak(device: &Device) -> Option<u64> {
    let (pool, mut bytes) = (pool(device)?.ok()?, 0u64);
    // SAFETY: the attribute is a number of 64 bits.
    let read =
        unsafe { mem_pool::get_attribute(pool, Attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH, (&raw mut bytes).cast()) };
    read.ok().map(|()| bytes)
}

/// Counts the most bytes from now on.
pub(crate) fn restart_memory_peak(device: &Device) {
    // A driver that refuses leaves the peak too high, not too low.
    let _ = set(device, Attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH, 0);
}
