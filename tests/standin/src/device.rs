//! The device: streams that are as lazy as they may be, modules, graphs, and all that is counted. An operation runs only
//! when something waits for it, so that a program that relies on luck fails.

use std::cell::Cell;
use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

use crate::cublas::Products;
use crate::decode::Function;
use crate::memory::{Kind, Memory};
use crate::ptx::Module;
use crate::registers::Registers;
use crate::report::{Counts, MemoryCounts, count};
use crate::settings::{Plant, Settings};
use crate::vm::{self, Dropped, Launch, Stop};

/// The driver's error codes, as far as the stand-in gives them.
pub mod code {
    pub const OK: i32 = 0;
    pub const INVALID_VALUE: i32 = 1;
    pub const OUT_OF_MEMORY: i32 = 2;
    pub const UNAVAILABLE: i32 = 46;
    pub const NO_DEVICE: i32 = 100;
    pub const INVALID_DEVICE: i32 = 101;
    pub const INVALID_CONTEXT: i32 = 201;
    pub const NO_BINARY_FOR_GPU: i32 = 209;
    pub const INVALID_PTX: i32 = 218;
    pub const UNSUPPORTED_PTX_VERSION: i32 = 222;
    pub const INVALID_HANDLE: i32 = 400;
    pub const ILLEGAL_STATE: i32 = 401;
    pub const NOT_FOUND: i32 = 500;
    pub const NOT_READY: i32 = 600;
    pub const ILLEGAL_ADDRESS: i32 = 700;
    pub const ASSERT: i32 = 710;
    pub const NOT_SUPPORTED: i32 = 801;
    pub const CAPTURE_UNSUPPORTED: i32 = 900;
    pub const CAPTURE_INVALIDATED: i32 = 901;
    pub const CAPTURED_EVENT: i32 = 907;
}

/// What a stream has to do.
#[derive(Clone)]
pub enum Op {
    Allocate(u64),
    Free {
        base: u64,
        by: String,
    },
    Write {
        to: u64,
        data: Arc<[u8]>,
    },
    /// From or to pinned memory of the host, which is read or written when the stream comes to it.
    WriteFromHost {
        to: u64,
        from: u64,
        len: usize,
    },
    ReadToHost {
        to: u64,
        from: u64,
        len: usize,
    },
    Copy {
        to: u64,
        from: u64,
        len: usize,
    },
    /// So many numbers of so many bytes.
    Fill {
        to: u64,
        value: u32,
        width: usize,
        count: usize,
    },
    Launch(Arc<Kernel>),
    Products(Arc<Products>),
    /// Waits until another stream has done so many operations.
    Wait {
        stream: u64,
        done: u64,
    },
    Shrink {
        at: u64,
        bytes: usize,
    },
}

/// A launch of a kernel.
pub struct Kernel {
    pub function: Arc<Function>,
    pub grid: [u32; 3],
    pub block: [u32; 3],
    pub params: Vec<u8>,
    pub dynamic_shared: usize,
    pub dropped: Dropped,
}

/// What a stream collects between the begin and the end of a capture.
#[derive(Default)]
pub struct Capture {
    pub ops: Vec<Op>,
    pub invalid: bool,
}

#[derive(Default)]
pub struct Stream {
    queue: VecDeque<Op>,
    pub queued: u64,
    done: u64,
    pub capture: Option<Capture>,
    /// Another stream whose capture this one takes part in.
    pub joined: Option<u64>,
}

/// Where an event was recorded.
#[derive(Clone, Copy, Default)]
pub struct Event {
    pub stream: u64,
    pub at: u64,
    pub captured: bool,
}

/// A kernel that the program has a handle of.
pub struct Loaded {
    pub function: Arc<Function>,
    /// The most bytes of dynamic shared memory: what the static part leaves of the usual ones, or what the program asked for.
    pub most_dynamic: usize,
}

pub struct Device {
    pub settings: Settings,
    pub memory: Memory,
    pub streams: BTreeMap<u64, Stream>,
    pub modules: BTreeMap<u64, Module>,
    pub functions: BTreeMap<u64, Loaded>,
    pub by_name: BTreeMap<(u64, String), u64>,
    pub events: BTreeMap<u64, Event>,
    pub graphs: BTreeMap<u64, Vec<Op>>,
    pub blas: BTreeMap<u64, crate::cublas::Handle>,
    /// Pinned memory of the host.
    pub pinned: BTreeMap<u64, Vec<u8>>,
    pub release_threshold: u64,
    pub counts: Counts,
    /// The error that every call gives after a fault.
    pub sticky: i32,
    handles: u64,
    /// The lock of a device that serves one process at a time.
    lock: Option<File>,
    pool: Vec<Registers>,
    planted: bool,
    /// Whether work is only counted from now on.
    pub skipping: bool,
}

