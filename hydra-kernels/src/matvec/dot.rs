//! Dot products of a few stored rows with the x of a few tokens, format by format.
//!
//! A weight in a register has the bits that [`crate::quant`] decodes. (Where a format has only scales, Σ q·x is scaled
//! instead of each q.) It is decoded once for all tokens. A row's sum for a token is one vector, added to in the order
//! of the columns, so it does not depend on the rows and tokens that are computed beside it.

// Passed by name, a function would be called through a shim that is compiled without the caller's instruction set.
#![allow(clippy::redundant_closure)]

use super::Tile;
use crate::quant::simd::{self, head, iq4, iq4_xs_scales, q3_k_scales, scales_and_minima};
use crate::quant::{Format, Weight, by_block_format};
use crate::simd::bytes::Bytes;
use crate::simd::lanes::{LANES, Lanes};
use crate::simd::reduce::sum;

/// Sixteen elements of x.
type X = [f32; LANES];

/// Rows of W from `first` on, `R` at a time, for each of `T` tokens: they share the loads of x and the decoding, and their
/// sums are independent. Each format has a function of its own: in debug builds, all of them need much stack together.
pub(super) fn rows<L: Lanes, const R: usize, const T: usize>(
    l: L,
    y: &mut [Tile<R, T>],
    weight: Weight<'_>,
    first: usize,
    x: [&[f32]; T],
) {
    macro_rules! each {
        (|$rows:ident| $dots:expr) => {
            l.vectorize(
                #[inline(always)]
                || {
                    each(
                        y,
                        weight,
                        first,
                        #[inline(always)]
                        |$rows| $dots,
                    )
                },
            )
        };
    }
    macro_rules! plain {
        ($bytes:literal, $widen:ident) => {
            each!(|rows| plain::<L, $bytes, R, T>(
                l,
                rows,
                x,
                #[inline(always)]
                |l: L, bytes| l.$widen(bytes),
            ))
        };
    }
    macro_rules! blocks {
        ($add:ident, $bytes:literal, $groups:literal, $bits:literal, $minimum:literal) => {
            each!(|rows| blocks::<L, $bytes, { 2 * $groups }, R, T>(
                l,
                rows,
                x,
                #[inline(always)]
                |l, block, x, sums| $add(l, block, x, sums),
            ))
        };
    }
    match weight.format() {
        Format::F32 => plain!(64, f32),
        Format::F16 => plain!(32, f16),
        Format::Bf16 => plain!(32, bf16),
        format => by_block_format!(format, blocks),
    }
}

