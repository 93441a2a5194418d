//! Ctrl-C, or SIGTERM as a cluster's scheduler or a container's end sends it: the first asks a run to end after its step, a
//! second ends the process at once. What is no run ends at the first. A closed terminal's SIGHUP is left to `nohup`.

use crate::output;
use anyhow::{Context, Result};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;
use std::fmt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock, Once};
use std::time::Duration;

type Flag = LazyLock<Arc<AtomicBool>>;

static REQUESTED: Flag = LazyLock::new(Arc::default);
static DISCARDING: Flag = LazyLock::new(Arc::default);
static INSTALL: Once = Once::new();

/// What the process ends with.
const STOPPED: i32 = 130;

/// How often the flags are looked at.
const LOOK: Duration = Duration::from_millis(20);

/// What a measurement ends with that Ctrl-C has cut short.
#[derive(Debug)]
pub struct Stopped;

impl fmt::Display for Stopped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("stopped")
    }
}

impl std::error::Error for Stopped {}

/// From now on Ctrl-C is a request, which is answered on stderr.
pub fn listen() -> Result<()> {
    let mut installed = Ok(());
    INSTALL.call_once(|| {
        installed = [SIGINT, SIGTERM].into_iter().try_for_each(|signal| {
            // In this order: at the first the flag isn't set yet.
            flag::register_conditional_shutdown(signal, STOPPED, REQUESTED.clone())?;
            flag::register(signal, REQUESTED.clone()).map(drop)
        });
        once_set(&REQUESTED, || {
            output::say("\nstopping: what is under way is saved, and can be gone on with; once more ends at once");
        });
    });
    installed.context("can't listen to Ctrl-C")
}

/// Does what a handler can't, which may hardly do more than set a flag.
fn once_set(flag: &'static Flag, act: impl FnOnce() + Send + 'static) {
    std::thread::spawn(move || {
        while !flag.load(Ordering::SeqCst) {
            std::thread::sleep(LOOK);
        }
        act();
    });
}

/// From now on Ctrl-C ends the process at once, and takes with it a folder that isn't complete.
pub fn discard(folder: &Path) -> Result<()> {
    let (folder, name) = (folder.to_path_buf(), folder.with_extension("stopped"));
    let listens = |signal| flag::register(signal, DISCARDING.clone()).map(drop);
    [SIGINT, SIGTERM].into_iter().try_for_each(listens).context("can't listen to Ctrl-C")?;
    once_set(&DISCARDING, move || {
        // Under another name it can't be put into its place any more while its files go.
        if std::fs::rename(&folder, &name).is_ok() {
            // Nobody is left to be told.
            let _ = std::fs::remove_dir_all(&name);
        }
        std::process::exit(STOPPED);
    });
    Ok(())
}

/// Does not return if a folder is being discarded: that ends the process, and what fails meanwhile fails for want of it.
pub fn wait_for_discard() {
    while DISCARDING.load(Ordering::SeqCst) {
        std::thread::park();
    }
}

/// [`Stopped`], if it was pressed: for long measurements, between two passes.
pub fn check() -> Result<()> {
    if requested() { Err(Stopped.into()) } else { Ok(()) }
}

/// What `result` holds, or `None` if it was stopped.
pub fn unless_stopped<T>(result: Result<T>) -> Result<Option<T>> {
    match result {
        Err(error) if error.is::<Stopped>() => Ok(None),
        result => result.map(Some),
    }
}

/// Whether it was pressed.
pub fn requested() -> bool {
    REQUESTED.load(Ordering::SeqCst)
}