static DEVICE: OnceLock<Mutex<Device>> = OnceLock::new();
static THREADS: AtomicU64 = AtomicU64::new(1);
thread_local! {
    static THREAD: u64 = THREADS.fetch_add(1, Ordering::Relaxed);
    /// The context that is current on this thread, or 0.
    pub static CONTEXT: Cell<u64> = const { Cell::new(0) };
}

/// The device, which is made at the first call.
pub fn device() -> MutexGuard<'static, Device> {
    let device = DEVICE.get_or_init(|| Mutex::new(Device::new(Settings::from_environment())));
    device.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// The device, if it was ever called.
pub fn used_device() -> Option<MutexGuard<'static, Device>> {
    Some(DEVICE.get()?.lock().unwrap_or_else(std::sync::PoisonError::into_inner))
}

/// The stream of a handle: 2 is another one on each thread, 1 the same as 0.
pub fn stream_of(handle: u64) -> u64 {
    match handle {
        1 => 0,
        2 => 1 << 63 | THREAD.with(|thread| *thread),
        other => other,
    }
}

impl Device {
    pub fn new(settings: Settings) -> Device {
        let mut device = Device {
            memory: Memory::new(settings.memory),
            streams: BTreeMap::new(),
            modules: BTreeMap::new(),
            functions: BTreeMap::new(),
            by_name: BTreeMap::new(),
            events: BTreeMap::new(),
            graphs: BTreeMap::new(),
            blas: BTreeMap::new(),
            pinned: BTreeMap::new(),
            release_threshold: 0,
            counts: Counts::default(),
            sticky: code::OK,
            handles: 0x1000,
            lock: None,
            pool: Vec::new(),
            planted: false,
            skipping: false,
            settings,
        };
        for wrong in device.settings.wrong.clone() {
            device.finding(&wrong);
        }
        device
    }

    /// Whether this process may have a context: another one may have it, on a device that serves one at a time.
    pub fn lock_for_this_process(&mut self) -> bool {
        let Some(path) = &self.settings.exclusive else { return true };
        if self.lock.is_none() {
            self.lock = File::create(path).ok().filter(|file| file.try_lock().is_ok());
        }
        self.lock.is_some()
    }

    pub fn handle(&mut self) -> u64 {
        self.handles += 0x10;
        self.handles
    }

    /// Notes something that is wrong; it is told once, and counted.
    pub fn finding(&mut self, what: &str) {
        count(&mut self.counts.findings, what);
        if self.counts.findings[what] > 1 {
            return;
        }
        eprintln!("[standin] {}", what.replace('\n', "\n[standin] "));
        if self.settings.backtrace {
            let trace = std::backtrace::Backtrace::force_capture().to_string();
            let lines =
                trace.lines().filter(|line| !line.trim_start().starts_with("at ") && !line.contains("cuda_standin"));
            lines.take(16).for_each(|line| eprintln!("[standin]   {}", line.trim()));
        }
    }

    /// Tells, once, that the defect which was asked for is there.
    pub fn planted(&mut self) {
        if !std::mem::replace(&mut self.planted, true)
            && let Some(plant) = &self.settings.plant
        {
            eprintln!("[standin] planted: {plant}");
        }
    }

    /// Notes a fault, after which every call fails.
    pub fn fault(&mut self, error: i32, what: &str) {
        self.finding(what);
        if self.sticky == code::OK {
            self.sticky = error;
        }
    }

    /// The stream whose capture takes in what is given to this one.
    pub fn capturing(&self, stream: u64) -> Option<u64> {
        let found = self.streams.get(&stream)?;
        found.capture.as_ref().map(|_| stream).or(found.joined)
    }

    /// Whether any stream captures: then calls that concern the whole device are forbidden.
    pub fn captures(&self) -> bool {
        self.streams.values().any(|stream| stream.capture.is_some())
    }

