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
