//! Numbers of the device: bf16 and f16, rounding in a direction, and how values lie in a register's lanes.

/// How a result that is no number of its type is rounded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rounding {
    /// To the nearest, ties to even.
    Nearest,
    /// Towards zero.
    Zero,
    /// Towards minus infinity.
    Down,
    /// Towards plus infinity.
    Up,
}

/// An IEEE half: 5 bits of exponent, 10 of mantissa.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Half(pub u16);

/// A bfloat16: the upper half of an f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Brain(pub u16);

/// Two 16-bit floats in one 32-bit register, the first in the lower half.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pair<T>(pub T, pub T);

/// A value as it lies in one lane of a register: registers have 32 or 64 bits a lane.
pub trait Lane: Copy {
    /// `u32` or `u64`.
    type Slot: Copy + Default;
    fn take(slot: Self::Slot) -> Self;
    fn give(self) -> Self::Slot;
}

macro_rules! lanes {
    ($($value:ty, $slot:ty: $take:expr, $give:expr;)*) => { $(
        impl Lane for $value {
            type Slot = $slot;
            #[inline(always)]
            fn take(slot: $slot) -> Self { let take: fn($slot) -> $value = $take; take(slot) }
            #[inline(always)]
            fn give(self) -> $slot { let give: fn($value) -> $slot = $give; give(self) }
        }
    )* };
}
lanes! {
    u8, u32: |s| s as u8, u32::from;
    i8, u32: |s| s as i8, |v| i32::from(v) as u32;
    u16, u32: |s| s as u16, u32::from;
    i16, u32: |s| s as i16, |v| i32::from(v) as u32;
    u32, u32: |s| s, |v| v;
    i32, u32: |s| s as i32, |v| v as u32;
    f32, u32: f32::from_bits, f32::to_bits;
    u64, u64: |s| s, |v| v;
    i64, u64: |s| s as i64, |v| v as u64;
    f64, u64: f64::from_bits, f64::to_bits;
    Half, u32: |s| Half(s as u16), |v| u32::from(v.0);
    Brain, u32: |s| Brain(s as u16), |v| u32::from(v.0);
    Pair<Half>, u32: |s| Pair(Half(s as u16), Half((s >> 16) as u16)), |v| u32::from(v.0.0) | u32::from(v.1.0) << 16;
    Pair<Brain>, u32: |s| Pair(Brain(s as u16), Brain((s >> 16) as u16)), |v| u32::from(v.0.0) | u32::from(v.1.0) << 16;
}

/// The arithmetic of one floating-point type.
pub trait Float: Lane {
    /// Applies a function to each number, at a precision from which rounding to this type is exact.
    fn map(self, f: impl Fn(f64) -> f64) -> Self;
    fn add(self, other: Self) -> Self;
    fn sub(self, other: Self) -> Self;
    fn mul(self, other: Self) -> Self;
    fn div(self, other: Self) -> Self;
    fn fma(self, factor: Self, addend: Self) -> Self;
    /// The smaller; the number, if one is none.
    fn least(self, other: Self) -> Self;
    fn most(self, other: Self) -> Self;
    /// The smaller; NaN, if one is.
    fn least_nan(self, other: Self) -> Self;
    fn most_nan(self, other: Self) -> Self;
    /// This number's size with the other's sign.
    fn signed_as(self, other: Self) -> Self;
    fn negated(self) -> Self;
    fn size(self) -> Self;
}

macro_rules! native {
    ($($t:ty),*) => { $(
        impl Float for $t {
            #[inline(always)]
            fn map(self, f: impl Fn(f64) -> f64) -> Self { f(self as f64) as $t }
            #[inline(always)]
            fn add(self, other: Self) -> Self { self + other }
            #[inline(always)]
            fn sub(self, other: Self) -> Self { self - other }
            #[inline(always)]
            fn mul(self, other: Self) -> Self { self * other }
            #[inline(always)]
            fn div(self, other: Self) -> Self { self / other }
            #[inline(always)]
            fn fma(self, factor: Self, addend: Self) -> Self { self.mul_add(factor, addend) }
            #[inline(always)]
            fn least(self, other: Self) -> Self { self.min(other) }
            #[inline(always)]
            fn most(self, other: Self) -> Self { self.max(other) }
            #[inline(always)]
            fn least_nan(self, other: Self) -> Self {
                if self.is_nan() || other.is_nan() { <$t>::NAN } else { self.min(other) }
            }
            #[inline(always)]
            fn most_nan(self, other: Self) -> Self {
                if self.is_nan() || other.is_nan() { <$t>::NAN } else { self.max(other) }
            }
            #[inline(always)]
            fn signed_as(self, other: Self) -> Self { self.copysign(other) }
            #[inline(always)]
            fn negated(self) -> Self { -self }
            #[inline(always)]
            fn size(self) -> Self { self.abs() }
        }
    )* };
}
native!(f32, f64);

