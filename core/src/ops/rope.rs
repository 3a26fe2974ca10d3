//! Rotary positions (Su et al. 2021), in the rotate-half layout of the Hugging Face checkpoints.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, Device, Layout, Shape, Tensor};

use super::{CandleResult, Real, by_dtype, on_host, read, slice};
use crate::Result;

/// The table of `cos` and `sin` for every position and frequency, in f32 as the checkpoints' own code computes it.
#[derive(Debug, Clone)]
pub struct Rope {
    half: usize,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl Rope {
    /// The table of `positions` rows for the inverse frequencies given, one per pair of dimensions.
    pub fn new(inverse_frequencies: &[f32], positions: usize) -> Self {
        let angles = || (0..positions).flat_map(|at| inverse_frequencies.iter().map(move |f| at as f32 * f));
        Self {
            half: inverse_frequencies.len(),
            cos: angles().map(f32::cos).collect(),
            sin: angles().map(f32::sin).collect(),
        }
    }

    /// The standard inverse frequencies `1 / θ^(2i/d)` of a head of `width` dimensions. The division in this order, in
    /// f32, is what makes a forward pass equal to the checkpoints' own to the last bit.
    pub fn frequencies(width: usize, theta: f64) -> Vec<f32> {
        (0..width).step_by(2).map(|i| 1f32 / (theta as f32).powf(i as f32 / width as f32)).collect()
    }

    /// The longest sequence the table covers.
    pub fn positions(&self) -> usize {
        self.cos.len() / self.half.max(1)
    }
}

/// Rotates `x: [batch, length, heads, width]` by its positions (one per batch row and token, in row-major order) and
/// moves the heads forward: `[batch, heads, length, width]`.
///
/// # Errors
/// A position lies outside the table, or a tensor operation failed.
pub fn rotate(x: &Tensor, rope: &Rope, positions: &[u32]) -> Result<Tensor> {
    let longest = positions.iter().max().map_or(0, |&at| at as usize + 1);
    if longest > rope.positions() {
        let limit = rope.positions();
        return Err(crate::Error::data(format!(
            "a sequence of {longest} tokens exceeds the model's {limit} positions"
        ))
        .help("lower `max_length` or the number of new tokens"));
    }
    let pick = |table: &[f32]| -> Vec<f32> {
        positions.iter().flat_map(|&at| &table[at as usize * rope.half..][..rope.half]).copied().collect()
    };
    let op = Rotate { half: rope.half, cos: pick(&rope.cos), sin: pick(&rope.sin) };
    if on_host(x) { Ok(x.contiguous()?.apply_op1(op)?) } else { composed(x, &op) }
}

fn composed(x: &Tensor, op: &Rotate) -> Result<Tensor> {
    let (batch, length, _, width) = x.dims4()?;
    let table = |values: &[f32], device: &Device| -> Result<Tensor> {
        let table = Tensor::from_slice(values, (batch, length, 1, op.half), device)?;
        Ok(table.to_dtype(x.dtype())?)
    };
    let (cos, sin) = (table(&op.cos, x.device())?, table(&op.sin, x.device())?);
    let (first, second) = (x.narrow(3, 0, op.half)?, x.narrow(3, op.half, width - op.half)?);
    let turned_first = (first.broadcast_mul(&cos)? - second.broadcast_mul(&sin)?)?;
    let turned_second = (second.broadcast_mul(&cos)? + first.broadcast_mul(&sin)?)?;
    Ok(Tensor::cat(&[turned_first, turned_second], 3)?.transpose(1, 2)?.contiguous()?)
}

struct Rotate {
    half: usize,
    /// `[batch * length, half]`.
    cos: Vec<f32>,
    sin: Vec<f32>,
}

/// Sizes `[batch, length, heads]` of a tensor to rotate.
type Sizes = [usize; 3];

impl Rotate {
    /// `[batch, length, heads, width]` to `[batch, heads, length, width]`, rotated forward.
    fn forward<T: Real>(&self, x: &[T], [batch, length, heads]: Sizes) -> Vec<T> {
        let (half, width) = (self.half, 2 * self.half);
        let mut y = vec![T::zero(); x.len()];
        for (row, token) in (0..batch * length).zip(x.chunks_exact(heads * width)) {
            let (cos, sin) = (&self.cos[row * half..][..half], &self.sin[row * half..][..half]);
            let (b, t) = (row / length, row % length);
            for (h, head) in token.chunks_exact(width).enumerate() {
                let out = &mut y[((b * heads + h) * length + t) * width..][..width];
                for i in 0..half {
                    let (c, s) = (T::of(cos[i].into()), T::of(sin[i].into()));
                    out[i] = head[i] * c - head[half + i] * s;
                    out[half + i] = head[half + i] * c + head[i] * s;
                }
            }
        }
        y
    }

