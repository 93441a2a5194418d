//! Runs a kernel on the CPU, thread by thread, and finds what a GPU would not forgive.
//!
//! A CUDA thread is a coroutine. It runs until a collective: a barrier waits for the whole block, a warp's instruction
//! for its 32 lanes, which all have to be at the same place in the source. Blocks follow each other; warps of a block
//! take turns in an order drawn from a seed. Refused, with the place in the kernel:
//!
//! - a collective that not all threads reach, or at different places;
//! - an access outside the memory that was registered, or off its alignment;
//! - a race: two threads at the same shared or device memory, one of them writing, with no barrier between them;
//! - what an asynchronous product's operands may not suffer (`wgmma.rs`);
//! - reading shared memory before anything was written there (it holds NaN), or before an asynchronous copy was waited
//!   for.

pub mod block;
pub mod memory;
pub mod ptx;
pub(crate) mod wgmma;

pub use memory::Global;

use std::rc::Rc;

/// What a parameter is in PTX.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// An address, or a 64-bit integer.
    U64,
    /// A 32-bit integer.
    U32,
    /// A float.
    F32,
}

/// A type that a kernel takes.
pub trait Param {
    /// Its type in PTX.
    const KIND: Kind;
    /// From 64 bits, as a launch passes them.
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
    /// As in the PTX.
    pub name: &'static str,
    /// Its parameters.
    pub params: &'static [Kind],
    /// One thread's run, from the parameters' 64-bit slots.
    pub call: unsafe fn(&[u64]),
}

/// A grid and what its blocks take.
#[derive(Clone, Copy, Debug)]
pub struct Grid {
    /// Blocks.
    pub blocks: [u32; 2],
    /// Threads of a block.
    pub threads: u32,
    /// Bytes of shared memory.
    pub shared: u32,
    /// Draws the order of the warps.
    pub seed: u64,
}

/// Runs a kernel over a grid.
///
/// # Panics
/// If the kernel does one of the things that the module's heading lists.
///
/// # Safety
/// `slots` are the kernel's parameters, as its entry lists them; its pointers lead to memory that is registered or
/// alive.
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
