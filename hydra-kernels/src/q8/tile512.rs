//! Tiles on AVX-512 VNNI: a register has the lanes of all sixteen rows of a panel.

use super::panel::{NR, PanelGroup};
use super::{Block, LANES, Sums, TOKENS, two_minima, two_scales};
use crate::isa::{Avx512, Avx512Vnni};
use crate::quant::GROUP;
use core::arch::x86_64::*;
use core::ops::Range;

/// Registers of a group's codes.
const QUADS: usize = GROUP / 4;

/// See [`super::tiles`]. What is read of x serves `P` panels; the codes of two fill half of the registers.
#[inline(always)]
pub(super) fn tiles<const BITS: u32, const MINIMUM: bool, const P: usize>(
    isa: Avx512Vnni,
    mut sums: [&mut Sums; P],
    panels: [&[PanelGroup]; P],
    x: &[Block],
    width: usize,
) {
    let (tokens, groups) = (x.len() / width, panels[0].len());
    for lane in groups..LANES {
        sums.iter_mut().for_each(|sums| sums[lane] = [[0.0; NR]; TOKENS]);
    }
    for g in 0..groups {
        let mut weights = [Weights::load(isa, &panels[0][g]); P];
        for p in 1..P {
            weights[p] = Weights::load(isa, &panels[p][g]);
        }
        // Nothing is read of a lane before its first products.
        let before = if g < LANES { 0 } else { !0 };
        for token in 0..tokens.min(TOKENS) {
            let x = &x[token * width + g / LANES];
            add::<BITS, MINIMUM, P>(isa, &mut sums, (g % LANES, token), before, &weights, x);
        }
    }
}

/// One group of sixteen rows.
#[derive(Clone, Copy)]
struct Weights {
    codes: [__m512i; QUADS],
    scales: __m512,
    seconds: __m512,
}

impl Weights {
    #[inline(always)]
    fn load(_isa: Avx512Vnni, group: &PanelGroup) -> Self {
        // SAFETY: the token proves AVX-512F; each array is the 64 bytes that are loaded.
        unsafe {
            let mut codes = [_mm512_setzero_si512(); QUADS];
            for (codes, stored) in codes.iter_mut().zip(&group.codes) {
                *codes = _mm512_loadu_si512(stored.as_ptr().cast());
            }
            let scales = _mm512_loadu_ps(group.scales.as_ptr());
            Self { codes, scales, seconds: _mm512_loadu_ps(group.seconds.as_ptr()) }
        }
    }
}

/// Adds the products with group `lane` of `x` to the panels' sums in that lane, of which only `before` counts.
#[inline(always)]
fn add<const BITS: u32, const MINIMUM: bool, const P: usize>(
    isa: Avx512Vnni,
    sums: &mut [&mut Sums; P],
    (lane, token): (usize, usize),
    before: __mmask16,
    weights: &[Weights; P],
    x: &Block,
) {
    let (s, first) = (x.sums[lane], x.first_halves[lane]);
    let products = match (two_scales(BITS), MINIMUM) {
        (true, _) => quads::<BITS, P>(isa, first, weights, x, lane, 0..QUADS / 2),
        (_, true) => quads::<BITS, P>(isa, 0.0, weights, x, lane, 0..QUADS),
        (_, false) => quads::<BITS, P>(isa, s, weights, x, lane, 0..QUADS),
    };
    let others =
        if two_scales(BITS) { quads::<BITS, P>(isa, s - first, weights, x, lane, QUADS / 2..QUADS) } else { products };
    for p in 0..P {
        let (sum, weights) = (&mut sums[p][lane][token], &weights[p]);
        // SAFETY: `isa` proves AVX-512F; `sum` is the 64 bytes that are loaded and written.
        unsafe {
            let (d, s) = (_mm512_set1_ps(x.scales[lane]), _mm512_set1_ps(s));
            let mut total = _mm512_maskz_loadu_ps(before, sum.as_ptr());
            let v = if MINIMUM {
                let [minima, s] = if two_minima(BITS) {
                    unpack_minima(isa, weights.seconds, s, _mm512_set1_ps(first))
                } else {
                    [weights.seconds, s]
                };
                _mm512_fmadd_ps(weights.scales, products[p], _mm512_mul_ps(minima, s))
            } else {
                _mm512_mul_ps(weights.scales, products[p])
            };
            total = _mm512_fmadd_ps(d, v, total);
            if two_scales(BITS) {
                total = _mm512_fmadd_ps(d, _mm512_mul_ps(weights.seconds, others[p]), total);
            }
            _mm512_storeu_ps(sum.as_mut_ptr(), total);
        }
    }
}

