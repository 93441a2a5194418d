//! Status codes, the thread's last error, and the door through which every call goes.

use hydra_runtime::Error;
use hydra_runtime::hydra_kernels;
use std::cell::RefCell;
use std::ffi::{CStr, CString, c_char};
use std::panic::{AssertUnwindSafe, catch_unwind};

/// What a function returns. `hydra_last_error` has the text of an error.
#[repr(i32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum hydra_status {
    /// Done.
    Ok = 0,
    /// An argument is wrong: null, out of range, of another length, not UTF-8, or not a number.
    InvalidArgument = 1,
    /// A handle that was never given out, has been freed, or is of another kind.
    InvalidHandle = 2,
    /// Another call is using the generator or the trainer.
    Busy = 3,
    /// The result doesn't fit the memory that was given for it. How much it takes has been written.
    BufferTooSmall = 4,
    /// The operating system refused to read or write a file.
    Io = 5,
    /// A file isn't what it should be.
    Format = 6,
    /// Memory could not be had.
    OutOfMemory = 7,
    /// The text is longer than the model's context, a pass or a cache has room for.
    TooLong = 8,
    /// The adapter doesn't fit the model or the call.
    WrongAdapter = 9,
    /// A loss, a gradient or a logit is infinite or not a number.
    NotFinite = 10,
    /// The work was cancelled.
    Cancelled = 11,
    /// The device isn't there or has failed.
    Device = 12,
    /// A mistake inside the library, which is to be reported. The object that was in use is to be freed.
    Panic = 13,
    /// An error that no other code names.
    Other = 14,
}

/// An error on its way out.
#[derive(Debug)]
pub(crate) struct Failure {
    pub status: hydra_status,
    pub text: String,
}

pub(crate) type Result<T> = std::result::Result<T, Failure>;

/// An argument that is wrong.
pub(crate) fn invalid(text: impl Into<String>) -> Failure {
    Failure { status: hydra_status::InvalidArgument, text: text.into() }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let status = match &error {
            Error::Io { .. } => hydra_status::Io,
            Error::Format { .. } | Error::Tensors { .. } | Error::Config { .. } => hydra_status::Format,
            Error::Invalid(_) | Error::NoTarget | Error::TokenOutOfRange { .. } | Error::LearningRate(_) => {
                hydra_status::InvalidArgument
            }
            Error::Kernel(_) => hydra_status::InvalidArgument,
            Error::OutOfMemory { .. } => hydra_status::OutOfMemory,
            Error::SequenceTooLong { .. } | Error::CacheFull { .. } => hydra_status::TooLong,
            Error::WrongAdapter(_) => hydra_status::WrongAdapter,
            Error::LogitNotFinite(_) | Error::NotFinite { .. } => hydra_status::NotFinite,
            Error::Cancelled => hydra_status::Cancelled,
            Error::Device(_) => hydra_status::Device,
            _ => hydra_status::Other,
        };
        Self { status, text: error.to_string() }
    }
}

impl From<hydra_kernels::Error> for Failure {
    fn from(error: hydra_kernels::Error) -> Self {
        invalid(error.to_string())
    }
}

thread_local! {
    static LAST: RefCell<Option<CString>> = const { RefCell::new(None) };
}

/// The door: runs a call's work. Errors and panics become a status, and their text the thread's last error.
pub(crate) fn door(work: impl FnOnce() -> Result<()>) -> hydra_status {
    let failure = match catch_unwind(AssertUnwindSafe(work)) {
        Ok(Ok(())) => return hydra_status::Ok,
        Ok(Err(failure)) => failure,
        Err(payload) => {
            let text = payload.downcast_ref::<String>().map(String::as_str);
            let text = text.or(payload.downcast_ref::<&str>().copied()).unwrap_or("no message");
            let text = format!("a mistake inside Hydra, please report it: {text}");
            // A payload may panic again when it is dropped; what that panic carries is not dropped.
            if let Err(again) = catch_unwind(AssertUnwindSafe(|| drop(payload))) {
                std::mem::forget(again);
            }
            Failure { status: hydra_status::Panic, text }
        }
    };
    // A thread that is ending has no last error any more.
    let _ = LAST.try_with(|last| *last.borrow_mut() = Some(c_string(one_line(&failure.text))));
    failure.status
}

/// The text with a space for each control character, of a file's name, say. A zero byte stays, and ends a C string.
fn one_line(text: &str) -> String {
    text.replace(|c: char| c.is_control() && c != '\0' || matches!(c, '\u{2028}' | '\u{2029}'), " ")
}

/// The text, up to its first zero byte.
pub(crate) fn c_string(text: String) -> CString {
    let mut bytes = text.into_bytes();
    bytes.truncate(bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len()));
    CString::new(bytes).unwrap_or_default()
}

/// The text of this thread's latest error, in UTF-8 and on one line; empty if there was none. It stays valid until the
/// thread's next error, and is not to be freed. Any thread may call it.
#[unsafe(no_mangle)]
pub extern "C" fn hydra_last_error() -> *const c_char {
    const NONE: &CStr = c"";
    let text = LAST.try_with(|last| last.borrow().as_ref().map_or(NONE.as_ptr(), |text| text.as_ptr()));
    text.unwrap_or(NONE.as_ptr())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn last() -> String {
        // SAFETY: a C string that lives until this thread's next error.
        unsafe { CStr::from_ptr(hydra_last_error()) }.to_str().unwrap().into()
    }

    /// Panics when it is dropped.
    struct PanicOnDrop;

    impl Drop for PanicOnDrop {
        fn drop(&mut self) {
            std::panic::panic_any(()); // of no size: to forget it leaks nothing
        }
    }

    #[test]
    fn panics_end_at_the_door() {
        assert_eq!(last(), "");
        assert_eq!(door(|| panic!("number {}", 7)), hydra_status::Panic);
        assert_eq!(last(), "a mistake inside Hydra, please report it: number 7");
        assert_eq!(door(|| std::panic::panic_any(7)), hydra_status::Panic);
        assert_eq!(last(), "a mistake inside Hydra, please report it: no message");
        assert_eq!(door(|| std::panic::panic_any(PanicOnDrop)), hydra_status::Panic);
        assert_eq!(last(), "a mistake inside Hydra, please report it: no message");
        assert_eq!(door(|| Ok(())), hydra_status::Ok);
        assert!(last().ends_with("no message"), "a call that succeeds leaves the text as it is");
    }

    #[test]
    fn an_error_is_one_line() {
        assert_eq!(door(|| Err(invalid("a\nb\r\x1b[1m\u{2028}é"))), hydra_status::InvalidArgument);
        assert_eq!(last(), "a b  [1m é");
    }

    #[test]
    fn each_thread_has_its_own_error_and_zero_bytes_end_it() {
        assert_eq!(door(|| Err(invalid("one\0two"))), hydra_status::InvalidArgument);
        std::thread::spawn(|| assert_eq!(last(), "")).join().unwrap();
        assert_eq!(last(), "one");
    }
}
