//! A few rows of x times rows of W as they are stored, in 256 bits: eight groups at a time, whose sums are the eight
//! lanes.

// Passed by name, a function would be called through a shim that is compiled without the caller's instruction set.
#![allow(clippy::redundant_closure)]

use super::groups256::{self, Groups};
use super::x86_64::{Bytes256, unpack_minima};
use super::{Block, LANES, two_minima, two_scales};
use crate::quant::{GROUP, Weight, by_block_format};
use crate::simd::reduce::sum;
use core::arch::x86_64::*;

/// How many bytes ahead W is prefetched: what is multiplied while memory answers.
const AHEAD: usize = 4096;

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
                            |isa, block| groups256::$take_apart(isa, block),
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
    let groups = groups256::of_blocks::<I, BYTES, MINIMUM>(isa, blocks, codes);
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
        let first = _mm256_loadu_ps(x.first_halves.as_ptr());
        if two_scales(BITS) {
            let (low, high) = (_mm256_cvtepi32_ps(low), _mm256_cvtepi32_ps(high));
            let low = _mm256_mul_ps(scales, _mm256_fnmadd_ps(offset, first, low));
            let high = _mm256_mul_ps(seconds, _mm256_fnmadd_ps(offset, _mm256_sub_ps(s, first), high));
            return _mm256_fmadd_ps(d, high, _mm256_fmadd_ps(d, low, lanes));
        }
        let products = _mm256_cvtepi32_ps(_mm256_add_epi32(low, high));
        let v = if MINIMUM {
            let [minima, s] = if two_minima(BITS) { unpack_minima(isa, seconds, s, first) } else { [seconds, s] };
            _mm256_fmadd_ps(scales, products, _mm256_mul_ps(minima, s))
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
