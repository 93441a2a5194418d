//! A pinned buffer of the host through which uploads pass, so that they are queued like all other work and the caller's
//! memory is free at once.

use cust::error::CudaError;
use cust::memory::LockedBuffer;

/// Bytes of the buffer. When it is full, an upload waits for the stream.
const BYTES: usize = 8 << 20;

/// The buffer, and how much of it is in use by queued copies.
pub(super) struct Staging {
    buffer: LockedBuffer<u8>,
    used: usize,
}

impl Staging {
    pub fn new() -> Result<Self, CudaError> {
        // SAFETY: every byte is written before it is read.
        let buffer = unsafe { LockedBuffer::uninitialized(BYTES) }?;
        Ok(Self { buffer, used: 0 })
    }

    pub fn is_full(&self) -> bool {
        self.used == BYTES
    }

    /// Copies the first bytes of `from`, as many as fit, and returns the copies. They stay unchanged until
    /// [`Staging::clear`].
    pub fn put(&mut self, from: &[u8]) -> &[u8] {
        let len = from.len().min(BYTES - self.used);
        let copies = &mut self.buffer.as_mut_slice()[self.used..][..len];
        copies.copy_from_slice(&from[..len]);
        self.used += len;
        copies
    }

    /// The whole buffer is free again: the stream has been waited for.
    pub fn clear(&mut self) {
        self.used = 0;
    }
}
