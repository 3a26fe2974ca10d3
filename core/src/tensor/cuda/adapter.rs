//! Dropout, and the products of low-rank adapters, which read the mask where they read their input. Those of all layers that
//! share an input are computed by one kernel.

use candle_core::{DType, Tensor};
use titer_kernels::dropout::Dropout;

use super::launch::{Arg, BLOCK, TABLE, address, at, blocks, fresh, launch, launch_typed};
use super::operators::sum_rows;
use crate::error::Result;
use crate::tensor::host::last_dim;
use crate::tensor::ops::AdapterPass;

/// The largest rank that is computed here: beyond it the matrix unit is faster.
const LARGEST_RANK: usize = 32;

/// Rows of a block of `adapter_narrow`, and those that a thread of `adapter_widen` goes through.
const NARROW_ROWS: usize = 4;
const WIDEN_ROWS: usize = 8;

/// Rows of a segment of `adapter_outer`, at least, and segments, at most: each has gradients of its own until they are summed.
const SEGMENT_ROWS: usize = 64;
const SEGMENTS: usize = 16;

/// Words of `Member` in `kernels.cu`.
const WORDS: usize = 12;

pub(in crate::tensor) fn dropout(x: &Tensor, mask: Dropout) -> Result<Tensor> {
    let (t, count, x) = (x.dtype(), x.elem_count(), x.contiguous()?);
    let y = fresh(&x, x.shape(), t)?;
    let mut arguments = vec![at(&x, t)?, at(&y, t)?, Arg::U64(count as u64)];
    arguments.extend([mask.key[0], mask.key[1], mask.layer, mask.threshold()].map(Arg::U32));
    arguments.push(Arg::F32(mask.factor() as f32));
    launch(&x, "dropout", blocks(count.div_ceil(4)), &arguments)?;
    Ok(y)
}

/// Whether the products of these adapters are computed here.
pub(in crate::tensor) fn fuses_adapters(adapters: &[AdapterPass]) -> bool {
    let own = |adapter: &AdapterPass| adapter.a.device().is_cuda() && adapter.a.dims()[0] <= LARGEST_RANK;
    (1..=TABLE / WORDS / 2).contains(&adapters.len()) && adapters.iter().all(own)
}

/// One row of the table.
struct Member<'a> {
    /// `[rows, width]`.
    x: &'a Tensor,
    /// `[rows, rank]`.
    narrow: &'a Tensor,
    /// Where the factor or its gradient lies.
    factor: u64,
    /// Whether it is `B: [width, rank]` instead of `A: [rank, width]`.
    by_column: bool,
    scale: f64,
    mask: Option<Dropout>,
    /// What the kernel says about it.
    more: usize,
    /// Rows of a segment.
    segment: usize,
}

impl Member<'_> {
    fn words(&self, columns: usize) -> Result<[u64; WORDS]> {
        let t = self.x.dtype();
        let two = |lower: u32, upper: u32| u64::from(lower) | u64::from(upper) << 32;
        // Without a mask all numbers are kept as they are.
        let Dropout { key, layer, .. } = self.mask.unwrap_or(Dropout { key: [0, 0], layer: 0, p: 0. });
        let (threshold, factor) = self.mask.map_or((0, 1.), |mask| (mask.threshold(), mask.factor()));
        Ok([
            address(self.x, t)?,
            address(self.narrow, t)?,
            self.factor,
            last_dim(self.x) as u64,
            last_dim(self.narrow) as u64,
            u64::from(self.by_column),
            two(key[0], key[1]),
            two(layer, threshold),
            two((factor as f32).to_bits(), (self.scale as f32).to_bits()),
            columns as u64,
            self.more as u64,
            self.segment as u64,
        ])
    }
}

/// Queues a kernel on these members, `groups` of them with blocks of their own: so many blocks for the rows, times those that
/// share the columns of a row if a thread has four.
fn launch_members(name: &str, members: &[Member], groups: usize, along_rows: usize, four_columns: bool) -> Result<()> {
    let Some(Member { x: on, .. }) = members.first() else { return Ok(()) };
    let widest = members.iter().map(|member| last_dim(member.x)).max().unwrap_or(0);
    let columns = if four_columns { widest.div_ceil(4 * BLOCK as usize) } else { 1 };
    let mut table = Box::new([0; TABLE]);
    for (row, member) in table.chunks_exact_mut(WORDS).zip(members) {
        row.copy_from_slice(&member.words(columns)?);
    }
    let grid = [(along_rows * columns) as u32, groups as u32];
    launch_typed(on, name, grid, &[Arg::Table(table), Arg::U32(on.dims()[0] as u32)])
}

/// `s (m ∘ x) Aᵀ` of each adapter, `[rows, rank]`.
pub(in crate::tensor) fn adapters_inner(x: &Tensor, adapters: &[AdapterPass]) -> Result<Vec<Tensor>> {
    narrow(adapters, |own| Ok((x, address(&own.a, x.dtype())?, false, own.mask)))
}

