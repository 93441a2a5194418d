//! The door to the tokenizers crate: what panics behind it comes out as an error.
//!
//! The crate panics on some damaged files, when it reads them or not before it gets a certain text. Every call that may
//! reach such a place goes through [`guarded`]. What such a call borrows is a tokenizer that nothing changes, but for its cache,
//! which is locked.

use crate::{Error, Result, door};

/// The result of `work`; [`Error::Tokenizer`] if it panics.
pub(crate) fn guarded<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    door::guarded(work, |said| Error::Tokenizer(format!("the tokenizers library failed: {said}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn panics_become_errors() {
        assert_eq!(guarded(|| Ok(1)).unwrap(), 1);
        let error = guarded::<()>(|| panic!("at\n{}", 1)).unwrap_err().to_string();
        assert_eq!(error, "tokenizer: the tokenizers library failed: at\\n1");
    }
}
