//! Launches of the kernels in `cuda/kernels.cu` and of cuBLAS products. Everything is queued on candle's stream of the
//! device, and nothing here waits for it.

#![allow(unsafe_code, reason = "kernel launches and library calls take raw device addresses")]

use candle_core::backend::BackendDevice;
use candle_core::cuda_backend::cudarc::cublas::{result as blas, sys};
use candle_core::cuda_backend::cudarc::driver::{DevicePtr, LaunchConfig, PushKernelArg};
use candle_core::cuda_backend::{CudaStorageSlice, WrapErr};
use candle_core::op::BackpropOp;
use candle_core::{CudaDevice, DType, Device, Shape, Storage, Tensor};
use titer_kernels::activation::Activation;
use titer_kernels::adamw::AdamWStep;
use titer_kernels::attention::Attention;

use super::host::last_dim;
use super::mask::AttentionMask;
use super::scalar::Scalar;
use crate::error::{Error, Result};

/// The kernels, compiled by `build.rs`.
const PTX: &str = include_str!(concat!(env!("OUT_DIR"), "/kernels.ptx"));

/// Threads per block.
const BLOCK: u32 = 256;

/// Chunks that a sum over one tensor is split into.
const CHUNKS: u32 = 32;

/// One argument of a kernel.
#[derive(Clone, Copy)]
enum Arg {
    U32(u32),
    /// A count or an address.
    U64(u64),
    F32(f32),
}

fn device(tensor: &Tensor) -> Result<CudaDevice> {
    match tensor.device() {
        Device::Cuda(device) => Ok(device.clone()),
        _ => Err(Error::device("a device kernel was given a tensor of the host")),
    }
}

/// Where the first element of a contiguous tensor lies. Kernels on one stream run in order, so the address stays valid
/// for all that are queued while the tensor lives.
fn address(tensor: &Tensor) -> Result<u64> {
    if !tensor.is_contiguous() {
        return Err(Error::run("a device kernel was given a tensor that is not contiguous"));
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
        _ => return Err(Error::device(format!("no device kernel for {:?}", tensor.dtype())).help("use f32 or bf16")),
    };
    Ok(base + (layout.start_offset() * tensor.dtype().size_in_bytes()) as u64)
}

fn at(tensor: &Tensor) -> Result<Arg> {
    address(tensor).map(Arg::U64)
}

/// A fresh tensor whose elements the caller's kernel writes, all of them.
pub(super) fn fresh(like: &Tensor, shape: impl Into<Shape>, dtype: DType) -> Result<Tensor> {
    let (device, shape) = (device(like)?, shape.into());
    // SAFETY: the kernel that follows fills it before anybody reads it.
    let storage = unsafe { device.alloc_uninit(&shape, dtype)? };
    Ok(Tensor::from_storage(Storage::Cuda(storage), shape, BackpropOp::none(), false))
}

/// Numbers for a kernel to read.
fn upload<T: candle_core::WithDType>(like: &Tensor, values: Vec<T>) -> Result<Tensor> {
    let count = values.len();
    Ok(Tensor::from_vec(values, count, like.device())?)
}

/// Queues a kernel on blocks `[x, y]`.
fn launch_grid(on: &Tensor, name: &str, blocks: [u32; 2], arguments: &[Arg]) -> Result<()> {
    let function = device(on)?.get_or_load_custom_func(name, "titer", PTX)?;
    let mut builder = function.builder();
    for argument in arguments {
        match argument {
            Arg::U32(value) => builder.arg(value),
            Arg::U64(value) => builder.arg(value),
            Arg::F32(value) => builder.arg(value),
        };
    }
    let config = LaunchConfig {
        grid_dim: (blocks[0].max(1), blocks[1].max(1), 1),
        block_dim: (BLOCK, 1, 1),
        shared_mem_bytes: 0,
    };
    // SAFETY: each caller passes what its kernel declares, with addresses of tensors of the declared sizes.
    unsafe { builder.launch(config) }.w()?;
    Ok(())
}

/// Queues the kernel for the element type of `on`.
fn launch(on: &Tensor, name: &str, blocks: usize, arguments: &[Arg]) -> Result<()> {
    let suffix = match on.dtype() {
        DType::F32 => "f32",
        DType::BF16 => "bf16",
        other => return Err(Error::device(format!("no device kernel for {other:?}")).help("use f32 or bf16")),
    };
    launch_grid(on, &format!("{name}_{suffix}"), [blocks as u32, 1], arguments)
}

