//! Every instruction that computes, against values that are calculated in another way.

mod support;

use cuda_standin::number::{Brain, Half};
use support::{compute, pairs};

const EDGES: [u64; 12] = [0, 1, 2, 5, 31, 0x7fff, 0x8000, 0xffff, 0x7fff_ffff, 0x8000_0000, 0xffff_fff0, 0xffff_ffff];
const WIDE: [u64; 8] = [0, 1, 7, 0xffff_ffff, 0x1_0000_0000, i64::MAX as u64, i64::MIN as u64, u64::MAX];
const FLOATS: [f32; 10] = [0.0, -0.0, 1.0, -2.5, 3.25, 1e-40, 1e30, -7.25e-3, f32::INFINITY, f32::NAN];

/// Checks an instruction of two operands on every pair.
fn check2(mnemonic: &str, result: &str, sources: [&str; 2], values: &[u64], expected: impl Fn(u64, u64) -> u64) {
    for [x, y] in pairs(values) {
        let found = compute(mnemonic, result, &sources, &[x.clone(), y.clone()]);
        for (lane, found) in found.into_iter().enumerate() {
            let expected = expected(x[lane], y[lane]);
            assert_eq!(
                found, expected,
                "{mnemonic} of {:#x} and {:#x}: {found:#x}, not {expected:#x}",
                x[lane], y[lane]
            );
        }
    }
}

fn check1(mnemonic: &str, result: &str, source: &str, values: &[u64], expected: impl Fn(u64) -> u64) {
    for chunk in values.chunks(32) {
        let found = compute(mnemonic, result, &[source], &[chunk.to_vec()]);
        for (x, found) in chunk.iter().zip(found) {
            let expected = expected(*x);
            assert_eq!(found, expected, "{mnemonic} of {x:#x}: {found:#x}, not {expected:#x}");
        }
    }
}

/// The value of bits as a type, in more bits than any has.
fn wide(bits: u64, ty: &str) -> i128 {
    match ty {
        "u16" => i128::from(bits as u16),
        "s16" => i128::from(bits as i16),
        "u32" => i128::from(bits as u32),
        "s32" => i128::from(bits as i32),
        "u64" => i128::from(bits),
        _ => i128::from(bits as i64),
    }
}

fn mask(ty: &str) -> u64 {
    match &ty[1..] {
        "16" => 0xffff,
        "32" => 0xffff_ffff,
        _ => u64::MAX,
    }
}

#[test]
fn integer_arithmetic() {
    for ty in ["u16", "s16", "u32", "s32", "u64", "s64"] {
        let values = if ty.ends_with("64") { &WIDE[..] } else { &EDGES[..] };
        let bits = u32::from(ty[1..].parse::<u8>().expect("a width"));
        let check = |name: &str, f: &dyn Fn(i128, i128) -> i128| {
            let expected = |x: u64, y: u64| f(wide(x, ty), wide(y, ty)) as u64 & mask(ty);
            check2(&format!("{name}.{ty}"), ty, [ty; 2], values, expected);
        };
        check("add", &|x, y| x + y);
        check("sub", &|x, y| x - y);
        check("mul.lo", &|x, y| x.wrapping_mul(y));
        check("mul.hi", &|x, y| {
            if ty == "u64" { ((x as u128).wrapping_mul(y as u128) >> 64) as i128 } else { x * y >> bits }
        });
        check("min", &|x, y| x.min(y));
        check("max", &|x, y| x.max(y));
        check("div", &|x, y| if y == 0 { -1 } else { x / y });
        check("rem", &|x, y| if y == 0 { x } else { x % y });
        if bits < 64 {
            let double = format!("{}{}", &ty[..1], 2 * bits);
            let product = |x: u64, y: u64| (wide(x, ty) * wide(y, ty)) as u64 & mask(&double);
            check2(&format!("mul.wide.{ty}"), &double, [ty; 2], values, product);
        }
        if ty.starts_with('s') {
            check1(&format!("abs.{ty}"), ty, ty, values, |x| wide(x, ty).unsigned_abs() as u64 & mask(ty));
            check1(&format!("neg.{ty}"), ty, ty, values, |x| (-wide(x, ty)) as u64 & mask(ty));
        }
    }
}

