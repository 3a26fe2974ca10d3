//! Warps: what lanes tell each other, branches, barriers, memory of all spaces, matrix products; and everything that a kernel
//! can do wrong, each planted and named.

mod support;

use cuda_standin::number::{Brain, Half};
use cuda_standin::vm::Dropped;
use support::{Bench, PLACES, words};

/// A kernel of one warp that reads its word into `%r1` and writes `%r2`.
fn per_lane(code: &str, input: &[u32]) -> Vec<u32> {
    let mut bench = Bench::new(&[words(input.iter().copied()), vec![0; 128]]);
    bench.block = input.len() as u32;
    bench.clean(&format!("{PLACES} ld.global.u32 %r1, [%at]; {code} st.global.u32 [%to], %r2;"));
    bench.words(1, input.len())
}

fn lanes() -> Vec<u32> {
    (0..32).map(|lane| 100 + lane).collect()
}

#[test]
fn shuffles() {
    let run = |mode: &str, by: u32, clamp: u32| {
        per_lane(&format!("shfl.sync.{mode}.b32 %r2|%p1, %r1, {by}, {clamp}, -1;"), &lanes())
    };
    let expected = |f: &dyn Fn(u32) -> u32| (0..32).map(|lane| 100 + f(lane)).collect::<Vec<_>>();
    assert_eq!(run("bfly", 5, 31), expected(&|l| l ^ 5));
    assert_eq!(run("down", 3, 31), expected(&|l| if l + 3 < 32 { l + 3 } else { l }));
    assert_eq!(run("up", 3, 0), expected(&|l| if l >= 3 { l - 3 } else { l }));
    assert_eq!(run("idx", 7, 31), expected(&|_| 7));
    // Segments of 8 lanes.
    assert_eq!(run("down", 3, 0x181f), expected(&|l| if l % 8 + 3 < 8 { l + 3 } else { l }));
    assert_eq!(run("idx", 2, 0x181f), expected(&|l| l / 8 * 8 + 2));
    let found = per_lane("shfl.sync.down.b32 %r3|%p1, %r1, 30, 31, -1; selp.u32 %r2, 1, 0, %p1;", &lanes());
    assert_eq!(found[..3], [1, 1, 0]);
}

#[test]
fn votes_and_reductions() {
    let input: Vec<u32> = (0..32).map(|lane| lane * 7 % 5).collect();
    let bits = (0..32).filter(|lane| lane * 7 % 5 > 2).fold(0u32, |bits, lane| bits | 1 << lane);
    assert_eq!(per_lane("setp.gt.u32 %p1, %r1, 2; vote.sync.ballot.b32 %r2, %p1, -1;", &input), vec![bits; 32]);
    for (mode, code, expected) in [("any", "4", 0), ("any", "3", 1), ("all", "9", 0), ("uni", "9", 1), ("uni", "2", 0)]
    {
        let code =
            format!("setp.gt.u32 %p1, %r1, {code}; vote.sync.{mode}.pred %p2, %p1, -1; selp.u32 %r2, 1, 0, %p2;");
        assert_eq!(per_lane(&code, &input), vec![expected; 32], "{mode}");
    }
    let signed: Vec<u32> = (0..32i32).map(|lane| (lane * 13 % 32 - 10) as u32).collect();
    let fold = |f: fn(u32, u32) -> u32| vec![signed.iter().copied().reduce(f).expect("lanes"); 32];
    for (name, expected) in [
        ("add.u32", fold(u32::wrapping_add)),
        ("and.b32", fold(|x, y| x & y)),
        ("or.b32", fold(|x, y| x | y)),
        ("xor.b32", fold(|x, y| x ^ y)),
        ("min.u32", fold(u32::min)),
        ("max.u32", fold(u32::max)),
        ("min.s32", fold(|x, y| (x as i32).min(y as i32) as u32)),
        ("max.s32", fold(|x, y| (x as i32).max(y as i32) as u32)),
    ] {
        assert_eq!(per_lane(&format!("redux.sync.{name} %r2, %r1, -1;"), &signed), expected, "{name}");
    }
    let same = |value: u32| (0..32u32).filter(|&l| input[l as usize] == value).fold(0u32, |m, l| m | 1 << l);
    assert_eq!(
        per_lane("match.any.sync.b32 %r2, %r1, -1;", &input),
        input.iter().map(|&v| same(v)).collect::<Vec<_>>()
    );
    assert_eq!(per_lane("activemask.b32 %r2;", &input), vec![u32::MAX; 32]);
}

