//! What the backend needs of a device: memory, copies and launches, done in the order of the calls, as in a CUDA
//! stream.
//!
//! There are two implementations: [`super::Gpu`] through the CUDA driver and, in tests, the kernels' emulator, so that
//! everything above this trait is tested on machines without a GPU.

use crate::Result;
use hydra_ptx::launch::{Instructions, Launch, Product, gemm};
use std::ops::Range;

/// A device that runs `hydra_ptx`'s kernels.
pub trait Driver: Send + Sync + 'static {
    /// Memory of the device, freed when it is dropped.
    type Memory: Send + Sync;
    /// See [`Driver::enter`].
    type Entered;

    /// Prepares the calling thread for several calls in a row, which cost less while the result lives. No caller's code
    /// may run in between.
    fn enter(&self) -> Self::Entered;

    /// Allocates `bytes` zeroed bytes, aligned to 256. Fails if they don't fit, with the number of bytes that do.
    fn allocate(&self, bytes: usize) -> Result<Self::Memory>;
    /// The address of the first byte.
    fn address(&self, memory: &Self::Memory) -> u64;
    /// Copies `from` to the bytes from `at` on. `from` has been read when this returns; the copy may still be in
    /// progress.
    fn upload(&self, to: &mut Self::Memory, at: usize, from: &[u8]) -> Result<()>;
    /// Copies the first bytes of `from`, and waits for the copy and all work that was queued before.
    fn download(&self, to: &mut [u8], from: &Self::Memory) -> Result<()>;
    /// Copies the bytes `bytes` of `from` to the bytes from `at` on.
    fn copy(&self, to: &mut Self::Memory, at: usize, from: &Self::Memory, bytes: Range<usize>) -> Result<()>;
    /// Sets the first `bytes` to zero.
    fn zero(&self, memory: &mut Self::Memory, bytes: usize) -> Result<()>;
    /// Queues a kernel.
    ///
    /// # Safety
    /// The launch's pointers lead to memory of this device of the sizes that the kernel's documentation states, and
    /// nothing else uses the memory that it writes until it is done. (Work that is queued later is done later.)
    unsafe fn launch(&self, launch: &Launch) -> Result<()>;
    /// Queues a product that isn't empty, in the device's fastest way.
    ///
    /// # Safety
    /// As for a launch of the product.
    unsafe fn multiply(&self, product: &Product<'_>) -> Result<()> {
        // SAFETY: the caller's contract.
        unsafe { self.launch(&gemm(self.instructions().best_for(product), product)) }
    }
    /// The columns that are to be kept free behind the rows of an operand [rows, columns], or behind and below those
    /// of a frozen matrix, so that the second product of [`Driver::multiply`] can lie there: a multiple of 8; 0 where
    /// that isn't faster.
    fn room(&self, _rows: usize, _columns: usize) -> Result<usize> {
        Ok(0)
    }
    /// The device's matrix instructions.
    fn instructions(&self) -> Instructions;
    /// Bytes that can still be allocated.
    fn free_bytes(&self) -> Result<u64>;
    /// A name for people.
    fn describe(&self) -> String;
}
