//! The prelude as instructions: the only file with inline PTX.
//!
//! LLVM doesn't know that inline assembly may be convergent and would clone a collective into both arms of a branch before
//! it. So collectives are convergent LLVM intrinsics; where there is none for our operands (`ldmatrix`), the convergent
//! `bar.warp.sync` right before the assembly keeps them together and costs no instruction.

use core::arch::{asm, global_asm, nvptx};

#[repr(C)]
struct Quad(f32, f32, f32, f32);

unsafe extern "C" {
    #[link_name = "llvm.nvvm.mma.m16n8k16.row.col.bf16"]
    fn mma(a0: u32, a1: u32, a2: u32, a3: u32, b0: u32, b1: u32, c0: f32, c1: f32, c2: f32, c3: f32) -> Quad;
    #[link_name = "llvm.nvvm.shfl.sync.bfly.f32"]
    fn shfl_bfly(members: u32, value: f32, lanes: u32, clamp: u32) -> f32;
    #[link_name = "llvm.nvvm.bar.warp.sync"]
    fn bar_warp_sync(members: u32);
}

global_asm!(".extern .shared .align 128 .b8 dynamic_shared[];");

/// This thread's place in its block.
#[inline(always)]
pub fn thread() -> u32 {
    unsafe { nvptx::_thread_idx_x() as u32 }
}

/// Threads of a block.
#[inline(always)]
pub fn threads() -> u32 {
    unsafe { nvptx::_block_dim_x() as u32 }
}

/// This block's place in the grid.
#[inline(always)]
pub fn block_x() -> u32 {
    unsafe { nvptx::_block_idx_x() as u32 }
}

/// This block's place in the grid's second dimension.
#[inline(always)]
pub fn block_y() -> u32 {
    unsafe { nvptx::_block_idx_y() as u32 }
}

/// Waits for all threads of the block, and makes their stores visible to each other.
#[inline(always)]
pub fn barrier() {
    unsafe { nvptx::_syncthreads() }
}

/// The value of the thread whose lane differs in the bits of `lanes`.
#[inline(always)]
pub fn shuffle_xor(value: f32, lanes: u32) -> f32 {
    unsafe { shfl_bfly(!0, value, lanes, 31) }
}

/// The address of the launch's shared memory.
#[inline(always)]
pub fn shared() -> u32 {
    let address: u32;
    unsafe { asm!("mov.u32 {}, dynamic_shared;", out(reg32) address, options(pure, nomem, nostack)) }
    address
}

/// Loads from shared memory.
#[inline(always)]
pub unsafe fn ld_f32(address: u32) -> f32 {
    let value: f32;
    asm!("ld.shared.f32 {}, [{}];", out(reg32) value, in(reg32) address, options(nostack));
    value
}

/// Stores to shared memory.
#[inline(always)]
pub unsafe fn st_f32(address: u32, value: f32) {
    asm!("st.shared.f32 [{}], {};", in(reg32) address, in(reg32) value, options(nostack));
}

/// Loads from shared memory.
#[inline(always)]
pub unsafe fn ld_f64(address: u32) -> f64 {
    let value: f64;
    asm!("ld.shared.f64 {}, [{}];", out(reg64) value, in(reg32) address, options(nostack));
    value
}

/// Stores to shared memory.
#[inline(always)]
pub unsafe fn st_f64(address: u32, value: f64) {
    asm!("st.shared.f64 [{}], {};", in(reg32) address, in(reg64) value, options(nostack));
}

/// Stores 16 bytes to shared memory, 16-byte aligned.
#[inline(always)]
pub unsafe fn st_u4(address: u32, value: [u32; 4]) {
    asm!("st.shared.v4.u32 [{}], {{{}, {}, {}, {}}};",
        in(reg32) address, in(reg32) value[0], in(reg32) value[1], in(reg32) value[2], in(reg32) value[3], options(nostack));
}

