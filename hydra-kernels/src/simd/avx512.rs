//! [`Lanes`] on AVX-512: one register.

use super::avx2::four_halves;
use super::bytes::Bytes;
use super::lanes::{LANES, Lanes};
use crate::isa::Avx512;
use core::arch::x86_64::*;

impl Lanes for Avx512 {
    type V = __m512;
    type Table = __m512;

    #[inline(always)]
    fn vectorize<R>(self, op: impl FnOnce() -> R) -> R {
        Avx512::vectorize(self, op)
    }

    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        // SAFETY: `self` proves AVX-512F.
        unsafe { _mm512_set1_ps(x) }
    }

    #[inline(always)]
    fn prefetch(self, at: *const u8) {
        // SAFETY: x86-64 includes SSE; a prefetch of any address is allowed and reads nothing.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }

    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> __m512 {
        // SAFETY: `self` proves AVX-512F; the array is the 64 bytes that are loaded, at any alignment.
        unsafe { _mm512_loadu_ps(x.as_ptr()) }
    }

    #[inline(always)]
    fn store(self, v: __m512) -> [f32; LANES] {
        let mut out = [0.0; LANES];
        // SAFETY: `self` proves AVX-512F; the array is the 64 bytes that are written, at any alignment.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), v) };
        out
    }

    #[inline(always)]
    fn f32(self, bytes: &[u8; 64]) -> __m512 {
        // SAFETY: `self` proves AVX-512F; the array is the 64 bytes that are loaded, at any alignment.
        unsafe { _mm512_loadu_ps(bytes.as_ptr().cast()) }
    }

    #[inline(always)]
    fn f16(self, bytes: &[u8; 32]) -> __m512 {
        // SAFETY: `self` proves AVX-512F; the array is the 32 bytes that are loaded, at any alignment.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(bytes.as_ptr().cast())) }
    }

    #[inline(always)]
    fn bf16(self, bytes: &[u8; 32]) -> __m512 {
        // SAFETY: `self` proves AVX-512F; the array is the 32 bytes that are loaded, at any alignment.
        unsafe {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(bytes.as_ptr().cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
        }
    }

    #[inline(always)]
    fn half(self, bytes: &[u8; 8]) -> __m512 {
        // SAFETY: `self` proves AVX-512F and F16C.
        unsafe { _mm512_broadcastss_ps(four_halves(bytes)) }
    }

    #[inline(always)]
    fn halves(self, bytes: &[u8; 8]) -> (__m512, __m512) {
        // SAFETY: `self` proves AVX-512F and F16C.
        unsafe {
            let four = four_halves(bytes);
            // One permutation instead of a move and a broadcast.
            let second = _mm512_permutexvar_ps(_mm512_set1_epi32(1), _mm512_castps128_ps512(four));
            (_mm512_broadcastss_ps(four), second)
        }
    }

    #[inline(always)]
    fn scale_and_min(self, bytes: &[u8; 8]) -> __m512 {
        // SAFETY: `self` proves AVX-512F and F16C; x86-64 includes SSE.
        unsafe {
            let four = _mm_xor_ps(four_halves(bytes), _mm_setr_ps(0.0, -0.0, 0.0, 0.0));
            let places = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
            _mm512_permutexvar_ps(places, _mm512_castps128_ps512(four))
        }
    }

    #[inline(always)]
    fn lookup(self, table: Bytes, places: Bytes) -> Bytes {
        // SAFETY: `self` proves AVX-512F, which includes SSSE3.
        Bytes(unsafe { _mm_shuffle_epi8(table.0, places.0) })
    }

    #[inline(always)]
    fn unsigned(self, bytes: Bytes) -> __m512 {
        // SAFETY: `self` proves AVX-512F.
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes.0)) }
    }

    #[inline(always)]
    fn signed(self, bytes: Bytes) -> __m512 {
        // SAFETY: `self` proves AVX-512F.
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes.0)) }
    }

    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` proves AVX-512F.
        unsafe { _mm512_mul_ps(a, b) }
    }

    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: `self` proves AVX-512F.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    fn table(self, d: __m512, m: __m512) -> __m512 {
        let q = core::array::from_fn(
            #[inline(always)]
            |q| q as f32,
        );
        self.fma(d, self.load(&q), m)
    }

    #[inline(always)]
    fn fives(self, (d, m): (__m512, __m512), packed: Bytes, fifths: [u8; 4]) -> (__m512, __m512) {
        let [a, b, c, e] = fifths;
        // SAFETY: `self` proves AVX-512F.
        unsafe {
            let (wide, sixteen) = (_mm512_cvtepu8_epi32(packed.0), _mm512_set1_epi32(16));
            let low = _mm512_and_si512(wide, _mm512_set1_epi32(15));
            let high = _mm512_srli_epi32::<4>(wide);
            let low = _mm512_mask_or_epi32(low, u16::from_le_bytes([a, b]), low, sixteen);
            let high = _mm512_mask_or_epi32(high, u16::from_le_bytes([c, e]), high, sixteen);
            (_mm512_fmadd_ps(_mm512_cvtepi32_ps(low), d, m), _mm512_fmadd_ps(_mm512_cvtepi32_ps(high), d, m))
        }
    }

    #[inline(always)]
    fn nibbles(self, low: __m512, high: __m512, packed: Bytes) -> (__m512, __m512) {
        // SAFETY: `self` proves AVX-512F.
        unsafe {
            // A permutation uses only the lowest four bits of each index.
            let wide = _mm512_cvtepu8_epi32(packed.0);
            (_mm512_permutexvar_ps(wide, low), _mm512_permutexvar_ps(_mm512_srli_epi32::<4>(wide), high))
        }
    }
}
