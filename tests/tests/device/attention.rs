//! Attention on the device in f32 and in bf16, and its gradients, against attention on the host in f64, which the tests of
//! the core hold to a composed form and to finite differences.

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor};
use titer_core::Error;
use titer_core::tensor::ops::{Attention, attention};
use titer_core::tensor::{AttentionMask, Tape, Tokens, Traced};
use titer_core::testing::values;

use crate::operators::{Input, Layout, TYPES, close, normal, results};
use crate::standin::device;

/// A pass: its heads, and the tokens of each sequence.
#[derive(Debug, Clone)]
struct Pass<'a> {
    shape: Attention,
    lengths: &'a [usize],
    /// Tokens of padding behind each sequence.
    padding: usize,
    /// The tokens before, and the row of the cache, of each sequence; and the slots of a row.
    cache: Option<([&'a [usize]; 2], usize)>,
}

/// Tensors of the host on the device.
fn placed(host: &[Tensor], dtype: DType) -> Result<Vec<Tensor>> {
    let device = device()?;
    host.iter().map(|x| Ok(x.to_dtype(dtype)?.to_device(&device)?)).collect()
}

fn heads(query: usize, key_value: usize, width: usize) -> Attention {
    Attention { query, key_value, width, scale: 1. / (width as f64).sqrt(), window: None, cap: None }
}

/// Training on sequences of these lengths.
fn training(shape: Attention, lengths: &[usize]) -> Pass<'_> {
    Pass { shape, lengths, padding: 0, cache: None }
}

impl Pass<'_> {
    fn mask(&self, device: &Device) -> Result<AttentionMask> {
        let rows: Vec<Vec<u32>> = self.lengths.iter().map(|&length| vec![1; length + self.padding]).collect();
        let tokens = Tokens { real: self.lengths.to_vec(), ..Tokens::new(&rows, device)? };
        Ok(match self.cache {
            Some(([starts, rows], slots)) => AttentionMask::after(&tokens, starts, rows, slots)?,
            None => AttentionMask::new(&tokens)?,
        })
    }

    /// Queries, keys and values that `dtype` can hold, f64 on the host. Slots without a token hold no number.
    fn inputs(&self, dtype: DType) -> Result<[Tensor; 3]> {
        let tokens: usize = self.lengths.iter().map(|length| length + self.padding).sum();
        let Attention { query, key_value, width, .. } = self.shape;
        let q = normal(&[tokens, query * width], dtype, 1)?;
        let store = |seed| -> Result<Tensor> {
            let Some(([starts, rows], slots)) = self.cache else {
                return normal(&[tokens, key_value * width], dtype, seed);
            };
            let all = self.lengths.len() * slots;
            let mut filled = vec![f64::NAN; all];
            for ((start, row), length) in starts.iter().zip(rows).zip(self.lengths) {
                filled[row * slots..][..start + length].fill(1.);
            }
            let stored = normal(&[all, key_value * width], dtype, seed)?;
            Ok(stored.broadcast_mul(&Tensor::from_vec(filled, (all, 1), &Device::Cpu)?)?)
        };
        Ok([q, store(2)?, store(3)?])
    }

    /// What a device makes of the inputs: the result and, without a cache, the gradients.
    fn run(&self, inputs: &[Tensor]) -> Result<Vec<(String, Tensor)>> {
        let mask = self.mask(inputs[0].device())?;
        let operator = |tape: &mut Tape, x: &[Traced]| attention(tape, self.shape, [&x[0], &x[1], &x[2]], &mask);
        if self.cache.is_none() {
            return results(inputs, &operator);
        }
        let constants: Vec<Traced> = inputs.iter().cloned().map(Traced::constant).collect();
        let y = operator(&mut Tape::default(), &constants)?;
        Ok(vec![("the result".to_owned(), y.tensor().clone())])
    }

    fn check(&self) -> Result<()> {
        let device = device()?;
        for (dtype, tolerance) in TYPES {
            let host = self.inputs(dtype)?;
            let expected = self.run(&host)?;
            for layout in [Layout::Whole, Layout::Offset] {
                let case = || format!("{dtype:?}, {layout:?}, {self:?}");
                let ours = host.iter().map(|x| Input::Activation(x.dims()).laid_out(x, layout, dtype, &device));
                let found = self.run(&ours.collect::<Result<Vec<_>>>()?).with_context(case)?;
                ensure!(found.len() == expected.len(), "{}: {} gradients", case(), found.len() - 1);
                for ((what, ours), (_, host)) in found.iter().zip(&expected) {
                    close(what, ours, host, tolerance).with_context(case)?;
                }
            }
        }
        Ok(())
    }
}

