//! The inner product of gradients.

use crate::error::Result;
use crate::tensor::grads::Grads;
use crate::tensor::ops;
use crate::tensor::scalar::Scalar;

/// `Σ ⟨a, b⟩` over the tensors that both have: for projections and cosines between the gradients of two losses.
///
/// # Errors
/// Two tensors of one name differ in shape.
pub fn dot(a: &Grads, b: &Grads) -> Result<Scalar> {
    let mut sum = Scalar::from(0.);
    for (name, ours) in a.iter() {
        if let Some(theirs) = b.get(name) {
            sum = sum.plus(&Scalar::of(&ops::sum_all(&(ours * theirs)?)?)?)?;
        }
    }
    Ok(sum)
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Tensor};

    use super::*;

    #[test]
    fn only_what_both_have_counts() -> Result<()> {
        let grads = |values: &[(&str, [f32; 2])]| -> Result<Grads> {
            let tensor =
                |(name, values): &(&str, [f32; 2])| Ok(((*name).to_owned(), Tensor::new(values, &Device::Cpu)?));
            values.iter().map(tensor).collect()
        };
        let (a, b) = (grads(&[("w", [1., 2.]), ("v", [5., 5.])])?, grads(&[("u", [9., 9.]), ("w", [3., -4.])])?);
        assert_eq!(dot(&a, &b)?.value()?, -5.);
        let norm = a.norm()?.value()?;
        assert!((dot(&a, &a)?.value()? - norm * norm).abs() < 1e-9);
        assert_eq!(dot(&a, &Grads::default())?.value()?, 0.);
        Ok(())
    }
}
