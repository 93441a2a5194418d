//! A GPU through the CUDA driver, and cuBLASLt where it is found and faster. Only the files in this folder know `cust`.

mod arena;
pub(super) mod blas;
mod device;
mod kernels;
mod library;
mod staging;
mod start;

use super::driver::Driver;
use crate::{Error, Result};
use device::{Allocation, Device, Entered};
use hydra_ptx::launch::{self, Instructions, Launch, Product, Ptr, gemm};
use library::Library;
use std::ops::Range;
use std::sync::OnceLock;

/// Free columns behind an operand, and free rows below a matrix: the sum of an adapter's ranks, or the rows of [A; R].
const ROOM: usize = 64;

/// One NVIDIA GPU.
pub struct Gpu {
    /// Looked for with the first large product.
    library: OnceLock<Result<Option<Library>>>,
    instructions: Instructions,
    device: Device,
}

impl Gpu {
    /// Opens device `ordinal`.
    ///
    /// # Errors
    /// One line that says what is missing: the driver, the device, or what it can't do.
    pub fn open(ordinal: u32) -> Result<Self> {
        let device = Device::open(ordinal)?;
        Ok(Self { library: OnceLock::new(), instructions: device.instructions(), device })
    }

    /// The same GPU without cuBLASLt, for comparisons.
    pub fn without_library(mut self) -> Self {
        self.library = OnceLock::from(Ok(None));
        self
    }

    /// The same GPU without Hopper's own matrix instructions, for comparisons.
    pub fn without_wgmma(mut self) -> Self {
        self.instructions = Instructions::Mma;
        self
    }

    /// cuBLASLt, if there is one, and memory for its workspace.
    fn library(&self) -> Result<Option<&Library>> {
        let _entered = self.device.enter()?;
        match self.library.get_or_init(|| Library::open(&self.device)) {
            Ok(Some(library)) => Ok(library.is_ready(&self.device)?.then_some(library)),
            Ok(None) => Ok(None),
            Err(error) => Err(Error::Device(error.to_string())),
        }
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        // The library is closed in the device's context. An error here can't be handled.
        let _entered = self.device.enter();
        self.library.take();
    }
}

impl Driver for Gpu {
    type Memory = Allocation;
    /// An error is that of the calls that follow.
    type Entered = Result<Entered>;

    fn enter(&self) -> Result<Entered> {
        self.device.enter()
    }

    fn allocate(&self, bytes: usize) -> Result<Allocation> {
        let mut memory = self.device.allocate(bytes)?;
        self.zero(&mut memory, bytes)?;
        Ok(memory)
    }

    fn address(&self, memory: &Allocation) -> u64 {
        memory.address()
    }

    fn upload(&self, to: &mut Allocation, at: usize, from: &[u8]) -> Result<()> {
        // SAFETY: the range is checked.
        unsafe { self.device.write(memory_range(to, at, from.len()), from) }
    }

    fn download(&self, to: &mut [u8], from: &Allocation) -> Result<()> {
        // SAFETY: the range is checked.
        unsafe { self.device.read(to, memory_range(from, 0, to.len())) }
    }

    fn copy(&self, to: &mut Allocation, at: usize, from: &Allocation, bytes: Range<usize>) -> Result<()> {
        let len = bytes.len();
        // SAFETY: the ranges are checked, and of different allocations, because one is borrowed exclusively.
        unsafe { self.device.copy(memory_range(to, at, len), memory_range(from, bytes.start, len), len) }
    }

    fn zero(&self, memory: &mut Allocation, bytes: usize) -> Result<()> {
        // SAFETY: the range is checked.
        unsafe { self.device.zero(memory_range(memory, 0, bytes), bytes) }
    }

    unsafe fn launch(&self, launch: &Launch) -> Result<()> {
        // SAFETY: the caller's contract.
        unsafe { self.device.launch(launch) }
    }

    unsafe fn multiply(&self, product: &Product<'_>) -> Result<()> {
        let kernel = gemm(self.instructions.best_for(product), product);
        let library = if product.is_large() { self.library()? } else { None };
        // SAFETY: the caller's contract.
        unsafe {
            match library {
                Some(library) => library.multiply(&self.device, product, &kernel),
                None => self.device.launch(&kernel),
            }
        }
    }

    fn room(&self, rows: usize, columns: usize) -> Result<usize> {
        // cuBLASLt multiplies two pairs of matrices only where they lie as one.
        let joins = launch::is_large(rows, columns) && self.library()?.is_some();
        Ok(if joins { ROOM } else { 0 })
    }

    fn instructions(&self) -> Instructions {
        self.instructions
    }

    fn free_bytes(&self) -> Result<u64> {
        self.device.free_bytes()
    }

    fn describe(&self) -> String {
        self.device.describe()
    }
}

/// The address of `bytes` bytes from `at` on.
///
/// # Panics
/// If the memory ends before them.
#[track_caller]
fn memory_range(memory: &Allocation, at: usize, bytes: usize) -> Ptr {
    let fits = at.checked_add(bytes).is_some_and(|end| end <= memory.bytes());
    assert!(fits, "{bytes} bytes from {at} on of {}", memory.bytes());
    Ptr(memory.address() + at as u64)
}
