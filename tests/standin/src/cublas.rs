//! Products of matrices as cuBLAS computes them: column by column, every operand's range checked before it is used.

use std::ffi::{c_int, c_longlong, c_uint, c_void};
use std::sync::Arc;

use crate::device::{CONTEXT, Device, Op, device, stream_of};
use crate::memory::Memory;
use crate::number::{Brain, Half};
use crate::report::count;
use crate::settings::Plant;

const OK: i32 = 0;
const NOT_INITIALIZED: i32 = 1;
const INVALID_VALUE: i32 = 7;
const NOT_SUPPORTED: i32 = 15;
const COMPUTE_32F: u32 = 68;
const COMPUTE_32F_PEDANTIC: u32 = 69;
const COMPUTE_64F: u32 = 70;
const COMPUTE_32F_FAST_TF32: u32 = 77;
const TF32_MATH: u32 = 3;

/// What the program has set on a handle.
#[derive(Clone, Copy, Debug, Default)]
pub struct Handle {
    pub stream: u64,
    pub tf32: bool,
    /// Whether alpha and beta lie on the device.
    pub device_pointers: bool,
}

/// A type of numbers, by cuBLAS's number for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Numbers {
    F32,
    F64,
    F16,
    Bf16,
}

impl Numbers {
    fn of(number: u32) -> Option<Numbers> {
        match number {
            0 => Some(Numbers::F32),
            1 => Some(Numbers::F64),
            2 => Some(Numbers::F16),
            14 => Some(Numbers::Bf16),
            _ => None,
        }
    }

    fn bytes(self) -> usize {
        match self {
            Numbers::F64 => 8,
            Numbers::F32 => 4,
            Numbers::F16 | Numbers::Bf16 => 2,
        }
    }

    fn read(self, bytes: &[u8]) -> f64 {
        match self {
            Numbers::F64 => f64::from_le_bytes(bytes.try_into().expect("eight bytes")),
            Numbers::F32 => f64::from(f32::from_le_bytes(bytes.try_into().expect("four bytes"))),
            Numbers::F16 => f64::from(Half(u16::from_le_bytes(bytes.try_into().expect("two bytes"))).wide()),
            Numbers::Bf16 => f64::from(Brain(u16::from_le_bytes(bytes.try_into().expect("two bytes"))).wide()),
        }
    }

    fn write(self, value: f64, bytes: &mut [u8]) {
        match self {
            Numbers::F64 => bytes.copy_from_slice(&value.to_le_bytes()),
            Numbers::F32 => bytes.copy_from_slice(&(value as f32).to_le_bytes()),
            Numbers::F16 => bytes.copy_from_slice(&Half::round(value as f32).0.to_le_bytes()),
            Numbers::Bf16 => bytes.copy_from_slice(&Brain::round(value as f32).0.to_le_bytes()),
        }
    }
}

/// C = alpha op(A) op(B) + beta C, for matrices of these shapes.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub transposed: [bool; 2],
    pub m: usize,
    pub n: usize,
    pub k: usize,
    pub alpha: f64,
    pub beta: f64,
    /// Types and leading dimensions of A, B and C.
    pub types: [Numbers; 3],
    pub leading: [usize; 3],
    /// Whether A and B are rounded to 10 bits of mantissa.
    pub tf32: bool,
}

/// Where the matrices of a call lie.
#[derive(Clone, Debug)]
pub enum Places {
    /// A, B and C at a distance from each other, in numbers.
    Strided { first: [u64; 3], strides: [i64; 3], count: usize },
    /// Lists of addresses on the device, read when the stream comes to the call.
    Pointers { lists: [u64; 3], from: usize, count: usize },
}

/// A call of cuBLAS.
#[derive(Debug)]
pub struct Products {
    pub what: &'static str,
    pub groups: Vec<(Shape, Places)>,
}