    /// A call that is forbidden while a stream captures makes the capture invalid. The error, if one captures.
    pub fn forbidden(&mut self, what: &str, stream: Option<u64>) -> Option<i32> {
        let concerned: Vec<u64> = match stream {
            Some(stream) => self.capturing(stream).into_iter().collect(),
            None => self.streams.iter().filter(|(_, stream)| stream.capture.is_some()).map(|(&key, _)| key).collect(),
        };
        if concerned.is_empty() {
            return None;
        }
        for key in concerned {
            if let Some(capture) = self.streams.get_mut(&key).and_then(|stream| stream.capture.as_mut()) {
                capture.invalid = true;
            }
        }
        self.finding(&format!("{what} while a stream is being captured: the capture is lost"));
        Some(code::CAPTURE_UNSUPPORTED)
    }

    /// Gives a stream something to do, and tells the state of the device.
    pub fn push(&mut self, stream: u64, op: Op) -> i32 {
        if let Some(origin) = self.capturing(stream) {
            if let Some(capture) = self.streams.get_mut(&origin).and_then(|stream| stream.capture.as_mut()) {
                if capture.invalid {
                    return code::CAPTURE_INVALIDATED;
                }
                capture.ops.push(op);
            }
            return self.sticky;
        }
        let queue = self.streams.entry(stream).or_default();
        queue.queue.push_back(op);
        queue.queued += 1;
        if self.settings.eager {
            self.drain(stream, u64::MAX);
        }
        self.sticky
    }

    /// Executes what a stream has to do, up to so many operations since its beginning.
    pub fn drain(&mut self, stream: u64, upto: u64) {
        loop {
            let Some(queue) = self.streams.get_mut(&stream) else { return };
            if queue.done >= upto {
                return;
            }
            let Some(op) = queue.queue.pop_front() else { return };
            queue.done += 1;
            if self.sticky == code::OK {
                self.execute(op);
            }
        }
    }

    pub fn drain_all(&mut self) {
        let keys: Vec<u64> = self.streams.keys().copied().collect();
        for key in keys {
            self.drain(key, u64::MAX);
        }
    }

    /// The host waits for a stream; counted if there is something to wait for.
    pub fn wait(&mut self, stream: u64, upto: u64) {
        let open = self.streams.get(&stream).is_some_and(|queue| queue.done < upto && !queue.queue.is_empty());
        self.counts.waits += u64::from(open);
        self.drain(stream, upto);
    }

    pub fn idle(&self, stream: u64, upto: u64) -> bool {
        self.streams.get(&stream).is_none_or(|queue| queue.done >= upto || queue.queue.is_empty())
    }

    fn execute(&mut self, op: Op) {
        match op {
            Op::Allocate(base) => self.memory.arrive(base),
            Op::Free { base, by } => {
                if let Err(fault) = self.memory.free(base, &by) {
                    self.fault(code::INVALID_VALUE, &fault.0);
                }
            }
            Op::Write { to, data } => match self.memory.write(to, data.len()) {
                Ok(bytes) => bytes.copy_from_slice(&data),
                Err(fault) => self.fault(code::ILLEGAL_ADDRESS, &format!("copy to the device: {fault}")),
            },
            Op::WriteFromHost { to, from, len } => {
                let Some(data) = self.pinned_bytes(from, len).map(|bytes| bytes.to_vec()) else {
                    return self
                        .fault(code::INVALID_VALUE, "copy to the device: the host's memory was freed before the copy");
                };
                self.execute(Op::Write { to, data: data.into() });
            }
            Op::ReadToHost { to, from, len } => {
                match self.memory.read(from, len).map(|(bytes, all)| (bytes.to_vec(), all)) {
                    Ok((data, written)) => {
                        self.check_written(written, "copy to the host of memory that nobody wrote");
                        match self.pinned_bytes(to, len) {
                            Some(bytes) => bytes.copy_from_slice(&data),
                            None => self
                                .fault(code::INVALID_VALUE, "copy to the host: its memory was freed before the copy"),
                        }
                    }
                    Err(fault) => self.fault(code::ILLEGAL_ADDRESS, &format!("copy to the host: {fault}")),
                }
            }
            Op::Copy { to, from, len } => {
                let data = self.memory.read(from, len).map(|(bytes, written)| (bytes.to_vec(), written));
                let copied = data.and_then(|(data, written)| {
                    self.memory.write(to, len)?.copy_from_slice(&data);
                    Ok(written)
                });
                match copied {
                    Ok(written) => self.check_written(written, "copy within the device of memory that nobody wrote"),
                    Err(fault) => self.fault(code::ILLEGAL_ADDRESS, &format!("copy within the device: {fault}")),
                }
            }
            Op::Fill { to, value, width, count } => match self.memory.write(to, width * count) {
                Ok(bytes) => {
                    bytes.chunks_exact_mut(width).for_each(|part| part.copy_from_slice(&value.to_le_bytes()[..width]))
                }
                Err(fault) => self.fault(code::ILLEGAL_ADDRESS, &format!("memset: {fault}")),
            },
            Op::Launch(kernel) if !self.skips(kernel.grid != [1; 3]) => self.launch(&kernel),
            Op::Launch(_) => {}
            Op::Products(_) if self.skips(true) => {}
            Op::Products(products) => {
                let result = products.run(&mut self.memory);
                match result {
                    Ok(findings) => findings.iter().for_each(|what| self.finding(what)),
                    Err(why) => self.fault(code::ILLEGAL_ADDRESS, &why),
                }
            }
            Op::Wait { stream, done } => self.drain(stream, done),
            Op::Shrink { at, bytes } => {
                if self.memory.shrink(at, bytes) {
                    self.planted();
                }
            }
        }
    }

