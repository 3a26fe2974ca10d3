//! Causal attention without the matrix of scores: a tile of it lives while its rows are computed, and the backward pass
//! computes it again from the row sums (Dao et al. 2022).

use std::ops::Range;

use candle_core::Tensor;

use super::gemm::{Matrix, multiply};
use super::host::{Real, Shared, by_dtype, read, simd, tasks, tensor};
use super::math;
use crate::data::Tokens;
use crate::tape::{Tape, Traced};
use crate::{Error, Result};

/// Queries per tile of scores.
const TILE: usize = 64;

/// Where each token of a pass stands, and which keys it may look at.
///
/// Token `q` of batch row `b` has the position `starts[b] + q`, which is also its slot in the row's keys and values. It
/// sees the slots up to its own that hold real tokens; padding is never seen.
#[derive(Debug, Clone)]
pub struct Visibility {
    queries: usize,
    starts: Vec<usize>,
    ends: Vec<usize>,
    rows: Vec<usize>,
    /// The position of each token, in row-major order.
    pub positions: Vec<u32>,
    /// `starts` and `ends` where the kernels of a device read them, `[2, batch]`.
    #[cfg(feature = "cuda")]
    pub(super) table: Tensor,
}

impl Visibility {
    /// The tokens of a training pass: every row is on its own and begins at position 0.
    ///
    /// # Errors
    /// A tensor operation failed.
    pub fn new(tokens: &Tokens) -> Result<Self> {
        let batch = tokens.lengths.len();
        Self::after(tokens, &vec![0; batch], &(0..batch).collect::<Vec<_>>())
    }

    /// The tokens of a pass with a cache: batch row `b` continues cache row `rows[b]` after `starts[b]` tokens.
    ///
    /// # Errors
    /// A tensor operation failed.
    pub fn after(tokens: &Tokens, starts: &[usize], rows: &[usize]) -> Result<Self> {
        let (batch, queries) = tokens.dims();
        let ends: Vec<usize> = starts.iter().zip(&tokens.lengths).map(|(start, length)| start + length).collect();
        let positions = (0..batch * queries).map(|at| (starts[at / queries] + at % queries) as u32).collect();
        #[cfg(feature = "cuda")]
        let table = {
            let table: Vec<u32> = starts.iter().chain(&ends).map(|&n| n as u32).collect();
            Tensor::from_vec(table, (2, batch), tokens.ids.device())?
        };
        Ok(Self {
            queries,
            starts: starts.to_vec(),
            ends,
            rows: rows.to_vec(),
            positions,
            #[cfg(feature = "cuda")]
            table,
        })
    }

    /// The row of keys that batch row `b` looks at.
    #[cfg(feature = "cuda")]
    pub(super) fn row(&self, b: usize) -> usize {
        self.rows[b]
    }

    /// Fails if keys of earlier passes are seen: nobody knows where their gradients belong.
    pub(super) fn check_differentiable(&self, rows: usize) -> Result<()> {
        if self.rows.iter().copied().eq(0..rows) && self.starts.iter().all(|&start| start == 0) {
            return Ok(());
        }
        Err(Error::run("attention over a cache cannot be differentiated"))
    }

    /// The slots that query `q` of batch row `b` sees, with at most `window` of them.
    fn range(&self, b: usize, q: usize, window: Option<usize>) -> Range<usize> {
        let position = self.starts[b] + q;
        let end = (position + 1).min(self.ends[b]).max(1);
        let begin = window.map_or(0, |window| (position + 1).saturating_sub(window));
        begin.min(end - 1)..end
    }
}

/// The shape of an attention block.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Attention {
    /// Query heads.
    pub query: usize,
    /// Key/value heads; divides the query heads (Ainslie et al. 2023).
    pub key_value: usize,
    /// Width of one head.
    pub width: usize,
    /// The factor on the scores.
    pub scale: f64,
    /// How many positions back a token sees, itself included; all of them if absent.
    pub window: Option<usize>,
}