impl Products {
    /// Computes all products; what is strange of them, or why it cannot be.
    pub fn run(&self, memory: &mut Memory) -> Result<Vec<String>, String> {
        let mut findings = Vec::new();
        for (shape, places) in &self.groups {
            let count = match places {
                Places::Strided { count, .. } | Places::Pointers { count, .. } => *count,
            };
            for n in 0..count {
                let described = |why: String| format!("{}, product {n} of {count}, {shape:?}: {why}", self.what);
                let at = places.of(n, shape, memory).map_err(described)?;
                let written = multiply(shape, at, memory).map_err(described)?;
                if !written {
                    findings.push(format!("{} reads memory that nobody wrote: {shape:?}", self.what));
                }
            }
        }
        findings.dedup();
        Ok(findings)
    }
}

impl Places {
    fn of(&self, n: usize, shape: &Shape, memory: &Memory) -> Result<[u64; 3], String> {
        let mut places = [0; 3];
        for (which, place) in places.iter_mut().enumerate() {
            *place = match self {
                Places::Strided { first, strides, .. } => {
                    let bytes = shape.types[which].bytes() as i64;
                    first[which].wrapping_add_signed(n as i64 * strides[which] * bytes)
                }
                Places::Pointers { lists, from, .. } => {
                    let at = lists[which] + 8 * (from + n) as u64;
                    let name = ['A', 'B', 'C'][which];
                    let (bytes, written) =
                        memory.read(at, 8).map_err(|fault| format!("the list of {name}: {fault}"))?;
                    if !written {
                        return Err(format!("the list of {name} was not written"));
                    }
                    u64::from_le_bytes(bytes.try_into().expect("eight bytes"))
                }
            };
        }
        Ok(places)
    }
}

/// Reads a matrix so that what is summed over lies side by side: `outer` rows of `inner` numbers.
fn gather<T>(
    memory: &Memory,
    at: u64,
    columns: usize,
    rows: usize,
    leading: usize,
    ty: Numbers,
    by_column: bool,
    take: impl Fn(&[u8]) -> T,
    out: &mut [T],
) -> Result<bool, String> {
    let (bytes, mut written) = (ty.bytes(), true);
    for column in 0..columns {
        let from = at + (column * leading * bytes) as u64;
        let (data, all) = memory.read(from, rows * bytes).map_err(|fault| fault.0)?;
        written &= all;
        for (row, number) in data.chunks_exact(bytes).enumerate() {
            let place = if by_column { column * rows + row } else { row * columns + column };
            out[place] = take(number);
        }
    }
    Ok(written)
}

fn multiply(shape: &Shape, [a, b, c]: [u64; 3], memory: &mut Memory) -> Result<bool, String> {
    let Shape { m, n, k, .. } = *shape;
    for (at, ty, name) in [(a, shape.types[0], 'A'), (b, shape.types[1], 'B'), (c, shape.types[2], 'C')] {
        if !at.is_multiple_of(ty.bytes() as u64) {
            return Err(format!("{name} at {at:#x} is misaligned"));
        }
    }
    // Sums in f64 for f64, else in f32 as the tensor cores have it.
    if shape.types[0] == Numbers::F64 {
        let ([mut left, mut right], mut written) = ([vec![0f64; m * k], vec![0f64; n * k]], true);
        written &= operand(shape, 0, a, memory, |bytes| Numbers::F64.read(bytes), &mut left)?;
        written &= operand(shape, 1, b, memory, |bytes| Numbers::F64.read(bytes), &mut right)?;
        let sum = |i: usize, j: usize| left[i * k..][..k].iter().zip(&right[j * k..][..k]).map(|(x, y)| x * y).sum();
        return Ok(store(shape, c, memory, sum)? && written);
    }
    let take = |ty: Numbers, tf32: bool| {
        move |bytes: &[u8]| {
            let value = ty.read(bytes) as f32;
            let rounded = f32::from_bits(value.to_bits().wrapping_add(0x1000) & !0x1fff);
            if tf32 && value.is_finite() { rounded } else { value }
        }
    };
    let ([mut left, mut right], mut written) = ([vec![0f32; m * k], vec![0f32; n * k]], true);
    written &= operand(shape, 0, a, memory, take(shape.types[0], shape.tf32), &mut left)?;
    written &= operand(shape, 1, b, memory, take(shape.types[1], shape.tf32), &mut right)?;
    Ok(store(shape, c, memory, |i, j| f64::from(dot(&left[i * k..][..k], &right[j * k..][..k])))? && written)
}

