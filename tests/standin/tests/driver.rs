//! The functions of the driver and of cuBLAS as programs call them: streams, captures, modules, products; and what a program
//! can do wrong, planted and named.

mod support;

use std::ffi::{CString, c_int, c_void};
use std::process::Command;
use std::ptr::{null, null_mut};

use cuda_standin::cublas::*;
use cuda_standin::device::{Device, device, standin_counts, standin_reset};
use cuda_standin::driver::*;
use cuda_standin::number::Brain;
use support::PLACES;

/// Runs one of the ignored tests here in a process of its own: an error of the device is for good, and counts belong to all.
fn alone(test: &str, variables: &[(&str, &str)]) -> (i32, String) {
    let mut command = Command::new(std::env::current_exe().expect("a test"));
    command.args(["--exact", test, "--ignored", "--nocapture"]).envs(variables.iter().copied());
    let output = command.output().expect("a process");
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("running 1 test"), "{said}");
    (output.status.code().expect("a code"), said)
}

/// Opens device 0 and gives a stream.
fn open() -> u64 {
    let (mut context, mut stream) = (0, 0);
    // SAFETY: all pointers are of variables here.
    unsafe {
        assert_eq!([cuInit(0), cuDevicePrimaryCtxRetain(&raw mut context, 0), cuCtxSetCurrent(context)], [0; 3]);
        assert_eq!(cuStreamCreate(&raw mut stream, 0), 0);
    }
    stream
}

fn allocate(bytes: usize, stream: u64) -> u64 {
    let mut at = 0;
    // SAFETY: a variable here.
    assert_eq!(unsafe { cuMemAllocAsync(&raw mut at, bytes, stream) }, 0);
    at
}

fn upload<T: Copy>(values: &[T], stream: u64) -> u64 {
    let at = allocate(size_of_val(values), stream);
    // SAFETY: as many bytes as the slice has.
    assert_eq!(unsafe { cuMemcpyHtoDAsync_v2(at, values.as_ptr().cast(), size_of_val(values), stream) }, 0);
    at
}

fn download<T: Copy + Default>(at: u64, count: usize, stream: u64) -> (c_int, Vec<T>) {
    let mut values = vec![T::default(); count];
    // SAFETY: as many bytes as the vector has.
    let error = unsafe { cuMemcpyDtoHAsync_v2(values.as_mut_ptr().cast(), at, size_of_val(&values[..]), stream) };
    (error, values)
}

fn kernel(text: &str) -> u64 {
    let (text, mut module, mut function) = (CString::new(text).expect("text"), 0, 0);
    // SAFETY: variables and texts here.
    unsafe {
        assert_eq!(cuModuleLoadData(&raw mut module, text.as_ptr()), 0);
        assert_eq!(cuModuleGetFunction(&raw mut function, module, c"k".as_ptr()), 0);
    }
    function
}

fn launch(function: u64, grid: u32, block: u32, shared: u32, stream: u64, params: &[u64]) -> c_int {
    let list: Vec<*const u8> = params.iter().map(|param| (&raw const *param).cast()).collect();
    // SAFETY: as many pointers as the kernel has parameters.
    unsafe { cuLaunchKernel(function, grid, 1, 1, block, 1, 1, shared, stream, list.as_ptr(), null()) }
}

/// `out[t] = in[t] + 1`, and `out[t] += 1`.
fn increment() -> u64 {
    kernel(&support::module(
        2,
        &format!("{PLACES} ld.global.u32 %r1, [%at]; add.u32 %r1, %r1, 1; st.global.u32 [%to], %r1;"),
    ))
}

fn json() -> String {
    let mut bytes = vec![0u8; 1 << 16];
    // SAFETY: the vector has so much room.
    let len = unsafe { standin_counts(bytes.as_mut_ptr(), bytes.len()) };
    String::from_utf8(bytes[..len].to_vec()).expect("text")
}

/// Runs an ignored test here with STANDIN_STRICT: it must be told all of this, and end with 97.
fn is_found(test: &str, variables: &[(&str, &str)], expected: &[&str]) {
    let (code, said) = alone(test, &[variables, &[("STANDIN_STRICT", "1")]].concat());
    assert!(
        code == 97 && expected.iter().all(|text| said.contains(text)),
        "{test}, {variables:?}: {code}, {expected:?}: {said}"
    );
}

