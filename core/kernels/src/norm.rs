//! Normalisation of rows: root mean square (Zhang and Sennrich 2019) and layer norm (Ba et al. 2016).

use crate::parallel::{rows, sum_over_rows};
use crate::real::Real;
use crate::reduce::{dot, dot3, sum, sum_by};

/// `y = w ∘ x / √(mean(x²) + ε)` for every row of `x`.
pub fn rms<T: Real>(x: &[T], weight: &[T], eps: f64) -> Vec<T> {
    let (eps, w) = (T::of(eps), weight);
    let mut y = vec![T::zero(); x.len()];
    rows(
        &mut y,
        w.len(),
        #[inline(always)]
        |first, part| {
            for (y, x) in part.chunks_exact_mut(w.len()).zip(x[first * w.len()..].chunks_exact(w.len())) {
                let scale = inverse_rms(x, eps);
                for ((y, &x), &w) in y.iter_mut().zip(x).zip(w) {
                    *y = x * scale * w;
                }
            }
        },
    );
    y
}

/// With `r = 1/√(mean(x²)+ε)` and `h = g ∘ w`: `dx = r h − x r³ mean(h ∘ x)`.
pub fn rms_backward<T: Real>(x: &[T], weight: &[T], gradient: &[T], eps: f64) -> Vec<T> {
    let (eps, width, w) = (T::of(eps), weight.len(), weight);
    let mut dx = vec![T::zero(); x.len()];
    rows(
        &mut dx,
        width,
        #[inline(always)]
        |first, part| {
            let inputs = x[first * width..].chunks_exact(width).zip(gradient[first * width..].chunks_exact(width));
            for (dx, (x, g)) in part.chunks_exact_mut(width).zip(inputs) {
                let r = inverse_rms(x, eps);
                let pull = r * r * r * dot3(x, g, w) / T::of(width as f64);
                for (((dx, &x), &g), &w) in dx.iter_mut().zip(x).zip(g).zip(w) {
                    *dx = r * g * w - x * pull;
                }
            }
        },
    );
    dx
}

/// `dw = Σ g ∘ x r` over all rows of `width` elements, with `r` as in [`rms_backward`].
pub fn rms_weight_gradient<T: Real>(x: &[T], gradient: &[T], width: usize, eps: f64) -> Vec<T> {
    let eps = T::of(eps);
    sum_over_rows(
        x.len() / width,
        width,
        width,
        #[inline(always)]
        |range, sum: &mut [T]| {
            for row in range {
                let (x, g) = (&x[row * width..][..width], &gradient[row * width..][..width]);
                let r = inverse_rms(x, eps);
                for ((sum, &x), &g) in sum.iter_mut().zip(x).zip(g) {
                    *sum += g * x * r;
                }
            }
        },
    )
}

/// `y = w ∘ (x − mean) / √(var + ε) + b` for every row of `x`.
pub fn layer<T: Real>(x: &[T], weight: &[T], bias: &[T], eps: f64) -> Vec<T> {
    let (eps, width) = (T::of(eps), weight.len());
    let mut y = vec![T::zero(); x.len()];
    rows(
        &mut y,
        width,
        #[inline(always)]
        |first, part| {
            for (y, x) in part.chunks_exact_mut(width).zip(x[first * width..].chunks_exact(width)) {
                let (mean, r) = moments(x, eps);
                for (((y, &x), &w), &b) in y.iter_mut().zip(x).zip(weight).zip(bias) {
                    *y = (x - mean) * r * w + b;
                }
            }
        },
    );
    y
}

/// With `x̂ = (x − mean) r` and `h = g ∘ w`: `dx = r (h − mean(h) − x̂ mean(h ∘ x̂))`.
pub fn layer_backward<T: Real>(x: &[T], weight: &[T], gradient: &[T], eps: f64) -> Vec<T> {
    let (eps, width, w) = (T::of(eps), weight.len(), weight);
    let mut dx = vec![T::zero(); x.len()];
    rows(
        &mut dx,
        width,
        #[inline(always)]
        |first, part| {
            let inputs = x[first * width..].chunks_exact(width).zip(gradient[first * width..].chunks_exact(width));
            for (dx, (x, g)) in part.chunks_exact_mut(width).zip(inputs) {
                let ((mean, r), size) = (moments(x, eps), T::of(width as f64));
                let pull = dot(g, w) / size;
                let turn = (dot3(x, g, w) / size - pull * mean) * r;
                for (((dx, &x), &g), &w) in dx.iter_mut().zip(x).zip(g).zip(w) {
                    *dx = r * (g * w - pull - (x - mean) * r * turn);
                }
            }
        },
    );
    dx
}

/// `dw = Σ g ∘ x̂` and, behind it, `db = Σ g` over all rows of `width` elements, with `x̂` as in [`layer_backward`].
pub fn layer_weight_gradients<T: Real>(x: &[T], gradient: &[T], width: usize, eps: f64) -> Vec<T> {
    let eps = T::of(eps);
    sum_over_rows(
        x.len() / width,
        width,
        2 * width,
        #[inline(always)]
        |range, sums: &mut [T]| {
            let (dw, db) = sums.split_at_mut(width);
            for row in range {
                let (x, g) = (&x[row * width..][..width], &gradient[row * width..][..width]);
                let (mean, r) = moments(x, eps);
                for (((dw, db), &x), &g) in dw.iter_mut().zip(&mut *db).zip(x).zip(g) {
                    *dw += g * (x - mean) * r;
                    *db += g;
                }
            }
        },
    )
}

/// `1 / √(mean(x²) + ε)` of one row.
#[inline(always)]
fn inverse_rms<T: Real>(row: &[T], eps: T) -> T {
    T::one() / (dot(row, row) / T::of(row.len() as f64) + eps).sqrt()
}

/// Mean and `1 / √(var + ε)` of one row.
#[inline(always)]
fn moments<T: Real>(row: &[T], eps: T) -> (T, T) {
    let width = T::of(row.len() as f64);
    let mean = sum(row) / width;
    (mean, T::one() / (sum_by(row, |x| (x - mean) * (x - mean)) / width + eps).sqrt())
}
