//! Dot products of stored rows with x, a few rows at a time, and of one block of each format; and blocks as f32, for panels.
//!
//! A weight in a register is the very f32 that [`crate::quant`] decodes: q·d is exact in f32, so that a fused q·d + m
//! rounds as the two operations do. (Where a scale stands alone, Σ q·x is scaled instead of each q.) A row's sum is one
//! vector, added to in the order of the columns, so it doesn't depend on the rows that are computed beside it.

// A function that is passed by name is called through a shim, which is compiled without the instruction set of its caller.
#![allow(clippy::redundant_closure)]

use super::bytes::Bytes;
use super::lanes::{LANES, Lanes};
use crate::quant::{Format, GROUP, f16_to_f32};
use crate::softmax::sum_lanes;

/// A vector of x.
type X = [f32; LANES];

/// Σ_p row[p] · `x[p]` for `R` rows of `format`, each x.len() columns long.
#[inline(always)]
pub(super) fn dots<L: Lanes, const R: usize>(l: L, format: Format, rows: [&[u8]; R], x: &[f32]) -> [f32; R] {
    match format {
        Format::F32 => plain::<L, 64, R>(
            l,
            rows,
            x,
            #[inline(always)]
            |l: L, bytes| l.f32(bytes),
        ),
        Format::F16 => plain::<L, 32, R>(
            l,
            rows,
            x,
            #[inline(always)]
            |l: L, bytes| l.f16(bytes),
        ),
        Format::Bf16 => plain::<L, 32, R>(
            l,
            rows,
            x,
            #[inline(always)]
            |l: L, bytes| l.bf16(bytes),
        ),
        Format::Q4_0 => blocks::<L, 18, 2, R>(
            l,
            rows,
            x,
            #[inline(always)]
            |l, block, x, sum| q4_0(l, block, x, sum),
        ),
        Format::Q4_1 => blocks::<L, 20, 2, R>(
            l,
            rows,
            x,
            #[inline(always)]
            |l, block, x, sum| q4_1(l, block, x, sum),
        ),
        Format::Q5_0 => blocks::<L, 22, 2, R>(
            l,
            rows,
            x,
            #[inline(always)]
            |l, block, x, sum| q5_0(l, block, x, sum),
        ),
        Format::Q5_1 => blocks::<L, 24, 2, R>(
            l,
            rows,
            x,
            #[inline(always)]
            |l, block, x, sum| q5_1(l, block, x, sum),
        ),
        Format::Q8_0 => blocks::<L, 34, 2, R>(
            l,
            rows,
            x,
            #[inline(always)]
            |l, block, x, sum| q8_0(l, block, x, sum),
        ),
        Format::Q4K => blocks::<L, 144, 16, R>(
            l,
            rows,
            x,
            #[inline(always)]
            |l, block, x, sum| q4_k(l, block, x, sum),
        ),
        Format::Q5K => blocks::<L, 176, 16, R>(
            l,
            rows,
            x,
            #[inline(always)]
            |l, block, x, sum| q5_k(l, block, x, sum),
        ),
        Format::Q6K => blocks::<L, 210, 16, R>(
            l,
            rows,
            x,
            #[inline(always)]
            |l, block, x, sum| q6_k(l, block, x, sum),
        ),
    }
}

/// Decodes `out.len()` columns of a stored row from column `first` on, both multiples of 32, if this format has a way that is
/// faster than `quant`'s; else `false`, and nothing is done.
#[inline(always)]
pub(crate) fn decode<L: Lanes>(l: L, format: Format, row: &[u8], first: usize, out: &mut [f32]) -> bool {
    let (out, rest) = out.as_chunks_mut::<GROUP>();
    if !rest.is_empty() || !first.is_multiple_of(GROUP) {
        return false;
    }
    match format {
        Format::Q4_0 => each(
            l,
            row,
            first,
            out,
            #[inline(always)]
            |l, block| four_bits_0(l, block),
        ),
        Format::Q4_1 => each(
            l,
            row,
            first,
            out,
            #[inline(always)]
            |l, block| four_bits_1(l, block),
        ),
        Format::Q8_0 => each(
            l,
            row,
            first,
            out,
            #[inline(always)]
            |l, block| eight_bits(l, block),
        ),
        _ => return false,
    }
    true
}

