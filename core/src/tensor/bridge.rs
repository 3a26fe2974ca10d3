//! Between the tape and candle's own graph.
//!
//! | function | who computes | who differentiates |
//! |---|---|---|
//! | [`Tape::composed`] | candle, as one operator of a tape | candle, inside the tape's backward pass |
//! | `computed` | a kernel, as one custom operator of candle | the function given, inside candle's backward pass |
//! | `Piece` | the model, on a tape of its own | candle up to the results of the piece, then the tape |
//!
//! All three meet at tensors that are leaves on one side: a gradient found on that side is where the other goes on.

use candle_core::backprop::GradStore;
use candle_core::{CpuStorage, CudaStorage, CustomOp1, CustomOp2, Layout, Shape, Storage, Tensor, Var};

use crate::error::{Error, Result};
use crate::tensor::tape::{Tape, Traced};

impl Tape {
    /// Any differentiable candle expression as one operator: for the parts of a model that have no operator of their
    /// own. Its gradients are candle's.
    ///
    /// # Errors
    /// The expression failed.
    pub fn composed(
        &mut self,
        inputs: &[&Traced],
        expression: impl FnOnce(&[Tensor]) -> candle_core::Result<Tensor>,
    ) -> Result<Traced> {
        if inputs.iter().all(|input| !input.tracked()) {
            let tensors: Vec<Tensor> = inputs.iter().map(|input| input.tensor().clone()).collect();
            return Ok(Traced::constant(expression(&tensors)?));
        }
        let variables = inputs.iter().map(|input| Var::from_tensor(input.tensor()));
        let variables = variables.collect::<candle_core::Result<Vec<_>>>()?;
        let tensors: Vec<Tensor> = variables.iter().map(|variable| variable.as_tensor().clone()).collect();
        let result = expression(&tensors)?;
        Ok(self.record(result.detach(), inputs, move |gradient, into| {
            // Flat, since candle sums a single number with a buffer of no bytes, which a device may refuse.
            let store = (result * gradient)?.flatten_all()?.sum_all()?.backward()?;
            for (index, variable) in variables.iter().enumerate() {
                if let Some(gradient) = store.get(variable) {
                    into.add_shared(index, gradient)?;
                }
            }
            Ok(())
        }))
    }
}

/// A piece of a model that ran forward on a tape of its own, as part of a candle expression. Its backward pass waits for
/// the gradients of some of its results.
#[derive(Debug)]
pub(crate) struct Piece {
    tape: Tape,
    /// The candle tensor that it started from, if a gradient flows into that.
    input: Option<Tensor>,
    /// Results that candle's graph holds as variables.
    lent: Vec<(Var, Traced)>,
}

impl Piece {
    /// A piece that ran on `tape`, from `input` if that is part of a candle expression.
    pub(crate) fn new(tape: Tape, input: Option<Tensor>) -> Self {
        Self { tape, input, lent: Vec::new() }
    }

    /// `value` as a candle tensor. Candle's gradient of it is where the backward pass of this piece starts.
    pub(crate) fn lend(&mut self, value: &Traced) -> Result<Tensor> {
        if !value.tracked() {
            return Ok(value.tensor().clone());
        }
        let variable = Var::from_tensor(value.tensor())?;
        let tensor = variable.as_tensor().clone();
        self.lent.push((variable, value.clone()));
        Ok(tensor)
    }

    /// Whether a gradient can come back to it.
    pub(crate) fn is_differentiable(&self) -> bool {
        !self.lent.is_empty()
    }

    /// The results that these backward passes of candle reached, with their gradients.
    pub(crate) fn seeds(&self, stores: &[GradStore]) -> Result<Vec<(Traced, Tensor)>> {
        let mut seeds = Vec::new();
        for (variable, value) in &self.lent {
            seeds.extend(gradient(stores, variable)?.map(|gradient| (value.clone(), gradient)));
        }
        Ok(seeds)
    }

    /// The tape, and what the piece started from.
    pub(crate) fn into_parts(self) -> (Tape, Option<Tensor>) {
        (self.tape, self.input)
    }
}

