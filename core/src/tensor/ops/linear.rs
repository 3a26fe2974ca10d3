//! A linear layer with an optional low-rank adapter, as one operator.
//!
//! `y = x Wᵀ + b + s · (m ∘ x) Aᵀ Bᵀ`. The backward pass computes `dx`, `dA` and `dB`, each only if it is wanted, and
//! nothing for a frozen `W`: that would be a third of all work, and memory for a second model.

use candle_core::{DType, Tensor};
use titer_kernels::elementwise as kernels;

use crate::error::{Error, Result};
use crate::tensor::dropout::{Dropout, add_dropout, dropout};
use crate::tensor::gemm::Gemm;
use crate::tensor::host::{Element, by_dtype, last_dim, read, tensor, write};
use crate::tensor::matrix::Matrix;
use crate::tensor::tape::{Tape, Traced};

/// `$cuda` for adapters on a device, whose kernels compute those of all layers together, else `$each`. Where ranks are large,
/// the matrix unit, which these kernels do not use, is faster.
macro_rules! fused {
    ($adapters:expr, $cuda:expr, $each:expr) => {{
        #[cfg(feature = "cuda")]
        let result = if crate::tensor::cuda::fuses_adapters($adapters) { $cuda } else { $each };
        #[cfg(not(feature = "cuda"))]
        let result = $each;
        result
    }};
}

/// The adapter's part in a linear layer.
#[derive(Debug)]
pub struct LowRank {
    /// `A: [r, in]`.
    pub a: Traced,
    /// `B: [out, r]`.
    pub b: Traced,
    /// The scale `s = alpha / r`.
    pub scale: f64,
    /// The dropout mask `m`.
    pub mask: Option<Dropout>,
}

/// One of several linear layers of the same input.
#[derive(Debug)]
pub struct LinearLayer {
    /// `W: [out, in]`.
    pub weight: Traced<Matrix>,
    /// `b: [out]`.
    pub bias: Option<Traced>,
    /// The adapter's part.
    pub low_rank: Option<LowRank>,
}

/// `x Wᵀ` for `x: [..., in]` and `weight: [out, in]`, plus a `bias: [out]`, plus the adapter's part. Half-precision
/// products of an f32 adapter are taken in the type of `x`; its gradients are f32.
///
/// # Errors
/// A tensor operation failed.
pub fn linear(
    tape: &mut Tape,
    x: &Traced,
    weight: impl Into<Traced<Matrix>>,
    bias: Option<&Traced>,
    low_rank: Option<LowRank>,
) -> Result<Traced> {
    let [y] = linears(tape, x, [LinearLayer { weight: weight.into(), bias: bias.cloned(), low_rank }])?;
    Ok(y)
}

/// Several [`linear`] layers of one input, such as queries, keys and values. A device computes the parts of their adapters
/// together.
///
/// # Errors
/// A tensor operation failed.
pub fn linears<const N: usize>(tape: &mut Tape, x: &Traced, layers: [LinearLayer; N]) -> Result<[Traced; N]> {
    let shape = x.tensor().dims().to_vec();
    let xs = x.tensor().contiguous()?.reshape(((), last_dim(x.tensor())))?;
    let weights = layers.each_ref().map(|layer| layer.weight.tensor().clone());
    let mut ys = Vec::with_capacity(N);
    for (layer, w) in layers.iter().zip(&weights) {
        let y = w.product_transposed(&xs)?;
        layer.bias.as_ref().map_or(Ok(()), |bias| add_bias(&y, bias.tensor()))?;
        ys.push(y);
    }
    let adapters = Adapters::forward(&xs, &layers, &ys)?;
    let shaped = |y: &Tensor| Ok(y.reshape([&shape[..shape.len() - 1], &[last_dim(y)]].concat())?);
    let results: Vec<Tensor> = ys.iter().map(shaped).collect::<Result<_>>()?;
    // Only places count from here on, not the numbers in them.
    let absent = Traced::constant(xs.clone());
    let mut inputs = vec![x.clone()];
    for layer in &layers {
        let [a, b] = layer.low_rank.as_ref().map_or([&absent; 2], |low_rank| [&low_rank.a, &low_rank.b]);
        let bias = layer.bias.as_ref().unwrap_or(&absent);
        inputs.extend([layer.weight.with_tensor(xs.clone()), bias.clone(), a.clone(), b.clone()]);
    }
    // What no gradient needs is not kept.
    let reads_input = |layer: &LinearLayer| {
        layer.weight.tracked() || layer.low_rank.as_ref().is_some_and(|low_rank| low_rank.a.tracked())
    };
    let kept = layers.iter().any(reads_input).then_some(xs);
    let inputs: Vec<&Traced> = inputs.iter().collect();
    let results = results.try_into().map_err(|_| Error::run("a linear layer gave no result"))?;
    Ok(tape.record_all(results, &inputs, move |gradients: [Tensor; N], into| {
        let gs = gradients.iter().map(|g| Ok(g.reshape(((), last_dim(g)))?)).collect::<Result<Vec<_>>>()?;
        let narrow = adapters.narrow(&gs)?;
        if into.wants(0) {
            let before = into.owned(0).map(|sum| sum.reshape((gs[0].dims()[0], ()))).transpose()?;
            let held = before.is_some();
            let dx = input_gradient(&weights, &gs, before)?;
            adapters.add_input_gradient(&dx, &narrow)?;
            if !held {
                into.add(0, dx)?;
            }
        }
        for (index, g) in gs.iter().enumerate() {
            let [weight, bias] = [4 * index + 1, 4 * index + 2];
            if let (true, Some(xs)) = (into.wants(weight), &kept) {
                into.add(weight, Gemm::TN.product(g, xs)?)?;
            }
            if into.wants(bias) {
                into.add(bias, sum_rows(g)?)?;
            }
        }
        let trained = adapters.0.iter().any(|adapter| into.wants(4 * adapter.layer + 3));
        if let (true, Some(xs)) = (trained, &kept) {
            for (adapter, [da, db]) in adapters.0.iter().zip(adapters.gradients(xs, &gs, &narrow)?) {
                into.add(4 * adapter.layer + 3, da)?;
                into.add(4 * adapter.layer + 4, db)?;
            }
        }
        Ok(())
    }))
}

