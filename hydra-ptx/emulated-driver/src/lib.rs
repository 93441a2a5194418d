//! The part of the CUDA driver API that Hydra uses, on the CPU: memory is the emulator's, a launch runs the kernel's
//! source.
//!
//! Copied to a folder as `libcuda.so.1`, with `LD_LIBRARY_PATH` naming that folder, it makes `--device cuda:0` work on
//! any machine, slowly. So the whole path from the command line through `cust` to the kernels' parameters is tested
//! without a GPU.
//!
//! It is as strict as a driver may be. Launches with an empty grid, or with more shared memory than was requested, are
//! refused; new memory is not zero; all work has to be in the one stream. Queued work is done as late as possible, when
//! it is waited for, so that memory of the host that is reused too early is noticed. A context belongs to one thread. What
//! belongs to the device's primary context is refused where that isn't the thread's current one.
//! Calls that would make a program wait for a real device are written, one a line, to the file that
//! `HYDRA_EMULATED_CALLS` names.

#![allow(non_snake_case, clippy::missing_safety_doc)]
#![allow(unsafe_op_in_unsafe_fn)] // every function trusts its C caller

use core::ffi::{CStr, c_char, c_void};
use hydra_ptx_device::emulator::{Global, Grid, Kind, launch};
use hydra_ptx_device::entries;
use std::alloc::{Layout, alloc};
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::fs::OpenOptions;
use std::io::Write;
use std::time::Instant;

const OK: u32 = 0;
const INVALID_VALUE: u32 = 1;
const OUT_OF_MEMORY: u32 = 2;
const DEVICE_UNAVAILABLE: u32 = 46;
const INVALID_DEVICE: u32 = 101;
const INVALID_CONTEXT: u32 = 201;
const NO_BINARY: u32 = 209;
const UNSUPPORTED_PTX_VERSION: u32 = 222;
const NOT_FOUND: u32 = 500;

/// The device's primary context.
const PRIMARY: usize = 1;
/// The handle of other contexts, which a host program makes; nothing can be done in them.
const OTHER: usize = 6;
/// The one stream's handle.
const STREAM: usize = 3;
/// Shared memory of a block that a kernel has without asking.
const SHARED: i32 = 48 * 1024;
/// The largest grid.
const MOST_BLOCKS: [u32; 2] = [(1 << 31) - 1, (1 << 16) - 1];

thread_local! {
    /// The current context, or 0.
    static CURRENT: Cell<usize> = const { Cell::new(0) };
    static MEMORY: RefCell<HashMap<u64, Global<u8>>> = RefCell::default();
    static SHARED_OF: RefCell<HashMap<usize, i32>> = RefCell::default();
    /// Queued work of the stream.
    static QUEUE: RefCell<Vec<Box<dyn FnOnce()>>> = RefCell::default();
}

/// Queues `work`.
fn later(stream: usize, work: impl FnOnce() + 'static) {
    assert_eq!(stream, STREAM);
    QUEUE.with_borrow_mut(|queue| queue.push(Box::new(work)));
}

/// Queues `work` on this number of bytes. The driver API doesn't specify what happens with none, so that is an error.
fn later_with(bytes: usize, stream: usize, work: impl FnOnce() + 'static) {
    assert_ne!(bytes, 0);
    later(stream, work);
}

/// Does all queued work.
fn wait() {
    QUEUE.take().into_iter().for_each(|work| work());
}

/// Whether the primary context is the thread's current one.
fn in_context() -> bool {
    CURRENT.get() == PRIMARY
}

/// Whether no work is queued.
fn idle() -> bool {
    QUEUE.with_borrow(Vec::is_empty)
}

/// Functions of NVIDIA's libraries, see their documentation.
macro_rules! functions {
    ($(fn $name:ident($($argument:ident: $ty:ty),* $(,)?) $body:block)*) => {$(
        /// See NVIDIA's documentation.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name($($argument: $ty),*) -> u32 $body
    )*};
}

/// Functions that need the primary context to be the current one.
macro_rules! in_context {
    ($(fn $name:ident($($argument:ident: $ty:ty),* $(,)?) $body:block)*) => {
        functions! {$(
            fn $name($($argument: $ty),*) {
                if !in_context() {
                    return INVALID_CONTEXT;
                }
                $body
            }
        )*}
    };
}

mod blas; // here, where it sees the macros

/// Adds a line to the list of calls, if a file is named.
fn note(call: &str) {
    if let Some(path) = std::env::var_os("HYDRA_EMULATED_CALLS") {
        let file = OpenOptions::new().create(true).append(true).open(path);
        file.and_then(|mut file| writeln!(file, "{call}")).expect("a file that can be written");
    }
}

/// The device's compute capability, times ten.
fn capability() -> i32 {
    std::env::var("HYDRA_EMULATED_CAPABILITY").ok().and_then(|text| text.parse().ok()).unwrap_or(80)
}

