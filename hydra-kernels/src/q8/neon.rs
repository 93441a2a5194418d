//! SDOT: in each of four lanes, the sum of four products of signed bytes. It is in `asm!` because its intrinsic is
//! unstable.

use crate::isa::NeonDotProd;
use core::arch::aarch64::*;
use core::arch::asm;

/// `sums` + four products of `a` and `b` in each lane.
#[inline(always)]
pub(super) fn dot(_isa: NeonDotProd, mut sums: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    // SAFETY: the token proves FEAT_DotProd; SDOT changes only its result.
    unsafe {
        asm!(
            ".arch_extension dotprod",
            "sdot {0:v}.4s, {1:v}.16b, {2:v}.16b",
            inout(vreg) sums,
            in(vreg) a,
            in(vreg) b,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sums
}

/// Of Q2_K's minima as `quant::codes` packs them: −dmin, and Σ m·s over both halves, where `s` is the sum of q over a group
/// and `first` the one over its first half.
#[inline(always)]
pub(super) fn unpack_minima(minima: float32x4_t, s: float32x4_t, first: float32x4_t) -> [float32x4_t; 2] {
    // SAFETY: the target includes NEON.
    unsafe {
        let (bits, four_bits) = (vreinterpretq_u32_f32(minima), vdupq_n_u32(15));
        let low = vcvtq_f32_u32(vandq_u32(bits, four_bits));
        let high = vcvtq_f32_u32(vandq_u32(vshrq_n_u32::<8>(bits), four_bits));
        let dmin = vreinterpretq_f32_u32(vandq_u32(bits, vdupq_n_u32(!0x1fff)));
        [dmin, vfmaq_f32(vmulq_f32(low, first), high, vsubq_f32(s, first))]
    }
}

/// `sums` + four products of `a` in each lane with the four bytes of `b`'s lane `LANE`.
#[inline(always)]
pub(super) fn dot_lane<const LANE: u32>(
    _isa: NeonDotProd,
    mut sums: int32x4_t,
    a: int8x16_t,
    b: int8x16_t,
) -> int32x4_t {
    // SAFETY: the token proves FEAT_DotProd; SDOT changes only its result.
    unsafe {
        asm!(
            ".arch_extension dotprod",
            "sdot {0:v}.4s, {1:v}.16b, {2:v}.4b[{lane}]",
            inout(vreg) sums,
            in(vreg) a,
            in(vreg) b,
            lane = const LANE,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sums
}