/// Calls `dots` with the stored rows, `R` at a time.
#[inline(always)]
fn each<'a, const R: usize, const T: usize>(
    y: &mut [Tile<R, T>],
    weight: Weight<'a>,
    first: usize,
    dots: impl Fn([&'a [u8]; R]) -> Tile<R, T>,
) {
    for (y, first) in y.iter_mut().zip((first..).step_by(R)) {
        let mut rows = [&[] as &[u8]; R];
        for (i, bytes) in rows.iter_mut().enumerate() {
            *bytes = weight.stored(first + i);
        }
        *y = dots(rows);
    }
}

/// From a byte to the one at its place in the next R rows, if rows follow each other.
#[inline(always)]
fn ahead<const R: usize>(rows: &[&[u8]; R]) -> usize {
    let row = if R == 1 { rows[0].len() } else { rows[1].as_ptr().addr().wrapping_sub(rows[0].as_ptr().addr()) };
    row.wrapping_mul(R)
}

/// Plain elements, sixteen in `BYTES` bytes. Zeros pad the last few to a whole vector.
#[inline(always)]
fn plain<L: Lanes, const BYTES: usize, const R: usize, const T: usize>(
    l: L,
    rows: [&[u8]; R],
    x: [&[f32]; T],
    widen: impl Fn(L, &[u8; BYTES]) -> L::V,
) -> [[f32; T]; R] {
    let len = x[0].len() / LANES;
    let (mut whole, mut rest) = ([&[] as &[X]; T], [[0.0; LANES]; T]);
    for ((whole, rest), x) in whole.iter_mut().zip(&mut rest).zip(x) {
        let (vectors, last) = x.as_chunks();
        *whole = &vectors[..len];
        rest[..last.len()].copy_from_slice(last);
    }
    let mut sums = [[l.splat(0.0); T]; R];
    let mut vectors = [&[] as &[[u8; BYTES]]; R];
    for (vectors, row) in vectors.iter_mut().zip(rows) {
        *vectors = &row.as_chunks().0[..len];
    }
    let ahead = ahead(&rows);
    for (i, _) in whole[0].iter().enumerate() {
        for r in 0..R {
            l.prefetch(vectors[r][i].as_ptr().wrapping_add(ahead));
            add_products(l, widen(l, &vectors[r][i]), at(&whole, i), &mut sums[r]);
        }
    }
    if !x[0].len().is_multiple_of(LANES) {
        for r in 0..R {
            let last = rows[r].as_chunks::<BYTES>().1;
            let mut w = [0; BYTES];
            w[..last.len()].copy_from_slice(last);
            add_products(l, widen(l, &w), rest.each_ref(), &mut sums[r]);
        }
    }
    reduce(l, sums)
}

/// Blocks of `BYTES` bytes and `VECTORS` · 16 columns. `add` adds one block's products to a row's sums.
#[inline(always)]
fn blocks<L: Lanes, const BYTES: usize, const VECTORS: usize, const R: usize, const T: usize>(
    l: L,
    rows: [&[u8]; R],
    x: [&[f32]; T],
    add: impl Fn(L, &[u8; BYTES], [&[X; VECTORS]; T], &mut [L::V; T]),
) -> [[f32; T]; R] {
    let len = x[0].len() / (VECTORS * LANES);
    let mut whole = [&[] as &[[X; VECTORS]]; T];
    for (whole, x) in whole.iter_mut().zip(x) {
        *whole = &x.as_chunks().0.as_chunks().0[..len];
    }
    let mut sums = [[l.splat(0.0); T]; R];
    let mut blocks = [&[] as &[[u8; BYTES]]; R];
    for (blocks, row) in blocks.iter_mut().zip(rows) {
        *blocks = &row.as_chunks().0[..len];
    }
    let ahead = ahead(&rows);
    for (i, _) in whole[0].iter().enumerate() {
        for r in 0..R {
            l.prefetch(blocks[r][i].as_ptr().wrapping_add(ahead));
            add(l, &blocks[r][i], at(&whole, i), &mut sums[r]);
        }
    }
    reduce(l, sums)
}

/// Element `i` of each token's x.
#[inline(always)]
fn at<'a, E, const T: usize>(x: &[&'a [E]; T], i: usize) -> [&'a E; T] {
    core::array::from_fn(
        #[inline(always)]
        |t| &x[t][i],
    )
}

/// Vector `i` of each token's x in a block.
#[inline(always)]
fn vector<const VECTORS: usize, const T: usize>(x: [&[X; VECTORS]; T], i: usize) -> [&X; T] {
    core::array::from_fn(
        #[inline(always)]
        |t| &x[t][i],
    )
}

/// Adds w·x to each token's sum.
#[inline(always)]
fn add_products<L: Lanes, const T: usize>(l: L, w: L::V, x: [&X; T], sums: &mut [L::V; T]) {
    for t in 0..T {
        sums[t] = l.fma(w, l.load(x[t]), sums[t]);
    }
}

/// Adds d · Σ q·x of group `group` to each token's sum.
#[inline(always)]
fn add_scaled<L: Lanes, const VECTORS: usize, const T: usize>(
    l: L,
    d: L::V,
    (low, high): (L::V, L::V),
    (x, group): ([&[X; VECTORS]; T], usize),
    sums: &mut [L::V; T],
) {
    for t in 0..T {
        let both = l.fma(high, l.load(&x[t][2 * group + 1]), l.mul(low, l.load(&x[t][2 * group])));
        sums[t] = l.fma(d, both, sums[t]);
    }
}

