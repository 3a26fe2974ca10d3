//! The record of a forward pass, and the backward pass over it.
//!
//! Candle's own `backward` allocates a zero tensor for every gradient and adds to it, keeps every activation until
//! the whole graph is dropped, and differentiates frozen weights. A tape does none of that: the first gradient of a
//! value is kept as it comes, later ones are added in place, an operator computes only what somebody asked for, and
//! what it had kept is freed as soon as it ran. Values that no gradient flows through leave no trace at all.

use std::collections::{BTreeMap, HashMap};

use candle_core::{Shape, Tensor, TensorId};

use crate::error::{Error, Result};
use crate::tensor::dropout::DropoutMasks;
use crate::tensor::elementwise::{add_assign, sum};
use crate::tensor::grads::Grads;
use crate::tensor::matrix::Matrix;

/// A tensor (or a stored matrix) of the forward pass and, if a gradient flows through it, its place on the tape.
#[derive(Debug, Clone)]
pub struct Traced<T = Tensor> {
    tensor: T,
    node: Option<usize>,
}

impl<T> Traced<T> {
    /// A value that no gradient flows into.
    pub fn constant(tensor: T) -> Self {
        Self { tensor, node: None }
    }

    /// The tensor; nothing computed from it directly is differentiated.
    pub fn tensor(&self) -> &T {
        &self.tensor
    }

    /// Whether a gradient flows into this value.
    pub fn tracked(&self) -> bool {
        self.node.is_some()
    }

    /// Other numbers in the same place: the value plus a constant has the same gradient.
    pub(crate) fn with_tensor<U>(&self, tensor: U) -> Traced<U> {
        Traced { tensor, node: self.node }
    }
}

impl From<&Traced> for Traced<Matrix> {
    fn from(dense: &Traced) -> Self {
        dense.with_tensor(Matrix::Dense(dense.tensor.clone()))
    }
}

impl Traced {
    /// The same numbers in another shape.
    ///
    /// # Errors
    /// The shape has another number of elements.
    pub fn reshape<S: candle_core::shape::ShapeWithOneHole>(&self, shape: S) -> Result<Self> {
        Ok(Self { tensor: self.tensor.reshape(shape)?, node: self.node })
    }
}

/// A gradient and whether its memory is nobody else's.
#[derive(Debug)]
struct Slot {
    tensor: Tensor,
    owned: bool,
}

/// Where an operator's backward pass leaves the gradients of its inputs.
#[derive(Debug)]
pub struct Inputs<'t> {
    nodes: &'t [Option<usize>],
    slots: &'t mut [Option<Slot>],
}

impl Inputs<'_> {
    /// Whether input `index` wants a gradient.
    pub fn wants(&self, index: usize) -> bool {
        self.nodes[index].is_some()
    }

    /// Adds a freshly computed gradient of input `index`. It may be changed in place later on.
    ///
    /// # Errors
    /// A tensor operation failed.
    pub fn add(&mut self, index: usize, gradient: Tensor) -> Result<()> {
        self.accumulate(index, Slot { tensor: gradient, owned: true })
    }

    /// Adds a gradient whose memory others read too.
    ///
    /// # Errors
    /// A tensor operation failed.
    pub fn add_shared(&mut self, index: usize, gradient: &Tensor) -> Result<()> {
        self.accumulate(index, Slot { tensor: gradient.clone(), owned: false })
    }

    /// Takes out the gradient of input `index` so far, for an operator that adds to it while it computes its own.
    ///
    /// # Errors
    /// A tensor operation failed.
    pub fn take(&mut self, index: usize, shape: &Shape) -> Result<Option<Tensor>> {
        let before = self.nodes[index].and_then(|node| self.slots[node].take());
        before.map(|slot| Ok(slot.tensor.contiguous()?.reshape(shape)?)).transpose()
    }

    /// The gradient of input `index` so far, if it may be added to in place.
    pub fn owned(&self, index: usize) -> Option<&Tensor> {
        self.slots[self.nodes[index]?].as_ref().filter(|slot| slot.owned).map(|slot| &slot.tensor)
    }

    fn accumulate(&mut self, index: usize, new: Slot) -> Result<()> {
        let Some(node) = self.nodes[index] else { return Ok(()) };
        let slot = &mut self.slots[node];
        *slot = Some(match slot.take() {
            None => new,
            Some(old) => {
                let new = Slot { tensor: new.tensor.reshape(old.tensor.shape())?, ..new };
                let (target, other) = if old.owned { (old, new) } else { (new, old) };
                if target.owned {
                    add_assign(&target.tensor, &other.tensor)?;
                    target
                } else {
                    Slot { tensor: sum(&target.tensor, &other.tensor)?, owned: true }
                }
            }
        });
        Ok(())
    }
}

