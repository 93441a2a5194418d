//! What a kernel may use: indices, barriers, shuffles, shared memory, matrix instructions, loads and stores.
//!
//! Two implementations have the same signatures: `nvptx.rs`, the only file with PTX instructions, and `host.rs`, in which an
//! emulated thread calls its block (see [`crate::emulator`]). Shared memory is addressed in bytes from [`shared`] on, memory of
//! the device by pointers through [`load`] and [`store`], which the emulator checks.

#[cfg(not(target_arch = "nvptx64"))]
mod host;
#[cfg(target_arch = "nvptx64")]
mod nvptx;

#[cfg(not(target_arch = "nvptx64"))]
pub use host::*;
#[cfg(target_arch = "nvptx64")]
pub use nvptx::*;

/// Threads of a warp.
pub const WARP: u32 = 32;

/// This thread's place in its warp.
#[inline(always)]
pub fn lane() -> u32 {
    thread() % WARP
}

/// This thread's warp in its block.
#[inline(always)]
pub fn warp() -> u32 {
    thread() / WARP
}

/// Tells the compiler what a launch guarantees, so that it generates no panic for the opposite case.
#[inline(always)]
pub unsafe fn assume(holds: bool) {
    core::hint::assert_unchecked(holds);
}

/// Columns of a bf16 operand with its padding.
#[inline(always)]
pub fn padded(columns: u32) -> u32 {
    columns.next_multiple_of(8)
}

/// The f32 of a bf16.
#[inline(always)]
pub fn from_bf16(x: u16) -> f32 {
    f32::from_bits(u32::from(x) << 16)
}

/// The nearest bf16.
#[inline(always)]
pub fn to_bf16(x: f32) -> u16 {
    pack_bf16(x, 0.0) as u16
}

/// Four words, which one instruction loads or stores.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C, align(16))]
pub struct U4(pub [u32; 4]);

/// Eight values as bf16.
#[inline(always)]
pub fn pack8(x: [f32; 8]) -> [u32; 4] {
    [pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]), pack_bf16(x[4], x[5]), pack_bf16(x[6], x[7])]
}

/// Two bf16 as f32.
#[inline(always)]
pub fn unpack2(x: u32) -> [f32; 2] {
    [f32::from_bits(x << 16), f32::from_bits(x & 0xffff_0000)]
}

/// Eight bf16 as f32.
#[inline(always)]
pub fn unpack8(x: [u32; 4]) -> [f32; 8] {
    let [[a, b], [c, d], [e, f], [g, h]] = x.map(unpack2);
    [a, b, c, d, e, f, g, h]
}

/// A matrix of bf16 in shared memory as `wgmma` takes it ("128-byte swizzling"): rows of 128 bytes, of which eight have
/// their chunks permuted by the row's number in the address.
#[derive(Clone, Copy)]
pub struct Swizzled {
    /// The first byte.
    pub at: u32,
    /// Bytes from a panel of 128-byte rows to the next. Where rows are not k there is only one panel, and this is
    /// ignored.
    pub panel: u32,
    /// Bytes from eight rows to the next eight.
    pub eight: u32,
}

impl Swizzled {
    /// The descriptors of four parts that follow each other `bytes` apart. PTX ISA, "Matrix Descriptor Format":
    /// address, leading and stride byte offsets in units of 16 bytes from bits 0, 16 and 32 on; 1 from bit 62 on is the
    /// swizzling.
    #[inline(always)]
    pub fn steps(self, bytes: u32) -> [u64; 4] {
        let field = |x: u32| u64::from((x & 0x3ffff) >> 4);
        let first = field(self.at) | field(self.panel) << 16 | field(self.eight) << 32 | 1 << 62;
        core::array::from_fn(|i| first + i as u64 * field(bytes))
    }
}

/// The operation of a reduction.
pub trait Combine {
    /// The neutral element.
    const NEUTRAL: f32;
    /// The combination of two values.
    fn combine(a: f32, b: f32) -> f32;
}

/// Addition.
pub struct Sum;
/// The maximum.
pub struct Max;

impl Combine for Sum {
    const NEUTRAL: f32 = 0.0;
    #[inline(always)]
    fn combine(a: f32, b: f32) -> f32 {
        a + b
    }
}

impl Combine for Max {
    const NEUTRAL: f32 = f32::NEG_INFINITY;
    #[inline(always)]
    fn combine(a: f32, b: f32) -> f32 {
        a.max(b)
    }
}

/// Reduces over a warp, in a fixed order; all its threads get the result.
#[inline(always)]
#[track_caller]
pub fn over_warp<C: Combine>(x: f32) -> f32 {
    let x = C::combine(x, shuffle_xor(x, 16));
    let x = C::combine(x, shuffle_xor(x, 8));
    let x = C::combine(x, shuffle_xor(x, 4));
    over_quad::<C>(x)
}

/// Reduces over four neighbouring lanes, which hold a row of a matrix instruction's result.
#[inline(always)]
#[track_caller]
pub fn over_quad<C: Combine>(x: f32) -> f32 {
    let x = C::combine(x, shuffle_xor(x, 2));
    C::combine(x, shuffle_xor(x, 1))
}

/// Reduces over a block, in a fixed order; all its threads get the result. `scratch` is shared memory for one f32 for
/// each warp.
#[inline(always)]
#[track_caller]
pub unsafe fn over_block<C: Combine>(x: f32, scratch: u32) -> f32 {
    let x = over_warp::<C>(x);
    barrier();
    if lane() == 0 {
        st_f32(scratch + 4 * warp(), x);
    }
    barrier();
    let (mut all, mut warp) = (C::NEUTRAL, 0);
    while warp < threads() / WARP {
        all = C::combine(all, ld_f32(scratch + 4 * warp));
        warp += 1;
    }
    all
}
