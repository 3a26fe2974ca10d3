//! Attention composed of products and a softmax. All pairs of a batch row and a query head are one call of cuBLAS, whose
//! tables of addresses one kernel fills; the scores are f32.

use candle_core::DType::{self, F32, I64};
use candle_core::Tensor;
use titer_kernels::attention::Attention;

use super::launch::{Arg, HEAD_OPERANDS, address, at, blocks, fresh, launch, launch_grid};
use super::operators::mask_row;
use super::products::{Operand, batched};
use crate::error::Result;
use crate::tensor::mask::AttentionMask;

/// Where the matrix of each pair lies in one tensor; steps in elements.
struct HeadMatrices {
    address: u64,
    dtype: DType,
    /// From one batch row to the next, from one head's matrix to the next, and from one row of a matrix to the next.
    steps: [usize; 3],
    /// Query heads that share a matrix.
    group: usize,
    /// Whether batch row `b` lies in the row that the mask names.
    named: bool,
}

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

    fn pairs(&self) -> usize {
        self.batch * self.shape.query
    }

    /// `[queries, width]` in a tensor of the queries' shape.
    fn wide(&self, tensor: &Tensor) -> Result<HeadMatrices> {
        let Attention { query, width, .. } = self.shape;
        let steps = [self.queries * query * width, width, query * width];
        Ok(HeadMatrices { address: address(tensor, self.dtype)?, dtype: self.dtype, steps, group: 1, named: false })
    }

    /// `[slots, width]` in a tensor of the keys' shape.
    fn narrow(&self, tensor: &Tensor) -> Result<HeadMatrices> {
        let Attention { key_value, width, .. } = self.shape;
        let steps = [self.slots * key_value * width, width, key_value * width];
        let group = self.group();
        Ok(HeadMatrices { address: address(tensor, self.dtype)?, dtype: self.dtype, steps, group, named: true })
    }

    /// `[slots, width]` in `[batch, slots, query · width]`, f32: the gradients of keys or values by query heads.
    fn by_query_head(&self, tensor: &Tensor) -> Result<HeadMatrices> {
        let Attention { query, width, .. } = self.shape;
        let steps = [self.slots * query * width, width, query * width];
        Ok(HeadMatrices { address: address(tensor, F32)?, dtype: F32, steps, group: 1, named: false })
    }

    /// `[queries, slots]` in `[batch, heads, queries, slots]`.
    fn square(&self, tensor: &Tensor) -> Result<HeadMatrices> {
        let size = self.queries * self.slots;
        let steps = [self.shape.query * size, size, self.slots];
        let dtype = tensor.dtype();
        Ok(HeadMatrices { address: address(tensor, dtype)?, dtype, steps, group: 1, named: false })
    }

    fn fresh_square(&self, like: &Tensor, dtype: DType) -> Result<Tensor> {
        fresh(like, (self.batch, self.shape.query, self.queries, self.slots), dtype)
    }

    /// The operands of batched products, with the table of addresses that they point into.
    fn operands<const N: usize>(&self, places: [HeadMatrices; N]) -> Result<(Tensor, [Operand; N])> {
        let pairs = self.pairs();
        let table = fresh(&self.mask.table, N * pairs, I64)?;
        let mut heads = Box::new([[0; 5]; HEAD_OPERANDS]);
        for (row, place) in heads.iter_mut().zip(&places) {
            let bytes = place.steps.map(|step| (step * place.dtype.size_in_bytes()) as u64);
            *row = [place.address, bytes[0], bytes[1], place.group as u64, u64::from(place.named)];
        }
        let start = address(&table, I64)?;
        let arguments = [
            Arg::U64(start),
            Arg::U64(mask_row(self.mask, 2)?),
            Arg::U32(self.shape.query as u32),
            Arg::U32(pairs as u32),
            Arg::U32(N as u32),
            Arg::Heads(heads),
        ];
        launch_grid(&table, "head_pointers", [blocks(pairs) as u32, 1], &arguments)?;
        let mut next = start;
        let operands = places.map(|place| {
            let address = next;
            next += (pairs * size_of::<u64>()) as u64;
            Operand { address, dtype: place.dtype, ld: place.steps[2], transposed: false }
        });
        Ok((table, operands))
    }

    /// What both softmax kernels need to know of the mask.
    fn visible(&self) -> Result<[Arg; 7]> {
        Ok([
            Arg::U64(mask_row(self.mask, 0)?),
            Arg::U64(mask_row(self.mask, 1)?),
            Arg::U32(self.shape.query as u32),
            Arg::U32(self.queries as u32),
            Arg::U32(self.slots as u32),
            Arg::U32(self.shape.window.unwrap_or(0) as u32),
            Arg::F32(self.shape.scale as f32),
        ])
    }
}

