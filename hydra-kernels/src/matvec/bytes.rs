//! Sixteen packed bytes, taken apart with SSE2, which every x86-64 machine has.

use core::arch::x86_64::*;

/// Sixteen bytes in a register.
#[derive(Clone, Copy)]
pub(crate) struct Bytes(pub __m128i);

impl Bytes {
    /// Bytes `at .. at + 16` of a block.
    #[inline(always)]
    pub fn load(block: &[u8], at: usize) -> Self {
        let bytes: &[u8; 16] = block[at..at + 16].first_chunk().unwrap(); // the range has just that length
        // SAFETY: x86-64 has SSE2; the array is 16 bytes, and the load is unaligned.
        Bytes(unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) })
    }

    #[inline(always)]
    pub fn splat(byte: u8) -> Self {
        // SAFETY: x86-64 has SSE2.
        Bytes(unsafe { _mm_set1_epi8(byte as i8) })
    }

    /// The little-endian bytes of two words.
    #[inline(always)]
    pub fn words(low: u64, high: u64) -> Self {
        // SAFETY: x86-64 has SSE2.
        Bytes(unsafe { _mm_set_epi64x(high as i64, low as i64) })
    }

    #[inline(always)]
    pub fn and(self, other: Self) -> Self {
        // SAFETY: x86-64 has SSE2.
        Bytes(unsafe { _mm_and_si128(self.0, other.0) })
    }

    #[inline(always)]
    pub fn or(self, other: Self) -> Self {
        // SAFETY: x86-64 has SSE2.
        Bytes(unsafe { _mm_or_si128(self.0, other.0) })
    }

    /// Wraps around.
    #[inline(always)]
    pub fn minus(self, other: Self) -> Self {
        // SAFETY: x86-64 has SSE2.
        Bytes(unsafe { _mm_sub_epi8(self.0, other.0) })
    }

    /// All ones where the bytes are equal.
    #[inline(always)]
    pub fn equals(self, other: Self) -> Self {
        // SAFETY: x86-64 has SSE2.
        Bytes(unsafe { _mm_cmpeq_epi8(self.0, other.0) })
    }

    /// Pairs of bytes shifted to the left: the lowest bits of every other byte come from its neighbour.
    #[inline(always)]
    pub fn left<const BITS: i32>(self) -> Self {
        // SAFETY: x86-64 has SSE2.
        Bytes(unsafe { _mm_slli_epi16::<BITS>(self.0) })
    }

    /// Pairs of bytes shifted to the right: the highest bits of every other byte come from its neighbour.
    #[inline(always)]
    pub fn right<const BITS: i32>(self) -> Self {
        // SAFETY: x86-64 has SSE2.
        Bytes(unsafe { _mm_srli_epi16::<BITS>(self.0) })
    }

    #[inline(always)]
    pub fn low_nibbles(self) -> Self {
        self.and(Bytes::splat(15))
    }

    #[inline(always)]
    pub fn high_nibbles(self) -> Self {
        self.right::<4>().low_nibbles()
    }

    /// 16 where `bit` is set, the one bit of each of its bytes.
    #[inline(always)]
    pub fn sixteen_where(self, bit: Bytes) -> Self {
        self.and(bit).equals(bit).and(Bytes::splat(16))
    }
}
