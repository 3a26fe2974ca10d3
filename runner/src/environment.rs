//! What libraries read from the environment: the number of threads, and when memory goes back to the system. And what
//! processor this is.

use std::process::Command;

/// The variables that candle and its matrix products read. They do so at every product; unset, that means reading
/// `/proc/cpuinfo` thousands of times a second.
const VARIABLES: [&str; 2] = ["RAYON_NUM_THREADS", "CANDLE_NUM_THREADS"];

/// The allocator keeps what the process freed: the next step asks for the same again, and pages that come back from the
/// system are zeroed first, which costs a step of a large model a sixth of its time.
const KEEP_MEMORY: (&str, &str) = ("MIMALLOC_PURGE_DELAY", "-1");

/// What the environment of a process must say, so that candle uses `threads` threads per stage. Empty if the user's own says
/// something about it.
pub fn variables(threads: usize) -> Vec<(&'static str, String)> {
    let given = |name: &str| std::env::var_os(name).is_some();
    if VARIABLES.iter().any(|name| given(name)) {
        return Vec::new();
    }
    let threads = VARIABLES.map(|name| (name, threads.to_string()));
    let memory = (!given(KEEP_MEMORY.0)).then(|| (KEEP_MEMORY.0, KEEP_MEMORY.1.to_owned()));
    threads.into_iter().chain(memory).collect()
}

/// Gives this process that environment.
///
/// A process cannot safely change its own environment, so it starts itself anew with the variables set. To be called
/// before any work; on systems that cannot do this, candle's default stays, which is only slower.
pub fn fix(threads: usize) {
    let variables = variables(threads);
    if variables.is_empty() {
        return;
    }
    let Ok(program) = std::env::current_exe() else { return };
    let mut again = Command::new(program);
    again.args(std::env::args_os().skip(1)).envs(variables);
    #[cfg(unix)]
    {
        let error = std::os::unix::process::CommandExt::exec(&mut again);
        tracing::debug!(%error, "the number of threads could not be fixed");
    }
}

/// The processor's name, where the system tells; else its architecture.
pub fn processor() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = text.lines().find(|line| line.starts_with("model name"));
    let name = line.and_then(|line| line.split_once(':')).map(|(_, name)| name.trim().to_owned());
    name.unwrap_or_else(|| std::env::consts::ARCH.to_owned())
}
