//! Instructions that compute each lane by itself: which function does it, and what types its operands have. What is not here
//! with all its modifiers is unknown, so that nothing is computed in another way than the device does.

use crate::convert::Conversion;
use crate::decode::{Instruction, Mnemonic, NONE, Op};
use crate::number::{Brain, Float, Half, Lane, Pair, Rounding, flush, round32, round64, two_sum};
use crate::ptx::Type;
use crate::registers::{Arithmetic, Registers};

/// How an instruction is executed.
pub struct Plan {
    pub op: Op,
    pub result: Type,
    pub sources: Vec<Type>,
    pub offset: i64,
    /// Whether the last operand is a number that goes into `offset`.
    pub immediate: bool,
}

/// An f32 whose subnormal numbers are zero, going in and coming out.
#[derive(Clone, Copy, Debug)]
struct Flushed(f32);

impl Lane for Flushed {
    type Slot = u32;
    #[inline(always)]
    fn take(slot: u32) -> Self {
        Flushed(flush(f32::from_bits(slot)))
    }
    #[inline(always)]
    fn give(self) -> u32 {
        flush(self.0).to_bits()
    }
}

#[rustfmt::skip]
impl Float for Flushed {
    #[inline(always)] fn map(self, f: impl Fn(f64) -> f64) -> Self { Flushed(self.0.map(f)) }
    #[inline(always)] fn add(self, o: Self) -> Self { Flushed(self.0 + o.0) }
    #[inline(always)] fn sub(self, o: Self) -> Self { Flushed(self.0 - o.0) }
    #[inline(always)] fn mul(self, o: Self) -> Self { Flushed(self.0 * o.0) }
    #[inline(always)] fn div(self, o: Self) -> Self { Flushed(self.0 / o.0) }
    #[inline(always)] fn fma(self, f: Self, a: Self) -> Self { Flushed(self.0.mul_add(f.0, a.0)) }
    #[inline(always)] fn least(self, o: Self) -> Self { Flushed(self.0.least(o.0)) }
    #[inline(always)] fn most(self, o: Self) -> Self { Flushed(self.0.most(o.0)) }
    #[inline(always)] fn least_nan(self, o: Self) -> Self { Flushed(self.0.least_nan(o.0)) }
    #[inline(always)] fn most_nan(self, o: Self) -> Self { Flushed(self.0.most_nan(o.0)) }
    #[inline(always)] fn signed_as(self, o: Self) -> Self { Flushed(self.0.copysign(o.0)) }
    #[inline(always)] fn negated(self) -> Self { Flushed(-self.0) }
    #[inline(always)] fn size(self) -> Self { Flushed(self.0.abs()) }
}

/// What values of a type are compared by.
trait Key: Lane {
    type Order: PartialOrd + Copy;
    fn key(self) -> Self::Order;
}

macro_rules! keys {
    ($($t:ty: $order:ty, $key:expr;)*) => { $(
        impl Key for $t {
            type Order = $order;
            #[inline(always)]
            fn key(self) -> $order { let key: fn($t) -> $order = $key; key(self) }
        }
    )* };
}
keys! {
    u16: u16, |x| x; i16: i16, |x| x; u32: u32, |x| x; i32: i32, |x| x; u64: u64, |x| x; i64: i64, |x| x;
    f32: f32, |x| x; f64: f64, |x| x; Flushed: f32, |x| x.0; Half: f32, Half::wide; Brain: f32, Brain::wide;
}

macro_rules! unary {
    ($t:ty, $f:expr) => {
        (|r, i, on| r.map1::<$t, $t>(i, on, $f)) as Arithmetic
    };
}
macro_rules! binary {
    ($t:ty, $f:expr) => {
        (|r, i, on| r.map2::<$t, $t, $t>(i, on, $f)) as Arithmetic
    };
}
macro_rules! ternary {
    ($t:ty, $f:expr) => {
        (|r, i, on| r.map3::<$t, $t, $t, $t>(i, on, $f)) as Arithmetic
    };
}
/// A shift: the second operand is a u32, whatever is shifted.
macro_rules! shift {
    ($t:ty, $f:expr) => {
        (|r, i, on| r.map2::<$t, u32, $t>(i, on, $f)) as Arithmetic
    };
}
macro_rules! count {
    ($t:ty, $f:expr) => {
        (|r, i, on| r.map1::<$t, u32>(i, on, $f)) as Arithmetic
    };
}
macro_rules! integers {
    ($ty:expr, $how:ident, $f:expr) => {
        match $ty {
            Type::U16 | Type::B16 => Some($how!(u16, $f)),
            Type::S16 => Some($how!(i16, $f)),
            Type::U32 | Type::B32 => Some($how!(u32, $f)),
            Type::S32 => Some($how!(i32, $f)),
            Type::U64 | Type::B64 => Some($how!(u64, $f)),
            Type::S64 => Some($how!(i64, $f)),
            _ => None,
        }
    };
}
macro_rules! bits {
    ($ty:expr, $how:ident, $f:expr) => {
        match $ty.bytes() {
            2 => Some($how!(u16, $f)),
            4 => Some($how!(u32, $f)),
            8 => Some($how!(u64, $f)),
            _ => None,
        }
    };
}
macro_rules! floats {
    ($m:expr, $how:ident, $f:expr) => {
        match $m.ty() {
            Type::F32 if $m.has("ftz") => Some($how!(Flushed, $f)),
            Type::F32 => Some($how!(f32, $f)),
            Type::F64 => Some($how!(f64, $f)),
            Type::F16 => Some($how!(Half, $f)),
            Type::Bf16 => Some($how!(Brain, $f)),
            Type::F16x2 => Some($how!(Pair<Half>, $f)),
            Type::Bf16x2 => Some($how!(Pair<Brain>, $f)),
            _ => None,
        }
    };
}
/// One function for each direction, since a function pointer keeps nothing.
macro_rules! directed {
    ($rounding:expr, $how:ident, $t:ty, |$($x:ident),*| $pair:expr, $round:ident) => {
        match $rounding {
            Rounding::Nearest => None,
            Rounding::Zero => Some($how!($t, |$($x: $t),*| { let (high, low) = $pair; $round(high, low, Rounding::Zero) })),
            Rounding::Down => Some($how!($t, |$($x: $t),*| { let (high, low) = $pair; $round(high, low, Rounding::Down) })),
            Rounding::Up => Some($how!($t, |$($x: $t),*| { let (high, low) = $pair; $round(high, low, Rounding::Up) })),
        }
    };
}

