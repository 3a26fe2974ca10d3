//! Executes a kernel: 32 lanes of a warp in lock step, the lanes that are furthest behind first, so that branches join again
//! as they do on a device. One warp after the other runs to its next barrier, always in the same order.

use crate::access::Copies;
use crate::decode::{Combine, Function, Instruction, NONE, Op, Reduce, Shuffle, Space, Special, Value, Vote};
use crate::memory::Memory;
use crate::ptx::Type;
use crate::registers::{LANES, Registers};
use crate::shared::{Seen, Shared};
use crate::tensor_core;

/// So many warp instructions end a launch that does not end by itself.
const ENDLESS: u64 = 20_000_000_000;
/// So many warnings of one launch are kept.
const WARNINGS: usize = 8;

/// A kernel and what it is launched with.
pub struct Launch<'a> {
    pub function: &'a Function,
    pub grid: [u32; 3],
    pub block: [u32; 3],
    pub params: &'a [u8],
    pub dynamic_shared: usize,
    /// Barriers that are left out, to see whether that is noticed.
    pub dropped: Dropped,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Dropped {
    #[default]
    None,
    /// The one of this number.
    One(u32),
    All,
}

/// Why a launch did not come to its end.
#[derive(Debug, PartialEq, Eq)]
pub enum Stop {
    /// An access or instruction that is not allowed.
    Fault(String),
    /// `assert` or `trap` of the kernel itself.
    Assert(String),
}

/// What a launch left: instructions executed, what was noticed, and whether it came to its end.
#[derive(Debug)]
pub struct Outcome {
    pub executed: u64,
    pub warnings: Vec<String>,
    pub result: Result<(), Stop>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Running,
    /// At the barrier of a number, which waits for so many threads, or for all.
    Waiting {
        barrier: u32,
        threads: Option<u32>,
    },
    Done,
}

/// 32 threads.
pub struct Warp {
    pub index: u32,
    pub registers: Registers,
    pub local: Vec<u8>,
    pub copies: Copies,
    pc: usize,
    mask: u32,
    /// Lanes elsewhere, and lanes that wait for others at an instruction.
    others: Vec<(usize, u32)>,
    parked: Vec<(usize, u32)>,
    /// The instruction at hand was waited for long enough.
    released: bool,
    state: State,
    threads: u32,
}

/// A launch that is being executed.
pub struct Execution<'a> {
    pub launch: &'a Launch<'a>,
    pub memory: &'a mut Memory,
    pub shared: Shared,
    /// For each instruction the allocation that it used last.
    pub hints: Vec<usize>,
    pub warnings: Vec<String>,
    executed: u64,
}

/// Runs a launch to its end. Registers are kept in `pool` from launch to launch.
pub fn run(launch: &Launch, memory: &mut Memory, pool: &mut Vec<Registers>) -> Outcome {
    let shared = Shared::new(launch.function.shared_bytes + launch.dynamic_shared);
    let hints = vec![0; launch.function.code.len()];
    let mut execution = Execution { launch, memory, shared, hints, warnings: Vec::new(), executed: 0 };
    let result = execution.grid(pool);
    Outcome { executed: execution.executed, warnings: execution.warnings, result }
}