#[test]
fn branches_come_together_again() {
    // Odd lanes go one way, even ones another, and all meet at the shuffle.
    let code = "and.b32 %r3, %r1, 1; setp.eq.u32 %p1, %r3, 0; @%p1 bra EVEN; add.u32 %r4, %r1, 1000; bra JOIN;
        EVEN: add.u32 %r4, %r1, 2000; JOIN: shfl.sync.bfly.b32 %r2, %r4, 1, 31, -1;";
    let expected: Vec<u32> = (0..32u32).map(|l| 100 + (l ^ 1) + if l % 2 == 0 { 1000 } else { 2000 }).collect();
    assert_eq!(per_lane(code, &lanes()), expected);
    // Each lane goes round as often as its number says.
    let code = "mov.u32 %r2, 0; AGAIN: setp.ge.u32 %p1, %r2, %r1; @%p1 bra DONE; add.u32 %r2, %r2, 1; bra AGAIN; DONE:";
    assert_eq!(per_lane(code, &lanes()), lanes());
    // A guard keeps what was there; lanes that have left are not waited for.
    let code = "setp.lt.u32 %p1, %r1, 110; mov.u32 %r2, 5; @%p1 mov.u32 %r2, 6; @!%p1 add.u32 %r2, %r2, 2;";
    assert_eq!(per_lane(code, &lanes()), (0..32).map(|l| if l < 10 { 6 } else { 7 }).collect::<Vec<_>>());
}

#[test]
fn vectors_and_narrow_numbers() {
    let mut bench = Bench::new(&[words(0..128), vec![0; 512]]);
    bench.clean(&format!(
        "{PLACES} mul.wide.u32 %rd1, %t, 16; add.s64 %rd2, %in, %rd1; add.s64 %rd3, %out, %rd1;
        ld.global.nc.v4.u32 {{%r1, %r2, %r3, %r4}}, [%rd2]; st.global.v4.u32 [%rd3], {{%r4, %r3, %r2, %r1}};"
    ));
    let expected: Vec<u32> = (0..32).flat_map(|l| [4 * l + 3, 4 * l + 2, 4 * l + 1, 4 * l]).collect();
    assert_eq!(bench.words(1, 128), expected);
    let mut bench = Bench::new(&[vec![0xfe, 0x80, 0x01, 0x02, 0x03, 0x04, 0x05, 0x06], vec![0; 64]]);
    bench.block = 1;
    bench.clean(&format!(
        "{PLACES} ld.global.s8 %r1, [%in]; ld.global.u8 %r2, [%in]; ld.global.s16 %r3, [%in]; ld.global.u16 %h1, [%in+2];
        ld.global.v2.u8 {{%h2, %h3}}, [%in+4]; ld.global.s32 %rd1, [%in]; cvt.u32.u16 %r4, %h1; cvt.u32.u16 %r5, %h3;
        mov.b64 %rd2, {{%r1, %r2}}; mov.b64 {{%r6, %r7}}, %rd2; mov.b32 %r8, {{%h1, %h2}};
        st.global.u32 [%out], %r1; st.global.u32 [%out+4], %r2; st.global.u32 [%out+8], %r3; st.global.u32 [%out+12], %r4;
        st.global.u32 [%out+16], %r5; st.global.u64 [%out+24], %rd1; st.global.u32 [%out+32], %r7; st.global.u8 [%out+36], %r1;
        st.global.u32 [%out+40], %r8; st.global.u32 [%out+44], %rd1;"
    ));
    let words = bench.words(1, 12);
    assert_eq!(words[..5], [0xffff_fffe, 0xfe, 0xffff_80fe, 0x0201, 4]);
    assert_eq!(words[6..], [0x0201_80fe, 0, 0xfe, 0xfe, 0x0003_0201, 0x0201_80fe]);
}