/// Finds out how an instruction is computed; fails with what is unknown of it.
pub fn plan(m: &Mnemonic) -> Result<Plan, String> {
    let ty = m.ty();
    let plan = |op: Arithmetic, result: Type, sources: Vec<Type>| Plan {
        op: Op::Arithmetic(op),
        result,
        sources,
        offset: 0,
        immediate: false,
    };
    if m.op() == "cvt" {
        return Conversion::plan(m);
    }
    check_modifiers(m)?;
    let unknown = || format!("{} on {ty:?}", m.op());
    let same = |count: usize| vec![ty; count];
    let done = |found: Option<Arithmetic>, result: Type, sources: Vec<Type>| {
        Ok(plan(found.ok_or_else(unknown)?, result, sources))
    };
    let double = match ty {
        Type::U16 => Type::U32,
        Type::S16 => Type::S32,
        Type::U32 => Type::U64,
        _ => Type::S64,
    };
    match m.op() {
        "mov" | "not" | "and" | "or" | "xor" if ty == Type::Pred => {
            let count = if matches!(m.op(), "mov" | "not") { 1 } else { 2 };
            done(predicate(m.op()), Type::Pred, same(count))
        }
        "mov" => done(bits!(ty, unary, |x| x), ty, same(1)),
        "add" | "sub" | "mul" | "div" | "min" | "max" | "copysign" if ty.float() => done(float2(m), ty, same(2)),
        "fma" | "mad" if ty.float() => done(float3(m), ty, same(3)),
        "add" | "sub" | "addc" | "subc" if m.has("cc") || m.op().ends_with('c') => done(carrying(m), ty, same(2)),
        "mad" | "madc" if m.has("cc") || m.op() == "madc" => done(carrying(m), ty, same(3)),
        "mul" if m.has("wide") => done(wide(ty), double, same(2)),
        "mad" if m.has("wide") => done(wide_sum(ty), double, vec![ty, ty, double]),
        "add" | "sub" | "mul" | "div" | "rem" | "min" | "max" | "and" | "or" | "xor" => done(integer2(m), ty, same(2)),
        "mad" => done(integer3(m), ty, same(3)),
        "shl" | "shr" => done(shifted(m), ty, vec![ty, Type::U32]),
        "shf" => done(funnel(m), Type::B32, vec![Type::B32, Type::B32, Type::U32]),
        "not" => done(bits!(ty, unary, |x| !x), ty, same(1)),
        "cnot" => done(integers!(ty, unary, |x| (x == 0).into()), ty, same(1)),
        "neg" | "abs" | "ex2" | "lg2" | "rcp" | "rsqrt" | "sqrt" | "sin" | "cos" | "tanh" if ty.float() => {
            done(float1(m), ty, same(1))
        }
        "neg" => done(integers!(ty, unary, |x| x.wrapping_neg()), ty, same(1)),
        "abs" => done(absolute(ty), ty, same(1)),
        "popc" => done(bits!(ty, count, |x| x.count_ones()), Type::U32, same(1)),
        "clz" => done(bits!(ty, count, |x| x.leading_zeros()), Type::U32, same(1)),
        "bfind" => done(highest(m), Type::U32, same(1)),
        "brev" => done(bits!(ty, unary, |x| x.reverse_bits()), ty, same(1)),
        "bfi" => done(insert(ty), ty, vec![ty, ty, Type::U32, Type::U32]),
        "bfe" => done(extract(ty), ty, vec![ty, Type::U32, Type::U32]),
        "prmt" if m.parts.len() == 2 => done(Some(ternary!(u32, permute)), Type::B32, same(3)),
        "lop3" => {
            let op: Arithmetic = |r, i, on| {
                let table = i.offset as u32;
                r.map3::<u32, u32, u32, u32>(i, on, |a, b, c| logic(a, b, c, table));
            };
            Ok(Plan { immediate: true, ..plan(op, Type::B32, same(3)) })
        }
        "dp4a" => done(dot(m), *m.types.last().ok_or("types")?, vec![Type::B32, Type::B32, Type::B32]),
        "selp" => {
            let found = if ty.wide() { select::<u64> as Arithmetic } else { select::<u32> };
            done(Some(found), ty, vec![ty, ty, Type::Pred])
        }
        "setp" | "set" => comparison(m),
        "testp" => done(class(m), Type::Pred, same(1)),
        _ => Err(format!("instruction {}", m.parts.join("."))),
    }
}

