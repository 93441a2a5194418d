//! Sixteen f32 at a time: one AVX-512 register, or two AVX2 registers.

use super::bytes::Bytes;
use core::arch::x86_64::*;

/// Values in a vector.
pub(crate) const LANES: usize = 16;

/// A vector instruction set as dot products with quantized rows need it.
///
/// A value that implements this proves that the CPU has the instructions. They are used only where the methods are
/// inlined into a closure of [`crate::isa::Isa::vectorize`].
pub(crate) trait Lanes: Copy {
    /// Sixteen f32.
    type V: Copy;
    /// The map q ↦ d·q + m for q in 0..16.
    type Table: Copy;

    /// `x` in every lane.
    fn splat(self, x: f32) -> Self::V;
    /// Prefetches the cache line at an address, which may be out of bounds or unmapped.
    #[inline(always)]
    fn prefetch(self, at: *const u8) {
        // SAFETY: x86-64 includes SSE; a prefetch of any address is allowed and reads nothing.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }
    /// Sixteen f32.
    fn load(self, x: &[f32; LANES]) -> Self::V;
    /// The sixteen values.
    fn store(self, v: Self::V) -> [f32; LANES];
    /// Sixteen f32 at any alignment.
    fn f32(self, bytes: &[u8; 64]) -> Self::V;
    /// Sixteen f16, widened.
    fn f16(self, bytes: &[u8; 32]) -> Self::V;
    /// Sixteen bf16, widened.
    fn bf16(self, bytes: &[u8; 32]) -> Self::V;
    /// The first of four f16, widened, in every lane.
    fn half(self, bytes: &[u8; 8]) -> Self::V;
    /// The first and the second of four f16, widened, each in every lane of a vector.
    fn halves(self, bytes: &[u8; 8]) -> (Self::V, Self::V);
    /// Sixteen u8 as f32.
    fn unsigned(self, bytes: Bytes) -> Self::V;
    /// Sixteen i8 as f32.
    fn signed(self, bytes: Bytes) -> Self::V;
    /// a·b.
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    /// a·b + c, rounded once.
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// The map q ↦ d·q + m.
    fn table(self, d: Self::V, m: Self::V) -> Self::Table;
    /// Each byte's low nibble mapped by `low`, and its high nibble by `high`.
    fn nibbles(self, low: Self::Table, high: Self::Table, packed: Bytes) -> (Self::V, Self::V);
}

/// Four f16 as f32: one instruction when they come from memory.
///
/// # Safety
/// The CPU has F16C.
#[inline(always)]
pub(super) unsafe fn four_halves(bytes: &[u8; 8]) -> __m128 {
    // SAFETY: the array is the eight bytes that are loaded; F16C is this function's contract.
    unsafe { _mm_cvtph_ps(_mm_loadl_epi64(bytes.as_ptr().cast())) }
}
