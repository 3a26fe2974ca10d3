//! Causal attention without the matrix of scores.

use candle_core::Tensor;
use titer_kernels::attention::{self as kernels, Attention};

use crate::error::{Error, Result};
use crate::tensor::host::{Element, by_dtype, read_all, tensor};
use crate::tensor::mask::AttentionMask;
use crate::tensor::tape::{Tape, Traced};

/// `softmax(scale · Q Kᵀ) V` over the visible slots; scaled scores are capped where `shape` says so.
///
/// `q: [tokens, query · width]`; `k` and `v: [slots, key_value · width]`, where `mask` says which slots belong to which
/// sequence. Gives the shape of `q`.
///
/// # Errors
/// Shapes that do not fit, or a tensor operation failed.
pub fn attention(tape: &mut Tape, shape: Attention, [q, k, v]: [&Traced; 3], mask: &AttentionMask) -> Result<Traced> {
    let (qs, ks, vs) = (q.tensor().contiguous()?, k.tensor().contiguous()?, v.tensor().contiguous()?);
    check(shape, [&qs, &ks, &vs], mask)?;
    let tracked = q.tracked() || k.tracked() || v.tracked();
    let (y, sums) = dispatch!(
        qs,
        crate::tensor::cuda::attention(shape, [&qs, &ks, &vs], mask),
        by_dtype!(qs.dtype(), forward(shape, [&qs, &ks, &vs], mask, tracked))
    )?;
    let (result, mask) = (y.clone(), mask.clone());
    Ok(tape.record(y, &[q, k, v], move |gradient, into| {
        mask.check_differentiable(ks.dims()[0])?;
        let gradients = dispatch!(
            qs,
            crate::tensor::cuda::attention_backward(shape, [&qs, &ks, &vs], [&result, &sums, &gradient], &mask),
            by_dtype!(qs.dtype(), backward(shape, [&qs, &ks, &vs], [&result, &sums, &gradient], &mask))
        )?;
        gradients.into_iter().enumerate().try_for_each(|(index, gradient)| into.add(index, gradient))
    }))
}

fn check(shape: Attention, [q, k, v]: [&Tensor; 3], mask: &AttentionMask) -> Result<()> {
    let ((tokens, width), (slots, narrow)) = (q.dims2()?, k.dims2()?);
    let fits = width == shape.query * shape.width
        && narrow == shape.key_value * shape.width
        && k.dims() == v.dims()
        && tokens == mask.positions.len()
        && mask.sequences.iter().all(|sequence| sequence.keys + sequence.end.max(sequence.queries) <= slots);
    if fits {
        return Ok(());
    }
    Err(Error::run(format!("attention: queries {:?} do not fit keys {:?} and {shape:?}", q.dims(), k.dims())))
}

/// The result and, if `keep`, `max + ln Σ exp` of each row of scores, `[heads, tokens]`.
fn forward<T: Element>(
    shape: Attention,
    [q, k, v]: [&Tensor; 3],
    mask: &AttentionMask,
    keep: bool,
) -> Result<(Tensor, Tensor)> {
    read_all([q, k, v], |inputs: [&[T]; 3]| {
        let (y, sums) = kernels::forward(shape, inputs, &mask.sequences, keep);
        let count = sums.len();
        Ok((tensor(y, q.dims())?, tensor(sums, &[count])?))
    })
}