impl Execution<'_> {
    fn grid(&mut self, pool: &mut Vec<Registers>) -> Result<(), Stop> {
        let [bx, by, bz] = self.launch.block;
        let threads = bx * by * bz;
        let mut warps: Vec<Warp> =
            (0..threads.div_ceil(32)).map(|index| self.warp(index, threads, pool.pop())).collect();
        let mut result = Ok(());
        let [gx, gy, gz] = self.launch.grid;
        'grid: for z in 0..gz {
            for y in 0..gy {
                for x in 0..gx {
                    result = self.block(&mut warps, [x, y, z]);
                    if result.is_err() {
                        break 'grid;
                    }
                }
            }
        }
        pool.extend(warps.into_iter().map(|warp| warp.registers));
        result
    }

    fn warp(&self, index: u32, threads: u32, registers: Option<Registers>) -> Warp {
        let function = self.launch.function;
        let mut registers = registers.unwrap_or_default();
        registers.fit(function.units, function.predicates);
        registers.predicates[0] = 0;
        registers.predicates[1] = u32::MAX;
        let mut warp = Warp {
            index,
            registers,
            local: vec![0xff; function.local_bytes * LANES],
            copies: Copies::default(),
            pc: 0,
            mask: 0,
            others: Vec::new(),
            parked: Vec::new(),
            released: false,
            state: State::Running,
            threads: (threads - index * 32).min(32),
        };
        for constant in &function.constants {
            let value = |lane: usize| match constant.value {
                Value::Number(number) => number,
                Value::Special(special) => self.special(special, &warp, lane as u32, threads),
            };
            let lanes: [u64; LANES] = std::array::from_fn(value);
            if constant.wide {
                *warp.registers.get_mut(constant.at) = lanes;
            } else {
                *warp.registers.get_mut(constant.at) = lanes.map(|x| x as u32);
            }
        }
        warp
    }

    fn special(&self, special: Special, warp: &Warp, lane: u32, threads: u32) -> u64 {
        let [bx, by, _] = self.launch.block;
        let thread = warp.index * 32 + lane;
        u64::from(match special {
            Special::Thread(0) => thread % bx,
            Special::Thread(1) => thread / bx % by,
            Special::Thread(_) => thread / bx / by,
            Special::Threads(axis) => self.launch.block[axis],
            Special::Blocks(axis) => self.launch.grid[axis],
            Special::Lane => lane,
            Special::Warp => warp.index,
            Special::Warps => threads.div_ceil(32),
            Special::LanesBelow => (1 << lane) - 1,
            Special::LanesUpTo => u32::MAX >> (31 - lane),
            Special::LanesAbove => !(u32::MAX >> (31 - lane)),
            Special::LanesFrom => !((1 << lane) - 1),
            Special::DynamicShared => self.launch.dynamic_shared as u32,
            Special::Block(_) | Special::Clock => 0, // set for each block
        })
    }

    fn block(&mut self, warps: &mut [Warp], block: [u32; 3]) -> Result<(), Stop> {
        let function = self.launch.function;
        self.shared.clear();
        for warp in &mut *warps {
            warp.pc = 0;
            warp.mask = u32::MAX >> (32 - warp.threads);
            warp.others.clear();
            warp.parked.clear();
            warp.copies = Copies::default();
            warp.state = State::Running;
            for constant in &function.constants {
                let value = match constant.value {
                    Value::Special(Special::Block(axis)) => u64::from(block[axis]),
                    Value::Special(Special::Clock) => self.executed,
                    _ => continue,
                };
                if constant.wide {
                    *warp.registers.get_mut(constant.at) = [value; LANES];
                } else {
                    *warp.registers.get_mut(constant.at) = [value as u32; LANES];
                }
            }
        }
        loop {
            for warp in &mut *warps {
                if warp.state == State::Running {
                    self.advance(warp).map_err(|(stop, at)| self.located(stop, at, block, warp.index))?;
                }
            }
            if warps.iter().all(|warp| warp.state == State::Done) {
                return Ok(());
            }
            self.release(warps).map_err(|(stop, at)| self.located(stop, at, block, 0))?;
        }
    }

    fn located(&self, stop: Stop, at: usize, [x, y, z]: [u32; 3], warp: u32) -> Stop {
        let function = self.launch.function;
        let text = &function.texts[function.code[at].text as usize];
        let place =
            |why: &str| format!("{why}\n  in `{text}` of kernel {}, block [{x}, {y}, {z}], warp {warp}", function.name);
        match stop {
            Stop::Fault(why) => Stop::Fault(place(&why)),
            Stop::Assert(why) => Stop::Assert(place(&why)),
        }
    }

    /// Lets those go on for whom a barrier waited.
    fn release(&mut self, warps: &mut [Warp]) -> Result<(), (Stop, usize)> {
        let waits =
            |warp: &Warp, number: u32| matches!(warp.state, State::Waiting { barrier, .. } if barrier == number);
        let alive = warps.iter().filter(|warp| warp.state != State::Done).count();
        let mut free = None;
        for warp in &*warps {
            let State::Waiting { barrier, threads } = warp.state else { continue };
            let arrived: Vec<&Warp> = warps.iter().filter(|warp| waits(warp, barrier)).collect();
            let enough = match threads {
                Some(threads) => arrived.iter().map(|warp| warp.threads.next_multiple_of(32)).sum::<u32>() >= threads,
                None => arrived.len() == alive,
            };
            if enough {
                free = Some(barrier);
                break;
            }
        }
        let Some(barrier) = free else {
            let text = |warp: &Warp| &self.launch.function.texts[self.launch.function.code[warp.pc].text as usize];
            let places: Vec<String> = warps
                .iter()
                .filter(|w| w.state != State::Done)
                .map(|w| format!("warp {} at `{}`", w.index, text(w)))
                .collect();
            let at = warps.iter().find(|warp| warp.state != State::Done).map_or(0, |warp| warp.pc);
            return Err((Stop::Fault(format!("warps wait for each other: {}", places.join(", "))), at));
        };
        let mut places: Vec<usize> = warps.iter().filter(|warp| waits(warp, barrier)).map(|warp| warp.pc).collect();
        places.sort_unstable();
        places.dedup();
        if places.len() > 1 {
            self.warn(format!(
                "warps of a block meet at {} different barriers: some took another branch",
                places.len()
            ));
        }
        self.reduce(warps, barrier);
        self.shared.barrier();
        for warp in warps.iter_mut().filter(|warp| waits(warp, barrier)) {
            warp.state = State::Running;
            warp.pc += 1;
        }
        Ok(())
    }

    /// The result of a barrier that asks all threads something.
    fn reduce(&self, warps: &mut [Warp], number: u32) {
        let waits = |warp: &&mut Warp| matches!(warp.state, State::Waiting { barrier, .. } if barrier == number);
        let (mut yes, mut all) = (0, 0);
        for warp in warps.iter_mut().filter(waits) {
            let i = &self.launch.function.code[warp.pc];
            if let Op::Barrier { reduce: Some(_), .. } = i.op {
                yes += (warp.registers.predicates[i.s[2] as usize] & warp.mask).count_ones();
                all += warp.mask.count_ones();
            }
        }
        for warp in warps.iter_mut().filter(waits) {
            let i = &self.launch.function.code[warp.pc];
            let Op::Barrier { reduce: Some(reduce), .. } = i.op else { continue };
            let bits = |holds: bool| if holds { u32::MAX } else { 0 };
            match reduce {
                Reduce::And => warp.registers.put_predicate(i.d[0], warp.mask, bits(yes == all)),
                Reduce::Or => warp.registers.put_predicate(i.d[0], warp.mask, bits(yes > 0)),
                Reduce::Count => warp.registers.put(i.d[0], warp.mask, &[yes; LANES]),
            }
        }
    }

    pub fn warn(&mut self, what: String) {
        if self.warnings.len() < WARNINGS && !self.warnings.contains(&what) {
            self.warnings.push(what);
        }
    }

    /// Tells what an access to shared memory found.
    pub fn saw(&mut self, seen: Seen, i: &Instruction) {
        let text = &self.launch.function.texts[i.text as usize];
        if seen.unwritten {
            self.warn(format!("reads shared memory that nobody wrote: `{text}`"));
        }
        if let Some(race) = seen.race {
            self.warn(format!("{race}: `{text}`"));
        }
    }

    /// Chooses the lanes that go on; none if the warp waits or is done.
    fn schedule(&self, w: &mut Warp) -> Result<bool, (Stop, usize)> {
        if w.mask == 0 {
            if let Some(n) = (0..w.others.len()).min_by_key(|&n| w.others[n].0) {
                (w.pc, w.mask) = w.others.swap_remove(n);
            } else if w.parked.is_empty() {
                w.state = State::Done;
                return Ok(false);
            } else {
                let (pc, mut mask) = w.parked[0];
                for &(at, more) in &w.parked[1..] {
                    if at != pc {
                        let text = |at: usize| {
                            self.launch.function.texts[self.launch.function.code[at].text as usize].as_str()
                        };
                        let why = format!(
                            "lanes of one warp wait at different instructions: `{}` and `{}`",
                            text(pc),
                            text(at)
                        );
                        return Err((Stop::Fault(why), pc));
                    }
                    mask |= more;
                }
                w.parked.clear();
                (w.pc, w.mask, w.released) = (pc, mask, true);
                return Ok(true);
            }
        }
        if !w.others.is_empty() {
            let mut n = 0;
            while n < w.others.len() {
                if w.others[n].0 == w.pc {
                    w.mask |= w.others.swap_remove(n).1;
                } else {
                    n += 1;
                }
            }
            if let Some(n) = (0..w.others.len()).min_by_key(|&n| w.others[n].0)
                && w.others[n].0 < w.pc
            {
                let here = (w.pc, w.mask);
                (w.pc, w.mask) = std::mem::replace(&mut w.others[n], here);
            }
        }
        Ok(true)
    }

    /// Runs a warp until it is done or waits at a barrier.
    fn advance(&mut self, w: &mut Warp) -> Result<(), (Stop, usize)> {
        let function = self.launch.function;
        loop {
            if (w.mask == 0 || !w.others.is_empty()) && !self.schedule(w)? {
                return Ok(());
            }
            let i = &function.code[w.pc];
            self.executed += 1;
            let mut on = w.mask;
            if let Some((at, negated)) = i.guard {
                let bits = w.registers.predicates[at as usize];
                on &= if negated { !bits } else { bits };
            }
            let released = std::mem::take(&mut w.released);
            match &i.op {
                Op::Arithmetic(f) => {
                    if on != 0 {
                        f(&mut w.registers, i, on);
                    }
                }
                Op::Branch => {
                    if self.executed > ENDLESS {
                        return Err((Stop::Fault(format!("the kernel does not end: {ENDLESS} instructions")), w.pc));
                    }
                    let target = i.offset as usize;
                    if on == w.mask {
                        w.pc = target;
                        continue;
                    }
                    if on != 0 {
                        w.others.push((target, on));
                        w.mask &= !on;
                    }
                }
                Op::Exit => {
                    w.mask &= !on;
                    if w.mask == 0 {
                        continue;
                    }
                }
                Op::Barrier { ordinal, reduce } => {
                    let dropped = match self.launch.dropped {
                        Dropped::None => false,
                        Dropped::One(one) => one == *ordinal,
                        Dropped::All => true,
                    };
                    if !(dropped && reduce.is_none()) {
                        if !released {
                            w.parked.push((w.pc, w.mask));
                            w.mask = 0;
                            continue;
                        }
                        let lane = w.mask.trailing_zeros() as usize & 31;
                        let operand = |at: u32| w.registers.get::<u32>(at)[lane];
                        let threads = (i.s[1] != NONE).then(|| operand(i.s[1]));
                        w.state = State::Waiting { barrier: operand(i.s[0]), threads };
                        return Ok(());
                    }
                }
                _ if on == 0 => {}
                op => {
                    if let Some(members) = members(op, i, on, &w.registers) {
                        let alive = w.mask | w.others.iter().chain(&w.parked).fold(0, |mask, group| mask | group.1);
                        if !released && on & members != members & alive {
                            w.parked.push((w.pc, w.mask));
                            w.mask = 0;
                            continue;
                        }
                        if on & members != members {
                            let what = format!("lanes {members:#010x} are to meet, and only {:#010x} do", on & members);
                            return Err((Stop::Fault(what), w.pc));
                        }
                    }
                    let at = w.pc;
                    self.step(w, i, on).map_err(|stop| (stop, at))?;
                }
            }
            w.pc += 1;
        }
    }

    fn step(&mut self, w: &mut Warp, i: &Instruction, on: u32) -> Result<(), Stop> {
        match &i.op {
            Op::Convert(conversion) => conversion.run(&mut w.registers, i, on),
            Op::Load { space: Space::Param, ty, count } => self.parameter(w, i, on, *ty, *count)?,
            Op::Load { space, ty, count } => self.load(w, i, on, *space, *ty, *count)?,
            Op::Store { space, ty, count } => self.store(w, i, on, *space, *ty, *count)?,
            Op::Atomic { space, ty, combine } => self.atomic(w, i, on, *space, *ty, *combine)?,
            Op::Shuffle(mode) => shuffle(&mut w.registers, i, on, *mode),
            Op::Vote(mode) => vote(&mut w.registers, i, on, *mode),
            Op::Redux { ty, combine } => redux(&mut w.registers, i, on, *ty, *combine)?,
            Op::Match { ty, all } => alike(&mut w.registers, i, on, *ty, *all),
            Op::WarpSync | Op::Nop => {}
            Op::ActiveMask => w.registers.put(i.d[0], on, &[w.mask; LANES]),
            Op::Elect => {
                let first = (w.registers.get::<u32>(i.s[0])[on.trailing_zeros() as usize] & on).trailing_zeros();
                w.registers.put(i.d[0], on, &[first; LANES]);
                w.registers.put_predicate(i.d[1], on, 1 << (first & 31));
            }
            Op::Mma { ty, depth, registers } => {
                if on != u32::MAX {
                    return Err(Stop::Fault(format!("a matrix product needs all 32 lanes, and has {on:#010x}")));
                }
                tensor_core::mma(&mut w.registers, *ty, *depth, registers);
            }
            Op::LoadMatrix { count, transposed } => self.load_matrix(w, i, on, *count, *transposed)?,
            Op::StoreMatrix { count, transposed } => self.store_matrix(w, i, on, *count, *transposed)?,
            Op::CopyAsync { bytes } => self.copy_async(w, i, on, *bytes)?,
            Op::CommitGroup => w.copies.commit(on),
            Op::WaitGroup(groups) => self.wait_group(w, i, on, *groups)?,
            Op::Assert => return Err(Stop::Assert("a device assertion failed".to_owned())),
            Op::Trap => return Err(Stop::Assert("the kernel trapped".to_owned())),
            Op::Unknown => {
                let function = self.launch.function;
                let text = &function.texts[i.text as usize];
                let why = function.unknown.iter().find(|(unknown, _)| unknown == text).map_or("", |(_, why)| why);
                return Err(Stop::Fault(format!("this instruction is unknown to the stand-in ({why})")));
            }
            Op::Arithmetic(_) | Op::Branch | Op::Exit | Op::Barrier { .. } => unreachable!("done by `advance`"),
        }
        Ok(())
    }
}

