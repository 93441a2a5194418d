//! Groups of W taken apart in 256 bits, eight groups of a row at a time.

use super::LANES;
use super::x86_64::Vectors256;
use crate::quant::scalar::IQ4;
use crate::quant::simd::{half_at, head, iq4_xs_scales, q3_k_scales, scales_and_minima};
use crate::simd::bytes::Bytes;
use core::arch::x86_64::*;

/// The codes of eight groups, and their scales beside their minima, or the scales of their first and second halves.
/// Codes of eight bits are signed. Q2_K's are as in `quant::codes`.
pub(super) type Groups = ([__m256i; LANES], [__m256; 2]);

/// At most eight blocks of 32 columns, whose scale comes first and then, if there is one, their minimum. Groups that
/// there are not are zeros.
#[inline(always)]
pub(super) fn of_blocks<I: Vectors256, const BYTES: usize, const MINIMUM: bool>(
    isa: I,
    blocks: &[[u8; BYTES]],
    codes: impl Fn(I, &[u8; BYTES]) -> __m256i,
) -> Groups {
    // SAFETY: `isa` proves AVX.
    let mut groups = [unsafe { _mm256_setzero_si256() }; LANES];
    for i in 0..LANES {
        if i < blocks.len() {
            groups[i] = codes(isa, &blocks[i]);
        }
    }
    (groups, heads::<I, BYTES, MINIMUM>(isa, blocks))
}

/// The first f16 of each of at most eight blocks, widened, and the second, which counts only if there are minima.
#[inline(always)]
fn heads<I: Vectors256, const BYTES: usize, const MINIMUM: bool>(_isa: I, blocks: &[[u8; BYTES]]) -> [__m256; 2] {
    // Both at once, as 32 bits: an array of 16 bits would go through memory, and its load would wait for all stores.
    let head = |i: usize| blocks.get(i).map_or(0, |block| i32::from_le_bytes([block[0], block[1], block[2], block[3]]));
    // SAFETY: the token proves AVX2 and F16C.
    unsafe {
        let heads = _mm256_setr_epi32(head(0), head(1), head(2), head(3), head(4), head(5), head(6), head(7));
        let first = _mm256_and_si256(heads, _mm256_set1_epi32(0xffff));
        // Four first, four second; the other four first, the other four second.
        let halves = _mm256_packus_epi32(first, _mm256_srli_epi32::<16>(heads));
        let halves = _mm256_permute4x64_epi64::<0b11_01_10_00>(halves);
        let seconds =
            if MINIMUM { _mm256_cvtph_ps(_mm256_extracti128_si256::<1>(halves)) } else { _mm256_setzero_ps() };
        [_mm256_cvtph_ps(_mm256_castsi256_si128(halves)), seconds]
    }
}

/// The bytes `at .. at + 32` of a block.
#[inline(always)]
fn bytes<I: Vectors256>(_isa: I, block: &[u8], at: usize) -> __m256i {
    let bytes: &[u8; 32] = block[at..at + 32].first_chunk().unwrap(); // the range is 32 long
    // SAFETY: the token proves AVX; the array is the 32 bytes that are loaded.
    unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
}

/// The low nibbles of the bytes `at .. at + 16`, then the high ones.
#[inline(always)]
fn nibbles<I: Vectors256>(_isa: I, block: &[u8], at: usize) -> __m256i {
    let bytes: &[u8; 16] = block[at..at + 16].first_chunk().unwrap(); // the range is 16 long
    // SAFETY: the token proves AVX2; the array is the 16 bytes that are loaded.
    unsafe {
        let both = _mm256_broadcastsi128_si256(_mm_loadu_si128(bytes.as_ptr().cast()));
        let shifted = _mm256_srlv_epi32(both, _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4));
        _mm256_and_si256(shifted, _mm256_set1_epi8(15))
    }
}

/// [`nibbles`] of the sixteen bytes from `at + 4` on, with bit i of the four before them as the fifth bit of column i.
#[inline(always)]
fn fives<I: Vectors256>(isa: I, block: &[u8], at: usize) -> __m256i {
    let fifths = i32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]]);
    // SAFETY: `isa` proves AVX2.
    unsafe {
        // Byte i / 8 in place i, of which bit i mod 8 counts.
        let spread = _mm256_setr_epi64x(0, 0x0101_0101_0101_0101, 0x0202_0202_0202_0202, 0x0303_0303_0303_0303);
        let bit = _mm256_set1_epi64x(0x8040_2010_0804_0201u64 as i64);
        let fifths = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(fifths), spread), bit);
        let fifths = _mm256_and_si256(_mm256_cmpeq_epi8(fifths, bit), _mm256_set1_epi8(16));
        _mm256_or_si256(nibbles(isa, block, at + 4), fifths)
    }
}

