//! `cvt`: from any type to any other, rounded and cut as the instruction says.

use crate::alu::Plan;
use crate::decode::{Instruction, Mnemonic, NONE, Op};
use crate::number::{Brain, Half, Rounding, flush, odd32, round32, round64, whole};
use crate::ptx::Type;
use crate::registers::{LANES, Registers};

/// A conversion of one type to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Conversion {
    to: Type,
    from: Type,
    rounding: Rounding,
    /// To a whole number, though the type may be a float.
    whole: bool,
    /// Cut to the range of the type, or of 0 to 1 for floats.
    saturate: bool,
    flush: bool,
    /// Negative numbers become zero.
    relu: bool,
}

impl Conversion {
    pub fn plan(m: &Mnemonic) -> Result<Plan, String> {
        let [to, from] = m.types[..] else { return Err(format!("types {:?} of cvt", m.types)) };
        let known = ["rn", "rz", "rm", "rp", "rni", "rzi", "rmi", "rpi", "sat", "ftz", "relu"];
        if let Some(part) = m.parts[1..].iter().find(|part| !known.contains(part) && Type::parse(part).is_none()) {
            return Err(format!("modifier .{part} of cvt"));
        }
        let roundings = [("rz", Rounding::Zero), ("rm", Rounding::Down), ("rp", Rounding::Up)];
        let rounding = roundings.into_iter().find(|(name, _)| m.has(name) || m.has(&format!("{name}i")));
        let conversion = Conversion {
            to,
            from,
            rounding: rounding.map_or(Rounding::Nearest, |(_, rounding)| rounding),
            whole: ["rni", "rzi", "rmi", "rpi"].iter().any(|name| m.has(name)),
            saturate: m.has("sat"),
            flush: m.has("ftz"),
            relu: m.has("relu"),
        };
        let pair = matches!(to, Type::Bf16x2 | Type::F16x2);
        let directed_small = matches!(to, Type::F16 | Type::Bf16 | Type::F16x2 | Type::Bf16x2)
            && !matches!(conversion.rounding, Rounding::Nearest | Rounding::Zero);
        if directed_small || matches!(from, Type::Bf16x2 | Type::F16x2) || pair && from != Type::F32 {
            return Err(format!("cvt {} of {from:?} to {to:?}", m.parts.join(".")));
        }
        let sources = if pair { vec![from; 2] } else { vec![from] };
        Ok(Plan { op: Op::Convert(conversion), result: to, sources, offset: 0, immediate: false })
    }

    /// Converts the lanes that are on.
    pub fn run(self, r: &mut Registers, i: &Instruction, on: u32) {
        use Type::{Bf16, F16, F32, F64, S32, S64, U16, U32, U64};
        let plain = !self.saturate && !self.relu && !self.flush;
        // The usual ones, as loops over the lanes.
        match (self.from, self.to) {
            (U32, U64 | S64) if plain => r.map1(i, on, |x: u32| u64::from(x)),
            (S32, U64 | S64) if plain => r.map1(i, on, |x: i32| i64::from(x)),
            (U64 | S64, U32 | S32) if plain => r.map1(i, on, |x: u64| x as u32),
            (U16, U32 | S32) if plain => r.map1(i, on, |x: u16| u32::from(x)),
            (U32 | S32, U16) if plain => r.map1(i, on, |x: u32| x as u16),
            (Bf16, F32) if plain => r.map1(i, on, |x: Brain| x.wide()),
            (F16, F32) if plain => r.map1(i, on, |x: Half| x.wide()),
            (F32, Bf16) if plain && self.rounding == Rounding::Nearest => r.map1(i, on, Brain::round),
            (F32, F16) if plain && self.rounding == Rounding::Nearest => r.map1(i, on, Half::round),
            (F32, F64) if plain && !self.whole => r.map1(i, on, |x: f32| f64::from(x)),
            (S32, F32) if plain && self.rounding == Rounding::Nearest => r.map1(i, on, |x: i32| x as f32),
            (U32, F32) if plain && self.rounding == Rounding::Nearest => r.map1(i, on, |x: u32| x as f32),
            _ => self.any(r, i, on),
        }
    }

