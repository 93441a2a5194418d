//! Blocks taken apart into integer codes and scales, in plain Rust: one function for each block format, one group of 32
//! columns a call. `sub` is the group's place in its block, as in [`super::scalar`].
//!
//! A weight is scale · (code − offset), or scale · code + minimum. The offset is half the codes' range.

use super::format::GROUP;
use super::scalar::{bytes_at, fives, half_at, nibbles, scale_and_min};

/// The codes of a group's columns, and `[scale, 0]`, `[scale, minimum]`, or in Q6_K the scales of both halves.
pub(crate) type Group = ([u8; GROUP], [f32; 2]);

#[inline(always)]
pub(crate) fn q4_0(block: &[u8; 18], _sub: usize) -> Group {
    (nibbles(bytes_at(block, 2)), [half_at(block, 0), 0.0])
}

#[inline(always)]
pub(crate) fn q4_1(block: &[u8; 20], _sub: usize) -> Group {
    (nibbles(bytes_at(block, 4)), [half_at(block, 0), half_at(block, 2)])
}

#[inline(always)]
pub(crate) fn q5_0(block: &[u8; 22], _sub: usize) -> Group {
    (fives(bytes_at(block, 2), bytes_at(block, 6)), [half_at(block, 0), 0.0])
}

#[inline(always)]
pub(crate) fn q5_1(block: &[u8; 24], _sub: usize) -> Group {
    (fives(bytes_at(block, 4), bytes_at(block, 8)), [half_at(block, 0), half_at(block, 2)])
}

/// Stored as signed bytes: with the sign bit turned they are codes from 0 to 255.
#[inline(always)]
pub(crate) fn q8_0(block: &[u8; 34], _sub: usize) -> Group {
    let q: &[u8; GROUP] = bytes_at(block, 2);
    let mut codes = *q;
    codes.iter_mut().for_each(|code| *code ^= 0x80);
    (codes, [half_at(block, 0), 0.0])
}

#[inline(always)]
pub(crate) fn q4_k(block: &[u8; 144], sub: usize) -> Group {
    let (scale, min) = scale_and_min(bytes_at(block, 4), sub);
    let q: &[u8; GROUP] = bytes_at(block, 16 + sub / 2 * 32);
    let (mut codes, shift) = (*q, sub % 2 * 4);
    codes.iter_mut().for_each(|code| *code = *code >> shift & 15);
    (codes, [half_at(block, 0) * scale, -half_at(block, 2) * min])
}

#[inline(always)]
pub(crate) fn q5_k(block: &[u8; 176], sub: usize) -> Group {
    let (scale, min) = scale_and_min(bytes_at(block, 4), sub);
    let (high, q): (&[u8; GROUP], &[u8; GROUP]) = (bytes_at(block, 16), bytes_at(block, 48 + sub / 2 * 32));
    let (mut codes, shift) = ([0; GROUP], sub % 2 * 4);
    for i in 0..GROUP {
        codes[i] = q[i] >> shift & 15 | (high[i] >> sub & 1) << 4;
    }
    (codes, [half_at(block, 0) * scale, -half_at(block, 2) * min])
}

#[inline(always)]
pub(crate) fn q6_k(block: &[u8; 210], sub: usize) -> Group {
    let (half, g) = (sub / 4, sub % 4);
    let low: &[u8; GROUP] = bytes_at(block, half * 64 + g % 2 * 32);
    let high: &[u8; GROUP] = bytes_at(block, 128 + half * 32);
    let scales: &[u8; 2] = bytes_at(block, 192 + sub * 2);
    let (d, nibble, pair) = (half_at(block, 208), g / 2 * 4, g * 2);
    let mut codes = [0; GROUP];
    for i in 0..GROUP {
        codes[i] = low[i] >> nibble & 15 | (high[i] >> pair & 3) << 4;
    }
    (codes, scales.map(|scale| d * f32::from(scale as i8)))
}
