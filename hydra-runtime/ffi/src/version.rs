//! Versions.

use std::ffi::{CStr, c_char};

/// The version of this interface. A program compiled with another HYDRA_ABI_VERSION than `hydra_abi_version` returns
/// can't use the library.
pub const HYDRA_ABI_VERSION: u32 = 1;

/// The library's HYDRA_ABI_VERSION. Any thread may call it.
#[unsafe(no_mangle)]
pub extern "C" fn hydra_abi_version() -> u32 {
    HYDRA_ABI_VERSION
}

/// The library's version, "0.1.0" say. The text is static. Any thread may call it.
#[unsafe(no_mangle)]
pub extern "C" fn hydra_version() -> *const c_char {
    const VERSION: &CStr = match CStr::from_bytes_with_nul(concat!(env!("CARGO_PKG_VERSION"), "\0").as_bytes()) {
        Ok(version) => version,
        Err(_) => panic!("a version holds no zero byte"),
    };
    VERSION.as_ptr()
}
