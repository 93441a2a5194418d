//! Decoding in plain Rust, one function for each block format. All numbers are little-endian.
//!
//! A function decodes one group of 32 columns. `sub` is the group's place in its block: 0 in blocks of 32, 0..8 in
//! blocks of 256.

// Passed by name, a function would be called through a shim that is compiled without the caller's instruction set.
#![allow(clippy::redundant_closure)]

use super::format::{Format, GROUP, by_block_format};

/// Decodes `out.len()` elements of `row`, the bytes of one row, from column `first` on: a multiple of 32 in block
/// formats.
#[inline(always)]
pub(super) fn decode(format: Format, row: &[u8], first: usize, out: &mut [f32]) {
    macro_rules! groups {
        ($group:ident, $bytes:literal, $groups:literal, $bits:literal, $minimum:literal) => {
            groups::<$bytes, $groups>(
                row,
                first,
                out,
                #[inline(always)]
                |block, sub, out| $group(block, sub, out),
            )
        };
    }
    macro_rules! plain {
        ($bytes:literal, $widen:ident) => {
            plain::<$bytes>(
                row,
                first,
                out,
                #[inline(always)]
                |bytes| $widen(bytes),
            )
        };
    }
    match format {
        Format::F32 => plain!(4, f32),
        Format::F16 => plain!(2, f16),
        Format::Bf16 => plain!(2, bf16),
        _ => {
            by_block_format!(format, groups);
            let (whole, rest) = out.as_chunks_mut::<GROUP>();
            if !rest.is_empty() {
                part_of_group(format, row, first + whole.len() * GROUP, rest);
            }
        }
    }
}

/// The first `out.len()` columns of a group, which are fewer than 32. It is not inlined, as it would double the code.
#[inline(never)]
fn part_of_group(format: Format, row: &[u8], first: usize, out: &mut [f32]) {
    let mut group = [0.0; GROUP];
    decode(format, row, first, &mut group);
    out.copy_from_slice(&group[..out.len()]);
}

/// Elements of `BYTES` bytes each.
#[inline(always)]
fn plain<const BYTES: usize>(row: &[u8], first: usize, out: &mut [f32], widen: impl Fn([u8; BYTES]) -> f32) {
    let (elements, _) = row[first * BYTES..].as_chunks::<BYTES>();
    for (out, &bytes) in out.iter_mut().zip(elements) {
        *out = widen(bytes);
    }
}

/// Whole groups of blocks of `BYTES` bytes, each of `SUBS` groups.
#[inline(always)]
fn groups<const BYTES: usize, const SUBS: usize>(
    row: &[u8],
    first: usize,
    out: &mut [f32],
    group: impl Fn(&[u8; BYTES], usize, &mut [f32; GROUP]),
) {
    let (blocks, _) = row.as_chunks::<BYTES>();
    for (at, out) in (first / GROUP..).zip(out.as_chunks_mut::<GROUP>().0) {
        group(&blocks[at / SUBS], at % SUBS, out);
    }
}

#[inline(always)]
fn f32(bytes: [u8; 4]) -> f32 {
    f32::from_le_bytes(bytes)
}

#[inline(always)]
fn f16(bytes: [u8; 2]) -> f32 {
    f16_to_f32(u16::from_le_bytes(bytes))
}

#[inline(always)]
fn bf16(bytes: [u8; 2]) -> f32 {
    f32::from_bits(u32::from(u16::from_le_bytes(bytes)) << 16)
}

/// An f16's bits as f32. Without branches, so that it vectorizes: a product with 2¹¹² moves the exponent, and
/// normalizes subnormals too.
#[inline(always)]
pub(crate) fn f16_to_f32(half: u16) -> f32 {
    let bits = u32::from(half);
    let magnitude = f32::from_bits((bits & 0x7fff) << 13) * f32::from_bits((127 + 112) << 23);
    // Infinity and NaN have the largest exponent in both types.
    let special = if bits & 0x7c00 == 0x7c00 { 0x7f80_0000 } else { 0 };
    f32::from_bits(magnitude.to_bits() | special | (bits & 0x8000) << 16)
}

/// The f16 at byte `at`.
#[inline(always)]
pub(super) fn half_at<const N: usize>(block: &[u8; N], at: usize) -> f32 {
    f16_to_f32(u16::from_le_bytes([block[at], block[at + 1]]))
}

#[inline(always)]
pub(super) fn bytes_at<const N: usize, const LEN: usize>(block: &[u8; N], at: usize) -> &[u8; LEN] {
    block[at..at + LEN].first_chunk().unwrap() // the range is LEN long
}

/// Column i is the low nibble of byte i, and column 16 + i its high nibble, for i in 0..16.
#[inline(always)]
pub(super) fn nibbles(packed: &[u8; 16]) -> [u8; GROUP] {
    let mut q = [0; GROUP];
    for i in 0..16 {
        q[i] = packed[i] & 15;
        q[16 + i] = packed[i] >> 4;
    }
    q
}