/// `Σ g W` over the layers, added to what is there `before`.
fn input_gradient(weights: &[Matrix], gs: &[Tensor], before: Option<Tensor>) -> Result<Tensor> {
    let mut sum = before;
    for (w, g) in weights.iter().zip(gs) {
        sum = Some(match sum {
            Some(sum) => {
                w.add_product(&sum, g)?;
                sum
            }
            None => w.product(g)?,
        });
    }
    sum.ok_or_else(|| Error::run("no linear layer has a gradient"))
}

/// The type in which sums over half-precision values are kept.
fn wide(dtype: DType) -> DType {
    if matches!(dtype, DType::F16 | DType::BF16) { DType::F32 } else { dtype }
}

/// The adapters of the layers.
struct Adapters(Vec<AdapterPass>);

/// What an adapter's part of the backward pass reads again.
pub(in crate::tensor) struct AdapterPass {
    /// Which of the layers it belongs to.
    pub(in crate::tensor) layer: usize,
    pub(in crate::tensor) a: Tensor,
    pub(in crate::tensor) b: Tensor,
    pub(in crate::tensor) scale: f64,
    pub(in crate::tensor) mask: Option<Dropout>,
    /// `s · (m ∘ x) Aᵀ`, `[rows, r]`.
    pub(in crate::tensor) inner: Tensor,
}

impl Adapters {
    /// Adds the adapters' parts to the layers' results.
    fn forward(x: &Tensor, layers: &[LinearLayer], ys: &[Tensor]) -> Result<Self> {
        let mut adapters = Vec::new();
        for (layer, LinearLayer { low_rank, .. }) in layers.iter().enumerate() {
            if let Some(LowRank { a, b, scale, mask }) = low_rank {
                let [a, b] = [a.tensor().to_dtype(x.dtype())?, b.tensor().to_dtype(x.dtype())?];
                adapters.push(AdapterPass { layer, inner: a.clone(), a, b, scale: *scale, mask: *mask });
            }
        }
        let inner = fused!(
            &adapters,
            crate::tensor::cuda::adapters_inner(x, &adapters),
            adapters.iter().map(|adapter| adapter.inner(x)).collect::<Result<Vec<_>>>()
        )?;
        for (adapter, inner) in adapters.iter_mut().zip(inner) {
            adapter.inner = inner;
        }
        fused!(
            &adapters,
            crate::tensor::cuda::adapters_up(ys, &adapters),
            adapters.iter().try_for_each(|adapter| Gemm::NT.add_to(&ys[adapter.layer], &adapter.inner, &adapter.b))
        )?;
        Ok(Self(adapters))
    }

    /// `s · g B` of each, `[rows, r]`.
    fn narrow(&self, gs: &[Tensor]) -> Result<Vec<Tensor>> {
        fused!(
            &self.0,
            crate::tensor::cuda::adapters_narrow(gs, &self.0),
            self.0.iter().map(|own| Gemm::NN.times(own.scale).product(&gs[own.layer], &own.b)).collect()
        )
    }

    /// Adds the sum of `m ∘ (narrow A)` to `dx`.
    fn add_input_gradient(&self, dx: &Tensor, narrow: &[Tensor]) -> Result<()> {
        fused!(
            &self.0,
            crate::tensor::cuda::adapters_dx(dx, narrow, &self.0),
            self.0.iter().zip(narrow).try_for_each(|(adapter, narrow)| match adapter.mask {
                None => Gemm::NN.add_to(dx, narrow, &adapter.a),
                Some(mask) => add_dropout(dx, &Gemm::NN.product(narrow, &adapter.a)?, mask),
            })
        )
    }

