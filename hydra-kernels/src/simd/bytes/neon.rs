//! [`Bytes`] on NEON, which every AArch64 target that this crate has vectors for includes.

use core::arch::aarch64::*;

/// Sixteen bytes.
#[derive(Clone, Copy)]
pub(crate) struct Bytes(pub uint8x16_t);

impl Bytes {
    /// Bytes `at .. at + 16` of a block.
    #[inline(always)]
    pub fn load(block: &[u8], at: usize) -> Self {
        let bytes: &[u8; 16] = block[at..at + 16].first_chunk().unwrap(); // the range is 16 long
        // SAFETY: the target includes NEON; the array is the 16 bytes that are loaded, at any alignment.
        Bytes(unsafe { vld1q_u8(bytes.as_ptr()) })
    }

    /// `byte` in all sixteen places.
    #[inline(always)]
    pub fn splat(byte: u8) -> Self {
        // SAFETY: the target includes NEON.
        Bytes(unsafe { vdupq_n_u8(byte) })
    }

    /// The little-endian bytes of two words.
    #[inline(always)]
    pub fn words(low: u64, high: u64) -> Self {
        // SAFETY: the target includes NEON.
        Bytes(unsafe { vcombine_u8(vcreate_u8(low), vcreate_u8(high)) })
    }

    /// Bitwise and.
    #[inline(always)]
    pub fn and(self, other: Self) -> Self {
        // SAFETY: the target includes NEON.
        Bytes(unsafe { vandq_u8(self.0, other.0) })
    }

    /// Bitwise or.
    #[inline(always)]
    pub fn or(self, other: Self) -> Self {
        // SAFETY: the target includes NEON.
        Bytes(unsafe { vorrq_u8(self.0, other.0) })
    }

    /// Wrapping subtraction.
    #[inline(always)]
    pub fn minus(self, other: Self) -> Self {
        // SAFETY: the target includes NEON.
        Bytes(unsafe { vsubq_u8(self.0, other.0) })
    }

    /// 0xff where the bytes are equal, 0 elsewhere.
    #[inline(always)]
    pub fn equals(self, other: Self) -> Self {
        // SAFETY: the target includes NEON.
        Bytes(unsafe { vceqq_u8(self.0, other.0) })
    }

    /// Shifts left. The lowest `BITS` bits of each byte are unspecified, as on other instruction sets.
    #[inline(always)]
    pub fn left<const BITS: i32>(self) -> Self {
        // SAFETY: the target includes NEON.
        Bytes(unsafe { vshlq_n_u8::<BITS>(self.0) })
    }

    /// Shifts right. The highest `BITS` bits of each byte are unspecified, as on other instruction sets.
    #[inline(always)]
    pub fn right<const BITS: i32>(self) -> Self {
        // SAFETY: the target includes NEON.
        Bytes(unsafe { vshrq_n_u8::<BITS>(self.0) })
    }

    /// The fifth bits of sixteen columns: byte i is 16 if bit i is set, and 0 otherwise.
    #[inline(always)]
    pub fn fifth_bits(bits: [u8; 2]) -> Self {
        let eight = |byte: u8| u64::from(byte) * 0x0101_0101_0101_0101;
        let bit = 0x8040_2010_0804_0201;
        Bytes::words(eight(bits[0]), eight(bits[1])).where_set(Bytes::words(bit, bit), 16)
    }
}
