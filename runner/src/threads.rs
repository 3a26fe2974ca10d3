//! How many threads candle computes with.

use std::process::Command;

/// The variables that candle and its matrix products read. They do so at every product; unset, that means reading
/// `/proc/cpuinfo` thousands of times a second.
const VARIABLES: [&str; 2] = ["RAYON_NUM_THREADS", "CANDLE_NUM_THREADS"];

/// Makes candle use `threads` threads per stage, unless the user's environment says otherwise.
///
/// A process cannot safely change its own environment, so it starts itself anew with the variables set. To be called
/// before any work; on systems that cannot do this, candle's default stays, which is only slower.
pub fn fix(threads: usize) {
    if VARIABLES.iter().any(|name| std::env::var_os(name).is_some()) {
        return;
    }
    let Ok(program) = std::env::current_exe() else { return };
    let mut again = Command::new(program);
    again.args(std::env::args_os().skip(1)).envs(VARIABLES.map(|name| (name, threads.to_string())));
    #[cfg(unix)]
    {
        let error = std::os::unix::process::CommandExt::exec(&mut again);
        tracing::debug!(%error, "the number of threads could not be fixed");
    }
}
