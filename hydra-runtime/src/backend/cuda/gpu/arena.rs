//! A best-fit allocator of buffers in a few large pieces of the device's memory. It computes addresses and never
//! touches the device.
//!
//! The driver's own allocations are slow and wait for the device. The arena makes few of them, so that a new buffer
//! usually costs no call of the driver. Freed memory may be reused at once, because all work is done in the order in
//! which it was queued.

use std::collections::BTreeMap;

/// Addresses and sizes of buffers are multiples of it.
const ALIGN: usize = 256;

/// One allocation of the driver.
struct Slab {
    bytes: usize,
    /// Free pieces by address. No two of them are adjacent.
    free: BTreeMap<u64, usize>,
}

/// Slabs and their free pieces.
#[derive(Default)]
pub(super) struct Arena {
    slabs: BTreeMap<u64, Slab>,
}

/// Bytes that a buffer of `bytes` takes.
pub(super) fn rounded(bytes: usize) -> usize {
    bytes.max(1).next_multiple_of(ALIGN)
}

impl Arena {
    /// Adds a slab that begins at a multiple of 256.
    pub fn add(&mut self, address: u64, bytes: usize) {
        self.slabs.insert(address, Slab { bytes, free: BTreeMap::from([(address, bytes)]) });
    }

    /// The address of `bytes` bytes in the smallest free piece that fits them, or `None`.
    pub fn take(&mut self, bytes: usize) -> Option<u64> {
        let bytes = rounded(bytes);
        let free = self.slabs.values_mut().flat_map(|slab| {
            let best = slab.free.iter().map(|(&at, &len)| (len, at)).filter(|(len, _)| *len >= bytes).min()?;
            Some((best, slab))
        });
        let ((len, at), slab) = free.min_by_key(|(best, _)| *best)?;
        slab.free.remove(&at);
        if len > bytes {
            slab.free.insert(at + bytes as u64, len - bytes);
        }
        Some(at)
    }

    /// Frees `bytes` bytes that [`Arena::take`] returned. If their slab is empty now, it is removed from the arena and
    /// its address returned.
    pub fn give_back(&mut self, address: u64, bytes: usize) -> Option<u64> {
        let (mut start, mut len) = (address, rounded(bytes));
        let (&at, slab) = self.slabs.range_mut(..=address).next_back().expect("taken from a slab");
        if let Some((&before, &bytes)) = slab.free.range(..start).next_back()
            && before + bytes as u64 == start
        {
            slab.free.remove(&before);
            (start, len) = (before, bytes + len);
        }
        if let Some(after) = slab.free.remove(&(start + len as u64)) {
            len += after;
        }
        slab.free.insert(start, len);
        if len < slab.bytes {
            return None;
        }
        self.slabs.remove(&at);
        Some(at)
    }

    /// Free bytes, and the size of the largest free piece.
    pub fn free(&self) -> (usize, usize) {
        let pieces = || self.slabs.values().flat_map(|slab| slab.free.values().copied());
        (pieces().sum(), pieces().max().unwrap_or(0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_smallest_piece_that_fits() {
        let mut arena = Arena::default();
        assert_eq!(arena.take(1), None);
        arena.add(0x1000, 4096);
        arena.add(0x8000, 1024);
        assert_eq!(arena.take(1000), Some(0x8000));
        assert_eq!(arena.take(1), Some(0x1000));
        assert_eq!(arena.take(3841), None);
        assert_eq!(arena.free(), (3840, 3840));
        assert_eq!(arena.take(3840), Some(0x1100));
        assert_eq!(arena.give_back(0x1000, 1), None);
        assert_eq!(arena.free(), (256, 256));
        // A slab goes with the last of its buffers.
        assert_eq!(arena.give_back(0x8000, 1000), Some(0x8000));
        assert_eq!(arena.give_back(0x1100, 3840), Some(0x1000));
        assert_eq!(arena.free(), (0, 0));
    }

    proptest! {
        #[test]
        fn buffers_never_overlap(requests in prop::collection::vec((1usize..5000, 0usize..20), 1..200)) {
            let (mut arena, mut taken, mut slabs) = (Arena::default(), Vec::<(u64, usize)>::new(), 0);
            for (bytes, leave) in requests {
                let at = arena.take(bytes).unwrap_or_else(|| {
                    slabs += 1;
                    arena.add(slabs << 20, 8192);
                    arena.take(bytes).expect("a slab has room")
                });
                prop_assert!(at.is_multiple_of(256));
                let overlaps = |&(other, len): &(u64, usize)| other < at + bytes as u64 && at < other + len as u64;
                prop_assert!(!taken.iter().any(overlaps));
                taken.push((at, bytes));
                while taken.len() > leave {
                    let (at, bytes) = taken.swap_remove(bytes % taken.len());
                    arena.give_back(at, bytes);
                }
            }
            let used: usize = taken.iter().map(|&(_, bytes)| rounded(bytes)).sum();
            let all: usize = arena.slabs.values().map(|slab| slab.bytes).sum();
            prop_assert_eq!(arena.free().0, all - used);
            for (at, bytes) in taken {
                arena.give_back(at, bytes);
            }
            prop_assert!(arena.slabs.is_empty());
        }
    }
}
