//! A GPU through the CUDA driver: the only file that knows `cust`.
//!
//! One context, one stream; one module for every device, and one more for Hopper. Buffers are parts of a few large allocations.
//! Uploads go through a pinned buffer, so that they are queued like everything else and the caller's memory is free at once.

use super::Driver;
use super::arena::{self, Arena};
use super::library::Library;
use crate::{Error, Result};
use core::ffi::{CStr, c_void};
use core::fmt;
use cust::context::{Context, CurrentContext};
use cust::device::{Device, DeviceAttribute};
use cust::error::CudaError;
use cust::event::{Event, EventFlags};
use cust::memory::LockedBuffer;
use cust::module::Module;
use cust::stream::{Stream, StreamFlags};
use cust::sys;
use hydra_ptx::launch::{Instructions, Launch, Product, Ptr, gemm};
use hydra_ptx::{CAPABILITY, HOPPER, HOPPER_PTX, PTX};
use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

/// Bytes of the pinned buffer. When it is full, an upload waits for the stream.
const STAGING: usize = 8 << 20;

/// The device's memory by what the arena asks for at once: over a gigabyte on the largest devices, and little where there is little.
const SLABS: usize = 64;

/// Shared memory of a block that a kernel has without asking.
const SHARED: u32 = 48 * 1024;

/// A kernel, and the most shared memory it has asked for.
struct Kernel {
    function: sys::CUfunction,
    shared: AtomicU32,
}

/// The pinned buffer, and how much of it is under way.
struct Staging {
    buffer: LockedBuffer<u8>,
    used: usize,
}

/// What memory keeps alive: the context, and where buffers are.
struct Shared {
    ordinal: u32,
    context: Context,
    arena: Mutex<Arena>,
}

impl Shared {
    fn arena(&self) -> MutexGuard<'_, Arena> {
        // No call of the arena's leaves it half-way.
        self.arena.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a Hopper's description says if its own kernels can't be used.
const WITHOUT_WGMMA: &str = "slower than it could be, without wgmma";

/// One NVIDIA GPU.
pub struct Gpu {
    name: String,
    instructions: Instructions,
    /// cuBLASLt, from the first large product on.
    library: OnceLock<Result<Option<Library>>>,
    kernels: HashMap<&'static str, Kernel>,
    staging: Mutex<Staging>,
    stream: Stream,
    _modules: Vec<Module>,
    shared: Arc<Shared>,
}

// SAFETY: a stream and functions may be used from any thread in which their context is current, and each method makes it so.
unsafe impl Send for Gpu {}
// SAFETY: as above; the driver orders concurrent calls.
unsafe impl Sync for Gpu {}

impl Drop for Gpu {
    fn drop(&mut self) {
        // The pinned buffer, the stream and the module go with their context current, and when nothing uses them any more.
        // Nothing can be done about an error here.
        let _ = self.enter();
        let _ = self.stream.synchronize();
    }
}

/// Memory of a GPU.
pub struct Memory {
    address: u64,
    bytes: usize,
    shared: Arc<Shared>,
}

impl Drop for Memory {
    fn drop(&mut self) {
        if let Some(slab) = self.shared.arena().give_back(self.address, self.bytes) {
            // Nothing can be done about an error here; if there was one before, it has been told.
            let _ = CurrentContext::set_current(&self.shared.context);
            // SAFETY: allocated by `room`, and the arena has let go of it; the driver waits for work that uses it.
            let _ = unsafe { sys::cuMemFree_v2(slab) };
        }
    }
}

fn mib(bytes: usize) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

/// What one of the driver's functions returned that isn't success.
struct Refusal(sys::CUresult);

impl fmt::Display for Refusal {
    /// The driver's text, and the number, by which it can be looked up.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = std::ptr::null();
        // SAFETY: `text` is there to be written; what it is made to point at is the driver's, for ever.
        let text = unsafe {
            let _ = sys::cuGetErrorString(self.0, &mut text);
            if text.is_null() { c"unknown error" } else { CStr::from_ptr(text) }
        };
        write!(f, "{} ({})", text.to_string_lossy(), self.0 as u32)
    }
}

