//! The text of a PTX module: its kernels, variables, target and version. What `cuModuleLoadData` reads; the instructions of a
//! kernel are decoded when it is first asked for.

use std::collections::BTreeMap;
use std::ops::Range;

/// The type of an instruction or of a variable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[rustfmt::skip]
pub enum Type { Pred, B8, U8, S8, B16, U16, S16, F16, Bf16, Bf16x2, F16x2, B32, U32, S32, F32, B64, U64, S64, F64 }

impl Type {
    #[rustfmt::skip]
    pub fn parse(name: &str) -> Option<Type> {
        use Type::*;
        Some(match name {
            "pred" => Pred, "b8" => B8, "u8" => U8, "s8" => S8, "b16" => B16, "u16" => U16, "s16" => S16,
            "f16" => F16, "bf16" => Bf16, "bf16x2" => Bf16x2, "f16x2" => F16x2, "b32" => B32, "u32" => U32,
            "s32" => S32, "f32" => F32, "b64" => B64, "u64" => U64, "s64" => S64, "f64" => F64,
            _ => return None,
        })
    }

    pub fn bytes(self) -> usize {
        use Type::*;
        match self {
            Pred | B8 | U8 | S8 => 1,
            B16 | U16 | S16 | F16 | Bf16 => 2,
            Bf16x2 | F16x2 | B32 | U32 | S32 | F32 => 4,
            B64 | U64 | S64 | F64 => 8,
        }
    }

    /// Whether its registers have 64 bits.
    pub fn wide(self) -> bool {
        self.bytes() == 8
    }

    pub fn signed(self) -> bool {
        matches!(self, Type::S8 | Type::S16 | Type::S32 | Type::S64)
    }

    pub fn float(self) -> bool {
        matches!(self, Type::F16 | Type::Bf16 | Type::Bf16x2 | Type::F16x2 | Type::F32 | Type::F64)
    }
}

/// A variable: `.align 4 .b8 name[16]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Variable {
    pub name: String,
    pub ty: Type,
    pub size: usize,
    pub align: usize,
}

impl Variable {
    /// What follows the space of a declaration; attributes that say nothing about size are passed over.
    pub fn parse(declaration: &str) -> Option<Variable> {
        let (mut ty, mut align, mut words) = (Type::B8, 1, declaration.split_whitespace());
        while let Some(word) = words.next() {
            if word == ".align" {
                align = words.next()?.parse().ok()?;
            } else if let Some(attribute) = word.strip_prefix('.') {
                ty = Type::parse(attribute).unwrap_or(ty);
            } else {
                let (name, count) = match word.split_once('[') {
                    // A variable without a size is the dynamic part of shared memory.
                    Some((name, rest)) => (name, rest.split(']').next()?.trim().parse().unwrap_or(0)),
                    None => (word, 1),
                };
                let size = count * ty.bytes();
                return Some(Variable { name: name.to_owned(), ty, size, align: align.max(ty.bytes()) });
            }
        }
        None
    }
}

/// A kernel's text.
#[derive(Clone, Debug)]
pub struct Entry {
    pub params: Range<usize>,
    pub body: Range<usize>,
    /// The most threads of a block, if the kernel says so.
    pub most_threads: Option<u32>,
}

/// A variable in global memory, and its address once it is loaded.
#[derive(Clone, Debug)]
pub struct Global {
    pub address: u64,
    pub contents: Vec<u8>,
}

/// A module: kernels as text.
#[derive(Clone, Debug, Default)]
pub struct Module {
    pub text: String,
    pub entries: BTreeMap<String, Entry>,
    pub globals: BTreeMap<String, Global>,
    /// Variables in shared memory that no kernel has to itself.
    pub shared: Vec<Variable>,
    /// The names of dynamic shared memory.
    pub dynamic: Vec<String>,
    /// `sm_80`, for instance.
    pub target: String,
    /// Major and minor number of the PTX version.
    pub version: (u32, u32),
}