#[test]
fn sums_of_products() {
    for [x, y] in pairs(&EDGES) {
        let z: Vec<u64> = x.iter().map(|x| x ^ 0x1234_5678).collect();
        let run = |mnemonic: &str, ty: &str, third: &str| {
            compute(mnemonic, third, &[ty, ty, third], &[x.clone(), y.clone(), z.clone()])
        };
        let (low, high) = (run("mad.lo.s32", "s32", "s32"), run("mad.hi.u32", "u32", "u32"));
        let (signed, unsigned) = (run("mad.wide.s32", "s32", "s64"), run("mad.wide.u32", "u32", "u64"));
        for lane in 0..x.len() {
            let (a, b, c) = (x[lane], y[lane], z[lane]);
            let narrow = |value: i128| value as u32 as u64;
            assert_eq!(low[lane], narrow(wide(a, "s32") * wide(b, "s32") + wide(c, "s32")));
            assert_eq!(high[lane], narrow((i128::from(a) * i128::from(b) >> 32) + i128::from(c)));
            assert_eq!(signed[lane], (wide(a, "s32") * wide(b, "s32") + i128::from(c)) as u64);
            assert_eq!(unsigned[lane], (i128::from(a) * i128::from(b) + i128::from(c)) as u64);
        }
    }
}

#[test]
fn shifts_and_bits() {
    let amounts: Vec<u64> = EDGES.iter().map(|x| x % 70).chain([300, 0xffff_ffff]).collect();
    for ty in ["b16", "b32", "b64"] {
        let bits = ty[1..].parse::<u64>().expect("a width");
        for &amount in &amounts {
            let left = |x: u64| if amount >= bits { 0 } else { x << amount & mask(ty) };
            let right = |x: u64| if amount >= bits { 0 } else { (x & mask(ty)) >> amount };
            let arithmetic = |x: u64| (wide(x, &format!("s{bits}")) >> amount.min(bits - 1)) as u64 & mask(ty);
            let with_amount = |name: &str, ty: &str, expected: &dyn Fn(u64) -> u64| {
                let found = compute(name, ty, &[ty, "u32"], &[WIDE.to_vec(), vec![amount; WIDE.len()]]);
                assert_eq!(found, WIDE.iter().map(|&x| expected(x)).collect::<Vec<_>>(), "{name} by {amount}");
            };
            with_amount(&format!("shl.{ty}"), ty, &left);
            with_amount(&format!("shr.u{bits}"), ty, &right);
            with_amount(&format!("shr.s{bits}"), ty, &arithmetic);
        }
        for (name, f) in [("and", (|x, y| x & y) as fn(u64, u64) -> u64), ("or", |x, y| x | y), ("xor", |x, y| x ^ y)] {
            check2(&format!("{name}.{ty}"), ty, [ty; 2], &WIDE, |x, y| f(x, y) & mask(ty));
        }
        check1(&format!("not.{ty}"), ty, ty, &WIDE, |x| !x & mask(ty));
        if bits > 16 {
            check1(&format!("popc.{ty}"), "u32", ty, &WIDE, |x| (0..bits).filter(|n| x >> n & 1 == 1).count() as u64);
            check1(&format!("clz.{ty}"), "u32", ty, &WIDE, |x| {
                (0..bits).rev().take_while(|n| x >> n & 1 == 0).count() as u64
            });
            let reversed = |x: u64| (0..bits).fold(0, |r, n| r | (x >> n & 1) << (bits - 1 - n));
            check1(&format!("brev.{ty}"), ty, ty, &WIDE, reversed);
            let highest = |x: u64| (0..bits).rev().find(|n| x >> n & 1 == 1).unwrap_or(0xffff_ffff);
            check1(&format!("bfind.u{bits}"), "u32", &format!("u{bits}"), &WIDE, highest);
        }
    }
    check1("bfind.shiftamt.u32", "u32", "u32", &[1, 0x8000_0000, 0], |x| {
        [(1, 31), (0x8000_0000, 0)].iter().find(|p| p.0 == x).map_or(0xffff_ffff, |p| p.1)
    });
    check1("bfind.s32", "u32", "s32", &[0xffff_ffff, 0xffff_fff0, 5], |x| match x {
        5 => 2,
        0xffff_fff0 => 3,
        _ => 0xffff_ffff,
    });
}