/// Blocks for a kernel that strides over `count` elements.
fn blocks(count: usize) -> usize {
    count.div_ceil(BLOCK as usize).min(4096)
}

fn rows_of(x: &Tensor) -> usize {
    x.elem_count() / last_dim(x).max(1)
}

pub(super) fn rms_norm(x: &Tensor, w: &Tensor, eps: f64) -> Result<Tensor> {
    let y = fresh(x, x.shape(), x.dtype())?;
    let arguments = [at(x)?, at(w)?, at(&y)?, Arg::U32(last_dim(x) as u32), Arg::F32(eps as f32)];
    launch(x, "rms_norm_fwd", rows_of(x), &arguments)?;
    Ok(y)
}

pub(super) fn rms_norm_backward(
    x: &Tensor,
    w: &Tensor,
    g: &Tensor,
    eps: f64,
    wants_weight: bool,
) -> Result<(Tensor, Option<Tensor>)> {
    let (width, rows) = (last_dim(x), rows_of(x));
    let (dx, r) = (fresh(x, x.shape(), x.dtype())?, fresh(x, rows, DType::F32)?);
    let arguments = [at(x)?, at(w)?, at(g)?, at(&dx)?, at(&r)?, Arg::U32(width as u32), Arg::F32(eps as f32)];
    launch(x, "rms_norm_bwd", rows, &arguments)?;
    if !wants_weight {
        return Ok((dx, None));
    }
    let dw = fresh(x, width, DType::F32)?;
    let arguments = [at(x)?, at(g)?, at(&r)?, at(&dw)?, Arg::U64(rows as u64), Arg::U32(width as u32)];
    launch(x, "rms_norm_dw", blocks(width), &arguments)?;
    Ok((dx, Some(dw.to_dtype(w.dtype())?)))
}

pub(super) fn layer_norm(x: &Tensor, w: &Tensor, b: &Tensor, eps: f64) -> Result<Tensor> {
    let y = fresh(x, x.shape(), x.dtype())?;
    let arguments = [at(x)?, at(w)?, at(b)?, at(&y)?, Arg::U32(last_dim(x) as u32), Arg::F32(eps as f32)];
    launch(x, "layer_norm_fwd", rows_of(x), &arguments)?;
    Ok(y)
}

pub(super) fn layer_norm_backward(
    x: &Tensor,
    w: &Tensor,
    g: &Tensor,
    eps: f64,
    wants_weight: bool,
) -> Result<(Tensor, Option<(Tensor, Tensor)>)> {
    let (width, rows) = (last_dim(x), rows_of(x));
    let (dx, stats) = (fresh(x, x.shape(), x.dtype())?, fresh(x, (rows, 2), DType::F32)?);
    let arguments = [at(x)?, at(w)?, at(g)?, at(&dx)?, at(&stats)?, Arg::U32(width as u32), Arg::F32(eps as f32)];
    launch(x, "layer_norm_bwd", rows, &arguments)?;
    if !wants_weight {
        return Ok((dx, None));
    }
    let (dw, db) = (fresh(x, width, DType::F32)?, fresh(x, width, DType::F32)?);
    let arguments = [at(x)?, at(g)?, at(&stats)?, at(&dw)?, at(&db)?, Arg::U64(rows as u64), Arg::U32(width as u32)];
    launch(x, "layer_norm_dwdb", blocks(width), &arguments)?;
    Ok((dx, Some((dw.to_dtype(w.dtype())?, db.to_dtype(w.dtype())?))))
}

pub(super) fn rotate(x: &Tensor, [cos, sin]: [&Tensor; 2], direction: f64) -> Result<Tensor> {
    let (tokens, half) = cos.dims2()?;
    let (y, heads) = (fresh(x, x.shape(), x.dtype())?, x.elem_count() / (tokens * 2 * half));
    let tables = [at(cos)?, at(sin)?, Arg::U64(tokens as u64)];
    let [cos, sin, tokens] = tables;
    let arguments =
        [at(x)?, at(&y)?, cos, sin, tokens, Arg::U32(heads as u32), Arg::U32(half as u32), Arg::F32(direction as f32)];
    launch(x, "rope", blocks(x.elem_count() / 2), &arguments)?;
    Ok(y)
}

pub(super) fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    let (y, count) = (fresh(gate, gate.shape(), gate.dtype())?, gate.elem_count());
    launch(gate, "swiglu_fwd", blocks(count), &[at(gate)?, at(up)?, at(&y)?, Arg::U64(count as u64)])?;
    Ok(y)
}