impl Attention {
    /// `softmax(scale · Q Kᵀ) V` over the visible slots.
    ///
    /// `q: [batch, length, query · width]`; `k` and `v: [rows, slots, key_value · width]`, where `visibility` says
    /// which row belongs to which batch row. Gives the shape of `q`.
    ///
    /// # Errors
    /// Shapes that do not fit, or a tensor operation failed.
    pub fn apply(self, tape: &mut Tape, [q, k, v]: [&Traced; 3], visibility: &Visibility) -> Result<Traced> {
        let inputs = [q, k, v].map(|value| value.tensor().contiguous());
        let [qs, ks, vs] = inputs;
        let (qs, ks, vs) = (qs?, ks?, vs?);
        self.check(&qs, &ks, &vs, visibility)?;
        let tracked = q.tracked() || k.tracked() || v.tracked();
        let (y, sums) = dispatch!(
            qs,
            super::cuda::attention(self, [&qs, &ks, &vs], visibility),
            by_dtype!(qs.dtype(), forward(self, [&qs, &ks, &vs], visibility, tracked))
        )?;
        let (result, visibility) = (y.clone(), visibility.clone());
        Ok(tape.record(y, &[q, k, v], move |gradient, into| {
            let gradients = dispatch!(
                qs,
                super::cuda::attention_backward(self, [&qs, &ks, &vs], &gradient, &visibility),
                by_dtype!(qs.dtype(), backward(self, [&qs, &ks, &vs], [&result, &sums, &gradient], &visibility))
            )?;
            gradients.into_iter().enumerate().try_for_each(|(index, gradient)| into.add(index, gradient))
        }))
    }

    fn check(self, q: &Tensor, k: &Tensor, v: &Tensor, visibility: &Visibility) -> Result<()> {
        let ((batch, queries, width), (_, slots, narrow)) = (q.dims3()?, k.dims3()?);
        let fits = width == self.query * self.width
            && narrow == self.key_value * self.width
            && k.dims() == v.dims()
            && (batch, queries) == (visibility.starts.len(), visibility.queries)
            && visibility.ends.iter().all(|&end| end <= slots)
            && visibility.rows.iter().all(|&row| row < k.dims()[0]);
        if fits {
            return Ok(());
        }
        Err(Error::run(format!("attention: queries {:?} do not fit keys {:?} and {self:?}", q.dims(), k.dims())))
    }
}

/// What the tasks of a kernel share.
struct Plan<'a> {
    shape: Attention,
    visibility: &'a Visibility,
    /// Slots per row of keys.
    slots: usize,
    /// Elements from one token to the next: of queries, of keys.
    stride: [usize; 2],
}

impl<'a> Plan<'a> {
    fn new(shape: Attention, visibility: &'a Visibility, slots: usize) -> Self {
        let stride = [shape.query * shape.width, shape.key_value * shape.width];
        Self { shape, visibility, slots, stride }
    }

    /// Query heads per key/value head.
    fn group(&self) -> usize {
        self.shape.query / self.shape.key_value
    }

    /// Where the queries of batch row `b` and head `h` begin.
    fn queries(&self, b: usize, h: usize) -> usize {
        b * self.visibility.queries * self.stride[0] + h * self.shape.width
    }

    /// Where the keys that head `h` of batch row `b` looks at begin.
    fn keys(&self, b: usize, h: usize) -> usize {
        self.visibility.rows[b] * self.slots * self.stride[1] + h / self.group() * self.shape.width
    }

    /// The tiles of one row: queries, and the slots that any of them sees.
    fn tiles(&self, b: usize) -> impl Iterator<Item = (Range<usize>, Range<usize>)> {
        let queries = self.visibility.queries;
        (0..queries).step_by(TILE).map(move |first| {
            let last = (first + TILE).min(queries) - 1;
            let range = |q| self.visibility.range(b, q, self.shape.window);
            (first..last + 1, range(first).start..range(last).end)
        })
    }

    /// `count` tokens from `first` on, as a matrix `[count, width]`; `side` 0 for queries, 1 for keys.
    fn tokens<P>(&self, data: P, side: usize, count: usize) -> Matrix<P> {
        Matrix::row_major(data, [count, self.shape.width], self.stride[side])
    }
}

fn tile<P>(data: P, rows: usize, columns: usize) -> Matrix<P> {
    Matrix::row_major(data, [rows, columns], columns)
}