/// Elements that stand alone, sixteen in `BYTES`; the last few are padded with zeros.
#[inline(always)]
fn plain<L: Lanes, const BYTES: usize, const R: usize>(
    l: L,
    rows: [&[u8]; R],
    x: &[f32],
    widen: impl Fn(L, &[u8; BYTES]) -> L::V,
) -> [f32; R] {
    let (x, x_rest) = x.as_chunks::<LANES>();
    let mut sums = [l.splat(0.0); R];
    let mut vectors = [&[] as &[[u8; BYTES]]; R];
    for (vectors, row) in vectors.iter_mut().zip(rows) {
        *vectors = &row.as_chunks().0[..x.len()];
    }
    let ahead = x.len() * BYTES * R;
    for (i, x) in x.iter().enumerate() {
        for r in 0..R {
            l.fetch(vectors[r][i].as_ptr().wrapping_add(ahead));
            sums[r] = l.fma(widen(l, &vectors[r][i]), l.load(x), sums[r]);
        }
    }
    if !x_rest.is_empty() {
        let mut x = [0.0; LANES];
        x[..x_rest.len()].copy_from_slice(x_rest);
        for r in 0..R {
            let rest = rows[r].as_chunks::<BYTES>().1;
            let mut w = [0; BYTES];
            w[..rest.len()].copy_from_slice(rest);
            sums[r] = l.fma(widen(l, &w), l.load(&x), sums[r]);
        }
    }
    reduce(l, sums)
}

/// Blocks of `BYTES` bytes and `VECTORS` · 16 columns; `add` adds one block's part to a row's sum.
#[inline(always)]
fn blocks<L: Lanes, const BYTES: usize, const VECTORS: usize, const R: usize>(
    l: L,
    rows: [&[u8]; R],
    x: &[f32],
    add: impl Fn(L, &[u8; BYTES], &[X; VECTORS], L::V) -> L::V,
) -> [f32; R] {
    let (x, _) = x.as_chunks::<LANES>();
    let (x, _) = x.as_chunks::<VECTORS>();
    let mut sums = [l.splat(0.0); R];
    let mut blocks = [&[] as &[[u8; BYTES]]; R];
    for (blocks, row) in blocks.iter_mut().zip(rows) {
        *blocks = &row.as_chunks().0[..x.len()];
    }
    // The same place of the next rows.
    let ahead = x.len() * BYTES * R;
    for (i, x) in x.iter().enumerate() {
        for r in 0..R {
            l.fetch(blocks[r][i].as_ptr().wrapping_add(ahead));
            sums[r] = add(l, &blocks[r][i], x, sums[r]);
        }
    }
    reduce(l, sums)
}

#[inline(always)]
fn reduce<L: Lanes, const R: usize>(l: L, sums: [L::V; R]) -> [f32; R] {
    let mut out = [0.0; R];
    for (out, sum) in out.iter_mut().zip(sums) {
        *out = sum_lanes(l.store(sum));
    }
    out
}

/// 16 where a bit of `bits` is set, byte i for bit i.
#[inline(always)]
fn fifths(bits: [u8; 2]) -> Bytes {
    let eight = |byte: u8| u64::from(byte) * 0x0101_0101_0101_0101;
    let bit = 0x8040_2010_0804_0201;
    Bytes::words(eight(bits[0]), eight(bits[1])).sixteen_where(Bytes::words(bit, bit))
}

/// `out` = the groups from column `first` on.
#[inline(always)]
fn each<L: Lanes, const BYTES: usize>(
    l: L,
    row: &[u8],
    first: usize,
    out: &mut [[f32; GROUP]],
    group: impl Fn(L, &[u8; BYTES]) -> (L::V, L::V),
) {
    let blocks = &row.as_chunks::<BYTES>().0[first / GROUP..];
    for (out, block) in out.iter_mut().zip(blocks) {
        let (low, high) = group(l, block);
        out[..LANES].copy_from_slice(&l.store(low));
        out[LANES..].copy_from_slice(&l.store(high));
    }
}