pub(super) fn swiglu_backward(gate: &Tensor, up: &Tensor, g: &Tensor) -> Result<(Tensor, Tensor)> {
    let like = || fresh(gate, gate.shape(), gate.dtype());
    let (dgate, dup, count) = (like()?, like()?, gate.elem_count());
    let arguments = [at(gate)?, at(up)?, at(g)?, at(&dgate)?, at(&dup)?, Arg::U64(count as u64)];
    launch(gate, "swiglu_bwd", blocks(count), &arguments)?;
    Ok((dgate, dup))
}

fn kind(activation: Activation) -> Arg {
    Arg::U32(match activation {
        Activation::Relu => 0,
        Activation::GeluTanh => 1,
        Activation::Gelu => 2,
        Activation::Silu => 3,
    })
}

pub(super) fn activation(activation: Activation, x: &Tensor) -> Result<Tensor> {
    let (y, count) = (fresh(x, x.shape(), x.dtype())?, x.elem_count());
    launch(x, "activation_fwd", blocks(count), &[at(x)?, at(&y)?, Arg::U64(count as u64), kind(activation)])?;
    Ok(y)
}

pub(super) fn activation_backward(activation: Activation, x: &Tensor, g: &Tensor) -> Result<Tensor> {
    let (dx, count) = (fresh(x, x.shape(), x.dtype())?, x.elem_count());
    let arguments = [at(x)?, at(g)?, at(&dx)?, Arg::U64(count as u64), kind(activation)];
    launch(x, "activation_bwd", blocks(count), &arguments)?;
    Ok(dx)
}

pub(super) fn add_bias(y: &Tensor, bias: &Tensor) -> Result<()> {
    let arguments = [at(y)?, at(bias)?, Arg::U64(rows_of(y) as u64), Arg::U32(last_dim(y) as u32)];
    launch(y, "add_bias", blocks(y.elem_count()), &arguments)
}

pub(super) fn sum_rows(g: &Tensor) -> Result<Tensor> {
    let sum = fresh(g, last_dim(g), DType::F32)?;
    let arguments = [at(g)?, at(&sum)?, Arg::U64(rows_of(g) as u64), Arg::U32(last_dim(g) as u32)];
    launch(g, "sum_rows", blocks(last_dim(g)), &arguments)?;
    Ok(sum.to_dtype(g.dtype())?)
}

pub(super) fn scatter_rows(g: &Tensor, index: &Tensor, shape: &[usize]) -> Result<Tensor> {
    let dx = Tensor::zeros(shape, g.dtype(), g.device())?;
    let arguments = [at(&dx)?, at(g)?, at(index)?, Arg::U64(rows_of(g) as u64), Arg::U32(last_dim(g) as u32)];
    launch(g, "scatter_rows", blocks(g.elem_count()), &arguments)?;
    Ok(dx)
}

pub(super) fn add_assign(a: &Tensor, b: &Tensor) -> Result<()> {
    let (b, count) = (b.contiguous()?, a.elem_count());
    launch(a, "add_assign", blocks(count), &[at(a)?, at(&b)?, Arg::U64(count as u64)])
}

pub(super) fn cache_write(store: &Tensor, fresh: &Tensor, rows: &[usize], starts: &[usize]) -> Result<()> {
    let ((batch, new, width), slots) = (fresh.dims3()?, store.dims()[1]);
    let table = upload(fresh, rows.iter().chain(starts).map(|&n| n as u32).collect())?;
    let (rows, starts) = (address(&table)?, address(&table)? + (batch * size_of::<u32>()) as u64);
    let arguments = [
        at(store)?,
        at(fresh)?,
        Arg::U64(rows),
        Arg::U64(starts),
        Arg::U32(new as u32),
        Arg::U32(slots as u32),
        Arg::U64(width as u64),
    ];
    launch(fresh, "cache_write", batch * new, &arguments)
}

