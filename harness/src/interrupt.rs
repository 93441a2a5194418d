//! Ctrl-C, and SIGTERM as schedulers and containers send it. In a run, the first one asks it to stop after its step, and a
//! second one ends the process at once; other commands end at the first. SIGUSR1 asks a run to stop, too: it is what
//! Open MPI's `mpirun` passes on to its ranks without killing them. SIGHUP of a closed terminal is left to `nohup`.

use crate::output;
use anyhow::{Context, Result};
use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1, SIGXFSZ};
use signal_hook::flag;
use std::fmt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock, Once};
use std::time::Duration;

type Flag = LazyLock<Arc<AtomicBool>>;

static REQUESTED: Flag = LazyLock::new(Arc::default);
static REQUESTED_ELSEWHERE: AtomicBool = AtomicBool::new(false);
static DISCARDING: Flag = LazyLock::new(Arc::default);
static STOPPING: Flag = LazyLock::new(Arc::default);
static INSTALL: Once = Once::new();

/// The exit code after an interrupt.
const STOPPED: i32 = 130;

/// The time between two looks at a flag.
const LOOK: Duration = Duration::from_millis(20);

/// Signals within this time are one request: `timeout` sends one to the process and another one to its group.
const SAME: Duration = Duration::from_millis(300);

/// The error of a measurement that was interrupted.
#[derive(Debug)]
pub struct Stopped;

impl fmt::Display for Stopped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("stopped")
    }
}

impl std::error::Error for Stopped {}

/// From now on a file that would exceed the limit of sizes (`ulimit -f`) is an error, which names it, and not the end of the
/// process.
pub fn survive_large_files() {
    // That there is a handler is enough.
    let _ = flag::register(SIGXFSZ, Arc::default());
}

/// From now on Ctrl-C is a request to stop, and is answered on stderr.
pub fn listen() -> Result<()> {
    let mut installed = Ok(());
    INSTALL.call_once(|| {
        let said = || {
            output::say(
                "\nstopping; everything so far is saved and can be resumed. Press Ctrl-C again to quit at once",
            );
        };
        let both = once_signalled(&REQUESTED, said);
        installed = both.and_then(|()| flag::register(SIGUSR1, REQUESTED.clone()).map(drop));
    });
    installed.context("can't listen to Ctrl-C")
}

/// From now on the first Ctrl-C or SIGTERM calls `stop`, on a thread; a second one ends the process at once.
pub fn on_stop(stop: impl FnOnce() + Send + 'static) -> Result<()> {
    once_signalled(&STOPPING, stop).context("can't listen to Ctrl-C")
}

/// The first Ctrl-C or SIGTERM sets `flag` and acts, on a thread; the next one ends the process at once.
fn once_signalled(flag: &'static Flag, act: impl FnOnce() + Send + 'static) -> std::io::Result<()> {
    let ends = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        flag::register_conditional_shutdown(signal, STOPPED, ends.clone())?;
        flag::register(signal, Arc::clone(flag))?;
    }
    once_set(flag, move || {
        act();
        std::thread::sleep(SAME);
        ends.store(true, Ordering::SeqCst);
    });
    Ok(())
}

/// Ctrl-C while answers are generated: it ends the answer, not the process.
pub struct AnswerSignals {
    stop: Arc<AtomicBool>,
    /// Whether Ctrl-C ends the process.
    idle: Arc<AtomicBool>,
    ends_when_idle: bool,
}

impl AnswerSignals {
    /// Between two answers Ctrl-C ends the process if `ends_when_idle`. (A line editor reads it as a key.)
    pub fn listen(ends_when_idle: bool) -> Result<Self> {
        let (stop, idle) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(ends_when_idle)));
        flag::register_conditional_shutdown(SIGINT, STOPPED, idle.clone())
            .and_then(|_| flag::register(SIGINT, stop.clone()))
            .context("can't listen to Ctrl-C")?;
        Ok(Self { stop, idle, ends_when_idle })
    }

    /// Generates an answer; the flag is set when it is to end.
    pub fn during<T>(&self, generate: impl FnOnce(&AtomicBool) -> T) -> T {
        self.stop.store(false, Ordering::SeqCst);
        self.idle.store(false, Ordering::SeqCst);
        let done = generate(&self.stop);
        self.idle.store(self.ends_when_idle, Ordering::SeqCst);
        done
    }
}

/// Acts when a flag is set, on a thread: a signal handler may do little more than set it.
fn once_set(flag: &'static Flag, act: impl FnOnce() + Send + 'static) {
    std::thread::spawn(move || {
        while !flag.load(Ordering::SeqCst) {
            std::thread::sleep(LOOK);
        }
        act();
    });
}

/// From now on Ctrl-C ends the process at once and removes the file or folder at `path`, which isn't complete.
pub fn discard(path: &Path) -> Result<()> {
    let (path, name) = (path.to_path_buf(), path.with_extension("stopped"));
    let listens = |signal| flag::register(signal, DISCARDING.clone()).map(drop);
    [SIGINT, SIGTERM].into_iter().try_for_each(listens).context("can't listen to Ctrl-C")?;
    once_set(&DISCARDING, move || {
        // Renamed first, so that it can't be moved to its destination while its files are removed.
        if std::fs::rename(&path, &name).is_ok() {
            // The process ends; nobody is left to be told of an error.
            let _ = if name.is_dir() { std::fs::remove_dir_all(&name) } else { std::fs::remove_file(&name) };
        }
        std::process::exit(STOPPED);
    });
    Ok(())
}

/// Does not return if a file or folder is being discarded, which ends the process: errors meanwhile come from its absence.
pub fn wait_for_discard() {
    while DISCARDING.load(Ordering::SeqCst) {
        std::thread::park();
    }
}

/// The error [`Stopped`] if an interrupt was requested: for long measurements, between two passes.
pub fn check() -> Result<()> {
    if requested() { Err(Stopped.into()) } else { Ok(()) }
}

/// The value of `result`, or `None` if it was interrupted.
pub fn unless_stopped<T>(result: Result<T>) -> Result<Option<T>> {
    match result {
        Err(error) if error.is::<Stopped>() => Ok(None),
        result => result.map(Some),
    }
}

/// Whether an interrupt was requested.
pub fn requested() -> bool {
    REQUESTED.load(Ordering::SeqCst) || REQUESTED_ELSEWHERE.load(Ordering::SeqCst)
}

/// An interrupt was requested of another rank. The signal may still come to this one, and is then not a second request.
pub fn request_elsewhere() {
    REQUESTED_ELSEWHERE.store(true, Ordering::SeqCst);
}