/// The backward pass of one operator: takes the gradients of its results and leaves those of its inputs.
type Backward = Box<dyn FnOnce(Vec<Tensor>, &mut Inputs) -> Result<()> + Send>;

enum NodeKind {
    /// A parameter.
    Leaf(TensorId),
    /// A point whose gradient is asked for.
    Probe(String),
    /// An operator, at its first result.
    Operator(Backward),
    /// One more result of the operator before it.
    Result,
    /// A block of the model that kept nothing but its input: its backward pass runs it again.
    Block(Box<Replay>),
}

/// What running a block of the model again needs.
#[derive(Debug)]
pub(crate) struct Replay {
    /// The block.
    pub index: usize,
    /// Its input.
    pub input: Tensor,
    /// The dropout masks from the block's first layer on.
    pub dropout: Option<DropoutMasks>,
}

struct Node {
    inputs: Vec<Option<usize>>,
    /// The shape of the value as it was recorded; it may have been used in another one.
    shape: Shape,
    kind: NodeKind,
}

/// The record of one forward pass.
#[derive(Default)]
pub struct Tape {
    nodes: Vec<Node>,
    leaves: HashMap<TensorId, usize>,
    off: bool,
}

impl std::fmt::Debug for Tape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tape").field("nodes", &self.nodes.len()).finish_non_exhaustive()
    }
}

/// The gradients that a backward pass found.
#[derive(Debug, Default)]
pub struct TapeGradients {
    leaves: HashMap<TensorId, Tensor>,
    probes: BTreeMap<String, Tensor>,
}

impl TapeGradients {
    /// The gradient of the parameter `tensor`, if the loss reaches it.
    pub fn take(&mut self, tensor: &Tensor) -> Option<Tensor> {
        self.leaves.remove(&tensor.id())
    }

    fn add(&mut self, id: TensorId, gradient: Tensor) -> Result<()> {
        match self.leaves.get(&id) {
            Some(before) => {
                let sum = sum(before, &gradient)?;
                self.leaves.insert(id, sum);
                Ok(())
            }
            None => {
                self.leaves.insert(id, gradient);
                Ok(())
            }
        }
    }

    /// The gradients at the probed sites.
    pub fn into_probes(self) -> Grads {
        self.probes.into_iter().collect()
    }
}

impl Tape {
    /// A tape that records nothing: parameters count as constants.
    pub(crate) fn off() -> Self {
        Self { off: true, ..Self::default() }
    }

    /// A parameter of the model: tracked if it is under training.
    pub fn parameter(&mut self, tensor: &Tensor) -> Traced {
        if self.off || !tensor.is_variable() {
            return Traced::constant(tensor.detach());
        }
        let node = match self.leaves.get(&tensor.id()) {
            Some(&node) => node,
            None => {
                let node = self.push(vec![], tensor, NodeKind::Leaf(tensor.id()));
                self.leaves.insert(tensor.id(), node);
                node
            }
        };
        Traced { tensor: tensor.detach(), node: Some(node) }
    }

    /// The same value, whose gradient will be reported under `name`.
    pub fn probe(&mut self, name: &str, value: &Traced) -> Traced {
        let node = self.push(vec![value.node], &value.tensor, NodeKind::Probe(name.to_owned()));
        Traced { tensor: value.tensor.clone(), node: Some(node) }
    }

    /// The result of an operator on `inputs`. `backward` is dropped at once if no input is tracked.
    pub fn record(
        &mut self,
        result: Tensor,
        inputs: &[&Traced],
        backward: impl FnOnce(Tensor, &mut Inputs) -> Result<()> + Send + 'static,
    ) -> Traced {
        let [traced] = self.record_all([result], inputs, |[gradient], into| backward(gradient, into));
        traced
    }

    /// The results of an operator that has several. Its backward pass runs if the loss reaches one of them; those that it
    /// does not reach have gradients of zeros.
    pub fn record_all<const N: usize>(
        &mut self,
        results: [Tensor; N],
        inputs: &[&Traced],
        backward: impl FnOnce([Tensor; N], &mut Inputs) -> Result<()> + Send + 'static,
    ) -> [Traced; N] {
        if inputs.iter().all(|input| !input.tracked()) {
            return results.map(Traced::constant);
        }
        let backward = |gradients: Vec<Tensor>, into: &mut Inputs| {
            let gradients = gradients.try_into().map_err(|_| Error::run("an operator lost one of its results"))?;
            backward(gradients, into)
        };
        let mut next = (inputs.iter().map(|input| input.node).collect(), NodeKind::Operator(Box::new(backward)));
        results.map(|tensor| {
            let (inputs, kind) = std::mem::replace(&mut next, (Vec::new(), NodeKind::Result));
            let node = self.push(inputs, &tensor, kind);
            Traced { tensor, node: Some(node) }
        })
    }

