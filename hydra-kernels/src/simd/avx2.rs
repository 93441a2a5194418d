//! [`Lanes`] on AVX2: two registers.

use super::bytes::Bytes;
use super::lanes::{LANES, Lanes};
use crate::isa::Avx2;
use core::arch::x86_64::*;

impl Lanes for Avx2 {
    type V = [__m256; 2];
    /// d and m: AVX2 has no permutation of sixteen values, so d·q + m is computed.
    type Table = ([__m256; 2], [__m256; 2]);

    #[inline(always)]
    fn vectorize<R>(self, op: impl FnOnce() -> R) -> R {
        Avx2::vectorize(self, op)
    }

    #[inline(always)]
    fn splat(self, x: f32) -> [__m256; 2] {
        // SAFETY: `self` proves AVX.
        unsafe { [_mm256_set1_ps(x); 2] }
    }

    #[inline(always)]
    fn prefetch(self, at: *const u8) {
        // SAFETY: x86-64 includes SSE; a prefetch of any address is allowed and reads nothing.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }

    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> [__m256; 2] {
        // SAFETY: `self` proves AVX; the array is the two vectors of 32 bytes that are loaded, at any alignment.
        unsafe { [_mm256_loadu_ps(x.as_ptr()), _mm256_loadu_ps(x.as_ptr().add(8))] }
    }

    #[inline(always)]
    fn store(self, v: [__m256; 2]) -> [f32; LANES] {
        let mut out = [0.0; LANES];
        // SAFETY: `self` proves AVX; the array is the two vectors of 32 bytes that are written, at any alignment.
        unsafe {
            _mm256_storeu_ps(out.as_mut_ptr(), v[0]);
            _mm256_storeu_ps(out.as_mut_ptr().add(8), v[1]);
        }
        out
    }

    #[inline(always)]
    fn f32(self, bytes: &[u8; 64]) -> [__m256; 2] {
        // SAFETY: `self` proves AVX; the array is the two vectors of 32 bytes that are loaded, at any alignment.
        unsafe { [_mm256_loadu_ps(bytes.as_ptr().cast()), _mm256_loadu_ps(bytes.as_ptr().add(32).cast())] }
    }

    #[inline(always)]
    fn f16(self, bytes: &[u8; 32]) -> [__m256; 2] {
        // SAFETY: `self` proves F16C; the array is the two vectors of 16 bytes that are loaded, at any alignment.
        unsafe {
            let (low, high) = (_mm_loadu_si128(bytes.as_ptr().cast()), _mm_loadu_si128(bytes.as_ptr().add(16).cast()));
            [_mm256_cvtph_ps(low), _mm256_cvtph_ps(high)]
        }
    }

    #[inline(always)]
    fn bf16(self, bytes: &[u8; 32]) -> [__m256; 2] {
        // SAFETY: `self` proves AVX2; the array is the two vectors of 16 bytes that are loaded, at any alignment.
        unsafe {
            let (low, high) = (_mm_loadu_si128(bytes.as_ptr().cast()), _mm_loadu_si128(bytes.as_ptr().add(16).cast()));
            let (low, high) = (_mm256_cvtepu16_epi32(low), _mm256_cvtepu16_epi32(high));
            [_mm256_castsi256_ps(_mm256_slli_epi32::<16>(low)), _mm256_castsi256_ps(_mm256_slli_epi32::<16>(high))]
        }
    }

    #[inline(always)]
    fn half(self, bytes: &[u8; 8]) -> [__m256; 2] {
        // SAFETY: `self` proves AVX2 and F16C.
        unsafe { [_mm256_broadcastss_ps(four_halves(bytes)); 2] }
    }

    #[inline(always)]
    fn halves(self, bytes: &[u8; 8]) -> ([__m256; 2], [__m256; 2]) {
        // SAFETY: `self` proves AVX2 and F16C.
        unsafe {
            let four = four_halves(bytes);
            ([_mm256_broadcastss_ps(four); 2], [_mm256_broadcastss_ps(_mm_movehdup_ps(four)); 2])
        }
    }

    #[inline(always)]
    fn scale_and_min(self, bytes: &[u8; 8]) -> [__m256; 2] {
        let (d, m) = self.halves(bytes);
        // SAFETY: `self` proves AVX.
        [d[0], unsafe { _mm256_xor_ps(m[0], _mm256_set1_ps(-0.0)) }]
    }

    #[inline(always)]
    fn lookup(self, table: Bytes, places: Bytes) -> Bytes {
        // SAFETY: `self` proves AVX2, which includes SSSE3.
        Bytes(unsafe { _mm_shuffle_epi8(table.0, places.0) })
    }

    #[inline(always)]
    fn unsigned(self, bytes: Bytes) -> [__m256; 2] {
        // SAFETY: `self` proves AVX2.
        unsafe {
            let (low, high) = (_mm256_cvtepu8_epi32(bytes.0), _mm256_cvtepu8_epi32(_mm_srli_si128::<8>(bytes.0)));
            [_mm256_cvtepi32_ps(low), _mm256_cvtepi32_ps(high)]
        }
    }

    #[inline(always)]
    fn signed(self, bytes: Bytes) -> [__m256; 2] {
        // SAFETY: `self` proves AVX2.
        unsafe {
            let (low, high) = (_mm256_cvtepi8_epi32(bytes.0), _mm256_cvtepi8_epi32(_mm_srli_si128::<8>(bytes.0)));
            [_mm256_cvtepi32_ps(low), _mm256_cvtepi32_ps(high)]
        }
    }

    #[inline(always)]
    fn mul(self, a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
        // SAFETY: `self` proves AVX.
        unsafe { [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])] }
    }

    #[inline(always)]
    fn fma(self, a: [__m256; 2], b: [__m256; 2], c: [__m256; 2]) -> [__m256; 2] {
        // SAFETY: `self` proves FMA.
        unsafe { [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])] }
    }

    #[inline(always)]
    fn table(self, d: [__m256; 2], m: [__m256; 2]) -> Self::Table {
        (d, m)
    }

    #[inline(always)]
    fn fives(self, (d, m): ([__m256; 2], [__m256; 2]), packed: Bytes, fifths: [u8; 4]) -> ([__m256; 2], [__m256; 2]) {
        // SAFETY: `self` proves AVX2 and FMA.
        unsafe {
            let wide = [_mm256_cvtepu8_epi32(packed.0), _mm256_cvtepu8_epi32(_mm_srli_si128::<8>(packed.0))];
            let fifths = _mm256_set1_epi32(i32::from_le_bytes(fifths));
            // Bit i of eight comes to bit 4 of lane i.
            let lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
            let bits = [
                _mm256_srlv_epi32(_mm256_slli_epi32::<4>(fifths), lanes),
                _mm256_srlv_epi32(fifths, _mm256_add_epi32(lanes, _mm256_set1_epi32(4))),
                _mm256_srlv_epi32(fifths, _mm256_add_epi32(lanes, _mm256_set1_epi32(12))),
                _mm256_srlv_epi32(fifths, _mm256_add_epi32(lanes, _mm256_set1_epi32(20))),
            ];
            let low = _mm256_set1_epi32(15);
            let nibbles = [
                _mm256_and_si256(wide[0], low),
                _mm256_and_si256(wide[1], low),
                _mm256_srli_epi32::<4>(wide[0]),
                _mm256_srli_epi32::<4>(wide[1]),
            ];
            let mut out = [_mm256_setzero_ps(); 4];
            for i in 0..4 {
                let fifth = _mm256_and_si256(bits[i], _mm256_set1_epi32(16));
                let code = _mm256_cvtepi32_ps(_mm256_or_si256(nibbles[i], fifth));
                out[i] = _mm256_fmadd_ps(code, d[i % 2], m[i % 2]);
            }
            ([out[0], out[1]], [out[2], out[3]])
        }
    }

    #[inline(always)]
    fn nibbles(self, low: Self::Table, high: Self::Table, packed: Bytes) -> (Self::V, Self::V) {
        let (low_q, high_q) = (packed.low_nibbles(), packed.high_nibbles());
        (self.fma(self.unsigned(low_q), low.0, low.1), self.fma(self.unsigned(high_q), high.0, high.1))
    }
}

/// Four f16 as f32: one instruction when they come from memory.
///
/// # Safety
/// The CPU has F16C.
#[inline(always)]
pub(super) unsafe fn four_halves(bytes: &[u8; 8]) -> __m128 {
    // SAFETY: the array is the eight bytes that are loaded; F16C is this function's contract.
    unsafe { _mm_cvtph_ps(_mm_loadl_epi64(bytes.as_ptr().cast())) }
}
