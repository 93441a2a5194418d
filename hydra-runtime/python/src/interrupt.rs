//! Long work without the GIL, which Ctrl-C ends.

use crate::error::exception;
use hydra_runtime::Error;
use pyo3::prelude::*;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

/// How often Python looks for signals.
const LOOK: Duration = Duration::from_millis(50);

/// Runs `work` in a thread of its own while this one, without the GIL, waits and looks for signals. A signal whose handler
/// raises an exception, Ctrl-C's as a rule, sets `cancel`, which has to end the work; the exception is then raised, even if
/// the work was done by then. To return and set the signal again would lose the result too: Python looks for signals before
/// the caller has stored it.
pub fn interruptible<R: Send>(
    py: Python<'_>,
    cancel: &AtomicBool,
    work: impl FnOnce() -> hydra_runtime::Result<R> + Send,
) -> PyResult<R> {
    cancel.store(false, Ordering::Relaxed);
    let (send, mut done) = channel();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            // The receiver waits until it has this.
            let _ = send.send(work());
        });
        let mut raised = None;
        loop {
            let result;
            (result, done) = py.detach(move || (done.recv_timeout(LOOK), done));
            match result {
                Ok(result) => return raised.map_or_else(|| result.map_err(exception), Err),
                Err(RecvTimeoutError::Timeout) => {
                    if let (None, Err(error)) = (&raised, py.check_signals()) {
                        cancel.store(true, Ordering::Relaxed);
                        raised = Some(error);
                    }
                }
                // The work has panicked, and so does this thread when the scope ends.
                Err(RecvTimeoutError::Disconnected) => return Err(exception(Error::Cancelled)),
            }
        }
    })
}