/// The norm of all tensors together.
pub(super) fn norm(tensors: &[&Tensor]) -> Result<Scalar> {
    let wide = tensors.iter().map(|t| t.contiguous()?.to_dtype(DType::F32)).collect::<candle_core::Result<Vec<_>>>()?;
    let first = &wide[0];
    let pointers = wide.iter().map(|t| address(t).map(|address| address as i64)).collect::<Result<Vec<i64>>>()?;
    let lengths = wide.iter().map(|t| t.elem_count() as i64).collect();
    let (pointers, lengths) = (upload(first, pointers)?, upload(first, lengths)?);
    let partials = fresh(first, wide.len() * CHUNKS as usize, DType::F32)?;
    let arguments = [Arg::U64(words(&pointers)?), Arg::U64(words(&lengths)?), at(&partials)?];
    launch_grid(first, "sum_squares_many", [CHUNKS, wide.len() as u32], &arguments)?;
    let result = fresh(first, 2, DType::F32)?;
    let arguments = [at(&partials)?, Arg::U64(partials.elem_count() as u64), Arg::F32(0.), at(&result)?];
    launch_grid(first, "norm_finish", [1, 1], &arguments)?;
    Ok(Scalar::Device(result.get(0)?))
}

/// The address of a tensor of 64-bit words.
fn words(tensor: &Tensor) -> Result<u64> {
    let (storage, _) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cuda(storage) => match &storage.slice {
            CudaStorageSlice::I64(slice) => Ok(slice.device_ptr(&storage.device.cuda_stream()).0),
            _ => Err(Error::run("a table of another type")),
        },
        _ => Err(Error::device("a table on the host")),
    }
}

pub(super) fn adamw(tensors: &[&[Tensor; 3]], factor: &Scalar, step: &AdamWStep) -> Result<()> {
    let first = &tensors[0][0];
    let factor = match factor {
        Scalar::Host(value) => upload(first, vec![*value as f32])?,
        Scalar::Device(tensor) => tensor.reshape(1)?,
    };
    let mut table = Vec::with_capacity(4 * tensors.len());
    for [parameter, gradient, moments] in tensors {
        let second = (parameter.elem_count() * size_of::<f32>()) as u64;
        let first = address(moments)?;
        table.extend([address(parameter)?, address(gradient)?, first, first + second].map(|word| word as i64));
    }
    let lengths = tensors.iter().map(|[parameter, ..]| parameter.elem_count() as i64).collect();
    let (table, lengths) = (upload(first, table)?, upload(first, lengths)?);
    let arguments = [
        Arg::U64(words(&table)?),
        Arg::U64(words(&lengths)?),
        at(&factor)?,
        Arg::F32(step.decay),
        Arg::F32(step.rate),
        Arg::F32(step.root),
        Arg::F32(step.betas[0]),
        Arg::F32(step.betas[1]),
        Arg::F32(step.eps),
    ];
    launch_grid(first, "adamw_many", [CHUNKS, tensors.len() as u32], &arguments)
}

/// The loss of each row of logits to `losses`; the logits become their gradient, times `scale`, if `differentiate`.
pub(super) fn cross_entropy(
    logits: &Tensor,
    targets: &Tensor,
    losses: &Tensor,
    scale: f32,
    differentiate: bool,
) -> Result<()> {
    let (rows, vocabulary) = logits.dims2()?;
    let arguments = [
        at(logits)?,
        at(targets)?,
        at(losses)?,
        Arg::U32(vocabulary as u32),
        Arg::F32(scale),
        Arg::U32(u32::from(differentiate)),
    ];
    launch(logits, "cross_entropy", rows, &arguments)
}

/// The mean of all elements.
pub(super) fn mean(x: &Tensor) -> Result<Tensor> {
    Ok(x.mean_all()?)
}

/// A batch of equally spaced row-major matrices; `ld` elements from one row to the next.
#[derive(Clone, Copy)]
struct Operand {
    address: u64,
    dtype: DType,
    ld: usize,
    stride: usize,
    transposed: bool,
}

impl Operand {
    fn operation(self) -> sys::cublasOperation_t {
        if self.transposed { sys::cublasOperation_t::CUBLAS_OP_T } else { sys::cublasOperation_t::CUBLAS_OP_N }
    }

    fn kind(self) -> Result<sys::cudaDataType> {
        match self.dtype {
            DType::F32 => Ok(sys::cudaDataType::CUDA_R_32F),
            DType::BF16 => Ok(sys::cudaDataType::CUDA_R_16BF),
            other => Err(Error::device(format!("no device product for {other:?}")).help("use f32 or bf16")),
        }
    }
}