impl Module {
    /// Reads a module; fails with the reason.
    pub fn parse(source: &str) -> Result<Module, String> {
        let text: String = source.lines().map(|line| line.split("//").next().unwrap_or("").to_owned() + "\n").collect();
        let mut module = Module::default();
        let (mut start, mut at, bytes) = (0, 0, text.as_bytes());
        while at < bytes.len() {
            let head = text[start..at].trim_start();
            match bytes[at] {
                b'\n'
                    if head.starts_with(".version")
                        || head.starts_with(".target")
                        || head.starts_with(".address_size") =>
                {
                    module.directive(head.trim())?;
                    start = at + 1;
                }
                b';' => {
                    module.declare(text[start..at].trim())?;
                    start = at + 1;
                }
                // A variable's list of values has braces as well.
                b'{' if !head.contains('=') => {
                    let end = closing(bytes, at).ok_or("a brace is not closed")?;
                    module.function(&text, start..at, at + 1..end)?;
                    at = end;
                    start = end + 1;
                }
                _ => {}
            }
            at += 1;
        }
        if module.version == (0, 0) {
            return Err("there is no .version".to_owned());
        }
        module.text = text;
        Ok(module)
    }

    fn directive(&mut self, line: &str) -> Result<(), String> {
        if let Some(target) = line.strip_prefix(".target") {
            target.trim().split(',').next().unwrap_or("").clone_into(&mut self.target);
        } else if let Some(version) = line.strip_prefix(".version") {
            let (major, minor) = version.trim().split_once('.').ok_or("a version without a dot")?;
            let number = |part: &str| part.trim().parse().map_err(|_| format!("version {version}"));
            self.version = (number(major)?, number(minor)?);
        }
        Ok(())
    }

    fn declare(&mut self, declaration: &str) -> Result<(), String> {
        let wrong = || format!("declaration `{declaration}`");
        let bare = declaration.trim_start_matches(".visible").trim_start().trim_start_matches(".weak").trim_start();
        if let Some(rest) = bare.strip_prefix(".extern .shared") {
            self.dynamic.push(Variable::parse(rest).ok_or_else(wrong)?.name);
        } else if let Some(rest) = bare.strip_prefix(".shared") {
            self.shared.push(Variable::parse(rest).ok_or_else(wrong)?);
        } else if let Some(rest) = bare.strip_prefix(".global").or(bare.strip_prefix(".const")) {
            let (head, values) = rest.split_once('=').unwrap_or((rest, ""));
            let variable = Variable::parse(head.trim()).ok_or_else(wrong)?;
            let mut contents = Vec::new();
            for value in values.trim().trim_matches(['{', '}']).split(',').map(str::trim).filter(|v| !v.is_empty()) {
                let value = number(value, variable.ty).ok_or_else(wrong)?;
                contents.extend_from_slice(&value.to_le_bytes()[..variable.ty.bytes()]);
            }
            contents.resize(variable.size, 0);
            self.globals.insert(variable.name, Global { address: 0, contents });
        }
        Ok(())
    }

    fn function(&mut self, text: &str, head: Range<usize>, body: Range<usize>) -> Result<(), String> {
        // Functions that are no kernels are not called by any: what calls them is unknown to `decode`, and said there.
        let Some(at) = text[head.clone()].find(".entry") else { return Ok(()) };
        let open = text[head.clone()].find('(').ok_or("a kernel without parameters")? + head.start;
        let close = text[open..head.end].find(')').ok_or("parameters without an end")? + open;
        let name = text[head.start + at + ".entry".len()..open].trim().to_owned();
        let limit = |word: &str| {
            let list = text[close..head.end].split(word).nth(1)?.lines().next()?;
            list.split(',').map(|part| part.trim().parse::<u32>().ok()).product::<Option<u32>>()
        };
        let most_threads = limit(".maxntid").or(limit(".reqntid"));
        self.entries.insert(name, Entry { params: open + 1..close, body, most_threads });
        Ok(())
    }

