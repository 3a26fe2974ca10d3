//! Statistics of the inputs of linear layers.

use std::collections::BTreeMap;

use candle_core::{DType, Tensor};

use crate::error::Result;

/// Sums of squares of what parameters are multiplied with, over all tokens.
#[derive(Debug, Default)]
pub(crate) struct InputSquares {
    /// `[in]` by the parameter's name.
    pub sums: BTreeMap<String, Tensor>,
}

impl InputSquares {
    /// Notes the input `x` `[tokens, in]` of the parameter `name`. Sums are in f32 at least: half precision would stop
    /// growing after a few hundred terms.
    pub(crate) fn note(&mut self, name: String, x: &Tensor) -> Result<()> {
        let x = if x.dtype() == DType::F64 { x.clone() } else { x.to_dtype(DType::F32)? };
        let squares = x.sqr()?.sum(0)?;
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
        let mut squares = InputSquares::default();
        let x = Tensor::ones((6, 2), DType::BF16, &Device::Cpu)?;
        // 256 + 1 is 256 in bf16.
        for _ in 0..300 {
            squares.note("w".to_owned(), &x)?;
        }
        assert_eq!(squares.sums["w"].to_vec1::<f32>()?, [1800., 1800.]);
        Ok(())
    }
}