/// Rows of op(A), or columns of op(B), one after the other.
fn operand<T>(
    shape: &Shape,
    which: usize,
    at: u64,
    memory: &Memory,
    take: impl Fn(&[u8]) -> T,
    out: &mut [T],
) -> Result<bool, String> {
    let outer = [shape.m, shape.n][which];
    // As it lies there, the operand has its rows within a column.
    let inner_first = shape.transposed[which] == (which == 0);
    let (rows, columns) = if inner_first { (shape.k, outer) } else { (outer, shape.k) };
    gather(memory, at, columns, rows, shape.leading[which], shape.types[which], inner_first, take, out)
        .map_err(|why| format!("{}: {why}", ['A', 'B'][which]))
}

fn dot(x: &[f32], y: &[f32]) -> f32 {
    let mut sums = [0f32; 16];
    let (xs, ys) = (x.chunks_exact(16), y.chunks_exact(16));
    let rest: f32 = xs.remainder().iter().zip(ys.remainder()).map(|(x, y)| x * y).sum();
    for (x, y) in xs.zip(ys) {
        for (sum, (x, y)) in sums.iter_mut().zip(x.iter().zip(y)) {
            *sum = x.mul_add(*y, *sum);
        }
    }
    sums.iter().sum::<f32>() + rest
}

fn store(shape: &Shape, c: u64, memory: &mut Memory, sum: impl Fn(usize, usize) -> f64) -> Result<bool, String> {
    let (ty, mut written) = (shape.types[2], true);
    let bytes = ty.bytes();
    for j in 0..shape.n {
        let from = c + (j * shape.leading[2] * bytes) as u64;
        let fault = |fault: crate::memory::Fault| format!("C: {fault}");
        // With beta = 0 what was there is not read, and may be anything.
        let before = if shape.beta == 0.0 {
            vec![0.0; shape.m]
        } else {
            let (data, all) = memory.read(from, shape.m * bytes).map_err(fault)?;
            written &= all;
            data.chunks_exact(bytes).map(|number| shape.beta * ty.read(number)).collect()
        };
        let target = memory.write(from, shape.m * bytes).map_err(fault)?;
        for (i, (number, before)) in target.chunks_exact_mut(bytes).zip(before).enumerate() {
            ty.write(shape.alpha * sum(i, j) + before, number);
        }
    }
    Ok(written)
}

/// A call's numbers as they come.
struct Raw {
    ops: [c_int; 2],
    size: [c_int; 3],
    scale: [*const c_void; 2],
    types: [c_uint; 3],
    leading: [c_int; 3],
    compute: c_uint,
}

impl Raw {
    /// Checks a call as cuBLAS does: `None` for what it does not allow.
    ///
    /// # Safety
    ///
    /// `scale` points to numbers of the type that `compute` implies.
    unsafe fn shape(&self, handle: Handle, mixed: bool) -> Result<Shape, i32> {
        use Numbers::{Bf16, F16, F32, F64};
        let Raw { ops, size: [m, n, k], leading, .. } = *self;
        let rows = [if ops[0] == 0 { m } else { k }, if ops[1] == 0 { k } else { n }, m];
        let fits = leading.iter().zip(rows).all(|(&leading, rows)| leading >= rows.max(1));
        if m < 0
            || n < 0
            || k < 0
            || !fits
            || ops.iter().any(|op| !(0..=2).contains(op))
            || self.scale.iter().any(|p| p.is_null())
        {
            return Err(INVALID_VALUE);
        }
        let [Some(a), Some(b), Some(c)] = self.types.map(Numbers::of) else { return Err(NOT_SUPPORTED) };
        let single = matches!(self.compute, COMPUTE_32F | COMPUTE_32F_PEDANTIC | COMPUTE_32F_FAST_TF32);
        let allowed = match (a, b, c) {
            (F64, F64, F64) => self.compute == COMPUTE_64F,
            (F32, F32, F32) | (Bf16, Bf16, Bf16) | (F16, F16, F16) => single,
            (Bf16, Bf16, F32) | (F16, F16, F32) => single && mixed,
            _ => false,
        };
        if !allowed {
            return Err(NOT_SUPPORTED);
        }
        let scale = |n: usize| {
            // SAFETY: as promised: f64 for double precision, else f32.
            unsafe {
                if a == F64 {
                    self.scale[n].cast::<f64>().read()
                } else {
                    f64::from(self.scale[n].cast::<f32>().read())
                }
            }
        };
        Ok(Shape {
            transposed: ops.map(|op| op != 0),
            m: m as usize,
            n: n as usize,
            k: k as usize,
            alpha: scale(0),
            beta: scale(1),
            types: [a, b, c],
            leading: leading.map(|leading| leading as usize),
            tf32: a == F32
                && (self.compute == COMPUTE_32F_FAST_TF32 || handle.tf32 && self.compute != COMPUTE_32F_PEDANTIC),
        })
    }
}

