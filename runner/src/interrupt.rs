//! The user's wish to stop.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGXFSZ};
use signal_hook::flag;
use signal_hook::iterator::Signals;
use titer_core::{Error, Kind, Result};

/// The user's wish to stop, shared between threads.
#[derive(Debug, Clone, Default)]
pub struct Interrupt(Arc<AtomicUsize>);

impl Interrupt {
    /// Whether the user asked to stop.
    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed) > 0
    }

    /// Asks to stop. Says how often that was asked before.
    pub fn set(&self) -> usize {
        self.0.fetch_add(1, Ordering::Relaxed)
    }

    /// Asks to stop on Ctrl-C, and on the signals that end a process in good order; a second one ends it at once, which the
    /// store survives. A signal that whoever started the process had it ignore, as `nohup` does, stays ignored. A file that
    /// grows beyond the limit of its size is an error of writing, not the end of the process.
    ///
    /// # Errors
    /// The system does not allow a handler.
    pub fn on_signals(&self) -> Result<()> {
        let refused = |error| Error::run("cannot listen for Ctrl-C").source(error);
        let ignored = ignored(&std::fs::read_to_string("/proc/self/status").unwrap_or_default());
        let heard = [SIGINT, SIGTERM, SIGHUP].into_iter().filter(|signal| ignored & (1 << (signal - 1)) == 0);
        let mut signals = Signals::new(heard).map_err(refused)?;
        flag::register(SIGXFSZ, Arc::default()).map_err(refused)?;
        let interrupt = self.clone();
        let listen = move || {
            for _ in signals.forever() {
                if interrupt.set() > 0 {
                    std::process::exit(i32::from(Kind::Interrupted.exit_code()));
                }
                tracing::warn!("stopping after the current step; press Ctrl-C again to stop at once");
            }
        };
        std::thread::Builder::new().name("signals".into()).spawn(listen).map_err(refused)?;
        Ok(())
    }
}

/// The signals that a process ignores by its `/proc/self/status`: a bit each, that of signal 1 is the lowest.
fn ignored(status: &str) -> u64 {
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_that_nohup_ignores_are_seen() {
        let status = "Name:\ttiter\nSigBlk:\t0000000000000000\nSigIgn:\t0000000000001001\n";
        assert_eq!(ignored(status), 1 << (SIGHUP - 1) | 1 << 12);
        assert_eq!(ignored(""), 0);
    }
}
