//! Named, seeded random generators.
//!
//! Every random number in Titer comes from a generator that is derived from a seed and a *name* ("data", "lora",
//! "dropout/12"). Two uses never share a stream, so adding one cannot change another, and nothing has to be saved to
//! resume: the generator of step `k` is derived anew from the same seed and name.

use candle_core::{Device, Tensor};
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_distr::{Distribution, StandardNormal, Uniform};

use crate::Result;

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
    let values: Vec<f32> = StandardNormal.sample_iter(generator).take(count).collect();
    Ok(Tensor::from_vec(values, shape, device)?)
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
    fn names_give_independent_repeatable_streams() {
        let draw = |seed: Seed| seed.generator().next_u64();
        let seed = Seed::new(7);
        assert_eq!(draw(seed.named("data")), draw(Seed::new(7).named("data")));
        assert_ne!(draw(seed.named("data")), draw(seed.named("lora")));
        assert_ne!(draw(seed.at(0)), draw(seed.at(1)));
        assert_ne!(draw(Seed::new(7)), draw(Seed::new(8)));
    }
}
