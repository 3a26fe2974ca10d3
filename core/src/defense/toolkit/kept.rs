//! What a defense keeps from the start of its stage (a teacher, an anchor, an importance), and the pull back to it.

use std::collections::BTreeMap;

use crate::defense::alignment_defense::State;
use crate::error::{Error, Result};
use crate::tensor::grads::Grads;
use crate::tensor::ops;
use crate::tensor::scalar::Scalar;
use crate::weights::Weights;

/// Parameters by the role they play in a defense, such as `teacher`. In a checkpoint they are called
/// `teacher.<parameter>`.
#[derive(Debug, Clone, Default)]
pub struct Kept(BTreeMap<String, Grads>);

impl Kept {
    /// Keeps `values` as `role`.
    pub fn keep(&mut self, role: &str, values: Grads) {
        self.0.insert(role.to_owned(), values);
    }

    /// What was kept as `role`, which is then kept no longer.
    pub fn take(&mut self, role: &str) -> Option<Grads> {
        self.0.remove(role)
    }

    /// What is kept as `role`.
    ///
    /// # Errors
    /// Nothing is: the stage was not begun.
    pub fn get(&self, role: &str) -> Result<&Grads> {
        let missing = || Error::run(format!("the defense has no `{role}`")).help("call `begin` or `load_state` first");
        self.0.get(role).ok_or_else(missing)
    }

    /// All of it, for a checkpoint.
    pub fn state(&self) -> State {
        let named = |(role, values): (&String, &Grads)| -> Vec<_> {
            values.iter().map(|(name, tensor)| (format!("{role}.{name}"), tensor.clone())).collect()
        };
        State { tensors: self.0.iter().flat_map(named).collect(), ..State::default() }
    }

    /// Goes on from what [`Kept::state`] gave.
    ///
    /// # Errors
    /// A tensor has no role.
    pub fn load(&mut self, state: State) -> Result<()> {
        let mut roles: BTreeMap<String, Vec<_>> = BTreeMap::new();
        for (name, tensor) in state.tensors {
            let (role, parameter) = name.split_once('.').ok_or_else(|| {
                Error::data(format!("the tensor `{name}` in the state of a defense has no role"))
                    .help("the checkpoint is another defense's: start the stage anew")
            })?;
            roles.entry(role.to_owned()).or_default().push((parameter.to_owned(), tensor));
        }
        self.0 = roles.into_iter().map(|(role, values)| (role, values.into_iter().collect())).collect();
        Ok(())
    }
}

/// `½ Σ F (w − w₀)²` over the parameters under training, and its gradient `F (w − w₀)`. Without an importance F is 1.
///
/// # Errors
/// A tensor operation failed.
pub fn pull(weights: &Weights, anchor: &Grads, importance: Option<&Grads>) -> Result<(Scalar, Grads)> {
    let (mut value, mut gradient) = (Scalar::from(0.), Vec::new());
    for (name, var) in weights.trainable() {
        let Some(start) = anchor.get(name) else { continue };
        let moved = (var.as_detached_tensor() - start)?;
        let force = match importance {
            None => moved.clone(),
            Some(importance) => match importance.get(name) {
                None => continue,
                Some(importance) => (&moved * importance)?,
            },
        };
        value = value.plus(&Scalar::of(&ops::sum_all(&(moved * &force)?)?)?.affine(0.5, 0.)?)?;
        gradient.push((name.clone(), force));
    }
    Ok((value, gradient.into_iter().collect()))
}
