//! The masked softmax of causal attention, with its scale and mask in one pass.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, Layout, Shape, Tensor};

use super::{CandleResult, Real, by_dtype, exp, on_host, read, slice};
use crate::Result;
use crate::cache::Cache;
use crate::data::Tokens;

/// Which key slots a query may look at, and the position of each token.
///
/// A query in slot `i` of row `b` sees slot `j` if `j ≤ i` and `j` holds a real token: a prompt token
/// (`j < lengths[b]`) or a generated one (`j ≥ prefill`). In training there is no cache and `prefill` is the batch's
/// length, so padding is never seen.
#[derive(Debug, Clone)]
pub struct Visibility {
    filled: usize,
    queries: usize,
    prefill: usize,
    lengths: Vec<usize>,
    /// The position of each token, in row-major order.
    pub positions: Vec<u32>,
}

impl Visibility {
    /// The visibility for one pass over `tokens`, with the cache's earlier tokens before them.
    pub fn new(tokens: &Tokens, cache: Option<&Cache>) -> Self {
        let (batch, queries) = tokens.dims();
        let (filled, prefill, lengths) = match cache {
            Some(cache) => (cache.filled(), cache.prefill(), cache.lengths().to_vec()),
            None => (0, queries, tokens.lengths.clone()),
        };
        let position = |row: usize, slot: usize| match cache {
            Some(cache) => cache.position(row, slot) as u32,
            None => slot as u32,
        };
        let positions = (0..batch * queries).map(|at| position(at / queries, filled + at % queries)).collect();
        Self { filled, queries, prefill, lengths, positions }
    }

    /// The two ranges of slots that a query sees: real prompt tokens, and generated tokens.
    fn ranges(&self, row: usize, query: usize, slots: usize) -> [std::ops::Range<usize>; 2] {
        let end = (self.filled + query + 1).min(slots);
        let prompt = end.min(self.lengths[row]);
        [0..prompt, self.prefill.clamp(prompt, end.max(prompt))..end.max(prompt)]
    }
}

/// `softmax(scale · scores)` over the visible slots, zero elsewhere.
///
/// `scores: [batch, heads, rows, slots]`, where `rows` is a multiple of the pass's tokens (the query heads that share
/// a key/value head lie one after another).
///
/// # Errors
/// A tensor operation failed.
pub fn causal_softmax(scores: &Tensor, scale: f64, visibility: &Visibility) -> Result<Tensor> {
    if on_host(scores) {
        let op = CausalSoftmax { scale, visibility: visibility.clone() };
        return Ok(scores.contiguous()?.apply_op1(op)?);
    }
    composed(scores, scale, visibility)
}

fn composed(scores: &Tensor, scale: f64, visibility: &Visibility) -> Result<Tensor> {
    let (batch, _, rows, slots) = scores.dims4()?;
    let mut mask = vec![f32::NEG_INFINITY; batch * rows * slots];
    for (at, row) in mask.chunks_exact_mut(slots).enumerate() {
        for range in visibility.ranges(at / rows, at % rows % visibility.queries, slots) {
            row[range].fill(0.);
        }
    }
    let mask = Tensor::from_vec(mask, (batch, 1, rows, slots), scores.device())?.to_dtype(scores.dtype())?;
    Ok(candle_nn::ops::softmax(&(scores * scale)?.broadcast_add(&mask)?, candle_core::D::Minus1)?)
}

struct CausalSoftmax {
    scale: f64,
    visibility: Visibility,
}

impl CausalSoftmax {
    /// Calls `f` for every row of scores: its offset and its two visible ranges.
    fn for_each_row(&self, dims: &[usize], mut f: impl FnMut(usize, [std::ops::Range<usize>; 2])) {
        let [batch, heads, rows, slots] = [dims[0], dims[1], dims[2], dims[3]];
        for at in 0..batch * heads * rows {
            let (row, query) = (at / (heads * rows), at % rows % self.visibility.queries);
            f(at * slots, self.visibility.ranges(row, query, slots));
        }
    }
}