    /// Whether nothing is computed. A program first tries a device with single blocks, which are; with the first work of some
    /// size it ends.
    fn skips(&mut self, large: bool) -> bool {
        self.skipping |= self.settings.dry && large;
        self.skipping
    }

    pub fn check_written(&mut self, written: bool, what: &str) {
        if !written && !self.skipping {
            self.finding(what);
        }
    }

    /// Bytes of pinned memory; none if they do not lie in one piece of it.
    pub fn pinned_bytes(&mut self, at: u64, len: usize) -> Option<&mut [u8]> {
        let (&base, memory) = self.pinned.range_mut(..=at).next_back()?;
        let from = (at - base) as usize;
        memory.get_mut(from..from.checked_add(len)?)
    }

    fn launch(&mut self, kernel: &Kernel) {
        let name = &kernel.function.name;
        let launch = Launch {
            function: &kernel.function,
            grid: kernel.grid,
            block: kernel.block,
            params: &kernel.params,
            dynamic_shared: kernel.dynamic_shared,
            dropped: kernel.dropped,
        };
        let outcome = vm::run(&launch, &mut self.memory, &mut self.pool);
        self.counts.instructions += outcome.executed;
        for warning in outcome.warnings {
            self.finding(&format!("kernel {name}: {warning}"));
        }
        let (error, why) = match outcome.result {
            Ok(()) => return,
            Err(Stop::Fault(why)) => (code::ILLEGAL_ADDRESS, why),
            Err(Stop::Assert(why)) => (code::ASSERT, why),
        };
        self.fault(error, &format!("kernel {name} on {:?} x {:?}: {why}", kernel.grid, kernel.block));
    }

    /// Puts a kernel into a stream, with the defect that is to be planted in it.
    pub fn enqueue(&mut self, stream: u64, mut kernel: Kernel) -> i32 {
        count(&mut self.counts.kernels, &kernel.function.name);
        let plant = self.settings.plant.clone().filter(|plant| plant.is_for(&kernel.function.name));
        let pointer = |kernel: &Kernel, n: usize| {
            let param = kernel.function.params.get(n).filter(|param| param.size == 8)?;
            kernel.params[param.offset..param.offset + 8].try_into().ok().map(u64::from_le_bytes)
        };
        let mut there = plant.is_some();
        match plant {
            Some(Plant::Swap { first, second, .. }) => there = swap(&mut kernel, first, second),
            Some(Plant::Free { param, .. }) => {
                there = pointer(&kernel, param).is_some_and(|base| {
                    self.push(stream, Op::Free { base, by: "the planted defect".to_owned() });
                    true
                });
            }
            Some(Plant::Add { param, number, .. }) => there = add(&mut kernel, param, number),
            Some(Plant::Grid { by, .. }) => kernel.grid[0] = i64::from(kernel.grid[0]).saturating_add(by).max(0) as u32,
            Some(Plant::Block { threads, .. }) => kernel.block = [threads, 1, 1],
            Some(Plant::Shrink { param, bytes, .. }) => {
                // It is told when it is done: the buffer may not be there yet.
                if let Some(at) = pointer(&kernel, param) {
                    self.push(stream, Op::Shrink { at, bytes });
                }
                there = false;
            }
            Some(Plant::Barrier { .. }) => kernel.dropped = Dropped::All,
            Some(Plant::Lose { file, .. }) => {
                there = File::create_new(file).is_ok();
                if there {
                    self.sticky = code::ILLEGAL_ADDRESS;
                }
            }
            Some(Plant::Beta(_)) | None => {}
        }
        if there {
            self.planted();
        }
        if kernel.grid[0] == 0 {
            return self.sticky;
        }
        self.push(stream, Op::Launch(Arc::new(kernel)))
    }

