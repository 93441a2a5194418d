//! The door to the tokenizers crate: what panics behind it comes out as an error.
//!
//! The crate panics on some damaged files, when it reads them or not before it gets a certain text. Every call that may
//! reach such a place goes through [`guarded`].

use crate::error::printable;
use crate::{Error, Result};
use std::any::Any;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, set_hook, take_hook};
use std::sync::Once;

thread_local! {
    /// Whether this thread is behind the door, where a panic is not worth a message on stderr.
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

static QUIET: Once = Once::new();

/// The result of `work`; [`Error::Tokenizer`] if it panics.
pub(crate) fn guarded<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    QUIET.call_once(|| {
        let report = take_hook();
        set_hook(Box::new(move |panic| {
            if !INSIDE.get() {
                report(panic);
            }
        }));
    });
    let outer = INSIDE.replace(true);
    // What `work` borrows is a tokenizer that nothing changes, but for its cache, which is locked; or it is dropped.
    let done = catch_unwind(AssertUnwindSafe(work));
    INSIDE.set(outer);
    done.unwrap_or_else(|panic| Err(Error::Tokenizer(format!("the tokenizers library failed: {}", said(&*panic)))))
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
        assert_eq!(guarded(|| Ok(1)).unwrap(), 1);
        let error = guarded::<()>(|| panic!("at\n{}", 1)).unwrap_err().to_string();
        assert_eq!(error, "tokenizer: the tokenizers library failed: at\\n1");
        let nested = guarded(|| {
            assert!(guarded::<()>(|| panic!("inner")).is_err());
            assert!(INSIDE.get());
            Ok(())
        });
        assert!(nested.is_ok() && !INSIDE.get());
    }
}
