//! Arguments of kernels, fresh tensors, and the launch itself.

use candle_core::backend::BackendDevice;
use candle_core::cuda_backend::cudarc::driver::sys::CUfunction_attribute;
use candle_core::cuda_backend::cudarc::driver::{DevicePtr, LaunchConfig, PushKernelArg};
use candle_core::cuda_backend::{CudaStorageSlice, WrapErr};
use candle_core::op::BackpropOp;
use candle_core::{CudaDevice, DType, Device, Shape, Storage, Tensor};

use crate::error::{Error, Result};

/// Kernels that `build.rs` compiled together, under a name for candle to keep them by.
pub(super) struct Kernels {
    pub(super) module: &'static str,
    pub(super) ptx: &'static str,
}

/// Those of `kernels.cu`.
const KERNELS: Kernels = Kernels { module: "titer", ptx: include_str!(concat!(env!("OUT_DIR"), "/kernels.ptx")) };

/// Chunks that the elements of each tensor are split into where a kernel works on many at once.
pub(super) const CHUNKS: u32 = 32;

/// Threads per block.
pub(super) const BLOCK: u32 = 256;

/// Words that a kernel may be given by value: addresses and lengths of many tensors, without an upload.
pub(super) const TABLE: usize = 240;

/// One argument of a kernel.
pub(super) enum Arg {
    U32(u32),
    /// A count or an address.
    U64(u64),
    F32(f32),
    /// `Table` of `kernels.cu`.
    Table(Box<[u64; TABLE]>),
    /// `Problem` of `attention.cu`.
    Problem([u32; 9]),
}

/// The blocks of a launch, the threads of each, and its bytes of dynamic shared memory.
pub(super) struct Grid {
    pub(super) blocks: [u32; 2],
    pub(super) threads: u32,
    pub(super) shared: usize,
}

impl Grid {
    /// So many blocks of the usual size.
    pub(super) fn of(blocks: usize) -> Self {
        Self { blocks: [blocks as u32, 1], threads: BLOCK, shared: 0 }
    }
}

pub(super) fn device(tensor: &Tensor) -> Result<CudaDevice> {
    match tensor.device() {
        Device::Cuda(device) => Ok(device.clone()),
        _ => Err(Error::device("a device kernel was given a tensor of the host")),
    }
}

/// Where the first element of a contiguous tensor of type `dtype` lies. Kernels on one stream run in order, so the
/// address stays valid for all that are queued while the tensor lives.
pub(super) fn address(tensor: &Tensor, dtype: DType) -> Result<u64> {
    if tensor.dtype() != dtype {
        return Err(Error::run(format!("a device kernel was given {:?} instead of {dtype:?}", tensor.dtype()))
            .help("convert it with `to_dtype` first"));
    }
    if !tensor.is_contiguous() {
        return Err(Error::run("a device kernel was given a tensor that is not contiguous")
            .help("call `contiguous` first; a tensor that is written in place must be contiguous itself"));
    }
    let (storage, layout) = tensor.storage_and_layout();
    let Storage::Cuda(storage) = &*storage else {
        return Err(Error::device("a device kernel was given a tensor of the host"));
    };
    let stream = storage.device.cuda_stream();
    let base = match &storage.slice {
        CudaStorageSlice::F32(slice) => slice.device_ptr(&stream).0,
        CudaStorageSlice::BF16(slice) => slice.device_ptr(&stream).0,
        CudaStorageSlice::U32(slice) => slice.device_ptr(&stream).0,
        _ => return Err(no_kernel(tensor.dtype())),
    };
    Ok(base + (layout.start_offset() * tensor.dtype().size_in_bytes()) as u64)
}

/// The address as an argument.
pub(super) fn at(tensor: &Tensor, dtype: DType) -> Result<Arg> {
    address(tensor, dtype).map(Arg::U64)
}

/// A fresh tensor whose elements the caller's kernel writes, all of them.
pub(in crate::tensor) fn fresh(like: &Tensor, shape: impl Into<Shape>, dtype: DType) -> Result<Tensor> {
    fresh_on(&device(like)?, shape.into(), dtype)
}

