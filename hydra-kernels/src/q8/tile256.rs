//! A tile in 256 bits: the lanes of eight rows of W.

use super::panel::{NR, PanelGroup};
use super::x86_64::{Bytes256, unpack_minima};
use super::{Block, LANES, Sums, TOKENS, two_minima, two_scales};
use crate::isa::Avx2;
use crate::quant::GROUP;
use core::arch::x86_64::*;

/// Rows of W in a register.
const ROWS: usize = 8;

/// See [`super::tile`].
#[inline(always)]
pub(super) fn tile<const BITS: u32, const MINIMUM: bool>(
    isa: impl Bytes256,
    sums: &mut Sums,
    panel: &[PanelGroup],
    x: &[Block],
    width: usize,
) {
    *sums = [[[0.0; NR]; TOKENS]; LANES];
    let tokens = x.len() / width;
    for (g, group) in panel.iter().enumerate() {
        for part in 0..NR / ROWS {
            let weights = Weights::load(group, part);
            for (token, sums) in sums[g % LANES].iter_mut().enumerate().take(tokens) {
                let (sums, x) = (&mut sums.as_chunks_mut::<ROWS>().0[part], &x[token * width + g / LANES]);
                weights.add::<_, BITS, MINIMUM>(isa, sums, x, g % LANES);
            }
        }
    }
}

/// One group of eight rows.
struct Weights {
    codes: [__m256i; GROUP / 4],
    scales: __m256,
    seconds: __m256,
}

impl Weights {
    #[inline(always)]
    fn load(group: &PanelGroup, part: usize) -> Self {
        let [scales, seconds] = [&group.scales, &group.seconds];
        let [scales, seconds] = [&scales.as_chunks::<ROWS>().0[part], &seconds.as_chunks::<ROWS>().0[part]];
        // SAFETY: each array is the 32 bytes that are loaded; this is inlined into a closure of `vectorize`.
        unsafe {
            let mut codes = [_mm256_setzero_si256(); GROUP / 4];
            for (codes, stored) in codes.iter_mut().zip(&group.codes) {
                let stored = &stored.as_chunks::<{ 4 * ROWS }>().0[part];
                *codes = _mm256_loadu_si256(stored.as_ptr().cast());
            }
            Self { codes, scales: _mm256_loadu_ps(scales.as_ptr()), seconds: _mm256_loadu_ps(seconds.as_ptr()) }
        }
    }

    /// Adds the products with group `g` of `x` to the rows' lanes.
    #[inline(always)]
    fn add<I: Bytes256, const BITS: u32, const MINIMUM: bool>(
        &self,
        isa: I,
        sums: &mut [f32; ROWS],
        x: &Block,
        g: usize,
    ) {
        let (q, _) = x.codes.as_chunks::<GROUP>().0[g].as_chunks::<4>();
        let (low, high) = (q[..4].first_chunk::<4>().unwrap(), q[4..].first_chunk::<4>().unwrap()); // q has eight
        // SAFETY: `isa` proves AVX2 and FMA; `sums` is the 32 bytes that are loaded and written.
        unsafe {
            let d = _mm256_set1_ps(x.scales[g]);
            let (s, mut sum) = (_mm256_set1_ps(x.sums[g]), _mm256_loadu_ps(sums.as_ptr()));
            let offset = _mm256_set1_ps((1 << (BITS - 1)) as f32);
            let first = _mm256_set1_ps(x.first_halves[g]);
            if two_scales(BITS) {
                let halves = [(&self.codes[..4], low, first), (&self.codes[4..], high, _mm256_sub_ps(s, first))];
                for ((codes, q, s), scales) in halves.into_iter().zip([self.scales, self.seconds]) {
                    let codes = codes.first_chunk::<4>().unwrap(); // half of eight
                    let products = _mm256_cvtepi32_ps(isa.quads::<BITS, 4>(codes, q));
                    let v = _mm256_mul_ps(scales, _mm256_fnmadd_ps(offset, s, products));
                    sum = _mm256_fmadd_ps(d, v, sum);
                }
            } else {
                let q = q.first_chunk::<8>().unwrap(); // it has eight
                let products = _mm256_cvtepi32_ps(isa.quads::<BITS, 8>(&self.codes, q));
                let v = if MINIMUM {
                    let [minima, s] =
                        if two_minima(BITS) { unpack_minima(isa, self.seconds, s, first) } else { [self.seconds, s] };
                    _mm256_fmadd_ps(self.scales, products, _mm256_mul_ps(minima, s))
                } else if BITS == 8 && I::SIGNED_BYTES {
                    _mm256_mul_ps(self.scales, products)
                } else {
                    _mm256_mul_ps(self.scales, _mm256_fnmadd_ps(offset, s, products))
                };
                sum = _mm256_fmadd_ps(d, v, sum);
            }
            _mm256_storeu_ps(sums.as_mut_ptr(), sum);
        }
    }
}

/// The sums over a row's lanes, in the order of [`crate::simd::reduce::sum`].
#[inline(always)]
pub(super) fn totals(_isa: Avx2, sums: &Sums, token: usize) -> [f32; NR] {
    let mut totals = [0.0; NR];
    for (part, totals) in totals.as_chunks_mut::<ROWS>().0.iter_mut().enumerate() {
        // SAFETY: the token proves AVX; each array is the 32 bytes that are loaded or written.
        unsafe {
            let mut lanes = [_mm256_setzero_ps(); LANES];
            for (lane, sums) in lanes.iter_mut().zip(sums) {
                *lane = _mm256_loadu_ps(sums[token].as_chunks::<ROWS>().0[part].as_ptr());
            }
            for half in [4, 2, 1] {
                for i in 0..half {
                    lanes[i] = _mm256_add_ps(lanes[i], lanes[i + half]);
                }
            }
            _mm256_storeu_ps(totals.as_mut_ptr(), lanes[0]);
        }
    }
    totals
}
