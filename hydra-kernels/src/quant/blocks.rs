//! The block formats, one function each: 32 columns of a block from its bytes. All numbers are little-endian.
//!
//! `sub` is the group's place in its block: 0 in blocks of 32, 0..8 in super-blocks of 256.

// A function that is passed by name is called through a shim, which is compiled without the instruction set of its caller.
#![allow(clippy::redundant_closure)]

use super::{Format, GROUP};

/// Decodes `out.len()` elements of `row` (the bytes of one row) from column `first`, a multiple of 32 in block formats.
#[inline(always)]
pub(super) fn decode(format: Format, row: &[u8], first: usize, out: &mut [f32]) {
    match format {
        Format::F32 => plain::<4>(
            row,
            first,
            out,
            #[inline(always)]
            |b| f32::from_le_bytes(b),
        ),
        Format::F16 => plain::<2>(
            row,
            first,
            out,
            #[inline(always)]
            |b| f16_to_f32(u16::from_le_bytes(b)),
        ),
        Format::Bf16 => plain::<2>(
            row,
            first,
            out,
            #[inline(always)]
            |b| f32::from_bits(u32::from(u16::from_le_bytes(b)) << 16),
        ),
        Format::Q4_0 => groups::<18, 1>(
            row,
            first,
            out,
            #[inline(always)]
            |block, sub, out| q4_0(block, sub, out),
        ),
        Format::Q4_1 => groups::<20, 1>(
            row,
            first,
            out,
            #[inline(always)]
            |block, sub, out| q4_1(block, sub, out),
        ),
        Format::Q5_0 => groups::<22, 1>(
            row,
            first,
            out,
            #[inline(always)]
            |block, sub, out| q5_0(block, sub, out),
        ),
        Format::Q5_1 => groups::<24, 1>(
            row,
            first,
            out,
            #[inline(always)]
            |block, sub, out| q5_1(block, sub, out),
        ),
        Format::Q8_0 => groups::<34, 1>(
            row,
            first,
            out,
            #[inline(always)]
            |block, sub, out| q8_0(block, sub, out),
        ),
        Format::Q4K => groups::<144, 8>(
            row,
            first,
            out,
            #[inline(always)]
            |block, sub, out| q4_k(block, sub, out),
        ),
        Format::Q5K => groups::<176, 8>(
            row,
            first,
            out,
            #[inline(always)]
            |block, sub, out| q5_k(block, sub, out),
        ),
        Format::Q6K => groups::<210, 8>(
            row,
            first,
            out,
            #[inline(always)]
            |block, sub, out| q6_k(block, sub, out),
        ),
    }
}

#[inline(always)]
fn plain<const BYTES: usize>(row: &[u8], first: usize, out: &mut [f32], widen: impl Fn([u8; BYTES]) -> f32) {
    let (elements, _) = row[first * BYTES..].as_chunks::<BYTES>();
    for (out, &bytes) in out.iter_mut().zip(elements) {
        *out = widen(bytes);
    }
}

/// Blocks of `BYTES` bytes and `SUBS` groups.
#[inline(always)]
fn groups<const BYTES: usize, const SUBS: usize>(
    row: &[u8],
    first: usize,
    out: &mut [f32],
    group: impl Fn(&[u8; BYTES], usize, &mut [f32; GROUP]),
) {
    let (blocks, _) = row.as_chunks::<BYTES>();
    let mut at = first / GROUP;
    let (whole, rest) = out.as_chunks_mut::<GROUP>();
    for out in whole {
        group(&blocks[at / SUBS], at % SUBS, out);
        at += 1;
    }
    if !rest.is_empty() {
        let mut last = [0.0; GROUP];
        group(&blocks[at / SUBS], at % SUBS, &mut last);
        rest.copy_from_slice(&last[..rest.len()]);
    }
}

/// Branch-free, so that it vectorises: the exponent is moved by multiplying with 2¹¹², which also normalises subnormals.
#[inline(always)]
pub(crate) fn f16_to_f32(half: u16) -> f32 {
    let bits = u32::from(half);
    let magnitude = f32::from_bits((bits & 0x7fff) << 13) * f32::from_bits((127 + 112) << 23);
    // Infinity and NaN have the largest exponent, in f32 too.
    let special = if bits & 0x7c00 == 0x7c00 { 0x7f80_0000 } else { 0 };
    f32::from_bits(magnitude.to_bits() | special | (bits & 0x8000) << 16)
}

/// The f16 at byte `at`.
#[inline(always)]
fn half_at<const N: usize>(block: &[u8; N], at: usize) -> f32 {
    f16_to_f32(u16::from_le_bytes([block[at], block[at + 1]]))
}

#[inline(always)]
fn bytes_at<const N: usize, const LEN: usize>(block: &[u8; N], at: usize) -> &[u8; LEN] {
    block[at..at + LEN].first_chunk().unwrap() // the range has just that length
}

/// Column i of 0..16 is the low nibble of byte i, column 16 + i the high one.
#[inline(always)]
fn nibbles(packed: &[u8; 16]) -> [u8; GROUP] {
    let mut q = [0; GROUP];
    for i in 0..16 {
        q[i] = packed[i] & 15;
        q[16 + i] = packed[i] >> 4;
    }
    q
}

/// Nibbles, and bit i of `high` as the fifth bit of column i.
#[inline(always)]
fn fives(high: &[u8; 4], packed: &[u8; 16]) -> [u8; GROUP] {
    let mut q = nibbles(packed);
    let high = u32::from_le_bytes(*high);
    for (i, q) in q.iter_mut().enumerate() {
        *q |= ((high >> i & 1) << 4) as u8;
    }
    q
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

/// The 6-bit scale and minimum of group `sub` in Q4_K's and Q5_K's 12 bytes: groups 0..4 have theirs whole in bytes
/// sub and sub + 4; groups 4..8 have the low four bits in byte sub + 4, the upper two in the top of those of sub − 4.
#[inline(always)]
fn scale_and_min(packed: &[u8; 12], sub: usize) -> (f32, f32) {
    let (scale, min) = if sub < 4 {
        (packed[sub] & 63, packed[sub + 4] & 63)
    } else {
        (packed[sub + 4] & 15 | packed[sub - 4] >> 6 << 4, packed[sub + 4] >> 4 | packed[sub] >> 6 << 4)
    };
    (f32::from(scale), f32::from(min))
}

/// d, dmin, scales [12], nibbles [128]: groups 2i and 2i + 1 are the low and high nibbles of bytes 32i .. 32i + 32.
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

/// d, dmin, scales [12], fifth bits [32] (bit `sub` of byte i is column i's), nibbles [128] as in Q4_K.
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

/// Low nibbles [128], upper pairs of bits [64], i8 scales [16], d. Each half of 128 columns has 64 and 32 of those bytes;
/// its group g takes nibble g/2 of bytes 32·(g%2).., bits 2g.. of the upper ones, and scales 2g and 2g + 1.
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
