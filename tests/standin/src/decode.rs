//! A kernel's text to instructions. Registers, constants and addresses become places in the register file, so that executing
//! an instruction looks nothing up.

use std::collections::BTreeMap;

use crate::alu;
use crate::convert::Conversion;
use crate::ptx::{Entry, Module, Type, Variable, number};
use crate::registers::Arithmetic;

/// No operand.
pub const NONE: u32 = u32::MAX;
/// Where shared and local memory lie among generic addresses.
pub const SHARED_WINDOW: u64 = 0x7e00_0000_0000_0000;
pub const LOCAL_WINDOW: u64 = 0x7d00_0000_0000_0000;

/// A register that reads where the thread is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Special {
    Thread(usize),
    Threads(usize),
    Block(usize),
    Blocks(usize),
    Lane,
    Warp,
    Warps,
    /// Lanes before this one, up to it, after it, from it on.
    LanesBelow,
    LanesUpTo,
    LanesAbove,
    LanesFrom,
    /// The bytes of dynamic shared memory.
    DynamicShared,
    /// A clock, which stands still while a block runs.
    Clock,
}

/// What a register holds before the kernel starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Value {
    Number(u64),
    Special(Special),
}

#[derive(Clone, Copy, Debug)]
pub struct Constant {
    pub at: u32,
    pub wide: bool,
    pub value: Value,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Space {
    Param,
    Global,
    Shared,
    Local,
    Generic,
}

/// Where a shuffle takes its value from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shuffle {
    Up,
    Down,
    Butterfly,
    Index,
}

/// What a vote tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vote {
    All,
    Any,
    Uniform,
    Ballot,
}

/// What an atomic operation, a reduction over lanes, or a barrier does with two values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Combine {
    Add,
    Min,
    Max,
    And,
    Or,
    Xor,
    Exchange,
    CompareAndSwap,
    /// Up to a bound, then from 0 on; and down again.
    Increment,
    Decrement,
}

#[derive(Clone, Debug)]
pub enum Op {
    Arithmetic(Arithmetic),
    Convert(Conversion),
    Load {
        space: Space,
        ty: Type,
        count: usize,
    },
    Store {
        space: Space,
        ty: Type,
        count: usize,
    },
    Atomic {
        space: Space,
        ty: Type,
        combine: Combine,
    },
    Branch,
    Exit,
    /// The number of the barrier among those of the kernel; of a reducing one, how and whether it counts.
    Barrier {
        ordinal: u32,
        reduce: Option<Reduce>,
    },
    Shuffle(Shuffle),
    Vote(Vote),
    Redux {
        ty: Type,
        combine: Combine,
    },
    /// `match.any` and, if so, `match.all`.
    Match {
        ty: Type,
        all: bool,
    },
    WarpSync,
    ActiveMask,
    Elect,
    /// D = A B + C on a tile, by the type of A and B and the number of columns of A.
    Mma {
        ty: Type,
        depth: u32,
        registers: Box<Mma>,
    },
    LoadMatrix {
        count: usize,
        transposed: bool,
    },
    StoreMatrix {
        count: usize,
        transposed: bool,
    },
    CopyAsync {
        bytes: u32,
    },
    CommitGroup,
    /// Waits until so many groups or fewer are on their way; without a number, for all copies.
    WaitGroup(Option<u32>),
    Nop,
    Assert,
    Trap,
    Unknown,
}

/// What a reducing barrier does with the predicates of all threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reduce {
    And,
    Or,
    Count,
}

/// The registers of a matrix product.
#[derive(Clone, Debug, Default)]
pub struct Mma {
    pub d: Vec<u32>,
    pub a: Vec<u32>,
    pub b: Vec<u32>,
    pub c: Vec<u32>,
}

#[derive(Clone, Debug)]
pub struct Instruction {
    pub op: Op,
    /// The predicate without which a lane is left out, and whether it is negated.
    pub guard: Option<(u32, bool)>,
    pub d: [u32; 4],
    pub s: [u32; 4],
    /// Added to an address; the target of a branch; what else an instruction has as a number.
    pub offset: i64,
    pub text: u32,
}

/// A kernel, ready to run.
#[derive(Debug, Default)]
pub struct Function {
    pub name: String,
    /// Offset, size and type of each parameter.
    pub params: Vec<Param>,
    pub param_bytes: usize,
    pub code: Vec<Instruction>,
    pub texts: Vec<String>,
    pub constants: Vec<Constant>,
    pub units: usize,
    pub predicates: usize,
    pub shared_bytes: usize,
    pub local_bytes: usize,
    pub most_threads: Option<u32>,
    /// Instructions that are not known, and why.
    pub unknown: Vec<(String, String)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Param {
    pub offset: usize,
    pub size: usize,
    pub ty: Type,
}

/// An instruction's name, taken apart at its dots.
pub struct Mnemonic<'a> {
    pub parts: Vec<&'a str>,
    pub types: Vec<Type>,
}

