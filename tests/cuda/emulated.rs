//! A device that is the kernels' emulator, which runs their source or the PTX that was compiled from it.

use hydra_ptx::launch::{Instructions, Launch};
use hydra_ptx_device::emulator::ptx::Module;
use hydra_ptx_device::emulator::{self, Global, Grid};
use hydra_runtime::Result;
use hydra_runtime::backend::cuda::{Cuda, Driver};
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

/// Counts of what makes a program wait for a device.
#[derive(Default)]
pub struct Waits {
    /// Allocations.
    pub allocations: AtomicUsize,
    /// Launches of kernels.
    launches: AtomicUsize,
    /// For each download, the number of launches before it.
    pub downloads: Mutex<Vec<usize>>,
}

/// The emulator as a device with Hopper's instructions. It belongs to the thread that created it.
#[derive(Default)]
pub struct Emulated {
    /// The modules for every device and for Hopper, if the compiled kernels run instead of the source.
    compiled: Option<[Module; 2]>,
    waits: Arc<Waits>,
}

// SAFETY: the tests use a backend on one thread only.
unsafe impl Send for Emulated {}
// SAFETY: as above.
unsafe impl Sync for Emulated {}

pub struct Memory(Global<u8>);

// SAFETY: the tests use a backend on one thread only.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

/// Runs the kernels' source.
pub fn backend() -> Cuda<Emulated> {
    Cuda::new(Emulated::default())
}

/// Runs the kernels' source, and counts.
pub fn counted() -> (Cuda<Emulated>, Arc<Waits>) {
    let waits = Arc::new(Waits::default());
    (Cuda::new(Emulated { waits: waits.clone(), ..Emulated::default() }), waits)
}

/// Interprets the kernels' PTX.
pub fn compiled() -> Cuda<Emulated> {
    let modules = [hydra_ptx::PTX, hydra_ptx::HOPPER_PTX].map(Module::new);
    Cuda::new(Emulated { compiled: Some(modules), ..Emulated::default() })
}

impl Driver for Emulated {
    type Memory = Memory;
    type Entered = ();

    fn enter(&self) {}

    fn allocate(&self, bytes: usize) -> Result<Memory> {
        self.waits.allocations.fetch_add(1, Ordering::Relaxed);
        Ok(Memory(Global::new(&vec![0; bytes])))
    }

    fn address(&self, memory: &Memory) -> u64 {
        memory.0.address()
    }

    fn upload(&self, to: &mut Memory, at: usize, from: &[u8]) -> Result<()> {
        to.0.values_mut()[at..at + from.len()].copy_from_slice(from);
        Ok(())
    }

    fn download(&self, to: &mut [u8], from: &Memory) -> Result<()> {
        self.waits.downloads.lock().unwrap().push(self.waits.launches.load(Ordering::Relaxed));
        to.copy_from_slice(&from.0.values()[..to.len()]);
        Ok(())
    }

    fn copy(&self, to: &mut Memory, at: usize, from: &Memory, bytes: Range<usize>) -> Result<()> {
        self.upload(to, at, &from.0.values()[bytes])
    }

    fn zero(&self, memory: &mut Memory, bytes: usize) -> Result<()> {
        memory.0.values_mut()[..bytes].fill(0);
        Ok(())
    }

    unsafe fn launch(&self, launch: &Launch) -> Result<()> {
        self.waits.launches.fetch_add(1, Ordering::Relaxed);
        let slots: Vec<u64> = launch.args.iter().map(|arg| arg.slot()).collect();
        let grid = Grid { blocks: launch.grid, threads: launch.threads, shared: launch.shared, seed: slots[0] };
        if let Some(modules) = &self.compiled {
            let module = modules.iter().find(|module| module.has(launch.entry)).expect(launch.entry);
            // SAFETY: the caller's, and the emulator checks each access.
            unsafe { module.launch(launch.entry, grid, &slots) };
            return Ok(());
        }
        let entry = hydra_ptx_device::entries().find(|entry| entry.name == launch.entry).expect(launch.entry);
        // SAFETY: as above.
        unsafe { emulator::launch(entry, grid, &slots) };
        Ok(())
    }

    fn room(&self, rows: usize, columns: usize) -> Result<usize> {
        // With and without, whatever the sizes.
        Ok(if (rows + columns).is_multiple_of(2) { 40 } else { 0 })
    }

    fn instructions(&self) -> Instructions {
        Instructions::Wgmma
    }

    fn free_bytes(&self) -> Result<u64> {
        Ok(1 << 30)
    }

    fn describe(&self) -> String {
        "emulated".into()
    }
}