/// `C = alpha A B + beta C` for `count` products of `[m, k]` and `[k, n]`, summed in f32.
fn products(
    on: &Tensor,
    [m, n, k]: [usize; 3],
    (alpha, beta): (f64, f64),
    [a, b, c]: [Operand; 3],
    count: usize,
) -> Result<()> {
    let (handle, alpha, beta) = (device(on)?.cublas_handle(), alpha as f32, beta as f32);
    // cuBLAS counts columns first, which makes every row-major matrix its transpose: Cᵀ = Bᵀ Aᵀ.
    // SAFETY: the operands are tensors of these sizes, and the call is queued on the stream that they live on.
    unsafe {
        blas::gemm_strided_batched_ex(
            *handle.handle(),
            b.operation(),
            a.operation(),
            n as i32,
            m as i32,
            k as i32,
            (&raw const alpha).cast(),
            b.address as *const _,
            b.kind()?,
            b.ld as i32,
            b.stride as i64,
            a.address as *const _,
            a.kind()?,
            a.ld as i32,
            a.stride as i64,
            (&raw const beta).cast(),
            c.address as *mut _,
            c.kind()?,
            c.ld as i32,
            c.stride as i64,
            count as i32,
            sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
            sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
        )
    }
    .map_err(|error| Error::device(format!("a matrix product failed: {error:?}")))
}

fn matrix(tensor: &Tensor, transposed: bool) -> Result<Operand> {
    Ok(Operand { address: address(tensor)?, dtype: tensor.dtype(), ld: last_dim(tensor), stride: 0, transposed })
}

/// `alpha · op(A) op(B)` of the sizes `[m, n, k]`.
pub(super) fn gemm(
    alpha: f64,
    transpose: [bool; 2],
    sizes: [usize; 3],
    operands: [&Tensor; 2],
    dtype: DType,
) -> Result<Tensor> {
    let c = fresh(operands[0], (sizes[0], sizes[1]), dtype)?;
    run_gemm((alpha, 0.), transpose, sizes, &c, operands)?;
    Ok(c)
}

/// Adds `alpha · op(A) op(B)` to `c`.
pub(super) fn gemm_add(
    alpha: f64,
    transpose: [bool; 2],
    sizes: [usize; 3],
    c: &Tensor,
    operands: [&Tensor; 2],
) -> Result<()> {
    run_gemm((alpha, 1.), transpose, sizes, &c.reshape((sizes[0], sizes[1]))?, operands)
}

fn run_gemm(
    factors: (f64, f64),
    transpose: [bool; 2],
    sizes: [usize; 3],
    c: &Tensor,
    [a, b]: [&Tensor; 2],
) -> Result<()> {
    let operands = [matrix(a, transpose[0])?, matrix(b, transpose[1])?, matrix(c, false)?];
    products(c, sizes, factors, operands, 1)
}

/// The products of an attention block: one call per batch row and per query head of a group, over all key/value heads.
struct Heads<'a> {
    shape: Attention,
    mask: &'a AttentionMask,
    batch: usize,
    queries: usize,
    slots: usize,
    dtype: DType,
}

impl<'a> Heads<'a> {
    fn new(shape: Attention, q: &Tensor, k: &Tensor, mask: &'a AttentionMask) -> Result<Self> {
        let ((batch, queries, _), (_, slots, _)) = (q.dims3()?, k.dims3()?);
        Ok(Self { shape, mask, batch, queries, slots, dtype: q.dtype() })
    }

    fn group(&self) -> usize {
        self.shape.query / self.shape.key_value
    }

    fn operand(&self, tensor: &Tensor, offset: usize, ld: usize, stride: usize) -> Result<Operand> {
        let address = address(tensor)? + (offset * self.dtype.size_in_bytes()) as u64;
        Ok(Operand { address, dtype: self.dtype, ld, stride, transposed: false })
    }

    /// Queries `[queries, width]` of batch row `b`: those of the `g`-th head of every group.
    fn wide(&self, tensor: &Tensor, b: usize, g: usize) -> Result<Operand> {
        let Attention { query, width, .. } = self.shape;
        let ld = query * width;
        self.operand(tensor, b * self.queries * ld + g * width, ld, self.group() * width)
    }

    /// Keys or values `[slots, width]` of batch row `b`.
    fn narrow(&self, tensor: &Tensor, b: usize) -> Result<Operand> {
        let Attention { key_value, width, .. } = self.shape;
        let ld = key_value * width;
        self.operand(tensor, self.mask.host.rows[b] * self.slots * ld, ld, width)
    }

    /// Scores `[queries, slots]` of batch row `b` and the `g`-th head of every group.
    fn scores(&self, tensor: &Tensor, b: usize, g: usize) -> Result<Operand> {
        let size = self.queries * self.slots;
        self.operand(tensor, (b * self.shape.query + g) * size, self.slots, self.group() * size)
    }

