//! Causal attention without the matrix of scores: a tile of it lives while its rows are computed, and the backward pass
//! computes it again from the row sums (Dao et al. 2022).

use std::ops::Range;

use crate::activation::tanh;
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
    /// Scores are bent towards ± this number, as `cap · tanh(score / cap)`; not at all if absent.
    pub cap: Option<f64>,
}

/// The queries of one sequence, at least one, and the keys that they may look at.
///
/// Query `q` has the position `start + q`, which is also its slot among the sequence's keys and values. It sees the slots up
/// to its own that hold real tokens; padding is never seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sequence {
    /// Where its queries begin among those of all sequences.
    pub first: usize,
    /// How many queries it has.
    pub queries: usize,
    /// The position of the first of them.
    pub start: usize,
    /// Its real tokens, earlier ones included.
    pub end: usize,
    /// Where its slots begin among those of all sequences.
    pub keys: usize,
}

impl Sequence {
    /// The slots that query `q` sees, with at most `window` of them.
    #[inline]
    pub fn range(&self, q: usize, window: Option<usize>) -> Range<usize> {
        let position = self.start + q;
        let end = (position + 1).min(self.end).max(1);
        let begin = window.map_or(0, |window| (position + 1).saturating_sub(window));
        begin.min(end - 1)..end
    }
}

/// Fails if the sequences do not divide the queries among themselves, or see slots that are not there.
fn check(sequences: &[Sequence], shape: Attention, [q, k, v]: [usize; 3]) {
    let mut tokens = 0;
    let fits = sequences.iter().all(|sequence| {
        let follows = sequence.first == tokens;
        tokens += sequence.queries;
        follows && sequence.queries > 0 && (sequence.keys + sequence.end.max(1)) * shape.key_value * shape.width <= k
    });
    assert!(fits && q == tokens * shape.query * shape.width && k == v, "attention of another size");
}

/// `softmax(scale · Q Kᵀ) V` over the visible slots, of the size of `q: [tokens, query · width]`; `k` and
/// `v: [slots, key_value · width]`. With it comes, if `keep` asks for it, `max + ln Σ exp` of each row of scores,
/// `[heads, tokens]`.
///
/// # Panics
/// The slices do not fit the sequences.
pub fn forward<T: Factor>(
    shape: Attention,
    [q, k, v]: [&[T]; 3],
    sequences: &[Sequence],
    keep: bool,
) -> (Vec<T>, Vec<T>) {
    check(sequences, shape, [q.len(), k.len(), v.len()]);
    let plan = Tasks::new(shape, sequences);
    let mut y = vec![T::zero(); q.len()];
    let mut sums = vec![T::zero(); if keep { shape.query * plan.tokens } else { 0 }];
    let (out, out_sums) = (Shared::new(y.as_mut_ptr()), Shared::new(sums.as_mut_ptr()));
    let cost = q.len() * plan.slots / 4;
    if !keep && sequences.iter().all(|sequence| sequence.queries == 1) {
        tasks(sequences.len(), cost, |task| {
            let sequence = &sequences[task];
            let (from, keys) = (plan.queries(sequence, 0), plan.keys(sequence, 0));
            // SAFETY: each task writes its own row of the result.
            let y = unsafe { std::slice::from_raw_parts_mut(out.at(from), plan.stride[0]) };
            simd(
                #[inline(always)]
                || forward_one(&plan, sequence, &q[from..][..plan.stride[0]], [&k[keys..], &v[keys..]], y),
            );
        });
    } else {
        tasks(sequences.len() * shape.query, cost, |task| {
            let (sequence, h) = (&sequences[task / shape.query], task % shape.query);
            let head = Head { plan: &plan, sequence, q: &q[plan.queries(sequence, h)..] };
            let keys = plan.keys(sequence, h);
            let sums = keep.then(|| out_sums.at(plan.sums(sequence, h)));
            // SAFETY: each task writes its own head's columns of the result and its own row sums.
            unsafe { head.forward(&k[keys..], &v[keys..], out.at(plan.queries(sequence, h)), sums) };
        });
    }
    (y, sums)
}