/// The gradient of `variable` over several backward passes of candle, if any reaches it.
pub(crate) fn gradient(stores: &[GradStore], variable: &Var) -> Result<Option<Tensor>> {
    let mut found = stores.iter().filter_map(|store| store.get(variable));
    let Some(first) = found.next() else { return Ok(None) };
    found.try_fold(first.clone(), |sum, more| Ok((sum + more)?)).map(Some)
}

/// Candle's backward pass from `tensor`, given its gradient.
pub(crate) fn backward_from(tensor: &Tensor, gradient: &Tensor) -> Result<GradStore> {
    Ok((tensor * gradient.detach())?.flatten_all()?.sum_all()?.backward()?)
}

/// Makes `result` a function of one or two `inputs` in candle's eyes: `backward(inputs, result, gradient)` gives the
/// gradient of each input, given that of the result.
///
/// # Errors
/// More than two inputs.
pub(super) fn computed<F>(name: &'static str, inputs: &[&Tensor], result: &Tensor, backward: F) -> Result<Tensor>
where
    F: Fn(&[&Tensor], &Tensor, &Tensor) -> Result<Vec<Option<Tensor>>> + Send + Sync + 'static,
{
    // Candle copies a whole storage, wherever the tensor begins in it.
    let result = result.force_contiguous()?;
    if !inputs.iter().any(|input| input.track_op()) {
        return Ok(result);
    }
    let op = Computed { name, result, backward };
    Ok(match inputs {
        [a] => a.apply_op1(op)?,
        [a, b] => a.apply_op2(b, op)?,
        _ => return Err(Error::run(format!("a custom operator has one or two inputs, not {}", inputs.len()))),
    })
}

struct Computed<F> {
    name: &'static str,
    result: Tensor,
    backward: F,
}

impl<F> Computed<F>
where
    F: Fn(&[&Tensor], &Tensor, &Tensor) -> Result<Vec<Option<Tensor>>>,
{
    fn cpu(&self) -> candle_core::Result<(CpuStorage, Shape)> {
        let (storage, layout) = self.result.storage_and_layout();
        match &*storage {
            Storage::Cpu(storage) => {
                use candle_core::backend::BackendStorage;
                Ok((storage.try_clone(layout)?, layout.shape().clone()))
            }
            _ => candle_core::bail!("the result lies on another device"),
        }
    }

    fn cuda(&self) -> candle_core::Result<(CudaStorage, Shape)> {
        let (storage, layout) = self.result.storage_and_layout();
        match &*storage {
            Storage::Cuda(storage) => {
                use candle_core::backend::BackendStorage;
                Ok((storage.try_clone(layout)?, layout.shape().clone()))
            }
            _ => candle_core::bail!("the result lies on another device"),
        }
    }

    fn gradients<const N: usize>(
        &self,
        inputs: [&Tensor; N],
        result: &Tensor,
        gradient: &Tensor,
    ) -> candle_core::Result<[Option<Tensor>; N]> {
        let found = (self.backward)(&inputs, result, gradient).map_err(candle_core::Error::wrap)?;
        let mut found = found.into_iter();
        Ok(std::array::from_fn(|_| found.next().flatten()))
    }
}

impl<F> CustomOp1 for Computed<F>
where
    F: Fn(&[&Tensor], &Tensor, &Tensor) -> Result<Vec<Option<Tensor>>>,
{
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        self.cpu()
    }

    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> candle_core::Result<(CudaStorage, Shape)> {
        self.cuda()
    }

    fn bwd(&self, a: &Tensor, result: &Tensor, gradient: &Tensor) -> candle_core::Result<Option<Tensor>> {
        self.gradients([a], result, gradient).map(|[a]| a)
    }
}

impl<F> CustomOp2 for Computed<F>
where
    F: Fn(&[&Tensor], &Tensor, &Tensor) -> Result<Vec<Option<Tensor>>>,
{
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        self.cpu()
    }

    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> candle_core::Result<(CudaStorage, Shape)> {
        self.cuda()
    }

    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        result: &Tensor,
        gradient: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        self.gradients([a, b], result, gradient).map(|[a, b]| (a, b))
    }
}