/// Has the driver compile a module, and adds its kernels.
fn load(
    text: &'static str,
    modules: &mut Vec<Module>,
    kernels: &mut HashMap<&'static str, Kernel>,
) -> Result<(), CudaError> {
    let module = Module::from_ptx(text, &[])?;
    for line in text.lines().filter_map(|line| line.strip_prefix(".visible .entry ")) {
        let entry = line.trim_end_matches('(');
        let function = module.get_function(entry)?.to_raw();
        kernels.insert(entry, Kernel { function, shared: AtomicU32::new(SHARED) });
    }
    modules.push(module);
    Ok(())
}

/// The result of one of the driver's functions.
fn result(code: sys::CUresult) -> Result<(), Refusal> {
    if code == sys::CUresult::CUDA_SUCCESS { Ok(()) } else { Err(Refusal(code)) }
}

impl Gpu {
    /// Opens device `ordinal`. Fails with one line that says what is missing: the driver, the device, or what it can't do.
    pub fn open(ordinal: u32) -> Result<Self> {
        let refused = |what: String| Error::Device(format!("cuda:{ordinal}: {what}"));
        sys::driver::open().map_err(|error| refused(format!("no NVIDIA driver: {error}")))?;
        let failed = |what: &'static str| move |error: CudaError| refused(format!("{what}: {error}"));
        // SAFETY: nothing is asked of the caller. (cust's own has no names for what is wrong with a driver.)
        match result(unsafe { sys::cuInit(0) }) {
            Err(Refusal(sys::CUresult::CUDA_ERROR_NO_DEVICE)) => {
                return Err(refused("the NVIDIA driver finds no device".into()));
            }
            other => other.map_err(|refusal| refused(format!("the NVIDIA driver doesn't start: {refusal}")))?,
        }
        let count = Device::num_devices().map_err(failed("devices can't be counted"))?;
        if ordinal >= count {
            return Err(refused(format!("there is no such device, the driver has {count}, counted from 0")));
        }
        let device = Device::get_device(ordinal).map_err(failed("can't be opened"))?;
        let mut name = device.name().map_err(failed("has no name"))?;
        let attribute = |which| device.get_attribute(which).map_err(failed("can't be asked"));
        let major = attribute(DeviceAttribute::ComputeCapabilityMajor)?;
        let minor = attribute(DeviceAttribute::ComputeCapabilityMinor)?;
        let (least_major, least_minor) = CAPABILITY;
        if (major as u32, minor as u32) < CAPABILITY {
            let wanted = format!("{least_major}.{least_minor} or later is wanted");
            return Err(refused(format!("{name} has compute capability {major}.{minor}; {wanted}")));
        }
        let context = Context::new(device).map_err(failed("no context"))?;
        CurrentContext::set_current(&context).map_err(failed("no context"))?;
        let (mut modules, mut kernels) = (Vec::new(), HashMap::new());
        load(PTX, &mut modules, &mut kernels)
            .map_err(failed("the driver can't compile the kernels; it may be too old"))?;
        let mut instructions = Instructions::Mma;
        if (major as u32, minor as u32) == HOPPER {
            // A driver that can't compile these (before CUDA 12) runs the others all the same.
            match load(HOPPER_PTX, &mut modules, &mut kernels) {
                Ok(()) => instructions = Instructions::Wgmma,
                Err(error) => name += &format!(" ({WITHOUT_WGMMA}: {error})"),
            }
        }
        let stream = Stream::new(StreamFlags::NON_BLOCKING, None).map_err(failed("no stream"))?;
        // SAFETY: written before it is read.
        let buffer = unsafe { LockedBuffer::uninitialized(STAGING) }.map_err(failed("no pinned memory"))?;
        let staging = Mutex::new(Staging { buffer, used: 0 });
        let shared = Arc::new(Shared { ordinal, context, arena: Mutex::default() });
        Ok(Self { name, instructions, library: OnceLock::new(), kernels, staging, stream, _modules: modules, shared })
    }

    /// The same without cuBLASLt, to be compared with it.
    pub fn without_library(mut self) -> Self {
        self.library = OnceLock::from(Ok(None));
        self
    }

    /// The same without Hopper's own matrix instructions, to be compared with them.
    pub fn without_wgmma(mut self) -> Self {
        self.instructions = Instructions::Mma;
        self
    }

