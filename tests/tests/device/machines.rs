//! Other machines: generations of GPUs, drivers, memory, missing libraries, several devices. What cannot work says so, and
//! what to do.

use std::path::Path;
use std::process::Output;

use anyhow::{Context, Result, ensure};
use titer_tests::cli::{small, stderr, titer};

use crate::standin::{DEVICE, alone, standin_folder};

/// Fails unless a test passes on a machine that differs in these variables.
fn passes(test: &str, variables: &[(&str, &str)]) -> Result<()> {
    let output = alone(test, variables)?;
    ensure!(output.status.success(), "{variables:?}: {}", stderr(&output));
    Ok(())
}

/// Fails unless kernels and products run on such a machine.
fn works(variables: &[(&str, &str)]) -> Result<()> {
    ["operators::losses", "operators::products"].into_iter().try_for_each(|test| passes(test, variables))
}

/// One training step by the real binary on such a machine.
fn step(device: &str, variables: &[(&str, &str)]) -> Result<Output> {
    let mut command = titer();
    command.args(["bench", "step", "--model", "quickstart", "--repeat", "1", "--device", device]);
    Ok(command.envs(variables.iter().copied()).output()?)
}

/// Fails unless the machine is refused with exit code 4, all of `expected`, and a remedy.
fn is_refused(device: &str, variables: &[(&str, &str)], expected: &[&str]) -> Result<()> {
    let output = step(device, variables)?;
    let said = stderr(&output);
    let told = expected.iter().all(|text| said.contains(text)) && said.contains("help: ");
    let code = output.status.code().context("an exit code")?;
    ensure!(code == 4 && told, "{variables:?}: {code} instead of 4 with {expected:?}: {said}");
    Ok(())
}

/// What `titer doctor` says of such a machine.
fn doctor(variables: &[(&str, &str)]) -> Result<String> {
    let output = titer().arg("doctor").envs(variables.iter().copied()).output()?;
    ensure!(output.status.success(), "{}", stderr(&output));
    Ok(format!("{}{}", String::from_utf8_lossy(&output.stdout), stderr(&output)))
}

/// Puts the stand-in into `folder` under these names.
fn install(folder: &Path, names: &[&str]) -> Result<()> {
    let standin = std::fs::canonicalize(standin_folder()?.join("libcuda.so.1"))?;
    std::fs::create_dir_all(folder)?;
    names.iter().try_for_each(|name| Ok(std::os::unix::fs::symlink(&standin, folder.join(name))?))
}

#[test]
#[ignore = "needs the stand-in: see .ci/device"]
fn every_generation_from_8_0_on_works() -> Result<()> {
    ["8.0", "8.6", "8.9", "9.0", "10.0"].into_iter().try_for_each(|chip| works(&[("STANDIN_CC", chip)]))
}

/// These have the least shared memory.
#[test]
#[ignore = "needs the stand-in: see .ci/device"]
fn the_widest_heads_fit_into_8_6() -> Result<()> {
    passes("attention::head_sizes", &[("STANDIN_CC", "8.6")])
}

#[test]
#[ignore = "needs the stand-in: see .ci/device"]
fn an_older_generation_is_refused() -> Result<()> {
    is_refused("cuda", &[("STANDIN_CC", "7.5")], &["compute capability", "7.5", "8.0"])
}

#[test]
#[ignore = "needs the stand-in: see .ci/device"]
fn drivers_since_525_work_and_older_ones_are_refused() -> Result<()> {
    // A driver of CUDA 12 takes libraries of CUDA 12 only.
    let folder = tempfile::tempdir()?;
    install(folder.path(), &["libcuda.so.1", "libcublas.so.12", "libcublasLt.so.12", "libcurand.so.10"])?;
    let at = folder.path().to_str().context("a path")?;
    works(&[("LD_LIBRARY_PATH", at), ("STANDIN_DRIVER", "12000")])?;
    is_refused("cuda", &[("STANDIN_DRIVER", "11080")], &["driver", "11.8", "525"])
}

#[test]
#[ignore = "needs the stand-in: see .ci/device"]
fn without_cublas_the_reason_is_told() -> Result<()> {
    let folder = tempfile::tempdir()?;
    install(folder.path(), &["libcuda.so.1", "libcurand.so.10"])?;
    let variables = [("LD_LIBRARY_PATH", folder.path().to_str().context("a path")?)];
    is_refused("cuda", &variables, &["libcublas.so.13: cannot open shared object file"])?;
    // `auto` goes on with the CPU, and does not hide why.
    let said = doctor(&variables)?;
    ensure!(said.contains("libcublas.so"), "{said}");
    Ok(())
}