/// Whether this error was asked for.
fn refuses(error: u32) -> bool {
    std::env::var("HYDRA_EMULATED_REFUSAL").is_ok_and(|code| code.parse() == Ok(error))
}

/// Bytes of the device's memory.
fn total() -> usize {
    std::env::var("HYDRA_EMULATED_MIB").ok().and_then(|text| text.parse().ok()).unwrap_or(1024) << 20
}

fn used() -> usize {
    MEMORY.with_borrow(|memory| memory.values().map(|memory| memory.values().len()).sum())
}

functions! {
    fn cuInit(_flags: u32) {
        OK
    }

    fn cuDeviceGetCount(count: *mut i32) {
        *count = 1;
        OK
    }

    fn cuDeviceGet(device: *mut i32, ordinal: i32) {
        *device = ordinal;
        if ordinal == 0 { OK } else { INVALID_DEVICE }
    }

    fn cuDeviceGetName(name: *mut c_char, len: i32, _device: i32) {
        let text = c"emulated";
        assert!(len as usize > text.count_bytes());
        name.copy_from_nonoverlapping(text.as_ptr(), text.count_bytes() + 1);
        OK
    }

    // 75 and 76 are the compute capability; `HYDRA_EMULATED_CAPABILITY=75` makes it an old device, 90 a Hopper.
    fn cuDeviceGetAttribute(value: *mut i32, attribute: i32, _device: i32) {
        let capability = capability();
        *value = match attribute {
            75 => capability / 10,
            76 => capability % 10,
            _ => return INVALID_VALUE,
        };
        OK
    }

    // `HYDRA_EMULATED_REFUSAL=46` makes it another process's device.
    fn cuDevicePrimaryCtxRetain(context: *mut usize, _device: i32) {
        *context = PRIMARY;
        if refuses(DEVICE_UNAVAILABLE) { DEVICE_UNAVAILABLE } else { OK }
    }

    fn cuDevicePrimaryCtxRelease_v2(_device: i32) {
        assert!(idle(), "cuDevicePrimaryCtxRelease with work queued");
        OK
    }

    // What these return is for a destructor, which can't handle it.
    fn cuMemFreeHost(_at: usize) {
        assert!(in_context() && idle(), "cuMemFreeHost without a context, or with work queued");
        OK
    }

    fn cuModuleUnload(_module: usize) {
        assert!(in_context() && idle(), "cuModuleUnload without a context, or with work queued");
        OK
    }

    fn cuStreamDestroy_v2(_stream: usize) {
        assert!(in_context(), "cuStreamDestroy without a context");
        OK
    }

    fn cuMemFree_v2(at: u64) {
        note("cuMemFree");
        assert!(in_context(), "cuMemFree without a context");
        wait();
        if MEMORY.with_borrow_mut(|memory| memory.remove(&at)).is_some() { OK } else { INVALID_VALUE }
    }

    fn cuEventDestroy_v2(event: *mut Option<Instant>) {
        assert!(in_context() && idle(), "cuEventDestroy without a context, or with work queued");
        drop(Box::from_raw(event));
        OK
    }

    fn cuCtxCreate_v2(context: *mut usize, _flags: u32, _device: i32) {
        *context = OTHER;
        CURRENT.set(OTHER);
        OK
    }

    fn cuCtxDestroy_v2(context: usize) {
        if CURRENT.get() == context {
            CURRENT.set(0);
        }
        if context == OTHER { OK } else { INVALID_CONTEXT }
    }

    fn cuCtxGetCurrent(context: *mut usize) {
        *context = CURRENT.get();
        OK
    }

    fn cuCtxSetCurrent(context: usize) {
        if ![0, PRIMARY, OTHER].contains(&context) {
            return INVALID_CONTEXT;
        }
        CURRENT.set(context);
        OK
    }

    fn cuGetErrorString(error: u32, text: *mut *const c_char) {
        *text = match error {
            OUT_OF_MEMORY => c"out of memory".as_ptr(),
            DEVICE_UNAVAILABLE => c"CUDA-capable device(s) is/are busy or unavailable".as_ptr(),
            UNSUPPORTED_PTX_VERSION => c"the provided PTX was compiled with an unsupported toolchain.".as_ptr(),
            INVALID_CONTEXT => c"invalid device context".as_ptr(),
            NOT_FOUND => c"named symbol not found".as_ptr(),
            _ => c"refused by the emulated driver".as_ptr(),
        };
        OK
    }
}