/// [`nibbles`], with bit i of `high` as the fifth bit of column i.
#[inline(always)]
pub(super) fn fives(high: &[u8; 4], packed: &[u8; 16]) -> [u8; GROUP] {
    let mut q = nibbles(packed);
    let high = u32::from_le_bytes(*high);
    for (i, q) in q.iter_mut().enumerate() {
        *q |= ((high >> i & 1) << 4) as u8;
    }
    q
}

/// The numbers that the codes of IQ4_NL and IQ4_XS stand for.
pub(crate) const IQ4: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// [`nibbles`], each as the number that it stands for.
#[inline(always)]
pub(super) fn iq4(packed: &[u8; 16]) -> [i8; GROUP] {
    nibbles(packed).map(
        #[inline(always)]
        |q| IQ4[usize::from(q & 15)],
    )
}

#[inline(always)]
fn q4_0(block: &[u8; 18], _sub: usize, out: &mut [f32; GROUP]) {
    let d = half_at(block, 0);
    let q = nibbles(bytes_at(block, 2));
    for i in 0..GROUP {
        out[i] = (i32::from(q[i]) - 8) as f32 * d;
    }
}

#[inline(always)]
fn q4_1(block: &[u8; 20], _sub: usize, out: &mut [f32; GROUP]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    let q = nibbles(bytes_at(block, 4));
    for i in 0..GROUP {
        out[i] = f32::from(q[i]) * d + m;
    }
}

#[inline(always)]
fn q5_0(block: &[u8; 22], _sub: usize, out: &mut [f32; GROUP]) {
    let d = half_at(block, 0);
    let q = fives(bytes_at(block, 2), bytes_at(block, 6));
    for i in 0..GROUP {
        out[i] = (i32::from(q[i]) - 16) as f32 * d;
    }
}

#[inline(always)]
fn q5_1(block: &[u8; 24], _sub: usize, out: &mut [f32; GROUP]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    let q = fives(bytes_at(block, 4), bytes_at(block, 8));
    for i in 0..GROUP {
        out[i] = f32::from(q[i]) * d + m;
    }
}

#[inline(always)]
fn q8_0(block: &[u8; 34], _sub: usize, out: &mut [f32; GROUP]) {
    let d = half_at(block, 0);
    let q: &[u8; GROUP] = bytes_at(block, 2);
    for i in 0..GROUP {
        out[i] = f32::from(q[i] as i8) * d;
    }
}

#[inline(always)]
fn iq4_nl(block: &[u8; 18], _sub: usize, out: &mut [f32; GROUP]) {
    let d = half_at(block, 0);
    let q = iq4(bytes_at(block, 2));
    for i in 0..GROUP {
        out[i] = f32::from(q[i]) * d;
    }
}

/// The lower two bits of a group's codes. Each half of 128 columns has 32 bytes, of which its group g takes bits 2g and
/// 2g + 1.
#[inline(always)]
fn twos(packed: &[u8; 64], sub: usize) -> [u8; GROUP] {
    let mut q: [u8; GROUP] = *bytes_at(packed, sub / 4 * 32);
    let shift = sub % 4 * 2;
    q.iter_mut().for_each(|q| *q = *q >> shift & 3);
    q
}

/// A group's codes, and the scales and minima of its halves, each as two nibbles.
#[inline(always)]
pub(super) fn q2_k_parts(block: &[u8; 84], sub: usize) -> ([u8; GROUP], &[u8; 2]) {
    (twos(bytes_at(block, 16), sub), bytes_at(block, sub * 2))
}

/// Layout: scales [16] (low nibbles) and minima (high nibbles) of half groups, pairs of bits [64], d, dmin.
#[inline(always)]
fn q2_k(block: &[u8; 84], sub: usize, out: &mut [f32; GROUP]) {
    let (q, scales) = q2_k_parts(block, sub);
    let (d, dmin) = (half_at(block, 80), half_at(block, 82));
    for (part, &scale) in scales.iter().enumerate() {
        let (d, m) = (d * f32::from(scale & 15), dmin * f32::from(scale >> 4));
        for i in part * 16..part * 16 + 16 {
            out[i] = d * f32::from(q[i]) - m;
        }
    }
}

/// A group's codes from 0 to 7, and the scales of its halves. Scale i of 16 has its low four bits in nibble i / 8 of byte
/// i % 8, and the upper two in bits 2 · (i / 4) and 2 · (i / 4) + 1 of byte 8 + i % 4.
#[inline(always)]
pub(super) fn q3_k_parts(block: &[u8; 110], sub: usize) -> ([u8; GROUP], [f32; 2]) {
    let (third, mut codes): (&[u8; GROUP], _) = (bytes_at(block, 0), twos(bytes_at(block, 32), sub));
    for i in 0..GROUP {
        codes[i] |= (third[i] >> sub & 1) << 2;
    }
    let (packed, d): (&[u8; 12], _) = (bytes_at(block, 96), half_at(block, 108));
    let scales = [sub * 2, sub * 2 + 1].map(
        #[inline(always)]
        |i| {
            let scale = packed[i % 8] >> (i / 8 * 4) & 15 | (packed[8 + i % 4] >> (i / 4 * 2) & 3) << 4;
            d * f32::from(scale as i8 - 32)
        },
    );
    (codes, scales)
}

