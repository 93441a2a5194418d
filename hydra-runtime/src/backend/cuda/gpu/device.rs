//! The CUDA device itself: one context, one stream, one module for every device and one more for Hopper. Buffers are
//! parts of a few large allocations ([`super::arena`]). A caller's own current context is current again after each call.

use super::arena::{self, Arena};
use super::kernels::Kernels;
use super::staging::Staging;
use super::start::{Refusal, device_error, find_device, result};
use crate::{Error, Result};
use core::ffi::c_void;
use core::fmt;
use cust::context::Context;
use cust::device::DeviceAttribute;
use cust::error::CudaError;
use cust::event::{Event, EventFlags};
use cust::stream::{Stream, StreamFlags};
use cust::sys;
use hydra_ptx::launch::{Instructions, Launch, Ptr};
use hydra_ptx::{CAPABILITY, HOPPER, HOPPER_PTX, PTX};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The arena asks the driver for at least this part of the device's memory at once: over a gigabyte on the largest
/// devices.
const SLABS: usize = 64;

/// What a Hopper's description says if its own kernels can't be used.
const WITHOUT_WGMMA: &str = "slower than it could be, without wgmma";

/// While it lives, the device's context is the calling thread's current one; then the caller's is again.
pub struct Entered {
    /// The caller's context, null if there was none; or nothing, where the device's was current already.
    before: Option<sys::CUcontext>,
}

impl Entered {
    fn new(context: &Context) -> Result<Self, Refusal> {
        Self::after(current()?, context)
    }

    /// `before` is the context to which the thread returns.
    fn after(before: sys::CUcontext, context: &Context) -> Result<Self, Refusal> {
        let own = context.as_raw();
        if before == own {
            return Ok(Self { before: None });
        }
        // SAFETY: the context is retained.
        result(unsafe { sys::cuCtxSetCurrent(own) })?;
        Ok(Self { before: Some(before) })
    }
}

/// The calling thread's current context, null if there is none.
fn current() -> Result<sys::CUcontext, Refusal> {
    let mut context = std::ptr::null_mut();
    // SAFETY: the result may be written.
    result(unsafe { sys::cuCtxGetCurrent(&mut context) })?;
    Ok(context)
}

impl Drop for Entered {
    fn drop(&mut self) {
        if let Some(before) = self.before {
            // An error here can't be handled.
            // SAFETY: it was the thread's current context.
            let _ = unsafe { sys::cuCtxSetCurrent(before) };
        }
    }
}

/// What allocations keep alive: the context, and where they lie.
struct Shared {
    ordinal: u32,
    context: Context,
    arena: Mutex<Arena>,
}

impl Shared {
    fn arena(&self) -> MutexGuard<'_, Arena> {
        // None of the arena's functions panics half-way through a change.
        self.arena.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Memory of the device.
pub struct Allocation {
    address: u64,
    bytes: usize,
    shared: Arc<Shared>,
}

impl Allocation {
    pub(super) fn address(&self) -> u64 {
        self.address
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        if let Some(slab) = self.shared.arena().give_back(self.address, self.bytes) {
            // An error here can't be handled; an earlier one has been reported.
            let _entered = Entered::new(&self.shared.context);
            // SAFETY: allocated by `Device::take`, and no longer the arena's; the driver waits for work that uses it.
            let _ = unsafe { sys::cuMemFree_v2(slab) };
        }
    }
}

/// The device with what is queued on it.
pub(super) struct Device {
    name: String,
    instructions: Instructions,
    staging: Mutex<Staging>,
    stream: Stream,
    kernels: Kernels,
    /// Set when the device is dropped: the fields above are freed in its context, and then it is left.
    closing: Option<Entered>,
    shared: Arc<Shared>,
}

// SAFETY: a stream and functions may be used from any thread in which their context is current, and each method makes
// it so.
unsafe impl Send for Device {}
// SAFETY: as above; the driver orders concurrent calls.
unsafe impl Sync for Device {}

impl Drop for Device {
    fn drop(&mut self) {
        // The pinned buffer, the stream and the modules may be freed when nothing uses them any more and their context
        // is current. An error here can't be handled.
        self.closing = self.enter().ok();
        let _ = self.stream.synchronize();
    }
}

impl Device {
    /// Opens device `ordinal`.
    ///
    /// # Errors
    /// One line that says what is missing: the driver, the device, or what it can't do.
    pub fn open(ordinal: u32) -> Result<Self> {
        let device = find_device(ordinal)?;
        let refused = |what: String| device_error(ordinal, what);
        let failed = |what: &'static str| move |error: CudaError| refused(format!("{what}: {error}"));
        let mut name = device.name().map_err(failed("has no name"))?;
        let attribute = |which| device.get_attribute(which).map_err(failed("can't be asked"));
        let major = attribute(DeviceAttribute::ComputeCapabilityMajor)? as u32;
        let minor = attribute(DeviceAttribute::ComputeCapabilityMinor)? as u32;
        if (major, minor) < CAPABILITY {
            let (least_major, least_minor) = CAPABILITY;
            let required = format!("{least_major}.{least_minor} or later is required");
            return Err(refused(format!("{name} has compute capability {major}.{minor}; {required}")));
        }
        let entering = |refusal: Refusal| refused(format!("no context: {refusal}"));
        // A new context is at once the thread's current one.
        let before = current().map_err(entering)?;
        let context = Context::new(device).map_err(|error| match error {
            CudaError::DeviceUnavailable => {
                refused(format!("another process has {name} for itself, or its compute mode lets none use it: {error}"))
            }
            error => failed("no context")(error),
        })?;
        let _entered = Entered::after(before, &context).map_err(entering)?;
        let mut kernels = Kernels::default();
        kernels.load(PTX).map_err(failed("the driver can't compile the kernels; it may be too old"))?;
        let mut instructions = Instructions::Mma;
        if (major, minor) == HOPPER {
            // A driver that can't compile these (before CUDA 12) still runs the others.
            match kernels.load(HOPPER_PTX) {
                Ok(()) => instructions = Instructions::Wgmma,
                Err(error) => name += &format!(" ({WITHOUT_WGMMA}: {error})"),
            }
        }
        let stream = Stream::new(StreamFlags::NON_BLOCKING, None).map_err(failed("no stream"))?;
        let staging = Mutex::new(Staging::new().map_err(failed("no pinned memory"))?);
        let shared = Arc::new(Shared { ordinal, context, arena: Mutex::default() });
        Ok(Self { name, instructions, staging, stream, kernels, closing: None, shared })
    }

