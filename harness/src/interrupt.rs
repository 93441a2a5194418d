//! Ctrl-C: the first asks a run to end after its step, a second ends the process at once. What is no run ends at the first.

use anyhow::{Context, Result};
use std::path::Path;
use std::sync::Once;
use std::sync::atomic::{AtomicBool, Ordering};

static REQUESTED: AtomicBool = AtomicBool::new(false);
static DISCARDING: AtomicBool = AtomicBool::new(false);
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

/// From now on Ctrl-C ends the process at once, and takes with it a folder that isn't complete.
pub fn discard(folder: &Path) -> Result<()> {
    let (folder, name) = (folder.to_path_buf(), folder.with_extension("stopped"));
    let ended = ctrlc::set_handler(move || {
        DISCARDING.store(true, Ordering::SeqCst);
        // Under another name it can't be put into its place any more while its files go.
        if std::fs::rename(&folder, &name).is_ok() {
            // Nobody is left to be told.
            let _ = std::fs::remove_dir_all(&name);
        }
        std::process::exit(130);
    });
    ended.context("can't listen to Ctrl-C")
}

/// Does not return if a folder is being discarded: that ends the process, and what fails meanwhile fails for want of it.
pub fn wait_for_discard() {
    while DISCARDING.load(Ordering::SeqCst) {
        std::thread::park();
    }
}

/// Whether it was pressed.
pub fn requested() -> bool {
    REQUESTED.load(Ordering::SeqCst)
}
