//! Rotary positions (Su et al. 2021), in the rotate-half layout of the Hugging Face checkpoints.

use std::sync::{Mutex, PoisonError};

use candle_core::{Device, Tensor};
use titer_kernels::rope as kernels;

use crate::error::{Error, Result};
use crate::tensor::host::{Element, by_dtype, read_all, tensor};
use crate::tensor::mask::AttentionMask;
use crate::tensor::tape::{Tape, Traced};

/// The table of `cos` and `sin` for every position and frequency, in f32 as the checkpoints' own code computes it. It
/// grows with the positions that are asked for: a model may allow far more than anyone uses.
#[derive(Debug)]
pub struct Rope {
    frequencies: Vec<f32>,
    positions: usize,
    /// `cos` and `sin` of the first positions, a row each, on the device that asked last.
    table: Mutex<Option<[Tensor; 2]>>,
}

impl Rope {
    /// The table of `positions` rows for the inverse frequencies given, one per pair of dimensions.
    pub fn new(inverse_frequencies: &[f32], positions: usize) -> Self {
        Self { frequencies: inverse_frequencies.to_vec(), positions, table: Mutex::default() }
    }

    /// The standard inverse frequencies `1 / θ^(2i/d)` of a head of `width` dimensions. The division in this order, in
    /// f32, is what makes a forward pass equal to the checkpoints' own to the last bit.
    pub fn frequencies(width: usize, theta: f64) -> Vec<f32> {
        (0..width).step_by(2).map(|i| 1f32 / power(theta as f32, i as f32 / width as f32)).collect()
    }

    /// The longest sequence the table covers.
    pub fn positions(&self) -> usize {
        self.positions
    }

    /// The angles of a pass's tokens, on the device of `like`: used by every layer.
    ///
    /// # Errors
    /// A position lies outside the table.
    pub fn at(&self, mask: &AttentionMask, like: &Tensor) -> Result<Rotation> {
        check_positions(&mask.positions, self.positions)?;
        let rows = mask.positions.iter().max().map_or(0, |&at| at as usize + 1);
        let [cos, sin] = self.table(rows, like.device())?;
        Ok(Rotation { cos, sin, positions: mask.positions_on(like.device())? })
    }

    /// The table of at least `rows` positions on `device`.
    fn table(&self, rows: usize, device: &Device) -> Result<[Tensor; 2]> {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        let enough = |[cos, _]: &&[Tensor; 2]| cos.dims()[0] >= rows && cos.device().same_device(device);
        if let Some(table) = table.as_ref().filter(enough) {
            return Ok(table.clone());
        }
        let (rows, half) = (rows.next_power_of_two().min(self.positions), self.frequencies.len());
        let angles = (0..rows).flat_map(|at| self.frequencies.iter().map(move |f| f64::from(at as f32 * f)));
        let angles: Vec<f64> = angles.collect();
        let of = |f: fn(f64) -> f64| {
            let values: Vec<f32> = angles.iter().map(|&angle| f(angle) as f32).collect();
            Tensor::from_vec(values, (rows, half), device)
        };
        Ok(table.insert([of(libm::cos)?, of(libm::sin)?]).clone())
    }
}

/// `base` to the power `exponent`, rounded once from double precision: the same bits on every processor.
fn power(base: f32, exponent: f32) -> f32 {
    libm::pow(f64::from(base), f64::from(exponent)) as f32
}

/// Fails if one of `positions` lies beyond the `limit` that the model has.
///
/// # Errors
/// It does.
pub fn check_positions(positions: &[u32], limit: usize) -> Result<()> {
    let longest = positions.iter().max().map_or(0, |&at| at as usize + 1);
    if longest <= limit {
        return Ok(());
    }
    Err(Error::data(format!("a sequence of {longest} tokens exceeds the model's {limit} positions"))
        .help("lower `max_length` or the number of new tokens"))
}

/// `cos` and `sin` of the angles of each position, `[positions, width / 2]`, f32, and the positions of the tokens, u32.
#[derive(Debug, Clone)]
pub struct Rotation {
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
}

