//! Compiles the device kernels to PTX, if the `cuda` feature is on.

use std::env::var_os;
use std::path::PathBuf;
use std::process::{Command, exit};

const SOURCE: &str = "src/ops/cuda/kernels.cu";

fn main() {
    println!("cargo::rerun-if-changed={SOURCE}");
    for variable in ["NVCC", "CUDA_COMPUTE_CAP"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    if var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    let ptx = PathBuf::from(var_os("OUT_DIR").unwrap_or_default()).join("kernels.ptx");
    let setting = |name: &str, default: &str| {
        var_os(name).map_or_else(|| default.to_owned(), |value| value.to_string_lossy().into_owned())
    };
    let compiler = setting("NVCC", "nvcc");
    let architecture = format!("-arch=compute_{}", setting("CUDA_COMPUTE_CAP", "80"));
    let run = Command::new(&compiler)
        .args(["--ptx", "-O3", "-std=c++17", &architecture, "-o"])
        .arg(&ptx)
        .arg(SOURCE)
        .status();
    match run {
        Ok(status) if status.success() => {}
        Ok(status) => fail(&format!("{compiler} ended with {status} on {SOURCE}")),
        Err(error) => {
            fail(&format!("cannot start {compiler}: {error}; install the CUDA toolkit, or set NVCC to its nvcc"));
        }
    }
}

fn fail(message: &str) -> ! {
    println!("cargo::error={message}");
    exit(1)
}