// An f32 holds more than twice the bits and two: rounding its sums, products and quotients again is as good as once.
macro_rules! small {
    ($($t:ident: $sign:literal),*) => { $(
        impl Float for $t {
            #[inline(always)]
            fn map(self, f: impl Fn(f64) -> f64) -> Self { $t::round(odd32(f(f64::from(self.wide())), 0.0)) }
            #[inline(always)]
            fn add(self, other: Self) -> Self { $t::round(self.wide() + other.wide()) }
            #[inline(always)]
            fn sub(self, other: Self) -> Self { $t::round(self.wide() - other.wide()) }
            #[inline(always)]
            fn mul(self, other: Self) -> Self { $t::round(self.wide() * other.wide()) }
            #[inline(always)]
            fn div(self, other: Self) -> Self { $t::round(self.wide() / other.wide()) }
            #[inline(always)]
            fn fma(self, factor: Self, addend: Self) -> Self {
                let (high, low) = two_sum(f64::from(self.wide()) * f64::from(factor.wide()), f64::from(addend.wide()));
                $t::round(odd32(high, low))
            }
            #[inline(always)]
            fn least(self, other: Self) -> Self { $t::round(self.wide().least(other.wide())) }
            #[inline(always)]
            fn most(self, other: Self) -> Self { $t::round(self.wide().most(other.wide())) }
            #[inline(always)]
            fn least_nan(self, other: Self) -> Self { $t::round(self.wide().least_nan(other.wide())) }
            #[inline(always)]
            fn most_nan(self, other: Self) -> Self { $t::round(self.wide().most_nan(other.wide())) }
            #[inline(always)]
            fn signed_as(self, other: Self) -> Self { $t(self.0 & !$sign | other.0 & $sign) }
            #[inline(always)]
            fn negated(self) -> Self { $t(self.0 ^ $sign) }
            #[inline(always)]
            fn size(self) -> Self { $t(self.0 & !$sign) }
        }

        impl Float for Pair<$t> {
            #[inline(always)]
            fn map(self, f: impl Fn(f64) -> f64) -> Self { Pair(self.0.map(&f), self.1.map(&f)) }
            #[inline(always)]
            fn add(self, other: Self) -> Self { Pair(self.0.add(other.0), self.1.add(other.1)) }
            #[inline(always)]
            fn sub(self, other: Self) -> Self { Pair(self.0.sub(other.0), self.1.sub(other.1)) }
            #[inline(always)]
            fn mul(self, other: Self) -> Self { Pair(self.0.mul(other.0), self.1.mul(other.1)) }
            #[inline(always)]
            fn div(self, other: Self) -> Self { Pair(self.0.div(other.0), self.1.div(other.1)) }
            #[inline(always)]
            fn fma(self, factor: Self, addend: Self) -> Self {
                Pair(self.0.fma(factor.0, addend.0), self.1.fma(factor.1, addend.1))
            }
            #[inline(always)]
            fn least(self, other: Self) -> Self { Pair(self.0.least(other.0), self.1.least(other.1)) }
            #[inline(always)]
            fn most(self, other: Self) -> Self { Pair(self.0.most(other.0), self.1.most(other.1)) }
            #[inline(always)]
            fn least_nan(self, other: Self) -> Self { Pair(self.0.least_nan(other.0), self.1.least_nan(other.1)) }
            #[inline(always)]
            fn most_nan(self, other: Self) -> Self { Pair(self.0.most_nan(other.0), self.1.most_nan(other.1)) }
            #[inline(always)]
            fn signed_as(self, other: Self) -> Self { Pair(self.0.signed_as(other.0), self.1.signed_as(other.1)) }
            #[inline(always)]
            fn negated(self) -> Self { Pair(self.0.negated(), self.1.negated()) }
            #[inline(always)]
            fn size(self) -> Self { Pair(self.0.size(), self.1.size()) }
        }
    )* };
}
small!(Half: 0x8000, Brain: 0x8000);