#[test]
fn a_kernel_runs_and_is_counted() {
    let (code, said) = alone("child_increment", &[("STANDIN_STRICT", "1"), ("STANDIN_SUMMARY", "-")]);
    assert_eq!(code, 0, "{said}");
    for part in [
        "\"kernels\": 1,",
        "\"allocations\": 2,",
        "\"frees\": 2,",
        "\"bytes_up\": 128,",
        "\"bytes_down\": 128,",
        "\"waits\": 1,",
    ] {
        assert!(said.contains(part), "{part}: {said}");
    }
    assert!(
        said.contains("\"k\": 1") && said.contains("\"cuLaunchKernel\": 1") && said.contains("\"findings\": 0"),
        "{said}"
    );
}

#[test]
#[ignore = "run by another test"]
fn child_increment() {
    let stream = open();
    let (from, to) = (upload(&(0u32..32).collect::<Vec<_>>(), stream), allocate(128, stream));
    assert_eq!(launch(increment(), 1, 32, 0, stream, &[from, to]), 0);
    assert_eq!(download(to, 32, stream), (0, (1u32..33).collect()));
    // SAFETY: no pointers of the host.
    unsafe {
        assert_eq!([cuMemFreeAsync(from, stream), cuMemFreeAsync(to, stream)], [0; 2]);
    }
}

#[test]
fn planted_defects_are_found() {
    for (plant, expected) in [
        ("swap k 0 1", "nobody wrote"),
        ("free k 0", "use after free"),
        ("grid k -1", "nobody wrote"),
        ("add k 0 4", "past allocation"),
        ("block k 16", "nobody wrote"),
        ("shrink k 1 4", "past allocation"),
    ] {
        is_found("child_increment", &[("STANDIN_PLANT", plant)], &["[standin] planted: ", expected]);
    }
    is_found(
        "child_product",
        &[("STANDIN_PLANT", "beta 1")],
        &["[standin] planted: ", "reads memory that nobody wrote"],
    );
    is_found("child_barrier", &[("STANDIN_PLANT", "barrier k")], &["[standin] planted: ", "race"]);
    is_found("child_barrier", &[("STANDIN_DROP_BARRIER", "0")], &["race"]);
    assert_eq!(alone("child_barrier", &[("STANDIN_STRICT", "1"), ("STANDIN_PLANT", "barrier other")]).0, 0);
    is_found("child_increment", &[("STANDIN_PLANT", "nonsense")], &["names no defect"]);
}

#[test]
#[ignore = "run by another test"]
fn child_barrier() {
    let stream = open();
    let body = "shl.b32 %r1, %t, 2; mov.u32 %r2, pool; add.u32 %r3, %r2, %r1; st.shared.u32 [%r3], %t; bar.sync 0;
        xor.b32 %r4, %r1, 128; add.u32 %r5, %r2, %r4; ld.shared.u32 %r6, [%r5]; st.global.u32 [%to], %r6;";
    let function = kernel(&support::module(2, &format!("{PLACES} {body}")));
    let to = allocate(256, stream);
    assert_eq!(launch(function, 1, 64, 256, stream, &[to, to]), 0);
    // SAFETY: no pointers of the host.
    assert_eq!(unsafe { cuStreamSynchronize(stream) }, 0);
}

#[test]
fn what_a_program_does_wrong_is_named() {
    is_found("child_other_stream", &[], &["is used before its stream"]);
    is_found("child_no_context", &[], &["cuMemFreeAsync on a thread without a current context"]);
    is_found("child_unwritten", &[], &["copy to the host of memory that nobody wrote"]);
    is_found(
        "child_limits",
        &[],
        &["grid [0, 1, 1]", "2048", "dynamic shared memory beside", "cuMemAllocAsync of 0 bytes"],
    );
    is_found("child_twice", &[], &["free of allocation 1 again"]);
    is_found("child_unwritten", &[("STANDIN_LEAKS", "1")], &["leak: 1 allocations of 64 bytes"]);
}

#[test]
#[ignore = "run by another test"]
fn child_other_stream() {
    let stream = open();
    let other = open();
    let at = upload(&[1u32; 4], stream);
    assert_eq!(download::<u32>(at, 4, other).0, 700);
    // The error stays.
    assert_eq!(download::<u32>(at, 4, stream).0, 700);
}

