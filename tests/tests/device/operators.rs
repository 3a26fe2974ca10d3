//! Every operator on the device in f32 and in bf16, against the same operator on the host in f64, whose gradients the tests
//! of the core hold to finite differences. Inputs lie in memory in three ways, and sizes are odd, one row and one column.

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor, Var};
use titer_core::rng::{Seed, randn};
use titer_core::tensor::dropout::{Dropout, dropout};
use titer_core::tensor::elementwise::{add_assign, argmax, cache_write, norm, sum};
use titer_core::tensor::ops::{
    Activation, LinearLayer, LowRank, Rope, activate, add, add_layer_norm, add_rms_norm, cross_entropy, embed, exp,
    gated, head_cross_entropy, layer_norm, linear, linears, ln, log_softmax, matmul, mean_all, rms_norm, rotate,
    select_rows, soft_cap, split_columns, sum_all, sum_last, swiglu,
};
use titer_core::tensor::{AttentionMask, Gemm, Scalar, Tape, Tokens, Traced};
use titer_core::testing::values;

use crate::standin::device;

/// The largest error of an element by type, as a share of the tensor's largest element or of 0.1: bf16 keeps 8 bits.
pub(crate) const TYPES: [(DType, f64); 2] = [(DType::F32, 2e-5), (DType::BF16, 2e-2)];

const ACTIVATIONS: [Activation; 5] =
    [Activation::Relu, Activation::GeluTanh, Activation::Gelu, Activation::Silu, Activation::Tanh];

/// How the elements of an input lie in memory.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Layout {
    /// One behind the other, from the start.
    Whole,
    /// Behind a row that belongs to nobody.
    Offset,
    /// Column by column.
    Turned,
}

/// An input by its shape.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Input<'a> {
    /// May lie in any way.
    Activation(&'a [usize]),
    /// Is never turned.
    Parameter(&'a [usize]),
}
use Input::{Activation as X, Parameter as W};

impl Input<'_> {
    fn shape(&self) -> &[usize] {
        let (X(shape) | W(shape)) = self;
        shape
    }

    /// `host` in this type on `device`.
    pub(crate) fn laid_out(&self, host: &Tensor, layout: Layout, dtype: DType, device: &Device) -> Result<Tensor> {
        let x = host.to_dtype(dtype)?.to_device(device)?;
        Ok(match (layout, self) {
            (Layout::Offset, _) => {
                let before = x.narrow(0, 0, 1)?.ones_like()?;
                Tensor::cat(&[&before, &x], 0)?.narrow(0, 1, x.dims()[0])?
            }
            (Layout::Turned, X([.., _, _])) => {
                let (rows, columns) = (x.rank() - 2, x.rank() - 1);
                x.transpose(rows, columns)?.contiguous()?.transpose(rows, columns)?
            }
            _ => x,
        })
    }
}

/// Normal numbers that `dtype` can hold, f64 on the host.
pub(crate) fn normal(shape: &[usize], dtype: DType, seed: u64) -> Result<Tensor> {
    let drawn = randn(shape, &mut Seed::new(seed).generator(), &Device::Cpu)?;
    Ok(drawn.to_dtype(dtype)?.to_dtype(DType::F64)?)
}

/// Fails unless two tensors agree in every element, within `tolerance` of the largest or of 0.1.
pub(crate) fn close(what: &str, ours: &Tensor, host: &Tensor, tolerance: f64) -> Result<()> {
    ensure!(ours.dims() == host.dims(), "{what}: shape {:?} instead of {:?}", ours.dims(), host.dims());
    let host = values(host)?;
    let largest = host.iter().fold(0f64, |max, x| max.max(x.abs()));
    for (at, (x, y)) in values(ours)?.into_iter().zip(host).enumerate() {
        ensure!(
            (x - y).abs() <= tolerance * largest.max(0.1),
            "{what}: element {at} is {x} instead of {y}, of {largest} at most"
        );
    }
    Ok(())
}