    /// Those of `A` and of `B`, of each.
    fn gradients(&self, x: &Tensor, gs: &[Tensor], narrow: &[Tensor]) -> Result<Vec<[Tensor; 2]>> {
        let own = |(adapter, narrow): (&AdapterPass, &Tensor)| {
            let da = Gemm::TN.product_as(narrow, &adapter.masked(x)?, wide(x.dtype()))?;
            Ok([da, Gemm::TN.product_as(&gs[adapter.layer], &adapter.inner, wide(x.dtype()))?])
        };
        fused!(
            &self.0,
            crate::tensor::cuda::adapters_gradients(x, gs, narrow, &self.0),
            self.0.iter().zip(narrow).map(own).collect()
        )
    }
}

impl AdapterPass {
    fn masked(&self, x: &Tensor) -> Result<Tensor> {
        self.mask.map_or_else(|| Ok(x.clone()), |mask| dropout(x, mask))
    }

    /// `s · (m ∘ x) Aᵀ`.
    fn inner(&self, x: &Tensor) -> Result<Tensor> {
        Gemm::NT.times(self.scale).product(&self.masked(x)?, &self.a)
    }
}

/// Adds `bias: [width]` to every row of `y`, in place.
fn add_bias(y: &Tensor, bias: &Tensor) -> Result<()> {
    dispatch!(y, crate::tensor::cuda::add_bias(y, bias), by_dtype!(y.dtype(), add_bias_host(y, bias)))
}

fn add_bias_host<T: Element>(y: &Tensor, bias: &Tensor) -> Result<()> {
    read(bias, |bias: &[T]| write(y, |y: &mut [T]| kernels::add_bias(y, bias)))
}

/// The sum over all rows, `[width]`.
fn sum_rows(g: &Tensor) -> Result<Tensor> {
    dispatch!(g, crate::tensor::cuda::sum_rows(g), by_dtype!(g.dtype(), sum_rows_host(g)))
}

fn sum_rows_host<T: Element>(g: &Tensor) -> Result<Tensor> {
    let width = last_dim(g);
    read(g, |gs: &[T]| tensor(kernels::sum_rows(gs, width), &[width]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::check::{close, gradients, normal};

    fn low_rank(a: &Traced, b: &Traced, mask: Option<Dropout>) -> LowRank {
        LowRank { a: a.clone(), b: b.clone(), scale: 0.5, mask }
    }

    #[test]
    fn gradients_equal_finite_differences() -> Result<()> {
        let weight = Traced::constant(normal(&[5, 4], 1)?.as_detached_tensor());
        let vars = [normal(&[2, 3, 4], 2)?, normal(&[2, 4], 3)?, normal(&[5, 2], 4)?];
        for mask in [None, Some(Dropout { key: [5, 6], layer: 7, p: 0.4 })] {
            gradients(&vars, |tape, x| linear(tape, &x[0], &weight, None, Some(low_rank(&x[1], &x[2], mask))))?;
        }
        gradients(&vars[..1], |tape, x| linear(tape, &x[0], &weight, None, None))
    }

    #[test]
    fn a_trained_weight_and_bias_get_their_gradients() -> Result<()> {
        let vars = [normal(&[2, 3, 4], 2)?, normal(&[5, 4], 3)?, normal(&[5], 4)?];
        gradients(&vars, |tape, x| linear(tape, &x[0], &x[1], Some(&x[2]), None))
    }

    #[test]
    fn an_input_of_two_layers_gets_the_sum() -> Result<()> {
        let vars = [normal(&[3, 4], 2)?, normal(&[4, 4], 3)?, normal(&[4, 4], 4)?];
        gradients(&vars, |tape, x| {
            let (left, right) = (linear(tape, &x[0], &x[1], None, None)?, linear(tape, &x[0], &x[2], None, None)?);
            super::super::swiglu(tape, &left, &right)
        })
    }

    #[test]
    fn equals_the_composed_form() -> Result<()> {
        let [x, weight, a, b, bias] = [&[3usize, 4][..], &[5, 4], &[2, 4], &[5, 2], &[5]]
            .map(|shape| normal(shape, shape.len() as u64).expect("a tensor").as_detached_tensor());
        let composed = (x.matmul(&weight.t()?)? + (x.matmul(&a.t()?)?.matmul(&b.t()?)? * 0.5)?)?;
        let composed = composed.broadcast_add(&bias)?;
        let [x, weight, a, b, bias] = [x, weight, a, b, bias].map(Traced::constant);
        let fused = linear(&mut Tape::default(), &x, &weight, Some(&bias), Some(low_rank(&a, &b, None)))?;
        close(fused.tensor(), &composed, 1e-12)
    }
}
