//! `titer doctor`.

use std::fmt::Write;
use std::path::PathBuf;

use titer_core::arithmetic::{self, Arithmetic};
use titer_core::device::{DeviceChoice, gpus};
use titer_core::registry::all;
use titer_core::{DefenseEntry, JudgeEntry, ModelEntry, Result, TaskEntry};

use super::Done;
use crate::diagnostics::Problems;
use crate::disk;
use crate::driver::cuda_driver_version;
use crate::store::Store;

/// The arguments.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// The folder of the stage store.
    #[arg(long, value_name = "DIR")]
    pub store: Option<PathBuf>,
}

/// Reports on the machine.
///
/// # Errors
/// Two plugins of a kind share a name.
pub fn run(args: &Args) -> Result<Done, Problems> {
    let root = args.store.clone().unwrap_or_else(Store::default_root);
    let (store, code) = match usable(&root) {
        Ok(bytes) => (format!("{}, writable, {}", root.display(), gib(bytes)), 0),
        Err(error) => (format!("{}: {error}", root.display()), error.kind().exit_code()),
    };
    let cuda = match (cfg!(feature = "cuda"), cuda_driver_version()) {
        (true, Some(version)) => format!("built in; the driver supports {version}"),
        (true, None) => "built in, but no driver is installed: only the CPU can be used".into(),
        (false, Some(version)) => {
            format!("not built in, though the driver supports {version}: build with `--features cuda` to use it")
        }
        (false, None) => "not built in; no driver is installed".into(),
    };
    let cores = std::thread::available_parallelism().map_or_else(|_| "unknown".into(), |cores| cores.to_string());
    let identity = |arithmetic| arithmetic::identity(arithmetic, DeviceChoice::Cpu);
    let gpus = gpus();
    let plugins = format!(
        "{} defenses, {} models, {} tasks, {} judges",
        all::<DefenseEntry>()?.len(),
        all::<ModelEntry>()?.len(),
        all::<TaskEntry>()?.len(),
        all::<JudgeEntry>()?.len()
    );
    let lines = [
        ("titer", env!("CARGO_PKG_VERSION").to_owned()),
        ("system", format!("{} {}", std::env::consts::OS, std::env::consts::ARCH)),
        ("cores", cores),
        ("memory", memory().unwrap_or_else(|| "unknown".into())),
        ("cuda", cuda),
        ("gpus", if gpus.is_empty() { "none that can be used".to_owned() } else { gpus.join("\n             ") }),
        ("device auto", DeviceChoice::of("auto")?.to_string()),
        ("arithmetic", format!("{}; {}", identity(Arithmetic::Portable), identity(Arithmetic::Native))),
        ("plugins", plugins),
        ("store", store),
    ];
    let mut text = String::new();
    for (what, value) in lines {
        let _ = writeln!(text, "{what:<12} {value}");
    }
    Ok(Done { text, code })
}

/// The store's size, if files can be written to it.
fn usable(root: &std::path::Path) -> Result<u64> {
    let store = Store::open(root)?;
    let probe = root.join(format!("probe-{}", std::process::id()));
    disk::replace(&probe, b"")?;
    disk::remove(&probe)?;
    Ok(store.size())
}

/// Total and available memory, where the system tells.
fn memory() -> Option<String> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let bytes = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        line.split_whitespace().next()?.parse::<u64>().ok().map(|kib| kib * 1024)
    };
    Some(format!("{}, {} available", gib(bytes("MemTotal:")?), gib(bytes("MemAvailable:")?)))
}

fn gib(bytes: u64) -> String {
    format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30))
}
