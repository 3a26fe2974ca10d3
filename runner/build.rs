//! Says which commit the runner is built from. Tells a runner that loads plugins where to find the shared core and the
//! shared standard library: beside itself, in `lib` beside itself, or in the toolchain that built it. And links its
//! allocator.

use std::env::var_os;
use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    commit();
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

/// Sets `CHECKOUT_COMMIT` (`cargo run` sets it for the program too, for which a name with `TITER_` is a key of the
/// configuration) to the commit of this checkout, with `-dirty` if sources were changed since. Without git, as in a
/// copy of the sources, it stays unset.
fn commit() {
    for sources in ["src", "../core/src", "../core/kernels/src", "../plugins/src"] {
        println!("cargo::rerun-if-changed={sources}");
    }
    // Every commit and checkout adds a line to this file.
    if let Some(log) = git(&["rev-parse", "--git-path", "logs/HEAD"]) {
        println!("cargo::rerun-if-changed={log}");
    }
    if let Some(commit) = git(&["rev-parse", "HEAD"]) {
        let changed = git(&["status", "--porcelain", "--untracked-files=no", "..", "."]);
        let dirty = if changed.is_none_or(|changed| changed.is_empty()) { "" } else { "-dirty" };
        println!("cargo::rustc-env=CHECKOUT_COMMIT={commit}{dirty}");
    }
}

fn git(arguments: &[&str]) -> Option<String> {
    let output = Command::new("git").args(arguments).output().ok().filter(|output| output.status.success())?;
    Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}