/// Four 8x8 matrices of bf16 from shared memory. Lane l gives the address of row l % 8 of matrix l / 8; it receives, of each
/// matrix, row l / 4, columns 2 (l % 4) and the next.
#[inline(always)]
pub unsafe fn ldmatrix(address: u32) -> [u32; 4] {
    let (a, b, c, d): (u32, u32, u32, u32);
    bar_warp_sync(!0);
    asm!("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{{}, {}, {}, {}}}, [{}];",
        out(reg32) a, out(reg32) b, out(reg32) c, out(reg32) d, in(reg32) address, options(nostack));
    [a, b, c, d]
}

/// [`ldmatrix`] with each matrix transposed: rows 2 (l % 4) and the next, column l / 4.
#[inline(always)]
pub unsafe fn ldmatrix_transposed(address: u32) -> [u32; 4] {
    let (a, b, c, d): (u32, u32, u32, u32);
    bar_warp_sync(!0);
    asm!("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {{{}, {}, {}, {}}}, [{}];",
        out(reg32) a, out(reg32) b, out(reg32) c, out(reg32) d, in(reg32) address, options(nostack));
    [a, b, c, d]
}

/// acc [16, 8] += a [16, 16] · b [16, 8] in bf16 with f32 sums, laid out over the warp as PTX's `mma.m16n8k16` says.
#[inline(always)]
pub fn mma_bf16(acc: &mut [f32; 4], a: [u32; 4], b: [u32; 2]) {
    let [c0, c1, c2, c3] = *acc;
    let Quad(c0, c1, c2, c3) = unsafe { mma(a[0], a[1], a[2], a[3], b[0], b[1], c0, c1, c2, c3) };
    *acc = [c0, c1, c2, c3];
}

/// Starts a copy of 16 bytes to shared memory, or of 16 zeros if not `there`; `from` must be valid all the same.
#[inline(always)]
pub unsafe fn copy_async(to: u32, from: *const u8, there: bool) {
    let bytes = if there { 16u32 } else { 0 };
    asm!("cp.async.cg.shared.global [{}], [{}], 16, {};", in(reg32) to, in(reg64) from, in(reg32) bytes, options(nostack));
}

/// Ends a group of this thread's copies.
#[inline(always)]
pub fn copy_commit() {
    unsafe { asm!("cp.async.commit_group;", options(nostack)) }
}

/// Waits until at most `PENDING` of this thread's latest groups are under way.
#[inline(always)]
pub fn copy_wait<const PENDING: u32>() {
    unsafe { asm!("cp.async.wait_group {};", const PENDING, options(nostack)) }
}

/// Loads from the device's memory.
#[inline(always)]
pub unsafe fn load<T: Copy>(from: *const T) -> T {
    *from
}

/// Stores to the device's memory.
#[inline(always)]
pub unsafe fn store<T: Copy>(to: *mut T, value: T) {
    *to = value;
}

/// 2ˣ, to 2 ulp.
#[inline(always)]
pub fn exp2(x: f32) -> f32 {
    let y: f32;
    unsafe { asm!("ex2.approx.ftz.f32 {}, {};", out(reg32) y, in(reg32) x, options(pure, nomem, nostack)) }
    y
}

/// √x, correctly rounded.
#[inline(always)]
pub fn sqrt(x: f32) -> f32 {
    let y: f32;
    unsafe { asm!("sqrt.rn.f32 {}, {};", out(reg32) y, in(reg32) x, options(pure, nomem, nostack)) }
    y
}

/// a · b + c, rounded once.
#[inline(always)]
pub fn fma(a: f32, b: f32, c: f32) -> f32 {
    core::intrinsics::fmaf32(a, b, c)
}

/// Two bf16, `low` in the lower half.
#[inline(always)]
pub fn pack_bf16(low: f32, high: f32) -> u32 {
    let packed: u32;
    unsafe {
        asm!("cvt.rn.bf16x2.f32 {}, {}, {};", out(reg32) packed, in(reg32) high, in(reg32) low, options(pure, nomem, nostack))
    }
    packed
}