impl Half {
    pub fn wide(self) -> f32 {
        let (exponent, mantissa) = (u32::from(self.0 >> 10 & 31), u32::from(self.0 & 1023));
        let size = match exponent {
            0 => mantissa as f32 * f32::from_bits(103 << 23), // 2^-24
            31 if mantissa == 0 => f32::INFINITY,
            31 => f32::NAN,
            _ => f32::from_bits((exponent + 112) << 23 | mantissa << 13),
        };
        if self.0 >> 15 == 1 { -size } else { size }
    }

    /// To the nearest, ties to even.
    pub fn round(x: f32) -> Half {
        let sign = (x.to_bits() >> 16 & 0x8000) as u16;
        let size = x.abs();
        if size.is_nan() {
            return Half(0x7fff);
        }
        if size >= 65520.0 {
            return Half(sign | 0x7c00);
        }
        if size < f32::from_bits(113 << 23) {
            // Below 2^-14 the numbers are multiples of 2^-24.
            return Half(sign | (f64::from(size) * f64::from(1u32 << 24)).round_ties_even() as u16);
        }
        let rounded = size.to_bits() + 0xfff + (size.to_bits() >> 13 & 1);
        Half(sign | (((rounded >> 23) - 112) << 10 | (rounded >> 13 & 1023)) as u16)
    }
}

impl Brain {
    #[inline(always)]
    pub fn wide(self) -> f32 {
        f32::from_bits(u32::from(self.0) << 16)
    }

    /// To the nearest, ties to even.
    #[inline(always)]
    pub fn round(x: f32) -> Brain {
        let bits = x.to_bits();
        let rounded = (bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16) as u16;
        Brain(if x.is_nan() { 0x7fff } else { rounded })
    }
}

/// Zero in place of a number below the normal ones, with its sign.
#[inline(always)]
pub fn flush(x: f32) -> f32 {
    if x.abs() < f32::MIN_POSITIVE { 0f32.copysign(x) } else { x }
}

/// The sum of two numbers, and what its rounding left out: together they are exact.
#[inline(always)]
pub fn two_sum(a: f64, b: f64) -> (f64, f64) {
    let sum = a + b;
    let part = sum - a;
    let left = (a - (sum - part)) + (b - part);
    (sum, if left.is_nan() { 0.0 } else { left })
}

/// The exact `high + low` as an f32; where that is none, the neighbour whose last bit is 1, which any shorter type rounds as
/// it would the exact number.
#[inline(always)]
pub fn odd32(high: f64, low: f64) -> f32 {
    let near = high as f32;
    let above = f64::from(near) > high || (f64::from(near) == high && low < 0.0);
    let below = f64::from(near) < high || (f64::from(near) == high && low > 0.0);
    if near.to_bits() & 1 == 1 || !(above || below) {
        near
    } else if below {
        near.next_up()
    } else {
        near.next_down()
    }
}

/// The exact `high + low` as an f32, rounded in a direction.
#[inline(always)]
pub fn round32(high: f64, low: f64, rounding: Rounding) -> f32 {
    let near = high as f32;
    let below = f64::from(near) < high || (f64::from(near) == high && low > 0.0);
    let above = f64::from(near) > high || (f64::from(near) == high && low < 0.0);
    match rounding {
        Rounding::Nearest => near,
        Rounding::Down if above => near.next_down(),
        Rounding::Up if below => near.next_up(),
        Rounding::Zero if near > 0.0 && above => near.next_down(),
        Rounding::Zero if near < 0.0 && below => near.next_up(),
        _ => near,
    }
}

/// The exact `high + low`, of which `high` is the nearest f64, rounded in a direction.
#[inline(always)]
pub fn round64(high: f64, low: f64, rounding: Rounding) -> f64 {
    match rounding {
        Rounding::Down if low < 0.0 => high.next_down(),
        Rounding::Up if low > 0.0 => high.next_up(),
        Rounding::Zero if high > 0.0 && low < 0.0 => high.next_down(),
        Rounding::Zero if high < 0.0 && low > 0.0 => high.next_up(),
        _ => high,
    }
}