#[test]
fn fields_permutations_and_tables() {
    let insert = |a, b, from, len| {
        compute("bfi.b32", "b32", &["b32", "b32", "u32", "u32"], &[vec![a], vec![b], vec![from], vec![len]])[0]
    };
    assert_eq!(insert(0xff, 0x1234_5678, 8, 8), 0x1234_ff78);
    assert_eq!(insert(0xff, 0x1234_5678, 28, 8), 0xf234_5678);
    assert_eq!(insert(0xff, 0x1234_5678, 8, 0), 0x1234_5678);
    assert_eq!(insert(0xabcd, 0, 0, 32), 0xabcd);
    let extract = |name: &str, x, from, len| {
        compute(name, &name[4..], &[&name[4..], "u32", "u32"], &[vec![x], vec![from], vec![len]])[0]
    };
    assert_eq!(extract("bfe.u32", 0x1234_5678, 8, 8), 0x56);
    assert_eq!(extract("bfe.s32", 0x1234_8678, 8, 8), 0xffff_ff86);
    assert_eq!(extract("bfe.s32", 0x8000_0000, 28, 8), 0xffff_fff8);
    assert_eq!(extract("bfe.u32", 0xffff_ffff, 0, 32), 0xffff_ffff);
    assert_eq!(extract("bfe.u64", 0x1234_5678_9abc_def0, 32, 16), 0x5678);
    let permute = |s| compute("prmt.b32", "b32", &["b32"; 3], &[vec![0x3322_1180], vec![0x7766_5544], vec![s]])[0];
    assert_eq!(permute(0x7531), 0x7755_3311);
    assert_eq!(permute(0x3210), 0x3322_1180);
    assert_eq!(permute(0x888c), 0xffff_ff00);
    for table in [0u32, 0x96, 0xe8, 0xca, 0xff, 0x01] {
        let (a, b, c) = (0xf0f0_1234u32, 0xcccc_00ff, 0xaaaa_5a5a);
        let body = format!(
            "{} mov.u32 %r1, {a}; mov.u32 %r2, {b}; mov.u32 %r3, {c}; lop3.b32 %r4, %r1, %r2, %r3, {table:#x}; st.global.u32 [%to], %r4;",
            support::PLACES
        );
        let mut bench = support::Bench::new(&[vec![0; 128], vec![0; 128]]);
        bench.clean(&body);
        let expected = (0..32).fold(0, |r, n| {
            let at = (a >> n & 1) << 2 | (b >> n & 1) << 1 | c >> n & 1;
            r | (table >> at & 1) << n
        });
        assert_eq!(bench.words(1, 1), [expected], "table {table:#x}");
    }
    let funnel = |name: &str, a, b, n| compute(name, "b32", &["b32", "b32", "u32"], &[vec![a], vec![b], vec![n]])[0];
    assert_eq!(funnel("shf.l.wrap.b32", 0x8000_0001, 0x1, 33), 0x3);
    assert_eq!(funnel("shf.l.clamp.b32", 0x8000_0001, 0x1, 33), 0x8000_0001);
    assert_eq!(funnel("shf.r.wrap.b32", 0x8000_0001, 0x1, 1), 0xc000_0000);
    assert_eq!(funnel("shf.r.clamp.b32", 0x8000_0001, 0x7, 40), 0x7);
    let dot = |name: &str, x, y| compute(name, "b32", &["b32"; 3], &[vec![x], vec![y], vec![10]])[0];
    assert_eq!(dot("dp4a.s32.s32", 0x01ff_02f0, 0x0303_0303), (10 + 3 * (2 - 16i64)) as u32 as u64);
    assert_eq!(dot("dp4a.u32.u32", 0x01ff_02fe, 0x0303_0303), 10 + 3 * (1 + 255 + 2 + 254));
    assert_eq!(dot("dp4a.u32.s32", 0xff, 0xff), (10 - 255i64) as u32 as u64);
}

