//! Dropout, and the products of low-rank adapters with their `A`, which read the mask where they read their input.

use candle_core::Tensor;
use titer_kernels::dropout::Dropout;

use super::launch::{Arg, BLOCK, at, blocks, fresh, launch, launch_typed};
use crate::error::Result;

/// Threads of a warp.
const WARP: u32 = 32;

/// Rows that a thread of `adapter_dx` goes through.
const ROWS: u32 = 16;

pub(in crate::tensor) fn dropout(x: &Tensor, mask: Dropout) -> Result<Tensor> {
    let (t, count, x) = (x.dtype(), x.elem_count(), x.contiguous()?);
    let y = fresh(&x, x.shape(), t)?;
    let arguments = [at(&x, t)?, at(&y, t)?, Arg::U64(count as u64)].into_iter().chain(mask_of(Some(mask)));
    launch(&x, "dropout", blocks(count.div_ceil(4)), &arguments.collect::<Vec<_>>())?;
    Ok(y)
}

/// A mask as kernels are given it; without one, all numbers are kept as they are.
fn mask_of(mask: Option<Dropout>) -> [Arg; 5] {
    let Dropout { key, layer, .. } = mask.unwrap_or(Dropout { key: [0, 0], layer: 0, p: 0. });
    let (threshold, factor) = mask.map_or((0, 1.), |mask| (mask.threshold(), mask.factor()));
    [Arg::U32(key[0]), Arg::U32(key[1]), Arg::U32(layer), Arg::U32(threshold), Arg::F32(factor as f32)]
}

/// `s (m ∘ x) Aᵀ` for `x: [rows, width]` and `a: [rank, width]`.
pub(in crate::tensor) fn adapter_inner(x: &Tensor, a: &Tensor, scale: f64, mask: Option<Dropout>) -> Result<Tensor> {
    let (t, (rows, width), rank) = (x.dtype(), x.dims2()?, a.dims()[0]);
    let y = fresh(x, (rows, rank), t)?;
    let sizes = [rows, width, rank].map(|size| Arg::U32(size as u32));
    let arguments = [at(x, t)?, at(a, t)?, at(&y, t)?]
        .into_iter()
        .chain(sizes)
        .chain([Arg::F32(scale as f32)])
        .chain(mask_of(mask));
    launch(x, "adapter_inner", rows.div_ceil((BLOCK / WARP) as usize), &arguments.collect::<Vec<_>>())?;
    Ok(y)
}

/// `dx += m ∘ (g A)` for `g: [rows, rank]` and `a: [rank, width]`.
pub(in crate::tensor) fn adapter_dx(dx: &Tensor, g: &Tensor, a: &Tensor, mask: Option<Dropout>) -> Result<()> {
    let (t, (rows, rank), width) = (g.dtype(), g.dims2()?, a.dims()[1]);
    let sizes = [rows, width, rank].map(|size| Arg::U32(size as u32));
    let arguments = [at(g, t)?, at(a, t)?, at(dx, t)?].into_iter().chain(sizes).chain(mask_of(mask));
    let grid = [(rows as u32).div_ceil(ROWS), (width as u32).div_ceil(4 * BLOCK)];
    launch_typed(g, "adapter_dx", grid, &arguments.collect::<Vec<_>>())
}
