//! [`Bytes`] on SSE2, which every x86-64 CPU has.

use core::arch::x86_64::*;

/// Sixteen bytes.
#[derive(Clone, Copy)]
pub(crate) struct Bytes(pub __m128i);

impl Bytes {
    /// Bytes `at .. at + 16` of a block.
    #[inline(always)]
    pub fn load(block: &[u8], at: usize) -> Self {
        let bytes: &[u8; 16] = block[at..at + 16].first_chunk().unwrap(); // the range is 16 long
        // SAFETY: x86-64 includes SSE2; the array is the 16 bytes that are loaded, at any alignment.
        Bytes(unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) })
    }

    /// `byte` in all sixteen places.
    #[inline(always)]
    pub fn splat(byte: u8) -> Self {
        // SAFETY: x86-64 includes SSE2.
        Bytes(unsafe { _mm_set1_epi8(byte as i8) })
    }

    /// The little-endian bytes of two words.
    #[inline(always)]
    pub fn words(low: u64, high: u64) -> Self {
        // SAFETY: x86-64 includes SSE2.
        Bytes(unsafe { _mm_set_epi64x(high as i64, low as i64) })
    }

    /// Bitwise and.
    #[inline(always)]
    pub fn and(self, other: Self) -> Self {
        // SAFETY: x86-64 includes SSE2.
        Bytes(unsafe { _mm_and_si128(self.0, other.0) })
    }

    /// Bitwise or.
    #[inline(always)]
    pub fn or(self, other: Self) -> Self {
        // SAFETY: x86-64 includes SSE2.
        Bytes(unsafe { _mm_or_si128(self.0, other.0) })
    }

    /// Wrapping subtraction.
    #[inline(always)]
    pub fn minus(self, other: Self) -> Self {
        // SAFETY: x86-64 includes SSE2.
        Bytes(unsafe { _mm_sub_epi8(self.0, other.0) })
    }

    /// 0xff where the bytes are equal, 0 elsewhere.
    #[inline(always)]
    pub fn equals(self, other: Self) -> Self {
        // SAFETY: x86-64 includes SSE2.
        Bytes(unsafe { _mm_cmpeq_epi8(self.0, other.0) })
    }

    /// Shifts left. The lowest `BITS` bits of each byte are unspecified: SSE2 shifts pairs of bytes.
    #[inline(always)]
    pub fn left<const BITS: i32>(self) -> Self {
        // SAFETY: x86-64 includes SSE2.
        Bytes(unsafe { _mm_slli_epi16::<BITS>(self.0) })
    }

    /// Shifts right. The highest `BITS` bits of each byte are unspecified: SSE2 shifts pairs of bytes.
    #[inline(always)]
    pub fn right<const BITS: i32>(self) -> Self {
        // SAFETY: x86-64 includes SSE2.
        Bytes(unsafe { _mm_srli_epi16::<BITS>(self.0) })
    }
}
