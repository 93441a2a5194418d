//! A few rows of x times rows of W as they are stored, in 256 bits: eight groups at a time, whose sums are the eight
//! lanes.

// Passed by name, a function would be called through a shim that is compiled without the caller's instruction set.
#![allow(clippy::redundant_closure)]

use super::x86_64::Bytes256;
use super::{Block, LANES};
use crate::quant::simd::{half_at, head, scales_and_minima};
use crate::quant::{GROUP, Weight, by_block_format};
use crate::simd::reduce::sum;
use core::arch::x86_64::*;

/// How many bytes ahead W is prefetched: what is multiplied while memory answers.
const AHEAD: usize = 4096;

/// The codes of eight groups, and their scales beside their minima, or the scales of their first and second halves.
type Groups = ([__m256i; LANES], [__m256; 2]);

/// `y[t][i]` = row `first + i` of W times the row `x[t]`. A row of W is taken apart once for all rows of x.
pub(super) fn products<I: Bytes256, const T: usize>(
    isa: I,
    mut y: [&mut [f32]; T],
    weight: Weight<'_>,
    first: usize,
    x: [&[Block]; T],
) {
    macro_rules! rows {
        ($take_apart:ident, $bytes:literal, 1, $bits:literal, $minimum:literal) => {
            rows!(blocks, $take_apart, $bytes, $bits, $minimum)
        };
        ($take_apart:ident, $bytes:literal, 8, $bits:literal, $minimum:literal) => {
            rows!(super_blocks, $take_apart, $bytes, $bits, $minimum)
        };
        ($way:ident, $take_apart:ident, $bytes:literal, $bits:literal, $minimum:literal) => {
            isa.vectorize(
                #[inline(always)]
                || {
                    for i in 0..y.first().map_or(0, |y| y.len()) {
                        let sums = $way::<I, T, $bytes, $bits, $minimum>(
                            isa,
                            weight.stored(first + i),
                            x,
                            #[inline(always)]
                            |isa, block| $take_apart(isa, block),
                        );
                        y.iter_mut().zip(sums).for_each(|(y, sum)| y[i] = sum);
                    }
                },
            )
        };
    }
    by_block_format!(weight.format(), rows)
}

/// A row of blocks of 32 columns, whose scale comes first and then, if there is one, their minimum.
#[inline(always)]
fn blocks<I: Bytes256, const T: usize, const BYTES: usize, const BITS: u32, const MINIMUM: bool>(
    isa: I,
    row: &[u8],
    x: [&[Block]; T],
    codes: impl Fn(I, &[u8; BYTES]) -> __m256i,
) -> [f32; T] {
    let (eights, rest) = row.as_chunks::<BYTES>().0.as_chunks::<LANES>();
    // SAFETY: `isa` proves AVX.
    let mut lanes = unsafe { [_mm256_setzero_ps(); T] };
    // Inlined twice: for eight blocks, whose number is then known, and for the rest.
    for (at, eight) in eights.iter().enumerate() {
        add_blocks::<I, T, BYTES, BITS, MINIMUM>(isa, eight, &codes, (x, at), &mut lanes);
    }
    if !rest.is_empty() {
        add_blocks::<I, T, BYTES, BITS, MINIMUM>(isa, rest, &codes, (x, eights.len()), &mut lanes);
    }
    lanes.map(
        #[inline(always)]
        |lanes| total(isa, lanes),
    )
}

/// Adds the products of at most eight blocks of 32 columns with block `at` of each row of x.
#[inline(always)]
fn add_blocks<I: Bytes256, const T: usize, const BYTES: usize, const BITS: u32, const MINIMUM: bool>(
    isa: I,
    blocks: &[[u8; BYTES]],
    codes: impl Fn(I, &[u8; BYTES]) -> __m256i,
    (x, at): ([&[Block]; T], usize),
    lanes: &mut [__m256; T],
) {
    prefetch(blocks.as_flattened());
    // SAFETY: `isa` proves AVX.
    let mut groups = [unsafe { _mm256_setzero_si256() }; LANES];
    for i in 0..LANES {
        if i < blocks.len() {
            groups[i] = codes(isa, &blocks[i]);
        }
    }
    let groups = (groups, heads::<I, BYTES, MINIMUM>(isa, blocks));
    for t in 0..T {
        lanes[t] = add::<I, BITS, MINIMUM>(isa, &groups, &x[t][at], lanes[t]);
    }
}

