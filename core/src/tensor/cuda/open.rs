//! Opens a device: one stream, the pool of memory, and a test that kernels run.

use std::collections::BTreeMap;
use std::ffi::CStr;
use std::sync::{Mutex, PoisonError};

use candle_core::cuda_backend::cudarc::cublas::sys as blas;
use candle_core::cuda_backend::cudarc::driver::result::{device as driver_device, mem_pool};
use candle_core::cuda_backend::cudarc::driver::{DriverError, result, sys};
use candle_core::{DType, Device, Tensor};

use super::operators::add_assign;
use crate::error::{Error, Result};

/// The oldest generation of GPUs that the kernels run on, as compute capability: bf16 exists since then.
const CAPABILITY: (i32, i32) = (8, 0);
/// The oldest driver, as the version of CUDA that it supports.
const DRIVER: i32 = 12_000;

/// Whether there is a driver with a device.
pub(crate) fn is_present() -> bool {
    result::init().is_ok() && driver_device::get_count().is_ok_and(|count| count > 0)
}

/// Device `index`, on a stream of its own: whatever is queued runs in that order, whichever thread queued it, so nothing
/// has to be waited for. A process opens a device once, since another stream would not wait for this one.
pub(crate) fn open(index: usize) -> Result<Device> {
    static OPENED: Mutex<BTreeMap<usize, Device>> = Mutex::new(BTreeMap::new());
    let mut opened = OPENED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(device) = opened.get(&index) {
        return Ok(device.clone());
    }
    let device = open_anew(index)?;
    opened.insert(index, device.clone());
    Ok(device)
}

fn open_anew(index: usize) -> Result<Device> {
    result::init().map_err(|error| failed(error, DRIVER_HELP))?;
    let ordinal = i32::try_from(index).unwrap_or(i32::MAX);
    let handle = driver_device::get(ordinal).map_err(|error| failed(error, "`titer doctor` lists the devices"))?;
    check_driver()?;
    check_capability(handle)?;
    let device = Device::new_cuda_with_stream(index).map_err(|error| {
        let library = missing_library(&error);
        let error = Error::device("the CUDA libraries cannot be used").source(error);
        match library {
            Some(text) => error.at("library", text).help(LIBRARY_HELP),
            None => error.help(DRIVER_HELP),
        }
    })?;
    // SAFETY: there is one stream, so no event is needed to order what tensors are used for.
    unsafe { device.as_cuda_device()?.disable_event_tracking() };
    keep_memory(handle).map_err(|error| failed(error, DRIVER_HELP))?;
    self_test(&device).map_err(|error| {
        let help = "the kernels do not run on this GPU with this driver: update the driver, or use --device cpu";
        Error::device("the first kernels failed").source(error).help(help)
    })?;
    Ok(device)
}

const DRIVER_HELP: &str = "check the driver with `nvidia-smi`, or use --device cpu";
const LIBRARY_HELP: &str = "install the CUDA libraries (`pip install nvidia-cublas-cu12 nvidia-curand-cu12`), or name their \
                            folder in LD_LIBRARY_PATH, or free the GPU's memory if it is full, or use --device cpu";

fn failed(error: DriverError, help: &str) -> Error {
    Error::device("the CUDA driver refuses").source(error).help(help)
}

/// Fails unless the driver knows everything that the program asks for.
fn check_driver() -> Result<()> {
    let mut version = 0;
    // SAFETY: a place for the version.
    unsafe { sys::cuDriverGetVersion(&raw mut version) }.result().map_err(|error| failed(error, DRIVER_HELP))?;
    if version >= DRIVER {
        return Ok(());
    }
    let found = format!("{}.{}", version / 1000, version % 1000 / 10);
    Err(Error::device(format!("the driver is too old: it supports CUDA {found}, and 12.0 is needed"))
        .help("install driver 525 or newer, or use --device cpu"))
}

/// Fails unless the kernels are made for this generation of GPUs.
fn check_capability(handle: sys::CUdevice) -> Result<()> {
    use sys::CUdevice_attribute::{
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR as MAJOR, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR as MINOR,
    };
    // SAFETY: a device of the driver.
    let read = |attribute| unsafe { driver_device::get_attribute(handle, attribute) };
    let found = (|| Ok((read(MAJOR)?, read(MINOR)?)))().map_err(|error| failed(error, DRIVER_HELP))?;
    if found >= CAPABILITY {
        return Ok(());
    }
    let [(major, minor), (least, part)] = [found, CAPABILITY];
    Err(Error::device(format!("the GPU has compute capability {major}.{minor}, and {least}.{part} is needed"))
        .help("use a GPU of the generation Ampere (A100, RTX 30) or newer, or use --device cpu"))
}

/// What the loader says of a library that `error` may come from.
fn missing_library(error: &candle_core::Error) -> Option<String> {
    let text = error.to_string();
    if text.contains("CURAND_STATUS") {
        return Some("libcurand.so.10".to_owned());
    }
    if !text.contains("NOT_INITIALIZED") {
        return None;
    }
    // SAFETY: the text is constant.
    let text = unsafe {
        let text = blas::cublasGetStatusString(blas::cublasStatus_t::CUBLAS_STATUS_NOT_INITIALIZED);
        if text.is_null() {
            return None;
        }
        CStr::from_ptr(text)
    };
    Some(text.to_string_lossy().into_owned())
}

/// Lets the driver's pool keep what is freed: by default it is given back at every wait, and mapped anew.
fn keep_memory(handle: sys::CUdevice) -> Result<(), DriverError> {
    let mut all = u64::MAX;
    // SAFETY: the attribute is a number of 64 bits.
    unsafe {
        let pool = driver_device::get_default_mem_pool(handle)?;
        let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        mem_pool::set_attribute(pool, attribute, (&raw mut all).cast())
    }
}

/// Fails unless a kernel of Titer and one of candle give the right numbers.
fn self_test(device: &Device) -> Result<()> {
    let x = Tensor::new(&[1f32, -2., 3.], device)?;
    add_assign(&x, &Tensor::new(&[0.5f32, 0.5, 0.5], device)?)?;
    let found = x.affine(2., 1.)?.to_dtype(DType::BF16)?.to_dtype(DType::F32)?.to_vec1::<f32>()?;
    if found == [4., -2., 8.] {
        return Ok(());
    }
    Err(Error::device(format!("the kernels compute {found:?} instead of [4, -2, 8]")))
}
