//! Block formats decoded in registers, for packing and for [`mod@crate::matvec`].
//!
//! The results have the bits of the scalar decoding: q·d is exact in f32, so a fused q·d + m rounds as the two separate
//! operations do.

// Passed by name, a function would be called through a shim that is compiled without the caller's instruction set.
#![allow(clippy::redundant_closure)]

use super::format::{Format, GROUP};
use super::scalar::{IQ4, f16_to_f32, iq4_xs_scale};
use crate::simd::bytes::Bytes;
use crate::simd::lanes::{LANES, Lanes};

/// Decodes `out.len()` columns of a stored row from column `first` on, both multiples of 32, if the format has a faster
/// way than scalar decoding. Otherwise returns `false` and writes nothing.
#[inline(always)]
pub(super) fn decode<L: Lanes>(l: L, format: Format, row: &[u8], first: usize, out: &mut [f32]) -> bool {
    let (out, rest) = out.as_chunks_mut::<GROUP>();
    if !rest.is_empty() || !first.is_multiple_of(GROUP) {
        return false;
    }
    macro_rules! blocks {
        ($weights:ident) => {
            decode_blocks(
                l,
                row,
                first,
                out,
                #[inline(always)]
                |l, block| $weights(l, block),
            )
        };
    }
    match format {
        Format::Q4_0 => blocks!(q4_0),
        Format::Q4_1 => blocks!(q4_1),
        Format::Q8_0 => blocks!(q8_0),
        Format::IQ4_NL => blocks!(iq4_nl),
        Format::IQ4_XS => {
            let blocks = row.as_chunks().0;
            for (out, at) in out.iter_mut().zip(first / GROUP..) {
                store(l, out, iq4_xs(l, &blocks[at / 8], at % 8));
            }
        }
        _ => return false,
    }
    true
}

/// Decodes the blocks from column `first` on, one group each.
#[inline(always)]
fn decode_blocks<L: Lanes, const BYTES: usize>(
    l: L,
    row: &[u8],
    first: usize,
    out: &mut [[f32; GROUP]],
    weights: impl Fn(L, &[u8; BYTES]) -> (L::V, L::V),
) {
    let blocks = &row.as_chunks::<BYTES>().0[first / GROUP..];
    for (out, block) in out.iter_mut().zip(blocks) {
        store(l, out, weights(l, block));
    }
}

#[inline(always)]
fn store<L: Lanes>(l: L, out: &mut [f32; GROUP], (low, high): (L::V, L::V)) {
    out[..LANES].copy_from_slice(&l.store(low));
    out[LANES..].copy_from_slice(&l.store(high));
}

/// The 32 weights of a Q4_0 block.
#[inline(always)]
pub(crate) fn q4_0<L: Lanes>(l: L, block: &[u8; 18]) -> (L::V, L::V) {
    let d = l.half(head(block));
    let table = l.table(d, l.mul(d, l.splat(-8.0)));
    l.nibbles(table, table, Bytes::load(block, 2))
}

/// The 32 weights of a Q4_1 block.
#[inline(always)]
pub(crate) fn q4_1<L: Lanes>(l: L, block: &[u8; 20]) -> (L::V, L::V) {
    let (d, m) = l.halves(head(block));
    let table = l.table(d, m);
    l.nibbles(table, table, Bytes::load(block, 4))
}

/// The 32 weights of a Q8_0 block.
#[inline(always)]
pub(crate) fn q8_0<L: Lanes>(l: L, block: &[u8; 34]) -> (L::V, L::V) {
    let d = l.half(head(block));
    (l.mul(l.signed(Bytes::load(block, 2)), d), l.mul(l.signed(Bytes::load(block, 18)), d))
}

/// The numbers that 32 codes of IQ4_NL or IQ4_XS stand for: those of the low nibbles, then of the high ones.
#[inline(always)]
pub(crate) fn iq4<L: Lanes>(l: L, packed: Bytes) -> (L::V, L::V) {
    let numbers = Bytes::load(&bytemuck::cast::<_, [u8; 16]>(IQ4), 0);
    let (low, high) = (l.lookup(numbers, packed.low_nibbles()), l.lookup(numbers, packed.high_nibbles()));
    (l.signed(low), l.signed(high))
}

