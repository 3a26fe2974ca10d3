//! Says what the core is built with, and compiles the device kernels to PTX if the `cuda` feature is on.

use std::env::var_os;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::{Command, exit};
use std::{fs, io};

const KERNELS: &str = "src/tensor/cuda";
/// The widths of tiles that the attention kernels are compiled for, each on its own: a driver compiles what a model
/// needs.
const WIDTHS: [u32; 6] = [32, 64, 80, 96, 128, 256];
/// What a core is made of: its own sources and those of its CPU kernels.
const SOURCES: [&str; 2] = ["src", "kernels/src"];
const LOCK: &str = "../Cargo.lock";

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    for folder in SOURCES {
        println!("cargo::rerun-if-changed={folder}");
    }
    for variable in ["NVCC", "CUDA_COMPUTE_CAP"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    fingerprint();
    if var_os("CARGO_FEATURE_CUDA").is_some() {
        compile_kernels();
    }
}

/// What a shared library must have in common with the runner that loads it: see `src/registry/plugin.rs`.
fn fingerprint() {
    let flags = variable("CARGO_ENCODED_RUSTFLAGS").replace('\x1f', " ");
    for (name, value) in [
        ("CANDLE", candle()),
        ("RUSTC", rustc()),
        ("TARGET", variable("TARGET")),
        ("PROFILE", profile()),
        ("OPT", variable("OPT_LEVEL")),
        ("FEATURES", variable("CARGO_CFG_FEATURE")),
        ("RUSTFLAGS", flags),
        ("CORE_SRC", sources().unwrap_or_else(|error| fail(&format!("cannot read the sources: {error}")))),
    ] {
        // A record separates its fields by `;`, and says something in each.
        let value = value.replace(';', ",");
        println!("cargo::rustc-env=TITER_{name}={}", if value.is_empty() { "none" } else { &value });
    }
}

/// The version of candle that the workspace is locked to.
fn candle() -> String {
    let Ok(lock) = fs::read_to_string(LOCK) else { return "unlocked".into() };
    println!("cargo::rerun-if-changed={LOCK}");
    let found = lock.split_once("name = \"candle-core\"\nversion = \"").and_then(|(_, rest)| rest.split('"').next());
    found.unwrap_or("unlocked").to_owned()
}

/// The compiler's version and commit.
fn rustc() -> String {
    let output = Command::new(variable("RUSTC")).arg("-vV").output();
    let text = output.map_or_else(|error| fail(&error.to_string()), |output| output.stdout);
    let text = String::from_utf8_lossy(&text);
    let line = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)).unwrap_or("unknown");
    format!("{} ({})", line("release: "), line("commit-hash: "))
}

/// The profile's folder, `<target>/<profile>/build/<package>/out`: its name, where cargo's own variable knows only two.
fn profile() -> String {
    let out = PathBuf::from(variable("OUT_DIR"));
    out.ancestors().nth(3).and_then(Path::file_name).unwrap_or_default().to_string_lossy().into_owned()
}

/// A hash of all sources, with their paths.
fn sources() -> io::Result<String> {
    let mut files = Vec::new();
    for folder in SOURCES {
        list(Path::new(folder), &mut files)?;
    }
    hash(files)
}

fn hash(mut files: Vec<PathBuf>) -> io::Result<String> {
    files.sort();
    let mut hasher = DefaultHasher::new();
    for file in files {
        (fs::read(&file)?, file).hash(&mut hasher);
    }
    Ok(format!("{:016x}", hasher.finish()))
}

fn list(folder: &Path, files: &mut Vec<PathBuf>) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() { list(&path, files)? } else { files.push(path) }
    }
    Ok(())
}

/// Compiles them to PTX, all at once. That takes longer than the crate itself, so it is done only if they changed.
fn compile_kernels() {
    let setting =
        |name: &str, default: &str| Some(variable(name)).filter(|set| !set.is_empty()).unwrap_or(default.into());
    let compiler = setting("NVCC", "nvcc");
    let architecture = format!("-arch=compute_{}", setting("CUDA_COMPUTE_CAP", "80"));
    let folder = PathBuf::from(variable("OUT_DIR"));
    let made_by = folder.join("kernels.made-by");
    let wanted = kernel_sources().unwrap_or_else(|error| fail(&format!("cannot read {KERNELS}: {error}")));
    let wanted = format!("{wanted} {compiler} {architecture}");
    if fs::read_to_string(&made_by).is_ok_and(|made_by| made_by == wanted) {
        return;
    }
    // What a failure leaves belongs to nobody.
    fs::write(&made_by, "").unwrap_or_else(|error| fail(&format!("cannot write {}: {error}", made_by.display())));
    let start = |source: &str, name: &str, width: u32| {
        let mut command = Command::new(&compiler);
        command.args(["--ptx", "-O3", "-std=c++17", &architecture, &format!("-DWIDTH={width}"), "-o"]);
        command.arg(folder.join(name)).arg(Path::new(KERNELS).join(source));
        match command.spawn() {
            Ok(child) => (source.to_owned(), child),
            Err(error) => {
                fail(&format!("cannot start {compiler}: {error}; install the CUDA toolkit, or set NVCC to its nvcc"))
            }
        }
    };
    let mut started = vec![start("kernels.cu", "kernels.ptx", 0)];
    started.extend(WIDTHS.map(|width| start("attention.cu", &format!("attention_{width}.ptx"), width)));
    for (source, mut child) in started {
        match child.wait() {
            Ok(status) if status.success() => {}
            Ok(status) => fail(&format!("{compiler} ended with {status} on {source}")),
            Err(error) => fail(&format!("{compiler} on {source}: {error}")),
        }
    }
    fs::write(&made_by, wanted).unwrap_or_else(|error| fail(&format!("cannot write {}: {error}", made_by.display())));
}

/// A hash of what the kernels are made of: CUDA, and this file.
fn kernel_sources() -> io::Result<String> {
    let mut files = vec![PathBuf::from("build.rs")];
    list(Path::new(KERNELS), &mut files)?;
    files.retain(|file| {
        !file.starts_with(KERNELS) || file.extension().is_some_and(|kind| kind == "cu" || kind == "cuh")
    });
    hash(files)
}

/// An environment variable; empty if it is not set.
fn variable(name: &str) -> String {
    var_os(name).unwrap_or_default().to_string_lossy().into_owned()
}

fn fail(message: &str) -> ! {
    println!("cargo::error={message}");
    exit(1)
}