impl<'a> Mnemonic<'a> {
    fn new(text: &'a str) -> Self {
        let parts: Vec<&str> = text.split('.').collect();
        let types = parts[1..].iter().filter_map(|part| Type::parse(part)).collect();
        Self { parts, types }
    }

    pub fn op(&self) -> &'a str {
        self.parts[0]
    }

    pub fn has(&self, part: &str) -> bool {
        self.parts[1..].contains(&part)
    }

    /// The only or first type.
    pub fn ty(&self) -> Type {
        self.types.first().copied().unwrap_or(Type::B32)
    }

    fn space(&self) -> Space {
        let spaces = [
            ("param", Space::Param),
            ("global", Space::Global),
            ("const", Space::Global),
            ("shared", Space::Shared),
            ("shared::cta", Space::Shared),
            ("local", Space::Local),
        ];
        spaces.into_iter().find(|(name, _)| self.has(name)).map_or(Space::Generic, |(_, space)| space)
    }

    fn count(&self) -> usize {
        [("v2", 2), ("v4", 4)].into_iter().find(|(name, _)| self.has(name)).map_or(1, |(_, count)| count)
    }

    fn combine(&self) -> Option<Combine> {
        let names = [
            ("add", Combine::Add),
            ("min", Combine::Min),
            ("max", Combine::Max),
            ("and", Combine::And),
            ("or", Combine::Or),
            ("xor", Combine::Xor),
            ("exch", Combine::Exchange),
            ("cas", Combine::CompareAndSwap),
            ("inc", Combine::Increment),
            ("dec", Combine::Decrement),
        ];
        names.into_iter().find(|(name, _)| self.has(name)).map(|(_, combine)| combine)
    }
}

#[derive(Clone, Copy)]
enum Class {
    Predicate,
    Narrow,
    Wide,
}

/// A declared register.
#[derive(Clone, Copy)]
struct Register {
    at: u32,
    class: Class,
}

struct Decoder<'m> {
    module: &'m Module,
    scopes: Vec<BTreeMap<String, Register>>,
    constants: BTreeMap<(bool, Value), u32>,
    params: BTreeMap<String, usize>,
    locals: BTreeMap<String, usize>,
    shared: BTreeMap<String, usize>,
    labels: BTreeMap<String, usize>,
    branches: Vec<(usize, String)>,
    guard: Option<(u32, bool)>,
    text: u32,
    /// What puts narrow results into wide registers, after the instruction at hand.
    after: Vec<Instruction>,
    barriers: u32,
    f: Function,
}

/// Decodes a kernel of a module; an error if its text has no sense. Unknown instructions fail when they are executed.
pub fn decode(module: &Module, name: &str, entry: &Entry) -> Result<Function, String> {
    let mut decoder = Decoder {
        module,
        scopes: vec![BTreeMap::new()],
        constants: BTreeMap::new(),
        params: BTreeMap::new(),
        locals: BTreeMap::new(),
        shared: BTreeMap::new(),
        labels: BTreeMap::new(),
        branches: Vec::new(),
        guard: None,
        text: 0,
        after: Vec::new(),
        barriers: 0,
        // The first two predicates are no and yes.
        f: Function { name: name.to_owned(), most_threads: entry.most_threads, predicates: 2, ..Function::default() },
    };
    decoder.parameters(&module.text[entry.params.clone()])?;
    decoder.variables(&module.text[entry.body.clone()])?;
    decoder.body(&module.text[entry.body.clone()])?;
    for (at, label) in std::mem::take(&mut decoder.branches) {
        decoder.f.code[at].offset = *decoder.labels.get(&label).ok_or_else(|| format!("no label {label}"))? as i64;
    }
    decoder.guard = None;
    decoder.name("(the end)");
    decoder.push(Op::Exit, [NONE; 4], [NONE; 4], 0);
    let constant = |(&(wide, value), &at): (&(bool, Value), &u32)| Constant { at, wide, value };
    decoder.f.constants = decoder.constants.iter().map(constant).collect();
    Ok(decoder.f)
}

