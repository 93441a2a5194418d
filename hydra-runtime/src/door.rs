//! A door to a library that panics on some damaged files: what panics behind it comes out as an error.

use crate::error::printable;
use std::any::Any;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, set_hook, take_hook};
use std::sync::Once;

thread_local! {
    /// Whether this thread is behind the door, where a panic is not worth a message on stderr.
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

static QUIET: Once = Once::new();

/// The result of `work`; if it panics, `failed` of the panic's message. What `work` changes must not be used after that.
pub fn guarded<T, E>(work: impl FnOnce() -> Result<T, E>, failed: impl FnOnce(String) -> E) -> Result<T, E> {
    QUIET.call_once(|| {
        let report = take_hook();
        set_hook(Box::new(move |panic| {
            if !INSIDE.get() {
                report(panic);
            }
        }));
    });
    let outer = INSIDE.replace(true);
    let done = catch_unwind(AssertUnwindSafe(work));
    INSIDE.set(outer);
    done.unwrap_or_else(|panic| Err(failed(said(&*panic))))
}

/// The message of a panic.
fn said(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    printable(text.unwrap_or("for an unknown reason"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn panics_become_errors() {
        let guarded =
            |work: &dyn Fn() -> Result<i32, String>| guarded(work, |said| format!("the library failed: {said}"));
        assert_eq!(guarded(&|| Ok(1)), Ok(1));
        assert_eq!(guarded(&|| panic!("at\n{}", 1)).unwrap_err(), "the library failed: at\\n1");
        assert!(!INSIDE.get());
        let nested = guarded(&|| {
            assert!(guarded(&|| panic!("inner")).is_err());
            assert!(INSIDE.get());
            Ok(2)
        });
        assert!(nested.is_ok() && !INSIDE.get());
    }
}