#[test]
fn every_space_has_its_own_memory() {
    let mut bench = Bench::new(&[words(0..64), vec![0; 256]]);
    bench.block = 64;
    bench.dynamic = 256;
    // Local, static and dynamic shared memory, reached by their own instructions and by generic addresses.
    bench.clean(&format!(
        "{PLACES} .local .align 8 .b8 own[16]; .shared .align 4 .b8 all[256]; .reg .b64 %a, %b; .reg .b32 %s, %d;
        ld.global.u32 %r1, [%at]; mov.u64 %a, own; cvta.local.u64 %b, %a; st.u32 [%b+8], %r1; ld.local.u32 %r2, [%a+8];
        shl.b32 %r3, %t, 2; mov.u32 %s, all; add.s32 %s, %s, %r3; st.shared.u32 [%s], %r2;
        mov.u32 %d, pool; add.s32 %d, %d, %r3; st.shared.u32 [%d], %t; bar.sync 0;
        xor.b32 %r4, %r3, 128; mov.u32 %r5, all; add.s32 %r5, %r5, %r4; cvt.u64.u32 %rd1, %r5; cvta.shared.u64 %rd2, %rd1; ld.u32 %r6, [%rd2];
        mov.u32 %r7, pool; add.s32 %r7, %r7, %r4; ld.shared.u32 %r8, [%r7]; add.u32 %r9, %r6, %r8; st.global.u32 [%to], %r9;"
    ));
    assert_eq!(bench.words(1, 64), (0..64).map(|t| 2 * (t ^ 32)).collect::<Vec<_>>());
}

/// Each lane reads another parameter, by its address.
#[test]
fn parameters_have_addresses() {
    let mut bench = Bench::new(&[words(0..32), vec![0; 256]]);
    let expected: Vec<u32> =
        (0..32).flat_map(|lane| [bench.buffers[lane % 2] as u32, (bench.buffers[lane % 2] >> 32) as u32]).collect();
    bench.clean(&format!(
        "{PLACES} mov.b64 %rd1, k_param_0; and.b32 %r1, %t, 1; mul.wide.u32 %rd2, %r1, 8; add.s64 %rd1, %rd1, %rd2;
        ld.param.u64 %rd2, [%rd1]; mul.wide.u32 %rd3, %t, 8; add.s64 %rd3, %out, %rd3; st.global.u64 [%rd3], %rd2;"
    ));
    assert_eq!(bench.words(1, 64), expected);
}

#[test]
fn barriers_ask_all_threads() {
    let mut bench = Bench::new(&[words(0..96), vec![0; 12 * 96]]);
    bench.block = 96;
    bench.clean(&format!(
        "{PLACES} setp.gt.u32 %p1, %t, 40; bar.red.popc.u32 %r1, 0, %p1; bar.red.or.pred %p2, 0, %p1; bar.red.and.pred %p3, 0, %p1;
        selp.u32 %r2, 10, 0, %p2; selp.u32 %r3, 5, 0, %p3; add.u32 %r1, %r1, %r2; add.u32 %r1, %r1, %r3; st.global.u32 [%to], %r1;"
    ));
    assert_eq!(bench.words(1, 96), [55 + 10; 96]);
}

#[test]
fn atomic_operations() {
    let mut bench = Bench::new(&[words(0..32), words([0, 1000, 0, 0xff, 7, 0])]);
    bench.clean(&format!(
        "{PLACES} ld.global.u32 %r1, [%at]; red.global.add.u32 [%out], %r1; atom.global.min.u32 %r2, [%out+4], %r1;
        atom.global.max.s32 %r2, [%out+8], %r1; red.global.and.b32 [%out+12], 15; atom.global.cas.b32 %r2, [%out+16], 7, 9;
        atom.global.inc.u32 %r2, [%out+20], 9;"
    ));
    assert_eq!(bench.words(1, 6), [31 * 16, 0, 31, 15, 9, 2]);
    let mut bench = Bench::new(&[words(0..32), vec![0; 4]]);
    let told = bench.warning(&format!("{PLACES} atom.global.add.f32 %f1, [%out], 0f3F800000;"));
    assert!(told.contains("adds floats atomically"), "{told}");
    assert_eq!(f32::from_bits(bench.words(1, 1)[0]), 32.0);
}

