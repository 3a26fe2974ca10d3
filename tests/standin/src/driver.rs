//! The functions of the CUDA driver that candle and cudarc call.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::{Arc, MutexGuard};

use crate::decode::decode;
use crate::device::code::*;
use crate::device::{CONTEXT, Capture, Device, Event, Kernel, Loaded, Op, device, stream_of};
use crate::memory::Kind;
use crate::ptx::Module;
use crate::report::count;
use crate::vm::Dropped;

/// The context of device 0; that of the next device is one more.
const FIRST_CONTEXT: u64 = 0xc0de_0000;
const DEFAULT_POOL: u64 = 0x9001;
/// Shared memory that a block has without asking.
const USUAL_SHARED: usize = 48 << 10;

/// Counts a call and gives the device.
fn called(name: &str) -> MutexGuard<'static, Device> {
    let mut device = device();
    count(&mut device.counts.calls, name);
    device
}

/// The same, for a call that needs a current context.
fn current(name: &str) -> Result<MutexGuard<'static, Device>, c_int> {
    let mut device = called(name);
    if CONTEXT.get() == 0 {
        device.finding(&format!("{name} on a thread without a current context"));
        return Err(INVALID_CONTEXT);
    }
    Ok(device)
}

/// The same, for a call on a stream: only the default streams are those of the current context.
fn current_of(name: &str, stream: u64) -> Result<MutexGuard<'static, Device>, c_int> {
    if stream > 2 { Ok(called(name)) } else { current(name) }
}

/// Writes what a function gives back.
///
/// # Safety
///
/// The pointer is null, or can be written.
unsafe fn give<T>(to: *mut T, value: T) -> c_int {
    if to.is_null() {
        return INVALID_VALUE;
    }
    // SAFETY: promised by the caller.
    unsafe { to.write(value) };
    OK
}