fn backward<T: Element>(
    shape: Attention,
    [q, k, v]: [&Tensor; 3],
    [y, sums, gradient]: [&Tensor; 3],
    mask: &AttentionMask,
) -> Result<[Tensor; 3]> {
    read_all([q, k, v, y, sums, gradient], |[qs, ks, vs, y, sums, g]: [&[T]; 6]| {
        let [dq, dk, dv] = kernels::backward(shape, [qs, ks, vs], [y, sums, g], &mask.sequences);
        Ok([tensor(dq, q.dims())?, tensor(dk, k.dims())?, tensor(dv, v.dims())?])
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::check::{close, gradients, normal};
    use crate::tensor::tokens::Tokens;
    use candle_core::{D, Device};
    use titer_kernels::attention::TILE;

    const SHAPE: Attention = Attention { query: 4, key_value: 2, width: 3, scale: 0.5, window: None, cap: None };

    /// Two sequences of `length` and `length − 2` tokens.
    fn attention_mask(length: usize) -> Result<AttentionMask> {
        AttentionMask::new(&Tokens::new(&[vec![1u32; length], vec![1; length - 2]], &Device::Cpu)?)
    }

    /// The same from candle's tensor operations, with the whole matrix of scores.
    fn composed(shape: Attention, [q, k, v]: [&Tensor; 3], attention_mask: &AttentionMask) -> Result<Tensor> {
        let (tokens, slots) = (q.dims()[0], k.dims()[0]);
        let heads = |x: &Tensor, count: usize| -> Result<Tensor> {
            let x = x.reshape((x.dims()[0], count, shape.width))?.transpose(0, 1)?;
            let repeat = Tensor::arange(0u32, shape.query as u32, &Device::Cpu)?;
            let index = repeat.to_vec1::<u32>()?.iter().map(|h| h / (shape.query / count) as u32).collect::<Vec<_>>();
            Ok(x.contiguous()?.index_select(&Tensor::new(index, &Device::Cpu)?, 0)?)
        };
        let (q, k, v) = (heads(q, shape.query)?, heads(k, shape.key_value)?, heads(v, shape.key_value)?);
        let mut mask = vec![f64::NEG_INFINITY; tokens * slots];
        for sequence in &attention_mask.sequences {
            for query in 0..sequence.queries {
                let seen = sequence.range(query, shape.window);
                mask[(sequence.first + query) * slots + sequence.keys..][seen].fill(0.);
            }
        }
        let mask = Tensor::from_vec(mask, (1, tokens, slots), &Device::Cpu)?;
        let scores = (q.matmul(&k.t()?)? * shape.scale)?;
        let scores = match shape.cap {
            Some(cap) => ((scores / cap)?.tanh()? * cap)?,
            None => scores,
        };
        let scores = scores.broadcast_add(&mask)?;
        let mixed = candle_nn::ops::softmax(&scores, D::Minus1)?.matmul(&v)?;
        Ok(mixed.transpose(0, 1)?.reshape((tokens, shape.query * shape.width))?)
    }

    fn inputs(length: usize) -> Result<Vec<candle_core::Var>> {
        let tokens = 2 * length - 2;
        [12, 6, 6].iter().enumerate().map(|(seed, &width)| normal(&[tokens, width], seed as u64)).collect()
    }

    #[test]
    fn gradients_equal_finite_differences() -> Result<()> {
        let attention_mask = attention_mask(5)?;
        for (window, cap) in [(None, None), (Some(2), None), (None, Some(0.7)), (Some(2), Some(0.7))] {
            let shape = Attention { window, cap, ..SHAPE };
            gradients(&inputs(5)?, |tape, x| attention(tape, shape, [&x[0], &x[1], &x[2]], &attention_mask))?;
        }
        Ok(())
    }

    #[test]
    fn equals_the_composed_form_over_several_tiles() -> Result<()> {
        let length = 2 * TILE + 7;
        let (attention_mask, vars) = (attention_mask(length)?, inputs(length)?);
        for (window, cap) in [(None, None), (Some(70), None), (Some(70), Some(0.7))] {
            let shape = Attention { window, cap, ..SHAPE };
            let mut tape = Tape::default();
            let values: Vec<Traced> = vars.iter().map(|var| tape.parameter(var.as_tensor())).collect();
            let fused = attention(&mut tape, shape, [&values[0], &values[1], &values[2]], &attention_mask)?;
            let expected = composed(shape, [&vars[0], &vars[1], &vars[2]], &attention_mask)?;
            close(fused.tensor(), &expected, 1e-12)?;
            let seed = normal(fused.tensor().dims(), 9)?.as_detached_tensor();
            let store = (expected * &seed)?.sum_all()?.backward()?;
            let mut found = tape.backward(vec![(fused, seed)])?;
            for var in &vars {
                let gradient = found.take(var.as_tensor()).expect("a gradient");
                close(&gradient, store.get(var).expect("a gradient"), 1e-11)?;
            }
        }
        Ok(())
    }

    #[test]
    fn a_single_query_after_a_cache_equals_the_last_of_many() -> Result<()> {
        let vars = inputs(5)?;
        let values: Vec<Traced> = vars.iter().map(|var| Traced::constant(var.as_detached_tensor())).collect();
        let tape = &mut Tape::default();
        let one = Tokens::new(&[[1u32], [1]], &Device::Cpu)?;
        // The sequences swapped, each after its own number of earlier tokens.
        let later = AttentionMask::after(&one, &[2, 4], &[1, 0], 5)?;
        let q = Traced::constant(Tensor::cat(&[vars[0].narrow(0, 7, 1)?, vars[0].narrow(0, 4, 1)?], 0)?.detach());
        for cap in [None, Some(0.7)] {
            let shape = Attention { cap, ..SHAPE };
            let full = attention(tape, shape, [&values[0], &values[1], &values[2]], &attention_mask(5)?)?;
            let last = attention(tape, shape, [&q, &values[1], &values[2]], &later)?;
            close(&last.tensor().get(0)?, &full.tensor().get(7)?, 1e-12)?;
            close(&last.tensor().get(1)?, &full.tensor().get(4)?, 1e-12)?;
        }
        Ok(())
    }

    #[test]
    fn no_future_no_padding_and_nothing_before_the_window_is_seen() -> Result<()> {
        let padded = Tokens { real: vec![5, 3], ..Tokens::new(&[[1u32; 5], [1; 5]], &Device::Cpu)? };
        let sequences = AttentionMask::new(&padded)?.sequences;
        assert_eq!(sequences[0].range(2, None), 0..3);
        assert_eq!(sequences[0].range(4, Some(2)), 3..5);
        assert_eq!(sequences[1].range(4, None), 0..3);
        Ok(())
    }
}
