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

    /// Notes the input `x` `[batch, length, in]` of the parameter `name`. Sums are in f32 at least: half precision would
    /// stop growing after a few hundred terms.
    pub(crate) fn note(&mut self, name: String, x: &Tensor) -> Result<()> {
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

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn half_precision_inputs_are_summed_in_full() -> Result<()> {
        let tokens = Tokens::pad(&[[1u32; 3], [2; 3]], 0, &Device::Cpu)?;
        let mut squares = InputSquares::new(&tokens)?;
        let x = Tensor::ones((2, 3, 2), DType::BF16, &Device::Cpu)?;
        // 256 + 1 is 256 in bf16.
        for _ in 0..300 {
            squares.note("w".to_owned(), &x)?;
        }
        assert_eq!(squares.sums["w"].to_vec1::<f32>()?, [1800., 1800.]);
        Ok(())
    }
}