    fn failed(&self, what: &str, error: impl fmt::Display) -> Error {
        self.error(format_args!("{what}: {error}"))
    }

    fn enter(&self) -> Result<()> {
        CurrentContext::set_current(&self.shared.context).map_err(|error| self.failed("no context", error))
    }

    /// What one of the driver's functions returned.
    fn done(&self, what: &str, code: sys::CUresult) -> Result<()> {
        result(code).map_err(|error| self.failed(what, error))
    }

    /// Free bytes, and all.
    fn memory(&self) -> Result<(usize, usize)> {
        let (mut free, mut total) = (0, 0);
        // SAFETY: both are there to be written.
        self.done("memory", unsafe { sys::cuMemGetInfo_v2(&mut free, &mut total) })?;
        Ok((free, total))
    }

    /// Where `bytes` bytes are that nobody has.
    fn room(&self, bytes: usize) -> Result<u64> {
        let arena = &mut *self.shared.arena();
        if let Some(address) = arena.take(bytes) {
            return Ok(address);
        }
        let (free, total) = self.memory()?;
        // Where a whole slab doesn't fit any more, what is asked for may.
        let least = arena::rounded(bytes);
        for slab in [least.max(total / SLABS), least] {
            let mut address = 0;
            // SAFETY: `address` is there to be written.
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
        let [bytes, free, total, unused, largest] = [bytes, free, total, unused, largest].map(mib);
        let here = format!("{free:.1} of {total:.1} MiB are free");
        let own = format!("{unused:.1} MiB are free in what was allocated before, {largest:.1} of them in one piece");
        let what = format!("out of memory: {bytes:.1} MiB asked for, {here}, and {own}");
        Err(self.error(what))
    }

    /// cuBLASLt, if there is one.
    fn library(&self) -> Result<Option<&Library>> {
        self.enter()?;
        match self.library.get_or_init(|| Library::open(self)) {
            Ok(library) => Ok(library.as_ref()),
            Err(error) => Err(Error::Device(error.to_string())),
        }
    }

    /// An error of this device.
    pub(super) fn error(&self, what: impl fmt::Display) -> Error {
        Error::Device(format!("cuda:{}: {what}", self.shared.ordinal))
    }

    /// The stream, for others who queue work.
    pub(super) fn stream(&self) -> *mut c_void {
        self.stream.as_inner().cast()
    }

    /// The device's time for what `work` queues: the mean of three, after one more.
    pub(super) fn milliseconds(&self, mut work: impl FnMut() -> Result<()>) -> Result<f32> {
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

    /// Copies what is at `from`, and waits for that.
    ///
    /// # Safety
    /// There are so many bytes.
    pub(super) unsafe fn read(&self, to: &mut [u8], from: Ptr) -> Result<()> {
        self.enter()?;
        if !to.is_empty() {
            let stream = self.stream.as_inner();
            // SAFETY: the caller's; `to` is borrowed until the copy has been waited for.
            let code = unsafe { sys::cuMemcpyDtoHAsync_v2(to.as_mut_ptr().cast(), from.0, to.len(), stream) };
            self.done("a download failed", code)?;
        }
        self.wait(&mut self.staging())
    }

    fn staging(&self) -> MutexGuard<'_, Staging> {
        self.staging.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for all that was asked for; so the pinned buffer is free.
    fn wait(&self, staging: &mut Staging) -> Result<()> {
        self.stream.synchronize().map_err(|error| self.failed("the device's work failed", error))?;
        staging.used = 0;
        Ok(())
    }

    #[track_caller]
    fn range(memory: &Memory, at: usize, bytes: usize) -> u64 {
        let fits = at.checked_add(bytes).is_some_and(|end| end <= memory.bytes);
        assert!(fits, "{bytes} bytes from {at} on of {}", memory.bytes);
        memory.address + at as u64
    }
}

impl Driver for Gpu {
    type Memory = Memory;

    fn allocate(&self, bytes: usize) -> Result<Memory> {
        self.enter()?;
        let mut memory = Memory { address: self.room(bytes)?, bytes, shared: self.shared.clone() };
        self.zero(&mut memory, bytes)?;
        Ok(memory)
    }

    fn address(&self, memory: &Memory) -> u64 {
        memory.address
    }

    fn upload(&self, to: &mut Memory, at: usize, from: &[u8]) -> Result<()> {
        self.enter()?;
        let to = Self::range(to, at, from.len());
        let staging = &mut *self.staging();
        let mut copied = 0;
        while copied < from.len() {
            if staging.used == STAGING {
                self.wait(staging)?;
            }
            let len = (from.len() - copied).min(STAGING - staging.used);
            let room = &mut staging.buffer.as_mut_slice()[staging.used..][..len];
            room.copy_from_slice(&from[copied..][..len]);
            let stream = self.stream.as_inner();
            // SAFETY: the range is checked; this part of the buffer isn't written again before the stream has been waited for.
            let code = unsafe { sys::cuMemcpyHtoDAsync_v2(to + copied as u64, room.as_ptr().cast(), len, stream) };
            self.done("an upload failed", code)?;
            copied += len;
            staging.used += len;
        }
        Ok(())
    }

    fn download(&self, to: &mut [u8], from: &Memory) -> Result<()> {
        // SAFETY: the range is checked.
        unsafe { self.read(to, Ptr(Self::range(from, 0, to.len()))) }
    }

    fn copy(&self, to: &mut Memory, at: usize, from: &Memory, bytes: usize) -> Result<()> {
        self.enter()?;
        let (to, from) = (Self::range(to, at, bytes), Self::range(from, 0, bytes));
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: the ranges are checked, and of different allocations: one is borrowed exclusively.
        let code = unsafe { sys::cuMemcpyDtoDAsync_v2(to, from, bytes, self.stream.as_inner()) };
        self.done("a copy failed", code)
    }

    fn zero(&self, memory: &mut Memory, bytes: usize) -> Result<()> {
        self.enter()?;
        let at = Self::range(memory, 0, bytes);
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: the range is checked.
        self.done("clearing failed", unsafe { sys::cuMemsetD8Async(at, 0, bytes, self.stream.as_inner()) })
    }

    unsafe fn launch(&self, launch: &Launch) -> Result<()> {
        self.enter()?;
        let kernel = &self.kernels[launch.entry];
        if launch.shared > kernel.shared.load(Ordering::Relaxed) {
            let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function is of this module.
            let code = unsafe { sys::cuFuncSetAttribute(kernel.function, attribute, launch.shared as i32) };
            self.done("a kernel's shared memory", code)?;
            kernel.shared.store(launch.shared, Ordering::Relaxed);
        }
        let slots: Vec<u64> = launch.args.iter().map(|arg| arg.slot()).collect();
        // The driver reads as many bytes as the parameter has: on a little-endian host the first ones are the value.
        let mut params: Vec<*mut c_void> =
            slots.iter().map(|slot| std::ptr::from_ref(slot).cast_mut().cast()).collect();
        let [x, y] = launch.grid;
        // SAFETY: parameters are those of the entry (a test compares them with the PTX) and live until the call returns, when
        // the driver has read them; the rest is this function's contract.
        let code = unsafe {
            let stream = self.stream.as_inner();
            let (params, extra) = (params.as_mut_ptr(), std::ptr::null_mut());
            sys::cuLaunchKernel(kernel.function, x, y, 1, launch.threads, 1, 1, launch.shared, stream, params, extra)
        };
        result(code).map_err(|error| self.failed(launch.entry, error))
    }

    unsafe fn multiply(&self, product: &Product<'_>) -> Result<()> {
        let own = gemm(self.instructions.best_for(product), product);
        let library = if product.is_large() { self.library()? } else { None };
        // SAFETY: the caller's.
        unsafe {
            match library {
                Some(library) => library.multiply(self, product, &own),
                None => self.launch(&own),
            }
        }
    }

    fn instructions(&self) -> Instructions {
        self.instructions
    }

    fn free_bytes(&self) -> Result<u64> {
        self.enter()?;
        Ok((self.memory()?.0 + self.shared.arena().free().0) as u64)
    }

    fn describe(&self) -> String {
        format!("cuda:{}, {}", self.shared.ordinal, self.name)
    }
}