/// Rotates every head of queries and of keys, `[tokens…, heads · width]` each.
///
/// # Errors
/// A tensor operation failed.
pub fn rotate(tape: &mut Tape, [q, k]: [&Traced; 2], rotation: &Rotation) -> Result<[Traced; 2]> {
    let turned = turn([q.tensor(), k.tensor()], rotation, 1.)?;
    let rotation = rotation.clone();
    Ok(tape.record_all(turned, &[q, k], move |[q, k], into| {
        let [q, k] = turn([&q, &k], &rotation, -1.)?;
        into.add(0, q)?;
        into.add(1, k)
    }))
}

/// The rotation forward (`direction` 1) or, its transpose, back (−1).
fn turn([q, k]: [&Tensor; 2], rotation: &Rotation, direction: f64) -> Result<[Tensor; 2]> {
    let [q, k] = [q.contiguous()?, k.contiguous()?];
    dispatch!(
        q,
        crate::tensor::cuda::rotate([&q, &k], [&rotation.cos, &rotation.sin], &rotation.positions, direction),
        by_dtype!(q.dtype(), turn_host([&q, &k], rotation, direction))
    )
}

fn turn_host<T: Element>(both: [&Tensor; 2], rotation: &Rotation, direction: f64) -> Result<[Tensor; 2]> {
    let ((_, half), positions) = (rotation.cos.dims2()?, rotation.positions.to_vec1::<u32>()?);
    read_all([&rotation.cos, &rotation.sin], |angles: [&[f32]; 2]| {
        read_all(both, |[q, k]: [&[T]; 2]| {
            let turned =
                |x: &[T], like: &Tensor| tensor(kernels::rotate(x, angles, half, &positions, direction), like.dims());
            Ok([turned(q, both[0])?, turned(k, both[1])?])
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::check::{close, gradients, normal};
    use crate::tensor::tokens::Tokens;

    /// Two sequences of three tokens, which begin at positions 0 and 1.
    fn mask() -> Result<AttentionMask> {
        AttentionMask::after(&Tokens::new(&[[0; 3]; 2], &Device::Cpu)?, &[0, 1], &[0, 1], 4)
    }

    /// Queries of two heads and keys of one.
    fn inputs() -> Result<[candle_core::Var; 2]> {
        Ok([normal(&[2, 3, 8], 1)?, normal(&[2, 3, 4], 2)?])
    }

    #[test]
    fn gradients_equal_finite_differences() -> Result<()> {
        let vars = inputs()?;
        let rotation = Rope::new(&Rope::frequencies(4, 100.), 4).at(&mask()?, &vars[0])?;
        for which in [0, 1] {
            gradients(&vars, |tape, x| {
                let [q, k] = rotate(tape, [&x[0], &x[1]], &rotation)?;
                Ok(if which == 0 { q } else { k })
            })?;
        }
        // Both at once.
        let vars = [normal(&[2, 3, 8], 1)?, normal(&[2, 3, 8], 2)?];
        gradients(&vars, |tape, x| {
            let [q, k] = rotate(tape, [&x[0], &x[1]], &rotation)?;
            super::super::swiglu(tape, &q, &k)
        })
    }

    #[test]
    fn equals_the_composed_form() -> Result<()> {
        let [q, k] = inputs()?.map(|var| Traced::constant(var.as_detached_tensor()));
        let rotation = Rope::new(&Rope::frequencies(4, 100.), 4).at(&mask()?, q.tensor())?;
        let positions = Tensor::new(&[0u32, 1, 2, 1, 2, 3], &Device::Cpu)?;
        let table = |t: &Tensor| t.index_select(&positions, 0)?.to_dtype(candle_core::DType::F64)?.reshape((6, 1, 2));
        let (cos, sin) = (table(&rotation.cos)?, table(&rotation.sin)?);
        let turned = rotate(&mut Tape::default(), [&q, &k], &rotation)?;
        for (turned, x) in turned.iter().zip([q.tensor(), k.tensor()]) {
            let heads = x.reshape((6, (), 4))?;
            let (a, b) = (heads.narrow(2, 0, 2)?, heads.narrow(2, 2, 2)?);
            let first = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
            let second = (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
            close(turned.tensor(), &Tensor::cat(&[first, second], 2)?.reshape(x.shape())?, 1e-12)?;
        }
        Ok(())
    }

    #[test]
    fn a_position_outside_the_table_is_an_error() -> Result<()> {
        let rope = Rope::new(&Rope::frequencies(4, 100.), 2);
        assert!(rope.at(&mask()?, normal(&[2, 3, 4], 1)?.as_tensor()).is_err());
        Ok(())
    }
}
