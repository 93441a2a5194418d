//! [`Lanes`] on NEON: four registers.

use super::bytes::Bytes;
use super::lanes::{LANES, Lanes};
use crate::isa::Neon;
use core::arch::aarch64::*;
use core::arch::asm;
use core::array::from_fn;

impl Lanes for Neon {
    type V = [float32x4_t; 4];
    /// d and m: d·q + m is computed.
    type Table = ([float32x4_t; 4], [float32x4_t; 4]);

    #[inline(always)]
    fn vectorize<R>(self, op: impl FnOnce() -> R) -> R {
        Neon::vectorize(self, op)
    }

    #[inline(always)]
    fn splat(self, x: f32) -> Self::V {
        // SAFETY: `self` proves NEON.
        unsafe { [vdupq_n_f32(x); 4] }
    }

    #[inline(always)]
    fn prefetch(self, at: *const u8) {
        // SAFETY: a prefetch of any address is allowed; it writes nothing and no register.
        unsafe { asm!("prfm pldl1keep, [{}]", in(reg) at, options(readonly, nostack, preserves_flags)) }
    }

    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> Self::V {
        from_fn(
            #[inline(always)]
            // SAFETY: `self` proves NEON; the array is the four vectors of four that are loaded.
            |i| unsafe { vld1q_f32(x.as_ptr().add(4 * i)) },
        )
    }

    #[inline(always)]
    fn store(self, v: Self::V) -> [f32; LANES] {
        let mut out = [0.0; LANES];
        for (i, v) in v.into_iter().enumerate() {
            // SAFETY: `self` proves NEON; the array is the four vectors of four that are written.
            unsafe { vst1q_f32(out.as_mut_ptr().add(4 * i), v) }
        }
        out
    }

    #[inline(always)]
    fn f32(self, bytes: &[u8; 64]) -> Self::V {
        from_fn(
            #[inline(always)]
            // SAFETY: `self` proves NEON; the array is the four vectors of 16 bytes that are loaded, at any alignment.
            |i| unsafe { vreinterpretq_f32_u8(vld1q_u8(bytes.as_ptr().add(16 * i))) },
        )
    }

    #[inline(always)]
    fn f16(self, bytes: &[u8; 32]) -> Self::V {
        from_fn(
            #[inline(always)]
            // SAFETY: `self` proves NEON; the array is the four vectors of 8 bytes that are loaded, at any alignment.
            |i| unsafe { four_halves(vld1_u8(bytes.as_ptr().add(8 * i))) },
        )
    }

    #[inline(always)]
    fn bf16(self, bytes: &[u8; 32]) -> Self::V {
        from_fn(
            #[inline(always)]
            |i| {
                // SAFETY: `self` proves NEON; the array is the four vectors of 8 bytes that are loaded, at any
                // alignment.
                unsafe {
                    let narrow = vreinterpret_u16_u8(vld1_u8(bytes.as_ptr().add(8 * i)));
                    vreinterpretq_f32_u32(vshll_n_u16::<16>(narrow))
                }
            },
        )
    }

    #[inline(always)]
    fn half(self, bytes: &[u8; 8]) -> Self::V {
        // SAFETY: `self` proves NEON; the array is the 8 bytes that are loaded, at any alignment.
        unsafe { [vdupq_laneq_f32::<0>(four_halves(vld1_u8(bytes.as_ptr()))); 4] }
    }

    #[inline(always)]
    fn halves(self, bytes: &[u8; 8]) -> (Self::V, Self::V) {
        // SAFETY: `self` proves NEON; the array is the 8 bytes that are loaded, at any alignment.
        unsafe {
            let four = four_halves(vld1_u8(bytes.as_ptr()));
            ([vdupq_laneq_f32::<0>(four); 4], [vdupq_laneq_f32::<1>(four); 4])
        }
    }

    #[inline(always)]
    fn scale_and_min(self, bytes: &[u8; 8]) -> Self::V {
        let (d, m) = self.halves(bytes);
        // SAFETY: `self` proves NEON.
        let minus = unsafe { vnegq_f32(m[0]) };
        [d[0], d[0], minus, minus]
    }

    #[inline(always)]
    fn lookup(self, table: Bytes, places: Bytes) -> Bytes {
        // SAFETY: `self` proves NEON.
        Bytes(unsafe { vqtbl1q_u8(table.0, places.0) })
    }

    #[inline(always)]
    fn unsigned(self, bytes: Bytes) -> Self::V {
        // SAFETY: `self` proves NEON.
        unsafe {
            let (low, high) = (vmovl_u8(vget_low_u8(bytes.0)), vmovl_high_u8(bytes.0));
            [
                vcvtq_f32_u32(vmovl_u16(vget_low_u16(low))),
                vcvtq_f32_u32(vmovl_high_u16(low)),
                vcvtq_f32_u32(vmovl_u16(vget_low_u16(high))),
                vcvtq_f32_u32(vmovl_high_u16(high)),
            ]
        }
    }

    #[inline(always)]
    fn signed(self, bytes: Bytes) -> Self::V {
        // SAFETY: `self` proves NEON.
        unsafe {
            let bytes = vreinterpretq_s8_u8(bytes.0);
            let (low, high) = (vmovl_s8(vget_low_s8(bytes)), vmovl_high_s8(bytes));
            [
                vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))),
                vcvtq_f32_s32(vmovl_high_s16(low)),
                vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))),
                vcvtq_f32_s32(vmovl_high_s16(high)),
            ]
        }
    }

    #[inline(always)]
    fn mul(self, a: Self::V, b: Self::V) -> Self::V {
        from_fn(
            #[inline(always)]
            // SAFETY: `self` proves NEON.
            |i| unsafe { vmulq_f32(a[i], b[i]) },
        )
    }

    #[inline(always)]
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        from_fn(
            #[inline(always)]
            // SAFETY: `self` proves NEON.
            |i| unsafe { vfmaq_f32(c[i], a[i], b[i]) },
        )
    }

    #[inline(always)]
    fn table(self, d: Self::V, m: Self::V) -> Self::Table {
        (d, m)
    }

    #[inline(always)]
    fn fives(self, (d, m): (Self::V, Self::V), packed: Bytes, [a, b, c, e]: [u8; 4]) -> (Self::V, Self::V) {
        let low = self.unsigned(packed.low_nibbles().or(Bytes::fifth_bits([a, b])));
        let high = self.unsigned(packed.high_nibbles().or(Bytes::fifth_bits([c, e])));
        (self.fma(low, d, m), self.fma(high, d, m))
    }

    #[inline(always)]
    fn nibbles(self, low: Self::Table, high: Self::Table, packed: Bytes) -> (Self::V, Self::V) {
        let (low_q, high_q) = (packed.low_nibbles(), packed.high_nibbles());
        (self.fma(self.unsigned(low_q), low.0, low.1), self.fma(self.unsigned(high_q), high.0, high.1))
    }
}

/// Four f16 as f32. In `asm!` because the intrinsic's argument type is unstable.
///
/// # Safety
/// The CPU has NEON.
#[inline(always)]
unsafe fn four_halves(halves: uint8x8_t) -> float32x4_t {
    let wide;
    // SAFETY: NEON, which is this function's contract, includes FCVTL. It changes only its result.
    unsafe {
        asm!(
            "fcvtl {0:v}.4s, {1:v}.4h",
            lateout(vreg) wide,
            in(vreg) halves,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    wide
}