/// A sum of 96 bits in words, as Philox and wide products are written.
#[test]
fn carries() {
    let body = format!(
        "{} ld.global.u32 %r1, [%in]; ld.global.u32 %r2, [%in+4]; ld.global.u32 %r3, [%in+8];
        add.cc.u32 %r4, %r1, 1; addc.cc.u32 %r5, %r2, 0; addc.u32 %r6, %r3, 0;
        st.global.u32 [%out], %r4; st.global.u32 [%out+4], %r5; st.global.u32 [%out+8], %r6;
        sub.cc.u32 %r7, %r4, 1; subc.cc.u32 %r8, %r5, 0; subc.u32 %r9, %r6, 0;
        st.global.u32 [%out+12], %r7; st.global.u32 [%out+16], %r8; st.global.u32 [%out+20], %r9;
        mad.lo.cc.u32 %r10, %r1, %r1, %r1; madc.hi.u32 %r11, %r1, %r1, 0;
        st.global.u32 [%out+24], %r10; st.global.u32 [%out+28], %r11;",
        support::PLACES
    );
    let mut bench = support::Bench::new(&[support::words([u32::MAX, u32::MAX, 5]), vec![0; 32]]);
    bench.block = 1;
    bench.clean(&body);
    let square = u64::from(u32::MAX) * u64::from(u32::MAX) + u64::from(u32::MAX);
    assert_eq!(bench.words(1, 8), [0, 0, 6, u32::MAX, u32::MAX, 5, square as u32, (square >> 32) as u32]);
}

fn bits(values: &[f32]) -> Vec<u64> {
    values.iter().map(|x| u64::from(x.to_bits())).collect()
}

fn float(bits: u64) -> f32 {
    f32::from_bits(bits as u32)
}

/// NaN is the same, whatever its bits.
fn same(found: f32, expected: f32, what: &str) {
    let equal = found.to_bits() == expected.to_bits() || found.is_nan() && expected.is_nan();
    assert!(equal, "{what}: {found:e}, not {expected:e}");
}