/// The result and, if `keep`, `max + ln Σ exp` of each row of scores, `[batch, heads, length]`.
fn forward<T: Real>(
    shape: Attention,
    [q, k, v]: [&Tensor; 3],
    visibility: &Visibility,
    keep: bool,
) -> Result<(Tensor, Tensor)> {
    let ((batch, queries, _), (_, slots, _)) = (q.dims3()?, k.dims3()?);
    let plan = Plan::new(shape, visibility, slots);
    read(q, |qs: &[T]| {
        read(k, |ks: &[T]| {
            read(v, |vs: &[T]| {
                let mut y = vec![T::zero(); qs.len()];
                let mut sums = vec![T::zero(); if keep { batch * shape.query * queries } else { 0 }];
                let (out, out_sums) = (Shared::new(y.as_mut_ptr()), Shared::new(sums.as_mut_ptr()));
                // SAFETY: each task writes its own row of the result, or its own head's columns and row sums.
                #[expect(unsafe_code, reason = "heads are strided in the result")]
                if queries == 1 && !keep {
                    tasks(batch, qs.len() * slots / 4, |b| {
                        let from = plan.queries(b, 0);
                        let y = unsafe { std::slice::from_raw_parts_mut(out.at(from), plan.stride[0]) };
                        let (k, v) = (&ks[plan.keys(b, 0)..], &vs[plan.keys(b, 0)..]);
                        simd(
                            #[inline(always)]
                            || forward_one(&plan, b, &qs[from..][..plan.stride[0]], [k, v], y),
                        );
                    });
                } else {
                    tasks(batch * shape.query, qs.len() * slots / 4, |task| {
                        let (b, h) = (task / shape.query, task % shape.query);
                        let head = Head { plan: &plan, b, h, q: &qs[plan.queries(b, h)..] };
                        let (k, v) = (&ks[plan.keys(b, h)..], &vs[plan.keys(b, h)..]);
                        let sums = keep.then(|| out_sums.at(task * queries));
                        unsafe { head.forward(k, v, out.at(plan.queries(b, h)), sums) };
                    });
                }
                let sums = tensor(sums, &[if keep { batch * shape.query * queries } else { 0 }])?;
                Ok((tensor(y, q.dims())?, sums))
            })
        })
    })
}

/// One head of one row.
struct Head<'a, T> {
    plan: &'a Plan<'a>,
    b: usize,
    h: usize,
    q: &'a [T],
}

impl<T: Real> Head<'_, T> {
    /// Scores of a tile: `Q Kᵀ`, unscaled.
    #[allow(unsafe_code, reason = "products take pointers")]
    fn scores(&self, scores: &mut [T], k: &[T], queries: &Range<usize>, slots: &Range<usize>) {
        let (stride, plan) = (self.plan.stride, self.plan);
        let q = plan.tokens(self.q[queries.start * stride[0]..].as_ptr(), 0, queries.len());
        let k = plan.tokens(k[slots.start * stride[1]..].as_ptr(), 1, slots.len());
        // SAFETY: `tiles` keeps both ranges inside the tensors.
        unsafe { multiply(tile(scores.as_mut_ptr(), queries.len(), slots.len()), false, T::one(), q, k.t(), 1) }
    }

    /// # Safety
    /// `out` points to this head's first row of the result and `sums`, if any, to its row sums; nobody else writes
    /// either.
    #[allow(unsafe_code, reason = "heads are strided in the result")]
    unsafe fn forward(&self, k: &[T], v: &[T], out: *mut T, sums: Option<*mut T>) {
        let (plan, scale) = (self.plan, T::of(self.plan.shape.scale));
        let mut scores = vec![T::zero(); TILE * plan.slots];
        for (queries, slots) in plan.tiles(self.b) {
            let scores = &mut scores[..queries.len() * slots.len()];
            self.scores(scores, k, &queries, &slots);
            simd(
                #[inline(always)]
                || {
                    for (q, row) in queries.clone().zip(scores.chunks_exact_mut(slots.len())) {
                        let seen = plan.visibility.range(self.b, q, plan.shape.window);
                        let seen = seen.start - slots.start..seen.end - slots.start;
                        row[..seen.start].fill(T::zero());
                        row[seen.end..].fill(T::zero());
                        let row = &mut row[seen];
                        let max = math::max(row);
                        for score in &mut *row {
                            *score = ((*score - max) * scale).fast_exp();
                        }
                        let sum = math::sum(row);
                        let inverse = T::one() / sum;
                        for score in row {
                            *score *= inverse;
                        }
                        if let Some(sums) = sums {
                            // SAFETY: the caller's.
                            unsafe { *sums.add(q) = max * scale + sum.portable_ln() };
                        }
                    }
                },
            );
            let y = plan.tokens(out.wrapping_add(queries.start * plan.stride[0]), 0, queries.len());
            let v = plan.tokens(v[slots.start * plan.stride[1]..].as_ptr(), 1, slots.len());
            // SAFETY: the caller's.
            unsafe { multiply(y, false, T::one(), tile(scores.as_ptr(), queries.len(), slots.len()), v, 1) };
        }
    }
}

