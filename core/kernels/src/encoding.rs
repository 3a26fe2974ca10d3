//! How numbers are stored in low precision.

/// How the numbers of a row are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Encoding {
    /// IEEE half precision.
    F16,
    /// The upper half of an f32.
    Bf16,
    /// Blocks of 32: a scale (f16), and bytes.
    Q8_0,
    /// Blocks of 32: a scale (f16), and 4 bits each, less 8.
    Q4_0,
    /// Blocks of 32: a scale and a minimum (f16), and 4 bits each.
    Q4_1,
    /// Blocks of 256 in 16 parts with a scale each, 6 bits a number.
    Q6K,
    /// Blocks of 256 in 8 parts with a scale and a minimum each, 4 bits a number.
    Q4K,
}

impl Encoding {
    /// Every encoding.
    pub const ALL: [Self; 7] = [Self::F16, Self::Bf16, Self::Q8_0, Self::Q4_0, Self::Q4_1, Self::Q6K, Self::Q4K];

    /// How many numbers a block holds, and how many bytes it takes.
    pub const fn block(self) -> (usize, usize) {
        match self {
            Self::F16 | Self::Bf16 => (1, 2),
            Self::Q8_0 => (32, 34),
            Self::Q4_0 => (32, 18),
            Self::Q4_1 => (32, 20),
            Self::Q6K => (256, 210),
            Self::Q4K => (256, 144),
        }
    }
}

/// The value of the half-precision number with these bits, without a branch.
#[inline(always)]
pub(crate) fn half(bits: u16) -> f32 {
    let (magnitude, sign) = (u32::from(bits & 0x7fff), u32::from(bits & 0x8000) << 16);
    let shifted = magnitude << 13;
    // 2⁻²⁴ is the unit of subnormal numbers.
    let subnormal = (magnitude as f32 * f32::from_bits(103 << 23)).to_bits();
    let exponent = if magnitude >= 0x7c00 { 224 << 23 } else { 112 << 23 };
    f32::from_bits(sign | if magnitude < 0x0400 { subnormal } else { shifted + exponent })
}

/// The f32 with these bits in its upper half.
#[inline(always)]
pub(crate) fn upper_half(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// The half-precision number that lies at `at`.
#[inline(always)]
pub(crate) fn half_at(block: &[u8], at: usize) -> f32 {
    half(u16::from_le_bytes([block[at], block[at + 1]]))
}

/// Scale and minimum of part `index`, 6 bits each, of which the upper ones of the last four parts are in the first.
#[inline(always)]
pub(crate) fn scale_and_minimum(scales: &[u8], index: usize) -> [u8; 2] {
    if index < 4 {
        return [scales[index] & 63, scales[index + 4] & 63];
    }
    let low = scales[index + 4];
    [(low & 15) | (scales[index - 4] >> 6) << 4, (low >> 4) | (scales[index] >> 6) << 4]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every number of 16 bits, against its definition.
    #[test]
    fn halves_have_their_values() {
        for bits in 0..=u16::MAX {
            let (exponent, fraction) = (i32::from(bits >> 10 & 31), f64::from(bits & 0x3ff));
            let magnitude = match exponent {
                0 => fraction / f64::from(1 << 24),
                31 if fraction == 0. => f64::INFINITY,
                31 => f64::NAN,
                _ => (1. + fraction / 1024.) * f64::from(exponent - 15).exp2(),
            };
            let expected = (if bits & 0x8000 == 0 { magnitude } else { -magnitude }) as f32;
            let found = half(bits);
            assert!(found.to_bits() == expected.to_bits() || found.is_nan() && expected.is_nan(), "{bits:#x}: {found}");
        }
    }
}
