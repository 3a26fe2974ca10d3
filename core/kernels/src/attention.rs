//! Causal attention without the matrix of scores: a tile of it lives while its rows are computed, and the backward pass
//! computes it again from the row sums (Dao et al. 2022).

use std::ops::Range;

use crate::gemm::{Factor, multiply};
use crate::matrix::RawMatrix;
use crate::parallel::{Shared, tasks};
use crate::reduce::{dot, max, sum};
use crate::simd::simd;

/// Queries per tile of scores.
pub const TILE: usize = 64;

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

/// Which keys each query may look at.
///
/// Query `q` of batch row `b` has the position `starts[b] + q`, which is also its slot in the row's keys and values. It
/// sees the slots up to its own that hold real tokens; padding is never seen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CausalMask {
    /// Queries per batch row.
    pub queries: usize,
    /// The position of the first query of each batch row.
    pub starts: Vec<usize>,
    /// The real tokens of each batch row, earlier ones included.
    pub ends: Vec<usize>,
    /// The row of keys that each batch row looks at.
    pub rows: Vec<usize>,
}

impl CausalMask {
    /// The slots that query `q` of batch row `b` sees, with at most `window` of them.
    #[inline]
    pub fn range(&self, b: usize, q: usize, window: Option<usize>) -> Range<usize> {
        let position = self.starts[b] + q;
        let end = (position + 1).min(self.ends[b]).max(1);
        let begin = window.map_or(0, |window| (position + 1).saturating_sub(window));
        begin.min(end - 1)..end
    }

    /// Whether every query sees slots that are there.
    fn fits(&self, q: usize, k: usize, shape: Attention, slots: usize) -> bool {
        let batch = self.starts.len();
        q == batch * self.queries * shape.query * shape.width
            && self.ends.len() == batch
            && self.rows.len() == batch
            && slots > 0
            && self.ends.iter().all(|&end| end <= slots)
            && self.rows.iter().all(|&row| (row + 1) * slots * shape.key_value * shape.width <= k)
    }
}

/// `softmax(scale · Q Kᵀ) V` over the visible slots, of the size of `q: [batch, queries, query · width]`; `k` and
/// `v: [rows, slots, key_value · width]`. With it comes, if `keep` asks for it, `max + ln Σ exp` of each row of scores,
/// `[batch, heads, queries]`.
///
/// # Panics
/// The slices do not fit the mask.
pub fn forward<T: Factor>(
    shape: Attention,
    [q, k, v]: [&[T]; 3],
    mask: &CausalMask,
    slots: usize,
    keep: bool,
) -> (Vec<T>, Vec<T>) {
    assert!(mask.fits(q.len(), k.len(), shape, slots) && k.len() == v.len(), "attention of another size");
    let (batch, queries, plan) = (mask.starts.len(), mask.queries, Tasks::new(shape, mask, slots));
    let mut y = vec![T::zero(); q.len()];
    let mut sums = vec![T::zero(); if keep { batch * shape.query * queries } else { 0 }];
    let (out, out_sums) = (Shared::new(y.as_mut_ptr()), Shared::new(sums.as_mut_ptr()));
    if queries == 1 && !keep {
        tasks(batch, q.len() * slots / 4, |b| {
            let from = plan.queries(b, 0);
            // SAFETY: each task writes its own row of the result.
            let y = unsafe { std::slice::from_raw_parts_mut(out.at(from), plan.stride[0]) };
            let (k, v) = (&k[plan.keys(b, 0)..], &v[plan.keys(b, 0)..]);
            simd(
                #[inline(always)]
                || forward_one(&plan, b, &q[from..][..plan.stride[0]], [k, v], y),
            );
        });
    } else {
        tasks(batch * shape.query, q.len() * slots / 4, |task| {
            let (b, h) = (task / shape.query, task % shape.query);
            let head = Head { plan: &plan, b, h, q: &q[plan.queries(b, h)..] };
            let (k, v) = (&k[plan.keys(b, h)..], &v[plan.keys(b, h)..]);
            let sums = keep.then(|| out_sums.at(task * queries));
            // SAFETY: each task writes its own head's columns of the result and its own row sums.
            unsafe { head.forward(k, v, out.at(plan.queries(b, h)), sums) };
        });
    }
    (y, sums)
}

