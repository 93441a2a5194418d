//! A few rows of x times rows of W as they are stored, with SDOT: eight groups at a time, whose sums are the eight
//! lanes.

// Passed by name, a function would be called through a shim that is compiled without the caller's instruction set.
#![allow(clippy::redundant_closure)]

use super::neon::{dot, unpack_minima};
use super::{Block, LANES, two_minima, two_scales};
use crate::isa::NeonDotProd;
use crate::quant::codes::pack_minima;
use crate::quant::scalar::{IQ4, f16_to_f32};
use crate::quant::simd::{half_at, head, iq4_xs_scales, q3_k_scales, scales_and_minima};
use crate::quant::{GROUP, Weight, by_block_format};
use crate::simd::bytes::Bytes;
use crate::simd::lanes::Lanes as _;
use crate::simd::reduce::sum;
use core::arch::aarch64::*;
use core::array::from_fn;

/// The codes of a group.
type Codes = [Bytes; 2];

/// The codes of eight groups, and their scales beside their minima, or the scales of their first and second halves. Q2_K's are
/// as in `quant::codes`.
type Groups = ([Codes; LANES], [[f32; LANES]; 2]);

/// Eight lanes.
type Lanes = [float32x4_t; 2];

/// `y[t][i]` = row `first + i` of W times the row `x[t]`. A row of W is taken apart once for all rows of x.
pub(super) fn products<const T: usize>(
    isa: NeonDotProd,
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
                        let sums = $way::<T, $bytes, $bits, $minimum>(
                            isa,
                            weight.stored(first + i),
                            x,
                            #[inline(always)]
                            |block| $take_apart(isa, block),
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
fn blocks<const T: usize, const BYTES: usize, const BITS: u32, const MINIMUM: bool>(
    isa: NeonDotProd,
    row: &[u8],
    x: [&[Block]; T],
    codes: impl Fn(&[u8; BYTES]) -> Codes,
) -> [f32; T] {
    let mut lanes = [zeros(); T];
    for (at, blocks) in row.as_chunks::<BYTES>().0.chunks(LANES).enumerate() {
        let mut groups: Groups = ([[Bytes::splat(0); 2]; LANES], [[0.0; LANES]; 2]);
        for (i, block) in blocks.iter().enumerate() {
            groups.0[i] = codes(block);
            groups.1[0][i] = f16_to_f32(u16::from_le_bytes([block[0], block[1]]));
            groups.1[1][i] = f16_to_f32(u16::from_le_bytes([block[2], block[3]]));
        }
        for t in 0..T {
            lanes[t] = add::<BITS, MINIMUM>(isa, &groups, &x[t][at], lanes[t]);
        }
    }
    lanes.map(total)
}

/// A row of blocks of 256 columns.
#[inline(always)]
fn super_blocks<const T: usize, const BYTES: usize, const BITS: u32, const MINIMUM: bool>(
    isa: NeonDotProd,
    row: &[u8],
    x: [&[Block]; T],
    groups: impl Fn(&[u8; BYTES]) -> Groups,
) -> [f32; T] {
    let mut lanes = [zeros(); T];
    for (at, block) in row.as_chunks::<BYTES>().0.iter().enumerate() {
        let groups = groups(block);
        for t in 0..T {
            lanes[t] = add::<BITS, MINIMUM>(isa, &groups, &x[t][at], lanes[t]);
        }
    }
    lanes.map(total)
}

#[inline(always)]
fn zeros() -> Lanes {
    // SAFETY: the target includes NEON.
    unsafe { [vdupq_n_f32(0.0); 2] }
}

/// The sum of the lanes.
#[inline(always)]
fn total(lanes: Lanes) -> f32 {
    let mut out = [0.0; LANES];
    // SAFETY: the target includes NEON; the array is the two vectors of 16 bytes that are written.
    unsafe {
        vst1q_f32(out.as_mut_ptr(), lanes[0]);
        vst1q_f32(out.as_mut_ptr().add(4), lanes[1]);
    }
    sum(out)
}

/// Adds the products of eight groups with x to the lanes.
#[inline(always)]
fn add<const BITS: u32, const MINIMUM: bool>(isa: NeonDotProd, groups: &Groups, x: &Block, lanes: Lanes) -> Lanes {
    let (codes, [scales, seconds]) = groups;
    let (q, _) = x.codes.as_chunks::<GROUP>();
    let halves: [[int32x4_t; 2]; LANES] = from_fn(
        #[inline(always)]
        |i| {
            // SAFETY: the target includes NEON; the array is the two vectors of 16 bytes that are loaded.
            unsafe {
                let q = [vld1q_s8(q[i].as_ptr()), vld1q_s8(q[i].as_ptr().add(16))];
                let codes = codes[i].map(
                    #[inline(always)]
                    |codes| vreinterpretq_s8_u8(codes.0),
                );
                let low = dot(isa, vdupq_n_s32(0), codes[0], q[0]);
                let high = dot(isa, if two_scales(BITS) { vdupq_n_s32(0) } else { low }, codes[1], q[1]);
                [low, high]
            }
        },
    );
    from_fn(
        #[inline(always)]
        |four| {
            // SAFETY: the target includes NEON; each array has the 16 bytes that are loaded from 4 · `four` on.
            unsafe {
                let at = 4 * four;
                let [d, s, first, scales, seconds] = [&x.scales, &x.sums, &x.first_halves, scales, seconds].map(
                    #[inline(always)]
                    |x| vld1q_f32(x.as_ptr().add(at)),
                );
                // The sums of four groups' vectors.
                let [low, high] = [0, 1].map(
                    #[inline(always)]
                    |half: usize| {
                        let [a, b, c, d] = [0, 1, 2, 3].map(
                            #[inline(always)]
                            |i| halves[at + i][half],
                        );
                        vcvtq_f32_s32(vpaddq_s32(vpaddq_s32(a, b), vpaddq_s32(c, d)))
                    },
                );
                let lanes = lanes[four];
                let offset = vdupq_n_f32((1 << (BITS - 1)) as f32);
                if two_scales(BITS) {
                    let low = vmulq_f32(scales, vfmsq_f32(low, offset, first));
                    let high = vmulq_f32(seconds, vfmsq_f32(high, offset, vsubq_f32(s, first)));
                    return vfmaq_f32(vfmaq_f32(lanes, d, low), d, high);
                }
                let v = if MINIMUM {
                    let [minima, s] = if two_minima(BITS) { unpack_minima(seconds, s, first) } else { [seconds, s] };
                    vfmaq_f32(vmulq_f32(minima, s), scales, high)
                } else if BITS == 8 {
                    vmulq_f32(scales, high)
                } else {
                    vmulq_f32(scales, vfmsq_f32(high, offset, s))
                };
                vfmaq_f32(lanes, d, v)
            }
        },
    )
}

/// The low nibbles of the bytes `at .. at + 16`, and the high ones.
#[inline(always)]
fn nibbles(block: &[u8], at: usize) -> Codes {
    let packed = Bytes::load(block, at);
    [packed.low_nibbles(), packed.high_nibbles()]
}

/// [`nibbles`] of the sixteen bytes from `at + 4` on, with bit i of the four before them as the fifth bit of column i.
#[inline(always)]
fn fives(block: &[u8], at: usize) -> Codes {
    let [low, high] = nibbles(block, at + 4);
    let fifths = [Bytes::fifth_bits([block[at], block[at + 1]]), Bytes::fifth_bits([block[at + 2], block[at + 3]])];
    [low.or(fifths[0]), high.or(fifths[1])]
}

#[inline(always)]
fn q4_0(_isa: NeonDotProd, block: &[u8; 18]) -> Codes {
    nibbles(block, 2)
}

#[inline(always)]
fn q4_1(_isa: NeonDotProd, block: &[u8; 20]) -> Codes {
    nibbles(block, 4)
}

#[inline(always)]
fn q5_0(_isa: NeonDotProd, block: &[u8; 22]) -> Codes {
    fives(block, 2)
}

#[inline(always)]
fn q5_1(_isa: NeonDotProd, block: &[u8; 24]) -> Codes {
    fives(block, 4)
}

#[inline(always)]
fn q8_0(_isa: NeonDotProd, block: &[u8; 34]) -> Codes {
    [Bytes::load(block, 2), Bytes::load(block, 18)]
}

/// [`nibbles`], each as the number of IQ4_NL that it stands for.
#[inline(always)]
fn iq4(isa: NeonDotProd, block: &[u8], at: usize) -> Codes {
    let numbers = Bytes::load(&bytemuck::cast::<_, [u8; 16]>(IQ4), 0);
    nibbles(block, at).map(
        #[inline(always)]
        |codes| isa.neon().lookup(numbers, codes),
    )
}

#[inline(always)]
fn iq4_nl(isa: NeonDotProd, block: &[u8; 18]) -> Codes {
    iq4(isa, block, 2)
}

#[inline(always)]
fn iq4_xs(isa: NeonDotProd, block: &[u8; 136]) -> Groups {
    let codes = from_fn(
        #[inline(always)]
        |group| iq4(isa, block, 8 + 16 * group),
    );
    let neon = isa.neon();
    let scales = neon.store(neon.mul(neon.signed(iq4_xs_scales(head(block))), neon.half(head(block))));
    (codes, [*scales.first_chunk().unwrap(), [0.0; LANES]]) // of sixteen
}

/// The lower two bits of the codes of Q2_K and Q3_K, from 64 bytes.
#[inline(always)]
fn twos(block: &[u8], first: usize) -> [Codes; LANES] {
    let pairs: [[[Bytes; 4]; 2]; 2] = from_fn(
        #[inline(always)]
        |half| [Bytes::load(block, first + 32 * half).pairs(), Bytes::load(block, first + 32 * half + 16).pairs()],
    );
    from_fn(
        #[inline(always)]
        |group| {
            let [low, high] = &pairs[group / 4];
            [low[group % 4], high[group % 4]]
        },
    )
}

#[inline(always)]
fn q2_k(isa: NeonDotProd, block: &[u8; 84]) -> Groups {
    let (mut codes, d, dmin) = (twos(block, 16), half_at(block, 80), half_at(block, 82));
    let mut minima = [0.0; LANES];
    for group in 0..LANES {
        let halves = [block[2 * group], block[2 * group + 1]];
        for (codes, half) in codes[group].iter_mut().zip(halves) {
            // 0, 1, 2 and 3 times the scale.
            let products = u64::from(half & 15) * 0x0302_0100;
            *codes = isa.neon().lookup(Bytes::words(products, 0), *codes);
        }
        minima[group] = pack_minima(dmin, halves.map(|half| half >> 4));
    }
    (codes, [[d; LANES], minima])
}

#[inline(always)]
fn q3_k(isa: NeonDotProd, block: &[u8; 110]) -> Groups {
    let (thirds, mut codes) = ([Bytes::load(block, 0), Bytes::load(block, 16)], twos(block, 32));
    for (group, codes) in codes.iter_mut().enumerate() {
        let bit = Bytes::splat(1 << group);
        for (codes, thirds) in codes.iter_mut().zip(thirds) {
            *codes = codes.or(thirds.where_set(bit, 4));
        }
    }
    let neon = isa.neon();
    let scales = neon.store(neon.mul(neon.signed(q3_k_scales(block)), neon.splat(half_at(block, 108))));
    let mut halves = [[0.0; LANES]; 2];
    for (group, &[first, second]) in scales.as_chunks().0.iter().enumerate() {
        (halves[0][group], halves[1][group]) = (first, second);
    }
    (codes, halves)
}

/// The codes of Q4_K and Q5_K without a fifth bit; the nibbles begin at `first`.
#[inline(always)]
fn pairs(block: &[u8], first: usize) -> [Codes; LANES] {
    from_fn(
        #[inline(always)]
        |group| {
            let at = first + group / 2 * 32;
            let packed = [Bytes::load(block, at), Bytes::load(block, at + 16)];
            if group % 2 == 0 { packed.map(Bytes::low_nibbles) } else { packed.map(Bytes::high_nibbles) }
        },
    )
}

/// The scales and the minima of Q4_K and Q5_K.
#[inline(always)]
fn scales(isa: NeonDotProd, block: &[u8; 16]) -> [[f32; LANES]; 2] {
    let values = scales_and_minima(isa.neon(), block);
    let (scales, _) = values.as_chunks::<LANES>();
    [scales[0], scales[1]]
}

#[inline(always)]
fn q4_k(isa: NeonDotProd, block: &[u8; 144]) -> Groups {
    (pairs(block, 16), scales(isa, head(block)))
}

#[inline(always)]
fn q5_k(isa: NeonDotProd, block: &[u8; 176]) -> Groups {
    let fifths = [Bytes::load(block, 16), Bytes::load(block, 32)];
    let mut codes = pairs(block, 48);
    for (group, codes) in codes.iter_mut().enumerate() {
        let bit = Bytes::splat(1 << group);
        for (codes, fifths) in codes.iter_mut().zip(fifths) {
            *codes = codes.or(fifths.where_set(bit, 16));
        }
    }
    (codes, scales(isa, head(block)))
}

#[inline(always)]
fn q6_k(_isa: NeonDotProd, block: &[u8; 210]) -> Groups {
    let codes = from_fn(
        #[inline(always)]
        |group| {
            let (half, g) = (group / 4, group % 4);
            from_fn(
                #[inline(always)]
                |part| {
                    let low = Bytes::load(block, 64 * half + g % 2 * 32 + 16 * part);
                    let high = Bytes::load(block, 128 + 32 * half + 16 * part);
                    // The group's pair of bits, from bit 2g to bits 4 and 5.
                    let pair = match g {
                        0 => high.left::<4>(),
                        1 => high.left::<2>(),
                        2 => high,
                        _ => high.right::<2>(),
                    };
                    let low = if g / 2 == 0 { low.low_nibbles() } else { low.high_nibbles() };
                    low.or(pair.and(Bytes::splat(0x30)))
                },
            )
        },
    );
    let (d, mut scales) = (half_at(block, 208), [[0.0; LANES]; 2]);
    for group in 0..LANES {
        for (half, scales) in scales.iter_mut().enumerate() {
            scales[group] = d * f32::from(block[192 + 2 * group + half] as i8);
        }
    }
    (codes, scales)
}
