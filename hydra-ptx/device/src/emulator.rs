//! Runs a kernel on the CPU, thread by thread, and refuses what is undefined on a GPU.
//!
//! A CUDA thread is a coroutine. It runs until a collective: a barrier waits for the whole block, a warp's instruction
//! for its 32 lanes, which all have to be at the same place in the source. Blocks run one after the other; warps of a
//! block take turns in an order drawn from a seed. These are errors, reported with the place in the kernel:
//!
//! - a collective that not all threads reach, or at different places;
//! - an access outside of allocated memory, or misaligned;
//! - a race: two threads access the same shared or device memory, one of them writes, and no barrier is between them;
//! - a matrix of `ldmatrix` with rows in the same banks of shared memory, which is slow;
//! - a change of an asynchronous product's operands before it was waited for (`wgmma.rs`);
//! - a read of shared memory before anything was written there (it holds NaN), or before an asynchronous copy was
//!   waited for.

pub mod block;
mod collectives;
pub mod memory;
pub mod ptx;
pub(crate) mod wgmma;

pub use memory::Global;

use std::rc::Rc;

/// A parameter's type in PTX.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// An address, or a 64-bit integer.
    U64,
    /// A 32-bit integer.
    U32,
    /// A float.
    F32,
}

/// A type of a kernel's parameter.
pub trait Param {
    /// Its type in PTX.
    const KIND: Kind;
    /// The value from 64 bits, as a launch passes it.
    fn from_slot(slot: u64) -> Self;
}

impl<T> Param for *const T {
    const KIND: Kind = Kind::U64;
    fn from_slot(slot: u64) -> Self {
        slot as *const T
    }
}

impl<T> Param for *mut T {
    const KIND: Kind = Kind::U64;
    fn from_slot(slot: u64) -> Self {
        slot as *mut T
    }
}

impl Param for u64 {
    const KIND: Kind = Kind::U64;
    fn from_slot(slot: u64) -> Self {
        slot
    }
}

impl Param for u32 {
    const KIND: Kind = Kind::U32;
    fn from_slot(slot: u64) -> Self {
        slot as u32
    }
}

impl Param for f32 {
    const KIND: Kind = Kind::F32;
    fn from_slot(slot: u64) -> Self {
        f32::from_bits(slot as u32)
    }
}

/// A kernel by name.
#[derive(Clone, Copy)]
pub struct Entry {
    /// Its name in the PTX.
    pub name: &'static str,
    /// The types of its parameters.
    pub params: &'static [Kind],
    /// Runs one thread, with the parameters in 64-bit slots.
    pub call: unsafe fn(&[u64]),
}

/// A grid, and the size of its blocks.
#[derive(Clone, Copy, Debug)]
pub struct Grid {
    /// Blocks.
    pub blocks: [u32; 2],
    /// Threads of a block.
    pub threads: u32,
    /// Bytes of shared memory.
    pub shared: u32,
    /// Decides the order of the warps.
    pub seed: u64,
}

/// Runs a kernel over a grid.
///
/// # Panics
/// If the kernel makes one of the errors in the module's list.
///
/// # Safety
/// `slots` are the kernel's parameters in its entry's order; pointers are null or lead to allocated memory.
pub unsafe fn launch(entry: &Entry, grid: Grid, slots: &[u64]) {
    assert_eq!(entry.params.len(), slots.len(), "{}: parameters", entry.name);
    assert!(grid.threads.is_multiple_of(32) && (32..=1024).contains(&grid.threads), "{} threads", grid.threads);
    let (call, slots) = (entry.call, slots.to_vec());
    // SAFETY: the caller vouches for the parameters; memory accesses are checked.
    let thread: block::Body = Rc::new(move || unsafe { call(&slots) });
    for y in 0..grid.blocks[1] {
        for x in 0..grid.blocks[0] {
            block::run(&thread, grid, [x, y]);
        }
    }
    memory::next_launch();
}
