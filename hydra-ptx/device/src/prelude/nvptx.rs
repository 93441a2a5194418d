//! The prelude as instructions: the only file with inline PTX.
//!
//! LLVM doesn't treat inline assembly as convergent and may clone a collective into both arms of a branch before it. So
//! collectives are convergent LLVM intrinsics. Where there is none for our operands (`ldmatrix`), the convergent
//! `bar.warp.sync` right before the assembly keeps it in place; it costs no instruction.

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

global_asm!(".extern .shared .align 1024 .b8 dynamic_shared[];");

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

/// Keeps the compilers from moving loads, stores and copies across it, where all threads of a warp pass.
#[inline(always)]
pub fn keep_order() {
    unsafe { bar_warp_sync(!0) }
}

/// The value of the thread whose lane number differs in the bits of `lanes`.
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

/// The same number, of which the compiler knows nothing. What is computed from it in a loop stays there, where it would
/// otherwise occupy registers during the whole loop; nothing that is computed from it is moved before this.
#[inline(always)]
pub fn opaque(x: u32) -> u32 {
    let y: u32;
    unsafe { asm!("mov.b32 {}, {};", out(reg32) y, in(reg32) x, options(nomem, nostack)) }
    y
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

/// Stores to shared memory.
#[inline(always)]
pub unsafe fn st_u32(address: u32, value: u32) {
    asm!("st.shared.u32 [{}], {};", in(reg32) address, in(reg32) value, options(nostack));
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

/// Stores two neighbours to shared memory, 8-byte aligned.
#[inline(always)]
pub unsafe fn st_f2(address: u32, value: [f32; 2]) {
    asm!("st.shared.v2.f32 [{}], {{{}, {}}};", in(reg32) address, in(reg32) value[0], in(reg32) value[1], options(nostack));
}

/// Loads two neighbours from shared memory, 8-byte aligned.
#[inline(always)]
pub unsafe fn ld_f2(address: u32) -> [f32; 2] {
    let (a, b): (f32, f32);
    asm!("ld.shared.v2.f32 {{{}, {}}}, [{}];", out(reg32) a, out(reg32) b, in(reg32) address, options(nostack));
    [a, b]
}

/// Loads 16 bytes from shared memory, 16-byte aligned.
#[inline(always)]
pub unsafe fn ld_u4(address: u32) -> [u32; 4] {
    let (a, b, c, d): (u32, u32, u32, u32);
    asm!("ld.shared.v4.u32 {{{}, {}, {}, {}}}, [{}];",
        out(reg32) a, out(reg32) b, out(reg32) c, out(reg32) d, in(reg32) address, options(nostack));
    [a, b, c, d]
}

/// Stores 16 bytes to shared memory, 16-byte aligned.
#[inline(always)]
pub unsafe fn st_u4(address: u32, value: [u32; 4]) {
    asm!("st.shared.v4.u32 [{}], {{{}, {}, {}, {}}};",
        in(reg32) address, in(reg32) value[0], in(reg32) value[1], in(reg32) value[2], in(reg32) value[3], options(nostack));
}

/// A way to load matrices: four, and twice four.
macro_rules! load_matrices {
    ($($(#[$doc:meta])* $name:ident, $(#[$twice_doc:meta])* $twice:ident: $instruction:literal;)*) => {$(
        $(#[$doc])*
        #[inline(always)]
        pub unsafe fn $name(address: u32) -> [u32; 4] {
            let (a, b, c, d): (u32, u32, u32, u32);
            bar_warp_sync(!0);
            asm!(concat!($instruction, " {{{}, {}, {}, {}}}, [{}];"),
                out(reg32) a, out(reg32) b, out(reg32) c, out(reg32) d, in(reg32) address, options(nostack));
            [a, b, c, d]
        }

        $(#[$twice_doc])*
        #[inline(always)]
        pub unsafe fn $twice([first, second]: [u32; 2]) -> [[u32; 4]; 2] {
            let (a, b, c, d, e, f, g, h): (u32, u32, u32, u32, u32, u32, u32, u32);
            bar_warp_sync(!0);
            asm!(concat!($instruction, " {{{}, {}, {}, {}}}, [{}];"), concat!($instruction, " {{{}, {}, {}, {}}}, [{}];"),
                out(reg32) a, out(reg32) b, out(reg32) c, out(reg32) d, in(reg32) first,
                out(reg32) e, out(reg32) f, out(reg32) g, out(reg32) h, in(reg32) second, options(nostack));
            [[a, b, c, d], [e, f, g, h]]
        }
    )*};
}

load_matrices! {
    /// Four 8x8 matrices of bf16 from shared memory. Lane l gives the address of row l % 8 of matrix l / 8; it receives, of
    /// each matrix, row l / 4, columns 2 (l % 4) and the next.
    ldmatrix,
    /// Two of [`ldmatrix`].
    ldmatrix_twice: "ldmatrix.sync.aligned.m8n8.x4.shared.b16";
    /// [`ldmatrix`] with each matrix transposed: rows 2 (l % 4) and the next, column l / 4.
    ldmatrix_transposed,
    /// Two of [`ldmatrix_transposed`].
    ldmatrix_transposed_twice: "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16";
}

/// acc [16, 8] += a [16, 16] · b [16, 8] in bf16 with f32 sums, laid out over the warp as PTX's `mma.m16n8k16` says.
#[inline(always)]
pub fn mma_bf16(acc: &mut [f32; 4], a: [u32; 4], b: [u32; 2]) {
    let [c0, c1, c2, c3] = *acc;
    let Quad(c0, c1, c2, c3) = unsafe { mma(a[0], a[1], a[2], a[3], b[0], b[1], c0, c1, c2, c3) };
    *acc = [c0, c1, c2, c3];
}

/// Starts a copy of 16 bytes to shared memory, or of 16 zeros if not `inside`; `from` must be valid in both cases.
#[inline(always)]
pub unsafe fn copy_async(to: u32, from: *const u8, inside: bool) {
    let bytes = if inside { 16u32 } else { 0 };
    asm!("cp.async.cg.shared.global [{}], [{}], 16, {};", in(reg32) to, in(reg64) from, in(reg32) bytes, options(nostack));
}

/// Ends a group of this thread's copies.
#[inline(always)]
pub fn copy_commit() {
    unsafe { asm!("cp.async.commit_group;", options(nostack)) }
}

/// Waits until at most `PENDING` of this thread's latest groups have not arrived.
#[inline(always)]
pub fn copy_wait<const PENDING: u32>() {
    unsafe { asm!("cp.async.wait_group {};", const PENDING, options(nostack)) }
}

/// Makes this thread's stores to shared memory visible to `wgmma` after the next barrier.
#[inline(always)]
pub fn proxy_fence() {
    unsafe { asm!("fence.proxy.async.shared::cta;", options(nostack)) }
}

/// A warpgroup's 64 x 256 sums. Warp w has rows 16 (w % 4) and on; a thread's `[f32; 4]` number i is its part of
/// columns 8 i and on, as `mma.m16n8k16` lays it out. No sum can be read before [`Sums::finish`], because the
/// multiplications are asynchronous.
pub struct Sums([[f32; 4]; 32]);

/// Calls `$do!` with the numbers of a thread's sums except the first.
macro_rules! with_sums {
    ($do:ident!($($argument:tt)*)) => {
        $do! {
            $($argument)*;
            1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31 32 33 34 35 36 37 38 39 40
            41 42 43 44 45 46 47 48 49 50 51 52 53 54 55 56 57 58 59 60 61 62 63 64 65 66 67 68 69 70 71 72 73 74 75 76 77
            78 79 80 81 82 83 84 85 86 87 88 89 90 91 92 93 94 95 96 97 98 99 100 101 102 103 104 105 106 107 108 109 110
            111 112 113 114 115 116 117 118 119 120 121 122 123 124 125 126 127
        }
    };
}

macro_rules! start {
    ($sums:expr, $a:ident, $b:ident, $transposed:ident; $($i:literal)*) => {
        asm!(
            "wgmma.fence.sync.aligned;",
            "{{ .reg .pred add; setp.eq.u32 add, 0, 0;",
            concat!("wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {{{0}", $(", {", $i, "}",)*
                "}}, {a0}, {b0}, add, 1, 1, 0, {transposed};"),
            concat!("wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {{{0}", $(", {", $i, "}",)*
                "}}, {a1}, {b1}, add, 1, 1, 0, {transposed};"),
            concat!("wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {{{0}", $(", {", $i, "}",)*
                "}}, {a2}, {b2}, add, 1, 1, 0, {transposed};"),
            concat!("wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {{{0}", $(", {", $i, "}",)*
                "}}, {a3}, {b3}, add, 1, 1, 0, {transposed};"),
            "}} wgmma.commit_group.sync.aligned;",
            inout(reg32) $sums[0][0], $(inout(reg32) $sums[$i / 4][$i % 4],)*
            a0 = in(reg64) $a[0], a1 = in(reg64) $a[1], a2 = in(reg64) $a[2], a3 = in(reg64) $a[3],
            b0 = in(reg64) $b[0], b1 = in(reg64) $b[1], b2 = in(reg64) $b[2], b3 = in(reg64) $b[3],
            transposed = const $transposed as u32, options(nostack)
        )
    };
}

macro_rules! finish {
    ($sums:expr; $($i:literal)*) => {
        // The PTX comment uses the operands, so that the compiler reads no sum before this.
        asm!(concat!("wgmma.wait_group.sync.aligned 0; // {0}", $(" {", $i, "}",)*),
            inout(reg32) $sums[0][0], $(inout(reg32) $sums[$i / 4][$i % 4],)* options(nostack))
    };
}

impl Sums {
    /// Zeros.
    #[inline(always)]
    pub fn zero() -> Self {
        Self([[0.0; 4]; 32])
    }

    /// Starts sums += A · B with k = 64: A is [64, 16] and B [16, 256] at each descriptor. A's rows, and B's columns,
    /// or if `TRANSPOSED` its rows, are 128-byte rows of [`Swizzled`].
    #[inline(always)]
    pub unsafe fn start<const TRANSPOSED: bool>(&mut self, a: [u64; 4], b: [u64; 4]) {
        bar_warp_sync(!0);
        with_sums!(start!(self.0, a, b, TRANSPOSED));
    }

    /// Waits for all products but those of the latest [`Sums::start`].
    #[inline(always)]
    pub fn wait_for_all_but_one(&mut self) {
        unsafe {
            bar_warp_sync(!0);
            asm!("wgmma.wait_group.sync.aligned 1;", options(nostack));
        }
    }

    /// Waits for all products, and returns the sums.
    #[inline(always)]
    pub fn finish(mut self) -> [[f32; 4]; 32] {
        unsafe {
            bar_warp_sync(!0);
            with_sums!(finish!(self.0));
        }
        self.0
    }
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
