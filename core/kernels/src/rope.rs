//! Rotary positions (Su et al. 2021), in the rotate-half layout of the Hugging Face checkpoints.

use crate::parallel::rows;
use crate::real::Real;

/// Rotates every head of `x`, one row for each token, by the angles of its token's position forward (`direction` 1) or,
/// the transpose, back (−1). `cos` and `sin` have a row of `half` a head's width for each position.
pub fn rotate<T: Real>(x: &[T], [cos, sin]: [&[f32]; 2], half: usize, positions: &[u32], direction: f64) -> Vec<T> {
    let (width, direction) = (x.len() / positions.len(), T::of(direction));
    let mut y = vec![T::zero(); x.len()];
    rows(
        &mut y,
        width,
        #[inline(always)]
        |first, part| {
            for (row, (y, x)) in part.chunks_exact_mut(width).zip(x[first * width..].chunks_exact(width)).enumerate() {
                let angles = positions[first + row] as usize * half;
                let (cos, sin) = (&cos[angles..][..half], &sin[angles..][..half]);
                for (y, x) in y.chunks_exact_mut(2 * half).zip(x.chunks_exact(2 * half)) {
                    let ((y0, y1), (x0, x1)) = (y.split_at_mut(half), x.split_at(half));
                    for i in 0..half {
                        let (c, s) = (T::of(f64::from(cos[i])), T::of(f64::from(sin[i])) * direction);
                        y0[i] = x0[i] * c - x1[i] * s;
                        y1[i] = x1[i] * c + x0[i] * s;
                    }
                }
            }
        },
    );
    y
}