/// The result of an operator, and the gradient of each input that gets one.
pub(crate) fn results(
    inputs: &[Tensor],
    operator: &impl Fn(&mut Tape, &[Traced]) -> titer_core::Result<Traced>,
) -> Result<Vec<(String, Tensor)>> {
    let mut tape = Tape::default();
    let probed = inputs.iter().enumerate();
    let traced: Vec<Traced> =
        probed.map(|(at, input)| tape.probe(&at.to_string(), &Traced::constant(input.clone()))).collect();
    let y = operator(&mut tape, &traced)?;
    let seed = normal(y.tensor().dims(), y.tensor().dtype(), 99)?.to_dtype(y.tensor().dtype())?;
    let result = y.tensor().clone();
    let found = tape.backward(vec![(y, seed.to_device(result.device())?)])?.into_probes();
    let gradients = found.iter().map(|(at, gradient)| (format!("the gradient of input {at}"), gradient.clone()));
    Ok(std::iter::once(("the result".to_owned(), result)).chain(gradients).collect())
}

/// Holds an operator on the device to itself on the host, in every type and layout.
fn check(inputs: &[Input], operator: impl Fn(&mut Tape, &[Traced]) -> titer_core::Result<Traced>) -> Result<()> {
    let device = device()?;
    for (dtype, tolerance) in TYPES {
        let drawn = inputs.iter().enumerate().map(|(at, input)| normal(input.shape(), dtype, at as u64));
        let host: Vec<Tensor> = drawn.collect::<Result<_>>()?;
        let expected = results(&host, &operator)?;
        for layout in [Layout::Whole, Layout::Offset, Layout::Turned] {
            let case = || format!("{dtype:?}, {layout:?}, {inputs:?}");
            let ours = inputs.iter().zip(&host).map(|(input, x)| input.laid_out(x, layout, dtype, &device));
            let found = results(&ours.collect::<Result<Vec<_>>>()?, &operator).with_context(case)?;
            ensure!(found.len() == expected.len(), "{}: {} gradients", case(), found.len() - 1);
            for ((what, ours), (_, host)) in found.iter().zip(&expected) {
                close(what, ours, host, tolerance).with_context(case)?;
            }
        }
    }
    Ok(())
}

/// Shapes of activations: odd, one row, one column, one element, wider than a block.
const SHAPES: [&[usize]; 6] = [&[3, 37], &[1, 64], &[5, 1], &[1, 1], &[2, 3, 24], &[2, 601]];

/// Tensors of whole numbers below `limit`, where `like` lives.
fn whole(shape: &[usize], limit: usize, like: &Traced) -> titer_core::Result<Tensor> {
    let count: usize = shape.iter().product();
    let numbers: Vec<u32> = (0..count).map(|at| ((at * 7 + 3) % limit) as u32).collect();
    Ok(Tensor::from_vec(numbers, shape, like.tensor().device())?)
}

#[test]
#[ignore = "needs a device: see .ci/device"]
fn sums_of_residuals() -> Result<()> {
    SHAPES.into_iter().try_for_each(|shape| check(&[X(shape), X(shape)], |tape, x| add(tape, &x[0], &x[1])))
}

#[test]
#[ignore = "needs a device: see .ci/device"]
fn gates() -> Result<()> {
    for activation in ACTIVATIONS {
        for shape in SHAPES {
            check(&[X(shape), X(shape)], |tape, x| gated(tape, activation, [&x[0], &x[1]]))?;
        }
    }
    Ok(())
}

#[test]
#[ignore = "needs a device: see .ci/device"]
fn soft_caps() -> Result<()> {
    SHAPES.into_iter().try_for_each(|shape| check(&[X(shape)], |tape, x| soft_cap(tape, 0.7, &x[0])))
}

#[test]
#[ignore = "needs a device: see .ci/device"]
fn groups_of_columns() -> Result<()> {
    check(&[X(&[5, 24])], |tape, x| {
        let [left, _, right] = split_columns(tape, &x[0], [7, 10, 7])?;
        swiglu(tape, &left, &right)
    })
}

#[test]
#[ignore = "needs a device: see .ci/device"]
fn activations() -> Result<()> {
    for activation in ACTIVATIONS {
        for shape in SHAPES {
            check(&[X(shape)], |tape, x| activate(tape, activation, &x[0]))?;
        }
    }
    Ok(())
}

