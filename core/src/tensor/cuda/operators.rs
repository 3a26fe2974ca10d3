//! Operators that are one or two kernels. Each checks that its tensors are of one type.

use candle_core::DType::{F32, U32};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Tensor};
use titer_kernels::activation::Activation;

use super::launch::{Arg, at, blocks, fresh, fresh_on, launch};
use crate::error::{Error, Result};
use crate::tensor::host::last_dim;
use crate::tensor::mask::AttentionMask;

/// Blocks for a kernel whose threads take 16 bytes at a time where they may.
fn packs(count: usize, dtype: DType) -> usize {
    blocks((count * dtype.size_in_bytes()).div_ceil(16))
}

fn rows_of(x: &Tensor) -> usize {
    x.elem_count() / last_dim(x).max(1)
}

/// A tensor that a kernel may be without.
fn at_if(tensor: Option<&Tensor>, dtype: DType) -> Result<Arg> {
    tensor.map_or(Ok(Arg::U64(0)), |tensor| at(tensor, dtype))
}

/// `x`, plus `branch` if there is one, and the same normalised by a kernel with these parameters, `[width]` each.
fn norm(
    name: &str,
    x: &Tensor,
    branch: Option<&Tensor>,
    parameters: &[&Tensor],
    width: usize,
    eps: f64,
) -> Result<[Tensor; 2]> {
    let t = x.dtype();
    let y = fresh(x, x.shape(), t)?;
    // Without a branch nothing is written there.
    let sum = branch.map_or_else(|| Ok(x.clone()), |_| fresh(x, x.shape(), t))?;
    let mut arguments = vec![at(x, t)?, at_if(branch, t)?, at_if(branch.map(|_| &sum), t)?];
    for parameter in parameters {
        arguments.push(at(parameter, t)?);
    }
    arguments.extend([at(&y, t)?, Arg::U32(width as u32), Arg::F32(eps as f32)]);
    launch(x, name, x.elem_count() / width, &arguments)?;
    Ok([sum, y])
}

/// The gradient of `x`, plus that `before`; and what the kernel notes of each row, `noted` numbers in f32.
fn norm_backward(
    name: &str,
    [x, w, g]: [&Tensor; 3],
    before: Option<&Tensor>,
    [width, noted]: [usize; 2],
    eps: f64,
) -> Result<[Tensor; 2]> {
    let (t, rows) = (x.dtype(), x.elem_count() / width);
    let (dx, notes) = (fresh(x, x.shape(), t)?, fresh(x, (rows, noted), F32)?);
    let arguments = [
        at(x, t)?,
        at(w, t)?,
        at(g, t)?,
        at_if(before, t)?,
        at(&dx, t)?,
        at(&notes, F32)?,
        Arg::U32(width as u32),
        Arg::F32(eps as f32),
    ];
    launch(x, name, rows, &arguments)?;
    Ok([dx, notes])
}

pub(in crate::tensor) fn rms_norm(x: &Tensor, branch: Option<&Tensor>, w: &Tensor, eps: f64) -> Result<[Tensor; 2]> {
    norm("rms_norm_fwd", x, branch, &[w], w.elem_count(), eps)
}

/// The gradients of `x`, plus that `before`, and of the weight.
pub(in crate::tensor) fn rms_norm_backward(
    [x, w, g]: [&Tensor; 3],
    before: Option<&Tensor>,
    eps: f64,
    wants_weight: bool,
) -> Result<(Tensor, Option<Tensor>)> {
    let (t, width) = (x.dtype(), w.elem_count());
    let [dx, r] = norm_backward("rms_norm_bwd", [x, w, g], before, [width, 1], eps)?;
    if !wants_weight {
        return Ok((dx, None));
    }
    let (dw, rows) = (fresh(x, width, F32)?, x.elem_count() / width);
    let arguments = [at(x, t)?, at(g, t)?, at(&r, F32)?, at(&dw, F32)?, Arg::U64(rows as u64), Arg::U32(width as u32)];
    launch(x, "rms_norm_dw", blocks(width), &arguments)?;
    Ok((dx, Some(dw.to_dtype(w.dtype())?)))
}

pub(in crate::tensor) fn layer_norm(
    x: &Tensor,
    branch: Option<&Tensor>,
    [w, b]: [&Tensor; 2],
    eps: f64,
) -> Result<[Tensor; 2]> {
    norm("layer_norm_fwd", x, branch, &[w, b], last_dim(x), eps)
}