    /// The result of a block that will be run again in the backward pass.
    pub(crate) fn record_block(&mut self, result: Tensor, input: &Traced, replay: Replay) -> Traced {
        let node = self.push(vec![input.node], &result, NodeKind::Block(Box::new(replay)));
        Traced { tensor: result, node: Some(node) }
    }

    /// A value whose gradient is wanted, which came from elsewhere.
    pub(crate) fn source(&mut self, tensor: &Tensor) -> Traced {
        let node = self.push(vec![], tensor, NodeKind::Leaf(tensor.id()));
        Traced { tensor: tensor.detach(), node: Some(node) }
    }

    /// How many operators were recorded.
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Whether nothing was recorded: no gradient flows anywhere.
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// Runs the pass backwards from the gradients of some of its values.
    ///
    /// # Errors
    /// A tensor operation failed.
    pub fn backward(self, seeds: Vec<(Traced, Tensor)>) -> Result<TapeGradients> {
        self.backward_with(seeds, &mut |_, _| Err(Error::run("this pass keeps no blocks to run again")))
    }

    /// As [`Tape::backward`]; `replay` runs a block again and gives the gradients of its parameters, its sites and its
    /// input, given that of its result.
    pub(crate) fn backward_with(
        mut self,
        seeds: Vec<(Traced, Tensor)>,
        replay: &mut dyn FnMut(&Replay, Tensor) -> Result<TapeGradients>,
    ) -> Result<TapeGradients> {
        let mut slots: Vec<Option<Slot>> = Vec::new();
        slots.resize_with(self.nodes.len(), || None);
        for (value, gradient) in seeds {
            Inputs { nodes: &[value.node], slots: &mut slots }.add_shared(0, &gradient)?;
        }
        let mut found = TapeGradients::default();
        // The results of the operator that comes next, from its last one on.
        let mut results = Vec::new();
        while let Some(Node { inputs, shape, kind }) = self.nodes.pop() {
            let gradient = slots.pop().expect("one slot per node");
            let gradient = gradient.map(|slot| slot.tensor.contiguous()?.reshape(&shape)).transpose()?;
            let mut into = Inputs { nodes: &inputs, slots: &mut slots };
            match (kind, gradient) {
                (NodeKind::Result, gradient) => results.push((gradient, shape)),
                (NodeKind::Operator(backward), gradient) => {
                    results.push((gradient, shape));
                    if let Some(gradients) = all_gradients(results.drain(..).rev().collect())? {
                        backward(gradients, &mut into)?;
                    }
                }
                (_, None) => {}
                (NodeKind::Leaf(id), Some(tensor)) => found.add(id, tensor)?,
                (NodeKind::Probe(name), Some(tensor)) => {
                    into.add_shared(0, &tensor)?;
                    found.probes.insert(name, tensor);
                }
                (NodeKind::Block(block), Some(tensor)) => {
                    let mut inner = replay(&block, tensor)?;
                    inner.take(&block.input).map_or(Ok(()), |gradient| into.add(0, gradient))?;
                    found.probes.append(&mut inner.probes);
                    inner.leaves.into_iter().try_for_each(|(id, gradient)| found.add(id, gradient))?;
                }
            }
        }
        Ok(found)
    }

    fn push(&mut self, inputs: Vec<Option<usize>>, value: &Tensor, kind: NodeKind) -> usize {
        self.nodes.push(Node { inputs, shape: value.shape().clone(), kind });
        self.nodes.len() - 1
    }
}

/// The gradients of an operator's results, unless the loss reaches none of them; zeros for those that it does not reach.
fn all_gradients(results: Vec<(Option<Tensor>, Shape)>) -> Result<Option<Vec<Tensor>>> {
    let Some(like) = results.iter().find_map(|(gradient, _)| gradient.clone()) else { return Ok(None) };
    let filled = |(gradient, shape): (Option<Tensor>, Shape)| match gradient {
        Some(gradient) => Ok(gradient),
        None => Ok(Tensor::zeros(shape, like.dtype(), like.device())?),
    };
    results.into_iter().map(filled).collect::<Result<_>>().map(Some)
}