/// The result, and `max + ln Σ exp` of each row of scores: `[batch, heads, queries]`, f32. The scores themselves live for
/// the length of this call.
pub(in crate::tensor) fn attention(
    shape: Attention,
    [q, k, v]: [&Tensor; 3],
    mask: &AttentionMask,
) -> Result<(Tensor, Tensor)> {
    let heads = Heads::new(shape, q, k, mask)?;
    let [queries, slots, width] = [heads.queries, heads.slots, shape.width];
    let (scores, p) = (heads.fresh_square(q, F32)?, heads.fresh_square(q, heads.dtype)?);
    let (y, sums) = (fresh(q, q.shape(), heads.dtype)?, fresh(q, (heads.batch, shape.query, queries), F32)?);
    let (_table, [wide, keys, values, square, probabilities, result]) = heads.operands([
        heads.wide(q)?,
        heads.narrow(k)?,
        heads.narrow(v)?,
        heads.square(&scores)?,
        heads.square(&p)?,
        heads.wide(&y)?,
    ])?;
    batched(q, [queries, slots, width], [wide, keys.t(), square], heads.pairs())?;
    let arguments = [at(&scores, F32)?, at(&p, heads.dtype)?, at(&sums, F32)?].into_iter().chain(heads.visible()?);
    launch(q, "causal_softmax_fwd", heads.pairs() * queries, &arguments.collect::<Vec<_>>())?;
    batched(q, [queries, width, slots], [probabilities, values, result], heads.pairs())?;
    Ok((y, sums))
}

/// The gradients of `q`, `k` and `v`, given the row sums of [`attention`] and the gradient of its result.
pub(in crate::tensor) fn attention_backward(
    shape: Attention,
    [q, k, v]: [&Tensor; 3],
    [sums, g]: [&Tensor; 2],
    mask: &AttentionMask,
) -> Result<[Tensor; 3]> {
    let heads = Heads::new(shape, q, k, mask)?;
    let [queries, slots, width] = [heads.queries, heads.slots, shape.width];
    let (scores, dp) = (heads.fresh_square(q, F32)?, heads.fresh_square(q, F32)?);
    let (p, ds) = (heads.fresh_square(q, heads.dtype)?, heads.fresh_square(q, heads.dtype)?);
    let g = g.contiguous()?;
    let dq = fresh(q, q.shape(), heads.dtype)?;
    let shared = || fresh(q, (heads.batch, slots, shape.query * width), F32);
    let (dk, dv) = (shared()?, shared()?);
    let (_table, [wide, keys, values, gradient, square, slopes, probabilities, changes, to_q, to_k, to_v]) = heads
        .operands([
            heads.wide(q)?,
            heads.narrow(k)?,
            heads.narrow(v)?,
            heads.wide(&g)?,
            heads.square(&scores)?,
            heads.square(&dp)?,
            heads.square(&p)?,
            heads.square(&ds)?,
            heads.wide(&dq)?,
            heads.by_query_head(&dk)?,
            heads.by_query_head(&dv)?,
        ])?;
    let pairs = heads.pairs();
    batched(q, [queries, slots, width], [wide, keys.t(), square], pairs)?;
    batched(q, [queries, slots, width], [gradient, values.t(), slopes], pairs)?;
    let tensors = [at(&scores, F32)?, at(&dp, F32)?, at(sums, F32)?, at(&p, heads.dtype)?, at(&ds, heads.dtype)?];
    let arguments: Vec<Arg> = tensors.into_iter().chain(heads.visible()?).collect();
    launch(q, "causal_softmax_bwd", pairs * queries, &arguments)?;
    batched(q, [queries, width, slots], [changes, keys, to_q], pairs)?;
    batched(q, [slots, width, queries], [changes.t(), wide, to_k], pairs)?;
    batched(q, [slots, width, queries], [probabilities.t(), gradient, to_v], pairs)?;
    Ok([dq, heads.over_groups(&dk, k)?, heads.over_groups(&dv, v)?])
}

impl Heads<'_> {
    /// The sum over each group of `by_query_head`, of the shape and type of `like`.
    fn over_groups(&self, by_query_head: &Tensor, like: &Tensor) -> Result<Tensor> {
        let sum = fresh(like, like.shape(), self.dtype)?;
        let count = like.elem_count();
        let arguments = [
            at(by_query_head, F32)?,
            at(&sum, self.dtype)?,
            Arg::U64(count as u64),
            Arg::U32(self.group() as u32),
            Arg::U32(self.shape.width as u32),
        ];
        launch(like, "sum_groups", blocks(count), &arguments)?;
        Ok(sum)
    }
}