/// The heads of a single query, as in decoding: `q` and `y` are all of a row's, `k` and `v` begin with its first slot. A
/// product would cost more than the arithmetic, and slots are read as they lie.
#[inline(always)]
fn forward_one<T: Real>(plan: &Plan, b: usize, q: &[T], [k, v]: [&[T]; 2], y: &mut [T]) {
    let seen = plan.visibility.range(b, 0, plan.shape.window);
    let (width, stride, scale, group) = (plan.shape.width, plan.stride[1], T::of(plan.shape.scale), plan.group());
    let mut scores = vec![T::zero(); plan.shape.query * seen.len()];
    for (at, slot) in seen.clone().enumerate() {
        let k = &k[slot * stride..][..stride];
        for (h, q) in q.chunks_exact(width).enumerate() {
            scores[h * seen.len() + at] = math::dot(q, &k[h / group * width..][..width]);
        }
    }
    for scores in scores.chunks_exact_mut(seen.len()) {
        let max = math::max(scores);
        for score in &mut *scores {
            *score = ((*score - max) * scale).fast_exp();
        }
        let inverse = T::one() / math::sum(scores);
        for score in scores {
            *score *= inverse;
        }
    }
    y.fill(T::zero());
    for (at, slot) in seen.clone().enumerate() {
        let v = &v[slot * stride..][..stride];
        for (h, y) in y.chunks_exact_mut(width).enumerate() {
            let score = scores[h * seen.len() + at];
            for (y, &v) in y.iter_mut().zip(&v[h / group * width..][..width]) {
                *y += score * v;
            }
        }
    }
}

/// With `P = softmax(scale · S)`: `dV = Pᵀ G`, `dS = scale · P ∘ (G Vᵀ − rows of Σ G ∘ Y)`, `dQ = dS K`, `dK = dSᵀ Q`.
fn backward<T: Real>(
    shape: Attention,
    [q, k, v]: [&Tensor; 3],
    [y, sums, gradient]: [&Tensor; 3],
    visibility: &Visibility,
) -> Result<[Tensor; 3]> {
    let ((batch, queries, _), (rows, slots, _)) = (q.dims3()?, k.dims3()?);
    visibility.check_differentiable(rows)?;
    let plan = Plan::new(shape, visibility, slots);
    let lend = [q, k, v, y, sums, gradient];
    read_all(lend, |[qs, ks, vs, ys, sums, gs]: [&[T]; 6]| {
        let mut grads = [vec![T::zero(); qs.len()], vec![T::zero(); ks.len()], vec![T::zero(); vs.len()]];
        let [dq, dk, dv] = &mut grads;
        let (dq, dk, dv) = (Shared::new(dq.as_mut_ptr()), Shared::new(dk.as_mut_ptr()), Shared::new(dv.as_mut_ptr()));
        tasks(batch * shape.key_value, qs.len() * slots, |task| {
            let (b, shared) = (task / shape.key_value, task % shape.key_value);
            let mut tiles = [vec![T::zero(); TILE * slots], vec![T::zero(); TILE * slots]];
            for h in shared * plan.group()..(shared + 1) * plan.group() {
                let (at, key) = (plan.queries(b, h), plan.keys(b, h));
                let head = Head { plan: &plan, b, h, q: &qs[at..] };
                let sums = &sums[(b * shape.query + h) * queries..][..queries];
                // SAFETY: a task owns the gradients of its key/value head and of the query heads that share it.
                #[expect(unsafe_code, reason = "heads are strided in the gradients")]
                unsafe {
                    head.backward(
                        [&ks[key..], &vs[key..], &ys[at..], &gs[at..], sums],
                        &mut tiles,
                        [dq.at(at), dk.at(key), dv.at(key)],
                    );
                }
            }
        });
        let [dq, dk, dv] = grads;
        Ok([tensor(dq, q.dims())?, tensor(dk, k.dims())?, tensor(dv, v.dims())?])
    })
}

