//! A tile on AVX-512 VNNI: a register has the lanes of all sixteen rows of W.

use super::panel::{NR, PanelGroup};
use super::{Block, LANES, Sums, TOKENS};
use crate::isa::Avx512Vnni;
use crate::quant::GROUP;
use core::arch::x86_64::*;

/// See [`super::tile`].
#[inline(always)]
pub(super) fn tile<const BITS: u32, const MINIMUM: bool>(
    isa: Avx512Vnni,
    sums: &mut Sums,
    panel: &[PanelGroup],
    x: &[Block],
    width: usize,
) {
    *sums = [[[0.0; NR]; TOKENS]; LANES];
    let tokens = x.len() / width;
    for (g, group) in panel.iter().enumerate() {
        // SAFETY: `isa` proves AVX-512F.
        let mut codes = [unsafe { _mm512_setzero_si512() }; GROUP / 4];
        for (codes, stored) in codes.iter_mut().zip(&group.codes) {
            // SAFETY: `isa` proves AVX-512F; the array is the 64 bytes that are loaded.
            *codes = unsafe { _mm512_loadu_si512(stored.as_ptr().cast()) };
        }
        for (token, sums) in sums[g % LANES].iter_mut().enumerate().take(tokens) {
            let x = &x[token * width + g / LANES];
            add::<BITS, MINIMUM>(isa, sums, (&codes, group), x, g % LANES);
        }
    }
}

/// Adds the products with group `g` of `x` to the rows' lanes.
#[inline(always)]
fn add<const BITS: u32, const MINIMUM: bool>(
    isa: Avx512Vnni,
    sums: &mut [f32; NR],
    (codes, group): (&[__m512i; GROUP / 4], &PanelGroup),
    x: &Block,
    g: usize,
) {
    let (q, _) = x.codes.as_chunks::<GROUP>().0[g].as_chunks::<4>();
    // SAFETY: `isa` proves AVX-512F; each array is the 64 bytes that are loaded or written.
    unsafe {
        let (scales, seconds) = (_mm512_loadu_ps(group.scales.as_ptr()), _mm512_loadu_ps(group.seconds.as_ptr()));
        let d = _mm512_set1_ps(x.scales[g]);
        let (s, mut sum) = (_mm512_set1_ps(x.sums[g]), _mm512_loadu_ps(sums.as_ptr()));
        let offset = _mm512_set1_ps((1 << (BITS - 1)) as f32);
        if BITS == 6 {
            let first = _mm512_set1_ps(x.first_halves[g]);
            for (half, scales, s) in [(0, scales, first), (4, seconds, _mm512_sub_ps(s, first))] {
                let products = _mm512_cvtepi32_ps(quads(isa, &codes[half..half + 4], &q[half..half + 4]));
                let v = _mm512_mul_ps(scales, _mm512_fnmadd_ps(offset, s, products));
                sum = _mm512_fmadd_ps(d, v, sum);
            }
        } else {
            let products = _mm512_cvtepi32_ps(quads(isa, codes, q));
            let v = if MINIMUM {
                _mm512_fmadd_ps(scales, products, _mm512_mul_ps(seconds, s))
            } else {
                _mm512_mul_ps(scales, _mm512_fnmadd_ps(offset, s, products))
            };
            sum = _mm512_fmadd_ps(d, v, sum);
        }
        _mm512_storeu_ps(sums.as_mut_ptr(), sum);
    }
}

/// In each lane Σᵢ of four products of `codes[i]` with `q[i]`; the four of q are the same in all lanes.
#[inline(always)]
fn quads(_isa: Avx512Vnni, codes: &[__m512i], q: &[[i8; 4]]) -> __m512i {
    // SAFETY: the token proves AVX-512 VNNI.
    unsafe {
        let mut sum = _mm512_setzero_si512();
        for (&codes, q) in codes.iter().zip(q) {
            sum = _mm512_dpbusd_epi32(
                sum,
                codes,
                _mm512_set1_epi32(i32::from_ne_bytes([q[0] as u8, q[1] as u8, q[2] as u8, q[3] as u8])),
            );
        }
        sum
    }
}