/// As [`fresh`], on a device.
pub(super) fn fresh_on(device: &CudaDevice, shape: Shape, dtype: DType) -> Result<Tensor> {
    // SAFETY: the kernel that follows fills it before anybody reads it.
    let storage = unsafe { device.alloc_uninit(&shape, dtype)? };
    Ok(Tensor::from_storage(Storage::Cuda(storage), shape, BackpropOp::none(), false))
}

/// Numbers for a kernel to read.
pub(super) fn upload<T: candle_core::WithDType>(like: &Tensor, values: Vec<T>) -> Result<Tensor> {
    let count = values.len();
    Ok(Tensor::from_vec(values, count, like.device())?)
}

/// Queues a kernel.
pub(super) fn launch_from(kernels: &Kernels, on: &Tensor, name: &str, grid: Grid, arguments: &[Arg]) -> Result<()> {
    let function = device(on)?.get_or_load_custom_func(name, kernels.module, kernels.ptx)?;
    if grid.shared > 0 {
        // Without asking, a kernel may have 48 KiB, its static part included.
        let attribute = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        function.set_attribute(attribute, grid.shared as i32).w()?;
    }
    let mut builder = function.builder();
    for argument in arguments {
        match argument {
            Arg::U32(value) => builder.arg(value),
            Arg::U64(value) => builder.arg(value),
            Arg::F32(value) => builder.arg(value),
            Arg::Table(value) => builder.arg(&**value),
            Arg::Problem(value) => builder.arg(value),
        };
    }
    let config = LaunchConfig {
        grid_dim: (grid.blocks[0].max(1), grid.blocks[1].max(1), 1),
        block_dim: (grid.threads, 1, 1),
        shared_mem_bytes: grid.shared as u32,
    };
    // SAFETY: each caller passes what its kernel declares, with addresses of tensors of the declared sizes.
    unsafe { builder.launch(config) }.w()?;
    Ok(())
}

/// Queues a kernel on as many tensors at a time as fit into a table: each has a row of words there, and `arguments` are
/// those that follow the table, given the number of the first of them.
pub(super) fn launch_tables<const WORDS: usize>(
    on: &Tensor,
    name: &str,
    rows: &[[u64; WORDS]],
    arguments: impl Fn(usize) -> Vec<Arg>,
) -> Result<()> {
    let at_once = TABLE / WORDS;
    for (part, rows) in rows.chunks(at_once).enumerate() {
        let mut table = Box::new([0; TABLE]);
        for (to, word) in table.iter_mut().zip(rows.as_flattened()) {
            *to = *word;
        }
        let mut all = vec![Arg::Table(table)];
        all.extend(arguments(part * at_once));
        launch_grid(on, name, [CHUNKS, rows.len() as u32], &all)?;
    }
    Ok(())
}

/// Queues one of `kernels.cu` on blocks `[x, y]`.
pub(super) fn launch_grid(on: &Tensor, name: &str, blocks: [u32; 2], arguments: &[Arg]) -> Result<()> {
    launch_from(&KERNELS, on, name, Grid { blocks, threads: BLOCK, shared: 0 }, arguments)
}

/// Queues the one for the element type of `on`.
pub(super) fn launch(on: &Tensor, name: &str, blocks: usize, arguments: &[Arg]) -> Result<()> {
    launch_typed(on, name, [blocks as u32, 1], arguments)
}

/// As [`launch`], on blocks `[x, y]`.
pub(super) fn launch_typed(on: &Tensor, name: &str, blocks: [u32; 2], arguments: &[Arg]) -> Result<()> {
    launch_grid(on, &per_type(name, on.dtype())?, blocks, arguments)
}

/// The name of a kernel for an element type.
pub(super) fn per_type(name: &str, dtype: DType) -> Result<String> {
    match dtype {
        DType::F32 => Ok(format!("{name}_f32")),
        DType::BF16 => Ok(format!("{name}_bf16")),
        other => Err(no_kernel(other)),
    }
}

/// Blocks for a kernel that strides over `count` elements.
pub(super) fn blocks(count: usize) -> usize {
    count.div_ceil(BLOCK as usize).min(4096)
}

fn no_kernel(dtype: DType) -> Error {
    Error::device(format!("no device kernel for {dtype:?}")).help("use f32 or bf16")
}