    fn any(self, r: &mut Registers, i: &Instruction, on: u32) {
        let read = |r: &Registers, at: u32| -> [u64; LANES] {
            if self.from.wide() { *r.get(at) } else { r.get::<u32>(at).map(u64::from) }
        };
        let first = read(r, i.s[0]);
        let result: [u64; LANES] = if i.s[1] == NONE {
            first.map(|x| self.one(x))
        } else {
            // The first operand goes to the upper half.
            let second = read(r, i.s[1]);
            std::array::from_fn(|lane| self.one(first[lane]) << 16 | self.one(second[lane]))
        };
        if self.to.wide() {
            r.put(i.d[0], on, &result);
        } else {
            r.put(i.d[0], on, &result.map(|x| x as u32));
        }
    }

    /// One value, as the bits of the register that takes it.
    pub fn one(self, x: u64) -> u64 {
        match self.from {
            Type::F32 => self.float(f64::from(if self.flush {
                flush(f32::from_bits(x as u32))
            } else {
                f32::from_bits(x as u32)
            })),
            Type::F64 => self.float(f64::from_bits(x)),
            Type::F16 => self.float(f64::from(Half(x as u16).wide())),
            Type::Bf16 => self.float(f64::from(Brain(x as u16).wide())),
            Type::S8 => self.integer(i128::from(x as i8)),
            Type::S16 => self.integer(i128::from(x as i16)),
            Type::S32 => self.integer(i128::from(x as i32)),
            Type::S64 => self.integer(i128::from(x as i64)),
            from => self.integer(i128::from(x & (u64::MAX >> (64 - 8 * from.bytes())))),
        }
    }

    fn float(self, x: f64) -> u64 {
        let x = if self.whole || !self.to.float() { whole(x, self.rounding) } else { x };
        let x = if self.saturate && self.to.float() { if x.is_nan() { 0.0 } else { x.clamp(0.0, 1.0) } } else { x };
        let x = if self.relu && x < 0.0 { 0.0 } else { x };
        if self.to.float() {
            return self.rounded(x, 0.0);
        }
        // Rust's `as` cuts to the range and makes NaN a zero, as the device does.
        match self.to {
            Type::U8 => u64::from(x as u8),
            Type::S8 => i64::from(x as i8) as u64,
            Type::U16 => u64::from(x as u16),
            Type::S16 => i64::from(x as i16) as u64,
            Type::U32 => u64::from(x as u32),
            Type::S32 => i64::from(x as i32) as u64,
            Type::S64 => x as i64 as u64,
            _ => x as u64,
        }
    }

    fn integer(self, x: i128) -> u64 {
        if self.to.float() {
            let near = x as f64;
            return self.rounded(near, (x - near as i128) as f64);
        }
        let bits = 8 * self.to.bytes() as u32;
        let x = match (self.saturate, self.to.signed()) {
            (false, _) => x,
            (true, true) => x.clamp(-(1 << (bits - 1)), (1 << (bits - 1)) - 1),
            (true, false) => x.clamp(0, (1 << bits) - 1),
        };
        // Into a wider register a number goes with its sign, if its type has one.
        let unused = 128 - bits;
        if self.to.signed() { (x << unused >> unused) as u64 } else { ((x << unused) as u128 >> unused) as u64 }
    }

    /// The exact `high + low` as the bits of a float.
    fn rounded(self, high: f64, low: f64) -> u64 {
        let toward_zero = self.rounding == Rounding::Zero;
        match self.to {
            Type::F32 => {
                let result = if self.whole { high as f32 } else { round32(high, low, self.rounding) };
                u64::from(if self.flush { flush(result) } else { result }.to_bits())
            }
            Type::F64 => if self.whole { high } else { round64(high, low, self.rounding) }.to_bits(),
            Type::F16 | Type::F16x2 if toward_zero => {
                let near = Half::round(odd32(high, low));
                let over = near.wide().abs() > odd32(high, low).abs();
                u64::from(if over { near.0 - 1 } else { near.0 })
            }
            Type::F16 | Type::F16x2 => u64::from(Half::round(odd32(high, low)).0),
            _ if toward_zero && !high.is_nan() => {
                u64::from((round32(high, low, Rounding::Zero).to_bits() >> 16) as u16)
            }
            _ => u64::from(Brain::round(odd32(high, low)).0),
        }
    }
}