impl From<String> for Stop {
    fn from(why: String) -> Stop {
        Stop::Fault(why)
    }
}

/// The lanes that must come to an instruction before it is executed.
fn members(op: &Op, i: &Instruction, on: u32, registers: &Registers) -> Option<u32> {
    let at = match op {
        Op::Shuffle(_) => i.s[3],
        Op::Vote(_) | Op::Redux { .. } | Op::Match { .. } => i.s[1],
        Op::WarpSync | Op::Elect => i.s[0],
        Op::Mma { .. } | Op::LoadMatrix { .. } | Op::StoreMatrix { .. } => return Some(u32::MAX),
        _ => return None,
    };
    Some(registers.get::<u32>(at)[on.trailing_zeros() as usize & 31])
}

fn shuffle(r: &mut Registers, i: &Instruction, on: u32, mode: Shuffle) {
    let [value, other, clamp] = [i.s[0], i.s[1], i.s[2]].map(|at| *r.get::<u32>(at));
    let (mut result, mut found) = (value, 0u32);
    for lane in 0..LANES as u32 {
        let at = lane as usize;
        let (segment, clamp, by) = (clamp[at] >> 8 & 31, clamp[at] & 31, other[at] & 31);
        let low = lane & segment;
        let high = low | clamp & !segment;
        let (from, inside) = match mode {
            Shuffle::Up => (lane.wrapping_sub(by), lane as i32 - by as i32 >= high as i32),
            Shuffle::Down => (lane + by, lane + by <= high),
            Shuffle::Butterfly => (lane ^ by, lane ^ by <= high),
            Shuffle::Index => (low | by & !segment, low | by & !segment <= high),
        };
        if inside {
            result[at] = value[from as usize & 31];
            found |= 1 << lane;
        }
    }
    r.put(i.d[0], on, &result);
    r.put_predicate(i.d[1], on, found);
}