/// A 16 x 16 matrix times one of 16 x 8, by rows and columns.
#[test]
fn matrix_products() {
    let a = |row: usize, k: usize| (row * 16 + k) as f32 * 0.125 - 7.0;
    let b = |k: usize, column: usize| k as f32 * 0.5 - column as f32;
    let c = |row: usize, column: usize| (row + 100 * column) as f32;
    for (name, round) in [("bf16", (|x| Brain::round(x).0) as fn(f32) -> u16), ("f16", |x| Half::round(x).0)] {
        let wide =
            |x: f32| if name == "bf16" { f64::from(Brain(round(x)).wide()) } else { f64::from(Half(round(x)).wide()) };
        for depth in [16, 8] {
            // A lies by rows and B by columns, so that a thread's pairs are neighbours.
            let pair = |x: f32, y: f32| u32::from(round(x)) | u32::from(round(y)) << 16;
            let mut data = Vec::new();
            for row in 0..16 {
                data.extend((0..depth / 2).map(|n| pair(a(row, 2 * n), a(row, 2 * n + 1))));
            }
            for column in 0..8 {
                data.extend((0..depth / 2).map(|n| pair(b(2 * n, column), b(2 * n + 1, column))));
            }
            for row in 0..16 {
                data.extend((0..8).map(|column| c(row, column).to_bits()));
            }
            let (words_of_a, words_of_b) = (16 * depth / 2, 8 * depth / 2);
            let mut code = format!("{PLACES} shr.u32 %r30, %t, 2; and.b32 %r31, %t, 3;\n");
            // The word at (row, column pair) of a part of the input.
            let mut load =
                |register: &str, start: usize, width: usize, row_add: usize, column: &str, column_add: usize| {
                    code += &format!(
                    "add.u32 %r32, %r30, {row_add}; mad.lo.s32 %r33, %r32, {width}, {column}; add.u32 %r33, %r33, {};
                    mul.wide.u32 %rd1, %r33, 4; add.s64 %rd2, %in, %rd1; ld.global.b32 {register}, [%rd2];\n",
                    start + column_add
                );
                };
            let (mut list_a, mut list_b) = (Vec::new(), Vec::new());
            for n in 0..depth / 4 {
                load(&format!("%r{}", 1 + n), 0, depth / 2, 8 * (n % 2), "%r31", 4 * (n / 2));
                list_a.push(format!("%r{}", 1 + n));
            }
            for n in 0..depth / 8 {
                load(&format!("%r{}", 10 + n), words_of_a, depth / 2, 0, "%r31", 4 * n);
                list_b.push(format!("%r{}", 10 + n));
            }
            code += "shl.b32 %r34, %r31, 1;\n";
            let mut load_c = |n: usize| {
                code += &format!(
                    "add.u32 %r32, %r30, {}; mad.lo.s32 %r33, %r32, 8, %r34; add.u32 %r33, %r33, {}; mul.wide.u32 %rd1, %r33, 4;
                    add.s64 %rd2, %in, %rd1; ld.global.f32 %f{n}, [%rd2];\n",
                    8 * (n / 2),
                    words_of_a + words_of_b + n % 2
                );
            };
            (0..4).for_each(&mut load_c);
            code += &format!(
                "mma.sync.aligned.m16n8k{depth}.row.col.f32.{name}.{name}.f32 {{%f0,%f1,%f2,%f3}}, {{{}}}, {{{}}}, {{%f0,%f1,%f2,%f3}};\n",
                list_a.join(","),
                list_b.join(",")
            );
            for n in 0..4 {
                code += &format!(
                    "add.u32 %r32, %r30, {}; mad.lo.s32 %r33, %r32, 8, %r34; add.u32 %r33, %r33, {}; mul.wide.u32 %rd1, %r33, 4;
                    add.s64 %rd2, %out, %rd1; st.global.f32 [%rd2], %f{n};\n",
                    8 * (n / 2),
                    n % 2
                );
            }
            let mut bench = Bench::new(&[words(data), vec![0; 4 * 128]]);
            bench.clean(&code);
            for (at, found) in bench.words(1, 128).into_iter().enumerate() {
                let (row, column) = (at / 8, at % 8);
                let sum: f64 = (0..depth).map(|k| wide(a(row, k)) * wide(b(k, column))).sum();
                let (found, expected) = (f64::from(f32::from_bits(found)), sum + f64::from(c(row, column)));
                assert!((found - expected).abs() < 1e-3, "{name} {depth} ({row}, {column}): {found}, not {expected}");
            }
            let why = bench.fault(&code.replace("mma.sync", "setp.lt.u32 %p1, %t, 31; @%p1 mma.sync"));
            assert!(why.contains("0x7fffffff"), "{why}");
        }
    }
}

