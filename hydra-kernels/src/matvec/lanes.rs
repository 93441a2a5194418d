//! Sixteen f32 at a time: one AVX-512 register, or two of AVX2.
//!
//! A value that implements [`Lanes`] is the proof that the machine has the instructions. The methods are compiled with
//! them only where they are inlined into a closure of [`crate::Isa::vectorize`].

use super::bytes::Bytes;
use crate::isa::{Avx2, Avx512};
use core::arch::x86_64::*;

/// Values in a vector.
pub(super) const LANES: usize = 16;

/// What a dot product with a stored row needs.
pub(crate) trait Lanes: Copy {
    /// Sixteen f32.
    type V: Copy;
    /// The sixteen values d·q + m that four bits can mean.
    type Table: Copy;

    fn splat(self, x: f32) -> Self::V;
    /// Asks for the cache line at an address, which need not be in bounds or even mapped.
    #[inline(always)]
    fn fetch(self, at: *const u8) {
        // SAFETY: x86-64 has SSE; a prefetch doesn't fault.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }
    fn load(self, x: &[f32; LANES]) -> Self::V;
    fn store(self, v: Self::V) -> [f32; LANES];
    /// Sixteen f32 at any alignment.
    fn f32(self, bytes: &[u8; 64]) -> Self::V;
    /// Sixteen f16, widened.
    fn f16(self, bytes: &[u8; 32]) -> Self::V;
    /// Sixteen bf16, widened.
    fn bf16(self, bytes: &[u8; 32]) -> Self::V;
    /// The first of four f16, widened, in every lane.
    fn half(self, bytes: &[u8; 8]) -> Self::V;
    /// The same of the first and of the second.
    fn halves(self, bytes: &[u8; 8]) -> (Self::V, Self::V);
    /// Sixteen u8 as f32.
    fn unsigned(self, bytes: Bytes) -> Self::V;
    /// Sixteen i8 as f32.
    fn signed(self, bytes: Bytes) -> Self::V;
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    /// a·b + c, rounded once.
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// q ↦ d·q + m.
    fn table(self, d: Self::V, m: Self::V) -> Self::Table;
    /// What the low nibbles mean in one table, the high ones in another.
    fn nibbles(self, low: Self::Table, high: Self::Table, packed: Bytes) -> (Self::V, Self::V);
}

/// Four f16 as f32: from memory the conversion is one instruction.
///
/// # Safety
/// F16C.
#[inline(always)]
unsafe fn four_halves(bytes: &[u8; 8]) -> __m128 {
    // SAFETY: the array is the eight bytes that are loaded; the rest is the caller's contract.
    unsafe { _mm_cvtph_ps(_mm_loadl_epi64(bytes.as_ptr().cast())) }
}

impl Lanes for Avx512 {
    type V = __m512;
    type Table = __m512;

    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        // SAFETY: `self` proves AVX-512F.
        unsafe { _mm512_set1_ps(x) }
    }

    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> __m512 {
        // SAFETY: `self` proves AVX-512F; the array is 64 bytes, and the load is unaligned.
        unsafe { _mm512_loadu_ps(x.as_ptr()) }
    }

    #[inline(always)]
    fn store(self, v: __m512) -> [f32; LANES] {
        let mut out = [0.0; LANES];
        // SAFETY: `self` proves AVX-512F; the array is 64 bytes, and the store is unaligned.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), v) };
        out
    }

    #[inline(always)]
    fn f32(self, bytes: &[u8; 64]) -> __m512 {
        // SAFETY: `self` proves AVX-512F; the array is 64 bytes, and the load is unaligned.
        unsafe { _mm512_loadu_ps(bytes.as_ptr().cast()) }
    }

    #[inline(always)]
    fn f16(self, bytes: &[u8; 32]) -> __m512 {
        // SAFETY: `self` proves AVX-512F; the array is 32 bytes, and the load is unaligned.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(bytes.as_ptr().cast())) }
    }