/// The sum of each vector's lanes.
#[inline(always)]
fn reduce<L: Lanes, const R: usize, const T: usize>(l: L, sums: [[L::V; T]; R]) -> [[f32; T]; R] {
    let mut out = [[0.0; T]; R];
    for (out, sums) in out.iter_mut().zip(sums) {
        for (out, vector) in out.iter_mut().zip(sums) {
            *out = sum(l.store(vector));
        }
    }
    out
}

#[inline(always)]
fn q4_0<L: Lanes, const T: usize>(l: L, block: &[u8; 18], x: [&[X; 2]; T], sums: &mut [L::V; T]) {
    let (low, high) = simd::q4_0(l, block);
    add_products(l, low, vector(x, 0), sums);
    add_products(l, high, vector(x, 1), sums);
}

#[inline(always)]
fn q4_1<L: Lanes, const T: usize>(l: L, block: &[u8; 20], x: [&[X; 2]; T], sums: &mut [L::V; T]) {
    let (low, high) = simd::q4_1(l, block);
    add_products(l, low, vector(x, 0), sums);
    add_products(l, high, vector(x, 1), sums);
}

#[inline(always)]
fn q5_0<L: Lanes, const T: usize>(l: L, block: &[u8; 22], x: [&[X; 2]; T], sums: &mut [L::V; T]) {
    let (d, fifths) = (l.half(head(block)), [block[2], block[3], block[4], block[5]]);
    let (low, high) = l.fives((d, l.mul(d, l.splat(-16.0))), Bytes::load(block, 6), fifths);
    add_products(l, low, vector(x, 0), sums);
    add_products(l, high, vector(x, 1), sums);
}

#[inline(always)]
fn q5_1<L: Lanes, const T: usize>(l: L, block: &[u8; 24], x: [&[X; 2]; T], sums: &mut [L::V; T]) {
    let (scales, fifths) = (l.halves(head(block)), [block[4], block[5], block[6], block[7]]);
    let (low, high) = l.fives(scales, Bytes::load(block, 8), fifths);
    add_products(l, low, vector(x, 0), sums);
    add_products(l, high, vector(x, 1), sums);
}

#[inline(always)]
fn q8_0<L: Lanes, const T: usize>(l: L, block: &[u8; 34], x: [&[X; 2]; T], sums: &mut [L::V; T]) {
    let (low, high) = (l.signed(Bytes::load(block, 2)), l.signed(Bytes::load(block, 18)));
    add_scaled(l, l.half(head(block)), (low, high), (x, 0), sums);
}

#[inline(always)]
fn iq4_nl<L: Lanes, const T: usize>(l: L, block: &[u8; 18], x: [&[X; 2]; T], sums: &mut [L::V; T]) {
    add_scaled(l, l.half(head(block)), iq4(l, Bytes::load(block, 2)), (x, 0), sums);
}

#[inline(always)]
fn q2_k<L: Lanes, const T: usize>(l: L, block: &[u8; 84], x: [&[X; 16]; T], sums: &mut [L::V; T]) {
    let (d, dmin) = l.halves(&[block[80], block[81], block[82], block[83], 0, 0, 0, 0]);
    let packed = Bytes::load(block, 0);
    let scales = l.store(l.mul(l.unsigned(packed.low_nibbles()), d));
    let minima = l.store(l.mul(l.unsigned(packed.high_nibbles()), l.mul(dmin, l.splat(-1.0))));
    for half in 0..2 {
        for part in 0..2 {
            let groups = Bytes::load(block, 16 + 32 * half + 16 * part).pairs();
            for (g, codes) in groups.into_iter().enumerate() {
                let at = 8 * half + 2 * g + part;
                let w = l.fma(l.unsigned(codes), l.splat(scales[at]), l.splat(minima[at]));
                add_products(l, w, vector(x, at), sums);
            }
        }
    }
}

