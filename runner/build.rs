//! Tells a runner that loads plugins where to find the shared core and the shared standard library: beside itself, in
//! `lib` beside itself, or in the toolchain that built it. And links its allocator.

use std::env::var_os;
use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    if var_os("CARGO_FEATURE_DYNAMIC").is_none() {
        return;
    }
    let rustc = var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let target = var_os("TARGET").unwrap_or_default();
    let output = Command::new(rustc).args(["--print", "target-libdir", "--target"]).arg(target).output();
    let toolchain = output.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned());
    for folder in ["$ORIGIN", "$ORIGIN/lib", toolchain.as_deref().unwrap_or_default()] {
        println!("cargo::rustc-link-arg-bins=-Wl,-rpath,{folder}");
    }
    // Nothing in the program itself asks for it, so the linker would leave the allocator out.
    println!("cargo::rustc-link-arg-bins=-Wl,--undefined=malloc");
}