#[test]
#[ignore = "needs a device: see .ci/device"]
fn head_sizes() -> Result<()> {
    // Those that models have; then some that do not fill a tile, or lie at odd addresses.
    for width in [16, 64, 80, 96, 128, 256, 3, 20, 40, 72, 130] {
        training(heads(2, 1, width), &[37, 20]).check()?;
    }
    Ok(())
}

#[test]
#[ignore = "needs a device: see .ci/device"]
fn groups() -> Result<()> {
    for (query, key_value) in [(1, 1), (3, 3), (6, 2), (7, 1), (14, 2)] {
        training(heads(query, key_value, 16), &[67, 2, 40]).check()?;
    }
    Ok(())
}

#[test]
#[ignore = "needs a device: see .ci/device"]
fn lengths() -> Result<()> {
    for length in [1, 2, 5, 15, 16, 17, 31, 32, 33, 63, 64, 65, 129, 300] {
        training(heads(2, 2, 8), &[length, length.div_ceil(2)]).check()?;
    }
    Ok(())
}

#[test]
#[ignore = "needs a device: see .ci/device"]
fn windows() -> Result<()> {
    // Of one slot alone the gradients of queries and keys are zero, which floats do not show: see `caches`.
    for window in [2, 17, 64, 100, 150, 1000] {
        let shape = Attention { window: Some(window), ..heads(3, 1, 16) };
        training(shape, &[150, 0, 90]).check()?;
    }
    Ok(())
}

/// Over several tiles, and over a cache that is divided into chunks.
#[test]
#[ignore = "needs a device: see .ci/device"]
fn caps() -> Result<()> {
    for (cap, window) in [(0.5, None), (2., Some(17)), (50., None)] {
        let shape = Attention { cap: Some(cap), window, ..heads(4, 2, 16) };
        training(shape, &[150, 1, 90]).check()?;
        Pass { cache: Some(([&[0, 255, 600], &[2, 0, 1]], 701)), ..training(shape, &[1, 1, 1]) }.check()?;
    }
    Ok(())
}

/// Padding sees its sequence, which does not see it; where there is no sequence, it sees one slot.
#[test]
#[ignore = "needs a device: see .ci/device"]
fn padding() -> Result<()> {
    for (padding, window) in [(1, None), (30, None), (70, Some(20))] {
        Pass { padding, ..training(Attention { window, ..heads(4, 2, 16) }, &[50, 0, 90]) }.check()?;
    }
    Ok(())
}

/// Sequences that look at other rows of a cache, after as many tokens as they have: a few, or a chunk's and more.
#[test]
#[ignore = "needs a device: see .ci/device"]
fn caches() -> Result<()> {
    let passes: [(_, &[usize]); 7] = [
        (heads(1, 1, 16), &[1, 1, 1]),
        (heads(6, 2, 64), &[1, 1, 1]),
        (heads(7, 1, 128), &[1, 1, 1]),
        (heads(4, 2, 256), &[1, 1, 1]),
        (heads(6, 2, 80), &[3, 1, 2]),
        (heads(4, 1, 40), &[12, 7, 1]),
        (heads(2, 1, 16), &[90, 20, 33]),
    ];
    for (shape, lengths) in passes {
        for (starts, slots) in [([0, 5, 2], 100), ([0, 255, 600], 701)] {
            for window in [None, Some(1), Some(30)] {
                let shape = Attention { window, ..shape };
                Pass { cache: Some(([&starts, &[2, 0, 1]], slots)), ..training(shape, lengths) }.check()?;
            }
        }
    }
    Ok(())
}

