//! The residual connection.

use candle_core::Tensor;

use crate::error::Result;
use crate::tensor::elementwise::sum;
use crate::tensor::tape::{Tape, Traced};

/// `a + b`: the residual connection.
///
/// # Errors
/// The shapes differ, or a tensor operation failed.
pub fn add(tape: &mut Tape, a: &Traced, b: &Traced) -> Result<Traced> {
    Ok(record_sum(tape, sum(a.tensor(), b.tensor())?, [a, b]))
}

/// The sum of two values, which somebody computed.
pub(super) fn record_sum(tape: &mut Tape, sum: Tensor, [a, b]: [&Traced; 2]) -> Traced {
    tape.record(sum, &[a, b], |gradient, into| {
        into.add_shared(0, &gradient)?;
        into.add_shared(1, &gradient)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::check::{gradients, normal};

    #[test]
    fn gradients_equal_finite_differences() -> Result<()> {
        let (x, y) = (normal(&[3, 4], 1)?, normal(&[3, 4], 2)?);
        gradients(&[x.clone(), y], |tape, x| add(tape, &x[0], &x[1]))?;
        gradients(&[x], |tape, x| add(tape, &x[0], &x[0]))
    }
}