impl<T: Real> Head<'_, T> {
    /// # Safety
    /// The pointers lead to this head's first rows of the gradients, which nobody else accesses.
    #[allow(unsafe_code, reason = "heads are strided in the gradients")]
    unsafe fn backward(
        &self,
        [k, v, y, g, sums]: [&[T]; 5],
        [probabilities, scores]: &mut [Vec<T>; 2],
        [dq, dk, dv]: [*mut T; 3],
    ) {
        let (plan, scale, width) = (self.plan, T::of(self.plan.shape.scale), self.plan.shape.width);
        debug_assert!(self.h < plan.shape.query);
        let [wide, narrow] = plan.stride;
        for (queries, slots) in plan.tiles(self.b) {
            let (rows, columns) = (queries.len(), slots.len());
            let (p, ds) = (&mut probabilities[..rows * columns], &mut scores[..rows * columns]);
            self.scores(p, k, &queries, &slots);
            let g_tile = plan.tokens(g[queries.start * wide..].as_ptr(), 0, rows);
            let tokens = |data: &[T]| plan.tokens(data[slots.start * narrow..].as_ptr(), 1, columns);
            // SAFETY: `tiles` keeps both ranges inside the tensors.
            unsafe { multiply(tile(ds.as_mut_ptr(), rows, columns), false, T::one(), g_tile, tokens(v).t(), 1) };
            simd(
                #[inline(always)]
                || {
                    let lines = p.chunks_exact_mut(columns).zip(ds.chunks_exact_mut(columns));
                    for (q, (p, ds)) in queries.clone().zip(lines) {
                        let seen = plan.visibility.range(self.b, q, plan.shape.window);
                        let seen = seen.start - slots.start..seen.end - slots.start;
                        for row in [&mut *p, &mut *ds] {
                            row[..seen.start].fill(T::zero());
                            row[seen.end..].fill(T::zero());
                        }
                        let mean = math::dot(&y[q * wide..][..width], &g[q * wide..][..width]);
                        for (p, ds) in p[seen.clone()].iter_mut().zip(&mut ds[seen]) {
                            *p = (*p * scale - sums[q]).fast_exp();
                            *ds = scale * *p * (*ds - mean);
                        }
                    }
                },
            );
            let (p, ds) = (tile(p.as_ptr(), rows, columns), tile(ds.as_ptr(), rows, columns));
            let q_tile = plan.tokens(self.q[queries.start * wide..].as_ptr(), 0, rows);
            let dq = plan.tokens(dq.wrapping_add(queries.start * wide), 0, rows);
            let [dk, dv] = [dk, dv].map(|data| plan.tokens(data.wrapping_add(slots.start * narrow), 1, columns));
            // SAFETY: the caller's.
            unsafe {
                multiply(dq, false, T::one(), ds, tokens(k), 1);
                multiply(dk, true, T::one(), ds.t(), q_tile, 1);
                multiply(dv, true, T::one(), p.t(), g_tile, 1);
            }
        }
    }
}