    #[inline(always)]
    fn bf16(self, bytes: &[u8; 32]) -> __m512 {
        // SAFETY: `self` proves AVX-512F; the array is 32 bytes, and the load is unaligned.
        unsafe {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(bytes.as_ptr().cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
        }
    }

    #[inline(always)]
    fn half(self, bytes: &[u8; 8]) -> __m512 {
        // SAFETY: `self` proves AVX-512F.
        unsafe { _mm512_broadcastss_ps(four_halves(bytes)) }
    }

    #[inline(always)]
    fn halves(self, bytes: &[u8; 8]) -> (__m512, __m512) {
        // SAFETY: `self` proves AVX-512F. A permutation is one instruction where moving and broadcasting are two.
        unsafe {
            let four = four_halves(bytes);
            let second = _mm512_permutexvar_ps(_mm512_set1_epi32(1), _mm512_castps128_ps512(four));
            (_mm512_broadcastss_ps(four), second)
        }
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
    fn nibbles(self, low: __m512, high: __m512, packed: Bytes) -> (__m512, __m512) {
        // SAFETY: `self` proves AVX-512F. The permutation looks at the lowest four bits of an index alone.
        unsafe {
            let wide = _mm512_cvtepu8_epi32(packed.0);
            (_mm512_permutexvar_ps(wide, low), _mm512_permutexvar_ps(_mm512_srli_epi32::<4>(wide), high))
        }
    }
}

impl Lanes for Avx2 {
    type V = [__m256; 2];
    /// d and m: without a permutation of sixteen, the value is computed.
    type Table = ([__m256; 2], [__m256; 2]);

    #[inline(always)]
    fn splat(self, x: f32) -> [__m256; 2] {
        // SAFETY: `self` proves AVX.
        unsafe { [_mm256_set1_ps(x); 2] }
    }

    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> [__m256; 2] {
        // SAFETY: `self` proves AVX; the array is twice 32 bytes, and the loads are unaligned.
        unsafe { [_mm256_loadu_ps(x.as_ptr()), _mm256_loadu_ps(x.as_ptr().add(8))] }
    }

    #[inline(always)]
    fn store(self, v: [__m256; 2]) -> [f32; LANES] {
        let mut out = [0.0; LANES];
        // SAFETY: `self` proves AVX; the array is twice 32 bytes, and the stores are unaligned.
        unsafe {
            _mm256_storeu_ps(out.as_mut_ptr(), v[0]);
            _mm256_storeu_ps(out.as_mut_ptr().add(8), v[1]);
        }
        out
    }

    #[inline(always)]
    fn f32(self, bytes: &[u8; 64]) -> [__m256; 2] {
        // SAFETY: `self` proves AVX; the array is twice 32 bytes, and the loads are unaligned.
        unsafe { [_mm256_loadu_ps(bytes.as_ptr().cast()), _mm256_loadu_ps(bytes.as_ptr().add(32).cast())] }
    }

    #[inline(always)]
    fn f16(self, bytes: &[u8; 32]) -> [__m256; 2] {
        // SAFETY: `self` proves F16C; the array is twice 16 bytes, and the loads are unaligned.
        unsafe {
            let (low, high) = (_mm_loadu_si128(bytes.as_ptr().cast()), _mm_loadu_si128(bytes.as_ptr().add(16).cast()));
            [_mm256_cvtph_ps(low), _mm256_cvtph_ps(high)]
        }
    }

    #[inline(always)]
    fn bf16(self, bytes: &[u8; 32]) -> [__m256; 2] {
        // SAFETY: `self` proves AVX2; the array is twice 16 bytes, and the loads are unaligned.
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
    fn nibbles(self, low: Self::Table, high: Self::Table, packed: Bytes) -> (Self::V, Self::V) {
        let (low_q, high_q) = (packed.low_nibbles(), packed.high_nibbles());
        (self.fma(self.unsigned(low_q), low.0, low.1), self.fma(self.unsigned(high_q), high.0, high.1))
    }
}