fn vote(r: &mut Registers, i: &Instruction, on: u32, mode: Vote) {
    let bits = r.predicates[i.s[0] as usize] & on;
    let holds = match mode {
        Vote::All => bits == on,
        Vote::Any => bits != 0,
        Vote::Uniform => bits == 0 || bits == on,
        Vote::Ballot => return r.put(i.d[0], on, &[bits; LANES]),
    };
    r.put_predicate(i.d[0], on, if holds { u32::MAX } else { 0 });
}

fn redux(r: &mut Registers, i: &Instruction, on: u32, ty: Type, combine: Combine) -> Result<(), Stop> {
    let values = *r.get::<u32>(i.s[0]);
    let lanes = values.into_iter().enumerate().filter(|(lane, _)| on >> lane & 1 == 1).map(|(_, value)| value);
    let signed = lanes.clone().map(|value| value as i32);
    let result = match (combine, ty) {
        (Combine::Add, _) => lanes.reduce(u32::wrapping_add),
        (Combine::And, _) => lanes.reduce(|x, y| x & y),
        (Combine::Or, _) => lanes.reduce(|x, y| x | y),
        (Combine::Xor, _) => lanes.reduce(|x, y| x ^ y),
        (Combine::Min, Type::S32) => signed.min().map(|value| value as u32),
        (Combine::Max, Type::S32) => signed.max().map(|value| value as u32),
        (Combine::Min, Type::U32) => lanes.min(),
        (Combine::Max, Type::U32) => lanes.max(),
        _ => return Err(Stop::Fault(format!("redux {combine:?} of {ty:?} is unknown to the stand-in"))),
    };
    r.put(i.d[0], on, &[result.unwrap_or(0); LANES]);
    Ok(())
}

/// Which lanes have the same value as each; or as all.
fn alike(r: &mut Registers, i: &Instruction, on: u32, ty: Type, all: bool) {
    let values: [u64; LANES] = if ty.wide() { *r.get(i.s[0]) } else { r.get::<u32>(i.s[0]).map(u64::from) };
    let same =
        |value: u64| (0..LANES).filter(|&l| on >> l & 1 == 1 && values[l] == value).fold(0u32, |mask, l| mask | 1 << l);
    let masks = values.map(same);
    if all {
        let agree = masks[on.trailing_zeros() as usize] == on;
        r.put(i.d[0], on, &[if agree { on } else { 0 }; LANES]);
        r.put_predicate(i.d[1], on, if agree { u32::MAX } else { 0 });
    } else {
        r.put(i.d[0], on, &masks);
    }
}
