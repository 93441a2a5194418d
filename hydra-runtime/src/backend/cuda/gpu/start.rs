//! Starts the driver and finds a device; the driver's errors as text.

use crate::{Error, Result};
use core::ffi::CStr;
use core::fmt;
use cust::error::CudaError;
use cust::sys;

/// An error code of the driver.
pub(super) struct Refusal(pub sys::CUresult);

impl fmt::Display for Refusal {
    /// The driver's text, and the number, by which it can be looked up.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = std::ptr::null();
        // SAFETY: `text` may be written; the string that it then points at is the driver's, and is never freed.
        let text = unsafe {
            let _ = sys::cuGetErrorString(self.0, &mut text);
            if text.is_null() { c"unknown error" } else { CStr::from_ptr(text) }
        };
        write!(f, "{} ({})", text.to_string_lossy(), self.0 as u32)
    }
}

/// The result of one of the driver's functions.
pub(super) fn result(code: sys::CUresult) -> Result<(), Refusal> {
    if code == sys::CUresult::CUDA_SUCCESS { Ok(()) } else { Err(Refusal(code)) }
}

/// An error of device `ordinal`.
pub(super) fn device_error(ordinal: u32, what: impl fmt::Display) -> Error {
    Error::Device(format!("cuda:{ordinal}: {what}"))
}

/// Starts the driver, and checks that it has device `ordinal`.
pub(super) fn find_device(ordinal: u32) -> Result<cust::device::Device> {
    let refused = |what: String| device_error(ordinal, what);
    sys::driver::open().map_err(|error| refused(format!("no NVIDIA driver: {error}")))?;
    // SAFETY: the function has no requirements. (`cust::init` has no text for a driver's own errors.)
    match result(unsafe { sys::cuInit(0) }) {
        Err(Refusal(sys::CUresult::CUDA_ERROR_NO_DEVICE)) => {
            return Err(refused("the NVIDIA driver finds no device".into()));
        }
        other => other.map_err(|refusal| refused(format!("the NVIDIA driver doesn't start: {refusal}")))?,
    }
    let failed = |what: &'static str| move |error: CudaError| refused(format!("{what}: {error}"));
    let count = cust::device::Device::num_devices().map_err(failed("devices can't be counted"))?;
    if ordinal >= count {
        return Err(refused(format!("there is no such device, the driver has {count}, counted from 0")));
    }
    cust::device::Device::get_device(ordinal).map_err(failed("can't be opened"))
}