/// The device and a handle's settings, if the thread may call at all.
fn handle_of(handle: u64, what: &str) -> Result<(std::sync::MutexGuard<'static, Device>, Handle), i32> {
    let mut device = device();
    count(&mut device.counts.calls, what);
    if CONTEXT.get() == 0 {
        device.finding(&format!("{what} on a thread without a current context"));
        return Err(NOT_INITIALIZED);
    }
    let Some(found) = device.blas.get(&handle).copied() else {
        device.finding(&format!("{what} with a handle that is none"));
        return Err(NOT_INITIALIZED);
    };
    if found.device_pointers {
        device.finding(&format!("{what} with alpha and beta on the device, which the stand-in does not know"));
        return Err(NOT_SUPPORTED);
    }
    Ok((device, found))
}

fn submit(device: &mut Device, handle: Handle, what: &'static str, mut groups: Vec<(Shape, Places)>) -> i32 {
    count(&mut device.counts.products, what);
    for (shape, places) in &groups {
        if let Places::Strided { first, strides, count } = places {
            let odd = |n: usize| {
                let bytes = shape.types[n].bytes();
                let stride = if *count > 1 { strides[n] as usize } else { 0 };
                !first[n].is_multiple_of(16)
                    || !(shape.leading[n] * bytes).is_multiple_of(16)
                    || !(stride * bytes).is_multiple_of(16)
            };
            device.counts.unaligned_products += u64::from((0..3).any(odd));
        }
    }
    if let Some(Plant::Beta(beta)) = device.settings.plant {
        device.planted();
        groups.iter_mut().for_each(|(shape, _)| shape.beta = f64::from(beta));
    }
    device.push(stream_of(handle.stream), Op::Products(Arc::new(Products { what, groups })));
    // What goes wrong in a stream is told by the driver, later.
    OK
}

/// Checks and enqueues a call for one shape.
///
/// # Safety
///
/// As `Raw::shape`.
unsafe fn product(handle: u64, what: &'static str, raw: &Raw, places: Places) -> i32 {
    let (mut device, handle) = match handle_of(handle, what) {
        Ok(found) => found,
        Err(status) => return status,
    };
    // SAFETY: promised by the caller.
    match unsafe { raw.shape(handle, true) } {
        Ok(shape) => submit(&mut device, handle, what, vec![(shape, places)]),
        Err(status) => refuse(&mut device, what, raw, status),
    }
}

fn refuse(device: &mut Device, what: &str, raw: &Raw, status: i32) -> i32 {
    let Raw { ops, size, types, leading, compute, .. } = raw;
    let why =
        if status == NOT_SUPPORTED { "types that it does not support together" } else { "values that are not valid" };
    device.finding(&format!(
        "{what}: {why}: operations {ops:?}, m n k {size:?}, leading dimensions {leading:?}, types {types:?}, compute {compute}"
    ));
    status
}

