//! Rows of W unpacked into a panel in 256 bits: eight groups of each row at a time, then transposed.

// Passed by name, a function would be called through a shim that is compiled without the caller's instruction set.
#![allow(clippy::redundant_closure)]

use super::LANES;
use super::groups256::{self, Groups};
use super::panel::{NR, PanelGroup};
use super::x86_64::Vectors256;
use crate::quant::{Weight, by_block_format};
use core::arch::x86_64::*;
use core::ops::Range;

/// See [`super::panel::unpack`].
pub(super) fn unpack<I: Vectors256>(isa: I, panel: &mut [PanelGroup], weight: Weight<'_>, rows: Range<usize>) {
    macro_rules! groups {
        ($take_apart:ident, $bytes:literal, 1, $bits:literal, $minimum:literal) => {
            groups!($bytes, LANES, $bits, |isa, blocks| groups256::of_blocks::<I, $bytes, $minimum>(
                isa,
                blocks,
                #[inline(always)]
                |isa, block| groups256::$take_apart(isa, block),
            ))
        };
        ($take_apart:ident, $bytes:literal, 8, $bits:literal, $minimum:literal) => {
            groups!($bytes, 1, $bits, |isa, blocks| groups256::$take_apart(isa, &blocks[0]))
        };
        ($bytes:literal, $blocks:expr, $bits:literal, $groups:expr) => {
            isa.vectorize(
                #[inline(always)]
                || {
                    unpack_groups::<I, $bytes, { $blocks }, $bits>(
                        isa,
                        panel,
                        weight,
                        rows,
                        #[inline(always)]
                        $groups,
                    )
                },
            )
        };
    }
    by_block_format!(weight.format(), groups)
}

/// `BLOCKS` blocks of `BYTES` bytes are eight groups; the last ones of a row may be fewer.
#[inline(always)]
fn unpack_groups<I: Vectors256, const BYTES: usize, const BLOCKS: usize, const BITS: u32>(
    isa: I,
    panel: &mut [PanelGroup],
    weight: Weight<'_>,
    rows: Range<usize>,
    groups: impl Fn(I, &[[u8; BYTES]]) -> Groups,
) {
    for (at, out) in panel.chunks_mut(LANES).enumerate() {
        // SAFETY: `isa` proves AVX.
        let none = unsafe { (_mm256_setzero_si256(), _mm256_setzero_ps()) };
        let (mut codes, mut scales) = ([[none.0; NR]; LANES], [[none.1; NR]; 2]);
        for (lane, row) in rows.clone().enumerate().take(NR) {
            let blocks = weight.stored(row).as_chunks::<BYTES>().0;
            let blocks = &blocks[at * BLOCKS..blocks.len().min((at + 1) * BLOCKS)];
            let (groups, [first, second]) = groups(isa, blocks);
            for g in 0..LANES {
                codes[g][lane] = groups[g];
            }
            (scales[0][lane], scales[1][lane]) = (first, second);
        }
        for part in 0..NR / LANES {
            let some = part * LANES..(part + 1) * LANES;
            // SAFETY: `isa` proves AVX2; each array is the 32 bytes that are written.
            unsafe {
                for (out, codes) in out.iter_mut().zip(&codes) {
                    let quads = transpose(isa, codes[some.clone()].first_chunk().unwrap()); // eight
                    for (out, quad) in out.codes.iter_mut().zip(quads) {
                        // A code of eight bits is the signed byte with its sign bit turned.
                        let turn = _mm256_set1_epi8(if BITS == 8 { -128 } else { 0 });
                        let out = &mut out.as_chunks_mut::<32>().0[part];
                        _mm256_storeu_si256(out.as_mut_ptr().cast(), _mm256_xor_si256(quad, turn));
                    }
                }
                for (second, scales) in scales.iter().enumerate() {
                    let mut rows = [none.0; LANES];
                    for (row, scales) in rows.iter_mut().zip(&scales[some.clone()]) {
                        *row = _mm256_castps_si256(*scales);
                    }
                    for (out, scales) in out.iter_mut().zip(transpose(isa, &rows)) {
                        let out = if second == 0 { &mut out.scales } else { &mut out.seconds };
                        let out = &mut out.as_chunks_mut::<LANES>().0[part];
                        _mm256_storeu_si256(out.as_mut_ptr().cast(), scales);
                    }
                }
            }
        }
    }
}

/// Transposes 8 × 8 words of 32 bits.
#[inline(always)]
fn transpose<I: Vectors256>(_isa: I, rows: &[__m256i; 8]) -> [__m256i; 8] {
    let [mut words, mut pairs, mut columns] = [*rows; 3];
    // SAFETY: the token proves AVX2.
    unsafe {
        for i in 0..4 {
            words[2 * i] = _mm256_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
            words[2 * i + 1] = _mm256_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
        }
        for i in 0..2 {
            for j in 0..2 {
                pairs[4 * i + 2 * j] = _mm256_unpacklo_epi64(words[4 * i + j], words[4 * i + 2 + j]);
                pairs[4 * i + 2 * j + 1] = _mm256_unpackhi_epi64(words[4 * i + j], words[4 * i + 2 + j]);
            }
        }
        for i in 0..4 {
            columns[i] = _mm256_permute2x128_si256::<0x20>(pairs[i], pairs[4 + i]);
            columns[4 + i] = _mm256_permute2x128_si256::<0x31>(pairs[i], pairs[4 + i]);
        }
    }
    columns
}