/// A whole number in the direction.
#[inline(always)]
pub fn whole(x: f64, rounding: Rounding) -> f64 {
    match rounding {
        Rounding::Nearest => x.round_ties_even(),
        Rounding::Zero => x.trunc(),
        Rounding::Down => x.floor(),
        Rounding::Up => x.ceil(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every half, by its definition: sign, exponent, mantissa.
    #[test]
    fn halves_are_what_their_bits_say() {
        for bits in 0..=u16::MAX {
            let (sign, exponent, mantissa) = (bits >> 15, i32::from(bits >> 10 & 31), f64::from(bits & 1023));
            let size = match exponent {
                31 => continue,
                0 => mantissa * 2f64.powi(-24),
                _ => (1024.0 + mantissa) * 2f64.powi(exponent - 25),
            };
            let value = if sign == 1 { -size } else { size };
            assert_eq!(f64::from(Half(bits).wide()), value, "{bits:#06x}");
            assert_eq!(Half::round(value as f32), Half(bits), "{bits:#06x}");
        }
        assert!(Half(0x7c01).wide().is_nan());
        assert_eq!((Half(0x7c00).wide(), Half(0xfc00).wide()), (f32::INFINITY, f32::NEG_INFINITY));
    }

    /// Between two neighbours: the nearest, and at the middle the even one.
    #[test]
    fn rounding_finds_the_nearest() {
        for bits in (0..0x7bff).step_by(7) {
            let (low, high) = (Half(bits).wide(), Half(bits + 1).wide());
            let middle = (low + high) / 2.0;
            assert_eq!(Half::round(middle), Half(bits + (bits & 1)));
            assert_eq!(Half::round(middle.next_up()), Half(bits + 1));
            assert_eq!(Half::round(middle.next_down()), Half(bits));
        }
        for bits in (0..0x7f7f).step_by(13) {
            let (low, high) = (Brain(bits).wide(), Brain(bits + 1).wide());
            let middle = low + (high - low) / 2.0;
            assert_eq!(Brain::round(middle), Brain(bits + (bits & 1)));
            assert_eq!(Brain::round(middle.next_up()), Brain(bits + 1));
        }
        assert_eq!(Half::round(65519.9), Half(0x7bff));
        assert_eq!(Half::round(65520.0), Half(0x7c00));
        assert_eq!((Brain::round(f32::NAN), Half::round(f32::NAN)), (Brain(0x7fff), Half(0x7fff)));
        assert_eq!(Brain::round(f32::MAX), Brain(0x7f80));
    }

    /// 1 + 2^-8 + 2^-30 lies above the middle between two bf16; the nearest f32 is that middle, and would go down.
    #[test]
    fn a_fused_product_is_rounded_once() {
        let tiny = Brain::round(2f32.powi(-15));
        let middle = Brain::round(1.0).fma(Brain::round(1.0), Brain::round(2f32.powi(-8)));
        assert_eq!(middle, Brain::round(1.0));
        let addend = Pair(Brain::round(1.0), Brain::round(-1.0));
        let sum = Pair(tiny, tiny).fma(Pair(tiny, tiny), addend);
        assert_eq!(sum, addend);
        let half = |x: f32| Half::round(x);
        // 1.0009765625 * 1.0009765625 = 1.00195407867431640625, which f32 holds; plus 2^-24 * 2^0 it decides a tie.
        let exact = half(1.0009766).fma(half(1.0009766), half(2f32.powi(-24)));
        assert_eq!(exact, half(1.0019531));
    }

    #[test]
    fn directions() {
        use Rounding::{Down, Nearest, Up, Zero};
        let third = 1.0 / 3.0;
        let near = third as f32;
        assert!(f64::from(near) > third);
        for (rounding, expected) in [(Nearest, near), (Up, near), (Down, near.next_down()), (Zero, near.next_down())] {
            assert_eq!(round32(third, 0.0, rounding), expected);
        }
        for (rounding, expected) in
            [(Nearest, -near), (Up, -near.next_down()), (Down, -near), (Zero, -near.next_down())]
        {
            assert_eq!(round32(-third, 0.0, rounding), expected);
        }
        assert_eq!(round32(1.0, 1e-30, Up), 1f32.next_up());
        assert_eq!(round64(1.0, -1e-30, Zero), 1f64.next_down());
        assert_eq!([Nearest, Zero, Down, Up].map(|r| whole(-2.5, r)), [-2.0, -2.0, -3.0, -2.0]);
        assert_eq!((flush(1e-40), flush(-1e-40).to_bits(), flush(1e-37)), (0.0, 1 << 31, 1e-37));
    }
}