#[test]
#[ignore = "run by another test"]
fn child_no_context() {
    let stream = open();
    let at = upload(&[1u32; 4], stream);
    // SAFETY: no pointers of the host.
    let free =
        |stream: u64| std::thread::spawn(move || unsafe { cuMemFreeAsync(at, stream) }).join().expect("no panic");
    // The stream of each thread belongs to the current context; one that was made knows its own.
    assert_eq!((free(2), free(stream)), (201, 0));
}

#[test]
#[ignore = "run by another test"]
fn child_unwritten() {
    let stream = open();
    let at = allocate(64, stream);
    assert_eq!(download::<u32>(at, 16, stream).0, 0);
}

#[test]
#[ignore = "run by another test"]
fn child_twice() {
    let stream = open();
    let at = allocate(64, stream);
    // SAFETY: no pointers of the host.
    unsafe {
        assert_eq!([cuMemFreeAsync(at, stream), cuMemFreeAsync(at, stream), cuStreamSynchronize(stream)], [0, 0, 1]);
    }
}

#[test]
#[ignore = "run by another test"]
fn child_limits() {
    let stream = open();
    let (function, at) = (increment(), upload(&[0u32; 32], stream));
    let held = kernel(&support::module(2, &format!("{PLACES} .shared .b8 held[1024]; st.global.u32 [%to], 0;")));
    assert_eq!(launch(function, 0, 32, 0, stream, &[at, at]), 1);
    assert_eq!(launch(function, 1, 2048, 0, stream, &[at, at]), 1);
    assert_eq!(launch(function, 1, 32, 100_000, stream, &[at, at]), 1);
    // SAFETY: no pointers of the host but that of a variable.
    unsafe {
        assert_eq!(cuFuncSetAttribute(function, 8, 100_000), 0);
        assert_eq!(cuFuncSetAttribute(function, 8, 300_000), 1);
        assert_eq!(launch(function, 1, 32, 100_000, stream, &[at, at]), 0);
        // Beside a static part less is left, unless the program asks for more.
        assert_eq!([47 << 10, 48 << 10].map(|bytes| launch(held, 1, 32, bytes, stream, &[at, at])), [0, 1]);
        assert_eq!(cuFuncSetAttribute(held, 8, 48 << 10), 0);
        assert_eq!(launch(held, 1, 32, 48 << 10, stream, &[at, at]), 0);
        let mut none = 1;
        assert_eq!(cuMemAllocAsync(&raw mut none, 0, stream), 0);
        assert_eq!(none, 0);
    }
}

#[test]
fn other_machines() {
    let (code, said) = alone("child_machine", &[("STANDIN_CC", "7.5"), ("EXPECTED", "218")]);
    assert_eq!(code, 0, "{said}");
    let (code, said) = alone("child_machine", &[("STANDIN_DRIVER", "11080"), ("EXPECTED", "222")]);
    assert_eq!(code, 0, "{said}");
    let (code, said) = alone("child_machine", &[("STANDIN_CC", "8.6"), ("STANDIN_DRIVER", "12000"), ("EXPECTED", "0")]);
    assert_eq!(code, 0, "{said}");
    let (code, said) =
        alone("child_memory", &[("STANDIN_MEMORY", "1000"), ("STANDIN_DEVICES", "2"), ("STANDIN_NO_CUBLAS", "1")]);
    assert_eq!(code, 0, "{said}");
}

#[test]
#[ignore = "run by another test"]
fn child_machine() {
    open();
    let (text, mut module) = (CString::new(support::module(0, "")).expect("text"), 0);
    let expected = std::env::var_os("EXPECTED").expect("set").into_string().expect("text");
    // SAFETY: a variable and a text here.
    assert_eq!(unsafe { cuModuleLoadData(&raw mut module, text.as_ptr()) }, expected.parse::<i32>().expect("a number"));
}