/// The driver lies where the loader finds it, the libraries in a Python environment, in the folders of CUDA 12 or 13.
#[test]
#[ignore = "needs the stand-in: see .ci/device"]
fn libraries_are_found_in_python_environments() -> Result<()> {
    for (driver, folders, major) in [("12080", ["cublas", "curand"], 12), ("13000", ["cu13", "cu13"], 13)] {
        let folder = tempfile::tempdir()?;
        let packages = folder.path().join("lib/python3.12/site-packages/nvidia");
        let [blas, rand] = folders.map(|name| packages.join(name).join("lib"));
        install(folder.path(), &["libcuda.so.1"])?;
        install(&blas, &[&format!("libcublas.so.{major}"), &format!("libcublasLt.so.{major}")])?;
        install(&rand, &["libcurand.so.10"])?;
        let at = folder.path().to_str().context("a path")?;
        works(&[("LD_LIBRARY_PATH", at), ("VIRTUAL_ENV", at), ("STANDIN_DRIVER", driver)])?;
    }
    Ok(())
}

#[test]
#[ignore = "needs the stand-in: see .ci/device"]
fn without_a_driver_the_reason_is_told() -> Result<()> {
    let variables = [("LD_LIBRARY_PATH", "")];
    is_refused("cuda", &variables, &["libcuda.so.1"])?;
    let said = doctor(&variables)?;
    ensure!(said.contains("no driver is installed"), "{said}");
    Ok(())
}

#[test]
#[ignore = "needs the stand-in: see .ci/device"]
fn a_device_is_chosen_by_its_number() -> Result<()> {
    works(&[("STANDIN_DEVICES", "2"), (DEVICE, "cuda:1")])?;
    is_refused("cuda:2", &[("STANDIN_DEVICES", "2")], &["cuda:2"])
}

/// The step asks for some megabytes.
#[test]
#[ignore = "needs the stand-in: see .ci/device"]
fn too_little_memory_is_told_with_a_remedy() -> Result<()> {
    is_refused("cuda", &[("STANDIN_MEMORY", "1000000")], &["memory", "batch_size", "checkpointing"])
}

#[test]
#[ignore = "needs the stand-in: see .ci/device"]
fn doctor_lists_the_devices() -> Result<()> {
    let said = doctor(&[("STANDIN_DEVICES", "2"), ("STANDIN_CC", "8.6"), ("STANDIN_MEMORY", "1073741824")])?;
    let listed = |index| format!("cuda:{index} CUDA stand-in 8.6, compute capability 8.6, 1024 MiB");
    ensure!(said.contains(&listed(0)) && said.contains(&listed(1)), "{said}");
    Ok(())
}

/// A run leaves the device to its workers: where it serves one process at a time, they could not open it otherwise. Several
/// cannot, and are told why.
#[test]
#[ignore = "needs the stand-in: see .ci/device"]
fn a_device_may_serve_one_process_at_a_time() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let lock = folder.path().join("lock");
    let held = std::fs::File::create(&lock)?;
    let exclusive = [("STANDIN_EXCLUSIVE", lock.to_str().context("a path")?)];
    let config = small(folder.path(), &[("steps = 40, batch_size = 4", "steps = 2, batch_size = 2")]);
    let mut command = titer();
    command
        .args(["pretrain", "--device", "cuda", "--store"])
        .arg(folder.path().join("store"))
        .arg(&config)
        .envs(exclusive);
    let output = command.output()?;
    ensure!(output.status.success(), "{}", stderr(&output));
    held.lock()?;
    is_refused("cuda", &exclusive, &["cannot be opened", "nvidia-smi"])
}

/// They would share one handle of cuBLAS.
#[test]
#[ignore = "needs the stand-in: see .ci/device"]
fn several_jobs_in_one_process_are_refused() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let config = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/quickstart.toml");
    let mut command = titer();
    command.arg("run").arg(config).args(["--device", "cuda", "--in-process", "--jobs", "2"]);
    command.arg("--store").arg(folder.path()).arg("--out").arg(folder.path().join("out"));
    let output = command.output()?;
    let said = stderr(&output);
    ensure!(output.status.code() == Some(2) && said.contains("several jobs in one process"), "{said}");
    Ok(())
}
