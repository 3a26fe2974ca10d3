//! Finds devices, and opens one: one stream, the pool of memory, and a test that kernels run.

use std::collections::BTreeMap;
use std::ffi::CStr;
use std::sync::{Mutex, PoisonError};

use candle_core::cuda_backend::cudarc::cublas::sys as blas;
use candle_core::cuda_backend::cudarc::curand::sys as random;
use candle_core::cuda_backend::cudarc::driver::result::device as driver_device;
use candle_core::cuda_backend::cudarc::driver::{DriverError, result, sys};
use candle_core::{DType, Device, Tensor};

use super::memory::keep_memory;
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

/// The compute capability of device `index`, if it can be used. It is not opened.
pub(crate) fn find(index: usize) -> Result<(i32, i32)> {
    result::init().map_err(|error| failed(error, DRIVER_HELP))?;
    let handle = handle(index).map_err(|error| failed(error, "`titer doctor` lists the devices"))?;
    check_driver()?;
    let found = capability(handle).map_err(|error| failed(error, DRIVER_HELP))?;
    if found < CAPABILITY {
        let [(major, minor), (least, part)] = [found, CAPABILITY];
        return Err(Error::device(format!(
            "the GPU has compute capability {major}.{minor}, and {least}.{part} is needed"
        ))
        .help("use a GPU of the generation Ampere (A100, RTX 30) or newer, or use --device cpu"));
    }
    check_libraries()?;
    Ok(found)
}

fn handle(index: usize) -> Result<sys::CUdevice, DriverError> {
    driver_device::get(i32::try_from(index).unwrap_or(i32::MAX))
}

fn open_anew(index: usize) -> Result<Device> {
    find(index)?;
    let device = Device::new_cuda_with_stream(index).map_err(|error| {
        Error::device("the GPU cannot be opened").source(error).help(
            "another process may hold all of its memory, or the GPU itself: `nvidia-smi` tells; or use --device cpu",
        )
    })?;
    // SAFETY: there is one stream, so no event is needed to order what tensors are used for.
    unsafe { device.as_cuda_device()?.disable_event_tracking() };
    keep_memory(&device).map_err(|error| failed(error, DRIVER_HELP))?;
    self_test(&device).map_err(|error| {
        let help = "the kernels do not run on this GPU with this driver: update the driver, or use --device cpu";
        Error::device("the first kernels failed").source(error).help(help)
    })?;
    Ok(device)
}

const DRIVER_HELP: &str = "check the driver with `nvidia-smi`, or use --device cpu";
const LIBRARY_HELP: &str = "install the CUDA libraries (`pip install nvidia-cublas-cu12 nvidia-curand-cu12`), or name their \
                            folder in LD_LIBRARY_PATH, or use --device cpu";

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

fn capability(handle: sys::CUdevice) -> Result<(i32, i32), DriverError> {
    use sys::CUdevice_attribute::{
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR as MAJOR, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR as MINOR,
    };
    // SAFETY: a device of the driver.
    let read = |attribute| unsafe { driver_device::get_attribute(handle, attribute) };
    Ok((read(MAJOR)?, read(MINOR)?))
}

/// Fails unless cuBLAS and cuRAND, which candle opens a device with, can be loaded.
fn check_libraries() -> Result<()> {
    let mut version = 0;
    // SAFETY: a place for the version; without the library, the call answers an error.
    let status = unsafe { blas::cublasGetProperty(blas::libraryPropertyType::MAJOR_VERSION, &raw mut version) };
    if status != blas::cublasStatus_t::CUBLAS_STATUS_SUCCESS {
        // SAFETY: the text is constant. Without the library, it is what the loader says.
        let text = unsafe { CStr::from_ptr(blas::cublasGetStatusString(status)) };
        return Err(missing("cuBLAS", &text.to_string_lossy()));
    }
    // SAFETY: as above.
    let status = unsafe { random::curandGetVersion(&raw mut version) };
    if status != random::curandStatus_t::CURAND_STATUS_SUCCESS {
        return Err(missing("cuRAND", "libcurand.so.10"));
    }
    Ok(())
}

fn missing(library: &str, text: &str) -> Error {
    Error::device(format!("{library} cannot be loaded")).at("library", text).help(LIBRARY_HELP)
}

/// The devices by number, each with its name, compute capability and memory.
pub(crate) fn list() -> Vec<String> {
    let count = result::init().and_then(|()| driver_device::get_count()).unwrap_or(0);
    let describe = |index: i32| -> Result<String, DriverError> {
        let handle = driver_device::get(index)?;
        let (name, (major, minor)) = (driver_device::get_name(handle)?, capability(handle)?);
        // SAFETY: a device of the driver.
        let bytes = unsafe { driver_device::total_mem(handle)? };
        Ok(format!("cuda:{index} {name}, compute capability {major}.{minor}, {} MiB", bytes >> 20))
    };
    (0..count)
        .map(|index| describe(index).unwrap_or_else(|error| format!("cuda:{index} does not answer: {error}")))
        .collect()
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