/// Fails on parts of a name that change what is computed and are not known.
fn check_modifiers(m: &Mnemonic) -> Result<(), String> {
    const KNOWN: [&str; 47] = [
        "rn",
        "rz",
        "rm",
        "rp",
        "ftz",
        "noftz",
        "approx",
        "full",
        "lo",
        "hi",
        "wide",
        "cc",
        "NaN",
        "l",
        "r",
        "wrap",
        "clamp",
        "shiftamt",
        "eq",
        "ne",
        "lt",
        "le",
        "gt",
        "ge",
        "equ",
        "neu",
        "ltu",
        "leu",
        "gtu",
        "geu",
        "num",
        "nan",
        "ls",
        "hs",
        "and",
        "or",
        "xor",
        "finite",
        "infinite",
        "number",
        "notanumber",
        "normal",
        "subnormal",
        "f4e",
        "b4e",
        "rc8",
        "ecl",
    ];
    let unknown = m.parts[1..].iter().find(|part| !KNOWN.contains(part) && Type::parse(part).is_none());
    unknown.map_or(Ok(()), |part| Err(format!("modifier .{part} of {}", m.op())))
}

fn rounding(m: &Mnemonic) -> Rounding {
    let names = [("rz", Rounding::Zero), ("rm", Rounding::Down), ("rp", Rounding::Up)];
    names.into_iter().find(|(name, _)| m.has(name)).map_or(Rounding::Nearest, |(_, rounding)| rounding)
}

/// Logic on masks of lanes.
pub fn predicate(op: &str) -> Option<Arithmetic> {
    fn apply(r: &mut Registers, i: &Instruction, on: u32, f: impl Fn(u32, u32) -> u32) {
        let second = if i.s[1] == NONE { 0 } else { r.predicates[i.s[1] as usize] };
        let bits = f(r.predicates[i.s[0] as usize], second);
        r.put_predicate(i.d[0], on, bits);
    }
    Some(match op {
        "mov" => |r, i, on| apply(r, i, on, |a, _| a),
        "not" => |r, i, on| apply(r, i, on, |a, _| !a),
        "and" => |r, i, on| apply(r, i, on, |a, b| a & b),
        "or" => |r, i, on| apply(r, i, on, |a, b| a | b),
        "xor" => |r, i, on| apply(r, i, on, |a, b| a ^ b),
        _ => return None,
    })
}

fn float1(m: &Mnemonic) -> Option<Arithmetic> {
    if rounding(m) != Rounding::Nearest {
        return None;
    }
    match m.op() {
        "neg" => floats!(m, unary, |x| x.negated()),
        "abs" => floats!(m, unary, |x| x.size()),
        "ex2" => floats!(m, unary, |x| x.map(f64::exp2)),
        "lg2" => floats!(m, unary, |x| x.map(f64::log2)),
        "rcp" => floats!(m, unary, |x| x.map(f64::recip)),
        "rsqrt" => floats!(m, unary, |x| x.map(|x| 1.0 / x.sqrt())),
        "sqrt" => floats!(m, unary, |x| x.map(f64::sqrt)),
        "sin" => floats!(m, unary, |x| x.map(f64::sin)),
        "cos" => floats!(m, unary, |x| x.map(f64::cos)),
        "tanh" => floats!(m, unary, |x| x.map(f64::tanh)),
        _ => None,
    }
}

