//! What decides the rounding of a result: the order of summation and the instructions used.
//!
//! *Portable* arithmetic gives the same bits on every processor and for every number of threads. Each sum has one order:
//! products of matrices sum over blocks of a fixed size, and within a block by one chain of fused multiply-adds; other sums
//! run over a fixed number of lanes. Vector width and threads only decide how many such sums are computed at once.
//!
//! *Native* arithmetic leaves large products to the fastest unit of the processor, which sums in another order; weights in
//! bf16 are multiplied as they are stored where the processor has a tile unit, as accurately as in f32. Where
//! answers are generated with quantized weights, it rounds the activations to 8 bits and multiplies integers.
//!
//! The choice is made once for the process, before any work.

use std::sync::atomic::{AtomicU8, Ordering};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The version of the arithmetic. Raise it with any change that changes a bit of any result.
pub const VERSION: u32 = 4;

/// Partial sums of one element that run beside each other where a sum runs along the vectors. Another number gives other bits.
pub(crate) const LANES: usize = 16;

/// How numbers are rounded on the CPU.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Arithmetic {
    /// The same bits on every processor and for every number of threads.
    #[default]
    Portable,
    /// Whatever is fastest on this processor.
    Native,
}

impl Arithmetic {
    /// The name in configurations.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            Self::Native => "native",
        }
    }
}

/// Vector instructions, from the narrowest. Portable results do not depend on them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// One number at a time.
    Scalar,
    /// Vectors of 128 bits without a fused multiply-add of their own.
    Bits128,
    /// AVX2 with fused multiply-adds; NEON on ARM.
    Bits256,
    /// AVX-512.
    Bits512,
}

impl Level {
    /// All levels.
    pub const ALL: [Self; 4] = [Self::Scalar, Self::Bits128, Self::Bits256, Self::Bits512];

    /// The level called `scalar`, `128`, `256` or `512`.
    pub fn parse(name: &str) -> Option<Self> {
        ["scalar", "128", "256", "512"]
            .into_iter()
            .zip(Self::ALL)
            .find(|(known, _)| *known == name)
            .map(|(_, level)| level)
    }
}

static NATIVE: AtomicU8 = AtomicU8::new(Arithmetic::Portable as u8);
static LIMIT: AtomicU8 = AtomicU8::new(Level::Bits512 as u8);

/// Chooses the arithmetic of this process. To be called before any work.
pub fn choose(arithmetic: Arithmetic) {
    NATIVE.store(arithmetic as u8, Ordering::Relaxed);
}

/// The arithmetic of this process.
#[inline]
pub fn chosen() -> Arithmetic {
    if NATIVE.load(Ordering::Relaxed) == Arithmetic::Native as u8 { Arithmetic::Native } else { Arithmetic::Portable }
}

/// Uses no wider vectors than `level` from now on, to check that results do not depend on them.
pub fn limit(level: Level) {
    LIMIT.store(level as u8, Ordering::Relaxed);
}

/// The widest vectors that may be used.
#[inline]
pub(crate) fn widest() -> Level {
    Level::ALL[usize::from(LIMIT.load(Ordering::Relaxed)).min(Level::ALL.len() - 1)]
}