    /// The matrix instructions for which there are kernels.
    pub fn instructions(&self) -> Instructions {
        self.instructions
    }

    /// A name for people.
    pub fn describe(&self) -> String {
        format!("cuda:{}, {}", self.shared.ordinal, self.name)
    }

    /// An error of this device.
    pub fn error(&self, what: impl fmt::Display) -> Error {
        device_error(self.shared.ordinal, what)
    }

    fn failed(&self, what: &str, error: impl fmt::Display) -> Error {
        self.error(format_args!("{what}: {error}"))
    }

    /// What one of the driver's functions returned.
    fn done(&self, what: &str, code: sys::CUresult) -> Result<()> {
        result(code).map_err(|error| self.failed(what, error))
    }

    /// Makes the device's context the calling thread's current one for as long as the result lives.
    pub fn enter(&self) -> Result<Entered> {
        Entered::new(&self.shared.context).map_err(|error| self.failed("no context", error))
    }

    /// Free bytes, and all bytes.
    fn memory(&self) -> Result<(usize, usize)> {
        let (mut free, mut total) = (0, 0);
        // SAFETY: both may be written.
        self.done("memory", unsafe { sys::cuMemGetInfo_v2(&mut free, &mut total) })?;
        Ok((free, total))
    }

    /// Bytes that can still be allocated.
    pub fn free_bytes(&self) -> Result<u64> {
        let _entered = self.enter()?;
        Ok((self.memory()?.0 + self.shared.arena().free().0) as u64)
    }

    /// Memory with unspecified contents.
    pub fn allocate(&self, bytes: usize) -> Result<Allocation> {
        let _entered = self.enter()?;
        Ok(Allocation { address: self.take(bytes)?, bytes, shared: self.shared.clone() })
    }

    /// The address of `bytes` unused bytes.
    fn take(&self, bytes: usize) -> Result<u64> {
        let arena = &mut *self.shared.arena();
        if let Some(address) = arena.take(bytes) {
            return Ok(address);
        }
        let (free, total) = self.memory()?;
        // Where a whole slab doesn't fit any more, what is asked for may.
        let least = arena::rounded(bytes);
        for slab in [least.max(total / SLABS), least] {
            let mut address = 0;
            // SAFETY: `address` may be written.
            match result(unsafe { sys::cuMemAlloc_v2(&mut address, slab) }) {
                Ok(()) => {
                    arena.add(address, slab);
                    return Ok(arena.take(bytes).expect("a slab is large enough"));
                }
                Err(Refusal(sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY)) => {}
                Err(error) => return Err(self.failed("memory", error)),
            }
        }
        let (unused, largest) = arena.free();
        let [free, total, unused, largest] =
            [free, total, unused, largest].map(|bytes| bytes as f64 / f64::from(1 << 20));
        let here = format!("{free:.1} of {total:.1} MiB are free");
        let own = format!("{unused:.1} MiB are free in what was allocated before, {largest:.1} of them in one piece");
        Err(Error::OutOfMemory { bytes: bytes as u64, free: Some(format!("{here}, and {own}")) })
    }

    /// The stream, for libraries that queue work.
    pub fn stream(&self) -> *mut c_void {
        self.stream.as_inner().cast()
    }

