//! Small kernels, run on memory of their own.
#![allow(dead_code, reason = "each test file uses a part")]

use cuda_standin::decode::{Function, decode};
use cuda_standin::memory::{Kind, Memory};
use cuda_standin::ptx::Module;
use cuda_standin::vm::{self, Dropped, Launch, Outcome, Stop};

/// A module with one kernel `k` of this body, which has `.param .u64 k_param_0` and so on.
pub fn module(params: usize, body: &str) -> String {
    let list: Vec<String> = (0..params).map(|n| format!(".param .u64 k_param_{n}")).collect();
    let head = ".version 8.0\n.target sm_80\n.address_size 64\n.extern .shared .align 16 .b8 pool[];\n";
    format!("{head}.visible .entry k({})\n{{\n{body}\nret;\n}}\n", list.join(",\n"))
}

pub fn function(text: &str) -> Function {
    let module = Module::parse(text).expect("a module");
    decode(&module, "k", &module.entries["k"]).expect("a kernel")
}

/// Device memory with buffers, and a kernel to be run on them.
pub struct Bench {
    pub memory: Memory,
    pub buffers: Vec<u64>,
    pub grid: u32,
    pub block: u32,
    pub dynamic: usize,
    pub dropped: Dropped,
}

impl Bench {
    /// Buffers with these contents.
    pub fn new(contents: &[Vec<u8>]) -> Bench {
        let mut memory = Memory::new(1 << 24);
        let buffers = contents.iter().map(|bytes| {
            let base = memory.allocate(bytes.len(), Kind::Plain, 0).expect("memory");
            memory.write(base, bytes.len()).expect("inside").copy_from_slice(bytes);
            base
        });
        let buffers = buffers.collect();
        Bench { memory, buffers, grid: 1, block: 32, dynamic: 0, dropped: Dropped::None }
    }

    /// A buffer that nobody wrote.
    pub fn unwritten(&mut self, bytes: usize) -> u64 {
        let base = self.memory.allocate(bytes, Kind::Plain, 0).expect("memory");
        self.buffers.push(base);
        base
    }

    pub fn run(&mut self, body: &str) -> Outcome {
        let function = function(&module(self.buffers.len(), body));
        let params: Vec<u8> = self.buffers.iter().flat_map(|at| at.to_le_bytes()).collect();
        let launch = Launch {
            function: &function,
            grid: [self.grid, 1, 1],
            block: [self.block, 1, 1],
            params: &params,
            dynamic_shared: self.dynamic,
            dropped: self.dropped,
        };
        vm::run(&launch, &mut self.memory, &mut Vec::new())
    }

    /// Runs a kernel that must have nothing wrong.
    pub fn clean(&mut self, body: &str) {
        let outcome = self.run(body);
        assert_eq!((outcome.result, outcome.warnings), (Ok(()), Vec::new()), "{body}");
    }

    /// What a kernel that goes wrong is told.
    pub fn fault(&mut self, body: &str) -> String {
        match self.run(body).result {
            Err(Stop::Fault(why) | Stop::Assert(why)) => why,
            Ok(()) => panic!("nothing was wrong with {body}"),
        }
    }

    /// What is noticed of a kernel that comes to its end.
    pub fn warning(&mut self, body: &str) -> String {
        let outcome = self.run(body);
        assert_eq!(outcome.result, Ok(()));
        outcome.warnings.join("; ")
    }

    pub fn bytes(&self, buffer: usize, len: usize) -> Vec<u8> {
        self.memory.read(self.buffers[buffer], len).expect("inside").0.to_vec()
    }

    pub fn words(&self, buffer: usize, count: usize) -> Vec<u32> {
        self.bytes(buffer, 4 * count).chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().expect("four"))).collect()
    }
}

pub fn words(values: impl IntoIterator<Item = u32>) -> Vec<u8> {
    values.into_iter().flat_map(u32::to_le_bytes).collect()
}

/// `%in` and `%out` are the first two buffers, `%at` and `%to` the thread's own word of them.
pub const PLACES: &str = "
    .reg .b32 %r<40>; .reg .f32 %f<40>; .reg .b64 %rd<40>; .reg .b16 %h<20>; .reg .pred %p<10>;
    .reg .b64 %in, %out, %at, %to; .reg .b32 %t;
    ld.param.u64 %in, [k_param_0]; ld.param.u64 %out, [k_param_1];
    mov.u32 %t, %tid.x; mul.wide.u32 %at, %t, 4; add.s64 %to, %out, %at; add.s64 %at, %in, %at;";

/// One instruction on up to 32 values of each operand; results and operands as bits.
pub fn compute(mnemonic: &str, result: &str, sources: &[&str], values: &[Vec<u64>]) -> Vec<u64> {
    let mut body = String::from(".reg .b64 %out, %in, %at; .reg .b32 %t; .reg .pred %p<9>; .reg .b32 %flag;\n");
    body +=
        "ld.param.u64 %in, [k_param_0]; ld.param.u64 %out, [k_param_1]; mov.u32 %t, %tid.x; mul.wide.u32 %at, %t, 8;\n";
    body += "add.s64 %in, %in, %at; add.s64 %out, %out, %at;\n";
    let mut operands = Vec::new();
    for (n, ty) in sources.iter().enumerate() {
        if *ty == "pred" {
            body += &format!(".reg .b32 %s{n}; ld.global.u32 %s{n}, [%in+{}]; setp.ne.u32 %p{n}, %s{n}, 0;\n", 256 * n);
            operands.push(format!("%p{n}"));
        } else {
            body += &format!(".reg .{ty} %s{n}; ld.global.{ty} %s{n}, [%in+{}];\n", 256 * n);
            operands.push(format!("%s{n}"));
        }
    }
    let bytes = match result {
        "pred" => {
            body += &format!(
                "{mnemonic} %p8, {};\nselp.u32 %flag, 1, 0, %p8;\nst.global.u32 [%out], %flag;\n",
                operands.join(", ")
            );
            4
        }
        ty => {
            body += &format!(".reg .{ty} %d;\n{mnemonic} %d, {};\nst.global.{ty} [%out], %d;\n", operands.join(", "));
            cuda_standin::ptx::Type::parse(ty).expect("a type").bytes()
        }
    };
    let count = values[0].len();
    let mut data = vec![0; 256 * sources.len()];
    for (n, values) in values.iter().enumerate() {
        for (lane, value) in values.iter().enumerate() {
            data[256 * n + 8 * lane..][..8].copy_from_slice(&value.to_le_bytes());
        }
    }
    let mut bench = Bench::new(&[data, vec![0; 256]]);
    bench.block = count as u32;
    bench.clean(&body);
    let read = |lane: usize| {
        let mut all = [0; 8];
        all[..bytes].copy_from_slice(&bench.bytes(1, 256)[8 * lane..][..bytes]);
        u64::from_le_bytes(all)
    };
    (0..count).map(read).collect()
}

/// Every pair of values, in batches of at most 32.
pub fn pairs(values: &[u64]) -> Vec<[Vec<u64>; 2]> {
    let all: Vec<(u64, u64)> = values.iter().flat_map(|&x| values.iter().map(move |&y| (x, y))).collect();
    all.chunks(32)
        .map(|chunk| [chunk.iter().map(|pair| pair.0).collect(), chunk.iter().map(|pair| pair.1).collect()])
        .collect()
}