/// Functions of the driver are what its documentation says; pointers must be valid as there.
macro_rules! functions {
    ($($(#[$doc:meta])* fn $name:ident($($argument:ident: $ty:ty),* $(,)?) $body:block)*) => { $(
        $(#[$doc])*
        ///
        /// # Safety
        ///
        /// As the driver documents the function of this name.
        #[unsafe(no_mangle)]
        #[allow(non_snake_case, reason = "the driver's name")]
        pub unsafe extern "C" fn $name($($argument: $ty),*) -> c_int {
            // SAFETY: pointers are read and written as the driver documents it.
            #[allow(unused_unsafe, reason = "some take no pointers")]
            let body = || -> Result<c_int, c_int> { unsafe { $body } };
            body().unwrap_or_else(|error| error)
        }
    )* };
}

functions! {
    /// Starts the driver.
    fn cuInit(_flags: c_uint) {
        let device = called("cuInit");
        Ok(if device.settings.devices == 0 { NO_DEVICE } else { OK })
    }

    /// The driver's version.
    fn cuDriverGetVersion(version: *mut c_int) { Ok(give(version, called("cuDriverGetVersion").settings.driver as c_int)) }

    /// How many devices there are.
    fn cuDeviceGetCount(devices: *mut c_int) { Ok(give(devices, called("cuDeviceGetCount").settings.devices as c_int)) }

    /// A device by its number.
    fn cuDeviceGet(found: *mut c_int, ordinal: c_int) {
        let device = called("cuDeviceGet");
        if !(0..device.settings.devices as c_int).contains(&ordinal) {
            return Err(INVALID_DEVICE);
        }
        Ok(give(found, ordinal))
    }

    /// A device's name.
    fn cuDeviceGetName(name: *mut c_char, len: c_int, _device: c_int) {
        let device = called("cuDeviceGetName");
        let text = format!("CUDA stand-in {}.{}", device.settings.capability / 10, device.settings.capability % 10);
        let count = text.len().min((len.max(1) - 1) as usize);
        std::ptr::copy_nonoverlapping(text.as_ptr(), name.cast(), count);
        Ok(give(name.add(count), 0))
    }

    /// A device's identity.
    fn cuDeviceGetUuid_v2(uuid: *mut [u8; 16], device: c_int) {
        drop(called("cuDeviceGetUuid_v2"));
        Ok(give(uuid, [0x5d, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, device as u8]))
    }

    /// A device's identity.
    fn cuDeviceGetUuid(uuid: *mut [u8; 16], device: c_int) { Ok(cuDeviceGetUuid_v2(uuid, device)) }

    /// A device's memory.
    fn cuDeviceTotalMem_v2(bytes: *mut usize, _device: c_int) { Ok(give(bytes, called("cuDeviceTotalMem_v2").memory.limit)) }

    /// Memory that is free, and all of it.
    fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) {
        let device = current("cuMemGetInfo_v2")?;
        give(free, device.memory.limit - device.memory.in_use);
        Ok(give(total, device.memory.limit))
    }

    /// A number that describes a device.
    fn cuDeviceGetAttribute(value: *mut c_int, attribute: c_int, _device: c_int) {
        let device = called("cuDeviceGetAttribute");
        let capability = device.settings.capability as c_int;
        let most_shared = device.settings.most_shared() as c_int;
        Ok(give(value, match attribute {
            1..=3 => 1024,              // threads of a block, and along x and y
            4 => 64,                    // along z
            5 => c_int::MAX,            // blocks along x
            6 | 7 => 65535,             // along y and z
            8 => USUAL_SHARED as c_int,
            10 => 32,                   // lanes
            12 | 82 => 65536,           // registers of a block, of a multiprocessor
            16 => 132,                  // multiprocessors
            39 => 2048,                 // threads of one
            41 | 83 | 115 => 1,         // one address space, managed memory, pools of memory
            75 => capability / 10,
            76 => capability % 10,
            81 => most_shared + 1024,   // shared memory of a multiprocessor
            97 => most_shared,          // that a block may ask for
            106 => 32,                  // blocks of a multiprocessor
            _ => 0,
        }))
    }

    /// The context of a device.
    fn cuDevicePrimaryCtxRetain(context: *mut u64, device: c_int) {
        if !called("cuDevicePrimaryCtxRetain").lock_for_this_process() {
            return Ok(UNAVAILABLE);
        }
        Ok(give(context, FIRST_CONTEXT + device as u64))
    }

    /// Gives up a device's context.
    fn cuDevicePrimaryCtxRelease_v2(_device: c_int) {
        drop(called("cuDevicePrimaryCtxRelease_v2"));
        Ok(OK)
    }

    /// The context that is current on this thread.
    fn cuCtxGetCurrent(context: *mut u64) {
        drop(called("cuCtxGetCurrent"));
        Ok(give(context, CONTEXT.get()))
    }

    /// Makes a context current on this thread.
    fn cuCtxSetCurrent(context: u64) {
        let device = called("cuCtxSetCurrent");
        if context != 0 && !(FIRST_CONTEXT..FIRST_CONTEXT + u64::from(device.settings.devices)).contains(&context) {
            return Err(INVALID_CONTEXT);
        }
        CONTEXT.set(context);
        Ok(OK)
    }

    /// The device whose context is current.
    fn cuCtxGetDevice(found: *mut c_int) {
        drop(current("cuCtxGetDevice")?);
        Ok(give(found, (CONTEXT.get() - FIRST_CONTEXT) as c_int))
    }

    /// Waits for everything.
    fn cuCtxSynchronize() {
        let mut device = current("cuCtxSynchronize")?;
        if let Some(error) = device.forbidden("cuCtxSynchronize", None) {
            return Err(error);
        }
        let streams: Vec<u64> = device.streams.keys().copied().collect();
        streams.into_iter().for_each(|stream| device.wait(stream, u64::MAX));
        Ok(device.sticky)
    }

    /// The highest and lowest priority of streams.
    fn cuCtxGetStreamPriorityRange(least: *mut c_int, greatest: *mut c_int) {
        drop(current("cuCtxGetStreamPriorityRange")?);
        give(least, 0);
        Ok(give(greatest, 0))
    }

    /// A new stream.
    fn cuStreamCreate(stream: *mut u64, _flags: c_uint) {
        let mut device = current("cuStreamCreate")?;
        let handle = device.handle();
        device.streams.entry(handle).or_default();
        Ok(give(stream, handle))
    }

    /// A new stream.
    fn cuStreamCreateWithPriority(stream: *mut u64, flags: c_uint, _priority: c_int) { Ok(cuStreamCreate(stream, flags)) }

    /// Ends a stream once it has done everything.
    fn cuStreamDestroy_v2(stream: u64) {
        let mut device = current("cuStreamDestroy_v2")?;
        device.drain(stream, u64::MAX);
        Ok(if device.streams.contains_key(&stream) { OK } else { INVALID_HANDLE })
    }

    /// Waits for a stream.
    fn cuStreamSynchronize(stream: u64) {
        let mut device = current("cuStreamSynchronize")?;
        let stream = stream_of(stream);
        if let Some(error) = device.forbidden("cuStreamSynchronize", Some(stream)) {
            return Err(error);
        }
        device.wait(stream, u64::MAX);
        Ok(device.sticky)
    }

    /// Whether a stream has done everything.
    fn cuStreamQuery(stream: u64) {
        let mut device = current("cuStreamQuery")?;
        let stream = stream_of(stream);
        if let Some(error) = device.forbidden("cuStreamQuery", Some(stream)) {
            return Err(error);
        }
        // The program may ask until it is: each question lets the device go on.
        let idle = device.idle(stream, u64::MAX);
        device.drain(stream, u64::MAX);
        Ok(if device.sticky == OK && !idle { NOT_READY } else { device.sticky })
    }

    /// Lets a stream wait until another has come to an event.
    fn cuStreamWaitEvent(stream: u64, event: u64, _flags: c_uint) {
        let mut device = current("cuStreamWaitEvent")?;
        let found = *device.events.get(&event).ok_or(INVALID_HANDLE)?;
        let stream = stream_of(stream);
        if found.captured {
            // The stream takes part in the capture of the other one.
            if stream != found.stream && device.capturing(stream).is_none() {
                device.streams.entry(stream).or_default().joined = Some(found.stream);
            }
            return Ok(OK);
        }
        Ok(if found.stream == stream { device.sticky } else { device.push(stream, Op::Wait { stream: found.stream, done: found.at }) })
    }

    /// From here on a stream collects what it is given, instead of doing it.
    fn cuStreamBeginCapture_v2(stream: u64, _mode: c_uint) {
        let mut device = current("cuStreamBeginCapture_v2")?;
        let stream = stream_of(stream);
        if stream == 0 {
            return Err(CAPTURE_UNSUPPORTED);
        }
        if device.capturing(stream).is_some() {
            return Err(ILLEGAL_STATE);
        }
        device.streams.entry(stream).or_default().capture = Some(Capture::default());
        Ok(OK)
    }

    /// The graph of what a stream has collected.
    fn cuStreamEndCapture(stream: u64, graph: *mut u64) {
        let mut device = current("cuStreamEndCapture")?;
        let stream = stream_of(stream);
        let capture = device.streams.get_mut(&stream).and_then(|stream| stream.capture.take()).ok_or(ILLEGAL_STATE)?;
        device.streams.values_mut().filter(|other| other.joined == Some(stream)).for_each(|other| other.joined = None);
        if capture.invalid {
            give(graph, 0);
            return Err(CAPTURE_INVALIDATED);
        }
        let handle = device.handle();
        device.graphs.insert(handle, capture.ops);
        Ok(give(graph, handle))
    }

    /// Whether a stream collects: 0 for no, 1 for yes, 2 for a capture that is lost.
    fn cuStreamIsCapturing(stream: u64, status: *mut c_uint) {
        let device = current("cuStreamIsCapturing")?;
        let capture = device.capturing(stream_of(stream)).and_then(|origin| device.streams.get(&origin)?.capture.as_ref());
        Ok(give(status, capture.map_or(0, |capture| if capture.invalid { 2 } else { 1 })))
    }

    /// What a thread may do while a stream captures; the strictest mode is always taken.
    fn cuThreadExchangeStreamCaptureMode(_mode: *mut c_uint) {
        drop(called("cuThreadExchangeStreamCaptureMode"));
        Ok(OK)
    }

    /// Makes a graph ready to launch.
    fn cuGraphInstantiateWithFlags(executable: *mut u64, graph: u64, _flags: u64) {
        let mut device = current("cuGraphInstantiateWithFlags")?;
        let ops = device.graphs.get(&graph).cloned().ok_or(INVALID_HANDLE)?;
        let handle = device.handle();
        device.graphs.insert(handle, ops);
        Ok(give(executable, handle))
    }

    /// Puts a graph onto the device ahead of its launch.
    fn cuGraphUpload(executable: u64, _stream: u64) {
        let device = current("cuGraphUpload")?;
        Ok(if device.graphs.contains_key(&executable) { OK } else { INVALID_HANDLE })
    }

    /// Gives a stream all that a graph holds.
    fn cuGraphLaunch(executable: u64, stream: u64) {
        let mut device = current("cuGraphLaunch")?;
        let ops = device.graphs.get(&executable).cloned().ok_or(INVALID_HANDLE)?;
        let stream = stream_of(stream);
        for op in ops {
            device.push(stream, op);
        }
        Ok(device.sticky)
    }

    /// Ends a graph.
    fn cuGraphDestroy(graph: u64) {
        let mut device = current("cuGraphDestroy")?;
        Ok(if device.graphs.remove(&graph).is_some() { OK } else { INVALID_HANDLE })
    }

    /// Ends a graph that could be launched.
    fn cuGraphExecDestroy(executable: u64) {
        let mut device = current("cuGraphExecDestroy")?;
        Ok(if device.graphs.remove(&executable).is_some() { OK } else { INVALID_HANDLE })
    }

    /// A new event.
    fn cuEventCreate(event: *mut u64, _flags: c_uint) {
        let mut device = current("cuEventCreate")?;
        let handle = device.handle();
        device.events.insert(handle, Event::default());
        Ok(give(event, handle))
    }

    /// Ends an event.
    fn cuEventDestroy_v2(event: u64) {
        let mut device = called("cuEventDestroy_v2");
        Ok(if device.events.remove(&event).is_some() { OK } else { INVALID_HANDLE })
    }

    /// The event happens when the stream has come here.
    fn cuEventRecord(event: u64, stream: u64) {
        let mut device = current("cuEventRecord")?;
        if !device.events.contains_key(&event) {
            return Err(INVALID_HANDLE);
        }
        let stream = stream_of(stream);
        let origin = device.capturing(stream);
        let at = device.streams.entry(stream).or_default().queued;
        let recorded = Event { stream: origin.unwrap_or(stream), at, captured: origin.is_some() };
        device.events.insert(event, recorded);
        Ok(device.sticky)
    }

    /// Waits for an event.
    fn cuEventSynchronize(event: u64) {
        let mut device = current("cuEventSynchronize")?;
        let found = *device.events.get(&event).ok_or(INVALID_HANDLE)?;
        if found.captured {
            device.forbidden("cuEventSynchronize", Some(found.stream));
            return Err(CAPTURED_EVENT);
        }
        device.wait(found.stream, found.at);
        Ok(device.sticky)
    }

    /// Whether an event has happened.
    fn cuEventQuery(event: u64) {
        let mut device = current("cuEventQuery")?;
        let found = *device.events.get(&event).ok_or(INVALID_HANDLE)?;
        if found.captured {
            device.forbidden("cuEventQuery", Some(found.stream));
            return Err(CAPTURED_EVENT);
        }
        let idle = device.idle(found.stream, found.at);
        device.drain(found.stream, found.at);
        Ok(if device.sticky == OK && !idle { NOT_READY } else { device.sticky })
    }

    /// Milliseconds between two events; the stand-in has no time.
    fn cuEventElapsedTime(milliseconds: *mut f32, _start: u64, _end: u64) {
        drop(current("cuEventElapsedTime")?);
        Ok(give(milliseconds, 0.0))
    }

    /// Milliseconds between two events; the stand-in has no time.
    fn cuEventElapsedTime_v2(milliseconds: *mut f32, start: u64, end: u64) { Ok(cuEventElapsedTime(milliseconds, start, end)) }

    /// Memory in the order of a stream.
    fn cuMemAllocAsync(pointer: *mut u64, bytes: usize, stream: u64) {
        let mut device = current_of("cuMemAllocAsync", stream)?;
        if device.sticky != OK {
            return Err(device.sticky);
        }
        if bytes == 0 {
            device.finding("cuMemAllocAsync of 0 bytes");
            return Ok(give(pointer, 0));
        }
        let base = device.allocate(bytes, stream_of(stream)).ok_or(OUT_OF_MEMORY)?;
        Ok(give(pointer, base))
    }

    /// Memory of a pool in the order of a stream.
    fn cuMemAllocFromPoolAsync(pointer: *mut u64, bytes: usize, _pool: u64, stream: u64) { Ok(cuMemAllocAsync(pointer, bytes, stream)) }

    /// Frees memory in the order of a stream.
    fn cuMemFreeAsync(pointer: u64, stream: u64) {
        let mut device = current_of("cuMemFreeAsync", stream)?;
        if pointer == 0 {
            device.finding("cuMemFreeAsync of a null pointer");
            return Ok(OK);
        }
        device.counts.frees += 1;
        let stream = stream_of(stream);
        let by = format!("cuMemFreeAsync on stream {stream:#x}");
        Ok(device.push(stream, Op::Free { base: pointer, by }))
    }

    /// Memory that is there at once.
    fn cuMemAlloc_v2(pointer: *mut u64, bytes: usize) {
        let mut device = current("cuMemAlloc_v2")?;
        if let Some(error) = device.forbidden("cuMemAlloc", None) {
            return Err(error);
        }
        if bytes == 0 {
            return Err(INVALID_VALUE);
        }
        device.counts.allocations += 1;
        let base = device.memory.allocate(bytes, Kind::Plain, 0).ok_or(OUT_OF_MEMORY)?;
        Ok(give(pointer, base))
    }

    /// Frees memory once everything is done.
    fn cuMemFree_v2(pointer: u64) {
        let mut device = current("cuMemFree_v2")?;
        if let Some(error) = device.forbidden("cuMemFree", None) {
            return Err(error);
        }
        device.drain_all();
        device.counts.frees += 1;
        if let Err(fault) = device.memory.free(pointer, "cuMemFree") {
            device.finding(&fault.0);
            return Err(INVALID_VALUE);
        }
        Ok(device.sticky)
    }

    /// Pinned memory of the host.
    fn cuMemHostAlloc(pointer: *mut u64, bytes: usize, _flags: c_uint) {
        let mut device = current("cuMemHostAlloc")?;
        let memory = vec![0; bytes.max(1)];
        let at = memory.as_ptr() as u64;
        device.pinned.insert(at, memory);
        Ok(give(pointer, at))
    }

    /// Frees pinned memory.
    fn cuMemFreeHost(pointer: u64) {
        let mut device = called("cuMemFreeHost");
        Ok(if device.pinned.remove(&pointer).is_some() { OK } else { INVALID_VALUE })
    }

    /// The pool that memory comes from.
    fn cuDeviceGetDefaultMemPool(pool: *mut u64, _device: c_int) {
        drop(called("cuDeviceGetDefaultMemPool"));
        Ok(give(pool, DEFAULT_POOL))
    }

    /// The pool that memory comes from.
    fn cuDeviceGetMemPool(pool: *mut u64, _device: c_int) {
        drop(called("cuDeviceGetMemPool"));
        Ok(give(pool, DEFAULT_POOL))
    }

    /// Gives memory of a pool back to the device.
    fn cuMemPoolTrimTo(_pool: u64, _keep: usize) {
        drop(called("cuMemPoolTrimTo"));
        Ok(OK)
    }

    /// Changes a pool: how much it keeps, and the mark of the highest use.
    fn cuMemPoolSetAttribute(pool: u64, attribute: c_uint, value: *const u64) {
        let mut device = called("cuMemPoolSetAttribute");
        if pool != DEFAULT_POOL {
            return Err(INVALID_VALUE);
        }
        match attribute {
            4 => device.release_threshold = value.read(),
            // The marks of the highest use can only be reset.
            6 | 8 if value.read() == 0 => device.memory.peak = device.memory.in_use,
            1..=3 => {}
            _ => return Err(INVALID_VALUE),
        }
        Ok(OK)
    }

    /// What a pool holds; the first three are flags of 4 bytes.
    fn cuMemPoolGetAttribute(pool: u64, attribute: c_uint, value: *mut u64) {
        let device = called("cuMemPoolGetAttribute");
        if pool != DEFAULT_POOL {
            return Err(INVALID_VALUE);
        }
        Ok(match attribute {
            1..=3 => give(value.cast::<c_int>(), 1),
            4 => give(value, device.release_threshold),
            5 | 7 => give(value, device.memory.in_use as u64),
            6 | 8 => give(value, device.memory.peak as u64),
            _ => INVALID_VALUE,
        })
    }

    /// A copy to the device in the order of a stream. Of ordinary memory the driver keeps a copy before it returns.
    fn cuMemcpyHtoDAsync_v2(to: u64, from: *const u8, len: usize, stream: u64) {
        let mut device = current("cuMemcpyHtoDAsync_v2")?;
        if len == 0 {
            device.finding("cuMemcpyHtoDAsync of 0 bytes");
            return Ok(OK);
        }
        device.counts.bytes_up += len as u64;
        let stream = stream_of(stream);
        if device.pinned_bytes(from as u64, len).is_some() {
            return Ok(device.push(stream, Op::WriteFromHost { to, from: from as u64, len }));
        }
        if device.capturing(stream).is_some() {
            device.finding("a captured copy from memory of the host that is not pinned: a launch would read it again");
        }
        let data = std::slice::from_raw_parts(from, len).into();
        Ok(device.push(stream, Op::Write { to, data }))
    }

    /// A copy to the device.
    fn cuMemcpyHtoD_v2(to: u64, from: *const u8, len: usize) {
        let mut device = current("cuMemcpyHtoD_v2")?;
        if let Some(error) = device.forbidden("cuMemcpyHtoD", None) {
            return Err(error);
        }
        device.counts.bytes_up += len as u64;
        device.drain_all();
        let data = std::slice::from_raw_parts(from, len).into();
        device.push(0, Op::Write { to, data });
        device.wait(0, u64::MAX);
        Ok(device.sticky)
    }

    /// A copy within the device.
    fn cuMemcpyDtoDAsync_v2(to: u64, from: u64, len: usize, stream: u64) {
        let mut device = current("cuMemcpyDtoDAsync_v2")?;
        Ok(device.push(stream_of(stream), Op::Copy { to, from, len }))
    }

    /// A copy to the host. To ordinary memory the driver waits until it is there.
    fn cuMemcpyDtoHAsync_v2(to: *mut u8, from: u64, len: usize, stream: u64) {
        let mut device = current("cuMemcpyDtoHAsync_v2")?;
        device.counts.bytes_down += len as u64;
        let stream = stream_of(stream);
        if device.pinned_bytes(to as u64, len).is_some() {
            return Ok(device.push(stream, Op::ReadToHost { to: to as u64, from, len }));
        }
        if let Some(error) = device.forbidden("cuMemcpyDtoHAsync to memory that is not pinned", Some(stream)) {
            return Err(error);
        }
        device.wait(stream, u64::MAX);
        Ok(to_host(&mut device, to, from, len))
    }

    /// A copy to the host.
    fn cuMemcpyDtoH_v2(to: *mut u8, from: u64, len: usize) {
        let mut device = current("cuMemcpyDtoH_v2")?;
        if let Some(error) = device.forbidden("cuMemcpyDtoH", None) {
            return Err(error);
        }
        device.counts.bytes_down += len as u64;
        let streams: Vec<u64> = device.streams.keys().copied().collect();
        streams.into_iter().for_each(|stream| device.wait(stream, u64::MAX));
        Ok(to_host(&mut device, to, from, len))
    }

    /// Fills memory with a byte.
    fn cuMemsetD8Async(to: u64, value: u8, count: usize, stream: u64) { fill("cuMemsetD8Async", to, value.into(), 1, count, stream) }

    /// Fills memory with a number of 16 bits.
    fn cuMemsetD16Async(to: u64, value: u16, count: usize, stream: u64) { fill("cuMemsetD16Async", to, value.into(), 2, count, stream) }

    /// Fills memory with a number of 32 bits.
    fn cuMemsetD32Async(to: u64, value: c_uint, count: usize, stream: u64) { fill("cuMemsetD32Async", to, value, 4, count, stream) }

    /// Fills memory with a byte.
    fn cuMemsetD8_v2(to: u64, value: u8, count: usize) { fill("cuMemsetD8_v2", to, value.into(), 1, count, 0) }

    /// Reads a module.
    fn cuModuleLoadData(module: *mut u64, image: *const c_char) {
        let mut device = current("cuModuleLoadData")?;
        let bytes = CStr::from_ptr(image);
        let mut loaded = match Module::parse(&bytes.to_string_lossy()) {
            Ok(loaded) => loaded,
            Err(why) => {
                device.finding(&format!("a module that is no PTX: {why}"));
                return Err(INVALID_PTX);
            }
        };
        let capability = device.settings.capability;
        match loaded.capability() {
            None => return Err(INVALID_PTX),
            Some((wanted, true)) if wanted != capability => return Err(NO_BINARY_FOR_GPU),
            Some((wanted, _)) if wanted > capability => return Err(INVALID_PTX),
            Some(_) => {}
        }
        if loaded.version > device.settings.newest_ptx() {
            return Err(UNSUPPORTED_PTX_VERSION);
        }
        for global in loaded.globals.values_mut() {
            let size = global.contents.len();
            global.address = device.memory.allocate(size.max(1), Kind::Module, 0).ok_or(OUT_OF_MEMORY)?;
            if let Ok(bytes) = device.memory.write(global.address, size) {
                bytes.copy_from_slice(&global.contents);
            }
        }
        let handle = device.handle();
        device.modules.insert(handle, loaded);
        Ok(give(module, handle))
    }

    /// Reads a module; options say nothing to the stand-in.
    fn cuModuleLoadDataEx(module: *mut u64, image: *const c_char, _count: c_uint, _options: *mut c_uint, _values: *mut *mut c_void) {
        Ok(cuModuleLoadData(module, image))
    }

    /// Ends a module; its kernels may still be in a stream.
    fn cuModuleUnload(module: u64) {
        let device = called("cuModuleUnload");
        Ok(if device.modules.contains_key(&module) { OK } else { INVALID_HANDLE })
    }

    /// A kernel by its name.
    fn cuModuleGetFunction(function: *mut u64, module: u64, name: *const c_char) {
        let mut device = current("cuModuleGetFunction")?;
        let name = CStr::from_ptr(name).to_string_lossy().into_owned();
        let key = (module, name.clone());
        if let Some(&handle) = device.by_name.get(&key) {
            return Ok(give(function, handle));
        }
        let found = device.modules.get(&module).ok_or(INVALID_HANDLE)?;
        let decoded = found.entries.get(&name).map(|entry| decode(found, &name, entry));
        match decoded {
            None => {
                device.finding(&format!("no kernel is called {name}"));
                Err(NOT_FOUND)
            }
            Some(Err(why)) => {
                device.finding(&format!("kernel {name} cannot be read: {why}"));
                Err(INVALID_PTX)
            }
            Some(Ok(decoded)) => {
                let handle = device.handle();
                let most_dynamic = USUAL_SHARED.saturating_sub(decoded.shared_bytes);
                device.functions.insert(handle, Loaded { function: Arc::new(decoded), most_dynamic });
                device.by_name.insert(key, handle);
                Ok(give(function, handle))
            }
        }
    }

    /// A variable by its name.
    fn cuModuleGetGlobal_v2(pointer: *mut u64, bytes: *mut usize, module: u64, name: *const c_char) {
        let device = current("cuModuleGetGlobal_v2")?;
        let name = CStr::from_ptr(name).to_string_lossy();
        let found = device.modules.get(&module).ok_or(INVALID_HANDLE)?.globals.get(name.as_ref()).ok_or(NOT_FOUND)?;
        if !bytes.is_null() {
            *bytes = found.contents.len();
        }
        Ok(give(pointer, found.address))
    }

    /// Lets a kernel have more dynamic shared memory than is usual.
    fn cuFuncSetAttribute(function: u64, attribute: c_uint, value: c_int) {
        let mut device = current("cuFuncSetAttribute")?;
        let most = device.settings.most_shared();
        let loaded = device.functions.get_mut(&function).ok_or(INVALID_HANDLE)?;
        if attribute == 8 {
            if value < 0 || value as usize + loaded.function.shared_bytes > most {
                return Err(INVALID_VALUE);
            }
            loaded.most_dynamic = value as usize;
        }
        Ok(OK)
    }

    /// A number that describes a kernel.
    fn cuFuncGetAttribute(value: *mut c_int, attribute: c_uint, function: u64) {
        let device = current("cuFuncGetAttribute")?;
        let loaded = device.functions.get(&function).ok_or(INVALID_HANDLE)?;
        let capability = device.settings.capability as c_int;
        Ok(give(value, match attribute {
            0 => loaded.function.most_threads.unwrap_or(1024) as c_int,
            1 => loaded.function.shared_bytes as c_int,
            3 => loaded.function.local_bytes as c_int,
            4 => 32, // registers, which only the real compiler knows
            5 | 6 => capability,
            8 => loaded.most_dynamic as c_int,
            _ => 0,
        }))
    }

    /// Which of the two memories of a multiprocessor a kernel prefers.
    fn cuFuncSetCacheConfig(_function: u64, _config: c_uint) {
        drop(called("cuFuncSetCacheConfig"));
        Ok(OK)
    }

    /// How many blocks a multiprocessor holds at once.
    fn cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks: *mut c_int, function: u64, threads: c_int, dynamic: usize, _flags: c_uint) {
        let device = current("cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags")?;
        let loaded = device.functions.get(&function).ok_or(INVALID_HANDLE)?;
        if !(1..=1024).contains(&threads) {
            return Err(INVALID_VALUE);
        }
        let shared = loaded.function.shared_bytes + dynamic + 1024;
        let by_shared = (device.settings.most_shared() + 1024) / shared;
        Ok(give(blocks, (2048 / threads).min(32).min(by_shared as c_int)))
    }

    /// How many blocks a multiprocessor holds at once.
    fn cuOccupancyMaxActiveBlocksPerMultiprocessor(blocks: *mut c_int, function: u64, threads: c_int, dynamic: usize) {
        Ok(cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, function, threads, dynamic, 0))
    }

    /// Puts a kernel into a stream.
    fn cuLaunchKernel(
        function: u64, gx: c_uint, gy: c_uint, gz: c_uint, bx: c_uint, by: c_uint, bz: c_uint, shared: c_uint, stream: u64,
        params: *const *const u8, extra: *const c_void,
    ) {
        let mut device = current("cuLaunchKernel")?;
        let loaded = device.functions.get(&function).ok_or(INVALID_HANDLE)?;
        let (f, most_dynamic) = (loaded.function.clone(), loaded.most_dynamic);
        let threads = u64::from(bx) * u64::from(by) * u64::from(bz);
        let blocks_fit = gx > 0 && gy > 0 && gz > 0 && gx <= i32::MAX as u32 && gy <= 65535 && gz <= 65535;
        let threads_fit = (1..=1024).contains(&threads) && bz <= 64;
        let problem = if !blocks_fit || !threads_fit {
            Some(format!("grid [{gx}, {gy}, {gz}], block [{bx}, {by}, {bz}] is not valid"))
        } else if threads > u64::from(f.most_threads.unwrap_or(1024)) {
            Some(format!("{threads} threads, and the kernel is made for {} at most", f.most_threads.unwrap_or(1024)))
        } else if shared as usize > most_dynamic {
            Some(format!("{shared} bytes of dynamic shared memory beside {}, and {most_dynamic} are allowed", f.shared_bytes))
        } else if !extra.is_null() || params.is_null() && !f.params.is_empty() {
            Some("parameters are missing, or given in a way that the stand-in does not know".to_owned())
        } else {
            None
        };
        if let Some(problem) = problem {
            device.finding(&format!("kernel {}: {problem}", f.name));
            return Err(INVALID_VALUE);
        }
        let mut bytes = vec![0; f.param_bytes];
        for (n, param) in f.params.iter().enumerate() {
            std::ptr::copy_nonoverlapping(*params.add(n), bytes[param.offset..].as_mut_ptr(), param.size);
        }
        let dropped = device.settings.dropped;
        let kernel =
            Kernel { function: f, grid: [gx, gy, gz], block: [bx, by, bz], params: bytes, dynamic_shared: shared as usize, dropped };
        if dropped != Dropped::None {
            device.planted();
        }
        Ok(device.enqueue(stream_of(stream), kernel))
    }

    /// The name of an error.
    fn cuGetErrorName(error: c_int, text: *mut *const c_char) { Ok(give(text, error_name(error).as_ptr())) }

    /// The name of an error, for want of a description.
    fn cuGetErrorString(error: c_int, text: *mut *const c_char) { Ok(give(text, error_name(error).as_ptr())) }

    /// A profiler would start here.
    fn cuProfilerStart() { Ok(OK) }

    /// A profiler would stop here.
    fn cuProfilerStop() { Ok(OK) }
}