    /// The transpose of [`Rotate::forward`]: heads move back and the rotation turns the other way.
    fn backward<T: Real>(&self, grad: &[T], [batch, length, heads]: Sizes) -> Vec<T> {
        let (half, width) = (self.half, 2 * self.half);
        let mut dx = vec![T::zero(); grad.len()];
        for (row, token) in (0..batch * length).zip(dx.chunks_exact_mut(heads * width)) {
            let (cos, sin) = (&self.cos[row * half..][..half], &self.sin[row * half..][..half]);
            let (b, t) = (row / length, row % length);
            for (h, head) in token.chunks_exact_mut(width).enumerate() {
                let g = &grad[((b * heads + h) * length + t) * width..][..width];
                for i in 0..half {
                    let (c, s) = (T::of(cos[i].into()), T::of(sin[i].into()));
                    head[i] = g[i] * c + g[half + i] * s;
                    head[half + i] = g[half + i] * c - g[i] * s;
                }
            }
        }
        dx
    }
}

fn forward<T: Real>(x: &CpuStorage, layout: &Layout, op: &Rotate, sizes: Sizes) -> CandleResult<CpuStorage> {
    Ok(T::to_cpu_storage_owned(op.forward(slice::<T>(x, layout)?, sizes)))
}

fn backward<T: Real>(x: &Tensor, grad: &Tensor, op: &Rotate, sizes: Sizes) -> CandleResult<Tensor> {
    read(grad, |grad: &[T]| Tensor::from_vec(op.backward(grad, sizes), x.shape(), x.device()))
}

impl CustomOp1 for Rotate {
    fn name(&self) -> &'static str {
        "rope"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> CandleResult<(CpuStorage, Shape)> {
        let (batch, length, heads, width) = layout.shape().dims4()?;
        let y = by_dtype!(x.dtype(), forward(x, layout, self, [batch, length, heads]))?;
        Ok((y, (batch, heads, length, width).into()))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, grad: &Tensor) -> CandleResult<Option<Tensor>> {
        let (batch, length, heads, _) = x.dims4()?;
        by_dtype!(x.dtype(), backward(x, grad, self, [batch, length, heads])).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::check::{close, gradients, normal};

    const POSITIONS: [u32; 6] = [0, 1, 2, 1, 2, 3];

    #[test]
    fn gradients_equal_finite_differences() -> Result<()> {
        let rope = Rope::new(&Rope::frequencies(4, 100.), 4);
        gradients(&[normal(&[2, 3, 2, 4], 1)?], |inputs| rotate(&inputs[0], &rope, &POSITIONS))
    }

    #[test]
    fn equals_the_composed_form() -> Result<()> {
        let rope = Rope::new(&Rope::frequencies(4, 100.), 4);
        let x = normal(&[2, 3, 2, 4], 1)?.as_detached_tensor();
        let pick = |table: &[f32]| POSITIONS.iter().flat_map(|&at| table[at as usize * 2..][..2].to_vec()).collect();
        let op = Rotate { half: 2, cos: pick(&rope.cos), sin: pick(&rope.sin) };
        close(&rotate(&x, &rope, &POSITIONS)?, &composed(&x, &op)?, 1e-12)
    }

    #[test]
    fn a_position_outside_the_table_is_an_error() -> Result<()> {
        let rope = Rope::new(&Rope::frequencies(4, 100.), 2);
        assert!(rotate(normal(&[1, 3, 1, 4], 1)?.as_tensor(), &rope, &[0, 1, 2]).is_err());
        Ok(())
    }
}