/// [`super::x86_64::unpack_minima`] in 512 bits.
#[inline(always)]
fn unpack_minima(_isa: Avx512Vnni, minima: __m512, s: __m512, first: __m512) -> [__m512; 2] {
    // SAFETY: the token proves AVX-512F.
    unsafe {
        let bits = _mm512_castps_si512(minima);
        let four_bits = _mm512_set1_epi32(15);
        let low = _mm512_cvtepi32_ps(_mm512_and_si512(bits, four_bits));
        let high = _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32::<8>(bits), four_bits));
        let dmin = _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(!0x1fff)));
        [dmin, _mm512_fmadd_ps(high, _mm512_sub_ps(s, first), _mm512_mul_ps(low, first))]
    }
}

/// In each lane of each panel, the sum of `code · q` over the quads `range` of group `lane` of x, less the codes' offset
/// times `s`. It is an integer below 2²⁴, exact in f32.
#[inline(always)]
fn quads<const BITS: u32, const P: usize>(
    _isa: Avx512Vnni,
    s: f32,
    weights: &[Weights; P],
    x: &Block,
    lane: usize,
    range: Range<usize>,
) -> [__m512; P] {
    let q = x.codes.as_chunks::<GROUP>().0[lane].as_chunks::<4>().0;
    // SAFETY: the token proves AVX-512 VNNI.
    unsafe {
        let offset = _mm512_set1_ps(-((1 << (BITS - 1)) as f32));
        // Two sums for each panel: each instruction waits for the one before it.
        let start = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_set1_ps(s), offset));
        let mut sums = [[start, _mm512_setzero_si512()]; P];
        for i in range {
            let q = q[i];
            let q = i32::from_ne_bytes([q[0] as u8, q[1] as u8, q[2] as u8, q[3] as u8]);
            let q = _mm512_set1_epi32(q);
            for p in 0..P {
                sums[p][i % 2] = _mm512_dpbusd_epi32(sums[p][i % 2], weights[p].codes[i], q);
            }
        }
        let mut products = [_mm512_setzero_ps(); P];
        for p in 0..P {
            products[p] = _mm512_cvtepi32_ps(_mm512_add_epi32(sums[p][0], sums[p][1]));
        }
        products
    }
}

/// The sums over a row's lanes, in the order of [`crate::simd::reduce::sum`].
#[inline(always)]
pub(super) fn totals(_isa: Avx512, sums: &Sums, token: usize) -> [f32; NR] {
    let mut totals = [0.0; NR];
    // SAFETY: the token proves AVX-512F; each array is the 64 bytes that are loaded or written.
    unsafe {
        let mut lanes = [_mm512_setzero_ps(); LANES];
        for (lane, sums) in lanes.iter_mut().zip(sums) {
            *lane = _mm512_loadu_ps(sums[token].as_ptr());
        }
        for half in [4, 2, 1] {
            for i in 0..half {
                lanes[i] = _mm512_add_ps(lanes[i], lanes[i + half]);
            }
        }
        _mm512_storeu_ps(totals.as_mut_ptr(), lanes[0]);
    }
    totals
}