#[test]
fn float_arithmetic() {
    for [x, y] in pairs(&bits(&FLOATS)) {
        let run = |name: &str| compute(name, "f32", &["f32"; 2], &[x.clone(), y.clone()]);
        let flush = |x: f32| if x.is_subnormal() { 0f32.copysign(x) } else { x };
        let check = |name: &str, f: &dyn Fn(f32, f32) -> f32| {
            for (lane, found) in run(name).into_iter().enumerate() {
                let (a, b) = (float(x[lane]), float(y[lane]));
                same(float(found), f(a, b), &format!("{name} of {a:e} and {b:e}"));
            }
        };
        check("add.f32", &|a, b| a + b);
        check("sub.rn.f32", &|a, b| a - b);
        check("mul.f32", &|a, b| a * b);
        check("mul.ftz.f32", &|a, b| flush(flush(a) * flush(b)));
        check("div.rn.f32", &|a, b| a / b);
        check("copysign.f32", &|a, b| b.copysign(a));
        check("min.NaN.f32", &|a, b| if a.is_nan() || b.is_nan() { f32::NAN } else { a.min(b) });
        let number = |a: f32, b: f32, less: bool| {
            if b.is_nan() || !a.is_nan() && (a < b) == less { a } else { b }
        };
        for (lane, found) in run("max.f32").into_iter().enumerate() {
            assert!(
                float(found) == number(float(x[lane]), float(y[lane]), false)
                    || float(found).is_nan() && float(x[lane]).is_nan()
            );
        }
        for (lane, found) in run("min.f32").into_iter().enumerate() {
            assert!(
                float(found) == number(float(x[lane]), float(y[lane]), true)
                    || float(found).is_nan() && float(x[lane]).is_nan()
            );
        }
    }
    let fused =
        compute("fma.rn.f32", "f32", &["f32"; 3], &[bits(&[1.0000001]), bits(&[1.0000001]), bits(&[-1.0000002])]);
    let exact = f64::from(1.0000001f32) * f64::from(1.0000001f32) - f64::from(1.0000002f32);
    assert_eq!(float(fused[0]), exact as f32, "rounded once");
}

/// 1 + 2^-25 lies between 1 and the next f32.
#[test]
fn directions_of_rounding() {
    let tiny = 2f32.powi(-25);
    let run = |name: &str, x: f32, y: f32| float(compute(name, "f32", &["f32"; 2], &[bits(&[x]), bits(&[y])])[0]);
    assert_eq!([run("add.rn.f32", 1.0, tiny), run("add.rz.f32", 1.0, tiny), run("add.rm.f32", 1.0, tiny)], [1.0; 3]);
    assert_eq!(run("add.rp.f32", 1.0, tiny), 1f32.next_up());
    assert_eq!(run("sub.rm.f32", -1.0, tiny), -1f32.next_up());
    assert_eq!(run("mul.rp.f32", 1.0000001, 1.0000001), 1.0000002f32.next_up());
    let run = |name: &str| float(compute(name, "f32", &["f32"; 3], &[bits(&[1.0]), bits(&[1.0]), bits(&[-tiny])])[0]);
    assert_eq!([run("fma.rn.f32"), run("fma.rm.f32"), run("fma.rp.f32")], [1.0, 1f32.next_down(), 1.0]);
    let double = |name: &str, x: f64, y: f64| {
        f64::from_bits(compute(name, "f64", &["f64"; 2], &[vec![x.to_bits()], vec![y.to_bits()]])[0])
    };
    assert_eq!(double("add.rz.f64", -1.0, 1e-30), -1f64.next_down());
    assert_eq!(double("add.rn.f64", -1.0, 1e-30), -1.0);
}

#[test]
fn functions() {
    let close = |name: &str, inputs: &[f32], f: &dyn Fn(f64) -> f64| {
        let found = compute(name, "f32", &["f32"], &[bits(inputs)]);
        for (x, found) in inputs.iter().zip(found) {
            let (found, expected) = (f64::from(float(found)), f(f64::from(*x)));
            let good = found == expected
                || (found - expected).abs() <= 1e-7 * expected.abs()
                || found.is_nan() && expected.is_nan();
            assert!(good, "{name} of {x}: {found}, not {expected}");
        }
    };
    close("ex2.approx.ftz.f32", &[0.0, 1.0, -1.0, 0.5, 10.25, -200.0, 200.0], &|x| {
        if x < -126.0 { 0.0 } else { f64::from(2f64.powf(x) as f32) }
    });
    close("lg2.approx.f32", &[1.0, 2.0, 10.0, 0.0, -1.0], &|x| x.ln() / 2f64.ln());
    close("rcp.rn.f32", &[1.0, 3.0, -0.1], &|x| 1.0 / x);
    close("rsqrt.approx.f32", &[1.0, 4.0, 2.0], &|x| x.powf(-0.5));
    close("sqrt.rn.f32", &[2.0, 9.0, -1.0], &|x| x.powf(0.5));
    close("sin.approx.f32", &[0.0, 1.0, 3.0], &|x| x.sin());
    close("cos.approx.f32", &[0.0, 1.0, 3.0], &|x| x.cos());
    close("tanh.approx.f32", &[0.0, 0.5, -3.0], &|x| (x.exp() - (-x).exp()) / (x.exp() + (-x).exp()));
    close("abs.f32", &[-1.5, 2.0], &|x| if x < 0.0 { -x } else { x });
    close("neg.f32", &[-1.5, 2.0], &|x| 0.0 - x);
}