fn float2(m: &Mnemonic) -> Option<Arithmetic> {
    let rounding = rounding(m);
    match (m.op(), m.ty(), rounding) {
        ("add", _, Rounding::Nearest) => floats!(m, binary, |x, y| x.add(y)),
        ("sub", _, Rounding::Nearest) => floats!(m, binary, |x, y| x.sub(y)),
        ("mul", _, Rounding::Nearest) => floats!(m, binary, |x, y| x.mul(y)),
        ("div", _, Rounding::Nearest) => floats!(m, binary, |x, y| x.div(y)),
        ("min", _, _) if m.has("NaN") => floats!(m, binary, |x, y| x.least_nan(y)),
        ("max", _, _) if m.has("NaN") => floats!(m, binary, |x, y| x.most_nan(y)),
        ("min", ..) => floats!(m, binary, |x, y| x.least(y)),
        ("max", ..) => floats!(m, binary, |x, y| x.most(y)),
        // The sign of the first operand, the size of the second.
        ("copysign", ..) => floats!(m, binary, |x, y| y.signed_as(x)),
        _ if m.has("ftz") => None,
        ("add", Type::F32, _) => directed!(rounding, binary, f32, |x, y| two_sum(x.into(), y.into()), round32),
        ("sub", Type::F32, _) => directed!(rounding, binary, f32, |x, y| two_sum(x.into(), (-y).into()), round32),
        ("mul", Type::F32, _) => directed!(rounding, binary, f32, |x, y| (f64::from(x) * f64::from(y), 0.0), round32),
        ("add", Type::F64, _) => directed!(rounding, binary, f64, |x, y| two_sum(x, y), round64),
        ("sub", Type::F64, _) => directed!(rounding, binary, f64, |x, y| two_sum(x, -y), round64),
        ("mul", Type::F64, _) => directed!(rounding, binary, f64, |x, y| (x * y, x.mul_add(y, -(x * y))), round64),
        _ => None,
    }
}

fn float3(m: &Mnemonic) -> Option<Arithmetic> {
    let rounding = rounding(m);
    match (m.ty(), rounding) {
        (_, Rounding::Nearest) => floats!(m, ternary, |x, y, z| x.fma(y, z)),
        (Type::F32, _) if !m.has("ftz") => {
            directed!(rounding, ternary, f32, |x, y, z| two_sum(f64::from(x) * f64::from(y), z.into()), round32)
        }
        _ => None,
    }
}

fn integer2(m: &Mnemonic) -> Option<Arithmetic> {
    let ty = m.ty();
    match m.op() {
        "add" => integers!(ty, binary, |x, y| x.wrapping_add(y)),
        "sub" => integers!(ty, binary, |x, y| x.wrapping_sub(y)),
        "mul" if m.has("lo") => integers!(ty, binary, |x, y| x.wrapping_mul(y)),
        "mul" if m.has("hi") => upper(ty),
        // The device gives all ones for a division by zero.
        "div" => integers!(ty, binary, |x, y| if y == 0 { !0 } else { x.wrapping_div(y) }),
        "rem" => integers!(ty, binary, |x, y| if y == 0 { x } else { x.wrapping_rem(y) }),
        "min" => integers!(ty, binary, |x, y| x.min(y)),
        "max" => integers!(ty, binary, |x, y| x.max(y)),
        "and" => bits!(ty, binary, |x, y| x & y),
        "or" => bits!(ty, binary, |x, y| x | y),
        "xor" => bits!(ty, binary, |x, y| x ^ y),
        _ => None,
    }
}

fn integer3(m: &Mnemonic) -> Option<Arithmetic> {
    match (m.ty(), m.has("lo"), m.has("hi")) {
        (ty, true, false) => integers!(ty, ternary, |x, y, z| x.wrapping_mul(y).wrapping_add(z)),
        (Type::U32, false, true) => Some(ternary!(u32, |x, y, z| upper32(x, y).wrapping_add(z))),
        (Type::S32, false, true) => {
            Some(ternary!(i32, |x, y, z| ((i64::from(x) * i64::from(y) >> 32) as i32).wrapping_add(z)))
        }
        _ => None,
    }
}

#[inline(always)]
fn upper32(x: u32, y: u32) -> u32 {
    (u64::from(x) * u64::from(y) >> 32) as u32
}

fn upper(ty: Type) -> Option<Arithmetic> {
    Some(match ty {
        Type::U16 => binary!(u16, |x, y| (u32::from(x) * u32::from(y) >> 16) as u16),
        Type::S16 => binary!(i16, |x, y| (i32::from(x) * i32::from(y) >> 16) as i16),
        Type::U32 => binary!(u32, upper32),
        Type::S32 => binary!(i32, |x, y| (i64::from(x) * i64::from(y) >> 32) as i32),
        Type::U64 => binary!(u64, |x, y| (u128::from(x) * u128::from(y) >> 64) as u64),
        Type::S64 => binary!(i64, |x, y| (i128::from(x) * i128::from(y) >> 64) as i64),
        _ => return None,
    })
}

fn wide(ty: Type) -> Option<Arithmetic> {
    Some(match ty {
        Type::U16 => |r, i, on| r.map2(i, on, |x: u16, y: u16| u32::from(x) * u32::from(y)),
        Type::S16 => |r, i, on| r.map2(i, on, |x: i16, y: i16| i32::from(x) * i32::from(y)),
        Type::U32 => |r, i, on| r.map2(i, on, |x: u32, y: u32| u64::from(x) * u64::from(y)),
        Type::S32 => |r, i, on| r.map2(i, on, |x: i32, y: i32| i64::from(x) * i64::from(y)),
        _ => return None,
    })
}

