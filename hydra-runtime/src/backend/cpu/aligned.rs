//! Zeroed memory that begins at a cache line: tiles and vectors that straddle two lines take twice the loads. Large pieces
//! are mapped and ask for huge pages: activations are read in strides that miss the TLB.

use crate::Result;
use crate::error::out_of_memory;
use bytemuck::{Pod, Zeroable};
use memmap2::MmapMut;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};

/// Bytes of a cache line.
const LINE: usize = 64;

/// Floats of a cache line, to which parts of a task's scratch are rounded up.
pub(super) const LINE_FLOATS: usize = LINE / size_of::<f32>();

#[repr(C, align(64))]
#[derive(Clone, Copy)]
struct Line([u8; LINE]);

// SAFETY: an array of bytes, as long as its alignment: all bits are valid, none are padding.
unsafe impl Zeroable for Line {}
// SAFETY: the same.
unsafe impl Pod for Line {}

/// Bytes from which a mapping of its own pays: some huge pages.
const MAPPED: usize = 4 << 20;

enum Memory {
    Heap(Box<[Line]>),
    Mapped(MmapMut),
}

impl Default for Memory {
    fn default() -> Self {
        Memory::Heap(Box::default())
    }
}

/// `len` values of `T`.
pub struct Aligned<T> {
    memory: Memory,
    len: usize,
    of: PhantomData<T>,
}

impl<T: Pod> Aligned<T> {
    /// Zeros; `None` if the system has no such memory. Pages that are never touched are never resident.
    pub fn zeroed(len: usize) -> Option<Self> {
        let bytes = len.checked_mul(size_of::<T>())?;
        let memory = if bytes < MAPPED {
            Memory::Heap(bytemuck::allocation::try_zeroed_slice_box(bytes.div_ceil(LINE)).ok()?)
        } else {
            let map = MmapMut::map_anon(bytes).ok()?;
            // Only advice: without huge pages all works the same, as it does under Miri, which knows no `madvise`.
            #[cfg(all(target_os = "linux", not(miri)))]
            let _ = map.advise(memmap2::Advice::HugePage);
            Memory::Mapped(map)
        };
        Some(Self { memory, len, of: PhantomData })
    }

    /// At least `len` values of any content: what was there, or zeros. After an error, none.
    pub fn reserve(&mut self, len: usize) -> Result<&mut [T]> {
        if self.len < len {
            // A fresh allocation, so that growing does not copy what nobody will read.
            *self = Self::default();
            *self = Self::zeroed(len).ok_or_else(|| out_of_memory(len.saturating_mul(size_of::<T>())))?;
        }
        Ok(self)
    }
}

impl<T: Pod> Default for Aligned<T> {
    fn default() -> Self {
        Self { memory: Memory::default(), len: 0, of: PhantomData }
    }
}

impl<T: Pod> Deref for Aligned<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        let bytes = match &self.memory {
            Memory::Heap(lines) => bytemuck::cast_slice(lines),
            Memory::Mapped(map) => &map[..],
        };
        bytemuck::cast_slice(&bytes[..self.len * size_of::<T>()])
    }
}

impl<T: Pod> DerefMut for Aligned<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        let bytes = match &mut self.memory {
            Memory::Heap(lines) => bytemuck::cast_slice_mut(lines),
            Memory::Mapped(map) => &mut map[..],
        };
        bytemuck::cast_slice_mut(&mut bytes[..self.len * size_of::<T>()])
    }
}

impl<T: Pod> From<&[T]> for Aligned<T> {
    fn from(values: &[T]) -> Self {
        let mut aligned = Self::zeroed(values.len()).expect("as much memory as the values take");
        aligned.copy_from_slice(values);
        aligned
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn begins_at_a_line_and_keeps_its_values() {
        let mut values = Aligned::<f32>::from(&[1.0, 2.0, 3.0][..]);
        assert_eq!(*values, [1.0, 2.0, 3.0]);
        assert_eq!(values.as_ptr().align_offset(LINE), 0);
        let large = Aligned::<f32>::zeroed(MAPPED / 4 + 3).unwrap();
        assert_eq!((large.len(), large[MAPPED / 4 + 2], large.as_ptr().align_offset(LINE)), (MAPPED / 4 + 3, 0.0, 0));
        values.reserve(100).unwrap()[99] = 5.0;
        assert_eq!((values.len(), values[99]), (100, 5.0));
        assert_eq!(values.as_ptr().align_offset(LINE), 0);
        assert!(Aligned::<f32>::zeroed(usize::MAX).is_none());
        let refused = values.reserve(usize::MAX).unwrap_err();
        assert!(matches!(refused, crate::Error::OutOfMemory { bytes: u64::MAX, .. }), "{refused}");
        assert!(values.is_empty());
        assert!(Aligned::<u8>::default().is_empty());
    }
}