#[inline(always)]
pub(super) fn q4_0<I: Vectors256>(isa: I, block: &[u8; 18]) -> __m256i {
    nibbles(isa, block, 2)
}

#[inline(always)]
pub(super) fn q4_1<I: Vectors256>(isa: I, block: &[u8; 20]) -> __m256i {
    nibbles(isa, block, 4)
}

#[inline(always)]
pub(super) fn q5_0<I: Vectors256>(isa: I, block: &[u8; 22]) -> __m256i {
    fives(isa, block, 2)
}

#[inline(always)]
pub(super) fn q5_1<I: Vectors256>(isa: I, block: &[u8; 24]) -> __m256i {
    fives(isa, block, 4)
}

#[inline(always)]
pub(super) fn q8_0<I: Vectors256>(isa: I, block: &[u8; 34]) -> __m256i {
    bytes(isa, block, 2)
}

/// [`nibbles`], each as the number of IQ4_NL that it stands for.
#[inline(always)]
fn iq4<I: Vectors256>(isa: I, block: &[u8], at: usize) -> __m256i {
    // SAFETY: `isa` proves AVX2; the array is the 16 bytes that are loaded.
    unsafe {
        let numbers = _mm256_broadcastsi128_si256(_mm_loadu_si128(IQ4.as_ptr().cast()));
        _mm256_shuffle_epi8(numbers, nibbles(isa, block, at))
    }
}

#[inline(always)]
pub(super) fn iq4_nl<I: Vectors256>(isa: I, block: &[u8; 18]) -> __m256i {
    iq4(isa, block, 2)
}

#[inline(always)]
pub(super) fn iq4_xs<I: Vectors256>(isa: I, block: &[u8; 136]) -> Groups {
    let scales = iq4_xs_scales(head(block)).0;
    // SAFETY: `isa` proves AVX2.
    unsafe {
        let mut codes = [_mm256_setzero_si256(); LANES];
        for (group, codes) in codes.iter_mut().enumerate() {
            *codes = iq4(isa, block, 8 + 16 * group);
        }
        let scales = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(scales));
        (codes, [_mm256_mul_ps(_mm256_set1_ps(half_at(block, 0)), scales), _mm256_setzero_ps()])
    }
}

/// The lower two bits of the codes of Q2_K and Q3_K, from 64 bytes.
#[inline(always)]
fn twos<I: Vectors256>(isa: I, block: &[u8], at: usize) -> [__m256i; LANES] {
    let [first, second] = [bytes(isa, block, at), bytes(isa, block, at + 32)];
    // SAFETY: `isa` proves AVX2.
    unsafe {
        let mut pairs = [
            first,
            _mm256_srli_epi16::<2>(first),
            _mm256_srli_epi16::<4>(first),
            _mm256_srli_epi16::<6>(first),
            second,
            _mm256_srli_epi16::<2>(second),
            _mm256_srli_epi16::<4>(second),
            _mm256_srli_epi16::<6>(second),
        ];
        for pairs in &mut pairs {
            *pairs = _mm256_and_si256(*pairs, _mm256_set1_epi8(3));
        }
        pairs
    }
}

#[inline(always)]
pub(super) fn q2_k<I: Vectors256>(isa: I, block: &[u8; 84]) -> Groups {
    let (mut codes, packed) = (twos(isa, block, 16), Bytes::load(block, 0));
    // SAFETY: `isa` proves AVX2.
    unsafe {
        let scales = _mm256_broadcastsi128_si256(packed.low_nibbles().0);
        // The scale of each half, in words.
        let places = _mm256_setr_m128i(_mm_set1_epi16(0x8000u16 as i16), _mm_set1_epi16(0x8001u16 as i16));
        for (group, codes) in codes.iter_mut().enumerate() {
            let places = _mm256_or_si256(places, _mm256_set1_epi16(2 * group as i16));
            // Two bytes of at most 3 times at most 15: none carries.
            *codes = _mm256_mullo_epi16(*codes, _mm256_shuffle_epi8(scales, places));
        }
        let minima = _mm256_cvtepu16_epi32(packed.high_nibbles().0);
        let dmin = _mm256_set1_epi32((-half_at(block, 82)).to_bits() as i32);
        (codes, [_mm256_set1_ps(half_at(block, 80)), _mm256_castsi256_ps(_mm256_or_si256(dmin, minima))])
    }
}

#[inline(always)]
pub(super) fn q3_k<I: Vectors256>(isa: I, block: &[u8; 110]) -> Groups {
    let (thirds, mut codes) = (bytes(isa, block, 0), twos(isa, block, 32));
    for (group, codes) in codes.iter_mut().enumerate() {
        *codes = with_bit::<I, 4>(isa, *codes, thirds, group);
    }
    (codes, half_scales(isa, q3_k_scales(block), half_at(block, 108)))
}