fn wide_sum(ty: Type) -> Option<Arithmetic> {
    Some(match ty {
        Type::U16 => |r, i, on| r.map3(i, on, |x: u16, y: u16, z: u32| (u32::from(x) * u32::from(y)).wrapping_add(z)),
        Type::S16 => |r, i, on| r.map3(i, on, |x: i16, y: i16, z: i32| (i32::from(x) * i32::from(y)).wrapping_add(z)),
        Type::U32 => |r, i, on| r.map3(i, on, |x: u32, y: u32, z: u64| (u64::from(x) * u64::from(y)).wrapping_add(z)),
        Type::S32 => |r, i, on| r.map3(i, on, |x: i32, y: i32, z: i64| (i64::from(x) * i64::from(y)).wrapping_add(z)),
        _ => return None,
    })
}

/// Sums that take a carry in, give one out, or both: `x + y + carry`, in more bits than the result has.
fn carrying(m: &Mnemonic) -> Option<Arithmetic> {
    fn run(r: &mut Registers, i: &Instruction, on: u32, give: bool, f: impl Fn([u32; 3], u32) -> u64) {
        let (mut carries, mut result) = (0, [0u32; 32]);
        for (lane, result) in result.iter_mut().enumerate() {
            let operand = |n: usize| if i.s[n] == NONE { 0 } else { r.get::<u32>(i.s[n])[lane] };
            let sum = f([operand(0), operand(1), operand(2)], r.carry >> lane & 1);
            *result = sum as u32;
            carries |= u32::from(sum >> 32 != 0) << lane;
        }
        r.put(i.d[0], on, &result);
        if give {
            r.carry = r.carry & !on | carries & on;
        }
    }
    fn low(x: u32, y: u32) -> u64 {
        u64::from(x.wrapping_mul(y))
    }
    fn high(x: u32, y: u32) -> u64 {
        u64::from(upper32(x, y))
    }
    if !matches!(m.ty(), Type::U32 | Type::S32 | Type::B32) {
        return None;
    }
    // A borrow is a carry: it goes out where the difference is negative.
    Some(match (m.op(), m.has("cc"), m.has("hi")) {
        ("add", ..) => |r, i, on| run(r, i, on, true, |[x, y, _], _| u64::from(x) + u64::from(y)),
        ("addc", true, _) => |r, i, on| run(r, i, on, true, |[x, y, _], c| u64::from(x) + u64::from(y) + u64::from(c)),
        ("addc", ..) => |r, i, on| run(r, i, on, false, |[x, y, _], c| u64::from(x) + u64::from(y) + u64::from(c)),
        ("sub", ..) => |r, i, on| run(r, i, on, true, |[x, y, _], _| u64::from(x).wrapping_sub(u64::from(y))),
        ("subc", true, _) => {
            |r, i, on| run(r, i, on, true, |[x, y, _], c| u64::from(x).wrapping_sub(u64::from(y) + u64::from(c)))
        }
        ("subc", ..) => {
            |r, i, on| run(r, i, on, false, |[x, y, _], c| u64::from(x).wrapping_sub(u64::from(y) + u64::from(c)))
        }
        ("mad", _, false) => |r, i, on| run(r, i, on, true, |[x, y, z], _| low(x, y) + u64::from(z)),
        ("mad", _, true) => |r, i, on| run(r, i, on, true, |[x, y, z], _| high(x, y) + u64::from(z)),
        ("madc", true, false) => |r, i, on| run(r, i, on, true, |[x, y, z], c| low(x, y) + u64::from(z) + u64::from(c)),
        ("madc", true, true) => |r, i, on| run(r, i, on, true, |[x, y, z], c| high(x, y) + u64::from(z) + u64::from(c)),
        ("madc", false, false) => {
            |r, i, on| run(r, i, on, false, |[x, y, z], c| low(x, y) + u64::from(z) + u64::from(c))
        }
        ("madc", false, true) => {
            |r, i, on| run(r, i, on, false, |[x, y, z], c| high(x, y) + u64::from(z) + u64::from(c))
        }
        _ => return None,
    })
}

/// Shifts by the width or more leave nothing, or the sign.
fn shifted(m: &Mnemonic) -> Option<Arithmetic> {
    match (m.op(), m.ty()) {
        ("shl", ty) => bits!(ty, shift, |x, n| x.checked_shl(n).unwrap_or(0)),
        ("shr", Type::S16) => Some(shift!(i16, |x, n| x >> n.min(15))),
        ("shr", Type::S32) => Some(shift!(i32, |x, n| x >> n.min(31))),
        ("shr", Type::S64) => Some(shift!(i64, |x, n| x >> n.min(63))),
        (_, ty) => bits!(ty, shift, |x, n| x.checked_shr(n).unwrap_or(0)),
    }
}

/// Shifts of 64 bits in two registers: the upper half of the left shift, the lower of the right.
fn funnel(m: &Mnemonic) -> Option<Arithmetic> {
    #[inline(always)]
    fn both(low: u32, high: u32) -> u64 {
        u64::from(high) << 32 | u64::from(low)
    }
    Some(match (m.has("l"), m.has("r"), m.has("wrap"), m.has("clamp")) {
        (true, false, true, false) => ternary!(u32, |a, b, n| (both(a, b) << (n & 31) >> 32) as u32),
        (true, false, false, true) => ternary!(u32, |a, b, n| (both(a, b) << n.min(32) >> 32) as u32),
        (false, true, true, false) => ternary!(u32, |a, b, n| (both(a, b) >> (n & 31)) as u32),
        (false, true, false, true) => ternary!(u32, |a, b, n| (both(a, b) >> n.min(32)) as u32),
        _ => return None,
    })
}