fn read_all<T: Real, R>(tensors: [&Tensor; 6], f: impl FnOnce([&[T]; 6]) -> Result<R>) -> Result<R> {
    let [a, b, c, d, e, g] = tensors;
    read(a, |a| read(b, |b| read(c, |c| read(d, |d| read(e, |e| read(g, |g| f([a, b, c, d, e, g])))))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::check::{close, gradients, normal};
    use candle_core::{D, Device};

    const SHAPE: Attention = Attention { query: 4, key_value: 2, width: 3, scale: 0.5, window: None };

    /// Two rows of `length` and `length − 2` tokens.
    fn visibility(length: usize) -> Result<Visibility> {
        let rows = [vec![1u32; length], vec![1; length - 2]];
        Visibility::new(&Tokens::pad(&rows, 0, &Device::Cpu)?)
    }

    /// The same from candle's tensor operations, with the whole matrix of scores.
    fn composed(shape: Attention, [q, k, v]: [&Tensor; 3], visibility: &Visibility) -> Result<Tensor> {
        let (batch, queries, _) = q.dims3()?;
        let slots = k.dims()[1];
        let heads = |x: &Tensor, count: usize| -> Result<Tensor> {
            let x = x.reshape((batch, x.dims()[1], count, shape.width))?.transpose(1, 2)?;
            let repeat = Tensor::arange(0u32, shape.query as u32, &Device::Cpu)?;
            let index = repeat.to_vec1::<u32>()?.iter().map(|h| h / (shape.query / count) as u32).collect::<Vec<_>>();
            Ok(x.contiguous()?.index_select(&Tensor::new(index, &Device::Cpu)?, 1)?)
        };
        let (q, k, v) = (heads(q, shape.query)?, heads(k, shape.key_value)?, heads(v, shape.key_value)?);
        let mut mask = vec![f64::NEG_INFINITY; batch * queries * slots];
        for (at, row) in mask.chunks_exact_mut(slots).enumerate() {
            row[visibility.range(at / queries, at % queries, shape.window)].fill(0.);
        }
        let mask = Tensor::from_vec(mask, (batch, 1, queries, slots), &Device::Cpu)?;
        let scores = (q.matmul(&k.t()?)? * shape.scale)?.broadcast_add(&mask)?;
        let mixed = candle_nn::ops::softmax(&scores, D::Minus1)?.matmul(&v)?;
        Ok(mixed.transpose(1, 2)?.reshape((batch, queries, shape.query * shape.width))?)
    }

    fn inputs(length: usize) -> Result<Vec<candle_core::Var>> {
        [12, 6, 6].iter().enumerate().map(|(seed, &width)| normal(&[2, length, width], seed as u64)).collect()
    }

    #[test]
    fn gradients_equal_finite_differences() -> Result<()> {
        let visibility = visibility(5)?;
        for window in [None, Some(2)] {
            let shape = Attention { window, ..SHAPE };
            gradients(&inputs(5)?, |tape, x| shape.apply(tape, [&x[0], &x[1], &x[2]], &visibility))?;
        }
        Ok(())
    }

    #[test]
    fn equals_the_composed_form_over_several_tiles() -> Result<()> {
        let length = 2 * TILE + 7;
        let (visibility, vars) = (visibility(length)?, inputs(length)?);
        for window in [None, Some(70)] {
            let shape = Attention { window, ..SHAPE };
            let mut tape = Tape::default();
            let values: Vec<Traced> = vars.iter().map(|var| tape.parameter(var.as_tensor())).collect();
            let fused = shape.apply(&mut tape, [&values[0], &values[1], &values[2]], &visibility)?;
            let expected = composed(shape, [&vars[0], &vars[1], &vars[2]], &visibility)?;
            close(fused.tensor(), &expected, 1e-12)?;
            let seed = normal(fused.tensor().dims(), 9)?.as_detached_tensor();
            let store = (expected * &seed)?.sum_all()?.backward()?;
            let mut found = tape.backward(vec![(fused, seed)])?;
            for var in &vars {
                let gradient = found.take(var.as_tensor()).expect("a gradient");
                close(&gradient, store.get(var).expect("a gradient"), 1e-11)?;
            }
        }
        Ok(())
    }

    #[test]
    fn a_single_query_after_a_cache_equals_the_last_of_many() -> Result<()> {
        let vars = inputs(5)?;
        let values: Vec<Traced> = vars.iter().map(|var| Traced::constant(var.as_detached_tensor())).collect();
        let tape = &mut Tape::default();
        let full = SHAPE.apply(tape, [&values[0], &values[1], &values[2]], &visibility(5)?)?;
        let one = Tokens::pad(&[[1u32], [1]], 0, &Device::Cpu)?;
        // The rows swapped, each after its own number of earlier tokens.
        let visibility = Visibility::after(&one, &[2, 4], &[1, 0])?;
        let query = |row: usize, at: usize| vars[0].narrow(0, row, 1)?.narrow(1, at, 1)?.contiguous();
        let q = Traced::constant(Tensor::cat(&[query(1, 2)?, query(0, 4)?], 0)?.detach());
        let last = SHAPE.apply(tape, [&q, &values[1], &values[2]], &visibility)?;
        close(&last.tensor().get(0)?.get(0)?, &full.tensor().get(1)?.get(2)?, 1e-12)?;
        close(&last.tensor().get(1)?.get(0)?, &full.tensor().get(0)?.get(4)?, 1e-12)
    }

    #[test]
    fn no_future_no_padding_and_nothing_before_the_window_is_seen() -> Result<()> {
        let visibility = visibility(5)?;
        assert_eq!(visibility.range(0, 2, None), 0..3);
        assert_eq!(visibility.range(0, 4, Some(2)), 3..5);
        assert_eq!(visibility.range(1, 4, None), 0..3);
        Ok(())
    }
}