#[test]
fn matrices_from_and_to_shared_memory() {
    let (rows, list) = (32u32, "{%r1,%r2,%r3,%r4}");
    // Row n of 8 halves is at 16 n; its halves are 8 n, 8 n + 1, …
    let input: Vec<u32> = (0..rows * 4).map(|n| 2 * n | (2 * n + 1) << 16).collect();
    for (trans, dotted) in [(false, ""), (true, ".trans")] {
        let mut bench = Bench::new(&[words(input.clone()), vec![0; 512]]);
        bench.dynamic = 512;
        bench.clean(&format!(
            "{PLACES} shl.b32 %r10, %t, 4; mov.u32 %r11, pool; add.u32 %r12, %r11, %r10; mul.wide.u32 %rd1, %t, 16;
            add.s64 %rd2, %in, %rd1; ld.global.v4.u32 {{%r5,%r6,%r7,%r8}}, [%rd2]; st.shared.v4.u32 [%r12], {{%r5,%r6,%r7,%r8}}; bar.warp.sync -1;
            ldmatrix.sync.aligned.m8n8.x4{dotted}.shared.b16 {list}, [%r12];
            add.s64 %rd3, %out, %rd1; st.global.v4.u32 [%rd3], {list};
            stmatrix.sync.aligned.m8n8.x4{dotted}.shared.b16 [%r12], {list}; bar.warp.sync -1; ld.shared.u32 %r20, [%r12]; sub.u32 %r20, %r20, %r5;
            setp.ne.u32 %p1, %r20, 0; @%p1 trap;"
        ));
        for (at, word) in bench.words(1, 128).into_iter().enumerate() {
            let (lane, matrix) = (at as u32 / 4, at as u32 % 4);
            let half = |i: u32| {
                let (row, column) = (lane / 4, 2 * (lane % 4) + i);
                let (row, column) = if trans { (column, row) } else { (row, column) };
                8 * (8 * matrix + row) + column
            };
            assert_eq!(word, half(0) | half(1) << 16, "lane {lane}, matrix {matrix}{dotted}");
        }
    }
    let mut bench = Bench::new(&[words(input), vec![0; 512]]);
    bench.dynamic = 512;
    let why = bench.fault(&format!(
        "{PLACES} mov.u32 %r5, pool; add.u32 %r5, %r5, 8; ldmatrix.sync.aligned.m8n8.x1.shared.b16 {{%r1}}, [%r5];"
    ));
    assert!(why.contains("misaligned"), "{why}");
}

const COPY: &str =
    "shl.b32 %r1, %t, 4; mov.u32 %r2, pool; add.u32 %r3, %r2, %r1; mul.wide.u32 %rd1, %t, 16; add.s64 %rd2, %in, %rd1;
    cp.async.cg.shared.global [%r3], [%rd2], 16;";

