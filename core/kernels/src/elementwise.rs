//! Sums, copies and maps of whole slices.

use crate::parallel::{rows, sum_over_rows};
use crate::real::Real;
use crate::reduce;
use crate::simd::simd;

/// `a + b`.
pub fn add<T: Real>(a: &[T], b: &[T]) -> Vec<T> {
    let mut out = vec![T::zero(); a.len()];
    rows(
        &mut out,
        1,
        #[inline(always)]
        |first, part| {
            for ((out, &a), &b) in part.iter_mut().zip(&a[first..]).zip(&b[first..]) {
                *out = a + b;
            }
        },
    );
    out
}

/// `a += b`.
pub fn add_assign<T: Real>(a: &mut [T], b: &[T]) {
    rows(
        a,
        1,
        #[inline(always)]
        |first, part| {
            for (a, &b) in part.iter_mut().zip(&b[first..]) {
                *a += b;
            }
        },
    );
}

/// Adds `bias` to every row of `y`.
pub fn add_bias<T: Real>(y: &mut [T], bias: &[T]) {
    rows(
        y,
        bias.len(),
        #[inline(always)]
        |_, part| {
            for row in part.chunks_exact_mut(bias.len()) {
                for (y, &b) in row.iter_mut().zip(bias) {
                    *y += b;
                }
            }
        },
    );
}

/// The sum over all rows of `width` elements.
pub fn sum_rows<T: Real>(x: &[T], width: usize) -> Vec<T> {
    sum_over_rows(
        x.len() / width,
        width,
        width,
        #[inline(always)]
        |range, sum: &mut [T]| {
            for row in range {
                for (sum, &x) in sum.iter_mut().zip(&x[row * width..]) {
                    *sum += x;
                }
            }
        },
    )
}

/// The sum of each of `count` rows of `width` elements.
pub fn sum_columns<T: Real>(x: &[T], count: usize, width: usize) -> Vec<T> {
    let mut sums = vec![T::zero(); count];
    rows(
        &mut sums,
        1,
        #[inline(always)]
        |first, part| {
            for (row, sum) in part.iter_mut().enumerate() {
                *sum = reduce::sum(&x[(first + row) * width..][..width]);
            }
        },
    );
    sums
}

/// `Σ x²` in double precision.
pub fn square_sum(x: &[f32]) -> f64 {
    simd(
        #[inline(always)]
        || reduce::lanes([x], |[x]| f64::from(x) * f64::from(x)),
    )
}

/// `eˣ` of every element; the same bits on every processor.
pub fn exp<T: Real>(x: &[T]) -> Vec<T> {
    x.iter().map(|&x| x.portable_exp()).collect()
}

/// `ln x` of every element; the same bits on every processor.
pub fn ln<T: Real>(x: &[T]) -> Vec<T> {
    x.iter().map(|&x| x.portable_ln()).collect()
}

/// Rows of `width` elements, each written to the row of the result that `index` says; the other `rows` are zero.
pub fn scatter_rows<T: Real>(x: &[T], index: &[u32], width: usize, count: usize) -> Vec<T> {
    let mut out = vec![T::zero(); count];
    for (&row, x) in index.iter().zip(x.chunks_exact(width)) {
        out[row as usize * width..][..width].copy_from_slice(x);
    }
    out
}