/// The 32 weights of an IQ4_NL block.
#[inline(always)]
fn iq4_nl<L: Lanes>(l: L, block: &[u8; 18]) -> (L::V, L::V) {
    let (d, (low, high)) = (l.half(head(block)), iq4(l, Bytes::load(block, 2)));
    (l.mul(low, d), l.mul(high, d))
}

/// The 32 weights of group `sub` of an IQ4_XS block.
#[inline(always)]
fn iq4_xs<L: Lanes>(l: L, block: &[u8; 136], sub: usize) -> (L::V, L::V) {
    let (d, (low, high)) = (l.splat(iq4_xs_scale(block, sub)), iq4(l, Bytes::load(block, 8 + 16 * sub)));
    (l.mul(low, d), l.mul(high, d))
}

/// The eight scales of IQ4_XS as signed bytes, then eight others. `scalar` describes their packing.
#[inline(always)]
pub(crate) fn iq4_xs_scales(head: &[u8; 8]) -> Bytes {
    // Nibble i, or pair of bits i, comes to byte i.
    let lower = u64::from(u32::from_le_bytes([head[4], head[5], head[6], head[7]]));
    let lower = (lower | lower << 16) & 0x0000_ffff_0000_ffff;
    let lower = (lower | lower << 8) & 0x00ff_00ff_00ff_00ff;
    let lower = (lower | lower << 4) & 0x0f0f_0f0f_0f0f_0f0f;
    let upper = u64::from(u16::from_le_bytes([head[2], head[3]]));
    let upper = (upper | upper << 24) & 0x0000_00ff_0000_00ff;
    let upper = (upper | upper << 12) & 0x000f_000f_000f_000f;
    let upper = (upper | upper << 6) & 0x0303_0303_0303_0303;
    Bytes::words(lower | upper << 4, 0).minus(Bytes::splat(32))
}

/// The sixteen scales of Q3_K as signed bytes. `scalar` describes their packing.
#[inline(always)]
pub(crate) fn q3_k_scales(block: &[u8; 110]) -> Bytes {
    let word = |at: usize| u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]]);
    let (a, b, upper) = (word(96), word(100), word(104));
    let four = |lower: u32, upper: u32| u64::from(lower & 0x0f0f_0f0f | (upper & 0x0303_0303) << 4);
    let low = four(a, upper) | four(b, upper >> 2) << 32;
    let high = four(a >> 4, upper >> 4) | four(b >> 4, upper >> 6) << 32;
    Bytes::words(low, high).minus(Bytes::splat(32))
}

/// The eight scales of Q4_K and Q5_K times d, then the eight minima times −dmin. `scalar` describes their packing.
#[inline(always)]
pub(crate) fn scales_and_minima<L: Lanes>(l: L, head: &[u8; 16]) -> [f32; LANES] {
    let word = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
    let (a, b, c) = (word(4), word(8), word(12));
    let upper = |x: u32| (x >> 6 & 0x0303_0303) << 4;
    let scales = [a & 0x3f3f_3f3f, c & 0x0f0f_0f0f | upper(a)];
    let minima = [b & 0x3f3f_3f3f, c >> 4 & 0x0f0f_0f0f | upper(b)];
    let word = |x: [u32; 2]| u64::from(x[0]) | u64::from(x[1]) << 32;
    let values = l.unsigned(Bytes::words(word(scales), word(minima)));
    let halves: &[u8; 8] = head.first_chunk().unwrap(); // of 16
    l.store(l.mul(values, l.scale_and_min(halves)))
}

/// The f16 at byte `at`.
#[inline(always)]
pub(crate) fn half_at(block: &[u8], at: usize) -> f32 {
    f16_to_f32(u16::from_le_bytes([block[at], block[at + 1]]))
}

/// The first bytes of a block.
#[inline(always)]
pub(crate) fn head<const N: usize, const HEAD: usize>(block: &[u8; N]) -> &[u8; HEAD] {
    const { assert!(HEAD <= N) }
    block.first_chunk().unwrap() // N is at least HEAD by the assertion
}