/// The 32 weights of a Q4_0 block.
#[inline(always)]
fn four_bits_0<L: Lanes>(l: L, block: &[u8; 18]) -> (L::V, L::V) {
    let d = l.half(head(block));
    let table = l.table(d, l.mul(d, l.splat(-8.0)));
    l.nibbles(table, table, Bytes::load(block, 2))
}

/// The 32 weights of a Q4_1 block.
#[inline(always)]
fn four_bits_1<L: Lanes>(l: L, block: &[u8; 20]) -> (L::V, L::V) {
    let (d, m) = l.halves(head(block));
    let table = l.table(d, m);
    l.nibbles(table, table, Bytes::load(block, 4))
}

/// The 32 weights of a Q8_0 block.
#[inline(always)]
fn eight_bits<L: Lanes>(l: L, block: &[u8; 34]) -> (L::V, L::V) {
    let d = l.half(head(block));
    (l.mul(l.signed(Bytes::load(block, 2)), d), l.mul(l.signed(Bytes::load(block, 18)), d))
}

#[inline(always)]
fn q4_0<L: Lanes>(l: L, block: &[u8; 18], x: &[X; 2], sum: L::V) -> L::V {
    let (low, high) = four_bits_0(l, block);
    l.fma(high, l.load(&x[1]), l.fma(low, l.load(&x[0]), sum))
}

#[inline(always)]
fn q4_1<L: Lanes>(l: L, block: &[u8; 20], x: &[X; 2], sum: L::V) -> L::V {
    let (low, high) = four_bits_1(l, block);
    l.fma(high, l.load(&x[1]), l.fma(low, l.load(&x[0]), sum))
}

/// Adds Σ (d·q + m)·x of 32 columns: nibbles in bytes `packed`, fifth bits in `fives` (16 or 0).
#[inline(always)]
fn five_bits<L: Lanes>(l: L, (d, m): (L::V, L::V), packed: Bytes, fives: [Bytes; 2], x: &[X; 2], sum: L::V) -> L::V {
    let low = l.unsigned(packed.low_nibbles().or(fives[0]));
    let high = l.unsigned(packed.high_nibbles().or(fives[1]));
    l.fma(l.fma(high, d, m), l.load(&x[1]), l.fma(l.fma(low, d, m), l.load(&x[0]), sum))
}

#[inline(always)]
fn q5_0<L: Lanes>(l: L, block: &[u8; 22], x: &[X; 2], sum: L::V) -> L::V {
    let d = l.half(head(block));
    let fives = [fifths([block[2], block[3]]), fifths([block[4], block[5]])];
    five_bits(l, (d, l.mul(d, l.splat(-16.0))), Bytes::load(block, 6), fives, x, sum)
}

#[inline(always)]
fn q5_1<L: Lanes>(l: L, block: &[u8; 24], x: &[X; 2], sum: L::V) -> L::V {
    let scales = l.halves(head(block));
    let fives = [fifths([block[4], block[5]]), fifths([block[6], block[7]])];
    five_bits(l, scales, Bytes::load(block, 8), fives, x, sum)
}

#[inline(always)]
fn q8_0<L: Lanes>(l: L, block: &[u8; 34], x: &[X; 2], sum: L::V) -> L::V {
    let d = l.half(head(block));
    let first = l.mul(l.signed(Bytes::load(block, 2)), l.load(&x[0]));
    let both = l.fma(l.signed(Bytes::load(block, 18)), l.load(&x[1]), first);
    l.fma(d, both, sum)
}

