//! The compiled modules and their kernels.

use cust::error::CudaError;
use cust::module::Module;
use cust::sys;
use std::collections::HashMap;
use std::sync::atomic::AtomicU32;

/// Shared memory of a block that a kernel has without asking.
const SHARED: u32 = 48 * 1024;

/// A kernel, and the most shared memory that was requested for it.
pub(super) struct Kernel {
    pub function: sys::CUfunction,
    pub shared: AtomicU32,
}

/// The modules' kernels by name.
#[derive(Default)]
pub(super) struct Kernels {
    pub by_name: HashMap<&'static str, Kernel>,
    modules: Vec<Module>,
}

impl Kernels {
    /// Has the driver compile a module, and adds its kernels.
    pub fn load(&mut self, text: &'static str) -> Result<(), CudaError> {
        let module = Module::from_ptx(text, &[])?;
        for line in text.lines().filter_map(|line| line.strip_prefix(".visible .entry ")) {
            let entry = line.trim_end_matches('(');
            let function = module.get_function(entry)?.to_raw();
            self.by_name.insert(entry, Kernel { function, shared: AtomicU32::new(SHARED) });
        }
        self.modules.push(module);
        Ok(())
    }
}