#[test]
fn copies_come_at_the_wait() {
    let bench = || {
        let mut bench = Bench::new(&[words(0..128), vec![0; 128]]);
        bench.dynamic = 1024;
        bench
    };
    let read = "ld.shared.u32 %r4, [%r3+4]; st.global.u32 [%to], %r4;";
    let mut good = bench();
    good.clean(&format!("{PLACES} {COPY} cp.async.commit_group; cp.async.wait_group 0; {read}"));
    assert_eq!(good.words(1, 32), (0..32).map(|t| 4 * t + 1).collect::<Vec<_>>());
    // The second group may still be on its way, the first is there.
    let second = "cp.async.ca.shared.global [%r3+512], [%rd2], 8; cp.async.commit_group;";
    good.clean(&format!(
        "{PLACES} {COPY} cp.async.commit_group; {second} cp.async.wait_group 1; {read} cp.async.wait_all;"
    ));
    let late = format!(
        "{PLACES} {COPY} cp.async.commit_group; {second} cp.async.wait_group 1; ld.shared.u32 %r4, [%r3+512]; st.global.u32 [%to], %r4;"
    );
    assert!(bench().warning(&late).contains("reads shared memory that nobody wrote"));
    let none = bench().warning(&format!("{PLACES} {COPY} {read}"));
    assert!(none.contains("reads shared memory that nobody wrote"), "{none}");
    // Not committed, so not waited for.
    assert!(!bench().warning(&format!("{PLACES} {COPY} cp.async.wait_group 0; {read}")).is_empty());
    // A part is read, the rest is zero.
    let part = COPY.replace("[%rd2], 16;", "[%rd2], 16, 4;");
    let mut zero = bench();
    zero.clean(&format!("{PLACES} {part} cp.async.wait_all; {read}"));
    assert_eq!(zero.words(1, 32), [0; 32]);
    // Another warp sees it after a barrier only.
    let mut two = Bench::new(&[words(0..256), vec![0; 256]]);
    (two.block, two.dynamic) = (64, 1024);
    let across = "xor.b32 %r5, %r1, 512; add.u32 %r6, %r2, %r5; ld.shared.u32 %r4, [%r6]; st.global.u32 [%to], %r4;";
    two.clean(&format!("{PLACES} {COPY} cp.async.wait_all; bar.sync 0; {across}"));
    assert!(two.warning(&format!("{PLACES} {COPY} cp.async.wait_all; {across}")).contains("race"));
}

#[test]
fn wrong_addresses_are_named() {
    let mut bench = Bench::new(&[words(0..32), vec![0; 128]]);
    let past = bench.fault(&format!("{PLACES} ld.global.u32 %r1, [%at+4]; st.global.u32 [%to], %r1;"));
    assert!(past.contains("4 bytes past allocation 1 of 128 bytes") && past.contains("lane 31"), "{past}");
    assert!(past.contains("`ld.global.u32 %r1, [%at+4]` of kernel k, block [0, 0, 0], warp 0"), "{past}");
    assert!(bench.fault(&format!("{PLACES} st.global.u32 [%to+128], %t;")).contains("past allocation 2"));
    assert!(bench.fault(&format!("{PLACES} ld.global.u32 %r1, [%at+2];")).contains("misaligned: 4 bytes"));
    assert!(
        bench
            .fault(&format!("{PLACES} ld.global.v4.u32 {{%r1,%r2,%r3,%r4}}, [%in+8];"))
            .contains("misaligned: 16 bytes")
    );
    assert!(bench.fault(&format!("{PLACES} ld.shared.u32 %r1, [pool];")).contains("shared memory, which has 0"));
    let local = format!("{PLACES} .local .align 4 .b8 own[8]; mov.u64 %rd1, own; ld.local.u32 %r1, [%rd1+8];");
    assert!(bench.fault(&local).contains("local memory, which has 8"));
    let freed = bench.buffers[0];
    bench.memory.free(freed, "the test").expect("alive");
    assert!(bench.fault(&format!("{PLACES} ld.global.u32 %r1, [%at];")).contains("use after free"));
}

#[test]
fn unwritten_memory_is_noticed() {
    let mut bench = Bench::new(&[words(0..32), vec![0; 128]]);
    bench.unwritten(128);
    let body = format!("{PLACES} ld.param.u64 %rd1, [k_param_2]; ld.global.u32 %r1, [%rd1]; st.global.u32 [%to], %r1;");
    assert!(bench.warning(&body).contains("reads memory that nobody wrote: `ld.global.u32 %r1, [%rd1]`"));
    let body = format!("{PLACES} ld.shared.u32 %r1, [pool]; st.global.u32 [%to], %r1;");
    bench.dynamic = 4;
    assert!(bench.warning(&body).contains("reads shared memory that nobody wrote"));
}

