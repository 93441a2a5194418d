//! Sums of products of bytes in 256 bits, which AVX2, AVX-VNNI and AVX-512 VNNI form in their own ways.

use crate::isa::{Avx2, Avx512, Avx512Vnni, AvxVnni};
use crate::simd::lanes::Lanes;
use core::arch::x86_64::*;

/// A value that implements this proves that the CPU has AVX2, FMA and F16C. They are used only where a function is
/// inlined into a closure of [`Vectors256::vectorize`].
pub(super) trait Vectors256: Copy {
    /// The f32 vectors that this one contains.
    type Floats: Lanes;

    /// See [`crate::Isa::vectorize`].
    fn vectorize<R>(self, op: impl FnOnce() -> R) -> R;

    /// The proof of f32 vectors.
    fn floats(self) -> Self::Floats;
}

/// A value that implements this proves that the CPU has the instructions of its methods, too.
pub(super) trait Bytes256: Vectors256 {
    /// Whether [`Bytes256::quads`] takes codes of eight bits for signed bytes, with their sign bit turned.
    const SIGNED_BYTES: bool;

    /// In each lane, the sum of four products of an unsigned code, below 128, with a q.
    fn unsigned(self, codes: __m256i, q: __m256i) -> __m256i;

    /// In each lane, the sum of four products of a signed weight with a q.
    fn signed(self, weights: __m256i, q: __m256i) -> __m256i;

    /// In each lane Σᵢ of four products of `codes[i]`, of `BITS` bits, with `q[i]`; the four of q are the same in all
    /// lanes.
    fn quads<const BITS: u32, const N: usize>(self, codes: &[__m256i; N], q: &[[i8; 4]; N]) -> __m256i;
}

/// Of Q2_K's minima as `quant::codes` packs them: −dmin, and Σ m·s over both halves, where `s` is the sum of q over a group
/// and `first` the one over its first half.
#[inline(always)]
pub(super) fn unpack_minima<I: Vectors256>(_isa: I, minima: __m256, s: __m256, first: __m256) -> [__m256; 2] {
    // SAFETY: the token proves AVX2 and FMA.
    unsafe {
        let bits = _mm256_castps_si256(minima);
        let four_bits = _mm256_set1_epi32(15);
        let low = _mm256_cvtepi32_ps(_mm256_and_si256(bits, four_bits));
        let high = _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32::<8>(bits), four_bits));
        let dmin = _mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32(!0x1fff)));
        [dmin, _mm256_fmadd_ps(high, _mm256_sub_ps(s, first), _mm256_mul_ps(low, first))]
    }
}

/// Four bytes in every lane.
#[inline(always)]
fn splat(q: &[i8; 4]) -> __m256i {
    // SAFETY: this is inlined into methods of tokens that prove AVX.
    unsafe { _mm256_set1_epi32(i32::from_ne_bytes([q[0] as u8, q[1] as u8, q[2] as u8, q[3] as u8])) }
}

macro_rules! vectors {
    ($token:ty, $floats:ty, |$isa:ident| $proof:expr) => {
        impl Vectors256 for $token {
            type Floats = $floats;

            #[inline(always)]
            fn vectorize<R>(self, op: impl FnOnce() -> R) -> R {
                <$token>::vectorize(self, op)
            }

            #[inline(always)]
            fn floats(self) -> $floats {
                let $isa = self;
                $proof
            }
        }
    };
}

vectors!(Avx2, Avx2, |isa| isa);
vectors!(Avx512, Avx512, |isa| isa);
vectors!(AvxVnni, Avx2, |isa| isa.avx2());
vectors!(Avx512Vnni, Avx512, |isa| isa.avx512());

impl Bytes256 for Avx2 {
    const SIGNED_BYTES: bool = true;

    #[inline(always)]
    fn unsigned(self, codes: __m256i, q: __m256i) -> __m256i {
        // Two products are below 2 · 127 · 127 < 2¹⁵: VPMADDUBSW does not saturate.
        // SAFETY: `self` proves AVX2.
        unsafe { _mm256_madd_epi16(_mm256_maddubs_epi16(codes, q), _mm256_set1_epi16(1)) }
    }

    #[inline(always)]
    fn signed(self, weights: __m256i, q: __m256i) -> __m256i {
        // |w| · (q with the sign of w). Two products are at most 2 · 128 · 127 < 2¹⁵.
        // SAFETY: `self` proves AVX2.
        unsafe {
            let products = _mm256_maddubs_epi16(_mm256_abs_epi8(weights), _mm256_sign_epi8(q, weights));
            _mm256_madd_epi16(products, _mm256_set1_epi16(1))
        }
    }

    #[inline(always)]
    fn quads<const BITS: u32, const N: usize>(self, codes: &[__m256i; N], q: &[[i8; 4]; N]) -> __m256i {
        // Pairs of products that a sum of 16 bits holds: 8 · 2 · 15 · 127, 4 · 2 · 31 · 127 and 2 · 2 · 63 · 127 are
        // below 2¹⁵. Q2_K's codes have scales in them: they are at most 45.
        let pairs = match BITS {
            3 | 4 => 8,
            5 => 4,
            2 | 6 => 2,
            _ => 1,
        };
        // SAFETY: `self` proves AVX2.
        unsafe {
            let mut sum = _mm256_setzero_si256();
            for (codes, q) in codes.chunks(pairs).zip(q.chunks(pairs)) {
                let mut words = _mm256_setzero_si256();
                for (&codes, q) in codes.iter().zip(q) {
                    let products = if BITS == 8 {
                        let weights = _mm256_xor_si256(codes, _mm256_set1_epi8(-128));
                        _mm256_maddubs_epi16(_mm256_abs_epi8(weights), _mm256_sign_epi8(splat(q), weights))
                    } else {
                        _mm256_maddubs_epi16(codes, splat(q))
                    };
                    words = _mm256_add_epi16(words, products);
                }
                sum = _mm256_add_epi32(sum, _mm256_madd_epi16(words, _mm256_set1_epi16(1)));
            }
            sum
        }
    }
}

/// VPDPBUSD adds four products to each lane, without saturation.
macro_rules! vnni {
    ($token:ty, $dot:ident) => {
        impl Bytes256 for $token {
            const SIGNED_BYTES: bool = false;

            #[inline(always)]
            fn unsigned(self, codes: __m256i, q: __m256i) -> __m256i {
                // SAFETY: `self` proves the instruction.
                unsafe { $dot(_mm256_setzero_si256(), codes, q) }
            }

            #[inline(always)]
            fn signed(self, weights: __m256i, q: __m256i) -> __m256i {
                // |w| · (q with the sign of w)
                // SAFETY: `self` proves the instruction, and AVX2.
                unsafe { $dot(_mm256_setzero_si256(), _mm256_abs_epi8(weights), _mm256_sign_epi8(q, weights)) }
            }

            #[inline(always)]
            fn quads<const BITS: u32, const N: usize>(self, codes: &[__m256i; N], q: &[[i8; 4]; N]) -> __m256i {
                // SAFETY: `self` proves the instruction.
                unsafe {
                    let mut sum = _mm256_setzero_si256();
                    for (&codes, q) in codes.iter().zip(q) {
                        sum = $dot(sum, codes, splat(q));
                    }
                    sum
                }
            }
        }
    };
}

vnni!(AvxVnni, _mm256_dpbusd_avx_epi32);
vnni!(Avx512Vnni, _mm256_dpbusd_epi32);