#[test]
fn numbers_of_16_bits() {
    let brain = |x: f32| u64::from(Brain::round(x).0);
    let half = |x: f32| u64::from(Half::round(x).0);
    let two = |low: u64, high: u64| high << 16 | low;
    let run = |name: &str, ty: &str, values: &[u64]| {
        compute(name, ty, &vec![ty; values.len()], &values.iter().map(|&x| vec![x]).collect::<Vec<_>>())[0]
    };
    // 1 + 2^-7 is the next bf16 after 1; 2^-8 decides nothing, and a little more goes up.
    assert_eq!(run("add.bf16", "b16", &[brain(1.0), brain(2f32.powi(-8))]), brain(1.0));
    assert_eq!(run("fma.rn.bf16", "b16", &[brain(1.0), brain(2f32.powi(-8)), brain(1.0)]), brain(1.0));
    assert_eq!(run("fma.rn.bf16", "b16", &[brain(1.0078125), brain(2f32.powi(-8)), brain(1.0)]), brain(1.0078125));
    let (a, b, c) = (two(brain(2.0), brain(-3.0)), two(brain(5.0), brain(0.5)), two(brain(1.0), brain(1.0)));
    assert_eq!(run("fma.rn.bf16x2", "b32", &[a, b, c]), two(brain(11.0), brain(-0.5)));
    assert_eq!(run("max.bf16x2", "b32", &[a, b]), two(brain(5.0), brain(0.5)));
    assert_eq!(run("neg.bf16x2", "b32", &[a]), two(brain(-2.0), brain(3.0)));
    let (a, b) = (two(half(2.0), half(-3.0)), two(half(5.0), half(0.5)));
    assert_eq!(run("mul.f16x2", "b32", &[a, b]), two(half(10.0), half(-1.5)));
    assert_eq!(run("add.f16x2", "b32", &[a, b]), two(half(7.0), half(-2.5)));
    assert_eq!(run("mul.f16", "b16", &[half(0.1), half(3.0)]), half(Half::round(0.1).wide() * 3.0));
}