    /// The compute capability in tenths that the module is for, and whether it is for this one only.
    pub fn capability(&self) -> Option<(u32, bool)> {
        let digits = self.target.strip_prefix("sm_")?;
        let exact = digits.ends_with('a');
        Some((digits.trim_end_matches(['a', 'f']).parse().ok()?, exact))
    }
}

fn closing(bytes: &[u8], open: usize) -> Option<usize> {
    let mut depth = 0usize;
    for (at, byte) in bytes.iter().enumerate().skip(open) {
        match byte {
            b'{' => depth += 1,
            b'}' if depth == 1 => return Some(at),
            b'}' => depth -= 1,
            _ => {}
        }
    }
    None
}

/// A number of PTX as the bits of a type: `-1`, `0x10`, `0f3F800000`, `0d3FF0000000000000`.
pub fn number(text: &str, ty: Type) -> Option<u64> {
    let of_width = |value: u64| if ty.wide() { value } else { value & (u64::MAX >> (64 - 8 * ty.bytes())) };
    if let Some(hex) = text.strip_prefix("0f").or(text.strip_prefix("0F")) {
        let bits = u32::from_str_radix(hex, 16).ok()?;
        return Some(if ty == Type::F64 { f64::from(f32::from_bits(bits)).to_bits() } else { u64::from(bits) });
    }
    if let Some(hex) = text.strip_prefix("0d").or(text.strip_prefix("0D")) {
        return u64::from_str_radix(hex, 16).ok();
    }
    let (negative, body) = text.strip_prefix('-').map_or((false, text), |body| (true, body));
    let body = body.trim_end_matches('U');
    let value = match body.strip_prefix("0x").or(body.strip_prefix("0X")) {
        Some(hex) => u64::from_str_radix(hex, 16).ok()?,
        None => body.parse().ok()?,
    };
    Some(of_width(if negative { value.wrapping_neg() } else { value }))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "// a comment { \n.version 8.4\n.target sm_90a\n.address_size 64\n.extern .shared .align 16 .b8 pool[];\n\
        .shared .align 4 .b8 both[8];\n.global .align 4 .u32 table[3] = {1, 0x10, -1};\n.visible .entry one(\n\
        .param .u64 one_param_0,\n.param .align 8 .b8 one_param_1[24]\n)\n.maxntid 128, 2, 1\n.minnctapersm 2\n{\n{ ret; }\n}\n\
        .visible .entry two()\n{\nret;\n}\n";

    #[test]
    fn a_module_is_read() {
        let module = Module::parse(TEXT).expect("a module");
        assert_eq!((module.capability(), module.version), (Some((90, true)), (8, 4)));
        assert_eq!(module.entries.keys().collect::<Vec<_>>(), ["one", "two"]);
        assert_eq!((module.entries["one"].most_threads, module.entries["two"].most_threads), (Some(256), None));
        assert_eq!(module.globals["table"].contents, [1, 0, 0, 0, 16, 0, 0, 0, 255, 255, 255, 255]);
        assert_eq!((module.shared[0].size, module.dynamic.as_slice()), (8, &["pool".to_owned()][..]));
        assert!(Module::parse(".target sm_80\n").is_err());
        assert!(Module::parse(".version 8.0\n.entry f() {").is_err());
    }

    #[test]
    fn numbers_are_read_as_bits() {
        assert_eq!(number("0f3F800000", Type::F32), Some(0x3f80_0000));
        assert_eq!(number("0f3F800000", Type::F64), Some(1f64.to_bits()));
        assert_eq!(number("0d4000000000000000", Type::F64), Some(2f64.to_bits()));
        assert_eq!((number("-1", Type::S16), number("-1", Type::S64)), (Some(0xffff), Some(u64::MAX)));
        assert_eq!((number("0x3f803f80U", Type::B32), number("name", Type::B32)), (Some(0x3f80_3f80), None));
    }
}