    /// The device's time for what `work` queues: the mean of three runs, after a first one.
    pub fn milliseconds(&self, mut work: impl FnMut() -> Result<()>) -> Result<f32> {
        let failed = |error: CudaError| self.failed("an event", error);
        let event = || Event::new(EventFlags::DEFAULT).map_err(failed);
        let [start, end] = [event()?, event()?];
        work()?;
        start.record(&self.stream).map_err(failed)?;
        for _ in 0..3 {
            work()?;
        }
        end.record(&self.stream).map_err(failed)?;
        end.synchronize().map_err(failed)?;
        Ok(end.elapsed_time_f32(&start).map_err(failed)? / 3.0)
    }

    fn staging(&self) -> MutexGuard<'_, Staging> {
        self.staging.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for all queued work; then the pinned buffer is free.
    fn wait(&self, staging: &mut Staging) -> Result<()> {
        self.stream.synchronize().map_err(|error| self.failed("the device's work failed", error))?;
        staging.clear();
        Ok(())
    }

    /// Queues a copy to the device. `from` has been read when this returns.
    ///
    /// # Safety
    /// `to` is the address of as many bytes.
    pub unsafe fn write(&self, to: Ptr, mut from: &[u8]) -> Result<()> {
        let _entered = self.enter()?;
        let staging = &mut *self.staging();
        let mut to = to.0;
        while !from.is_empty() {
            if staging.is_full() {
                self.wait(staging)?;
            }
            let copies = staging.put(from);
            // SAFETY: the caller's contract; the copies aren't changed before the stream has been waited for.
            let code =
                unsafe { sys::cuMemcpyHtoDAsync_v2(to, copies.as_ptr().cast(), copies.len(), self.stream.as_inner()) };
            self.done("an upload failed", code)?;
            to += copies.len() as u64;
            from = &from[copies.len()..];
        }
        Ok(())
    }

    /// Copies from the device, and waits for the copy and all work before it.
    ///
    /// # Safety
    /// `from` is the address of as many bytes.
    pub unsafe fn read(&self, to: &mut [u8], from: Ptr) -> Result<()> {
        let _entered = self.enter()?;
        if !to.is_empty() {
            let stream = self.stream.as_inner();
            // SAFETY: the caller's contract; `to` is borrowed until the copy has been waited for.
            let code = unsafe { sys::cuMemcpyDtoHAsync_v2(to.as_mut_ptr().cast(), from.0, to.len(), stream) };
            self.done("a download failed", code)?;
        }
        self.wait(&mut self.staging())
    }

    /// Queues a copy on the device.
    ///
    /// # Safety
    /// Both are addresses of `bytes` bytes, which don't overlap.
    pub unsafe fn copy(&self, to: Ptr, from: Ptr, bytes: usize) -> Result<()> {
        let _entered = self.enter()?;
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: the caller's contract.
        let code = unsafe { sys::cuMemcpyDtoDAsync_v2(to.0, from.0, bytes, self.stream.as_inner()) };
        self.done("a copy failed", code)
    }

    /// Queues the clearing of `bytes` bytes.
    ///
    /// # Safety
    /// `at` is their address.
    pub unsafe fn zero(&self, at: Ptr, bytes: usize) -> Result<()> {
        let _entered = self.enter()?;
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: the caller's contract.
        self.done("clearing failed", unsafe { sys::cuMemsetD8Async(at.0, 0, bytes, self.stream.as_inner()) })
    }

    /// Queues a kernel.
    ///
    /// # Safety
    /// As for [`Driver::launch`](crate::backend::cuda::Driver::launch).
    pub unsafe fn launch(&self, launch: &Launch) -> Result<()> {
        let _entered = self.enter()?;
        let kernel = &self.kernels.by_name[launch.entry];
        if launch.shared > kernel.shared.load(Ordering::Relaxed) {
            let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function belongs to a loaded module.
            let code = unsafe { sys::cuFuncSetAttribute(kernel.function, attribute, launch.shared as i32) };
            self.done("a kernel's shared memory", code)?;
            kernel.shared.store(launch.shared, Ordering::Relaxed);
        }
        let slots: Vec<u64> = launch.args.iter().map(|arg| arg.slot()).collect();
        // The driver reads as many bytes as a parameter has; on a little-endian host the first ones are its value.
        let mut params: Vec<*mut c_void> =
            slots.iter().map(|slot| std::ptr::from_ref(slot).cast_mut().cast()).collect();
        let [x, y] = launch.grid;
        // SAFETY: parameters are those of the entry (a test compares them with the PTX) and live until the call
        // returns, when the driver has read them; the rest is this function's contract.
        let code = unsafe {
            let stream = self.stream.as_inner();
            let (params, extra) = (params.as_mut_ptr(), std::ptr::null_mut());
            sys::cuLaunchKernel(kernel.function, x, y, 1, launch.threads, 1, 1, launch.shared, stream, params, extra)
        };
        self.done(launch.entry, code)
    }
}