#[test]
#[ignore = "needs a device: see .ci/device"]
fn rms_norms() -> Result<()> {
    for shape in SHAPES {
        let width = &shape[shape.len() - 1..];
        check(&[X(shape), W(width)], |tape, x| rms_norm(tape, &x[0], &x[1], 1e-5))?;
        check(&[X(shape)], |tape, x| {
            let weight = Traced::constant(x[0].tensor().ones_like()?.flatten_all()?.narrow(0, 0, width[0])?);
            rms_norm(tape, &x[0], &weight, 1e-5)
        })?;
        // What is normalised goes on beside it, so that two gradients meet in it.
        check(&[X(shape), X(shape), W(width)], |tape, x| {
            let [sum, y] = add_rms_norm(tape, [&x[0], &x[1]], &x[2], 1e-5)?;
            swiglu(tape, &sum, &y)
        })?;
    }
    Ok(())
}

#[test]
#[ignore = "needs a device: see .ci/device"]
fn layer_norms() -> Result<()> {
    for shape in SHAPES {
        let width = &shape[shape.len() - 1..];
        // Of one column nothing is left but the bias, and of the gradient nothing at all.
        if width[0] > 1 {
            check(&[X(shape), W(width), W(width)], |tape, x| layer_norm(tape, &x[0], &x[1], &x[2], 1e-5))?;
            check(&[X(shape), X(shape), W(width), W(width)], |tape, x| {
                let [sum, y] = add_layer_norm(tape, [&x[0], &x[1]], [&x[2], &x[3]], 1e-5)?;
                swiglu(tape, &sum, &y)
            })?;
        }
    }
    Ok(())
}

/// Sequences of `length` tokens that continue these rows of a cache of 16 slots each after so many tokens.
fn mask(length: usize, starts: &[usize], rows: &[usize], device: &Device) -> titer_core::Result<AttentionMask> {
    AttentionMask::after(&Tokens::new(&vec![vec![0; length]; starts.len()], device)?, starts, rows, 16)
}

#[test]
#[ignore = "needs a device: see .ci/device"]
fn rotations() -> Result<()> {
    for (rows, length, heads, width) in [(2, 3, 2, 4), (1, 1, 1, 2), (3, 7, 3, 18)] {
        let rope = Rope::new(&Rope::frequencies(width, 1e4), 16);
        let starts: Vec<usize> = (0..rows).collect();
        // Queries and keys have heads of their own; each is looked at by itself.
        for which in [0, 1] {
            check(&[X(&[rows, length, heads * width]), X(&[rows, length, width])], |tape, x| {
                let mask = mask(length, &starts, &starts, x[0].tensor().device())?;
                let [q, k] = rotate(tape, [&x[0], &x[1]], &rope.at(&mask, x[0].tensor())?)?;
                Ok(if which == 0 { q } else { k })
            })?;
        }
    }
    Ok(())
}

#[test]
#[ignore = "needs a device: see .ci/device"]
fn rows_that_are_chosen() -> Result<()> {
    for (rows, width, chosen) in [(7, 37, 3), (1, 1, 1), (5, 300, 5)] {
        // From the last one on, each once.
        let index: Vec<u32> = (0..chosen as u32).map(|at| rows as u32 - 1 - at).collect();
        check(&[X(&[rows, width])], |tape, x| {
            select_rows(tape, &x[0], &Tensor::new(index.as_slice(), x[0].tensor().device())?)
        })?;
        // Ids that come more than once.
        check(&[W(&[rows, width])], |tape, x| embed(tape, &x[0], &whole(&[2, chosen + 6], rows, &x[0])?))?;
    }
    Ok(())
}

/// Rows, inner and outer widths of a linear layer.
const LINEAR: [[usize; 3]; 4] = [[6, 37, 19], [1, 64, 48], [5, 1, 3], [3, 7, 1]];