in_context! {
    // `HYDRA_EMULATED_REFUSAL=222` makes it a driver that is older than the PTX.
    fn cuModuleLoadDataEx(module: *mut usize, image: *const c_char, _options: u32, _names: usize, _values: usize) {
        *module = 2;
        if refuses(UNSUPPORTED_PTX_VERSION) {
            return UNSUPPORTED_PTX_VERSION;
        }
        let text = String::from_utf8_lossy(CStr::from_ptr(image).to_bytes());
        let target = text.lines().find_map(|line| line.strip_prefix(".target "));
        match target.map(|target| target.split(',').next().unwrap_or_default()) {
            Some("sm_80") => OK,
            // For this architecture only.
            Some("sm_90a") if capability() == 90 => OK,
            Some(_) => NO_BINARY,
            None => INVALID_VALUE,
        }
    }

    fn cuModuleGetFunction(function: *mut usize, _module: usize, name: *const c_char) {
        let name = CStr::from_ptr(name).to_bytes();
        match entries().position(|entry| entry.name.as_bytes() == name) {
            Some(place) => {
                *function = place + 1;
                OK
            }
            None => NOT_FOUND,
        }
    }

    fn cuStreamCreateWithPriority(stream: *mut usize, _flags: u32, _priority: i32) {
        *stream = STREAM;
        OK
    }

    fn cuMemAllocHost_v2(at: *mut *mut c_void, bytes: usize) {
        *at = alloc(Layout::from_size_align(bytes, 4096).expect("a size that exists")).cast();
        OK
    }

    fn cuMemAlloc_v2(at: *mut u64, bytes: usize) {
        note("cuMemAlloc");
        if bytes == 0 {
            return INVALID_VALUE;
        }
        if bytes > total() - used().min(total()) {
            return OUT_OF_MEMORY;
        }
        let memory = Global::new(&vec![0xffu8; bytes]);
        *at = memory.address();
        MEMORY.with_borrow_mut(|all| all.insert(memory.address(), memory));
        OK
    }

    fn cuStreamSynchronize(stream: usize) {
        note("cuStreamSynchronize");
        assert_eq!(stream, STREAM);
        wait();
        OK
    }

    fn cuEventCreate(event: *mut *mut Option<Instant>, _flags: u32) {
        *event = Box::into_raw(Box::new(None));
        OK
    }

    fn cuEventRecord(event: *mut Option<Instant>, stream: usize) {
        later(stream, move || *event = Some(Instant::now()));
        OK
    }

    fn cuEventSynchronize(_event: *const Option<Instant>) {
        note("cuEventSynchronize");
        wait();
        OK
    }

    fn cuEventElapsedTime(milliseconds: *mut f32, start: *const Option<Instant>, end: *const Option<Instant>) {
        let (Some(start), Some(end)) = (*start, *end) else { return INVALID_VALUE };
        *milliseconds = 1e3 * (end - start).as_secs_f32();
        OK
    }

    fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) {
        *total = self::total();
        *free = *total - used().min(*total);
        OK
    }

    fn cuMemcpyHtoDAsync_v2(to: u64, from: *const u8, bytes: usize, stream: usize) {
        later_with(bytes, stream, move || (to as *mut u8).copy_from(from, bytes));
        OK
    }

    fn cuMemcpyDtoHAsync_v2(to: *mut u8, from: u64, bytes: usize, stream: usize) {
        later_with(bytes, stream, move || to.copy_from(from as *const u8, bytes));
        OK
    }

    fn cuMemcpyDtoDAsync_v2(to: u64, from: u64, bytes: usize, stream: usize) {
        later_with(bytes, stream, move || (to as *mut u8).copy_from(from as *const u8, bytes));
        OK
    }

    fn cuMemsetD8Async(at: u64, value: u8, bytes: usize, stream: usize) {
        later_with(bytes, stream, move || (at as *mut u8).write_bytes(value, bytes));
        OK
    }

    // 8 is the most dynamic shared memory.
    fn cuFuncSetAttribute(function: usize, attribute: i32, value: i32) {
        SHARED_OF.with_borrow_mut(|all| all.insert(function, value));
        if attribute == 8 && value <= if capability() == 90 { 227 } else { 99 } * 1024 { OK } else { INVALID_VALUE }
    }

    fn cuLaunchKernel(
        function: usize,
        x: u32,
        y: u32,
        z: u32,
        threads: u32,
        threads_y: u32,
        threads_z: u32,
        shared: u32,
        stream: usize,
        params: *const *const u8,
        _extra: usize,
    ) {
        assert_eq!((z, threads_y, threads_z), (1, 1, 1));
        let granted = SHARED_OF.with_borrow(|all| all.get(&function).copied().unwrap_or(SHARED));
        if x == 0 || y == 0 || x > MOST_BLOCKS[0] || y > MOST_BLOCKS[1] || shared as i32 > granted {
            return INVALID_VALUE;
        }
        let entry = entries().nth(function - 1).expect("a function of the module");
        let slot = |(i, kind): (usize, &Kind)| {
            let at = *params.add(i);
            if *kind == Kind::U64 { at.cast::<u64>().read() } else { u64::from(at.cast::<u32>().read()) }
        };
        let slots: Vec<u64> = entry.params.iter().enumerate().map(slot).collect();
        later(stream, move || launch(entry, Grid { blocks: [x, y], threads, shared, seed: 1 }, &slots));
        OK
    }
}