/// A row of blocks of 256 columns.
#[inline(always)]
fn super_blocks<I: Bytes256, const T: usize, const BYTES: usize, const BITS: u32, const MINIMUM: bool>(
    isa: I,
    row: &[u8],
    x: [&[Block]; T],
    groups: impl Fn(I, &[u8; BYTES]) -> Groups,
) -> [f32; T] {
    // SAFETY: `isa` proves AVX.
    let mut lanes = unsafe { [_mm256_setzero_ps(); T] };
    for (at, block) in row.as_chunks::<BYTES>().0.iter().enumerate() {
        prefetch(block);
        let groups = groups(isa, block);
        for t in 0..T {
            lanes[t] = add::<I, BITS, MINIMUM>(isa, &groups, &x[t][at], lanes[t]);
        }
    }
    lanes.map(
        #[inline(always)]
        |lanes| total(isa, lanes),
    )
}

/// Prefetches as many bytes as `read` has, [`AHEAD`] bytes further on: of this row of W, or of the next ones.
#[inline(always)]
fn prefetch(read: &[u8]) {
    for line in (0..read.len()).step_by(64) {
        // SAFETY: x86-64 includes SSE; a prefetch of any address is allowed and reads nothing.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(read.as_ptr().wrapping_add(AHEAD + line).cast()) }
    }
}

/// The sum of the lanes.
#[inline(always)]
fn total<I: Bytes256>(_isa: I, lanes: __m256) -> f32 {
    let mut out = [0.0; LANES];
    // SAFETY: the token proves AVX; the array is the 32 bytes that are written.
    unsafe { _mm256_storeu_ps(out.as_mut_ptr(), lanes) };
    sum(out)
}

