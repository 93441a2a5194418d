//! A tile in plain Rust.

use super::panel::{NR, PanelGroup};
use super::{Block, LANES, Sums, two_minima, two_scales};
use crate::quant::GROUP;
use crate::quant::codes::unpack_minima;
use crate::simd::reduce::sum;

/// See [`super::tile`].
pub(super) fn tile<const BITS: u32, const MINIMUM: bool>(
    sums: &mut Sums,
    panel: &[PanelGroup],
    x: &[Block],
    width: usize,
) {
    *sums = [[[0.0; NR]; super::TOKENS]; LANES];
    let offset = (1 << (BITS - 1)) as f32;
    for (g, group) in panel.iter().enumerate() {
        let (block, lane) = (g / LANES, g % LANES);
        for (x, sums) in x.chunks_exact(width).zip(&mut sums[lane]) {
            let x = &x[block];
            let q = &x.codes.as_chunks::<GROUP>().0[lane];
            let (d, s, first) = (x.scales[lane], x.sums[lane], x.first_halves[lane]);
            for (row, sum) in sums.iter_mut().enumerate() {
                let (scale, second) = (group.scales[row], group.seconds[row]);
                let [low, high] = products(group, row, q);
                if two_scales(BITS) {
                    // Integers below 2²⁴: exact.
                    *sum = fma(d, scale * (low as f32 - offset * first), *sum);
                    *sum = fma(d, second * (high as f32 - offset * (s - first)), *sum);
                } else if MINIMUM {
                    let (minimum, s) = if two_minima(BITS) {
                        let (dmin, m) = unpack_minima(second);
                        (dmin, m[0] * first + m[1] * (s - first))
                    } else {
                        (second, s)
                    };
                    *sum = fma(d, fma(scale, (low + high) as f32, minimum * s), *sum);
                } else {
                    *sum = fma(d, scale * ((low + high) as f32 - offset * s), *sum);
                }
            }
        }
    }
}

/// The sums over a row's lanes.
#[inline(always)]
pub(super) fn totals(sums: &Sums, token: usize) -> [f32; NR] {
    let mut totals = [0.0; NR];
    for (row, total) in totals.iter_mut().enumerate() {
        let mut lanes = [0.0; LANES];
        for (lane, sums) in lanes.iter_mut().zip(sums) {
            *lane = sums[token][row];
        }
        *total = sum(lanes);
    }
    totals
}

/// Σ code · q of both halves of a group, for one row.
fn products(group: &PanelGroup, row: usize, q: &[i8; GROUP]) -> [i32; 2] {
    let mut sums = [0; 2];
    for (i, (codes, q)) in group.codes.iter().zip(q.as_chunks::<4>().0).enumerate() {
        let codes = &codes.as_chunks::<4>().0[row];
        sums[i / 4] += codes.iter().zip(q).map(|(&code, &q)| i32::from(code) * i32::from(q)).sum::<i32>();
    }
    sums
}

/// a·b + c, rounded once, which `core` lacks. The product is exact in f64. The f64 sum is rounded to odd, so that
/// rounding it again to f32 is as if it were exact (Boldo and Melquiond, "Emulation of a FMA and correctly rounded
/// sums", 2008).
fn fma(a: f32, b: f32, c: f32) -> f32 {
    let (product, c) = (f64::from(a) * f64::from(b), f64::from(c));
    let sum = product + c;
    let part = sum - product;
    let error = (product - (sum - part)) + (c - part);
    let bits = sum.to_bits();
    if !sum.is_finite() || error == 0.0 || bits & 1 == 1 {
        return sum as f32;
    }
    // Away from zero if the exact sum is larger than `sum` in magnitude, towards it otherwise.
    let odd = if (error > 0.0) == (sum > 0.0) { bits + 1 } else { bits - 1 };
    f64::from_bits(odd) as f32
}

#[cfg(test)]
mod tests {
    use super::fma;
    use crate::random::SplitMix64;

    /// Against `mul_add`, which is exact, with exponents that make sums cancel and round in every place.
    #[test]
    fn a_fused_product_is_rounded_once() {
        extern crate std;
        let mut random = SplitMix64::new(1);
        let mut value = |exponents: u64| {
            let bits = random.next_u64();
            f32::from_bits(
                (bits as u32 & 0x807f_ffff) | ((127 - exponents / 2 + (bits >> 32) % exponents) as u32) << 23,
            )
        };
        for i in 0..if cfg!(miri) { 1000 } else { 500_000 } {
            let exponents = [1, 4, 30, 120][i % 4];
            let (a, b, c) = (value(exponents), value(exponents), value(exponents));
            let c = if i % 3 == 0 { -(a * b) } else { c };
            assert_eq!(fma(a, b, c).to_bits(), a.mul_add(b, c).to_bits(), "{a} {b} {c}");
        }
        assert!(fma(f32::NAN, 0.0, 1.0).is_nan() && fma(1.0, f32::INFINITY, f32::NEG_INFINITY).is_nan());
    }
}