#[test]
#[ignore = "needs a device: see .ci/device"]
fn linear_layers() -> Result<()> {
    for [rows, inner, outer] in LINEAR {
        let (x, w, bias) = (X(&[rows, inner]), W(&[outer, inner]), W(&[outer]));
        check(&[x, w], |tape, x| linear(tape, &x[0], &x[1], None, None))?;
        check(&[x, w, bias], |tape, x| linear(tape, &x[0], &x[1], Some(&x[2]), None))?;
    }
    // Of two layers the input gets the sum.
    check(&[X(&[5, 12]), W(&[7, 12]), W(&[7, 12])], |tape, x| {
        let (left, right) = (linear(tape, &x[0], &x[1], None, None)?, linear(tape, &x[0], &x[2], None, None)?);
        add(tape, &left, &right)
    })
}

#[test]
#[ignore = "needs a device: see .ci/device"]
fn adapters() -> Result<()> {
    // A kernel works on 16 ranks at a time, on 4 or 8 rows of `x` or a segment of 64, or more from 1024 rows on, and on 1024
    // columns; large ranks have no kernel.
    let small = [[6, 37, 19, 3], [1, 64, 48, 8], [5, 1, 3, 1], [3, 7, 1, 16]];
    for [rows, inner, outer, rank] in
        small.into_iter().chain([[130, 36, 1032, 20], [9, 1030, 5, 2], [1090, 8, 4, 2], [7, 12, 10, 33]])
    {
        let inputs = [X(&[rows, inner]), W(&[outer, inner]), W(&[rank, inner]), W(&[outer, rank])];
        for mask in [None, Some(MASK)] {
            check(&inputs, |tape, x| {
                let low_rank = LowRank { a: x[2].clone(), b: x[3].clone(), scale: 0.5, mask };
                linear(tape, &x[0], &x[1], None, Some(low_rank))
            })?;
        }
    }
    Ok(())
}

/// Layers of one input, each with a width, a rank and a mask of its own, or without an adapter.
#[test]
#[ignore = "needs a device: see .ci/device"]
fn adapters_of_several_layers() -> Result<()> {
    let factors = [W(&[3, 24]), W(&[20, 3]), W(&[8, 24]), W(&[20, 8])];
    let inputs = [&[X(&[70, 24]), W(&[20, 24]), W(&[20, 24]), W(&[7, 24])][..], &factors].concat();
    for which in 0..=3 {
        check(&inputs, |tape, x| {
            let own = |a: usize, layer| {
                let mask = Some(Dropout { layer, ..MASK });
                Some(LowRank { a: x[a].clone(), b: x[a + 1].clone(), scale: 0.5, mask })
            };
            let layer = |weight: usize, low_rank| LinearLayer { weight: (&x[weight]).into(), bias: None, low_rank };
            let ys = linears(tape, &x[0], [layer(1, own(4, 3)), layer(2, own(6, 4)), layer(3, None)])?;
            // One by one, where the others have no gradient, and two together.
            if which < ys.len() { Ok(ys[which].clone()) } else { swiglu(tape, &ys[0], &ys[1]) }
        })?;
    }
    Ok(())
}

#[test]
#[ignore = "needs a device: see .ci/device"]
fn losses() -> Result<()> {
    for (rows, width, vocabulary) in [(5, 12, 37), (1, 3, 300), (7, 1, 2)] {
        check(&[X(&[rows, width]), W(&[vocabulary, width])], |tape, x| {
            head_cross_entropy(tape, &x[0], &x[1], &whole(&[rows], vocabulary, &x[0])?)
        })?;
        check(&[X(&[rows, vocabulary])], |tape, x| cross_entropy(tape, &x[0], &whole(&[rows], vocabulary, &x[0])?))?;
    }
    Ok(())
}

/// More labels than fit into one block of logits: the second one does not begin where the hidden states do.
#[test]
#[ignore = "needs a device: see .ci/device"]
fn losses_in_blocks() -> Result<()> {
    let (rows, vocabulary) = (65, 1 << 18);
    let host = [normal(&[rows, 1], DType::F32, 1)?, normal(&[vocabulary, 1], DType::F32, 2)?];
    let operator =
        |tape: &mut Tape, x: &[Traced]| head_cross_entropy(tape, &x[0], &x[1], &whole(&[rows], vocabulary, &x[0])?);
    let ours = host.clone().map(|x| x.to_dtype(DType::F32)?.to_device(&device()?).context("an upload"));
    let ours = ours.into_iter().collect::<Result<Vec<_>>>()?;
    let (found, expected) = (results(&ours, &operator)?, results(&host, &operator)?);
    found.iter().zip(&expected).try_for_each(|((what, ours), (_, host))| close(what, ours, host, 1e-4))
}