impl Decoder<'_> {
    fn parameters(&mut self, text: &str) -> Result<(), String> {
        let mut offset = 0usize;
        for declaration in text.split(',').map(str::trim).filter(|text| !text.is_empty()) {
            let wrong = || format!("parameter `{declaration}`");
            // `.param .u64 .ptr .global .align 16 name`: the alignment is that of what it points to.
            let bare = declaration.strip_prefix(".param").ok_or_else(wrong)?;
            let bare = bare.split_once(".ptr").map_or(bare.to_owned(), |(head, rest)| {
                format!("{head} {}", rest.split_whitespace().next_back().unwrap_or(""))
            });
            let variable = Variable::parse(&bare).ok_or_else(wrong)?;
            offset = offset.next_multiple_of(variable.align);
            self.f.params.push(Param { offset, size: variable.size, ty: variable.ty });
            self.params.insert(variable.name, offset);
            offset += variable.size;
        }
        self.f.param_bytes = offset;
        Ok(())
    }

    /// Shared memory: the module's variables that the kernel names, its own, and then the dynamic part.
    fn variables(&mut self, body: &str) -> Result<(), String> {
        let own = body
            .split(';')
            .filter_map(|text| text.trim_start_matches(['{', '}', ' ', '\n', '\t']).strip_prefix(".shared"));
        let own = own
            .map(|text| Variable::parse(text).ok_or_else(|| format!("`.shared{text}`")))
            .collect::<Result<Vec<_>, _>>()?;
        let named = self.module.shared.iter().filter(|variable| body.contains(&variable.name)).cloned();
        let mut bytes = 0usize;
        for variable in named.chain(own) {
            bytes = bytes.next_multiple_of(variable.align);
            self.shared.insert(variable.name, bytes);
            bytes += variable.size;
        }
        if self.module.dynamic.iter().any(|name| body.contains(name.as_str())) {
            bytes = bytes.next_multiple_of(16);
            self.shared.extend(self.module.dynamic.iter().map(|name| (name.clone(), bytes)));
        }
        self.f.shared_bytes = bytes;
        Ok(())
    }

    fn body(&mut self, body: &str) -> Result<(), String> {
        let bytes = body.as_bytes();
        let mut start = 0;
        for at in 0..bytes.len() {
            let before = || body[start..at].trim();
            match bytes[at] {
                b'{' if before().is_empty() => {
                    self.scopes.push(BTreeMap::new());
                    start = at + 1;
                }
                b'}' if before().is_empty() => {
                    self.scopes.pop();
                    start = at + 1;
                }
                b':' if bytes.get(at + 1) != Some(&b':')
                    && bytes[at - 1] != b':'
                    && !before().contains(char::is_whitespace) =>
                {
                    self.labels.insert(before().to_owned(), self.f.code.len());
                    start = at + 1;
                }
                b';' => {
                    let statement = before().split_whitespace().collect::<Vec<_>>().join(" ");
                    if !statement.is_empty() {
                        self.statement(&statement)?;
                    }
                    start = at + 1;
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn name(&mut self, text: &str) {
        self.text = self.f.texts.len() as u32;
        self.f.texts.push(text.to_owned());
    }

    fn push(&mut self, op: Op, d: [u32; 4], s: [u32; 4], offset: i64) {
        self.f.code.push(Instruction { op, guard: self.guard, d, s, offset, text: self.text });
    }

    fn fresh(&mut self, class: Class) -> Register {
        let at = match class {
            Class::Predicate => {
                self.f.predicates += 1;
                self.f.predicates - 1
            }
            Class::Narrow => {
                self.f.units += 1;
                self.f.units - 1
            }
            Class::Wide => {
                self.f.units += 2;
                self.f.units - 2
            }
        };
        Register { at: at as u32, class }
    }

    fn register(&self, name: &str) -> Option<Register> {
        self.scopes.iter().rev().find_map(|scope| scope.get(name).copied())
    }

    fn declare_registers(&mut self, text: &str) -> Result<(), String> {
        let wrong = || format!("`.reg{text}`");
        let (ty, names) = text.trim().split_once(' ').ok_or_else(wrong)?;
        let class = match ty.strip_prefix('.').and_then(Type::parse).ok_or_else(wrong)? {
            Type::Pred => Class::Predicate,
            ty if ty.wide() => Class::Wide,
            _ => Class::Narrow,
        };
        for name in names.split(',').map(str::trim) {
            let list = match name.split_once('<') {
                Some((base, count)) => {
                    let count: usize = count.trim_end_matches('>').parse().map_err(|_| wrong())?;
                    (0..count).map(|n| format!("{base}{n}")).collect()
                }
                None => vec![name.to_owned()],
            };
            for name in list {
                let register = self.fresh(class);
                self.scopes.last_mut().ok_or("a brace too many")?.insert(name, register);
            }
        }
        Ok(())
    }

    fn statement(&mut self, text: &str) -> Result<(), String> {
        if let Some(rest) = text.strip_prefix(".reg") {
            return self.declare_registers(rest);
        }
        if let Some(rest) = text.strip_prefix(".local") {
            let variable = Variable::parse(rest).ok_or_else(|| format!("`{text}`"))?;
            let at = self.f.local_bytes.next_multiple_of(variable.align);
            self.locals.insert(variable.name, at);
            self.f.local_bytes = at + variable.size;
            return Ok(());
        }
        if text.starts_with('.') {
            return Ok(()); // .shared is counted already; .pragma, .loc and the parameters of calls say nothing here
        }
        let (mut rest, mut guard) = (text, None);
        if let Some(guarded) = text.strip_prefix('@') {
            let (name, tail) = guarded.split_once(' ').ok_or_else(|| format!("`{text}`"))?;
            let (negated, name) = name.strip_prefix('!').map_or((false, name), |name| (true, name));
            guard = Some((self.register(name).ok_or_else(|| format!("register {name}"))?.at, negated));
            rest = tail.trim();
        }
        self.guard = guard;
        self.name(text);
        let (mnemonic, operands) = rest.split_once(' ').unwrap_or((rest, ""));
        let before = (self.f.code.len(), self.branches.len());
        self.after.clear();
        match self.instruction(&Mnemonic::new(mnemonic), &split(operands)) {
            Ok(()) => self.f.code.append(&mut self.after),
            Err(why) => {
                self.f.code.truncate(before.0);
                self.branches.truncate(before.1);
                self.f.unknown.push((text.to_owned(), why));
                self.push(Op::Unknown, [NONE; 4], [NONE; 4], 0);
            }
        }
        Ok(())
    }

    fn constant(&mut self, wide: bool, value: Value) -> u32 {
        if let Some(&at) = self.constants.get(&(wide, value)) {
            return at;
        }
        let at = self.fresh(if wide { Class::Wide } else { Class::Narrow }).at;
        self.constants.insert((wide, value), at);
        at
    }

    /// The register of an operand that is read as a type.
    fn source(&mut self, text: &str, ty: Type) -> Result<u32, String> {
        if ty == Type::Pred {
            return self.predicate(text);
        }
        if let Some(register) = self.register(text) {
            return match (register.class, ty.wide()) {
                (Class::Narrow, false) | (Class::Wide, true) => Ok(register.at),
                (Class::Wide, false) => {
                    let low = self.fresh(Class::Narrow).at;
                    self.push(
                        Op::Arithmetic(|r, i, on| r.map1(i, on, |x: u64| x as u32)),
                        one(low),
                        one(register.at),
                        0,
                    );
                    Ok(low)
                }
                _ => Err(format!("register {text} is too narrow")),
            };
        }
        let value = match special(text) {
            Some(special) => Value::Special(special),
            None => Value::Number(self.literal(text, ty).ok_or_else(|| format!("operand {text}"))?),
        };
        Ok(self.constant(ty.wide(), value))
    }

    /// A number or the address of a variable.
    fn literal(&self, text: &str, ty: Type) -> Option<u64> {
        if text == "WARP_SZ" {
            return Some(32);
        }
        // The address of a parameter is its offset among the parameters.
        let places = [&self.shared, &self.locals, &self.params];
        let variable = places.iter().find_map(|places| places.get(text)).map(|&offset| offset as u64);
        let variable = variable.or(self.module.globals.get(text).map(|global| global.address));
        number(text, ty).or(variable)
    }

    fn predicate(&mut self, text: &str) -> Result<u32, String> {
        if let Some(name) = text.strip_prefix('!') {
            let (source, result) = (self.predicate(name)?, self.fresh(Class::Predicate).at);
            self.push(Op::Arithmetic(alu::predicate("not").expect("known")), one(result), one(source), 0);
            return Ok(result);
        }
        match self.register(text) {
            Some(Register { at, class: Class::Predicate }) => Ok(at),
            Some(_) => Err(format!("register {text} is no predicate")),
            None => {
                number(text, Type::S32).map(|value| u32::from(value != 0)).ok_or_else(|| format!("predicate {text}"))
            }
        }
    }

    /// The register of a result of a type; `_` takes what nobody needs.
    fn destination(&mut self, text: &str, ty: Type) -> Result<u32, String> {
        if text == "_" {
            let class = if ty == Type::Pred {
                Class::Predicate
            } else if ty.wide() {
                Class::Wide
            } else {
                Class::Narrow
            };
            return Ok(self.fresh(class).at);
        }
        let register = self.register(text).ok_or_else(|| format!("register {text}"))?;
        match (register.class, ty) {
            (Class::Predicate, Type::Pred) => Ok(register.at),
            (Class::Wide, _) if ty.wide() => Ok(register.at),
            (Class::Narrow, _) if ty != Type::Pred && !ty.wide() => Ok(register.at),
            (Class::Wide, _) if ty != Type::Pred => {
                let low = self.fresh(Class::Narrow).at;
                let widen: Arithmetic = if ty.signed() {
                    |r, i, on| r.map1(i, on, |x: i32| i64::from(x))
                } else {
                    |r, i, on| r.map1(i, on, |x: u32| u64::from(x))
                };
                let op = Op::Arithmetic(widen);
                let instruction =
                    Instruction { op, guard: self.guard, d: one(register.at), s: one(low), offset: 0, text: self.text };
                self.after.push(instruction);
                Ok(low)
            }
            _ => Err(format!("register {text} does not take {ty:?}")),
        }
    }

    /// `{%r1, %r2}`, or one register.
    fn destinations(&mut self, text: &str, ty: Type) -> Result<[u32; 4], String> {
        let mut list = [NONE; 4];
        for (n, name) in inner(text).enumerate() {
            *list.get_mut(n).ok_or("more than four registers")? = self.destination(name, ty)?;
        }
        Ok(list)
    }

    fn sources(&mut self, text: &str, ty: Type) -> Result<[u32; 4], String> {
        let mut list = [NONE; 4];
        for (n, name) in inner(text).enumerate() {
            *list.get_mut(n).ok_or("more than four registers")? = self.source(name, ty)?;
        }
        Ok(list)
    }

    /// `[%rd1+8]`, `[name]`, `[name+4]`: the register of the base, and the offset. Addresses of shared memory may have 32 bits.
    fn address(&mut self, text: &str, space: Space) -> Result<(u32, i64), String> {
        let wrong = || format!("address {text}");
        let bare = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).ok_or_else(wrong)?.trim();
        let (base, offset) = match bare.rsplit_once('+') {
            Some((base, offset)) => (base.trim(), number(offset.trim(), Type::S64).ok_or_else(wrong)? as i64),
            None => (bare, 0),
        };
        if space == Space::Param
            && let Some(&at) = self.params.get(base)
        {
            return Ok((NONE, at as i64 + offset));
        }
        if let Some(Register { at, class: Class::Narrow }) = self.register(base) {
            let wide = self.fresh(Class::Wide).at;
            self.push(Op::Arithmetic(|r, i, on| r.map1(i, on, |x: u32| u64::from(x))), one(wide), one(at), 0);
            return Ok((wide, offset));
        }
        Ok((self.source(base, Type::U64)?, offset))
    }

    fn instruction(&mut self, m: &Mnemonic, list: &[&str]) -> Result<(), String> {
        let ty = m.ty();
        let operand = |n: usize| list.get(n).copied().ok_or("an operand is missing");
        match m.op() {
            "mov" if operand(1)?.starts_with('{') => {
                let count = inner(list[1]).count();
                let pack = alu::pack(count, ty).ok_or("parts")?;
                let part = if ty.bytes() / count == 8 { Type::B64 } else { Type::B32 };
                let s = self.sources(list[1], part)?;
                let d = one(self.destination(operand(0)?, ty)?);
                self.push(Op::Arithmetic(pack), d, s, 0);
            }
            "mov" if operand(0)?.starts_with('{') => {
                let unpack = alu::unpack(inner(list[0]).count(), ty).ok_or("parts")?;
                let s = one(self.source(operand(1)?, ty)?);
                let d = self.destinations(list[0], Type::B32)?;
                self.push(Op::Arithmetic(unpack), d, s, 0);
            }
            "cvta" => {
                let window = match m.space() {
                    Space::Shared => SHARED_WINDOW,
                    Space::Local => LOCAL_WINDOW,
                    _ => 0,
                };
                let window = if m.has("to") { window.wrapping_neg() } else { window };
                let s = [self.source(operand(1)?, Type::U64)?, self.constant(true, Value::Number(window)), NONE, NONE];
                let d = one(self.destination(operand(0)?, Type::U64)?);
                self.push(Op::Arithmetic(|r, i, on| r.map2(i, on, u64::wrapping_add)), d, s, 0);
            }
            "ld" | "ldu" => {
                let (space, count) = (m.space(), m.count());
                let (base, offset) = self.address(operand(1)?, space)?;
                let d = self.destinations(operand(0)?, ty)?;
                self.push(Op::Load { space, ty, count }, d, one(base), offset);
            }
            "st" if m.space() == Space::Param => self.push(Op::Nop, [NONE; 4], [NONE; 4], 0), // arguments of a call
            "st" => {
                let (space, count) = (m.space(), m.count());
                let (base, offset) = self.address(operand(0)?, space)?;
                let s = self.sources(operand(1)?, ty)?;
                self.push(Op::Store { space, ty, count }, one(base), s, offset);
            }
            "atom" | "red" => {
                let space = m.space();
                let combine = m.combine().ok_or("operation")?;
                let rest = if m.op() == "red" { list } else { &list[1..] };
                let (base, offset) = self.address(rest.first().ok_or("address")?, space)?;
                let mut s = [base, NONE, NONE, NONE];
                for (n, text) in rest[1..].iter().enumerate() {
                    *s.get_mut(n + 1).ok_or("operands")? = self.source(text, ty)?;
                }
                let d = if m.op() == "red" { NONE } else { self.destination(list[0], ty)? };
                self.push(Op::Atomic { space, ty, combine }, one(d), s, offset);
            }
            "bra" => {
                self.branches.push((self.f.code.len(), operand(0)?.to_owned()));
                self.push(Op::Branch, [NONE; 4], [NONE; 4], 0);
            }
            "ret" | "exit" => self.push(Op::Exit, [NONE; 4], [NONE; 4], 0),
            "bar" | "barrier" if m.has("warp") => {
                let s = one(self.source(operand(0)?, Type::B32)?);
                self.push(Op::WarpSync, [NONE; 4], s, 0);
            }
            "bar" | "barrier" if m.has("sync") || m.has("red") => self.barrier(m, list)?,
            "shfl" => {
                let mode = [
                    ("up", Shuffle::Up),
                    ("down", Shuffle::Down),
                    ("bfly", Shuffle::Butterfly),
                    ("idx", Shuffle::Index),
                ];
                let (_, mode) = mode.into_iter().find(|(name, _)| m.has(name)).ok_or("mode")?;
                let mut s = [NONE; 4];
                for (n, s) in s.iter_mut().enumerate() {
                    *s = self.source(operand(n + 1)?, Type::B32)?;
                }
                let (value, found) = operand(0)?.split_once('|').unwrap_or((list[0], "_"));
                let d = [
                    self.destination(value.trim(), Type::B32)?,
                    self.destination(found.trim(), Type::Pred)?,
                    NONE,
                    NONE,
                ];
                self.push(Op::Shuffle(mode), d, s, 0);
            }
            "vote" => {
                let modes = [("all", Vote::All), ("any", Vote::Any), ("uni", Vote::Uniform), ("ballot", Vote::Ballot)];
                let (_, mode) = modes.into_iter().find(|(name, _)| m.has(name)).ok_or("mode")?;
                let s = [self.source(operand(1)?, Type::Pred)?, self.source(operand(2)?, Type::B32)?, NONE, NONE];
                let d = one(self.destination(operand(0)?, if mode == Vote::Ballot { Type::B32 } else { Type::Pred })?);
                self.push(Op::Vote(mode), d, s, 0);
            }
            "redux" => {
                let combine = m.combine().ok_or("operation")?;
                let s = [self.source(operand(1)?, ty)?, self.source(operand(2)?, Type::B32)?, NONE, NONE];
                let d = one(self.destination(operand(0)?, ty)?);
                self.push(Op::Redux { ty, combine }, d, s, 0);
            }
            "match" => {
                let all = m.has("all");
                let s = [self.source(operand(1)?, ty)?, self.source(operand(2)?, Type::B32)?, NONE, NONE];
                let (mask, same) = operand(0)?.split_once('|').unwrap_or((list[0], "_"));
                let d =
                    [self.destination(mask.trim(), Type::B32)?, self.destination(same.trim(), Type::Pred)?, NONE, NONE];
                self.push(Op::Match { ty, all }, d, s, 0);
            }
            "activemask" => {
                let d = one(self.destination(operand(0)?, Type::B32)?);
                self.push(Op::ActiveMask, d, [NONE; 4], 0);
            }
            "elect" => {
                let (lane, chosen) = operand(0)?.split_once('|').ok_or("a predicate")?;
                let s = one(self.source(operand(1)?, Type::B32)?);
                let d = [
                    self.destination(lane.trim(), Type::B32)?,
                    self.destination(chosen.trim(), Type::Pred)?,
                    NONE,
                    NONE,
                ];
                self.push(Op::Elect, d, s, 0);
            }
            "mma" => self.mma(m, list)?,
            "ldmatrix" | "stmatrix" => {
                let counts = [("x1", 1), ("x2", 2), ("x4", 4)];
                let (_, count) = counts.into_iter().find(|(name, _)| m.has(name)).ok_or("count")?;
                if !m.has("m8n8") || !m.has("b16") {
                    return Err("shape".to_owned());
                }
                let transposed = m.has("trans");
                if m.op() == "ldmatrix" {
                    let (base, offset) = self.address(operand(1)?, Space::Shared)?;
                    let d = self.destinations(operand(0)?, Type::B32)?;
                    self.push(Op::LoadMatrix { count, transposed }, d, one(base), offset);
                } else {
                    let (base, offset) = self.address(operand(0)?, Space::Shared)?;
                    let s = self.sources(operand(1)?, Type::B32)?;
                    self.push(Op::StoreMatrix { count, transposed }, one(base), s, offset);
                }
            }
            "cp" if m.has("async") => self.copy(m, list)?,
            "call" if list.iter().any(|text| text.contains("__assertfail")) => {
                self.push(Op::Assert, [NONE; 4], [NONE; 4], 0)
            }
            "trap" => self.push(Op::Trap, [NONE; 4], [NONE; 4], 0),
            "membar" | "fence" | "prefetch" | "nanosleep" | "applypriority" | "discard" => {
                self.push(Op::Nop, [NONE; 4], [NONE; 4], 0);
            }
            _ => self.arithmetic(m, list)?,
        }
        Ok(())
    }

    fn barrier(&mut self, m: &Mnemonic, list: &[&str]) -> Result<(), String> {
        let reduce = match (m.has("red"), m.has("and"), m.has("or"), m.has("popc")) {
            (false, ..) => None,
            (_, true, ..) => Some(Reduce::And),
            (_, _, true, _) => Some(Reduce::Or),
            (.., true) => Some(Reduce::Count),
            _ => return Err("operation".to_owned()),
        };
        let (mut d, mut s, mut rest) = (NONE, [NONE; 4], list);
        if let Some(reduce) = reduce {
            let [result, between @ .., predicate] = list else { return Err("operands".to_owned()) };
            d = self.destination(result, if reduce == Reduce::Count { Type::U32 } else { Type::Pred })?;
            s[2] = self.source(predicate, Type::Pred)?;
            rest = between;
        }
        s[0] = self.source(rest.first().copied().unwrap_or("0"), Type::U32)?;
        if let Some(threads) = rest.get(1) {
            s[1] = self.source(threads, Type::U32)?;
        }
        let ordinal = self.barriers;
        self.barriers += 1;
        self.push(Op::Barrier { ordinal, reduce }, one(d), s, 0);
        Ok(())
    }

    fn mma(&mut self, m: &Mnemonic, list: &[&str]) -> Result<(), String> {
        let [d, a, b, c] = list else { return Err("operands".to_owned()) };
        let (ty, depth) = match (m.types.as_slice(), m.has("m16n8k8"), m.has("m16n8k16")) {
            ([Type::F32, ty @ (Type::Bf16 | Type::F16), other, Type::F32], true, false) if ty == other => (*ty, 8),
            ([Type::F32, ty @ (Type::Bf16 | Type::F16), other, Type::F32], false, true) if ty == other => (*ty, 16),
            _ => return Err("shape or types".to_owned()),
        };
        if !m.has("row") || !m.has("col") || m.parts.iter().any(|part| part.starts_with("sp")) {
            return Err("layout".to_owned());
        }
        let mut registers = Mma::default();
        for name in inner(a) {
            registers.a.push(self.source(name, Type::B32)?);
        }
        for name in inner(b) {
            registers.b.push(self.source(name, Type::B32)?);
        }
        for name in inner(c) {
            registers.c.push(self.source(name, Type::F32)?);
        }
        for name in inner(d) {
            registers.d.push(self.destination(name, Type::F32)?);
        }
        let count = [registers.a.len(), registers.b.len(), registers.c.len(), registers.d.len()];
        if count != [depth as usize / 4, depth as usize / 8, 4, 4] {
            return Err("number of registers".to_owned());
        }
        self.push(Op::Mma { ty, depth, registers: Box::new(registers) }, [NONE; 4], [NONE; 4], 0);
        Ok(())
    }

    fn copy(&mut self, m: &Mnemonic, list: &[&str]) -> Result<(), String> {
        let op = match m.parts[2..] {
            ["commit_group"] => Op::CommitGroup,
            ["wait_all"] => Op::WaitGroup(None),
            ["wait_group"] => {
                let count = list.first().and_then(|text| number(text, Type::U32)).ok_or("a number of groups")?;
                Op::WaitGroup(Some(count as u32))
            }
            ["ca" | "cg", "shared" | "shared::cta", "global", ..] => {
                let [to, from, bytes, rest @ ..] = list else { return Err("operands".to_owned()) };
                let bytes = number(bytes, Type::U32).ok_or("a number of bytes")? as u32;
                if !matches!((m.parts[2], bytes), (_, 16) | ("ca", 4 | 8)) {
                    return Err("number of bytes".to_owned());
                }
                let (to, to_offset) = self.address(to, Space::Shared)?;
                let (from, from_offset) = self.address(from, Space::Global)?;
                let used = match rest.first() {
                    Some(text) => self.source(text, Type::U32)?,
                    None => self.constant(false, Value::Number(u64::from(bytes))),
                };
                if !(0..1 << 20).contains(&to_offset) {
                    return Err("offset into shared memory".to_owned());
                }
                // Two offsets in one number: that into shared memory is short.
                let offset = from_offset << 20 | to_offset;
                self.push(Op::CopyAsync { bytes }, [NONE; 4], [to, from, used, NONE], offset);
                return Ok(());
            }
            _ => return Err("kind of copy".to_owned()),
        };
        self.push(op, [NONE; 4], [NONE; 4], 0);
        Ok(())
    }

    /// Instructions that compute each lane from the same lane of their operands.
    fn arithmetic(&mut self, m: &Mnemonic, list: &[&str]) -> Result<(), String> {
        let [result, sources @ ..] = list else { return Err("no operands".to_owned()) };
        let mut plan = alu::plan(m)?;
        let sources = match plan.immediate {
            true => {
                let (last, sources) = sources.split_last().ok_or("an immediate")?;
                plan.offset = number(last, Type::U32).ok_or("an immediate")? as i64;
                sources
            }
            false => sources,
        };
        if sources.len() != plan.sources.len() {
            return Err(format!("{} operands instead of {}", sources.len(), plan.sources.len()));
        }
        let mut s = [NONE; 4];
        for (n, (text, ty)) in sources.iter().zip(&plan.sources).enumerate() {
            s[n] = self.source(text, *ty)?;
        }
        let (first, second) = result.split_once('|').unwrap_or((result, "_"));
        let mut d = one(self.destination(first.trim(), plan.result)?);
        if result.contains('|') {
            d[1] = self.destination(second.trim(), Type::Pred)?;
        }
        self.push(plan.op, d, s, plan.offset);
        Ok(())
    }
}

/// Operands at the top level of commas.
fn split(operands: &str) -> Vec<&str> {
    let (mut list, mut depth, mut from) = (Vec::new(), 0, 0);
    for (at, c) in operands.char_indices() {
        match c {
            '{' | '[' | '(' => depth += 1,
            '}' | ']' | ')' => depth -= 1,
            ',' if depth == 0 => {
                list.push(operands[from..at].trim());
                from = at + 1;
            }
            _ => {}
        }
    }
    list.push(operands[from..].trim());
    list.retain(|text| !text.is_empty());
    list
}

/// The parts of `{a, b}`.
fn inner(text: &str) -> impl Iterator<Item = &str> {
    text.trim_matches(['{', '}']).split(',').map(str::trim)
}

fn one(at: u32) -> [u32; 4] {
    [at, NONE, NONE, NONE]
}

fn special(text: &str) -> Option<Special> {
    let (name, axis) = text.strip_prefix('%')?.split_once('.').unwrap_or((&text[1..], ""));
    let axis = match axis {
        "x" => Some(0),
        "y" => Some(1),
        "z" => Some(2),
        _ => None,
    };
    Some(match (name, axis) {
        ("tid", Some(axis)) => Special::Thread(axis),
        ("ntid", Some(axis)) => Special::Threads(axis),
        ("ctaid", Some(axis)) => Special::Block(axis),
        ("nctaid", Some(axis)) => Special::Blocks(axis),
        ("laneid", None) => Special::Lane,
        ("warpid", None) => Special::Warp,
        ("nwarpid", None) => Special::Warps,
        ("lanemask_lt", None) => Special::LanesBelow,
        ("lanemask_le", None) => Special::LanesUpTo,
        ("lanemask_gt", None) => Special::LanesAbove,
        ("lanemask_ge", None) => Special::LanesFrom,
        ("dynamic_smem_size", None) => Special::DynamicShared,
        ("clock" | "clock64" | "globaltimer", None) => Special::Clock,
        _ => return None,
    })
}