/// The first f16 of each of at most eight blocks, widened, and the second, which counts only if there are minima.
#[inline(always)]
fn heads<I: Bytes256, const BYTES: usize, const MINIMUM: bool>(_isa: I, blocks: &[[u8; BYTES]]) -> [__m256; 2] {
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

/// Adds the products of eight groups with x to the lanes.
#[inline(always)]
fn add<I: Bytes256, const BITS: u32, const MINIMUM: bool>(
    isa: I,
    &(codes, [scales, seconds]): &Groups,
    x: &Block,
    lanes: __m256,
) -> __m256 {
    let (q, _) = x.codes.as_chunks::<GROUP>();
    let mut sums = codes;
    for i in 0..LANES {
        // SAFETY: `isa` proves AVX; the array is the 32 bytes that are loaded.
        let q = unsafe { _mm256_loadu_si256(q[i].as_ptr().cast()) };
        sums[i] = if BITS == 8 { isa.signed(codes[i], q) } else { isa.unsigned(codes[i], q) };
    }
    let [low, high] = halves(isa, sums);
    // SAFETY: `isa` proves AVX2 and FMA; each array is the 32 bytes that are loaded.
    unsafe {
        let (d, s) = (_mm256_loadu_ps(x.scales.as_ptr()), _mm256_loadu_ps(x.sums.as_ptr()));
        let offset = _mm256_set1_ps((1 << (BITS - 1)) as f32);
        if BITS == 6 {
            let first = _mm256_loadu_ps(x.first_halves.as_ptr());
            let (low, high) = (_mm256_cvtepi32_ps(low), _mm256_cvtepi32_ps(high));
            let low = _mm256_mul_ps(scales, _mm256_fnmadd_ps(offset, first, low));
            let high = _mm256_mul_ps(seconds, _mm256_fnmadd_ps(offset, _mm256_sub_ps(s, first), high));
            return _mm256_fmadd_ps(d, high, _mm256_fmadd_ps(d, low, lanes));
        }
        let products = _mm256_cvtepi32_ps(_mm256_add_epi32(low, high));
        let v = if MINIMUM {
            _mm256_fmadd_ps(scales, products, _mm256_mul_ps(seconds, s))
        } else if BITS == 8 {
            _mm256_mul_ps(scales, products)
        } else {
            _mm256_mul_ps(scales, _mm256_fnmadd_ps(offset, s, products))
        };
        _mm256_fmadd_ps(d, v, lanes)
    }
}

/// The sums over the lower and over the upper four lanes of each of eight vectors.
#[inline(always)]
fn halves<I: Bytes256>(_isa: I, x: [__m256i; LANES]) -> [__m256i; 2] {
    // SAFETY: the token proves AVX2.
    unsafe {
        let first = _mm256_hadd_epi32(_mm256_hadd_epi32(x[0], x[1]), _mm256_hadd_epi32(x[2], x[3]));
        let second = _mm256_hadd_epi32(_mm256_hadd_epi32(x[4], x[5]), _mm256_hadd_epi32(x[6], x[7]));
        [_mm256_permute2x128_si256::<0x20>(first, second), _mm256_permute2x128_si256::<0x31>(first, second)]
    }
}

/// The bytes `at .. at + 32` of a block.
#[inline(always)]
fn bytes<I: Bytes256>(_isa: I, block: &[u8], at: usize) -> __m256i {
    let bytes: &[u8; 32] = block[at..at + 32].first_chunk().unwrap(); // the range is 32 long
    // SAFETY: the token proves AVX; the array is the 32 bytes that are loaded.
    unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
}

/// The low nibbles of the bytes `at .. at + 16`, then the high ones.
#[inline(always)]
fn nibbles<I: Bytes256>(_isa: I, block: &[u8], at: usize) -> __m256i {
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
fn fives<I: Bytes256>(isa: I, block: &[u8], at: usize) -> __m256i {
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
fn q4_0<I: Bytes256>(isa: I, block: &[u8; 18]) -> __m256i {
    nibbles(isa, block, 2)
}

#[inline(always)]
fn q4_1<I: Bytes256>(isa: I, block: &[u8; 20]) -> __m256i {
    nibbles(isa, block, 4)
}

#[inline(always)]
fn q5_0<I: Bytes256>(isa: I, block: &[u8; 22]) -> __m256i {
    fives(isa, block, 2)
}

#[inline(always)]
fn q5_1<I: Bytes256>(isa: I, block: &[u8; 24]) -> __m256i {
    fives(isa, block, 4)
}

#[inline(always)]
fn q8_0<I: Bytes256>(isa: I, block: &[u8; 34]) -> __m256i {
    bytes(isa, block, 2)
}

/// Eight vectors of nibbles: the low and the high ones of each 32 bytes from `first` on.
#[inline(always)]
fn pairs<I: Bytes256>(isa: I, block: &[u8], first: usize) -> [__m256i; LANES] {
    let [a, b] = both_nibbles(isa, block, first);
    let [c, d] = both_nibbles(isa, block, first + 32);
    let [e, f] = both_nibbles(isa, block, first + 64);
    let [g, h] = both_nibbles(isa, block, first + 96);
    [a, b, c, d, e, f, g, h]
}

/// The low nibbles of 32 bytes, and the high ones.
#[inline(always)]
fn both_nibbles<I: Bytes256>(isa: I, block: &[u8], at: usize) -> [__m256i; 2] {
    let packed = bytes(isa, block, at);
    // SAFETY: `isa` proves AVX2.
    unsafe {
        let low = _mm256_set1_epi8(15);
        [_mm256_and_si256(packed, low), _mm256_and_si256(_mm256_srli_epi16::<4>(packed), low)]
    }
}

/// The scales and the minima of Q4_K and Q5_K.
#[inline(always)]
fn scales<I: Bytes256>(isa: I, block: &[u8; 16]) -> [__m256; 2] {
    let values = scales_and_minima(isa.floats(), block);
    let (scales, minima) = values.split_at(LANES);
    // SAFETY: `isa` proves AVX; both are eight floats, 32 bytes.
    unsafe { [_mm256_loadu_ps(scales.as_ptr()), _mm256_loadu_ps(minima.as_ptr())] }
}

#[inline(always)]
fn q4_k<I: Bytes256>(isa: I, block: &[u8; 144]) -> Groups {
    (pairs(isa, block, 16), scales(isa, head(block)))
}

#[inline(always)]
fn q5_k<I: Bytes256>(isa: I, block: &[u8; 176]) -> Groups {
    let (fifths, mut codes) = (bytes(isa, block, 16), pairs(isa, block, 48));
    for (group, codes) in codes.iter_mut().enumerate() {
        // SAFETY: `isa` proves AVX2.
        unsafe {
            let bit = _mm256_set1_epi8((1u8 << group) as i8);
            let fifths = _mm256_cmpeq_epi8(_mm256_and_si256(fifths, bit), bit);
            *codes = _mm256_or_si256(*codes, _mm256_and_si256(fifths, _mm256_set1_epi8(16)));
        }
    }
    (codes, scales(isa, head(block)))
}

#[inline(always)]
fn q6_k<I: Bytes256>(isa: I, block: &[u8; 210]) -> Groups {
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
    let stored: &[u8; 16] = block[192..].first_chunk().unwrap(); // the block has 18 bytes from 192 on
    // SAFETY: `isa` proves AVX2; the array is the 16 bytes that are loaded.
    let scales = unsafe {
        // The scales of the first halves, then those of the second halves.
        let order = _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
        let scales = _mm_shuffle_epi8(_mm_loadu_si128(stored.as_ptr().cast()), order);
        let d = _mm256_set1_ps(half_at(block, 208));
        let (first, second) = (_mm256_cvtepi8_epi32(scales), _mm256_cvtepi8_epi32(_mm_srli_si128::<8>(scales)));
        [_mm256_mul_ps(d, _mm256_cvtepi32_ps(first)), _mm256_mul_ps(d, _mm256_cvtepi32_ps(second))]
    };
    (codes, scales)
}