const SHARE: &str = "shl.b32 %r1, %t, 2; mov.u32 %r2, pool; add.u32 %r3, %r2, %r1; st.shared.u32 [%r3], %t;";
const TAKE: &str = "xor.b32 %r4, %r1, 128; add.u32 %r5, %r2, %r4; ld.shared.u32 %r6, [%r5]; st.global.u32 [%to], %r6;";

#[test]
fn races_are_noticed() {
    let mut bench = Bench::new(&[words(0..64), vec![0; 256]]);
    (bench.block, bench.dynamic) = (64, 256);
    let good = format!("{PLACES} {SHARE} bar.sync 0; {TAKE}");
    bench.clean(&good);
    let race = bench.warning(&format!("{PLACES} {SHARE} {TAKE}"));
    assert!(race.contains("race: shared memory at 0 is read by warp 1 and written by warp 0"), "{race}");
    bench.dropped = Dropped::All;
    assert!(bench.warning(&good).contains("race"));
    bench.dropped = Dropped::One(0);
    assert!(bench.warning(&good).contains("race"));
    bench.dropped = Dropped::One(1);
    bench.clean(&good);
}

#[test]
fn wrong_barriers_and_shuffles_are_named() {
    let mut bench = Bench::new(&[words(0..64), vec![0; 256]]);
    bench.block = 64;
    let apart = "setp.lt.u32 %p1, %t, 16; @%p1 bra A; bar.sync 0; bra B; A: bar.sync 0; B:";
    let why = bench.fault(&format!("{PLACES} {apart}"));
    assert!(why.contains("lanes of one warp wait at different instructions"), "{why}");
    let told = bench.warning(&format!("{PLACES} {}", apart.replace("16", "32")));
    assert!(told.contains("2 different barriers"), "{told}");
    let why = bench.fault(&format!("{PLACES} setp.lt.u32 %p1, %t, 32; @%p1 bra A; bar.sync 1; A: bar.sync 0;"));
    assert!(why.contains("warps wait for each other"), "{why}");
    let why =
        bench.fault(&format!("{PLACES} setp.lt.u32 %p1, %t, 16; @!%p1 exit; shfl.sync.bfly.b32 %r1, %t, 1, 31, -1;"));
    assert!(why.contains("lanes 0xffffffff are to meet, and only 0x0000ffff do"), "{why}");
    bench.clean(&format!("{PLACES} setp.lt.u32 %p1, %t, 16; @!%p1 exit; shfl.sync.bfly.b32 %r1, %t, 1, 31, 0xffff;"));
}

#[test]
fn what_is_unknown_is_named() {
    let mut bench = Bench::new(&[words(0..32), vec![0; 128]]);
    let why = bench.fault(&format!("{PLACES} sad.u32 %r1, %t, %t, %t;"));
    assert!(why.contains("unknown to the stand-in (instruction sad.u32)") && why.contains("of kernel k"), "{why}");
    let why = bench.fault(&format!("{PLACES} add.sat.s32 %r1, %t, %t;"));
    assert!(why.contains("modifier .sat of add"), "{why}");
    // Where it is not executed, it does no harm.
    bench.clean(&format!("{PLACES} setp.gt.u32 %p1, %t, 99; @%p1 sad.u32 %r1, %t, %t, %t;"));
    assert!(bench.fault(&format!("{PLACES} trap;")).contains("the kernel trapped"));
}

#[test]
fn blocks_know_where_they_are() {
    let mut bench = Bench::new(&[words([0]), vec![0; 4 * 6 * 32]]);
    bench.grid = 6;
    bench.clean(&format!(
        "{PLACES} mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ntid.x; mad.lo.s32 %r3, %r1, %r2, %t; mul.wide.u32 %rd1, %r3, 4; add.s64 %rd2, %out, %rd1;
        mov.u32 %r4, %nctaid.x; mov.u32 %r5, %laneid; mad.lo.s32 %r6, %r3, %r4, %r5; st.global.u32 [%rd2], %r6;"
    ));
    assert_eq!(bench.words(1, 192), (0..192).map(|n| 6 * n + n % 32).collect::<Vec<_>>());
}
