//! Sixteen packed bytes in one register, for taking quantized blocks apart.

#[cfg(target_arch = "aarch64")]
mod neon;
#[cfg(target_arch = "x86_64")]
mod sse2;

#[cfg(target_arch = "aarch64")]
pub(crate) use neon::Bytes;
#[cfg(target_arch = "x86_64")]
pub(crate) use sse2::Bytes;

impl Bytes {
    /// The low four bits of each byte.
    #[inline(always)]
    pub fn low_nibbles(self) -> Self {
        self.and(Bytes::splat(15))
    }

    /// The high four bits of each byte.
    #[inline(always)]
    pub fn high_nibbles(self) -> Self {
        self.right::<4>().low_nibbles()
    }

    /// `value` where a byte has `bit`'s only set bit, 0 elsewhere.
    #[inline(always)]
    pub fn where_set(self, bit: Bytes, value: u8) -> Self {
        self.and(bit).equals(bit).and(Bytes::splat(value))
    }

    /// Bits 0 and 1 of each byte, then bits 2 and 3, 4 and 5, 6 and 7.
    #[inline(always)]
    pub fn pairs(self) -> [Self; 4] {
        let three = Bytes::splat(3);
        [self.and(three), self.right::<2>().and(three), self.right::<4>().and(three), self.right::<6>().and(three)]
    }
}