/// As [`rms_norm_backward`], with that of the bias.
pub(in crate::tensor) fn layer_norm_backward(
    [x, w, g]: [&Tensor; 3],
    before: Option<&Tensor>,
    eps: f64,
    wants_weight: bool,
) -> Result<(Tensor, Option<[Tensor; 2]>)> {
    let (t, width) = (x.dtype(), last_dim(x));
    let [dx, stats] = norm_backward("layer_norm_bwd", [x, w, g], before, [width, 2], eps)?;
    if !wants_weight {
        return Ok((dx, None));
    }
    let (dw, db) = (fresh(x, width, F32)?, fresh(x, width, F32)?);
    let arguments = [
        at(x, t)?,
        at(g, t)?,
        at(&stats, F32)?,
        at(&dw, F32)?,
        at(&db, F32)?,
        Arg::U64(rows_of(x) as u64),
        Arg::U32(width as u32),
    ];
    launch(x, "layer_norm_dwdb", blocks(width), &arguments)?;
    Ok((dx, Some([dw.to_dtype(w.dtype())?, db.to_dtype(w.dtype())?])))
}

pub(in crate::tensor) fn rotate(
    both: [&Tensor; 2],
    [cos, sin]: [&Tensor; 2],
    positions: &Tensor,
    direction: f64,
) -> Result<[Tensor; 2]> {
    let t = both[0].dtype();
    let ((_, half), tokens) = (cos.dims2()?, positions.elem_count());
    let turned = [fresh(both[0], both[0].shape(), t)?, fresh(both[0], both[1].shape(), t)?];
    let heads = both.map(|x| Arg::U32((x.elem_count() / (tokens * 2 * half)) as u32));
    let tensors = [both[0], both[1], &turned[0], &turned[1]].map(|tensor| at(tensor, t));
    let mut arguments = tensors.into_iter().collect::<Result<Vec<_>>>()?;
    arguments.extend([at(cos, F32)?, at(sin, F32)?, at(positions, U32)?, Arg::U64(tokens as u64)]);
    arguments.extend(heads);
    arguments.extend([Arg::U32(half as u32), Arg::F32(direction as f32)]);
    let pairs: usize = both.iter().map(|x| x.elem_count() / 2).sum();
    launch(both[0], "rope", blocks(pairs), &arguments)?;
    Ok(turned)
}

pub(in crate::tensor) fn gated(activation: Activation, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    let t = gate.dtype();
    let (y, count) = (fresh(gate, gate.shape(), t)?, gate.elem_count());
    let arguments = [at(gate, t)?, at(up, t)?, at(&y, t)?, Arg::U64(count as u64), kind(activation)];
    launch(gate, "gated_fwd", packs(count, t), &arguments)?;
    Ok(y)
}

pub(in crate::tensor) fn gated_backward(
    activation: Activation,
    gate: &Tensor,
    up: &Tensor,
    g: &Tensor,
) -> Result<(Tensor, Tensor)> {
    let t = gate.dtype();
    let like = || fresh(gate, gate.shape(), t);
    let (dgate, dup, count) = (like()?, like()?, gate.elem_count());
    let tensors = [at(gate, t)?, at(up, t)?, at(g, t)?, at(&dgate, t)?, at(&dup, t)?];
    let arguments: Vec<Arg> = tensors.into_iter().chain([Arg::U64(count as u64), kind(activation)]).collect();
    launch(gate, "gated_bwd", packs(count, t), &arguments)?;
    Ok((dgate, dup))
}

fn kind(activation: Activation) -> Arg {
    Arg::U32(match activation {
        Activation::Relu => 0,
        Activation::GeluTanh => 1,
        Activation::Gelu => 2,
        Activation::Silu => 3,
        Activation::Tanh => 4,
    })
}

pub(in crate::tensor) fn activation(activation: Activation, x: &Tensor) -> Result<Tensor> {
    let t = x.dtype();
    let (y, count) = (fresh(x, x.shape(), t)?, x.elem_count());
    launch(x, "activation_fwd", packs(count, t), &[at(x, t)?, at(&y, t)?, Arg::U64(count as u64), kind(activation)])?;
    Ok(y)
}

pub(in crate::tensor) fn activation_backward(activation: Activation, x: &Tensor, g: &Tensor) -> Result<Tensor> {
    let t = x.dtype();
    let (dx, count) = (fresh(x, x.shape(), t)?, x.elem_count());
    let arguments = [at(x, t)?, at(g, t)?, at(&dx, t)?, Arg::U64(count as u64), kind(activation)];
    launch(x, "activation_bwd", packs(count, t), &arguments)?;
    Ok(dx)
}

pub(in crate::tensor) fn add_bias(y: &Tensor, bias: &Tensor) -> Result<()> {
    let t = y.dtype();
    let arguments = [at(y, t)?, at(bias, t)?, Arg::U64(rows_of(y) as u64), Arg::U32(last_dim(y) as u32)];
    launch(y, "add_bias", blocks(y.elem_count()), &arguments)
}

