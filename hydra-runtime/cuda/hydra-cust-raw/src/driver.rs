//! Finds the driver's functions when they are first called.
//!
//! The library is opened by name, so that nothing links libcuda and a program starts on a machine without a driver.
//! Functions are ordinary Rust functions: none of their names is exported, and a program that links a libcuda of its
//! own keeps its symbols.

use crate::{cudaError_enum::*, CUresult};
use libloading::Library;
use std::error::Error;
use std::ffi::{c_char, c_void, CStr};
use std::mem::transmute;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::OnceLock;

const LIBRARY: &str = if cfg!(windows) { "nvcuda.dll" } else { "libcuda.so.1" };

static DRIVER: OnceLock<Result<Library, String>> = OnceLock::new();

/// Opens the driver's library, once for the process.
///
/// # Errors
/// What the system says if there is none, in one line. Each function of this crate then returns
/// `CUDA_ERROR_STUB_LIBRARY`.
pub fn open() -> Result<(), &'static str> {
    library().map(|_| ())
}

fn library() -> Result<&'static Library, &'static str> {
    let open = || {
        // SAFETY: the driver's initialisers set up the driver and nothing else.
        let library = unsafe { Library::new(LIBRARY) };
        library.map_err(|error| match error.source() {
            Some(cause) => format!("{LIBRARY} can't be opened: {cause}"),
            None => format!("{LIBRARY} can't be opened: {error}"),
        })
    };
    DRIVER.get_or_init(open).as_ref().map_err(String::as_str)
}

/// A function of the driver.
pub(crate) struct Symbol {
    name: &'static [u8],
    /// Its address, 0 until it was found.
    address: AtomicUsize,
}

impl Symbol {
    /// `name` ends with a zero byte.
    pub const fn new(name: &'static str) -> Self {
        Self { name: name.as_bytes(), address: AtomicUsize::new(0) }
    }

    /// The function's address, or what a call of it returns where there is no driver, or one that lacks this function.
    pub fn find(&self) -> Result<usize, CUresult> {
        let address = self.address.load(Ordering::Relaxed);
        if address != 0 {
            return Ok(address);
        }
        let library = library().map_err(|_| CUDA_ERROR_STUB_LIBRARY)?;
        // SAFETY: only the address is taken, and the library is never closed.
        let symbol = unsafe { library.get::<*const c_void>(self.name) }.map_err(|_| CUDA_ERROR_NOT_FOUND)?;
        let address = *symbol as usize;
        self.address.store(address, Ordering::Relaxed);
        Ok(address)
    }
}

/// A code of the driver as the enum of CUDA 11.4, which these bindings were made from, with
/// `CUDA_ERROR_DEVICE_UNAVAILABLE`; other later codes become `CUDA_ERROR_UNKNOWN`, because an enum must not hold a value that it doesn't list.
pub(crate) fn result(code: u32) -> CUresult {
    match code {
        0..=8 | 34 | 46 | 100..=102 | 200..=202 | 205..=224 | 300..=304 | 400 | 401 | 500 | 600 | 700..=705 | 708..=720
        // SAFETY: the enum is `repr(u32)` and lists all of these codes (see the test).
        | 800..=809 | 900..=911 => unsafe { transmute::<u32, CUresult>(code) },
        _ => CUDA_ERROR_UNKNOWN,
    }
}

/// Defines functions that look themselves up in the driver and pass their arguments on.
macro_rules! driver_functions {
    ($(pub fn $name:ident($($argument:ident: $type:ty),* $(,)?) -> CUresult;)*) => {$(
        pub unsafe fn $name($($argument: $type),*) -> CUresult {
            static SYMBOL: $crate::driver::Symbol = $crate::driver::Symbol::new(concat!(stringify!($name), "\0"));
            match SYMBOL.find() {
                Ok(address) => {
                    let function: unsafe extern "C" fn($($type),*) -> u32 = ::std::mem::transmute(address);
                    $crate::driver::result(function($($argument),*))
                }
                Err(code) => code,
            }
        }
    )*};
}
pub(crate) use driver_functions;

/// The driver's text for a code. Without a driver there is one for all codes.
pub unsafe fn cuGetErrorString(error: CUresult, text: *mut *const c_char) -> CUresult {
    static SYMBOL: Symbol = Symbol::new("cuGetErrorString\0");
    match SYMBOL.find() {
        Ok(address) => {
            let function: unsafe extern "C" fn(u32, *mut *const c_char) -> u32 = transmute(address);
            result(function(error as u32, text))
        }
        Err(_) => {
            const NO_DRIVER: &CStr = c"no CUDA driver";
            *text = NO_DRIVER.as_ptr();
            CUDA_SUCCESS
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The codes that the bindings list.
    fn listed() -> Vec<u32> {
        let bindings = include_str!("cuda.rs");
        let (_, body) = bindings.split_once("pub enum cudaError_enum {").expect("the enum of results");
        let (body, _) = body.split_once('}').expect("its end");
        let code =
            |line: &str| line.split_once(" = ").map(|(_, code)| code.trim_end_matches(',').parse().expect("a code"));
        body.lines().filter_map(code).collect()
    }

    #[test]
    fn codes_outside_of_the_enum_become_unknown() {
        let listed = listed();
        assert!(listed.len() > 80 && listed.contains(&999));
        for code in 0..2000 {
            let expected = if listed.contains(&code) { code } else { 999 };
            assert_eq!(result(code) as u32, expected, "code {code}");
        }
    }
}
