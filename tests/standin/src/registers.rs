//! The registers of one warp: 32 lanes side by side, so that an instruction is a loop over arrays.

use crate::decode::Instruction;
use crate::number::Lane;

/// How many lanes a warp has.
pub const LANES: usize = 32;

/// A register of 32 bits a lane; one of 64 bits takes two. Read and written as arrays of what it holds.
#[derive(Clone, Copy)]
#[repr(align(128))]
struct Unit(#[expect(dead_code, reason = "only ever seen through `get` and `get_mut`")] [u32; LANES]);

/// Registers of a warp, predicates as masks of lanes, and the carry flags.
#[derive(Default)]
pub struct Registers {
    units: Vec<Unit>,
    pub predicates: Vec<u32>,
    pub carry: u32,
}

/// The instruction with its operands' registers and the lanes that take part.
pub type Arithmetic = fn(&mut Registers, &Instruction, u32);

impl Registers {
    /// Makes room; what the registers hold is left over from before.
    pub fn fit(&mut self, units: usize, predicates: usize) {
        self.units.resize(self.units.len().max(units), Unit([0; LANES]));
        self.predicates.resize(self.predicates.len().max(predicates), 0);
    }

    /// All lanes of a register.
    #[inline(always)]
    pub fn get<S: Copy>(&self, at: u32) -> &[S; LANES] {
        let width = size_of::<[S; LANES]>() / size_of::<Unit>();
        let units = &self.units[at as usize..at as usize + width];
        // SAFETY: the slice has just as many bytes as the array, is aligned for more, and any bits are a u32 or u64, which
        // are the only slots there are (`Lane::Slot`).
        unsafe { &*units.as_ptr().cast::<[S; LANES]>() }
    }

    #[inline(always)]
    pub fn get_mut<S: Copy>(&mut self, at: u32) -> &mut [S; LANES] {
        let width = size_of::<[S; LANES]>() / size_of::<Unit>();
        let units = &mut self.units[at as usize..at as usize + width];
        // SAFETY: as in `get`; the exclusive borrow of the slice goes over to the array.
        unsafe { &mut *units.as_mut_ptr().cast::<[S; LANES]>() }
    }

    /// Writes the lanes that are on.
    #[inline(always)]
    pub fn put<S: Copy>(&mut self, at: u32, on: u32, values: &[S; LANES]) {
        let target = self.get_mut::<S>(at);
        if on == u32::MAX {
            *target = *values;
        } else {
            for lane in 0..LANES {
                target[lane] = if on >> lane & 1 == 1 { values[lane] } else { target[lane] };
            }
        }
    }

    /// Writes the lanes of a predicate that are on.
    #[inline(always)]
    pub fn put_predicate(&mut self, at: u32, on: u32, bits: u32) {
        let target = &mut self.predicates[at as usize];
        *target = *target & !on | bits & on;
    }

    #[inline(always)]
    pub fn map1<A: Lane, R: Lane>(&mut self, i: &Instruction, on: u32, f: impl Fn(A) -> R) {
        let a = self.get::<A::Slot>(i.s[0]);
        let mut result = [R::Slot::default(); LANES];
        for lane in 0..LANES {
            result[lane] = f(A::take(a[lane])).give();
        }
        self.put(i.d[0], on, &result);
    }

    #[inline(always)]
    pub fn map2<A: Lane, B: Lane, R: Lane>(&mut self, i: &Instruction, on: u32, f: impl Fn(A, B) -> R) {
        let (a, b) = (self.get::<A::Slot>(i.s[0]), self.get::<B::Slot>(i.s[1]));
        let mut result = [R::Slot::default(); LANES];
        for lane in 0..LANES {
            result[lane] = f(A::take(a[lane]), B::take(b[lane])).give();
        }
        self.put(i.d[0], on, &result);
    }

    #[inline(always)]
    pub fn map3<A: Lane, B: Lane, C: Lane, R: Lane>(&mut self, i: &Instruction, on: u32, f: impl Fn(A, B, C) -> R) {
        let (a, b, c) = (self.get::<A::Slot>(i.s[0]), self.get::<B::Slot>(i.s[1]), self.get::<C::Slot>(i.s[2]));
        let mut result = [R::Slot::default(); LANES];
        for lane in 0..LANES {
            result[lane] = f(A::take(a[lane]), B::take(b[lane]), C::take(c[lane])).give();
        }
        self.put(i.d[0], on, &result);
    }

    /// The mask of lanes for which something holds of two registers.
    #[inline(always)]
    pub fn test2<A: Lane>(&self, i: &Instruction, f: impl Fn(A, A) -> bool) -> u32 {
        let (a, b) = (self.get::<A::Slot>(i.s[0]), self.get::<A::Slot>(i.s[1]));
        let mut bits = 0;
        for lane in 0..LANES {
            bits |= u32::from(f(A::take(a[lane]), A::take(b[lane]))) << lane;
        }
        bits
    }
}