fn fill(name: &str, to: u64, value: u32, width: usize, count: usize, stream: u64) -> Result<c_int, c_int> {
    let mut device = current(name)?;
    if count == 0 {
        device.finding(&format!("{name} of 0 bytes"));
        return Ok(OK);
    }
    if !to.is_multiple_of(width as u64) {
        return Err(INVALID_VALUE);
    }
    Ok(device.push(stream_of(stream), Op::Fill { to, value, width, count }))
}

/// Copies what is there by now to the host. Without computing, ones stand for results.
///
/// # Safety
///
/// `to` has room for `len` bytes.
unsafe fn to_host(device: &mut Device, to: *mut u8, from: u64, len: usize) -> c_int {
    if device.sticky != OK || len == 0 {
        return device.sticky;
    }
    let read = device.memory.read(from, len).map(|(bytes, written)| (bytes.to_vec(), written));
    let (mut bytes, written) = match read {
        Ok(read) => read,
        Err(fault) => {
            device.fault(ILLEGAL_ADDRESS, &format!("copy to the host: {fault}"));
            return device.sticky;
        }
    };
    if device.skipping {
        let one = if len == 8 { 1f64.to_le_bytes().to_vec() } else { 1f32.to_le_bytes().to_vec() };
        bytes.iter_mut().zip(one.iter().cycle()).for_each(|(byte, one)| *byte = *one);
    }
    device.check_written(written, "copy to the host of memory that nobody wrote");
    // SAFETY: promised by the caller.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, len) };
    OK
}