#[test]
#[ignore = "run by another test"]
fn child_memory() {
    let stream = open();
    let (mut at, mut count, mut handle) = (0, 0, 0);
    // SAFETY: variables here.
    unsafe {
        assert_eq!(cuMemAllocAsync(&raw mut at, 1001, stream), 2);
        assert_eq!(cuMemAllocAsync(&raw mut at, 900, stream), 0);
        assert_eq!(cuDeviceGetCount(&raw mut count), 0);
        assert_eq!(cuDeviceGet(&raw mut count, 2), 101);
        assert_eq!(cublasCreate_v2(&raw mut handle), 1);
        let (mut used, mut free, mut total, mut pool) = (0u64, 0, 0, 0);
        assert_eq!(cuDeviceGetDefaultMemPool(&raw mut pool, 0), 0);
        assert_eq!(cuMemPoolGetAttribute(pool, 7, &raw mut used), 0);
        assert_eq!(cuMemGetInfo_v2(&raw mut free, &raw mut total), 0);
        assert_eq!((used, free, total), (900, 100, 1000));
        assert_eq!([cuMemFreeAsync(at, stream), cuStreamSynchronize(stream)], [0, 0]);
        assert_eq!(cuMemPoolGetAttribute(pool, 8, &raw mut used), 0);
        assert_eq!(used, 900);
        let (zero, most) = (0u64, u64::MAX);
        assert_eq!(
            [cuMemPoolSetAttribute(pool, 8, &raw const zero), cuMemPoolSetAttribute(pool, 4, &raw const most)],
            [0; 2]
        );
        assert_eq!(cuMemPoolGetAttribute(pool, 8, &raw mut used), 0);
        assert_eq!(used, 0);
    }
}

#[test]
fn captures_are_replayed() {
    let (code, said) = alone("child_capture", &[]);
    assert_eq!(code, 0, "{said}");
    assert!(said.contains("cuStreamSynchronize while a stream is being captured"), "{said}");
}

#[test]
#[ignore = "run by another test"]
fn child_capture() {
    let stream = open();
    let (function, at) = (increment(), upload(&[0u32; 32], stream));
    let (mut graph, mut executable, mut status) = (0, 0, 9);
    // SAFETY: variables here.
    unsafe {
        assert_eq!(cuStreamBeginCapture_v2(stream, 0), 0);
        assert_eq!([cuStreamIsCapturing(stream, &raw mut status), status as i32], [0, 1]);
        let inside = allocate(128, stream);
        assert_eq!(launch(function, 1, 32, 0, stream, &[at, inside]), 0);
        assert_eq!(launch(function, 1, 32, 0, stream, &[inside, at]), 0);
        assert_eq!(cuMemFreeAsync(inside, stream), 0);
        assert_eq!(cuStreamEndCapture(stream, &raw mut graph), 0);
        assert_eq!(cuGraphInstantiateWithFlags(&raw mut executable, graph, 0), 0);
        assert_eq!(download::<u32>(at, 32, stream), (0, vec![0; 32]), "a capture does nothing");
        for n in 1..4 {
            assert_eq!(cuGraphLaunch(executable, stream), 0);
            assert_eq!(download::<u32>(at, 32, stream), (0, vec![2 * n; 32]));
        }
        assert_eq!([cuGraphExecDestroy(executable), cuGraphDestroy(graph), cuGraphDestroy(graph)], [0, 0, 400]);
        // Waiting is forbidden, and the capture is lost.
        assert_eq!([cuStreamBeginCapture_v2(stream, 0), cuStreamSynchronize(stream)], [0, 900]);
        assert_eq!(launch(function, 1, 32, 0, stream, &[at, at]), 901);
        assert_eq!(
            [cuStreamEndCapture(stream, &raw mut graph), cuStreamEndCapture(stream, &raw mut graph)],
            [901, 401]
        );
        let (mut event, other) = (0, open());
        assert_eq!(cuEventCreate(&raw mut event, 0), 0);
        // Another stream takes part through an event; waiting for it is forbidden.
        assert_eq!(
            [cuStreamBeginCapture_v2(stream, 0), cuEventRecord(event, stream), cuStreamWaitEvent(other, event, 0)],
            [0; 3]
        );
        assert_eq!(launch(function, 1, 32, 0, other, &[at, at]), 0);
        assert_eq!([cuEventSynchronize(event), cuStreamEndCapture(stream, &raw mut graph)], [907, 901]);
        assert_eq!(download::<u32>(at, 32, other), (0, vec![6; 32]));
    }
}

#[test]
fn products_are_right() {
    let (code, said) = alone("child_product", &[("STANDIN_STRICT", "1")]);
    assert_eq!(code, 0, "{said}");
}