/// The gradients of `q`, `k` and `v`, given the result `y`, its row sums and its gradient.
///
/// With `P = softmax(scale · S)`: `dV = Pᵀ G`, `dS = scale · P ∘ (G Vᵀ − rows of Σ G ∘ Y)`, `dQ = dS K`, `dK = dSᵀ Q`.
///
/// # Panics
/// The slices do not fit the mask, or two batch rows share a row of keys.
pub fn backward<T: Factor>(
    shape: Attention,
    [q, k, v]: [&[T]; 3],
    [y, sums, gradient]: [&[T]; 3],
    mask: &CausalMask,
    slots: usize,
) -> [Vec<T>; 3] {
    let (batch, queries, plan) = (mask.starts.len(), mask.queries, Tasks::new(shape, mask, slots));
    assert!(mask.fits(q.len(), k.len(), shape, slots) && k.len() == v.len(), "attention of another size");
    assert!(
        [y.len(), gradient.len()] == [q.len(); 2] && sums.len() == batch * shape.query * queries,
        "gradients of another size"
    );
    assert!(mask.rows.iter().copied().eq(0..batch), "a row of keys for each batch row");
    let mut grads = [vec![T::zero(); q.len()], vec![T::zero(); k.len()], vec![T::zero(); v.len()]];
    let [dq, dk, dv] = &mut grads;
    let (dq, dk, dv) = (Shared::new(dq.as_mut_ptr()), Shared::new(dk.as_mut_ptr()), Shared::new(dv.as_mut_ptr()));
    tasks(batch * shape.key_value, q.len() * slots, |task| {
        let (b, shared) = (task / shape.key_value, task % shape.key_value);
        let mut tiles = [vec![T::zero(); TILE * slots], vec![T::zero(); TILE * slots]];
        for h in shared * plan.group()..(shared + 1) * plan.group() {
            let (at, key) = (plan.queries(b, h), plan.keys(b, h));
            let head = Head { plan: &plan, b, h, q: &q[at..] };
            let sums = &sums[(b * shape.query + h) * queries..][..queries];
            // SAFETY: a task owns the gradients of its key/value head and of the query heads that share it.
            unsafe {
                head.backward(
                    [&k[key..], &v[key..], &y[at..], &gradient[at..], sums],
                    &mut tiles,
                    [dq.at(at), dk.at(key), dv.at(key)],
                );
            }
        }
    });
    grads
}

/// What the tasks of a kernel share.
struct Tasks<'a> {
    shape: Attention,
    mask: &'a CausalMask,
    /// Slots per row of keys.
    slots: usize,
    /// Elements from one token to the next: of queries, of keys.
    stride: [usize; 2],
}

impl<'a> Tasks<'a> {
    fn new(shape: Attention, mask: &'a CausalMask, slots: usize) -> Self {
        let stride = [shape.query * shape.width, shape.key_value * shape.width];
        Self { shape, mask, slots, stride }
    }

    /// Query heads per key/value head.
    #[inline]
    fn group(&self) -> usize {
        self.shape.query / self.shape.key_value
    }

    /// Where the queries of batch row `b` and head `h` begin.
    #[inline]
    fn queries(&self, b: usize, h: usize) -> usize {
        b * self.mask.queries * self.stride[0] + h * self.shape.width
    }

    /// Where the keys that head `h` of batch row `b` looks at begin.
    #[inline]
    fn keys(&self, b: usize, h: usize) -> usize {
        self.mask.rows[b] * self.slots * self.stride[1] + h / self.group() * self.shape.width
    }

    /// The tiles of one row: queries, and the slots that any of them sees.
    fn tiles(&self, b: usize) -> impl Iterator<Item = (Range<usize>, Range<usize>)> {
        let queries = self.mask.queries;
        (0..queries).step_by(TILE).map(move |first| {
            let last = (first + TILE).min(queries) - 1;
            let range = |q| self.mask.range(b, q, self.shape.window);
            (first..last + 1, range(first).start..range(last).end)
        })
    }

    /// `count` tokens from `first` on, as a matrix `[count, width]`; `side` 0 for queries, 1 for keys.
    fn tokens<P>(&self, data: P, side: usize, count: usize) -> RawMatrix<P> {
        RawMatrix::row_major(data, [count, self.shape.width], self.stride[side])
    }
}

fn tile<P>(data: P, rows: usize, columns: usize) -> RawMatrix<P> {
    RawMatrix::row_major(data, [rows, columns], columns)
}

/// One head of one row.
struct Head<'a, T> {
    plan: &'a Tasks<'a>,
    b: usize,
    h: usize,
    q: &'a [T],
}

impl<T: Factor> Head<'_, T> {
    /// Scores of a tile: `Q Kᵀ`, unscaled.
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
                        let seen = plan.mask.range(self.b, q, plan.shape.window);
                        let seen = seen.start - slots.start..seen.end - slots.start;
                        row[..seen.start].fill(T::zero());
                        row[seen.end..].fill(T::zero());
                        let row = &mut row[seen];
                        let max = max(row);
                        for score in &mut *row {
                            *score = ((*score - max) * scale).fast_exp();
                        }
                        let sum = sum(row);
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
fn forward_one<T: Factor>(plan: &Tasks, b: usize, q: &[T], [k, v]: [&[T]; 2], y: &mut [T]) {
    let seen = plan.mask.range(b, 0, plan.shape.window);
    let (width, stride, scale, group) = (plan.shape.width, plan.stride[1], T::of(plan.shape.scale), plan.group());
    let mut scores = vec![T::zero(); plan.shape.query * seen.len()];
    for (at, slot) in seen.clone().enumerate() {
        let k = &k[slot * stride..][..stride];
        for (h, q) in q.chunks_exact(width).enumerate() {
            scores[h * seen.len() + at] = dot(q, &k[h / group * width..][..width]);
        }
    }
    for scores in scores.chunks_exact_mut(seen.len()) {
        let max = max(scores);
        for score in &mut *scores {
            *score = ((*score - max) * scale).fast_exp();
        }
        let inverse = T::one() / sum(scores);
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

impl<T: Factor> Head<'_, T> {
    /// # Safety
    /// The pointers lead to this head's first rows of the gradients, which nobody else accesses.
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
                        let seen = plan.mask.range(self.b, q, plan.shape.window);
                        let seen = seen.start - slots.start..seen.end - slots.start;
                        for row in [&mut *p, &mut *ds] {
                            row[..seen.start].fill(T::zero());
                            row[seen.end..].fill(T::zero());
                        }
                        let mean = dot(&y[q * wide..][..width], &g[q * wide..][..width]);
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