pub(in crate::tensor) fn sum_rows(g: &Tensor) -> Result<Tensor> {
    let t = g.dtype();
    let sum = fresh(g, last_dim(g), F32)?;
    let arguments = [at(g, t)?, at(&sum, F32)?, Arg::U64(rows_of(g) as u64), Arg::U32(last_dim(g) as u32)];
    launch(g, "sum_rows", blocks(last_dim(g)), &arguments)?;
    Ok(sum.to_dtype(g.dtype())?)
}

pub(in crate::tensor) fn scatter_rows(g: &Tensor, index: &Tensor, shape: &[usize]) -> Result<Tensor> {
    let t = g.dtype();
    let dx = Tensor::zeros(shape, g.dtype(), g.device())?;
    let arguments =
        [at(&dx, t)?, at(g, t)?, at(index, U32)?, Arg::U64(rows_of(g) as u64), Arg::U32(last_dim(g) as u32)];
    launch(g, "scatter_rows", blocks(g.elem_count()), &arguments)?;
    Ok(dx)
}

pub(in crate::tensor) fn add_assign(a: &Tensor, b: &Tensor) -> Result<()> {
    let t = a.dtype();
    let (b, count) = (b.contiguous()?, a.elem_count());
    launch(a, "add_assign", packs(count, t), &[at(a, t)?, at(&b, t)?, Arg::U64(count as u64)])
}

/// `y *= by`, for `by` of one element.
pub(in crate::tensor) fn scale(y: &Tensor, by: &Tensor) -> Result<()> {
    let (by, count) = (by.to_dtype(F32)?, y.elem_count());
    launch(y, "scale", packs(count, y.dtype()), &[at(y, y.dtype())?, at(&by, F32)?, Arg::U64(count as u64)])
}

/// All numbers of a quantized matrix, in the type `dtype`.
pub(in crate::tensor) fn decode(quantized: &QTensor, dtype: DType) -> Result<Tensor> {
    let name = match quantized.dtype() {
        GgmlDType::Q8_0 => "decode_q8_0",
        GgmlDType::Q4_0 => "decode_q4_0",
        GgmlDType::Q4_1 => "decode_q4_1",
        GgmlDType::Q4K => "decode_q4k",
        GgmlDType::Q6K => "decode_q6k",
        other => return Err(Error::device(format!("no device kernel for {other:?}"))),
    };
    let y = fresh_on(quantized.device().as_cuda_device()?, quantized.shape().clone(), dtype)?;
    let (blocks_at, count) = (quantized.device_ptr()? as u64, y.elem_count());
    launch(&y, name, blocks(count), &[Arg::U64(blocks_at), at(&y, dtype)?, Arg::U64(count as u64)])?;
    Ok(y)
}

pub(in crate::tensor) fn cache_write(store: &Tensor, fresh: &Tensor, mask: &AttentionMask) -> Result<()> {
    let t = fresh.dtype();
    let (sequences, width) = (mask.sequences.len(), fresh.dims2()?.1);
    let longest = mask.sequences.iter().map(|sequence| sequence.queries).max().unwrap_or(0);
    let arguments = [
        at(store, t)?,
        at(fresh, t)?,
        at(&mask.table, U32)?,
        Arg::U32(sequences as u32),
        Arg::U32(longest as u32),
        Arg::U64(width as u64),
    ];
    launch(fresh, "cache_write", sequences * longest, &arguments)
}

/// The loss of each row of logits to `losses`; the logits become their gradient, times `scale`, if `differentiate`.
pub(in crate::tensor) fn cross_entropy(
    logits: &Tensor,
    targets: &Tensor,
    losses: &Tensor,
    scale: f32,
    differentiate: bool,
) -> Result<()> {
    let t = logits.dtype();
    let (rows, vocabulary) = logits.dims2()?;
    let arguments = [
        at(logits, t)?,
        at(targets, U32)?,
        at(losses, F32)?,
        Arg::U32(vocabulary as u32),
        Arg::F32(scale),
        Arg::U32(u32::from(differentiate)),
    ];
    launch(logits, "cross_entropy", rows, &arguments)
}

/// Where the greatest number of each row is, or `u32::MAX` if one is not finite: `[rows]`.
pub(in crate::tensor) fn argmax(x: &Tensor) -> Result<Tensor> {
    let (t, (rows, width), x) = (x.dtype(), x.dims2()?, x.contiguous()?);
    let places = fresh(&x, rows, U32)?;
    launch(&x, "argmax", rows, &[at(&x, t)?, at(&places, U32)?, Arg::U32(width as u32)])?;
    Ok(places)
}

/// The mean of all elements.
pub(in crate::tensor) fn mean(x: &Tensor) -> Result<Tensor> {
    Ok(x.mean_all()?)
}