fn forward<T: Real>(scores: &CpuStorage, layout: &Layout, op: &CausalSoftmax) -> CandleResult<CpuStorage> {
    let scores = slice::<T>(scores, layout)?;
    let scale = T::of(op.scale);
    let mut probabilities = vec![T::zero(); scores.len()];
    op.for_each_row(layout.dims(), |start, ranges| {
        let spans = ranges.map(|range| start + range.start..start + range.end);
        let maxima = spans.clone().map(|span| exp::max(&scores[span]));
        let max = exp::max(&maxima);
        let mut sum = T::zero();
        for span in spans.clone() {
            for (p, &score) in probabilities[span.clone()].iter_mut().zip(&scores[span.clone()]) {
                *p = ((score - max) * scale).fast_exp();
            }
            sum += exp::sum(&probabilities[span]);
        }
        let inverse = T::one() / sum;
        for span in spans {
            for p in &mut probabilities[span] {
                *p *= inverse;
            }
        }
    });
    Ok(T::to_cpu_storage_owned(probabilities))
}

/// `dS = scale · P ∘ (G − Σ G ∘ P)`, row by row.
fn backward<T: Real>(probabilities: &Tensor, grad: &Tensor, op: &CausalSoftmax) -> CandleResult<Tensor> {
    let scale = T::of(op.scale);
    read(probabilities, |ps: &[T]| {
        read(grad, |gs: &[T]| {
            let mut ds = vec![T::zero(); ps.len()];
            op.for_each_row(probabilities.dims(), |start, ranges| {
                let span = |range: &std::ops::Range<usize>| start + range.start..start + range.end;
                let dot: T =
                    ranges.iter().map(|r| ps[span(r)].iter().zip(&gs[span(r)]).map(|(&p, &g)| p * g).sum::<T>()).sum();
                for range in &ranges {
                    let row = ds[span(range)].iter_mut().zip(&ps[span(range)]).zip(&gs[span(range)]);
                    for ((d, &p), &g) in row {
                        *d = scale * p * (g - dot);
                    }
                }
            });
            Tensor::from_vec(ds, probabilities.shape(), probabilities.device())
        })
    })
}

impl CustomOp1 for CausalSoftmax {
    fn name(&self) -> &'static str {
        "causal-softmax"
    }

    fn cpu_fwd(&self, scores: &CpuStorage, layout: &Layout) -> CandleResult<(CpuStorage, Shape)> {
        Ok((by_dtype!(scores.dtype(), forward(scores, layout, self))?, layout.shape().clone()))
    }

    fn bwd(&self, _scores: &Tensor, probabilities: &Tensor, grad: &Tensor) -> CandleResult<Option<Tensor>> {
        by_dtype!(grad.dtype(), backward(probabilities, grad, self)).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::check::{close, gradients, normal};
    use candle_core::Device;

    /// Two rows of 4 and 2 tokens; two query heads share one key/value head.
    fn visibility() -> Result<Visibility> {
        let tokens = Tokens::pad(&[vec![1u32, 2, 3, 4], vec![5, 6]], 0, &Device::Cpu)?;
        Ok(Visibility::new(&tokens, None))
    }

    #[test]
    fn gradients_equal_finite_differences() -> Result<()> {
        let visibility = visibility()?;
        gradients(&[normal(&[2, 1, 8, 4], 1)?], |inputs| causal_softmax(&inputs[0], 0.5, &visibility))
    }

    #[test]
    fn equals_the_composed_form_and_sees_no_padding_and_no_future() -> Result<()> {
        let (visibility, scores) = (visibility()?, normal(&[2, 1, 8, 4], 1)?.as_detached_tensor());
        let fused = causal_softmax(&scores, 0.5, &visibility)?;
        close(&fused, &composed(&scores, 0.5, &visibility)?, 1e-12)?;
        let rows = fused.squeeze(1)?.to_vec3::<f64>()?;
        assert_eq!(rows[0][1][2..], [0., 0.], "token 1 sees no later token");
        assert_eq!(rows[1][3][2..], [0., 0.], "padding is not seen");
        Ok(())
    }

    #[test]
    fn generated_tokens_skip_the_gap_that_padding_left() {
        let visibility = Visibility { filled: 5, queries: 1, prefill: 4, lengths: vec![4, 2], positions: vec![] };
        assert_eq!(visibility.ranges(0, 0, 6), [0..4, 4..6]);
        assert_eq!(visibility.ranges(1, 0, 6), [0..2, 4..6]);
    }
}