    fn each(&self, mut f: impl FnMut(usize, usize) -> Result<()>) -> Result<()> {
        (0..self.batch).try_for_each(|b| (0..self.group()).try_for_each(|g| f(b, g)))
    }

    fn products(&self, on: &Tensor, sizes: [usize; 3], beta: f64, operands: [Operand; 3]) -> Result<()> {
        products(on, sizes, (1., beta), operands, self.shape.key_value)
    }

    fn square(&self, like: &Tensor) -> Result<Tensor> {
        fresh(like, (self.batch, self.shape.query, self.queries, self.slots), self.dtype)
    }

    fn probabilities(&self, q: &Tensor, k: &Tensor) -> Result<Tensor> {
        let (scores, p) = (self.square(q)?, self.square(q)?);
        let [queries, slots, width] = [self.queries, self.slots, self.shape.width];
        self.each(|b, g| {
            let keys = Operand { transposed: true, ..self.narrow(k, b)? };
            let operands = [self.wide(q, b, g)?, keys, self.scores(&scores, b, g)?];
            self.products(q, [queries, slots, width], 0., operands)
        })?;
        let table = address(&self.mask.table)?;
        let arguments = [
            at(&scores)?,
            at(&p)?,
            Arg::U64(table),
            Arg::U64(table + (self.batch * size_of::<u32>()) as u64),
            Arg::U32(self.shape.query as u32),
            Arg::U32(queries as u32),
            Arg::U32(slots as u32),
            Arg::U32(self.shape.window.unwrap_or(0) as u32),
            Arg::F32(self.shape.scale as f32),
        ];
        launch(q, "causal_softmax_fwd", self.batch * self.shape.query * queries, &arguments)?;
        Ok(p)
    }
}

/// The result; the scores live for the length of this call. The second tensor is empty: the backward pass computes the
/// probabilities again.
pub(super) fn attention(shape: Attention, [q, k, v]: [&Tensor; 3], mask: &AttentionMask) -> Result<(Tensor, Tensor)> {
    let heads = Heads::new(shape, q, k, mask)?;
    let (p, y) = (heads.probabilities(q, k)?, fresh(q, q.shape(), q.dtype())?);
    heads.each(|b, g| {
        let operands = [heads.scores(&p, b, g)?, heads.narrow(v, b)?, heads.wide(&y, b, g)?];
        heads.products(q, [heads.queries, shape.width, heads.slots], 0., operands)
    })?;
    Ok((y, Tensor::zeros(0, DType::F32, q.device())?))
}

pub(super) fn attention_backward(
    shape: Attention,
    [q, k, v]: [&Tensor; 3],
    g: &Tensor,
    mask: &AttentionMask,
) -> Result<[Tensor; 3]> {
    let heads = Heads::new(shape, q, k, mask)?;
    let (p, ds) = (heads.probabilities(q, k)?, heads.square(q)?);
    let [queries, slots, width] = [heads.queries, heads.slots, shape.width];
    let like = |t: &Tensor| fresh(t, t.shape(), t.dtype());
    let (dq, dk, dv) = (like(q)?, like(k)?, like(v)?);
    heads.each(|b, at| {
        let values = Operand { transposed: true, ..heads.narrow(v, b)? };
        let operands = [heads.wide(g, b, at)?, values, heads.scores(&ds, b, at)?];
        heads.products(q, [queries, slots, width], 0., operands)
    })?;
    let arguments = [self::at(&p)?, self::at(&ds)?, Arg::U32(slots as u32), Arg::F32(shape.scale as f32)];
    launch(q, "causal_softmax_bwd", heads.batch * shape.query * queries, &arguments)?;
    heads.each(|b, at| {
        // The first head of a group writes the gradients of keys and values, the others add to them.
        let beta = f64::from(u8::from(at > 0));
        let turned = |t: &Tensor| -> Result<Operand> { Ok(Operand { transposed: true, ..heads.scores(t, b, at)? }) };
        let operands = [heads.scores(&ds, b, at)?, heads.narrow(k, b)?, heads.wide(&dq, b, at)?];
        heads.products(q, [queries, width, slots], 0., operands)?;
        let operands = [turned(&ds)?, heads.wide(q, b, at)?, heads.narrow(&dk, b)?];
        heads.products(q, [slots, width, queries], beta, operands)?;
        let operands = [turned(&p)?, heads.wide(g, b, at)?, heads.narrow(&dv, b)?];
        heads.products(q, [slots, width, queries], beta, operands)
    })?;
    Ok([dq, dk, dv])
}
