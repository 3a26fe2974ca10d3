//! Work split over threads. The split never depends on their number, so that sums over its parts do not either.

use rayon::prelude::*;

use crate::real::Real;
use crate::simd::simd;

/// Elements that one thread takes at a time.
const GRAIN: usize = 1 << 14;

/// Rows of `width` that one task takes.
fn rows_per_task(width: usize) -> usize {
    (GRAIN / width.max(1)).max(1)
}

/// Fills the rows of `out` (`width` elements each): `f(first, rows)` is called, in parallel, for runs of rows that
/// begin at row `first`.
pub(crate) fn rows<T: Send>(out: &mut [T], width: usize, f: impl Fn(usize, &mut [T]) + Sync) {
    let step = rows_per_task(width);
    let run = |(index, part): (usize, &mut [T])| {
        simd(
            #[inline(always)]
            || f(index * step, part),
        );
    };
    if out.len() <= 2 * GRAIN {
        out.chunks_mut(step * width).enumerate().for_each(run);
    } else {
        out.par_chunks_mut(step * width).enumerate().for_each(run);
    }
}

/// As [`rows`], for two outputs of one shape.
pub(crate) fn rows2<T: Send>(a: &mut [T], b: &mut [T], width: usize, f: impl Fn(usize, &mut [T], &mut [T]) + Sync) {
    let step = rows_per_task(width);
    let run = |(index, (a, b)): (usize, (&mut [T], &mut [T]))| {
        simd(
            #[inline(always)]
            || f(index * step, a, b),
        );
    };
    if a.len() <= 2 * GRAIN {
        a.chunks_mut(step * width).zip(b.chunks_mut(step * width)).enumerate().for_each(run);
    } else {
        a.par_chunks_mut(step * width).zip(b.par_chunks_mut(step * width)).enumerate().for_each(run);
    }
}

/// The sum over parts of the rows of `data` (`width` elements each) of the vectors of `len` elements that `f` adds to.
/// The parts are summed in their order.
pub(crate) fn sum_over_rows<T: Real>(
    count: usize,
    width: usize,
    len: usize,
    f: impl Fn(std::ops::Range<usize>, &mut [T]) + Sync,
) -> Vec<T> {
    let step = rows_per_task(width).max(count.div_ceil(16));
    let part = |index: usize| {
        let mut sum = vec![T::zero(); len];
        simd(
            #[inline(always)]
            || f(index * step..((index + 1) * step).min(count), &mut sum),
        );
        sum
    };
    let parts = count.div_ceil(step);
    let sums: Vec<Vec<T>> = if count * width <= 2 * GRAIN {
        (0..parts).map(part).collect()
    } else {
        (0..parts).into_par_iter().map(part).collect()
    };
    let add = |mut total: Vec<T>, sum: Vec<T>| {
        for (total, value) in total.iter_mut().zip(sum) {
            *total += value;
        }
        total
    };
    sums.into_iter().reduce(add).unwrap_or_else(|| vec![T::zero(); len])
}

/// Calls `f` for every index below `count`, in parallel if `cost` (in elements) is worth it.
pub(crate) fn tasks(count: usize, cost: usize, f: impl Fn(usize) + Sync + Send) {
    if cost <= 2 * GRAIN {
        (0..count).for_each(f);
    } else {
        (0..count).into_par_iter().with_max_len(1).for_each(f);
    }
}

/// Memory that parallel tasks write disjoint parts of.
pub(crate) struct Shared<T>(*mut T);

// SAFETY: only a pointer travels; whoever dereferences it answers for disjointness.
unsafe impl<T: Send> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Shared<T> {}

impl<T> Clone for Shared<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Shared<T> {}

impl<T> Shared<T> {
    pub(crate) fn new(start: *mut T) -> Self {
        Self(start)
    }

    /// The pointer to element `at`.
    pub(crate) fn at(&self, at: usize) -> *mut T {
        self.0.wrapping_add(at)
    }
}
