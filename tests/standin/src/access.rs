//! Loads, stores, atomic operations and copies: every byte is looked up before it is used.

use crate::decode::{Combine, Instruction, LOCAL_WINDOW, NONE, SHARED_WINDOW, Space};
use crate::number::{Brain, Half};
use crate::ptx::Type;
use crate::registers::{LANES, Registers};
use crate::shared::Seen;
use crate::vm::{Execution, Stop, Warp};

/// The lanes of a mask.
pub fn active(mask: u32) -> impl Iterator<Item = usize> {
    (0..LANES).filter(move |lane| mask >> lane & 1 == 1)
}

/// Addresses of a warp's access, and how many bytes each lane asks for.
struct Access {
    at: [u64; LANES],
    on: u32,
    bytes: usize,
    /// Where the lowest lane begins and the highest ends.
    low: u64,
    high: u64,
}

impl Access {
    fn new(registers: &Registers, base: u32, offset: i64, on: u32, bytes: usize) -> Result<Access, Stop> {
        let mut at = *registers.get::<u64>(base);
        let (mut low, mut high, mut any) = (u64::MAX, 0, 0);
        for (lane, at) in at.iter_mut().enumerate() {
            *at = at.wrapping_add(offset as u64);
            if on >> lane & 1 == 1 {
                low = low.min(*at);
                high = high.max(*at);
                any |= *at;
            }
        }
        if any & (bytes as u64 - 1) != 0 {
            let lane = active(on).find(|&lane| !at[lane].is_multiple_of(bytes as u64)).unwrap_or(0);
            return Err(Stop::Fault(format!("misaligned: {bytes} bytes at {:#x} of lane {lane}", at[lane])));
        }
        Ok(Access { at, on, bytes, low, high: high.saturating_add(bytes as u64) })
    }

    /// The same for the lanes of a mask, in a window of generic addresses.
    fn within(&self, on: u32, window: u64) -> Access {
        let at = self.at.map(|at| at.wrapping_sub(window));
        let ends = active(on).fold((u64::MAX, 0), |(low, high), lane| (low.min(at[lane]), high.max(at[lane])));
        Access { at, on, bytes: self.bytes, low: ends.0, high: ends.1.saturating_add(self.bytes as u64) }
    }

    /// Whether lane after lane follows at once.
    #[inline(always)]
    fn is_row(&self) -> bool {
        if self.on != u32::MAX || self.high - self.low != (LANES * self.bytes) as u64 {
            return false;
        }
        let first = self.at[0];
        (0..LANES).all(|lane| self.at[lane] == first + (lane * self.bytes) as u64)
    }

    /// The lanes by space: global, shared, local.
    fn spaces(&self, space: Space) -> [(Space, u32, u64); 3] {
        let mask =
            |inside: &dyn Fn(u64) -> bool| active(self.on).filter(|&l| inside(self.at[l])).fold(0, |m, l| m | 1 << l);
        match space {
            Space::Generic => {
                let shared = mask(&|at| at >= SHARED_WINDOW);
                let local = mask(&|at| (LOCAL_WINDOW..SHARED_WINDOW).contains(&at));
                let global = self.on & !shared & !local;
                [
                    (Space::Global, global, 0),
                    (Space::Shared, shared, SHARED_WINDOW),
                    (Space::Local, local, LOCAL_WINDOW),
                ]
            }
            space => [(space, self.on, 0), (space, 0, 0), (space, 0, 0)],
        }
    }
}

/// Copies into shared memory that are on their way. They come no sooner than the kernel waits for them.
#[derive(Default)]
pub struct Copies {
    list: Vec<Copy>,
    /// For each lane, how many groups are committed.
    groups: [u32; LANES],
}

struct Copy {
    lane: usize,
    group: u32,
    to: u64,
    from: u64,
    bytes: usize,
    /// Of which so many are read, and the rest is zero.
    used: usize,
}

impl Copies {
    pub fn commit(&mut self, on: u32) {
        for lane in active(on) {
            self.groups[lane] += 1;
        }
    }
}