/// Scores whose exponentials no float holds.
#[test]
#[ignore = "needs a device: see .ci/device"]
fn large_scores() -> Result<()> {
    let shape = Attention { scale: 10., ..heads(2, 1, 64) };
    let pass = training(shape, &[70]);
    let [q, k, v] = pass.inputs(DType::BF16)?;
    // Every key is the first one but for a sign, so that rows see ties, and no softmax depends on rounding.
    let signs: Vec<f64> = (0..70).map(|at| if at % 3 == 0 { 1. } else { -1. }).collect();
    let k = k.narrow(0, 0, 1)?.broadcast_mul(&Tensor::from_vec(signs, (70, 1), &Device::Cpu)?)?;
    let expected = pass.run(&[q.clone(), k.clone(), v.clone()])?;
    for (dtype, tolerance) in TYPES {
        let found = pass.run(&placed(&[q.clone(), k.clone(), v.clone()], dtype)?)?;
        // The other two gradients are sums of what cancels, times the scale: their rounding is as large as they are.
        for at in [0, 3] {
            let (what, ours) = &found[at];
            close(&format!("{what} in {dtype:?}"), ours, &expected[at].1, tolerance)?;
        }
        let all = found.iter().map(|(_, x)| values(x)).collect::<titer_core::Result<Vec<_>>>()?;
        ensure!(all.iter().flatten().all(|x| x.is_finite()), "in {dtype:?}: {all:?}");
    }
    Ok(())
}

#[test]
#[ignore = "needs a device: see .ci/device"]
fn numbers_that_are_none_stay_so() -> Result<()> {
    for (dtype, _) in TYPES {
        for cache in [None, Some(([&[299][..], &[0]], 300))] {
            let pass = Pass { cache, ..training(heads(1, 1, 16), &[1]) };
            let [q, k, v] = pass.inputs(dtype)?;
            let inputs = placed(&[(q * f64::NAN)?, k, v], dtype)?;
            let y = pass.run(&inputs)?[0].1.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
            ensure!(y.iter().all(|y| y.is_nan()), "{dtype:?} {cache:?}: {y:?}");
        }
    }
    Ok(())
}

/// To the last bit.
#[test]
#[ignore = "needs a device: see .ci/device"]
fn results_repeat() -> Result<()> {
    let cache = Some(([&[300, 700][..], &[1, 0]], 801));
    let passes = [training(heads(6, 2, 64), &[150, 90]), Pass { cache, ..training(heads(6, 2, 64), &[1, 1]) }];
    for (pass, (dtype, _)) in passes.iter().flat_map(|pass| TYPES.map(|of| (pass, of))) {
        let inputs = placed(&pass.inputs(dtype)?, dtype)?;
        for ((what, one), (_, other)) in pass.run(&inputs)?.iter().zip(&pass.run(&inputs)?) {
            close(&format!("{what} in {dtype:?}, once more"), one, &other.to_device(&Device::Cpu)?, 0.)?;
        }
    }
    Ok(())
}

#[test]
#[ignore = "needs a device: see .ci/device"]
fn what_no_kernel_takes_is_refused() -> Result<()> {
    let refused = |width: usize, types: [DType; 3]| -> Result<Error> {
        let pass = training(heads(1, 1, width), &[3]);
        let inputs = pass.inputs(DType::BF16)?.into_iter().zip(types);
        let inputs = inputs.map(|(x, dtype)| Ok(Traced::constant(placed(&[x], dtype)?.remove(0))));
        let inputs = inputs.collect::<Result<Vec<_>>>()?;
        let mask = pass.mask(&device()?)?;
        let result = attention(&mut Tape::default(), pass.shape, [&inputs[0], &inputs[1], &inputs[2]], &mask);
        result.err().context("it is taken")
    };
    let (bf16, f32) = (DType::BF16, DType::F32);
    let error = refused(257, [bf16; 3])?.to_string();
    ensure!(error.contains("257") && error.contains("256"), "{error}");
    refused(16, [bf16, f32, f32])?;
    refused(16, [f32, f32, bf16])?;
    Ok(())
}
