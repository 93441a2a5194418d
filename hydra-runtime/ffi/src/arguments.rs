//! C's pointers and lengths as Rust's references, slices and texts, checked as far as that is possible.

use crate::error::{Failure, Result, hydra_status, invalid};
use std::ffi::{CStr, c_char};

/// An error unless `data` may be the address of `len` values.
pub(crate) fn check<T>(what: &str, data: *const T, len: usize) -> Result<()> {
    if data.is_null() {
        return Err(invalid(format!("{what} is null")));
    }
    if !data.is_aligned() {
        let (align, at) = (align_of::<T>(), data.addr());
        return Err(invalid(format!("{what}: expected an address that is a multiple of {align}, found {at:#x}")));
    }
    if len.checked_mul(size_of::<T>()).is_none_or(|bytes| bytes > isize::MAX as usize) {
        return Err(invalid(format!("{what}: {len} values don't fit into memory")));
    }
    Ok(())
}

/// `len` values that are read. Null is allowed if there are none.
///
/// # Safety
/// What passes the checks is valid for reads during `'a`.
pub(crate) unsafe fn slice<'a, T>(what: &str, data: *const T, len: usize) -> Result<&'a [T]> {
    if len == 0 {
        return Ok(&[]);
    }
    check(what, data, len)?;
    // SAFETY: not null, aligned, of a possible length; the rest is the caller's word.
    Ok(unsafe { std::slice::from_raw_parts(data, len) })
}

/// `len` values that are written. Null is allowed if there are none.
///
/// # Safety
/// What passes the checks is valid for writes during `'a`, initialised, and used by nobody else.
pub(crate) unsafe fn slice_mut<'a, T>(what: &str, data: *mut T, len: usize) -> Result<&'a mut [T]> {
    if len == 0 {
        return Ok(&mut []);
    }
    check(what, data, len)?;
    // SAFETY: as above.
    Ok(unsafe { std::slice::from_raw_parts_mut(data, len) })
}

/// One value that is read.
///
/// # Safety
/// As for [`slice`].
pub(crate) unsafe fn reference<'a, T>(what: &str, data: *const T) -> Result<&'a T> {
    check(what, data, 1)?;
    // SAFETY: as above.
    Ok(unsafe { &*data })
}

/// One value that is read, or none.
///
/// # Safety
/// As for [`slice`].
pub(crate) unsafe fn optional<'a, T>(what: &str, data: *const T) -> Result<Option<&'a T>> {
    // SAFETY: the caller's word.
    if data.is_null() { Ok(None) } else { unsafe { reference(what, data).map(Some) } }
}

/// Where one value is written, which may be uninitialised.
pub(crate) struct Out<T>(*mut T);

impl<T> Out<T> {
    /// # Safety
    /// What passes the checks is valid for writes until the call ends.
    pub unsafe fn new(what: &str, data: *mut T) -> Result<Self> {
        check(what, data.cast_const(), 1)?;
        Ok(Self(data))
    }

    /// The same, or none.
    ///
    /// # Safety
    /// The same.
    pub unsafe fn optional(what: &str, data: *mut T) -> Result<Option<Self>> {
        // SAFETY: the caller's word.
        if data.is_null() { Ok(None) } else { unsafe { Self::new(what, data).map(Some) } }
    }

    pub fn set(&self, value: T) {
        // SAFETY: not null and aligned; valid for writes by `new`'s contract.
        unsafe { self.0.write(value) };
    }
}

/// A text of `len` bytes.
///
/// # Safety
/// As for [`slice`].
pub(crate) unsafe fn text<'a>(what: &str, data: *const c_char, len: usize) -> Result<&'a str> {
    // SAFETY: the caller's word.
    let bytes = unsafe { slice(what, data.cast::<u8>(), len)? };
    std::str::from_utf8(bytes).map_err(|e| invalid(format!("{what} is not UTF-8: see byte {}", e.valid_up_to())))
}

/// A text that ends with a zero byte.
///
/// # Safety
/// What isn't null ends with a zero byte and is valid for reads during `'a`.
pub(crate) unsafe fn c_text<'a>(what: &str, data: *const c_char) -> Result<&'a str> {
    check(what, data, 1)?;
    // SAFETY: the caller's word.
    let text = unsafe { CStr::from_ptr(data) };
    text.to_str().map_err(|e| invalid(format!("{what} is not UTF-8: see byte {}", e.valid_up_to())))
}

/// Copies `values` to `data`, which has room for `capacity`, and their number to `count`. If there is less room, only the
/// number is written.
///
/// # Safety
/// `data` is null or valid for writes of `capacity` values.
pub(crate) unsafe fn copy_out<T: Copy>(
    what: &str,
    values: &[T],
    (data, capacity): (*mut T, usize),
    count: &Out<usize>,
) -> Result<()> {
    if values.len() > capacity {
        count.set(values.len());
        let text = format!("{what}: there is room for {capacity}, and {} are needed", values.len());
        return Err(Failure { status: hydra_status::BufferTooSmall, text });
    }
    if !values.is_empty() {
        check(what, data.cast_const(), values.len())?;
        // SAFETY: not null, aligned, with room for them; `values` is this library's.
        unsafe { std::ptr::copy_nonoverlapping(values.as_ptr(), data, values.len()) };
    }
    count.set(values.len());
    Ok(())
}