/// The slots of a load's result in its register.
fn put(r: &mut Registers, at: u32, on: u32, ty: Type, values: &[u64; LANES]) {
    if ty.wide() {
        r.put(at, on, values);
    } else {
        let narrow = match ty {
            Type::S8 => values.map(|x| i32::from(x as i8) as u32),
            Type::S16 => values.map(|x| i32::from(x as i16) as u32),
            _ => values.map(|x| x as u32),
        };
        r.put(at, on, &narrow);
    }
}

fn get(r: &Registers, at: u32, ty: Type) -> [u64; LANES] {
    if ty.wide() { *r.get(at) } else { r.get::<u32>(at).map(u64::from) }
}

fn number(bytes: &[u8]) -> u64 {
    let mut all = [0; 8];
    all[..bytes.len()].copy_from_slice(bytes);
    u64::from_le_bytes(all)
}

impl Execution<'_> {
    pub fn parameter(&mut self, w: &mut Warp, i: &Instruction, on: u32, ty: Type, count: usize) -> Result<(), Stop> {
        let base = if i.s[0] == NONE { [0; LANES] } else { *w.registers.get::<u64>(i.s[0]) };
        for n in 0..count {
            let mut values = [0; LANES];
            for lane in active(on) {
                let at = base[lane].wrapping_add_signed(i.offset) as usize + n * ty.bytes();
                let bytes = at.checked_add(ty.bytes()).and_then(|end| self.launch.params.get(at..end));
                values[lane] = number(bytes.ok_or("reads beyond the parameters".to_owned())?);
            }
            put(&mut w.registers, i.d[n], on, ty, &values);
        }
        Ok(())
    }

    /// The allocation that holds a whole access, by the one that the instruction used last. An error is told for the lane.
    #[inline(always)]
    fn allocation(&mut self, i: &Instruction, access: &Access) -> Result<Option<usize>, Stop> {
        let hint = &mut self.hints[i.text as usize % self.launch.function.code.len()];
        if self.memory.at(*hint).is_some_and(|allocation| allocation.holds(access.low, access.high)) {
            return Ok(Some(*hint));
        }
        if let Ok(slot) = self.memory.find(access.low, access.high) {
            *hint = slot;
            return Ok(Some(slot));
        }
        // Not in one: each lane for itself.
        for lane in active(access.on) {
            let at = access.at[lane];
            self.memory
                .find(at, at.saturating_add(access.bytes as u64))
                .map_err(|fault| format!("{fault}, lane {lane}"))?;
        }
        Ok(None)
    }

    pub fn load(
        &mut self,
        w: &mut Warp,
        i: &Instruction,
        on: u32,
        space: Space,
        ty: Type,
        count: usize,
    ) -> Result<(), Stop> {
        let access = Access::new(&w.registers, i.s[0], i.offset, on, ty.bytes() * count)?;
        if space == Space::Global {
            return self.load_global(w, i, &access, ty, count);
        }
        for (space, on, window) in access.spaces(space) {
            if on == 0 {
                continue;
            }
            let access = access.within(on, window);
            if space == Space::Global {
                self.load_global(w, i, &access, ty, count)?;
                continue;
            }
            let (mut values, mut seen, size) = ([[0u64; LANES]; 4], Seen::default(), ty.bytes());
            let row = space == Space::Shared && count == 1 && access.is_row();
            if row {
                // One look for all lanes.
                let mut bytes = [0; 8 * LANES];
                let bytes = &mut bytes[..LANES * size];
                seen = self.shared.read(access.low, bytes, w.index)?;
                for (value, bytes) in values[0].iter_mut().zip(bytes.chunks_exact(size)) {
                    *value = number(bytes);
                }
            }
            for lane in active(if row { 0 } else { on }) {
                let mut bytes = [0; 32];
                let bytes = &mut bytes[..access.bytes];
                if space == Space::Shared {
                    seen.join(self.shared.read(access.at[lane], bytes, w.index)?);
                } else {
                    bytes.copy_from_slice(&w.local[self.local(access.at[lane], access.bytes, lane)?]);
                }
                for n in 0..count {
                    values[n][lane] = number(&bytes[n * size..(n + 1) * size]);
                }
            }
            for n in 0..count {
                put(&mut w.registers, i.d[n], on, ty, &values[n]);
            }
            self.saw(seen, i);
        }
        Ok(())
    }

    fn local(&self, at: u64, bytes: usize, lane: usize) -> Result<std::ops::Range<usize>, Stop> {
        let size = self.launch.function.local_bytes;
        if at.saturating_add(bytes as u64) > size as u64 {
            return Err(Stop::Fault(format!("{bytes} bytes at {at:#x} of local memory, which has {size}")));
        }
        let from = lane * size + at as usize;
        Ok(from..from + bytes)
    }

    fn load_global(
        &mut self,
        w: &mut Warp,
        i: &Instruction,
        access: &Access,
        ty: Type,
        count: usize,
    ) -> Result<(), Stop> {
        let slot = self.allocation(i, access)?;
        let size = ty.bytes();
        let mut written = true;
        let mut values = [[0u64; LANES]; 4];
        if let (Some(slot), true, 1) = (slot, access.is_row(), count) {
            let allocation = self.memory.at(slot).expect("just found");
            let bytes = allocation.bytes(access.low, LANES * size);
            written = allocation.was_written(access.low, LANES * size);
            // The usual case: a row of numbers.
            match size {
                4 => {
                    let target = w.registers.get_mut::<u32>(i.d[0]);
                    for (value, bytes) in target.iter_mut().zip(bytes.chunks_exact(4)) {
                        *value = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
                    }
                }
                2 if !ty.signed() => {
                    let target = w.registers.get_mut::<u32>(i.d[0]);
                    for (value, bytes) in target.iter_mut().zip(bytes.chunks_exact(2)) {
                        *value = u32::from(u16::from_le_bytes([bytes[0], bytes[1]]));
                    }
                }
                _ => {
                    for (value, bytes) in values[0].iter_mut().zip(bytes.chunks_exact(size)) {
                        *value = number(bytes);
                    }
                    put(&mut w.registers, i.d[0], access.on, ty, &values[0]);
                }
            }
        } else {
            for lane in active(access.on) {
                let at = access.at[lane];
                let slot = match slot {
                    Some(slot) => slot,
                    None => self.memory.find(at, at + access.bytes as u64).map_err(|fault| fault.0)?,
                };
                let allocation = self.memory.at(slot).expect("just found");
                let bytes = allocation.bytes(at, access.bytes);
                written &= allocation.was_written(at, access.bytes);
                for n in 0..count {
                    values[n][lane] = match size {
                        4 => u64::from(u32::from_le_bytes(bytes[4 * n..4 * n + 4].try_into().expect("four"))),
                        _ => number(&bytes[n * size..(n + 1) * size]),
                    };
                }
            }
            for n in 0..count {
                put(&mut w.registers, i.d[n], access.on, ty, &values[n]);
            }
        }
        if !written {
            let text = &self.launch.function.texts[i.text as usize];
            self.warn(format!("reads memory that nobody wrote: `{text}`"));
        }
        Ok(())
    }

    pub fn store(
        &mut self,
        w: &mut Warp,
        i: &Instruction,
        on: u32,
        space: Space,
        ty: Type,
        count: usize,
    ) -> Result<(), Stop> {
        let access = Access::new(&w.registers, i.d[0], i.offset, on, ty.bytes() * count)?;
        let mut values = [[0u64; LANES]; 4];
        for n in 0..count {
            values[n] = get(&w.registers, i.s[n], ty);
        }
        let size = ty.bytes();
        for (space, on, window) in access.spaces(space) {
            if on == 0 {
                continue;
            }
            let access = if window == 0 && on == access.on { Access { ..access } } else { access.within(on, window) };
            if space == Space::Global {
                self.store_global(i, &access, size, &values[..count])?;
                continue;
            }
            let mut seen = Seen::default();
            let row = space == Space::Shared && count == 1 && access.is_row();
            if row {
                let mut bytes = [0; 8 * LANES];
                for (bytes, value) in bytes.chunks_exact_mut(size).zip(values[0]) {
                    bytes.copy_from_slice(&value.to_le_bytes()[..size]);
                }
                seen = self.shared.write(access.low, &bytes[..LANES * size], w.index)?;
            }
            for lane in active(if row { 0 } else { on }) {
                let mut bytes = [0; 32];
                for n in 0..count {
                    bytes[n * size..(n + 1) * size].copy_from_slice(&values[n][lane].to_le_bytes()[..size]);
                }
                let bytes = &bytes[..access.bytes];
                if space == Space::Shared {
                    seen.join(self.shared.write(access.at[lane], bytes, w.index)?);
                } else {
                    let range = self.local(access.at[lane], access.bytes, lane)?;
                    w.local[range].copy_from_slice(bytes);
                }
            }
            self.saw(seen, i);
        }
        Ok(())
    }

    fn store_global(
        &mut self,
        i: &Instruction,
        access: &Access,
        size: usize,
        values: &[[u64; LANES]],
    ) -> Result<(), Stop> {
        let slot = self.allocation(i, access)?;
        if let (Some(slot), true, [values]) = (slot, access.is_row(), values) {
            let allocation = self.memory.at_mut(slot).expect("just found");
            allocation.mark(access.low, LANES * size);
            let bytes = allocation.bytes_mut(access.low, LANES * size);
            match size {
                4 => {
                    for (bytes, value) in bytes.chunks_exact_mut(4).zip(values) {
                        bytes.copy_from_slice(&(*value as u32).to_le_bytes());
                    }
                }
                2 => {
                    for (bytes, value) in bytes.chunks_exact_mut(2).zip(values) {
                        bytes.copy_from_slice(&(*value as u16).to_le_bytes());
                    }
                }
                _ => {
                    for (bytes, value) in bytes.chunks_exact_mut(size).zip(values) {
                        bytes.copy_from_slice(&value.to_le_bytes()[..size]);
                    }
                }
            }
            return Ok(());
        }
        for lane in active(access.on) {
            let at = access.at[lane];
            let slot = match slot {
                Some(slot) => slot,
                None => self.memory.find(at, at + access.bytes as u64).map_err(|fault| fault.0)?,
            };
            let allocation = self.memory.at_mut(slot).expect("just found");
            allocation.mark(at, access.bytes);
            let bytes = allocation.bytes_mut(at, access.bytes);
            for (bytes, values) in bytes.chunks_exact_mut(size).zip(values) {
                bytes.copy_from_slice(&values[lane].to_le_bytes()[..size]);
            }
        }
        Ok(())
    }

    pub fn atomic(
        &mut self,
        w: &mut Warp,
        i: &Instruction,
        on: u32,
        space: Space,
        ty: Type,
        combine: Combine,
    ) -> Result<(), Stop> {
        let size = ty.bytes();
        let access = Access::new(&w.registers, i.s[0], i.offset, on, size)?;
        let operand = |at: u32| if at == NONE { [0; LANES] } else { get(&w.registers, at, ty) };
        let (first, second) = (operand(i.s[1]), operand(i.s[2]));
        let (mut olds, mut written) = ([0u64; LANES], true);
        for (space, on, window) in access.spaces(space) {
            for lane in active(on) {
                let at = access.at[lane].wrapping_sub(window);
                let mut seen = Seen::default();
                let bytes = if space == Space::Shared {
                    let (bytes, found) = self.shared.atomic(at, size)?;
                    seen = found;
                    bytes
                } else {
                    let slot = self
                        .memory
                        .find(at, at.saturating_add(size as u64))
                        .map_err(|fault| format!("{fault}, lane {lane}"))?;
                    let allocation = self.memory.at_mut(slot).expect("just found");
                    written &= allocation.was_written(at, size);
                    allocation.mark(at, size);
                    allocation.bytes_mut(at, size)
                };
                let old = number(bytes);
                let new = combined(old, first[lane], second[lane], ty, combine)?;
                bytes.copy_from_slice(&new.to_le_bytes()[..size]);
                olds[lane] = old;
                self.saw(seen, i);
            }
        }
        if i.d[0] != NONE {
            put(&mut w.registers, i.d[0], on, ty, &olds);
        }
        let text = &self.launch.function.texts[i.text as usize];
        if !written {
            self.warn(format!("changes memory that nobody wrote: `{text}`"));
        }
        if ty.float() && combine == Combine::Add {
            self.warn(format!("adds floats atomically, in no fixed order: `{text}`"));
        }
        Ok(())
    }

    pub fn copy_async(&mut self, w: &mut Warp, i: &Instruction, on: u32, bytes: u32) -> Result<(), Stop> {
        let bytes = bytes as usize;
        let to = Access::new(&w.registers, i.s[0], i.offset & 0xf_ffff, on, bytes)?;
        let from = Access::new(&w.registers, i.s[1], i.offset >> 20, on, bytes)?;
        let used = *w.registers.get::<u32>(i.s[2]);
        let mut seen = Seen::default();
        for lane in active(on) {
            let used = (used[lane] as usize).min(bytes);
            if used > 0 {
                let at = from.at[lane];
                self.memory
                    .find(at, at.saturating_add(used as u64))
                    .map_err(|fault| format!("{fault}, lane {lane}"))?;
            }
            seen.join(self.shared.expect(to.at[lane], bytes, w.index)?);
            let group = w.copies.groups[lane];
            w.copies.list.push(Copy { lane, group, to: to.at[lane], from: from.at[lane], bytes, used });
        }
        self.saw(seen, i);
        Ok(())
    }

    /// Lets copies arrive until so many groups are left, or none.
    pub fn wait_group(&mut self, w: &mut Warp, i: &Instruction, on: u32, groups: Option<u32>) -> Result<(), Stop> {
        let committed = w.copies.groups;
        let (mut seen, mut written) = (Seen::default(), true);
        let comes = |copy: &mut Copy| {
            let in_time = groups.is_none_or(|left| copy.group + left < committed[copy.lane]);
            on >> copy.lane & 1 == 1 && in_time
        };
        let due: Vec<Copy> = w.copies.list.extract_if(.., comes).collect();
        for copy in due {
            let mut bytes = [0; 16];
            let (source, all) = self.memory.read(copy.from, copy.used).map_err(|fault| fault.0)?;
            bytes[..copy.used].copy_from_slice(source);
            written &= all;
            seen.join(self.shared.write(copy.to, &bytes[..copy.bytes], w.index)?);
        }
        self.saw(seen, i);
        if !written {
            self.warn("copies memory that nobody wrote into shared memory".to_owned());
        }
        Ok(())
    }
}

