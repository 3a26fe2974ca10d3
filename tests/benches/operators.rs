//! The operators of a block, forward and backward, at the widths of the `15m` and `110m` shapes, 5 rows of 200 tokens:
//! `cargo bench --bench operators`.

use candle_core::{DType, Device, Tensor, Var};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use titer_core::data::Tokens;
use titer_core::rng::{Seed, randn};
use titer_core::tensor::ops::{Attention, Gemm, LowRank, Rope};
use titer_core::tensor::{AttentionMask, ops};
use titer_core::{Result, Tape, Traced};

const ROWS: usize = 5;
const LENGTH: usize = 200;
/// Widths of the residual stream and of the MLP, and heads.
const SHAPES: [(usize, usize, usize); 2] = [(288, 768, 6), (768, 2048, 12)];

fn normal(shape: &[usize], seed: u64) -> Var {
    let values = randn(shape, &mut Seed::new(seed).generator(), &Device::Cpu).expect("a tensor");
    Var::from_tensor(&values).expect("a variable")
}

/// One operator forward, and back from a gradient of ones.
fn both(inputs: &[Var], operator: impl Fn(&mut Tape, &[Traced]) -> Result<Traced>) {
    let mut tape = Tape::default();
    let inputs: Vec<Traced> = inputs.iter().map(|input| tape.parameter(input.as_tensor())).collect();
    let result = operator(&mut tape, &inputs).expect("a result");
    let ones = result.tensor().ones_like().expect("a tensor");
    tape.backward(vec![(result, ones)]).expect("gradients");
}

fn operators(criterion: &mut Criterion) {
    for (width, inner, heads) in SHAPES {
        let tokens = ROWS * LENGTH;
        let mut group = criterion.benchmark_group(format!("width {width}"));
        group.throughput(Throughput::Elements(tokens as u64));
        let x = normal(&[tokens, width], 1);
        let weight = Traced::constant(normal(&[inner, width], 2).as_detached_tensor());
        let (a, b) = (normal(&[8, width], 3), normal(&[inner, 8], 4));
        group.bench_function("linear with adapter", |bencher| {
            bencher.iter(|| {
                both(&[x.clone(), a.clone(), b.clone()], |tape, x| {
                    let low_rank = LowRank { a: x[1].clone(), b: x[2].clone(), scale: 2., mask: None };
                    ops::linear(tape, &x[0], &weight, None, Some(low_rank))
                });
            });
        });
        let matrix = weight.tensor();
        group.bench_function("product alone", |bencher| {
            bencher.iter(|| Gemm::NT.product(&x, matrix).expect("a product"));
        });
        let rows = vec![vec![1u32; LENGTH]; ROWS];
        let mask = AttentionMask::new(&Tokens::new(&rows, &Device::Cpu).expect("tokens")).expect("positions");
        let head = width / heads;
        let shape = Attention {
            query: heads,
            key_value: heads,
            width: head,
            scale: (head as f64).sqrt().recip(),
            window: None,
            cap: None,
        };
        let (k, v) = (normal(&[tokens, width], 5), normal(&[tokens, width], 6));
        group.bench_function("attention", |bencher| {
            bencher.iter(|| {
                both(&[x.clone(), k.clone(), v.clone()], |tape, x| {
                    ops::attention(tape, shape, [&x[0], &x[1], &x[2]], &mask)
                });
            });
        });
        let rotation = Rope::new(&Rope::frequencies(head, 1e4), LENGTH).at(&mask, &x).expect("angles");
        group.bench_function("rope", |bencher| {
            bencher.iter(|| {
                both(&[x.clone(), k.clone()], |tape, x| {
                    let [q, k] = ops::rotate(tape, [&x[0], &x[1]], &rotation)?;
                    ops::add(tape, &q, &k)
                });
            });
        });
        let scale = Traced::constant(Tensor::ones(width, DType::F32, &Device::Cpu).expect("a tensor"));
        group.bench_function("rms norm", |bencher| {
            bencher.iter(|| both(std::slice::from_ref(&x), |tape, x| ops::rms_norm(tape, &x[0], &scale, 1e-5)));
        });
        let (gate, up) = (normal(&[tokens, inner], 7), normal(&[tokens, inner], 8));
        group.bench_function("swiglu", |bencher| {
            bencher.iter(|| both(&[gate.clone(), up.clone()], |tape, x| ops::swiglu(tape, &x[0], &x[1])));
        });
        let labels = tokens * 3 / 4;
        let hidden = normal(&[labels, width], 9);
        let table = Traced::constant(normal(&[32_000, width], 10).as_detached_tensor());
        let targets = Tensor::zeros(labels, DType::U32, &Device::Cpu).expect("labels");
        group.sample_size(10);
        group.bench_function("head and cross-entropy", |bencher| {
            bencher.iter(|| {
                both(std::slice::from_ref(&hidden), |tape, x| ops::head_cross_entropy(tape, &x[0], &table, &targets));
            });
        });
        group.finish();
    }
}

criterion_group!(benches, operators);
criterion_main!(benches);