#[inline(always)]
fn q3_k<L: Lanes, const T: usize>(l: L, block: &[u8; 110], x: [&[X; 16]; T], sums: &mut [L::V; T]) {
    let d = l.half(&[block[108], block[109], 0, 0, 0, 0, 0, 0]);
    let scales = l.store(l.mul(l.signed(q3_k_scales(block)), d));
    for half in 0..2 {
        for part in 0..2 {
            let thirds = Bytes::load(block, 16 * part);
            let groups = Bytes::load(block, 32 + 32 * half + 16 * part).pairs();
            for (g, pairs) in groups.into_iter().enumerate() {
                let third = thirds.where_set(Bytes::splat(1 << (4 * half + g)), 4);
                let q = l.signed(pairs.or(third).minus(Bytes::splat(4)));
                let at = 8 * half + 2 * g + part;
                add_products(l, l.mul(q, l.splat(scales[at])), vector(x, at), sums);
            }
        }
    }
}

#[inline(always)]
fn q4_k<L: Lanes, const T: usize>(l: L, block: &[u8; 144], x: [&[X; 16]; T], sums: &mut [L::V; T]) {
    let scales = scales_and_minima(l, head(block));
    for pair in 0..4 {
        let (even, odd) = (2 * pair, 2 * pair + 1);
        let low = l.table(l.splat(scales[even]), l.splat(scales[8 + even]));
        let high = l.table(l.splat(scales[odd]), l.splat(scales[8 + odd]));
        for part in 0..2 {
            let (low, high) = l.nibbles(low, high, Bytes::load(block, 16 + 32 * pair + 16 * part));
            add_products(l, low, vector(x, 4 * pair + part), sums);
            add_products(l, high, vector(x, 4 * pair + 2 + part), sums);
        }
    }
}

#[inline(always)]
fn q5_k<L: Lanes, const T: usize>(l: L, block: &[u8; 176], x: [&[X; 16]; T], sums: &mut [L::V; T]) {
    let scales = scales_and_minima(l, head(block));
    let fives = [Bytes::load(block, 16), Bytes::load(block, 32)];
    for group in 0..8 {
        let (d, m) = (l.splat(scales[group]), l.splat(scales[8 + group]));
        let bit = Bytes::splat(1 << group);
        for (part, fives) in fives.into_iter().enumerate() {
            let packed = Bytes::load(block, 48 + group / 2 * 32 + 16 * part);
            let nibbles = if group % 2 == 0 { packed.low_nibbles() } else { packed.high_nibbles() };
            let q = l.unsigned(nibbles.or(fives.where_set(bit, 16)));
            add_products(l, l.fma(q, d, m), vector(x, 2 * group + part), sums);
        }
    }
}

#[inline(always)]
fn q6_k<L: Lanes, const T: usize>(l: L, block: &[u8; 210], x: [&[X; 16]; T], sums: &mut [L::V; T]) {
    let scales = l.store(l.mul(l.signed(Bytes::load(block, 192)), l.half(&[block[208], block[209], 0, 0, 0, 0, 0, 0])));
    for half in 0..2 {
        for part in 0..2 {
            let high = Bytes::load(block, 128 + 32 * half + 16 * part);
            let first = Bytes::load(block, 64 * half + 16 * part);
            let second = Bytes::load(block, 64 * half + 32 + 16 * part);
            // Group g's upper pair of bits is at bit 2g of `high`; it moves to bits 4 and 5.
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
                add_products(l, l.mul(q, l.splat(scales[at])), vector(x, at), sums);
            }
        }
    }
}

#[inline(always)]
fn iq4_xs<L: Lanes, const T: usize>(l: L, block: &[u8; 136], x: [&[X; 16]; T], sums: &mut [L::V; T]) {
    let head = head(block);
    let scales = l.store(l.mul(l.signed(iq4_xs_scales(head)), l.half(head)));
    for (group, &scale) in scales[..8].iter().enumerate() {
        let numbers = iq4(l, Bytes::load(block, 8 + 16 * group));
        add_scaled(l, l.splat(scale), numbers, (x, group), sums);
    }
}