/// The eight scales and eight negated minima of Q4_K and Q5_K, times d and dmin; for the packing see `quant::blocks`.
#[inline(always)]
fn scales_and_minima<L: Lanes>(l: L, head: &[u8; 16]) -> [f32; LANES] {
    let word = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
    let (a, b, c) = (word(4), word(8), word(12));
    let upper = |x: u32| (x >> 6 & 0x0303_0303) << 4;
    let scales = [a & 0x3f3f_3f3f, c & 0x0f0f_0f0f | upper(a)];
    let minima = [b & 0x3f3f_3f3f, c >> 4 & 0x0f0f_0f0f | upper(b)];
    let word = |x: [u32; 2]| u64::from(x[0]) | u64::from(x[1]) << 32;
    let values = l.unsigned(Bytes::words(word(scales), word(minima)));
    let (d, dmin) = (half_at(head, 0), -half_at(head, 2));
    let factors = [d, d, d, d, d, d, d, d, dmin, dmin, dmin, dmin, dmin, dmin, dmin, dmin];
    l.store(l.mul(values, l.load(&factors)))
}

#[inline(always)]
fn half_at(block: &[u8], at: usize) -> f32 {
    f16_to_f32(u16::from_le_bytes([block[at], block[at + 1]]))
}

/// The first bytes of a block, all formats' being longer.
#[inline(always)]
fn head<const N: usize, const HEAD: usize>(block: &[u8; N]) -> &[u8; HEAD] {
    const { assert!(HEAD <= N) }
    block.first_chunk().unwrap() // by the assertion
}

#[inline(always)]
fn q4_k<L: Lanes>(l: L, block: &[u8; 144], x: &[X; 16], mut sum: L::V) -> L::V {
    let scales = scales_and_minima(l, head(block));
    for pair in 0..4 {
        let (even, odd) = (2 * pair, 2 * pair + 1);
        let low = l.table(l.splat(scales[even]), l.splat(scales[8 + even]));
        let high = l.table(l.splat(scales[odd]), l.splat(scales[8 + odd]));
        for part in 0..2 {
            let (low, high) = l.nibbles(low, high, Bytes::load(block, 16 + 32 * pair + 16 * part));
            sum = l.fma(low, l.load(&x[4 * pair + part]), sum);
            sum = l.fma(high, l.load(&x[4 * pair + 2 + part]), sum);
        }
    }
    sum
}

#[inline(always)]
fn q5_k<L: Lanes>(l: L, block: &[u8; 176], x: &[X; 16], mut sum: L::V) -> L::V {
    let scales = scales_and_minima(l, head(block));
    let fives = [Bytes::load(block, 16), Bytes::load(block, 32)];
    for group in 0..8 {
        let (d, m) = (l.splat(scales[group]), l.splat(scales[8 + group]));
        let bit = Bytes::splat(1 << group);
        for part in 0..2 {
            let packed = Bytes::load(block, 48 + group / 2 * 32 + 16 * part);
            let nibbles = if group % 2 == 0 { packed.low_nibbles() } else { packed.high_nibbles() };
            let q = l.unsigned(nibbles.or(fives[part].sixteen_where(bit)));
            sum = l.fma(l.fma(q, d, m), l.load(&x[2 * group + part]), sum);
        }
    }
    sum
}

#[inline(always)]
fn q6_k<L: Lanes>(l: L, block: &[u8; 210], x: &[X; 16], mut sum: L::V) -> L::V {
    let scales = l.store(l.mul(l.signed(Bytes::load(block, 192)), l.splat(half_at(block, 208))));
    for half in 0..2 {
        for part in 0..2 {
            let high = Bytes::load(block, 128 + 32 * half + 16 * part);
            let first = Bytes::load(block, 64 * half + 16 * part);
            let second = Bytes::load(block, 64 * half + 32 + 16 * part);
            // Group g's upper pair of bits is bits 2g of `high`; moved to bits 4 and 5.
            let groups = [
                (first.low_nibbles(), high.left::<4>()),
                (second.low_nibbles(), high.left::<2>()),
                (first.high_nibbles(), high),
                (second.high_nibbles(), high.right::<2>()),
            ];
            for (g, (nibbles, pair)) in groups.into_iter().enumerate() {
                let q = nibbles.or(pair.and(Bytes::splat(0x30)));
                let q = l.signed(q.minus(Bytes::splat(32)));
                let at = 8 * half + 2 * g + part;
                sum = l.fma(l.mul(q, l.splat(scales[at])), l.load(&x[at]), sum);
            }
        }
    }
    sum
}