fn error_name(error: c_int) -> &'static CStr {
    match error {
        OK => c"CUDA_SUCCESS",
        INVALID_VALUE => c"CUDA_ERROR_INVALID_VALUE",
        OUT_OF_MEMORY => c"CUDA_ERROR_OUT_OF_MEMORY",
        NO_DEVICE => c"CUDA_ERROR_NO_DEVICE",
        INVALID_DEVICE => c"CUDA_ERROR_INVALID_DEVICE",
        INVALID_CONTEXT => c"CUDA_ERROR_INVALID_CONTEXT",
        NO_BINARY_FOR_GPU => c"CUDA_ERROR_NO_BINARY_FOR_GPU",
        INVALID_PTX => c"CUDA_ERROR_INVALID_PTX",
        UNSUPPORTED_PTX_VERSION => c"CUDA_ERROR_UNSUPPORTED_PTX_VERSION",
        INVALID_HANDLE => c"CUDA_ERROR_INVALID_HANDLE",
        ILLEGAL_STATE => c"CUDA_ERROR_ILLEGAL_STATE",
        NOT_FOUND => c"CUDA_ERROR_NOT_FOUND",
        NOT_READY => c"CUDA_ERROR_NOT_READY",
        ILLEGAL_ADDRESS => c"CUDA_ERROR_ILLEGAL_ADDRESS",
        ASSERT => c"CUDA_ERROR_ASSERT",
        NOT_SUPPORTED => c"CUDA_ERROR_NOT_SUPPORTED",
        CAPTURE_UNSUPPORTED => c"CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED",
        CAPTURE_INVALIDATED => c"CUDA_ERROR_STREAM_CAPTURE_INVALIDATED",
        CAPTURED_EVENT => c"CUDA_ERROR_CAPTURED_EVENT",
        _ => c"CUDA_ERROR_UNKNOWN",
    }
}