#[test]
fn comparisons() {
    let names = ["eq", "ne", "lt", "le", "gt", "ge"];
    let holds = |name: &str, order: Option<std::cmp::Ordering>| match name {
        "eq" => order.is_some_and(|o| o.is_eq()),
        "ne" => order.is_some_and(|o| o.is_ne()),
        "lt" => order.is_some_and(|o| o.is_lt()),
        "le" => order.is_some_and(|o| o.is_le()),
        "gt" => order.is_some_and(|o| o.is_gt()),
        _ => order.is_some_and(|o| o.is_ge()),
    };
    for name in names {
        for ty in ["u16", "s16", "u32", "s32"] {
            let expected = |x, y| u64::from(holds(name, Some(wide(x, ty).cmp(&wide(y, ty)))));
            check2(&format!("setp.{name}.{ty}"), "pred", [ty; 2], &EDGES, expected);
        }
        let order = |x, y| float(x).partial_cmp(&float(y));
        check2(&format!("setp.{name}.f32"), "pred", ["f32"; 2], &bits(&FLOATS), |x, y| {
            u64::from(holds(name, order(x, y)))
        });
        let unordered = |x, y| u64::from(order(x, y).is_none() || holds(name, order(x, y)));
        check2(&format!("setp.{name}u.f32"), "pred", ["f32"; 2], &bits(&FLOATS), unordered);
        let one = |x, y| if holds(name, order(x, y)) { 0x3f80_0000 } else { 0 };
        check2(&format!("set.{name}.f32.f32"), "f32", ["f32"; 2], &bits(&FLOATS), one);
    }
    check2("setp.num.f32", "pred", ["f32"; 2], &bits(&FLOATS), |x, y| {
        u64::from(!float(x).is_nan() && !float(y).is_nan())
    });
    check2("setp.nan.f32", "pred", ["f32"; 2], &bits(&FLOATS), |x, y| {
        u64::from(float(x).is_nan() || float(y).is_nan())
    });
    check2("setp.lo.u32", "pred", ["u32"; 2], &EDGES, |x, y| u64::from(x < y));
    for (join, f) in [("and", (|a, b| a && b) as fn(bool, bool) -> bool), ("or", |a, b| a || b), ("xor", |a, b| a != b)]
    {
        let name = format!("setp.lt.{join}.s32");
        let found =
            compute(&name, "pred", &["s32", "s32", "pred"], &[vec![1, 1, 2, 2], vec![2, 2, 1, 1], vec![0, 1, 0, 1]]);
        let expected = [(true, false), (true, true), (false, false), (false, true)].map(|(a, b)| u64::from(f(a, b)));
        assert_eq!(found, expected, "{name}");
        let logic = compute(&format!("{join}.pred"), "pred", &["pred"; 2], &[vec![1, 1, 0, 0], vec![0, 1, 0, 1]]);
        assert_eq!(logic, expected, "{join}.pred");
    }
    assert_eq!(compute("not.pred", "pred", &["pred"], &[vec![0, 1]]), [1, 0]);
    let chosen = compute("selp.b64", "b64", &["b64", "b64", "pred"], &[vec![5; 2], vec![6; 2], vec![0, 1]]);
    assert_eq!(chosen, [6, 5]);
    assert_eq!(compute("testp.normal.f32", "pred", &["f32"], &[bits(&[1.0, 0.0, 1e-40])]), [1, 0, 0]);
}

