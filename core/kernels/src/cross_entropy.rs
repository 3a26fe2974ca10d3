//! Logarithms of softmaxes, and the cross-entropy of logits with its gradient.

use crate::parallel::{Shared, rows};
use crate::real::Real;
use crate::reduce::{max, sum, sum_by};

/// The loss of each row of `logits`, which has one label. The logits become their gradient,
/// `scale · (softmax − onehot)`.
pub fn losses<T: Real>(logits: &mut [T], vocabulary: usize, labels: &[u32], scale: T) -> Vec<T> {
    let mut losses = vec![T::zero(); labels.len()];
    let out = Shared::new(losses.as_mut_ptr());
    assert_eq!(logits.len(), labels.len() * vocabulary, "one label for each row of logits");
    rows(
        logits,
        vocabulary,
        #[inline(always)]
        |first, part| {
            for (row, logits) in part.chunks_exact_mut(vocabulary).enumerate() {
                let loss = softmax_gradient(logits, labels[first + row] as usize, scale);
                // SAFETY: every row writes its own loss.
                unsafe { *out.at(first + row) = loss };
            }
        },
    );
    losses
}

/// The loss of one row; its logits become `scale · (softmax − onehot)`.
#[inline(always)]
fn softmax_gradient<T: Real>(logits: &mut [T], label: usize, scale: T) -> T {
    let (max, correct) = (max(logits), logits[label]);
    for z in &mut *logits {
        *z = (*z - max).fast_exp();
    }
    let sum = sum(logits);
    let factor = scale / sum;
    for z in &mut *logits {
        *z *= factor;
    }
    logits[label] -= scale;
    max + sum.portable_ln() - correct
}

/// `x − ln Σ eˣ` of every row of `width` elements.
pub fn log_softmax<T: Real>(x: &[T], width: usize) -> Vec<T> {
    let mut y = x.to_vec();
    rows(
        &mut y,
        width,
        #[inline(always)]
        |_, part| {
            for row in part.chunks_exact_mut(width) {
                let max = max(row);
                let log = sum_by(
                    row,
                    #[inline(always)]
                    |x| (x - max).fast_exp(),
                )
                .portable_ln();
                for x in row {
                    *x = (*x - max) - log;
                }
            }
        },
    );
    y
}

/// `g − eʸ Σ g` for the result `y` of [`log_softmax`] and its gradient `g`.
pub fn log_softmax_backward<T: Real>(y: &[T], gradient: &[T], width: usize) -> Vec<T> {
    let mut dx = gradient.to_vec();
    rows(
        &mut dx,
        width,
        #[inline(always)]
        |first, part| {
            for (dx, y) in part.chunks_exact_mut(width).zip(y[first * width..].chunks_exact(width)) {
                let total = sum(dx);
                dx.iter_mut().zip(y).for_each(|(dx, y)| *dx -= y.fast_exp() * total);
            }
        },
    );
    dx
}
