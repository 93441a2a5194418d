//! Rows of activations quantized in 256 bits.

use super::activations::{Block, Summary, degenerate, quantize_row};
use super::x86_64::Vectors256;
use crate::quant::GROUP;
use core::arch::x86_64::*;

/// See [`super::quantize`].
pub(super) fn rows<'a, I: Vectors256>(isa: I, rows: impl Iterator<Item = (&'a mut [Block], &'a [f32])>) {
    isa.vectorize(
        #[inline(always)]
        || {
            for (out, x) in rows {
                quantize_row(
                    out,
                    x,
                    #[inline(always)]
                    |codes, x| group(isa, codes, x),
                );
            }
        },
    );
}

/// Writes q = round(x / d).
#[inline(always)]
fn group<I: Vectors256>(_isa: I, codes: &mut [i8; GROUP], x: &[f32; GROUP]) -> Summary {
    // SAFETY: the token proves AVX2; each array is as long as what is loaded or written.
    unsafe {
        let mut values = [_mm256_setzero_ps(); 4];
        for (values, x) in values.iter_mut().zip(x.as_chunks::<8>().0) {
            *values = _mm256_loadu_ps(x.as_ptr());
        }
        let largest = largest_magnitude(&values);
        if let Some(scale) = degenerate(largest) {
            codes.fill(0);
            return (scale, [0; 2]);
        }
        let largest = f32::from_bits(largest);
        let inverse = _mm256_set1_ps(127.0 / largest);
        let mut q = [_mm256_setzero_si256(); 4];
        for (q, values) in q.iter_mut().zip(values) {
            *q = _mm256_cvtps_epi32(_mm256_mul_ps(values, inverse));
        }
        // In each half of the registers, words of the first half, of the second, of the first, of the second.
        let sums = _mm256_hadd_epi32(_mm256_add_epi32(q[0], q[1]), _mm256_add_epi32(q[2], q[3]));
        let sums = _mm256_hadd_epi32(sums, sums);
        let sums = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256::<1>(sums));
        let (first, second) = (_mm_cvtsi128_si32(sums), _mm_extract_epi32::<1>(sums));
        let bytes = _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
        // Packed in each half of the registers: four bytes of each of the four, twice.
        let bytes = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
        _mm256_storeu_si256(codes.as_mut_ptr().cast(), bytes);
        (largest / 127.0, [first, first + second])
    }
}

/// The bits of the largest magnitude.
///
/// # Safety
/// The CPU has AVX2, and this is inlined into a function that enables it.
#[inline(always)]
unsafe fn largest_magnitude(values: &[__m256; 4]) -> u32 {
    // SAFETY: that is this function's contract.
    unsafe {
        let mut largest = _mm256_setzero_si256();
        for &values in values {
            let magnitudes = _mm256_and_si256(_mm256_castps_si256(values), _mm256_set1_epi32(0x7fff_ffff));
            largest = _mm256_max_epu32(largest, magnitudes);
        }
        let largest = _mm_max_epu32(_mm256_castsi256_si128(largest), _mm256_extracti128_si256::<1>(largest));
        let largest = _mm_max_epu32(largest, _mm_shuffle_epi32::<0b01_00_11_10>(largest));
        let largest = _mm_max_epu32(largest, _mm_shuffle_epi32::<0b10_11_00_01>(largest));
        _mm_cvtsi128_si32(largest) as u32
    }
}