#[test]
fn conversions() {
    let one = |name: &str, to: &str, from: &str, x: u64| compute(name, to, &[from], &[vec![x]])[0];
    let f = |x: f32| u64::from(x.to_bits());
    // Floats to integers: the direction, the range, and what is no number.
    for (name, x, expected) in [
        ("cvt.rni.s32.f32", 2.5, 2),
        ("cvt.rni.s32.f32", 3.5, 4),
        ("cvt.rzi.s32.f32", -2.7, -2),
        ("cvt.rmi.s32.f32", -2.1, -3),
        ("cvt.rpi.s32.f32", 2.1, 3),
        ("cvt.rzi.s32.f32", 1e20, i64::from(i32::MAX)),
        ("cvt.rzi.s32.f32", f32::NAN, 0),
    ] {
        assert_eq!(one(name, "s32", "f32", f(x)), expected as u32 as u64, "{name} of {x}");
    }
    assert_eq!(one("cvt.rzi.u32.f32", "u32", "f32", f(-5.0)), 0);
    assert_eq!(one("cvt.rzi.u64.f32", "u64", "f32", f(1e10)), 10_000_000_000);
    // Integers to floats.
    assert_eq!(one("cvt.rn.f32.s32", "f32", "s32", -7i32 as u32 as u64), f(-7.0));
    assert_eq!(one("cvt.rn.f32.u32", "f32", "u32", 16_777_217), f(16_777_216.0));
    assert_eq!(one("cvt.rp.f32.u32", "f32", "u32", 16_777_217), f(16_777_218.0));
    assert_eq!(one("cvt.rz.f32.u64", "f32", "u64", u64::MAX), f(18_446_742_974_197_923_840.0));
    assert_eq!(one("cvt.rn.f64.s64", "f64", "s64", -3i64 as u64), (-3f64).to_bits());
    // Between floats.
    assert_eq!(one("cvt.f64.f32", "f64", "f32", f(0.1)), f64::from(0.1f32).to_bits());
    assert_eq!(one("cvt.rn.f32.f64", "f32", "f64", 0.1f64.to_bits()), f(0.1));
    assert_eq!(one("cvt.rm.f32.f64", "f32", "f64", 0.1f64.to_bits()), f(0.1f32.next_down()));
    assert_eq!(one("cvt.rni.f32.f32", "f32", "f32", f(-2.5)), f(-2.0));
    assert_eq!(one("cvt.rmi.f32.f32", "f32", "f32", f(-2.5)), f(-3.0));
    assert_eq!(
        [one("cvt.sat.f32.f32", "f32", "f32", f(3.0)), one("cvt.sat.f32.f32", "f32", "f32", f(f32::NAN))],
        [f(1.0), f(0.0)]
    );
    assert_eq!(one("cvt.ftz.f64.f32", "f64", "f32", f(1e-40)), 0);
    // To 16 bits and back.
    assert_eq!(one("cvt.rn.bf16.f32", "b16", "f32", f(1.005)), u64::from(Brain::round(1.005).0));
    assert_eq!(one("cvt.rz.bf16.f32", "b16", "f32", f(1.9999)), 0x3fff);
    assert_eq!(one("cvt.rn.f16.f32", "b16", "f32", f(1.0005)), u64::from(Half::round(1.0005).0));
    assert_eq!(one("cvt.rz.f16.f32", "b16", "f32", f(1.9999)), 0x3fff);
    assert_eq!(one("cvt.f32.f16", "f32", "b16", 0x3555), f(0.333_251_95));
    assert_eq!(one("cvt.f32.bf16", "f32", "b16", 0x3f81), f(1.007_812_5));
    // A double that an f32 would round to a tie.
    let near_tie = 1.0 + 2f64.powi(-8) + 2f64.powi(-40);
    assert_eq!(one("cvt.rn.bf16.f64", "b16", "f64", near_tie.to_bits()), 0x3f81);
    // The first operand goes to the upper half.
    let pair = compute("cvt.rn.bf16x2.f32", "b32", &["f32"; 2], &[vec![f(2.0)], vec![f(1.0)]])[0];
    assert_eq!(pair, 0x4000_3f80);
    assert_eq!(compute("cvt.rn.relu.bf16x2.f32", "b32", &["f32"; 2], &[vec![f(-2.0)], vec![f(1.0)]])[0], 0x3f80);
    assert_eq!(compute("cvt.rn.f16x2.f32", "b32", &["f32"; 2], &[vec![f(2.0)], vec![f(1.0)]])[0], 0x4000_3c00);
    // Between integers: signs, widths, and the range.
    assert_eq!(one("cvt.s64.s32", "s64", "s32", 0xffff_fffe), -2i64 as u64);
    assert_eq!(one("cvt.u64.u32", "u64", "u32", 0xffff_fffe), 0xffff_fffe);
    assert_eq!(one("cvt.u32.u64", "u32", "u64", 0x1_0000_0005), 5);
    assert_eq!(one("cvt.s32.s8", "s32", "s32", 0x1f0), -16i32 as u32 as u64);
    assert_eq!(one("cvt.u32.u8", "u32", "u32", 0x1f0), 0xf0);
    assert_eq!(one("cvt.u16.u32", "u16", "u32", 0x1_2345), 0x2345);
    assert_eq!(one("cvt.sat.u8.s32", "u32", "s32", 300), 255);
    assert_eq!(one("cvt.sat.s8.s32", "s32", "s32", -300i32 as u32 as u64), -128i32 as u32 as u64);
}