/// `codes`, and `VALUE` where `bits` have the group's bit.
#[inline(always)]
fn with_bit<I: Vectors256, const VALUE: i8>(_isa: I, codes: __m256i, bits: __m256i, group: usize) -> __m256i {
    // SAFETY: the token proves AVX2.
    unsafe {
        let bit = _mm256_set1_epi8((1u8 << group) as i8);
        let set = _mm256_cmpeq_epi8(_mm256_and_si256(bits, bit), bit);
        _mm256_or_si256(codes, _mm256_and_si256(set, _mm256_set1_epi8(VALUE)))
    }
}

/// `d` times the scales of the groups' first halves, and of their second halves, from sixteen signed bytes.
#[inline(always)]
fn half_scales<I: Vectors256>(_isa: I, scales: Bytes, d: f32) -> [__m256; 2] {
    // SAFETY: the token proves AVX2.
    unsafe {
        let order = _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
        let (scales, d) = (_mm_shuffle_epi8(scales.0, order), _mm256_set1_ps(d));
        let (first, second) = (_mm256_cvtepi8_epi32(scales), _mm256_cvtepi8_epi32(_mm_srli_si128::<8>(scales)));
        [_mm256_mul_ps(d, _mm256_cvtepi32_ps(first)), _mm256_mul_ps(d, _mm256_cvtepi32_ps(second))]
    }
}

/// Eight vectors of nibbles: the low and the high ones of each 32 bytes from `first` on.
#[inline(always)]
fn pairs<I: Vectors256>(isa: I, block: &[u8], first: usize) -> [__m256i; LANES] {
    let [a, b] = both_nibbles(isa, block, first);
    let [c, d] = both_nibbles(isa, block, first + 32);
    let [e, f] = both_nibbles(isa, block, first + 64);
    let [g, h] = both_nibbles(isa, block, first + 96);
    [a, b, c, d, e, f, g, h]
}

/// The low nibbles of 32 bytes, and the high ones.
#[inline(always)]
fn both_nibbles<I: Vectors256>(isa: I, block: &[u8], at: usize) -> [__m256i; 2] {
    let packed = bytes(isa, block, at);
    // SAFETY: `isa` proves AVX2.
    unsafe {
        let low = _mm256_set1_epi8(15);
        [_mm256_and_si256(packed, low), _mm256_and_si256(_mm256_srli_epi16::<4>(packed), low)]
    }
}

/// The scales and the minima of Q4_K and Q5_K.
#[inline(always)]
fn scales<I: Vectors256>(isa: I, block: &[u8; 16]) -> [__m256; 2] {
    let values = scales_and_minima(isa.floats(), block);
    let (scales, minima) = values.split_at(LANES);
    // SAFETY: `isa` proves AVX; both are eight floats, 32 bytes.
    unsafe { [_mm256_loadu_ps(scales.as_ptr()), _mm256_loadu_ps(minima.as_ptr())] }
}

#[inline(always)]
pub(super) fn q4_k<I: Vectors256>(isa: I, block: &[u8; 144]) -> Groups {
    (pairs(isa, block, 16), scales(isa, head(block)))
}

#[inline(always)]
pub(super) fn q5_k<I: Vectors256>(isa: I, block: &[u8; 176]) -> Groups {
    let (fifths, mut codes) = (bytes(isa, block, 16), pairs(isa, block, 48));
    for (group, codes) in codes.iter_mut().enumerate() {
        *codes = with_bit::<I, 16>(isa, *codes, fifths, group);
    }
    (codes, scales(isa, head(block)))
}

#[inline(always)]
pub(super) fn q6_k<I: Vectors256>(isa: I, block: &[u8; 210]) -> Groups {
    let low = pairs(isa, block, 0);
    let high = [bytes(isa, block, 128), bytes(isa, block, 160)];
    let mut codes = low;
    for (group, codes) in codes.iter_mut().enumerate() {
        // SAFETY: `isa` proves AVX2.
        unsafe {
            let (half, g) = (group / 4, group % 4);
            // The group's pair of bits, from bit 2g to bits 4 and 5.
            let pair = match g {
                0 => _mm256_slli_epi16::<4>(high[half]),
                1 => _mm256_slli_epi16::<2>(high[half]),
                2 => high[half],
                _ => _mm256_srli_epi16::<2>(high[half]),
            };
            let pair = _mm256_and_si256(pair, _mm256_set1_epi8(0x30));
            // Nibbles g / 2 of the half's pair g % 2.
            *codes = _mm256_or_si256(low[4 * half + g % 2 * 2 + g / 2], pair);
        }
    }
    (codes, half_scales(isa, Bytes::load(block, 192), half_at(block, 208)))
}
