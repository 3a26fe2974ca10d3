//! The user's wish to stop.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

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

    /// Asks to stop on Ctrl-C; a second one ends the process at once, which the store survives.
    ///
    /// # Errors
    /// The system does not allow a handler.
    pub fn on_ctrl_c(&self) -> Result<()> {
        let interrupt = self.clone();
        ctrlc::set_handler(move || {
            if interrupt.set() > 0 {
                std::process::exit(i32::from(Kind::Interrupted.exit_code()));
            }
            tracing::warn!("stopping after the current step; press Ctrl-C again to stop at once");
        })
        .map_err(|error| Error::run("cannot listen for Ctrl-C").source(error))
    }
}