/// The gradients of `q`, `k` and `v`, given the result `y`, its row sums and its gradient.
///
/// With `P = softmax(scale · S)`: `dV = Pᵀ G`, `dS = scale · P ∘ (G Vᵀ − rows of Σ G ∘ Y)`, `dQ = dS K`, `dK = dSᵀ Q`. Where
/// scores are capped, dS is multiplied by the slope of that, `1 − (capped score / cap)²`.
///
/// # Panics
/// The slices do not fit the sequences, or these have keys that are not of their own queries.
pub fn backward<T: Factor>(
    shape: Attention,
    [q, k, v]: [&[T]; 3],
    [y, sums, gradient]: [&[T]; 3],
    sequences: &[Sequence],
) -> [Vec<T>; 3] {
    check(sequences, shape, [q.len(), k.len(), v.len()]);
    let plan = Tasks::new(shape, sequences);
    let sizes = [q.len(), q.len(), shape.query * plan.tokens];
    assert_eq!([y.len(), gradient.len(), sums.len()], sizes, "gradients of another size");
    let own = |sequence: &Sequence| sequence.keys == sequence.first && sequence.start == 0;
    assert!(sequences.iter().all(own), "keys of its own for each sequence");
    let mut grads = [vec![T::zero(); q.len()], vec![T::zero(); k.len()], vec![T::zero(); v.len()]];
    let [dq, dk, dv] = &mut grads;
    let (dq, dk, dv) = (Shared::new(dq.as_mut_ptr()), Shared::new(dk.as_mut_ptr()), Shared::new(dv.as_mut_ptr()));
    tasks(sequences.len() * shape.key_value, q.len() * plan.slots, |task| {
        let (sequence, shared) = (&sequences[task / shape.key_value], task % shape.key_value);
        let mut tiles = [vec![T::zero(); TILE * plan.slots], vec![T::zero(); TILE * plan.slots]];
        for h in shared * plan.group()..(shared + 1) * plan.group() {
            let (at, key) = (plan.queries(sequence, h), plan.keys(sequence, h));
            let head = Head { plan: &plan, sequence, q: &q[at..] };
            let sums = &sums[plan.sums(sequence, h)..][..sequence.queries];
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
struct Tasks {
    shape: Attention,
    /// Queries of all sequences.
    tokens: usize,
    /// The most slots that a query sees.
    slots: usize,
    /// Elements from one token to the next: of queries, of keys.
    stride: [usize; 2],
}

impl Tasks {
    fn new(shape: Attention, sequences: &[Sequence]) -> Self {
        let tokens = sequences.iter().map(|sequence| sequence.queries).sum();
        let slots = sequences.iter().map(|sequence| sequence.end).max().unwrap_or(0).max(1);
        let stride = [shape.query * shape.width, shape.key_value * shape.width];
        Self { shape, tokens, slots, stride }
    }

    /// Query heads per key/value head.
    #[inline]
    fn group(&self) -> usize {
        self.shape.query / self.shape.key_value
    }

    /// Where the queries of head `h` of a sequence begin.
    #[inline]
    fn queries(&self, sequence: &Sequence, h: usize) -> usize {
        sequence.first * self.stride[0] + h * self.shape.width
    }

    /// Where the keys that head `h` of a sequence looks at begin.
    #[inline]
    fn keys(&self, sequence: &Sequence, h: usize) -> usize {
        sequence.keys * self.stride[1] + h / self.group() * self.shape.width
    }

    /// Where the row sums of head `h` of a sequence begin.
    #[inline]
    fn sums(&self, sequence: &Sequence, h: usize) -> usize {
        h * self.tokens + sequence.first
    }

    /// The cap on scores before they are scaled.
    #[inline]
    fn cap<T: Factor>(&self) -> Option<T> {
        self.shape.cap.map(|cap| T::of(cap / self.shape.scale))
    }

    /// The tiles of one sequence: queries, and the slots that any of them sees.
    fn tiles(&self, sequence: &Sequence) -> impl Iterator<Item = (Range<usize>, Range<usize>)> {
        let (sequence, window) = (*sequence, self.shape.window);
        (0..sequence.queries).step_by(TILE).map(move |first| {
            let last = (first + TILE).min(sequence.queries) - 1;
            (first..last + 1, sequence.range(first, window).start..sequence.range(last, window).end)
        })
    }

    /// `count` tokens from `first` on, as a matrix `[count, width]`; `side` 0 for queries, 1 for keys.
    fn tokens<P>(&self, data: P, side: usize, count: usize) -> RawMatrix<P> {
        RawMatrix::row_major(data, [count, self.shape.width], self.stride[side])
    }
}

/// Scores bent towards ±`cap`.
#[inline(always)]
fn bend<T: Factor>(scores: &mut [T], cap: T) {
    for score in scores {
        *score = cap * tanh(*score / cap);
    }
}

fn tile<P>(data: P, rows: usize, columns: usize) -> RawMatrix<P> {
    RawMatrix::row_major(data, [rows, columns], columns)
}

/// One head of one sequence.
struct Head<'a, T> {
    plan: &'a Tasks,
    sequence: &'a Sequence,
    /// The queries from the head's first on.
    q: &'a [T],
}

impl<T: Factor> Head<'_, T> {
    /// Scores of a tile: `Q Kᵀ`, capped but unscaled.
    fn scores(&self, scores: &mut [T], k: &[T], queries: &Range<usize>, slots: &Range<usize>) {
        let (stride, plan) = (self.plan.stride, self.plan);
        let q = plan.tokens(self.q[queries.start * stride[0]..].as_ptr(), 0, queries.len());
        let k = plan.tokens(k[slots.start * stride[1]..].as_ptr(), 1, slots.len());
        // SAFETY: `tiles` keeps both ranges inside the tensors.
        unsafe { multiply(tile(scores.as_mut_ptr(), queries.len(), slots.len()), false, T::one(), q, k.t(), 1) }
        if let Some(cap) = plan.cap() {
            simd(
                #[inline(always)]
                || bend(scores, cap),
            );
        }
    }

    /// # Safety
    /// `out` points to this head's first row of the result and `sums`, if any, to its row sums; nobody else writes
    /// either.
    unsafe fn forward(&self, k: &[T], v: &[T], out: *mut T, sums: Option<*mut T>) {
        let (plan, scale) = (self.plan, T::of(self.plan.shape.scale));
        let mut scores = vec![T::zero(); TILE * plan.slots];
        for (queries, slots) in plan.tiles(self.sequence) {
            let scores = &mut scores[..queries.len() * slots.len()];
            self.scores(scores, k, &queries, &slots);
            simd(
                #[inline(always)]
                || {
                    for (q, row) in queries.clone().zip(scores.chunks_exact_mut(slots.len())) {
                        let seen = self.sequence.range(q, plan.shape.window);
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

/// The heads of a single query, as in decoding: `q` and `y` are all of a sequence's, `k` and `v` begin with its first slot. A
/// product would cost more than the arithmetic, and slots are read as they lie.
#[inline(always)]
fn forward_one<T: Factor>(plan: &Tasks, sequence: &Sequence, q: &[T], [k, v]: [&[T]; 2], y: &mut [T]) {
    let seen = sequence.range(0, plan.shape.window);
    let (width, stride, scale, group) = (plan.shape.width, plan.stride[1], T::of(plan.shape.scale), plan.group());
    let mut scores = vec![T::zero(); plan.shape.query * seen.len()];
    for (at, slot) in seen.clone().enumerate() {
        let k = &k[slot * stride..][..stride];
        for (h, q) in q.chunks_exact(width).enumerate() {
            scores[h * seen.len() + at] = dot(q, &k[h / group * width..][..width]);
        }
    }
    if let Some(cap) = plan.cap() {
        bend(&mut scores, cap);
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
        let ([wide, narrow], cap) = (plan.stride, plan.cap::<T>());
        for (queries, slots) in plan.tiles(self.sequence) {
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
                        let seen = self.sequence.range(q, plan.shape.window);
                        let seen = seen.start - slots.start..seen.end - slots.start;
                        for row in [&mut *p, &mut *ds] {
                            row[..seen.start].fill(T::zero());
                            row[seen.end..].fill(T::zero());
                        }
                        let mean = dot(&y[q * wide..][..width], &g[q * wide..][..width]);
                        let seen = p[seen.clone()].iter_mut().zip(&mut ds[seen]);
                        match cap {
                            None => seen.for_each(|(p, ds)| {
                                *p = (*p * scale - sums[q]).fast_exp();
                                *ds = scale * *p * (*ds - mean);
                            }),
                            Some(cap) => seen.for_each(|(p, ds)| {
                                let bent = *p / cap;
                                *p = (*p * scale - sums[q]).fast_exp();
                                *ds = scale * *p * (*ds - mean) * (T::one() - bent * bent);
                            }),
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
