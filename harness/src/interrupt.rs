//! Ctrl-C: the first asks a run to end after its step, a second ends the process at once.

use anyhow::{Context, Result};
use std::sync::Once;
use std::sync::atomic::{AtomicBool, Ordering};

static REQUESTED: AtomicBool = AtomicBool::new(false);
static INSTALL: Once = Once::new();

/// From now on Ctrl-C is a request.
pub fn listen() -> Result<()> {
    let mut installed = Ok(());
    INSTALL.call_once(|| {
        installed = ctrlc::set_handler(|| {
            if REQUESTED.swap(true, Ordering::SeqCst) {
                std::process::exit(130);
            }
        });
    });
    installed.context("can't listen to Ctrl-C")
}

/// Whether it was pressed.
pub fn requested() -> bool {
    REQUESTED.load(Ordering::SeqCst)
}
