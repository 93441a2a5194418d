//! Blocks taken apart into integer codes and scales, in plain Rust: one function for each block format, one group of 32
//! columns a call. `sub` is the group's place in its block, as in [`super::scalar`].
//!
//! A weight is scale · (code − offset), or scale · code + minimum. The offset is half the codes' range.

use super::format::GROUP;
use super::scalar::{bytes_at, fives, half_at, iq4, iq4_xs_scale, nibbles, q2_k_parts, q3_k_parts, scale_and_min};

/// The codes of a group's columns, and `[scale, 0]`, `[scale, minimum]`, in Q3_K and Q6_K the scales of both halves, or in
/// Q2_K d and [`pack_minima`].
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

/// The minima of both halves of a group of Q2_K, −dmin · m for two m of four bits: −dmin, which was an f16, so that its
/// lowest 13 bits are zeros, with the m in bits 0 to 3 and 8 to 11.
#[inline(always)]
pub(crate) fn pack_minima(dmin: f32, m: [u8; 2]) -> f32 {
    f32::from_bits((-dmin).to_bits() | u32::from(u16::from_le_bytes(m)))
}

/// −dmin and the two m.
#[inline(always)]
pub(crate) fn unpack_minima(minima: f32) -> (f32, [f32; 2]) {
    let bits = minima.to_bits();
    (f32::from_bits(bits & !0x1fff), [(bits & 15) as f32, (bits >> 8 & 15) as f32])
}

/// A code is multiplied by its half's scale: the scale that remains is the block's.
#[inline(always)]
pub(crate) fn q2_k(block: &[u8; 84], sub: usize) -> Group {
    let (mut codes, scales) = q2_k_parts(block, sub);
    for i in 0..GROUP {
        codes[i] *= scales[i / 16] & 15;
    }
    (codes, [half_at(block, 80), pack_minima(half_at(block, 82), scales.map(|scale| scale >> 4))])
}

#[inline(always)]
pub(crate) fn q3_k(block: &[u8; 110], sub: usize) -> Group {
    q3_k_parts(block, sub)
}

/// Numbers of eight bits, with the sign bit turned as in Q8_0.
#[inline(always)]
fn iq4_codes(packed: &[u8; 16]) -> [u8; GROUP] {
    iq4(packed).map(
        #[inline(always)]
        |q| q as u8 ^ 0x80,
    )
}

#[inline(always)]
pub(crate) fn iq4_nl(block: &[u8; 18], _sub: usize) -> Group {
    (iq4_codes(bytes_at(block, 2)), [half_at(block, 0), 0.0])
}

#[inline(always)]
pub(crate) fn iq4_xs(block: &[u8; 136], sub: usize) -> Group {
    (iq4_codes(bytes_at(block, 8 + sub * 16)), [iq4_xs_scale(block, sub), 0.0])
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