/// What an atomic operation leaves in memory.
fn combined(old: u64, x: u64, y: u64, ty: Type, combine: Combine) -> Result<u64, Stop> {
    use Combine::{Add, And, CompareAndSwap, Decrement, Exchange, Increment, Max, Min, Or, Xor};
    let signed = |x: u64| if ty.wide() { x as i64 } else { i64::from(x as i32) };
    Ok(match (combine, ty) {
        (Exchange, _) => x,
        (CompareAndSwap, _) => {
            if old == x {
                y
            } else {
                old
            }
        }
        (And, _) => old & x,
        (Or, _) => old | x,
        (Xor, _) => old ^ x,
        (Add, Type::F32) => (f32::from_bits(old as u32) + f32::from_bits(x as u32)).to_bits().into(),
        (Add, Type::F64) => (f64::from_bits(old) + f64::from_bits(x)).to_bits(),
        (Add, Type::F16) => Half::round(Half(old as u16).wide() + Half(x as u16).wide()).0.into(),
        (Add, Type::Bf16) => Brain::round(Brain(old as u16).wide() + Brain(x as u16).wide()).0.into(),
        (Add, Type::U32 | Type::S32 | Type::U64) => old.wrapping_add(x),
        (Min, Type::U32 | Type::U64) => old.min(x),
        (Max, Type::U32 | Type::U64) => old.max(x),
        (Min, Type::S32 | Type::S64) => {
            if signed(x) < signed(old) {
                x
            } else {
                old
            }
        }
        (Max, Type::S32 | Type::S64) => {
            if signed(x) > signed(old) {
                x
            } else {
                old
            }
        }
        (Increment, Type::U32) => {
            if old >= x {
                0
            } else {
                old + 1
            }
        }
        (Decrement, Type::U32) => {
            if old == 0 || old > x {
                x
            } else {
                old - 1
            }
        }
        _ => return Err(Stop::Fault(format!("atomic {combine:?} of {ty:?} is unknown to the stand-in"))),
    })
}
