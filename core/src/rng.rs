//! Named, seeded random generators.
//!
//! Every random number in Titer comes from a generator that is derived from a seed and a *name* ("data", "lora",
//! "dropout/12"). Two uses never share a stream, so adding one cannot change another, and nothing has to be saved to
//! resume: the generator of step `k` is derived anew from the same seed and name.

use candle_core::{Device, Tensor};
use rand::distr::{Distribution, Uniform};
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};

use crate::error::Result;

/// The generator behind every random number: the same sequence on every machine.
pub type Generator = rand_chacha::ChaCha8Rng;

/// A seed from which named generators and further seeds are derived.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seed([u8; 32]);

impl Seed {
    /// The seed of a user-visible number.
    pub fn new(number: u64) -> Self {
        Self([0; 32]).derive(&number.to_le_bytes())
    }

    /// The seed called `name` under this one.
    #[must_use]
    pub fn named(self, name: &str) -> Self {
        self.derive(name.as_bytes())
    }

    /// The `index`-th seed under this one, for steps and epochs.
    #[must_use]
    pub fn at(self, index: usize) -> Self {
        self.derive(&(index as u64).to_le_bytes())
    }

    /// A generator at the start of this seed's sequence.
    pub fn generator(self) -> Generator {
        Generator::from_seed(self.0)
    }

    fn derive(self, label: &[u8]) -> Self {
        Self(*blake3::keyed_hash(&self.0, label).as_bytes())
    }
}

/// A random order of `0..n`.
pub fn permutation(n: usize, generator: &mut Generator) -> Vec<usize> {
    let mut order: Vec<usize> = (0..n).collect();
    order.shuffle(generator);
    order
}

/// A tensor of independent standard normal values (f32), drawn on the host so that every device sees the same ones.
pub fn randn(shape: &[usize], generator: &mut Generator, device: &Device) -> Result<Tensor> {
    let count = shape.iter().product();
    let mut values = Vec::with_capacity(count + 1);
    while values.len() < count {
        values.extend(normal_pair(generator));
    }
    values.truncate(count);
    Ok(Tensor::from_vec(values, shape, device)?)
}

/// Two independent standard normal values (Box and Muller 1958). The usual samplers take logarithms of the C library,
/// whose bits depend on the processor.
fn normal_pair(generator: &mut Generator) -> [f32; 2] {
    // In (0, 1], since there is no logarithm of zero.
    let [u, v]: [f64; 2] = generator.random();
    let (radius, angle) = ((-2. * libm::log(1. - u)).sqrt(), std::f64::consts::TAU * v);
    [(radius * libm::cos(angle)) as f32, (radius * libm::sin(angle)) as f32]
}

/// A tensor of independent uniform values in `[-bound, bound)` (f32).
pub fn uniform(shape: &[usize], bound: f32, generator: &mut Generator, device: &Device) -> Result<Tensor> {
    let count = shape.iter().product();
    let range = Uniform::new(-1f32, 1.).expect("a non-empty range");
    let values: Vec<f32> = range.sample_iter(generator).take(count).map(|value| value * bound).collect();
    Ok(Tensor::from_vec(values, shape, device)?)
}

/// Zeros with probability `p`, else `1 / (1 - p)`: a dropout mask of expectation one.
pub fn dropout_mask(shape: &[usize], p: f32, generator: &mut Generator, device: &Device) -> Result<Tensor> {
    let count = shape.iter().product();
    let range = Uniform::new(0f32, 1.).expect("a non-empty range");
    let keep = 1. / (1. - p);
    let values: Vec<f32> =
        range.sample_iter(generator).take(count).map(|value| if value < p { 0. } else { keep }).collect();
    Ok(Tensor::from_vec(values, shape, device)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::Rng;

    #[test]
    fn normal_values_have_the_moments_of_their_distribution() -> Result<()> {
        let values = randn(&[100_001], &mut Seed::new(1).generator(), &Device::Cpu)?.to_vec1::<f32>()?;
        let moment = |power: i32| values.iter().map(|&x| f64::from(x).powi(power)).sum::<f64>() / values.len() as f64;
        for (power, expected) in [(1, 0.), (2, 1.), (3, 0.), (4, 3.)] {
            assert!((moment(power) - expected).abs() < 0.1, "moment {power} is {}", moment(power));
        }
        let pairs = values.as_chunks::<2>().0;
        let product = pairs.iter().map(|[a, b]| f64::from(a * b)).sum::<f64>() / pairs.len() as f64;
        assert!(product.abs() < 0.02, "the values of a pair correlate: {product}");
        Ok(())
    }

    #[test]
    fn names_give_independent_repeatable_streams() {
        let draw = |seed: Seed| seed.generator().next_u64();
        let seed = Seed::new(7);
        assert_eq!(draw(seed.named("data")), draw(Seed::new(7).named("data")));
        assert_ne!(draw(seed.named("data")), draw(seed.named("lora")));
        assert_ne!(draw(seed.at(0)), draw(seed.at(1)));
        assert_ne!(draw(Seed::new(7)), draw(Seed::new(8)));
    }
}