fn absolute(ty: Type) -> Option<Arithmetic> {
    Some(match ty {
        Type::S16 => unary!(i16, i16::wrapping_abs),
        Type::S32 => unary!(i32, i32::wrapping_abs),
        Type::S64 => unary!(i64, i64::wrapping_abs),
        _ => return None,
    })
}

/// The place of the highest bit that differs from the sign, or how far it would have to move up.
fn highest(m: &Mnemonic) -> Option<Arithmetic> {
    fn place(zeros: u32, bits: u32, distance: bool) -> u32 {
        if zeros == bits {
            u32::MAX
        } else if distance {
            zeros
        } else {
            bits - 1 - zeros
        }
    }
    Some(match (m.ty(), m.has("shiftamt")) {
        (Type::U32, false) => count!(u32, |x| place(x.leading_zeros(), 32, false)),
        (Type::U32, true) => count!(u32, |x| place(x.leading_zeros(), 32, true)),
        (Type::S32, false) => count!(i32, |x| place((x ^ x >> 31).leading_zeros(), 32, false)),
        (Type::S32, true) => count!(i32, |x| place((x ^ x >> 31).leading_zeros(), 32, true)),
        (Type::U64, false) => count!(u64, |x| place(x.leading_zeros(), 64, false)),
        (Type::U64, true) => count!(u64, |x| place(x.leading_zeros(), 64, true)),
        (Type::S64, false) => count!(i64, |x| place((x ^ x >> 63).leading_zeros(), 64, false)),
        (Type::S64, true) => count!(i64, |x| place((x ^ x >> 63).leading_zeros(), 64, true)),
        _ => return None,
    })
}

/// Puts the lower bits of the first operand into the second.
fn insert(ty: Type) -> Option<Arithmetic> {
    macro_rules! insert {
        ($t:ty) => {
            |r: &mut Registers, i: &Instruction, on: u32| {
                let [a, b] = [i.s[0], i.s[1]].map(|at| *r.get::<$t>(at));
                let [from, len] = [i.s[2], i.s[3]].map(|at| *r.get::<u32>(at));
                let result = std::array::from_fn(|lane| {
                    let (from, len) = (from[lane] & 255, len[lane] & 255);
                    let ones = <$t>::MAX.checked_shl(len).map_or(<$t>::MAX, |above| !above);
                    let field = ones.checked_shl(from).unwrap_or(0);
                    b[lane] & !field | a[lane].checked_shl(from).unwrap_or(0) & field
                });
                r.put::<$t>(i.d[0], on, &result);
            }
        };
    }
    match ty {
        Type::B32 => Some(insert!(u32)),
        Type::B64 => Some(insert!(u64)),
        _ => None,
    }
}

/// Takes bits out; those of a signed type are continued by the highest of them.
fn extract(ty: Type) -> Option<Arithmetic> {
    fn field(x: u64, from: u32, len: u32, bits: u32, signed: bool) -> u64 {
        let (from, len) = (from & 255, len & 255);
        if len == 0 {
            return 0;
        }
        let last = (from + len - 1).min(bits - 1);
        let sign = signed && x >> last & 1 == 1;
        let low = x.checked_shr(from).unwrap_or(0);
        let ones = u64::MAX.checked_shl(len).map_or(u64::MAX, |above| !above);
        if sign {
            // Bits above the register count as the sign.
            let known = bits.saturating_sub(from).min(len);
            let kept = u64::MAX.checked_shl(known).map_or(u64::MAX, |above| !above);
            low & kept | !kept
        } else {
            low & ones
        }
    }
    Some(match ty {
        Type::U32 => {
            |r, i, on| r.map3(i, on, |x: u32, from: u32, len: u32| field(x.into(), from, len, 32, false) as u32)
        }
        Type::S32 => {
            |r, i, on| r.map3(i, on, |x: u32, from: u32, len: u32| field(x.into(), from, len, 32, true) as u32)
        }
        Type::U64 => |r, i, on| r.map3(i, on, |x: u64, from: u32, len: u32| field(x, from, len, 64, false)),
        Type::S64 => |r, i, on| r.map3(i, on, |x: u64, from: u32, len: u32| field(x, from, len, 64, true)),
        _ => return None,
    })
}

/// Four bytes out of eight, by the digits of the third operand; digits from 8 on spread the byte's sign.
#[inline(always)]
fn permute(x: u32, y: u32, chosen: u32) -> u32 {
    let all = u64::from(y) << 32 | u64::from(x);
    let mut result = 0;
    for n in 0..4 {
        let digit = chosen >> (4 * n) & 15;
        let byte = (all >> (8 * (digit & 7))) as u8;
        let byte = if digit & 8 == 0 { byte } else { (byte as i8 >> 7) as u8 };
        result |= u32::from(byte) << (8 * n);
    }
    result
}

