//! Normalisation of the last dimension: root mean square (Zhang and Sennrich 2019) and layer norm (Ba et al. 2016).

use candle_core::Tensor;

use super::host::{Real, by_dtype, read, rows, sum_over_rows, tensor};
use super::{last_dim, math};
use crate::Result;
use crate::tape::{Tape, Traced};

/// `y = w ∘ x / √(mean(x²) + ε)` for `x: [..., width]` and `weight: [width]`.
///
/// # Errors
/// A tensor operation failed.
pub fn rms_norm(tape: &mut Tape, x: &Traced, weight: &Traced, eps: f64) -> Result<Traced> {
    let (xs, w) = (x.tensor().contiguous()?, weight.tensor().clone());
    let y = dispatch!(xs, super::cuda::rms_norm(&xs, &w, eps), by_dtype!(xs.dtype(), rms_forward(&xs, &w, eps)))?;
    Ok(tape.record(y, &[x, weight], move |gradient, into| {
        let wants_weight = into.wants(1);
        let (dx, dw) = dispatch!(
            xs,
            super::cuda::rms_norm_backward(&xs, &w, &gradient, eps, wants_weight),
            by_dtype!(xs.dtype(), rms_backward(&xs, &w, &gradient, eps, wants_weight))
        )?;
        into.add(0, dx)?;
        dw.map_or(Ok(()), |dw| into.add(1, dw))
    }))
}

/// `y = w ∘ (x − mean) / √(var + ε) + b` for `x: [..., width]`, `weight: [width]` and `bias: [width]`.
///
/// # Errors
/// A tensor operation failed.
pub fn layer_norm(tape: &mut Tape, x: &Traced, weight: &Traced, bias: &Traced, eps: f64) -> Result<Traced> {
    let (xs, w, b) = (x.tensor().contiguous()?, weight.tensor().clone(), bias.tensor().clone());
    let y = dispatch!(
        xs,
        super::cuda::layer_norm(&xs, &w, &b, eps),
        by_dtype!(xs.dtype(), layer_forward(&xs, &w, &b, eps))
    )?;
    Ok(tape.record(y, &[x, weight, bias], move |gradient, into| {
        let wants_weight = into.wants(1) || into.wants(2);
        let (dx, dw) = dispatch!(
            xs,
            super::cuda::layer_norm_backward(&xs, &w, &gradient, eps, wants_weight),
            by_dtype!(xs.dtype(), layer_backward(&xs, &w, &gradient, eps, wants_weight))
        )?;
        into.add(0, dx)?;
        let Some((dw, db)) = dw else { return Ok(()) };
        into.add(1, dw)?;
        into.add(2, db)
    }))
}

/// `1 / √(mean(x²) + ε)` of one row.
#[inline(always)]
fn inverse_rms<T: Real>(row: &[T], eps: T) -> T {
    T::one() / (math::dot(row, row) / T::of(row.len() as f64) + eps).sqrt()
}

fn rms_forward<T: Real>(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let eps = T::of(eps);
    read(x, |xs: &[T]| {
        read(weight, |w: &[T]| {
            let mut y = vec![T::zero(); xs.len()];
            rows(
                &mut y,
                w.len(),
                #[inline(always)]
                |first, part| {
                    for (y, x) in part.chunks_exact_mut(w.len()).zip(xs[first * w.len()..].chunks_exact(w.len())) {
                        let scale = inverse_rms(x, eps);
                        for ((y, &x), &w) in y.iter_mut().zip(x).zip(w) {
                            *y = x * scale * w;
                        }
                    }
                },
            );
            tensor(y, x.dims())
        })
    })
}

/// With `r = 1/√(mean(x²)+ε)` and `h = g ∘ w`: `dx = r h − x r³ mean(h ∘ x)`, `dw = Σ g ∘ x r`.
fn rms_backward<T: Real>(
    x: &Tensor,
    weight: &Tensor,
    gradient: &Tensor,
    eps: f64,
    wants_weight: bool,
) -> Result<(Tensor, Option<Tensor>)> {
    let eps = T::of(eps);
    read(x, |xs: &[T]| {
        read(weight, |w: &[T]| {
            read(gradient, |gs: &[T]| {
                let width = w.len();
                let mut dx = vec![T::zero(); xs.len()];
                rows(
                    &mut dx,
                    width,
                    #[inline(always)]
                    |first, part| {
                        let inputs =
                            xs[first * width..].chunks_exact(width).zip(gs[first * width..].chunks_exact(width));
                        for (dx, (x, g)) in part.chunks_exact_mut(width).zip(inputs) {
                            let r = inverse_rms(x, eps);
                            let pull = r * r * r * math::dot3(x, g, w) / T::of(width as f64);
                            for (((dx, &x), &g), &w) in dx.iter_mut().zip(x).zip(g).zip(w) {
                                *dx = r * g * w - x * pull;
                            }
                        }
                    },
                );
                let dw = wants_weight.then(|| {
                    let sum = sum_over_rows(
                        xs.len() / width,
                        width,
                        width,
                        #[inline(always)]
                        |range, sum: &mut [T]| {
                            for row in range {
                                let (x, g) = (&xs[row * width..][..width], &gs[row * width..][..width]);
                                let r = inverse_rms(x, eps);
                                for ((sum, &x), &g) in sum.iter_mut().zip(x).zip(g) {
                                    *sum += g * x * r;
                                }
                            }
                        },
                    );
                    tensor(sum, &[width])
                });
                Ok((tensor(dx, x.dims())?, dw.transpose()?))
            })
        })
    })
}