type Expression = (&'static str, fn(&[Var]) -> titer_core::Result<Tensor>);

/// An expression in candle's own graph, and the gradients of its inputs.
fn expression(inputs: &[Tensor], f: &dyn Fn(&[Var]) -> titer_core::Result<Tensor>) -> Result<Vec<Tensor>> {
    let vars = inputs.iter().map(Var::from_tensor).collect::<candle_core::Result<Vec<_>>>()?;
    let y = f(&vars)?;
    // Of a single number candle would sum nothing, with a buffer of no bytes.
    let store = y.sqr()?.flatten_all()?.sum_all()?.backward()?;
    let gradients = vars.iter().map(|var| store.get(var).cloned().context("a gradient"));
    std::iter::once(Ok(y)).chain(gradients).collect()
}

#[test]
#[ignore = "needs a device: see .ci/device"]
fn expressions() -> Result<()> {
    let device = device()?;
    let unary: [Expression; 9] = [
        ("exp", |x| exp(&x[0])),
        ("ln", |x| ln(&exp(&x[0])?)),
        ("sum_last", |x| sum_last(&x[0])),
        ("sum_last, turned", |x| sum_last(&x[0].t()?)),
        ("sum_all", |x| sum_all(&x[0])),
        ("mean_all", |x| mean_all(&x[0])),
        ("log_softmax, rows", |x| log_softmax(&x[0], 1)),
        ("log_softmax, columns", |x| log_softmax(&x[0], 0)),
        ("matmul", |x| matmul(&x[0], &x[0].t()?.contiguous()?)),
    ];
    for shape in [[3, 37], [1, 300], [5, 1], [1, 1]] {
        let host = [normal(&shape, DType::F32, 1)?];
        let ours = [host[0].to_dtype(DType::F32)?.to_device(&device)?];
        for (name, f) in unary {
            let (found, expected) = (expression(&ours, &f)?, expression(&host, &f)?);
            let mut pairs = found.iter().zip(&expected);
            pairs.try_for_each(|(ours, host)| close(&format!("{name} of {shape:?}"), ours, host, 1e-4))?;
        }
    }
    Ok(())
}

#[test]
#[ignore = "needs a device: see .ci/device"]
fn products() -> Result<()> {
    let device = device()?;
    for (dtype, tolerance) in TYPES {
        for [m, n, k] in [[3, 5, 4], [1, 1, 1], [17, 33, 65], [1, 300, 7]] {
            for (gemm, a, b) in [(Gemm::NN, [m, k], [k, n]), (Gemm::NT, [m, k], [n, k]), (Gemm::TN, [k, m], [k, n])] {
                let gemm = gemm.times(-0.5);
                let host = [normal(&a, dtype, 1)?, normal(&b, dtype, 2)?, normal(&[m, n], dtype, 3)?];
                for layout in [Layout::Whole, Layout::Offset] {
                    let place = |x: &Tensor| W(x.dims()).laid_out(x, layout, dtype, &device);
                    let [a, b, c] = [place(&host[0])?, place(&host[1])?, place(&host[2])?];
                    let (product, case) = (gemm.product(&host[0], &host[1])?, format!("{gemm:?} {layout:?} {dtype:?}"));
                    close(&case, &gemm.product(&a, &b)?, &product, tolerance)?;
                    close(&case, &gemm.product_as(&a, &b, DType::F32)?, &product, 2e-5)?;
                    gemm.add_to(&c, &a, &b)?;
                    close(&case, &c, &(&product + &host[2])?, tolerance)?;
                }
            }
        }
    }
    Ok(())
}

#[test]
#[ignore = "needs a device: see .ci/device"]
fn arithmetic_without_gradients() -> Result<()> {
    let device = device()?;
    for (dtype, tolerance) in TYPES {
        for shape in SHAPES {
            for layout in [Layout::Whole, Layout::Offset, Layout::Turned] {
                let case = format!("{dtype:?} {layout:?} {shape:?}");
                let (a, b) = (normal(shape, dtype, 1)?, normal(shape, dtype, 2)?);
                let ours = [&a, &b].map(|x| X(shape).laid_out(x, layout, dtype, &device));
                let [x, y] = ours.map(|x| x.expect("an upload"));
                close(&case, &sum(&x, &y)?, &(&a + &b)?, tolerance)?;
                let length = norm([&x, &y])?.value()?;
                let expected = norm([&a, &b])?.value()?;
                ensure!((length - expected).abs() <= 2e-6 * expected, "{case}: norm {length} instead of {expected}");
                // Only what has its own memory is added to.
                let target = x.contiguous()?;
                add_assign(&target, &y)?;
                close(&case, &target, &(&a + &b)?, tolerance)?;
            }
        }
    }
    Ok(())
}

const MASK: Dropout = Dropout { key: [0x9e37_79b9, 7], layer: 3, p: 0.25 };

/// The device drops the very numbers that the host drops, the last of a tensor as well as the first.
#[test]
#[ignore = "needs a device: see .ci/device"]
fn dropout_masks() -> Result<()> {
    let device = device()?;
    for (dtype, tolerance) in TYPES {
        for count in [1, 3, 4, 1023, 70_001] {
            let x = normal(&[count, 1], dtype, 1)?;
            for layout in [Layout::Whole, Layout::Offset] {
                let case = format!("{dtype:?} {layout:?} {count}");
                let ours = X(&[count, 1]).laid_out(&x, layout, dtype, &device)?;
                let kept = dropout(&x, MASK)?;
                let found = dropout(&ours, MASK)?;
                close(&case, &found, &kept, tolerance)?;
                let zero = |x: &Tensor| -> Result<Vec<u8>> {
                    Ok(x.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.eq(0.)?.flatten_all()?.to_vec1()?)
                };
                ensure!(zero(&found)? == zero(&kept)?, "{case}: other numbers are dropped");
            }
        }
    }
    Ok(())
}

/// The first of equal numbers is the greatest; a row that has one which is not finite has none.
#[test]
#[ignore = "needs a device: see .ci/device"]
fn greatest_numbers() -> Result<()> {
    let device = device()?;
    for width in [1, 5, 300, 1000] {
        for (dtype, _) in TYPES {
            let mut x: Vec<f32> = values(&normal(&[4, width], dtype, 1)?)?.into_iter().map(|x| x as f32).collect();
            let at = |x: &[f32], on: &Device| -> Result<_> {
                Ok(argmax(&Tensor::from_slice(x, (4, width), on)?.to_dtype(if on.is_cpu() {
                    DType::F32
                } else {
                    dtype
                })?)?)
            };
            let greatest = at(&x, &Device::Cpu)?.context("finite")?;
            ensure!(at(&x, &device)?.as_ref() == Some(&greatest), "{dtype:?} of {width}");
            // The last number of the last row becomes as great as the greatest.
            x[4 * width - 1] = x[3 * width + greatest[3] as usize];
            ensure!(at(&x, &device)?.as_ref() == Some(&greatest), "{dtype:?} of {width}, twice");
            for none in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                x[2 * width] = none;
                ensure!(at(&x, &device)?.is_none() && at(&x, &Device::Cpu)?.is_none(), "{none} is picked");
            }
        }
    }
    Ok(())
}

