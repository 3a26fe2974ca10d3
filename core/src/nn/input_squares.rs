//! Statistics of the inputs of linear layers.

use std::collections::BTreeMap;

use candle_core::{DType, Tensor};

use crate::error::Result;
use crate::tensor::tokens::Tokens;

/// Sums of squares of what parameters are multiplied with.
#[derive(Debug)]
pub(crate) struct InputSquares {
    /// One at real tokens, `[batch, length, 1]`.
    mask: Tensor,
    /// `[in]` by the parameter's name.
    pub sums: BTreeMap<String, Tensor>,
}

impl InputSquares {
    pub(crate) fn new(tokens: &Tokens) -> Result<Self> {
        Ok(Self { mask: tokens.mask()?, sums: BTreeMap::new() })
    }

    /// Notes the input `x` `[batch, length, in]` of the parameter `name`.
    pub(crate) fn note(&mut self, name: String, x: &Tensor) -> Result<()> {
        // In 16 bits a sum over some hundred tokens would stand still.
        let x = if x.dtype() == DType::F64 { x.clone() } else { x.to_dtype(DType::F32)? };
        let squares = x.sqr()?.broadcast_mul(&self.mask.to_dtype(x.dtype())?)?.sum((0, 1))?;
        let sum = match self.sums.remove(&name) {
            Some(sum) => (sum + squares)?,
            None => squares,
        };
        self.sums.insert(name, sum);
        Ok(())
    }
}