/// Mean and `1 / √(var + ε)` of one row.
#[inline(always)]
fn moments<T: Real>(row: &[T], eps: T) -> (T, T) {
    let width = T::of(row.len() as f64);
    let mean = math::sum(row) / width;
    (mean, T::one() / (math::sum_by(row, |x| (x - mean) * (x - mean)) / width + eps).sqrt())
}

fn layer_forward<T: Real>(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    let (eps, width) = (T::of(eps), last_dim(x));
    read(x, |xs: &[T]| {
        read(weight, |w: &[T]| {
            read(bias, |b: &[T]| {
                let mut y = vec![T::zero(); xs.len()];
                rows(
                    &mut y,
                    width,
                    #[inline(always)]
                    |first, part| {
                        for (y, x) in part.chunks_exact_mut(width).zip(xs[first * width..].chunks_exact(width)) {
                            let (mean, r) = moments(x, eps);
                            for (((y, &x), &w), &b) in y.iter_mut().zip(x).zip(w).zip(b) {
                                *y = (x - mean) * r * w + b;
                            }
                        }
                    },
                );
                tensor(y, x.dims())
            })
        })
    })
}

/// Gradients of weight and bias.
type WeightAndBias = (Tensor, Tensor);

/// With `x̂ = (x − mean) r` and `h = g ∘ w`: `dx = r (h − mean(h) − x̂ mean(h ∘ x̂))`, `dw = Σ g ∘ x̂`, `db = Σ g`.
fn layer_backward<T: Real>(
    x: &Tensor,
    weight: &Tensor,
    gradient: &Tensor,
    eps: f64,
    wants_weight: bool,
) -> Result<(Tensor, Option<WeightAndBias>)> {
    let (eps, width) = (T::of(eps), last_dim(x));
    read(x, |xs: &[T]| {
        read(weight, |w: &[T]| {
            read(gradient, |gs: &[T]| {
                let mut dx = vec![T::zero(); xs.len()];
                rows(
                    &mut dx,
                    width,
                    #[inline(always)]
                    |first, part| {
                        let inputs =
                            xs[first * width..].chunks_exact(width).zip(gs[first * width..].chunks_exact(width));
                        for (dx, (x, g)) in part.chunks_exact_mut(width).zip(inputs) {
                            let ((mean, r), size) = (moments(x, eps), T::of(width as f64));
                            let pull = math::dot(g, w) / size;
                            let turn = (math::dot3(x, g, w) / size - pull * mean) * r;
                            for (((dx, &x), &g), &w) in dx.iter_mut().zip(x).zip(g).zip(w) {
                                *dx = r * (g * w - pull - (x - mean) * r * turn);
                            }
                        }
                    },
                );
                let dw = wants_weight.then(|| {
                    let sums = sum_over_rows(
                        xs.len() / width,
                        width,
                        2 * width,
                        #[inline(always)]
                        |range, sums: &mut [T]| {
                            let (dw, db) = sums.split_at_mut(width);
                            for row in range {
                                let (x, g) = (&xs[row * width..][..width], &gs[row * width..][..width]);
                                let (mean, r) = moments(x, eps);
                                for (((dw, db), &x), &g) in dw.iter_mut().zip(&mut *db).zip(x).zip(g) {
                                    *dw += g * (x - mean) * r;
                                    *db += g;
                                }
                            }
                        },
                    );
                    let vector = |part: &[T]| tensor(part.to_vec(), &[width]);
                    Ok::<_, crate::Error>((vector(&sums[..width])?, vector(&sums[width..])?))
                });
                Ok((tensor(dx, x.dims())?, dw.transpose()?))
            })
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::check::{close, gradients, normal};
    use candle_core::D;

    #[test]
    fn gradients_equal_finite_differences() -> Result<()> {
        let (x, w, b) = (normal(&[2, 3, 5], 1)?, normal(&[5], 2)?, normal(&[5], 3)?);
        gradients(&[x.clone(), w.clone()], |tape, inputs| rms_norm(tape, &inputs[0], &inputs[1], 1e-5))?;
        gradients(&[x, w, b], |tape, inputs| layer_norm(tape, &inputs[0], &inputs[1], &inputs[2], 1e-5))
    }

    #[test]
    fn equal_the_composed_forms() -> Result<()> {
        let constant = |shape: &[usize], seed| Ok::<_, crate::Error>(normal(shape, seed)?.as_detached_tensor());
        let (x, w, b) = (constant(&[3, 6], 1)?, constant(&[6], 2)?, constant(&[6], 3)?);
        let [vx, vw, vb] = [&x, &w, &b].map(|t| Traced::constant(t.clone()));
        let scale = (x.sqr()?.mean_keepdim(D::Minus1)? + 1e-5)?.sqrt()?;
        let composed = x.broadcast_div(&scale)?.broadcast_mul(&w)?;
        close(rms_norm(&mut Tape::default(), &vx, &vw, 1e-5)?.tensor(), &composed, 1e-12)?;
        let centred = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
        let scale = (centred.sqr()?.mean_keepdim(D::Minus1)? + 1e-5)?.sqrt()?;
        let composed = centred.broadcast_div(&scale)?.broadcast_mul(&w)?.broadcast_add(&b)?;
        close(layer_norm(&mut Tape::default(), &vx, &vw, &vb, 1e-5)?.tensor(), &composed, 1e-12)
    }
}
