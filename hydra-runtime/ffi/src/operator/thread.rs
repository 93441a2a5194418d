//! One of the threads that compute an operation together.

use super::memory::Span;
use crate::arguments::slice_mut;
use crate::error::{Result, invalid};
use hydra_runtime::hydra_kernels::hydra::ThreadColumns;
use hydra_runtime::hydra_kernels::{HydraShape, Scratch, Workspace};

/// One of the threads that compute an operation together.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct hydra_thread {
    /// This thread, from 0 on.
    pub ith: usize,
    /// Number of threads.
    pub nth: usize,
    /// Memory of this thread alone, best aligned to 64 bytes; its content doesn't matter.
    pub scratch: *mut f32,
    /// Floats of `scratch`: at least what hydra_forward_scratch or hydra_backward_scratch say.
    pub scratch_len: usize,
}

impl hydra_thread {
    /// # Safety
    /// `scratch` is valid for reads and writes of `scratch_len` floats, and this thread's alone.
    pub(super) unsafe fn workspace<'a>(&self, need: Scratch) -> Result<Workspace<'a>> {
        // SAFETY: the caller's word.
        let workspace = Workspace::new(unsafe { slice_mut("scratch", self.scratch, self.scratch_len)? });
        workspace.require(need)?;
        Ok(workspace)
    }

    pub(super) fn columns(&self, shape: &HydraShape) -> Result<ThreadColumns> {
        if self.ith >= self.nth {
            return Err(invalid(format!("thread {} of {}: expected ith below nth", self.ith, self.nth)));
        }
        Ok(ThreadColumns::new(shape, self.ith, self.nth))
    }

    pub(super) fn span(&self) -> Span {
        Span::new("scratch", self.scratch, self.scratch_len.saturating_mul(4))
    }
}