/// Sequences go to rows of a cache in another order, and what does not fit is refused.
#[test]
#[ignore = "needs a device: see .ci/device"]
fn caches() -> Result<()> {
    let device = device()?;
    for (dtype, _) in TYPES {
        let (store, fresh) = (normal(&[48, 7], dtype, 1)?, normal(&[6, 7], dtype, 2)?);
        let ours = store.to_dtype(dtype)?.to_device(&device)?;
        for layout in [Layout::Whole, Layout::Offset] {
            let fresh_there = X(fresh.dims()).laid_out(&fresh, layout, dtype, &device)?;
            cache_write(&ours, &fresh_there, &mask(3, &[1, 4], &[2, 0], &device)?)?;
            cache_write(&store, &fresh, &mask(3, &[1, 4], &[2, 0], &Device::Cpu)?)?;
            close(&format!("{dtype:?} {layout:?}"), &ours, &store, 0.)?;
            ensure!(mask(3, &[14, 4], &[0, 2], &device).is_err(), "a full row");
            let short = ours.narrow(0, 0, 35)?;
            ensure!(
                cache_write(&short, &fresh_there, &mask(3, &[1, 4], &[2, 0], &device)?).is_err(),
                "rows that are not there"
            );
        }
    }
    Ok(())
}

type Rule = (&'static str, fn(&Scalar) -> titer_core::Result<Scalar>);

/// Numbers that stay on the device obey the rules of those on the host, and one that is none stays none.
#[test]
#[ignore = "needs a device: see .ci/device"]
fn numbers_of_the_device() -> Result<()> {
    let device = device()?;
    for value in [0.25, 3., f64::NAN, f64::INFINITY] {
        let (ours, host) = (Scalar::of(&Tensor::new(value as f32, &device)?)?, Scalar::Host(value));
        let rules: [Rule; 5] = [
            ("affine", |x| x.affine(2., -1.)),
            ("plus", |x| x.plus(x)),
            ("recip", Scalar::recip),
            ("sqrt", Scalar::sqrt),
            ("at most", |x| x.at_most(1.)),
        ];
        for (name, rule) in rules {
            let (ours, host) = (rule(&ours)?.value()?, rule(&host)?.value()?);
            let equal = ours == host || (ours - host).abs() < 1e-6 * host.abs() || (ours.is_nan() && host.is_nan());
            ensure!(equal, "{name} of {value} is {ours} instead of {host}");
        }
    }
    Ok(())
}

/// A kernel reads numbers of one type: others are refused, not misread.
#[test]
#[ignore = "needs a device: see .ci/device"]
fn mixed_types_are_refused() -> Result<()> {
    let device = device()?;
    let of = |shape: &[usize], dtype: DType| -> Result<Traced> {
        Ok(Traced::constant(normal(shape, DType::BF16, 1)?.to_dtype(dtype)?.to_device(&device)?))
    };
    let (x, y) = (of(&[3, 8], DType::BF16)?, of(&[3, 8], DType::F32)?);
    let w = of(&[8], DType::F32)?;
    let tape = &mut Tape::default();
    let seeded = || -> titer_core::Result<()> {
        let mut tape = Tape::default();
        let probed = tape.probe("x", &x);
        let gated = swiglu(&mut tape, &probed, &x)?;
        tape.backward(vec![(gated, y.tensor().clone())]).map(drop)
    };
    let store = of(&[48, 8], DType::F32)?;
    let fresh = of(&[3, 8], DType::BF16)?;
    let results = [
        ("swiglu", swiglu(tape, &x, &y).map(drop)),
        ("rms_norm", rms_norm(tape, &x, &w, 1e-5).map(drop)),
        ("layer_norm", layer_norm(tape, &x, &w, &w, 1e-5).map(drop)),
        ("add", add(tape, &x, &y).map(drop)),
        ("add_assign", add_assign(x.tensor(), y.tensor())),
        ("cache_write", cache_write(store.tensor(), fresh.tensor(), &mask(1, &[0; 3], &[0, 1, 2], &device)?)),
        ("a gradient", seeded()),
    ];
    let taken: Vec<&str> = results.iter().filter(|(_, result)| result.is_ok()).map(|(name, _)| *name).collect();
    ensure!(taken.is_empty(), "types are mixed, and not refused, in {taken:?}");
    Ok(())
}

/// What cannot be added to in place is refused, and never lost.
#[test]
#[ignore = "needs a device: see .ci/device"]
fn products_are_not_added_to_a_copy() -> Result<()> {
    let device = device()?;
    let [a, b, c] = [1, 2, 3].map(|seed| normal(&[4, 4], DType::F32, seed));
    let place = |x: Result<Tensor>| -> Result<Tensor> { Ok(x?.to_dtype(DType::F32)?.to_device(&device)?) };
    let (a, b, c) = (place(a)?, place(b)?, place(c)?);
    ensure!(Gemm::NN.add_to(&c.t()?, &a, &b).is_err());
    Ok(())
}