/// Bit by bit what the table says of three bits.
#[inline(always)]
fn logic(a: u32, b: u32, c: u32, table: u32) -> u32 {
    let mut result = 0;
    for n in 0..8u32 {
        let term = |bit: u32, x: u32| if n & bit == 0 { !x } else { x };
        let chosen = (table >> n & 1).wrapping_neg();
        result |= term(4, a) & term(2, b) & term(1, c) & chosen;
    }
    result
}

fn dot(m: &Mnemonic) -> Option<Arithmetic> {
    #[inline(always)]
    fn sum(x: u32, y: u32, z: u32, wide: impl Fn(u8, bool) -> i32) -> u32 {
        let products = x.to_le_bytes().into_iter().zip(y.to_le_bytes()).map(|(x, y)| wide(x, true) * wide(y, false));
        products.fold(z, |sum, product| sum.wrapping_add(product as u32))
    }
    Some(match m.types.as_slice() {
        [Type::S32, Type::S32] => ternary!(u32, |x, y, z| sum(x, y, z, |byte, _| i32::from(byte as i8))),
        [Type::U32, Type::U32] => ternary!(u32, |x, y, z| sum(x, y, z, |byte, _| i32::from(byte))),
        [Type::U32, Type::S32] => {
            ternary!(u32, |x, y, z| sum(x, y, z, |byte, first| if first {
                i32::from(byte)
            } else {
                i32::from(byte as i8)
            }))
        }
        [Type::S32, Type::U32] => {
            ternary!(u32, |x, y, z| sum(x, y, z, |byte, first| if first {
                i32::from(byte as i8)
            } else {
                i32::from(byte)
            }))
        }
        _ => return None,
    })
}

fn select<S: Copy + Default>(r: &mut Registers, i: &Instruction, on: u32) {
    let (a, b, chosen) = (r.get::<S>(i.s[0]), r.get::<S>(i.s[1]), r.predicates[i.s[2] as usize]);
    let mut result = [S::default(); 32];
    for lane in 0..32 {
        result[lane] = if chosen >> lane & 1 == 1 { a[lane] } else { b[lane] };
    }
    r.put(i.d[0], on, &result);
}

/// `setp` writes predicates, joined with a third operand; `set` writes ones or a 1.0.
#[allow(
    clippy::double_comparisons,
    clippy::neg_cmp_op_on_partial_ord,
    clippy::nonminimal_bool,
    reason = "what holds of NaN is what these tell apart"
)]
fn comparison(m: &Mnemonic) -> Result<Plan, String> {
    fn predicates(r: &mut Registers, i: &Instruction, on: u32, bits: u32) {
        let third = if i.s[2] == NONE { 0 } else { r.predicates[i.s[2] as usize] };
        let join = |bits: u32| match i.offset {
            0 => bits,
            1 => bits & third,
            2 => bits | third,
            _ => bits ^ third,
        };
        r.put_predicate(i.d[0], on, join(bits));
        if i.d[1] != NONE {
            r.put_predicate(i.d[1], on, join(!bits));
        }
    }
    fn values(r: &mut Registers, i: &Instruction, on: u32, bits: u32) {
        let mut result = [0u32; 32];
        for (lane, value) in result.iter_mut().enumerate() {
            *value = if bits >> lane & 1 == 1 { i.offset as u32 } else { 0 };
        }
        r.put(i.d[0], on, &result);
    }
    #[inline(always)]
    fn keyed<T: Key>(x: T, y: T, f: impl Fn(T::Order, T::Order) -> bool) -> bool {
        f(x.key(), y.key())
    }
    let set = m.op() == "set";
    macro_rules! test {
        ($t:ty, $f:expr) => {
            if set {
                (|r: &mut Registers, i: &Instruction, on: u32| {
                    let bits = r.test2::<$t>(i, |x, y| keyed(x, y, $f));
                    values(r, i, on, bits);
                }) as Arithmetic
            } else {
                (|r: &mut Registers, i: &Instruction, on: u32| {
                    let bits = r.test2::<$t>(i, |x, y| keyed(x, y, $f));
                    predicates(r, i, on, bits);
                }) as Arithmetic
            }
        };
    }
    macro_rules! all {
        ($f:expr) => {
            match m.types.last() {
                Some(Type::F32) if m.has("ftz") => Some(test!(Flushed, $f)),
                Some(Type::F32) => Some(test!(f32, $f)),
                Some(Type::F64) => Some(test!(f64, $f)),
                Some(Type::F16) => Some(test!(Half, $f)),
                Some(Type::Bf16) => Some(test!(Brain, $f)),
                Some(ty) => integers!(*ty, test, $f),
                None => None,
            }
        };
    }
    // Negations hold for NaN, which stands in no order.
    let found = match *m.parts.get(1).ok_or("a comparison")? {
        "eq" => all!(|x, y| x == y),
        "ne" => all!(|x, y| x < y || x > y),
        "lt" | "lo" => all!(|x, y| x < y),
        "le" | "ls" => all!(|x, y| x <= y),
        "gt" | "hi" => all!(|x, y| x > y),
        "ge" | "hs" => all!(|x, y| x >= y),
        "equ" => all!(|x, y| !(x < y || x > y)),
        "neu" => all!(|x, y| x != y),
        "ltu" => all!(|x, y| !(x >= y)),
        "leu" => all!(|x, y| !(x > y)),
        "gtu" => all!(|x, y| !(x <= y)),
        "geu" => all!(|x, y| !(x < y)),
        "num" => all!(|x, y| x.partial_cmp(&y).is_some()),
        "nan" => all!(|x, y| x.partial_cmp(&y).is_none()),
        other => return Err(format!("comparison .{other}")),
    };
    let op = Op::Arithmetic(found.ok_or_else(|| format!("{} on {:?}", m.op(), m.types))?);
    let compared = *m.types.last().ok_or("a type")?;
    let joined = ["and", "or", "xor"].iter().position(|name| m.has(name)).map_or(0, |at| at as i64 + 1);
    if !set {
        let mut sources = vec![compared; 2];
        sources.extend((joined > 0).then_some(Type::Pred));
        return Ok(Plan { op, result: Type::Pred, sources, offset: joined, immediate: false });
    }
    let result = m.ty();
    let yes: u32 = match (result, joined) {
        (Type::U32 | Type::S32, 0) => u32::MAX,
        (Type::F32, 0) => 0x3f80_0000,
        (Type::F16, 0) => 0x3c00,
        (Type::Bf16, 0) => 0x3f80,
        _ => return Err(format!("set gives {result:?}")),
    };
    Ok(Plan { op, result, sources: vec![compared; 2], offset: i64::from(yes), immediate: false })
}

