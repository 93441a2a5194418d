//! Memory comes from the caller: [`Scratch`] says how much an operation needs, and [`Workspace`] hands it out.
//!
//! ```
//! use hydra_kernels::{Scratch, Workspace};
//! let need = Scratch::floats(3).and(Scratch::floats(5).or(Scratch::floats(4)));
//! assert_eq!(need.0, 8);
//! let mut memory = [0.0f32; 8];
//! let mut workspace = Workspace::new(&mut memory);
//! let three = workspace.take::<f32>(3).unwrap();
//! assert_eq!(three.len(), 3);
//! assert!(workspace.take::<f32>(6).is_err());
//! ```

use crate::error::Error;
use bytemuck::{AnyBitPattern, NoUninit};

/// Floats of a cache line.
const LINE: usize = 16;

/// An amount of memory, in f32 elements. Sums saturate, so an absurd shape asks for more memory than exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Scratch(pub usize);

impl Scratch {
    /// Memory for `count` floats.
    pub const fn floats(count: usize) -> Self {
        Scratch(count)
    }

    /// Memory for `rows · cols` elements of `E`, rounded up to whole floats.
    pub const fn matrix<E>(rows: usize, cols: usize) -> Self {
        let bytes = rows.saturating_mul(cols).saturating_mul(size_of::<E>());
        Scratch(bytes.div_ceil(size_of::<f32>()))
    }

    /// Memory for `len` elements of `E`, rounded up to whole cache lines, so that what follows is as aligned as this
    /// is.
    pub const fn lines<E>(len: usize) -> Self {
        Scratch(Self::matrix::<E>(1, len).0.div_ceil(LINE).saturating_mul(LINE))
    }

    /// Memory for both at the same time.
    pub const fn and(self, other: Self) -> Self {
        Scratch(self.0.saturating_add(other.0))
    }

    /// Memory for one after the other.
    pub const fn or(self, other: Self) -> Self {
        if self.0 > other.0 { self } else { other }
    }

    /// The size in bytes.
    pub const fn bytes(self) -> usize {
        self.0.saturating_mul(size_of::<f32>())
    }
}

/// A bump allocator over the caller's memory. It does not clear what it hands out.
pub struct Workspace<'a> {
    free: &'a mut [f32],
}

impl<'a> Workspace<'a> {
    /// An allocator over `memory`, whose content does not matter.
    pub fn new(memory: &'a mut [f32]) -> Self {
        Workspace { free: memory }
    }

    /// The floats that are left.
    pub fn left(&self) -> usize {
        self.free.len()
    }

    /// `Ok` if at least `need` is left, else [`Error::Workspace`].
    pub fn require(&self, need: Scratch) -> Result<(), Error> {
        if self.free.len() >= need.0 { Ok(()) } else { Err(Error::Workspace { want: need.0, got: self.free.len() }) }
    }

    /// `len` elements of `E` with arbitrary values. `E` is f32, or a type whose size and alignment divide f32's.
    ///
    /// Returns [`Error::Workspace`], and takes nothing, if fewer are left.
    pub fn take<E: NoUninit + AnyBitPattern>(&mut self, len: usize) -> Result<&'a mut [E], Error> {
        self.take_from(Scratch::matrix::<E>(1, len), len)
    }

    /// [`Self::take`] in whole cache lines: as much memory as [`Scratch::lines`] says.
    pub fn take_lines<E: NoUninit + AnyBitPattern>(&mut self, len: usize) -> Result<&'a mut [E], Error> {
        self.take_from(Scratch::lines::<E>(len), len)
    }

    fn take_from<E: NoUninit + AnyBitPattern>(&mut self, need: Scratch, len: usize) -> Result<&'a mut [E], Error> {
        self.require(need)?;
        let (taken, free) = core::mem::take(&mut self.free).split_at_mut(need.0);
        self.free = free;
        Ok(&mut bytemuck::cast_slice_mut(taken)[..len])
    }

    /// A workspace over what is left, which is free again when it is dropped.
    pub fn reborrow(&mut self) -> Workspace<'_> {
        Workspace { free: self.free }
    }
}