/// Every way to ask for a product gives what the definition says; in f32, bf16, and of both.
#[test]
#[ignore = "run by another test"]
fn child_product() {
    let stream = open();
    let mut blas = 0;
    let (m, n, k) = (3usize, 5, 20);
    let left: Vec<f32> = (0..m * k).map(|i| (i % 7) as f32 - 3.0).collect();
    let right: Vec<f32> = (0..n * k).map(|i| (i % 5) as f32 * 0.5).collect();
    let brain = |values: &[f32]| values.iter().map(|&x| Brain::round(x).0).collect::<Vec<u16>>();
    // SAFETY: variables and arrays here.
    unsafe {
        assert_eq!([cublasCreate_v2(&raw mut blas), cublasSetStream_v2(blas, stream)], [0; 2]);
        let (one, zero) = (1f32, 0f32);
        let (alpha, beta): (*const c_void, *const c_void) = ((&raw const one).cast(), (&raw const zero).cast());
        for (input, output) in [(0u32, 0u32), (14, 14), (14, 0)] {
            for (ta, tb) in [(0, 0), (1, 0), (0, 1), (1, 1)] {
                let put =
                    |values: &[f32]| if input == 0 { upload(values, stream) } else { upload(&brain(values), stream) };
                let (a, b) = (put(&left), put(&right));
                let bytes: u32 = if output == 0 { 4 } else { 2 };
                let expected: Vec<f32> = (0..m * n)
                    .map(|at| {
                        let (i, j) = (at % m, at / m);
                        let x = |p: usize| left[if ta == 1 { i * k + p } else { p * m + i }];
                        let y = |p: usize| right[if tb == 1 { p * n + j } else { j * k + p }];
                        (0..k).map(|p| x(p) * y(p)).sum()
                    })
                    .collect();
                let (lda, ldb) = (if ta == 1 { k } else { m } as c_int, if tb == 1 { n } else { k } as c_int);
                let (m, n, k) = (m as c_int, n as c_int, k as c_int);
                let lists = |c: u64| [[a, a], [b, b], [c, c + u64::from(bytes) * 15]].map(|list| upload(&list, stream));
                for way in 0..4 {
                    if way == 3 && input != output {
                        continue; // groups have one type
                    }
                    let c = allocate(2 * 15 * bytes as usize, stream);
                    let [la, lb, lc] = lists(c);
                    let count = if way == 0 { 1 } else { 2 };
                    let status = match way {
                        0 => cublasGemmEx(
                            blas, ta, tb, m, n, k, alpha, a, input, lda, b, input, ldb, beta, c, output, m, 68, -1,
                        ),
                        1 => cublasGemmStridedBatchedEx(
                            blas, ta, tb, m, n, k, alpha, a, input, lda, 0, b, input, ldb, 0, beta, c, output, m, 15,
                            2, 68, -1,
                        ),
                        2 => cublasGemmBatchedEx(
                            blas, ta, tb, m, n, k, alpha, la, input, lda, lb, input, ldb, beta, lc, output, m, 2, 68,
                            -1,
                        ),
                        _ => cublasGemmGroupedBatchedEx(
                            blas,
                            [ta; 2].as_ptr(),
                            [tb; 2].as_ptr(),
                            [m; 2].as_ptr(),
                            [n; 2].as_ptr(),
                            [k; 2].as_ptr(),
                            [one; 2].as_ptr().cast(),
                            la,
                            input,
                            [lda; 2].as_ptr(),
                            lb,
                            input,
                            [ldb; 2].as_ptr(),
                            [zero; 2].as_ptr().cast(),
                            lc,
                            output,
                            [m; 2].as_ptr(),
                            2,
                            [1; 2].as_ptr(),
                            68,
                        ),
                    };
                    assert_eq!(status, 0);
                    let expected: Vec<f32> = (0..count).flat_map(|_| expected.clone()).collect();
                    if output == 0 {
                        assert_eq!(download::<f32>(c, count * 15, stream), (0, expected), "way {way}, {ta}{tb}");
                    } else {
                        assert_eq!(
                            download::<u16>(c, count * 15, stream),
                            (0, brain(&expected)),
                            "way {way}, {ta}{tb}"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn wrong_products_are_refused() {
    is_found(
        "child_wrong_product",
        &[],
        &["types that it does not support together", "values that are not valid", "B: ", "past allocation"],
    );
}

#[test]
#[ignore = "run by another test"]
fn child_wrong_product() {
    let stream = open();
    let (mut blas, one) = (0, 1f32);
    let scale: *const c_void = (&raw const one).cast();
    // SAFETY: variables here.
    unsafe {
        assert_eq!([cublasCreate_v2(&raw mut blas), cublasSetStream_v2(blas, stream)], [0; 2]);
        let at = upload(&[1f32; 16], stream);
        let product = |lda, types: [u32; 3], k| {
            cublasGemmEx(blas, 0, 0, 4, 4, k, scale, at, types[0], lda, at, types[1], 4, scale, at, types[2], 4, 68, -1)
        };
        assert_eq!(product(4, [0, 14, 0], 4), 15);
        assert_eq!(product(4, [0, 0, 14], 4), 15);
        assert_eq!(product(3, [0; 3], 4), 7);
        // A fault comes later, on the stream.
        let short = upload(&[1f32; 12], stream);
        assert_eq!(cublasGemmEx(blas, 0, 0, 4, 4, 4, scale, at, 0, 4, short, 0, 4, scale, at, 0, 4, 68, -1), 0);
        assert_eq!(cuStreamSynchronize(stream), 700);
    }
}

#[test]
fn pinned_memory_and_streams_of_threads() {
    let (code, said) = alone("child_pinned", &[("STANDIN_STRICT", "1")]);
    assert_eq!(code, 0, "{said}");
}

#[test]
#[ignore = "run by another test"]
fn child_pinned() {
    let stream = open();
    let mut host = 0;
    // SAFETY: pinned memory of 8 bytes, and variables here.
    unsafe {
        assert_eq!(cuMemHostAlloc(&raw mut host, 8, 0), 0);
        let pinned = host as *mut u32;
        *pinned = 7;
        let at = allocate(4, stream);
        assert_eq!(cuMemcpyHtoDAsync_v2(at, pinned.cast(), 4, stream), 0);
        // The copy has not begun: what is written now is what it takes.
        *pinned = 8;
        assert_eq!(cuMemcpyDtoHAsync_v2(pinned.add(1).cast(), at, 4, stream), 0);
        assert_eq!((*pinned.add(1), cuStreamQuery(stream)), (0, 600), "not there before the wait");
        assert_eq!([cuStreamSynchronize(stream), cuStreamQuery(stream)], [0, 0]);
        assert_eq!(*pinned.add(1), 8);
        // A stream waits for another through an event.
        let (mut event, other) = (0, open());
        let fresh = upload(&[5u32], stream);
        assert_eq!(
            [cuEventCreate(&raw mut event, 2), cuEventRecord(event, stream), cuStreamWaitEvent(other, event, 0)],
            [0; 3]
        );
        assert_eq!(download::<u32>(fresh, 1, other), (0, vec![5]));
        assert_eq!([cuMemsetD32Async(fresh, 9, 1, 2), cuStreamSynchronize(2)], [0; 2]);
        assert_eq!(download::<u32>(fresh, 1, stream), (0, vec![9]));
        assert_eq!([cuMemFreeHost(host), cuMemFreeHost(host), cuEventDestroy_v2(event)], [0, 1, 0]);
    }
}

#[test]
fn counts_are_read_and_reset() {
    let (code, said) = alone("child_counts", &[]);
    assert_eq!(code, 0, "{said}");
}

#[test]
#[ignore = "run by another test"]
fn child_counts() {
    let stream = open();
    upload(&[1u32; 4], stream);
    assert!(json().contains("\"bytes_up\": 16,"));
    standin_reset();
    assert!(json().contains("\"bytes_up\": 0,") && json().contains("\"allocations\": 0,"));
    // Too little room: the length is told nevertheless.
    let mut small = [1u8; 4];
    // SAFETY: four bytes.
    assert_eq!(unsafe { standin_counts(small.as_mut_ptr(), 4) }, json().len());
    assert_eq!(small[3], 0);
    // SAFETY: asked for with no room.
    assert_eq!(unsafe { standin_counts(null_mut(), 0) }, json().len());
    let held: &Device = &device();
    assert_eq!(held.sticky, 0);
}