/// `s g B` of each adapter, `[rows, rank]`.
pub(in crate::tensor) fn adapters_narrow(gs: &[Tensor], adapters: &[AdapterPass]) -> Result<Vec<Tensor>> {
    narrow(adapters, |own| Ok((&gs[own.layer], address(&own.b, gs[own.layer].dtype())?, true, None)))
}

/// `s (m ∘ x) Fᵀ` of each adapter, with the `x`, the place and the layout of the factor `F`, and the mask that `of` gives.
fn narrow<'a>(
    adapters: &'a [AdapterPass],
    of: impl Fn(&'a AdapterPass) -> Result<(&'a Tensor, u64, bool, Option<Dropout>)>,
) -> Result<Vec<Tensor>> {
    let given = adapters.iter().map(of).collect::<Result<Vec<_>>>()?;
    let mut results = Vec::with_capacity(adapters.len());
    for (own, (x, ..)) in adapters.iter().zip(&given) {
        results.push(fresh(x, (x.dims()[0], own.a.dims()[0]), x.dtype())?);
    }
    let mut members = Vec::with_capacity(adapters.len());
    for ((own, (x, factor, by_column, mask)), narrow) in adapters.iter().zip(given).zip(&results) {
        members.push(Member { x, narrow, factor, by_column, scale: own.scale, mask, more: 0, segment: 0 });
    }
    launch_members("adapter_narrow", &members, members.len(), results[0].dims()[0].div_ceil(NARROW_ROWS), false)?;
    Ok(results)
}

/// Adds `inner Bᵀ` to the result of each layer.
pub(in crate::tensor) fn adapters_up(ys: &[Tensor], adapters: &[AdapterPass]) -> Result<()> {
    let members = adapters.iter().map(|own| {
        let x = &ys[own.layer];
        let factor = address(&own.b, x.dtype())?;
        Ok(Member { x, narrow: &own.inner, factor, by_column: true, scale: 1., mask: None, more: 1, segment: 0 })
    });
    let members: Vec<Member> = members.collect::<Result<_>>()?;
    launch_members("adapter_widen", &members, members.len(), ys[0].dims()[0].div_ceil(WIDEN_ROWS), true)
}

/// Adds the sum of `m ∘ (narrow A)` to `dx`.
pub(in crate::tensor) fn adapters_dx(dx: &Tensor, narrow: &[Tensor], adapters: &[AdapterPass]) -> Result<()> {
    let members = adapters.iter().zip(narrow).map(|(own, narrow)| {
        let factor = address(&own.a, dx.dtype())?;
        Ok(Member {
            x: dx,
            narrow,
            factor,
            by_column: false,
            scale: 1.,
            mask: own.mask,
            more: adapters.len(),
            segment: 0,
        })
    });
    let members: Vec<Member> = members.collect::<Result<_>>()?;
    launch_members("adapter_widen", &members, 1, dx.dims()[0].div_ceil(WIDEN_ROWS), true)
}

/// The gradients `narrowᵀ (m ∘ x)` of `A` and `gᵀ inner` of `B`, of each adapter, in f32. Segments of the rows are summed
/// apart and then together, always in the same order.
pub(in crate::tensor) fn adapters_gradients(
    x: &Tensor,
    gs: &[Tensor],
    narrow: &[Tensor],
    adapters: &[AdapterPass],
) -> Result<Vec<[Tensor; 2]>> {
    let rows = x.dims()[0];
    let segment = rows.div_ceil(SEGMENTS).max(SEGMENT_ROWS);
    let segments = rows.div_ceil(segment);
    let factors = || adapters.iter().flat_map(|own| [&own.a, &own.b]);
    let total: usize = factors().map(Tensor::elem_count).sum();
    let partial = fresh(x, (segments, total), DType::F32)?;
    let base = address(&partial, DType::F32)?;
    let mut first = 0;
    let mut members = Vec::with_capacity(2 * adapters.len());
    for (own, narrow) in adapters.iter().zip(narrow) {
        let sides = [(x, narrow, false, own.mask, &own.a), (&gs[own.layer], &own.inner, true, None, &own.b)];
        for (x, narrow, by_column, mask, factor) in sides {
            let place = base + (first * DType::F32.size_in_bytes()) as u64;
            members.push(Member { x, narrow, factor: place, by_column, scale: 1., mask, more: total, segment });
            first += factor.elem_count();
        }
    }
    launch_members("adapter_outer", &members, members.len(), segments, true)?;
    let sums = if segments > 1 { sum_rows(&partial)? } else { partial.flatten_all()? };
    let mut first = 0;
    let mut part = |factor: &Tensor| -> Result<Tensor> {
        let gradient = sums.narrow(0, first, factor.elem_count())?.reshape(factor.shape())?;
        first += factor.elem_count();
        Ok(gradient)
    };
    adapters.iter().map(|own| Ok([part(&own.a)?, part(&own.b)?])).collect()
}
