//! What the backend asks of a device: memory, copies, launches; all in one order, as in a CUDA stream.
//!
//! There are two: [`super::Gpu`] through the CUDA driver, and, in tests, the kernels' emulator, so that everything above this
//! trait is tested on machines without a GPU.

use crate::Result;
use hydra_ptx::launch::{Instructions, Launch, Product, gemm};

/// A device that runs `hydra_ptx`'s kernels.
pub trait Driver: Send + Sync + 'static {
    /// Memory of the device, given back when it is dropped.
    type Memory: Send + Sync;

    /// `bytes` zeroed bytes, aligned to 256. Fails if there are not so many, and says how many there are.
    fn allocate(&self, bytes: usize) -> Result<Self::Memory>;
    /// Where they are.
    fn address(&self, memory: &Self::Memory) -> u64;
    /// Copies `from` to the bytes from `at` on. `from` has been read when this returns, but the copy may still be under way.
    fn upload(&self, to: &mut Self::Memory, at: usize, from: &[u8]) -> Result<()>;
    /// Copies the first bytes of `from`, and waits for them and all that was asked for before.
    fn download(&self, to: &mut [u8], from: &Self::Memory) -> Result<()>;
    /// Copies the first `bytes` of `from` to the bytes from `at` on.
    fn copy(&self, to: &mut Self::Memory, at: usize, from: &Self::Memory, bytes: usize) -> Result<()>;
    /// Sets the first `bytes` to zero.
    fn zero(&self, memory: &mut Self::Memory, bytes: usize) -> Result<()>;
    /// Starts a kernel.
    ///
    /// # Safety
    /// The launch's pointers lead to memory of this device that is as long as the kernel's documentation says, and none that it
    /// writes is used otherwise until it is done (what is asked of this driver later is done later).
    unsafe fn launch(&self, launch: &Launch) -> Result<()>;
    /// Does a product that isn't empty, in the fastest way that there is.
    ///
    /// # Safety
    /// As for the launch of it.
    unsafe fn multiply(&self, product: &Product<'_>) -> Result<()> {
        // SAFETY: the caller's.
        unsafe { self.launch(&gemm(self.instructions().best_for(product), product)) }
    }
    /// The matrix instructions that it has.
    fn instructions(&self) -> Instructions;
    /// Bytes that can still be allocated.
    fn free_bytes(&self) -> Result<u64>;
    /// A name for people.
    fn describe(&self) -> String;
}