    /// Memory in the order of a stream, or of a graph if the stream captures.
    pub fn allocate(&mut self, bytes: usize, stream: u64) -> Option<u64> {
        let kind = if self.capturing(stream).is_some() { Kind::Graph } else { Kind::Pool };
        let base = self.memory.allocate(bytes, kind, stream)?;
        self.counts.allocations += 1;
        self.push(stream, Op::Allocate(base));
        Some(base)
    }

    pub fn json(&self) -> String {
        let memory = MemoryCounts { peak: self.memory.peak, in_use: self.memory.in_use, alive: self.memory.alive() };
        self.counts.json(&memory)
    }

    /// Starts all counts anew; what is wrong stays known.
    pub fn reset(&mut self) {
        let findings = std::mem::take(&mut self.counts.findings);
        self.counts = Counts { findings, ..Counts::default() };
        self.memory.peak = self.memory.in_use;
    }
}

fn swap(kernel: &mut Kernel, first: usize, second: usize) -> bool {
    let params = &kernel.function.params;
    let (Some(&a), Some(&b)) = (params.get(first), params.get(second)) else { return false };
    if a.size != b.size || first == second {
        return false;
    }
    for n in 0..a.size {
        kernel.params.swap(a.offset + n, b.offset + n);
    }
    true
}

fn add(kernel: &mut Kernel, param: usize, number: i64) -> bool {
    let Some(&param) = kernel.function.params.get(param) else { return false };
    let bytes = &mut kernel.params[param.offset..param.offset + param.size];
    match param.size {
        4 => {
            let old = u32::from_le_bytes(bytes.try_into().expect("four bytes"));
            bytes.copy_from_slice(&old.wrapping_add(number as u32).to_le_bytes());
        }
        8 => {
            let old = u64::from_le_bytes(bytes.try_into().expect("eight bytes"));
            bytes.copy_from_slice(&old.wrapping_add(number as u64).to_le_bytes());
        }
        _ => return false,
    }
    true
}

/// The counts so far as JSON: writes up to `capacity` bytes with a zero at the end, and gives the length without it.
///
/// # Safety
///
/// `out` has room for `capacity` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn standin_counts(out: *mut u8, capacity: usize) -> usize {
    let json = device().json();
    let written = json.len().min(capacity.saturating_sub(1));
    if capacity > 0 {
        // SAFETY: at most `capacity - 1` bytes and the zero, into room for `capacity`.
        unsafe {
            std::ptr::copy_nonoverlapping(json.as_ptr(), out, written);
            *out.add(written) = 0;
        }
    }
    json.len()
}

/// Starts all counts anew.
#[unsafe(no_mangle)]
pub extern "C" fn standin_reset() {
    device().reset();
}

unsafe extern "C" {
    fn fflush(file: *mut std::ffi::c_void) -> i32;
    fn _exit(status: i32) -> !;
}

/// At the end of the process: the summary, and its exit code if something was wrong.
extern "C" fn at_exit() {
    let Some(mut device) = used_device() else { return };
    device.drain_all();
    let (count, bytes) = device.memory.alive();
    if device.settings.leaks && count > 0 {
        device.finding(&format!("leak: {count} allocations of {bytes} bytes are alive at exit"));
    }
    match device.settings.summary.as_deref() {
        Some(path) if path.as_os_str() == "-" => eprint!("{}", device.json()),
        Some(path) => {
            if let Err(error) = std::fs::write(path, device.json()) {
                eprintln!("[standin] the summary cannot be written to {}: {error}", path.display());
            }
        }
        None => {}
    }
    if device.settings.strict && !device.counts.findings.is_empty() {
        // SAFETY: C functions that take no memory of ours; what the program has printed is written first.
        unsafe {
            fflush(std::ptr::null_mut());
            _exit(97);
        }
    }
}

#[used]
#[unsafe(link_section = ".fini_array")]
static AT_EXIT: extern "C" fn() = at_exit;
