//! f32 to bf16 with AVX-512 BF16: to nearest, ties to even; subnormals become zeros.

use crate::isa::Avx512Bf16;
use core::arch::x86_64::*;
use core::mem::transmute;
use half::bf16;

/// `out` = `x` rounded.
///
/// # Panics
/// If the lengths differ.
pub(crate) fn round_slice(_isa: Avx512Bf16, out: &mut [bf16], x: &[f32]) {
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    fn run(out: &mut [bf16], x: &[f32]) {
        for at in (0..x.len()).step_by(32) {
            // SAFETY: both slices have x.len() elements by the assert below, so x.len() − at from `at` on.
            unsafe { store_rounded(out.as_mut_ptr().add(at), x.as_ptr().add(at), x.len() - at) }
        }
    }
    assert_eq!(out.len(), x.len());
    // SAFETY: the token proves AVX-512 F, BW and BF16.
    unsafe { run(out, x) }
}

/// Rounds the first min(`len`, 32) values at `x` and stores them at `out`.
///
/// # Safety
/// The CPU has AVX-512 F, BW and BF16; min(`len`, 32) values can be read at `x` and written at `out`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
pub(crate) unsafe fn store_rounded(out: *mut bf16, x: *const f32, len: usize) {
    if len >= 32 {
        // SAFETY: with `len` ≥ 32 the contract covers all 32 values.
        unsafe { _mm512_storeu_si512(out.cast(), round(_mm512_loadu_ps(x), _mm512_loadu_ps(x.add(16)))) }
    } else {
        let mask = (1u32 << len) - 1;
        // SAFETY: the masks admit only the first `len` values, which the contract covers.
        unsafe {
            let low = _mm512_maskz_loadu_ps(mask as u16, x);
            let high = _mm512_maskz_loadu_ps((mask >> 16) as u16, x.wrapping_add(16));
            _mm512_mask_storeu_epi16(out.cast(), mask, round(low, high));
        }
    }
}

/// 32 values rounded, in order.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
pub(crate) fn round(low: __m512, high: __m512) -> __m512i {
    // SAFETY: `__m512bh` and `__m512i` are both 512 bits without invalid values.
    unsafe { transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low)) }
}