/// Layout: third bits [32] (bit `sub` of byte i belongs to column i), pairs of bits [64] as in Q2_K, scales [12], d.
#[inline(always)]
fn q3_k(block: &[u8; 110], sub: usize, out: &mut [f32; GROUP]) {
    let (q, scales) = q3_k_parts(block, sub);
    for (part, d) in scales.into_iter().enumerate() {
        for i in part * 16..part * 16 + 16 {
            out[i] = d * f32::from(q[i] as i8 - 4);
        }
    }
}

/// The 6-bit scale and minimum of group `sub` from the 12 bytes of Q4_K and Q5_K. Groups 0..4 have theirs in the low
/// bits of bytes `sub` and `sub` + 4. Groups 4..8 have the low four bits in byte `sub` + 4, and the upper two in the
/// top bits of bytes `sub` − 4 and `sub`.
#[inline(always)]
pub(super) fn scale_and_min(packed: &[u8; 12], sub: usize) -> (f32, f32) {
    let (scale, min) = if sub < 4 {
        (packed[sub] & 63, packed[sub + 4] & 63)
    } else {
        (packed[sub + 4] & 15 | packed[sub - 4] >> 6 << 4, packed[sub + 4] >> 4 | packed[sub] >> 6 << 4)
    };
    (f32::from(scale), f32::from(min))
}

/// Layout: d, dmin, scales [12], nibbles [128]. Groups 2i and 2i + 1 are the low and high nibbles of bytes 32i .. 32i +
/// 32.
#[inline(always)]
fn q4_k(block: &[u8; 144], sub: usize, out: &mut [f32; GROUP]) {
    let (scale, min) = scale_and_min(bytes_at(block, 4), sub);
    let (d, m) = (half_at(block, 0) * scale, half_at(block, 2) * min);
    let q: &[u8; GROUP] = bytes_at(block, 16 + sub / 2 * 32);
    let shift = sub % 2 * 4;
    for i in 0..GROUP {
        out[i] = d * f32::from(q[i] >> shift & 15) - m;
    }
}

/// Layout: d, dmin, scales [12], fifth bits [32] (bit `sub` of byte i belongs to column i), nibbles [128] as in Q4_K.
#[inline(always)]
fn q5_k(block: &[u8; 176], sub: usize, out: &mut [f32; GROUP]) {
    let (scale, min) = scale_and_min(bytes_at(block, 4), sub);
    let (d, m) = (half_at(block, 0) * scale, half_at(block, 2) * min);
    let high: &[u8; GROUP] = bytes_at(block, 16);
    let q: &[u8; GROUP] = bytes_at(block, 48 + sub / 2 * 32);
    let shift = sub % 2 * 4;
    for i in 0..GROUP {
        out[i] = d * f32::from(q[i] >> shift & 15 | (high[i] >> sub & 1) << 4) - m;
    }
}

/// Layout: nibbles [128], upper pairs of bits [64], i8 scales [16], d. Each half of 128 columns has 64 bytes of nibbles
/// and 32 of upper bits. Its group g takes nibble g/2 of the bytes from 32·(g%2) on, bits 2g and 2g + 1 of the upper
/// bits, and scales 2g and 2g + 1.
#[inline(always)]
fn q6_k(block: &[u8; 210], sub: usize, out: &mut [f32; GROUP]) {
    let (half, g) = (sub / 4, sub % 4);
    let low: &[u8; GROUP] = bytes_at(block, half * 64 + g % 2 * 32);
    let high: &[u8; GROUP] = bytes_at(block, 128 + half * 32);
    let scales: &[u8; 2] = bytes_at(block, 192 + sub * 2);
    let d = half_at(block, 208);
    let (nibble, pair) = (g / 2 * 4, g * 2);
    for (part, &scale) in scales.iter().enumerate() {
        let d = d * f32::from(scale as i8);
        for i in part * 16..part * 16 + 16 {
            let q = low[i] >> nibble & 15 | (high[i] >> pair & 3) << 4;
            out[i] = d * f32::from(q as i8 - 32);
        }
    }
}

/// The scale of group `sub` of IQ4_XS: the low four bits are in its nibble, the upper two in bits 2 · `sub` and
/// 2 · `sub` + 1.
#[inline(always)]
pub(super) fn iq4_xs_scale(block: &[u8; 136], sub: usize) -> f32 {
    let upper = u16::from_le_bytes(*bytes_at(block, 2)) >> (sub * 2) & 3;
    let scale = block[4 + sub / 2] >> (sub % 2 * 4) & 15 | (upper as u8) << 4;
    half_at(block, 0) * f32::from(scale as i8 - 32)
}

/// Layout: d, upper pairs of bits of scales [2], low nibbles of scales [4], nibbles [128]: 16 bytes a group, as in IQ4_NL.
#[inline(always)]
fn iq4_xs(block: &[u8; 136], sub: usize, out: &mut [f32; GROUP]) {
    let d = iq4_xs_scale(block, sub);
    let q = iq4(bytes_at(block, 8 + sub * 16));
    for i in 0..GROUP {
        out[i] = f32::from(q[i]) * d;
    }
}