fn class(m: &Mnemonic) -> Option<Arithmetic> {
    macro_rules! test {
        ($f:expr) => {
            match m.ty() {
                Type::F32 => Some(
                    (|r, i, on| {
                        let values = r.get::<u32>(i.s[0]).map(f32::from_bits);
                        let bits = (0..32).fold(0, |bits, lane| bits | u32::from($f(values[lane])) << lane);
                        r.put_predicate(i.d[0], on, bits);
                    }) as Arithmetic,
                ),
                _ => None,
            }
        };
    }
    match *m.parts.get(1)? {
        "finite" => test!(f32::is_finite),
        "infinite" => test!(f32::is_infinite),
        "number" => test!(|x: f32| !x.is_nan()),
        "notanumber" => test!(f32::is_nan),
        "normal" => test!(f32::is_normal),
        "subnormal" => test!(f32::is_subnormal),
        _ => None,
    }
}

/// `mov.b64 %rd, {%r1, %r2}` and its like: parts into one register, the first lowest.
pub fn pack(count: usize, ty: Type) -> Option<Arithmetic> {
    fn run<S: Copy, const COUNT: usize>(
        r: &mut Registers,
        i: &Instruction,
        on: u32,
        bits: u32,
        give: impl Fn(u64) -> S,
    ) {
        let ones = (1u64 << bits) - 1;
        let result = std::array::from_fn(|lane| {
            let part = |n: usize| (u64::from(r.get::<u32>(i.s[n])[lane]) & ones) << (n as u32 * bits);
            give((0..COUNT).fold(0, |all, n| all | part(n)))
        });
        r.put::<S>(i.d[0], on, &result);
    }
    Some(match (count, ty.bytes()) {
        (2, 8) => |r, i, on| run::<u64, 2>(r, i, on, 32, |x| x),
        (4, 8) => |r, i, on| run::<u64, 4>(r, i, on, 16, |x| x),
        (2, 4) => |r, i, on| run::<u32, 2>(r, i, on, 16, |x| x as u32),
        (4, 4) => |r, i, on| run::<u32, 4>(r, i, on, 8, |x| x as u32),
        (2, 2) => |r, i, on| run::<u32, 2>(r, i, on, 8, |x| x as u32),
        _ => return None,
    })
}

/// The other way round.
pub fn unpack(count: usize, ty: Type) -> Option<Arithmetic> {
    fn run<S: Copy, const COUNT: usize>(
        r: &mut Registers,
        i: &Instruction,
        on: u32,
        bits: u32,
        take: impl Fn(S) -> u64,
    ) {
        let (all, ones) = (*r.get::<S>(i.s[0]), (1u64 << bits) - 1);
        for n in 0..COUNT {
            let part = std::array::from_fn(|lane| (take(all[lane]) >> (n as u32 * bits) & ones) as u32);
            r.put::<u32>(i.d[n], on, &part);
        }
    }
    Some(match (count, ty.bytes()) {
        (2, 8) => |r, i, on| run::<u64, 2>(r, i, on, 32, |x| x),
        (4, 8) => |r, i, on| run::<u64, 4>(r, i, on, 16, |x| x),
        (2, 4) => |r, i, on| run::<u32, 2>(r, i, on, 16, u64::from),
        (4, 4) => |r, i, on| run::<u32, 4>(r, i, on, 8, u64::from),
        (2, 2) => |r, i, on| run::<u32, 2>(r, i, on, 8, u64::from),
        _ => return None,
    })
}
