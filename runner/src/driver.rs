//! Asks the CUDA driver for its version, without needing it at build time.

/// The version of CUDA that the installed driver supports, such as `12.8`; `None` without a driver.
#[expect(unsafe_code, reason = "a foreign function is called; nothing else here could go wrong")]
pub fn cuda_driver_version() -> Option<String> {
    // SAFETY: `libcuda.so.1` is the driver's own library, whose initialisers may run in any process, and
    // `cuDriverGetVersion` has had this signature since CUDA 2.2. It only writes to the pointer it is given.
    let version = unsafe {
        let library = libloading::Library::new("libcuda.so.1").ok()?;
        let get = library.get::<unsafe extern "C" fn(*mut i32) -> i32>(b"cuDriverGetVersion\0").ok()?;
        let mut version = 0;
        (get(&raw mut version) == 0).then_some(version)?
    };
    Some(format!("{}.{}", version / 1000, version % 1000 / 10))
}