/// Functions of cuBLAS are what its documentation says; pointers must be valid as there.
macro_rules! functions {
    ($($(#[$doc:meta])* fn $name:ident($($argument:ident: $ty:ty),* $(,)?) $body:block)*) => { $(
        $(#[$doc])*
        ///
        /// # Safety
        ///
        /// As cuBLAS documents the function of this name.
        #[unsafe(no_mangle)]
        #[allow(non_snake_case, reason = "the library's name")]
        pub unsafe extern "C" fn $name($($argument: $ty),*) -> c_int $body
    )* };
}

functions! {
    /// A part of the library's version. It needs neither a handle nor a context.
    fn cublasGetProperty(part: c_int, value: *mut c_int) {
        count(&mut device().counts.calls, "cublasGetProperty");
        // SAFETY: valid by the function's contract.
        unsafe { *value = if part == 0 { 13 } else { 0 } };
        OK
    }

    /// Makes a handle, unless the environment says that there is no cuBLAS.
    fn cublasCreate_v2(handle: *mut u64) {
        let mut device = device();
        count(&mut device.counts.calls, "cublasCreate_v2");
        if device.settings.no_cublas || CONTEXT.get() == 0 {
            return NOT_INITIALIZED;
        }
        let new = device.handle();
        device.blas.insert(new, Handle::default());
        // SAFETY: valid by the function's contract.
        unsafe { *handle = new };
        OK
    }

    /// Ends a handle.
    fn cublasDestroy_v2(handle: u64) {
        let mut device = device();
        count(&mut device.counts.calls, "cublasDestroy_v2");
        if device.blas.remove(&handle).is_some() { OK } else { NOT_INITIALIZED }
    }

    /// The stream of all calls to come.
    fn cublasSetStream_v2(handle: u64, stream: u64) {
        set(handle, "cublasSetStream_v2", |found| found.stream = stream)
    }

    /// The stream of a handle.
    fn cublasGetStream_v2(handle: u64, stream: *mut u64) {
        // SAFETY: valid by the function's contract.
        set(handle, "cublasGetStream_v2", |found| unsafe { *stream = found.stream })
    }

    /// Memory for the library, which the stand-in does not need.
    fn cublasSetWorkspace_v2(handle: u64, workspace: u64, bytes: usize) {
        let status = set(handle, "cublasSetWorkspace_v2", |_| ());
        let mut device = device();
        let there = bytes == 0 || device.memory.around(workspace).is_some_and(|(base, size)| workspace + bytes as u64 <= base + size as u64);
        if status == OK && !(there && workspace.is_multiple_of(256)) {
            device.finding("cublasSetWorkspace: the memory is not there, or not aligned to 256 bytes");
            return INVALID_VALUE;
        }
        status
    }

    /// Whether f32 may be rounded to 10 bits of mantissa.
    fn cublasSetMathMode(handle: u64, mode: c_uint) {
        set(handle, "cublasSetMathMode", |found| found.tf32 = mode & 15 == TF32_MATH)
    }

    /// Whether f32 is rounded to 10 bits of mantissa.
    fn cublasGetMathMode(handle: u64, mode: *mut c_uint) {
        // SAFETY: valid by the function's contract.
        set(handle, "cublasGetMathMode", |found| unsafe { *mode = if found.tf32 { TF32_MATH } else { 0 } })
    }

    /// Whether alpha and beta lie on the device.
    fn cublasSetPointerMode_v2(handle: u64, mode: c_uint) {
        set(handle, "cublasSetPointerMode_v2", |found| found.device_pointers = mode == 1)
    }

    /// Whether sums may be added atomically: the stand-in never does.
    fn cublasSetAtomicsMode(handle: u64, _mode: c_uint) {
        set(handle, "cublasSetAtomicsMode", |_| ())
    }

    /// The version of the stand-in's cuBLAS.
    fn cublasGetVersion_v2(_handle: u64, version: *mut c_int) {
        // SAFETY: valid by the function's contract.
        unsafe { *version = 130_000 };
        OK
    }

    /// One product.
    fn cublasGemmEx(
        handle: u64, ta: c_int, tb: c_int, m: c_int, n: c_int, k: c_int, alpha: *const c_void, a: u64, a_type: c_uint, lda: c_int,
        b: u64, b_type: c_uint, ldb: c_int, beta: *const c_void, c: u64, c_type: c_uint, ldc: c_int, compute: c_uint, _algo: c_int,
    ) {
        let types = [a_type, b_type, c_type];
        let raw = Raw { ops: [ta, tb], size: [m, n, k], scale: [alpha, beta], types, leading: [lda, ldb, ldc], compute };
        // SAFETY: valid by the function's contract.
        unsafe { product(handle, "cublasGemmEx", &raw, Places::Strided { first: [a, b, c], strides: [0; 3], count: 1 }) }
    }

    /// Products of matrices at a distance from each other.
    fn cublasGemmStridedBatchedEx(
        handle: u64, ta: c_int, tb: c_int, m: c_int, n: c_int, k: c_int, alpha: *const c_void, a: u64, a_type: c_uint, lda: c_int,
        sa: c_longlong, b: u64, b_type: c_uint, ldb: c_int, sb: c_longlong, beta: *const c_void, c: u64, c_type: c_uint, ldc: c_int,
        sc: c_longlong, count: c_int, compute: c_uint, _algo: c_int,
    ) {
        let types = [a_type, b_type, c_type];
        let raw = Raw { ops: [ta, tb], size: [m, n, k], scale: [alpha, beta], types, leading: [lda, ldb, ldc], compute };
        let places = Places::Strided { first: [a, b, c], strides: [sa, sb, sc], count: count.max(0) as usize };
        // SAFETY: valid by the function's contract.
        unsafe { product(handle, "cublasGemmStridedBatchedEx", &raw, places) }
    }

    /// Products of matrices whose addresses lie on the device.
    fn cublasGemmBatchedEx(
        handle: u64, ta: c_int, tb: c_int, m: c_int, n: c_int, k: c_int, alpha: *const c_void, a: u64, a_type: c_uint, lda: c_int,
        b: u64, b_type: c_uint, ldb: c_int, beta: *const c_void, c: u64, c_type: c_uint, ldc: c_int, count: c_int, compute: c_uint,
        _algo: c_int,
    ) {
        let types = [a_type, b_type, c_type];
        let raw = Raw { ops: [ta, tb], size: [m, n, k], scale: [alpha, beta], types, leading: [lda, ldb, ldc], compute };
        let places = Places::Pointers { lists: [a, b, c], from: 0, count: count.max(0) as usize };
        // SAFETY: valid by the function's contract.
        unsafe { product(handle, "cublasGemmBatchedEx", &raw, places) }
    }

    /// Groups of products: each group with shapes of its own, which lie on the host; addresses on the device.
    fn cublasGemmGroupedBatchedEx(
        handle: u64, ta: *const c_int, tb: *const c_int, m: *const c_int, n: *const c_int, k: *const c_int, alpha: *const c_void, a: u64,
        a_type: c_uint, lda: *const c_int, b: u64, b_type: c_uint, ldb: *const c_int, beta: *const c_void, c: u64, c_type: c_uint,
        ldc: *const c_int, groups: c_int, sizes: *const c_int, compute: c_uint,
    ) {
        let what = "cublasGemmGroupedBatchedEx";
        let (mut device, handle) = match handle_of(handle, what) {
            Ok(found) => found,
            Err(status) => return status,
        };
        let scale_bytes = if compute == COMPUTE_64F { 8 } else { 4 };
        let (mut list, mut from) = (Vec::new(), 0);
        for group in 0..groups.max(0) as usize {
            // SAFETY: arrays of `groups` numbers by the function's contract.
            let at = |list: *const c_int| unsafe { *list.add(group) };
            let scale = [alpha, beta].map(|list| list.wrapping_byte_add(group * scale_bytes));
            let raw = Raw {
                ops: [at(ta), at(tb)],
                size: [at(m), at(n), at(k)],
                scale,
                types: [a_type, b_type, c_type],
                leading: [at(lda), at(ldb), at(ldc)],
                compute,
            };
            // SAFETY: as above.
            let shape = match unsafe { raw.shape(handle, false) } {
                Ok(shape) => shape,
                Err(status) => return refuse(&mut device, what, &raw, status),
            };
            let count = at(sizes).max(0) as usize;
            list.push((shape, Places::Pointers { lists: [a, b, c], from, count }));
            from += count;
        }
        submit(&mut device, handle, what, list)
    }

    /// One product in f32.
    fn cublasSgemm_v2(
        handle: u64, ta: c_int, tb: c_int, m: c_int, n: c_int, k: c_int, alpha: *const c_void, a: u64, lda: c_int, b: u64, ldb: c_int,
        beta: *const c_void, c: u64, ldc: c_int,
    ) {
        let raw = plain([ta, tb], [m, n, k], [alpha, beta], 0, [lda, ldb, ldc]);
        // SAFETY: valid by the function's contract.
        unsafe { product(handle, "cublasSgemm_v2", &raw, Places::Strided { first: [a, b, c], strides: [0; 3], count: 1 }) }
    }

    /// One product in f64.
    fn cublasDgemm_v2(
        handle: u64, ta: c_int, tb: c_int, m: c_int, n: c_int, k: c_int, alpha: *const c_void, a: u64, lda: c_int, b: u64, ldb: c_int,
        beta: *const c_void, c: u64, ldc: c_int,
    ) {
        let raw = plain([ta, tb], [m, n, k], [alpha, beta], 1, [lda, ldb, ldc]);
        // SAFETY: valid by the function's contract.
        unsafe { product(handle, "cublasDgemm_v2", &raw, Places::Strided { first: [a, b, c], strides: [0; 3], count: 1 }) }
    }

    /// Products in f32.
    fn cublasSgemmStridedBatched(
        handle: u64, ta: c_int, tb: c_int, m: c_int, n: c_int, k: c_int, alpha: *const c_void, a: u64, lda: c_int, sa: c_longlong,
        b: u64, ldb: c_int, sb: c_longlong, beta: *const c_void, c: u64, ldc: c_int, sc: c_longlong, count: c_int,
    ) {
        let raw = plain([ta, tb], [m, n, k], [alpha, beta], 0, [lda, ldb, ldc]);
        let places = Places::Strided { first: [a, b, c], strides: [sa, sb, sc], count: count.max(0) as usize };
        // SAFETY: valid by the function's contract.
        unsafe { product(handle, "cublasSgemmStridedBatched", &raw, places) }
    }

    /// Products in f64.
    fn cublasDgemmStridedBatched(
        handle: u64, ta: c_int, tb: c_int, m: c_int, n: c_int, k: c_int, alpha: *const c_void, a: u64, lda: c_int, sa: c_longlong,
        b: u64, ldb: c_int, sb: c_longlong, beta: *const c_void, c: u64, ldc: c_int, sc: c_longlong, count: c_int,
    ) {
        let raw = plain([ta, tb], [m, n, k], [alpha, beta], 1, [lda, ldb, ldc]);
        let places = Places::Strided { first: [a, b, c], strides: [sa, sb, sc], count: count.max(0) as usize };
        // SAFETY: valid by the function's contract.
        unsafe { product(handle, "cublasDgemmStridedBatched", &raw, places) }
    }
}

/// A call whose operands all have one type.
fn plain(ops: [c_int; 2], size: [c_int; 3], scale: [*const c_void; 2], ty: c_uint, leading: [c_int; 3]) -> Raw {
    Raw { ops, size, scale, types: [ty; 3], leading, compute: if ty == 1 { COMPUTE_64F } else { COMPUTE_32F } }
}

fn set(handle: u64, what: &str, change: impl FnOnce(&mut Handle)) -> i32 {
    let mut device = device();
    count(&mut device.counts.calls, what);
    match device.blas.get_mut(&handle) {
        Some(found) => {
            change(found);
            OK
        }
        None => NOT_INITIALIZED,
    }
}
