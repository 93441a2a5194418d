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

    /// 16 where a byte has `bit`'s only set bit, 0 elsewhere.
    #[inline(always)]
    pub fn sixteen_where(self, bit: Bytes) -> Self {
        self.and(bit).equals(bit).and(Bytes::splat(16))
    }
}
