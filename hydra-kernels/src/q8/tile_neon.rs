//! A tile on NEON with SDOT: the lanes of four rows of W in a register.

use super::neon::{dot_lane, unpack_minima};
use super::panel::{NR, PanelGroup};
use super::{Block, LANES, Sums, TOKENS, two_minima, two_scales};
use crate::isa::NeonDotProd;
use crate::quant::GROUP;
use core::arch::aarch64::*;
use core::array::from_fn;

/// Rows of W in a register.
const ROWS: usize = 4;

/// See [`super::tile`].
#[inline(always)]
pub(super) fn tile<const BITS: u32, const MINIMUM: bool>(
    isa: NeonDotProd,
    sums: &mut Sums,
    panel: &[PanelGroup],
    x: &[Block],
    width: usize,
) {
    *sums = [[[0.0; NR]; TOKENS]; LANES];
    for (g, group) in panel.iter().enumerate() {
        for part in 0..NR / ROWS {
            let weights = Weights::load::<BITS>(group, part);
            let sums = sums[g % LANES].iter_mut().map(|sums| &mut sums.as_chunks_mut::<ROWS>().0[part]);
            for (x, sums) in x.chunks_exact(width).zip(sums) {
                weights.add::<BITS, MINIMUM>(isa, sums, &x[g / LANES], g % LANES);
            }
        }
    }
}

/// One group of four rows.
struct Weights {
    codes: [int8x16_t; GROUP / 4],
    scales: float32x4_t,
    seconds: float32x4_t,
}

impl Weights {
    #[inline(always)]
    fn load<const BITS: u32>(group: &PanelGroup, part: usize) -> Self {
        let codes = from_fn(
            #[inline(always)]
            |i| {
                let codes = &group.codes[i].as_chunks::<{ 4 * ROWS }>().0[part];
                // SAFETY: the target includes NEON; the array is the 16 bytes that are loaded.
                unsafe {
                    let codes = vld1q_u8(codes.as_ptr());
                    // Codes of eight bits are signed bytes with their sign bit turned; SDOT takes those.
                    vreinterpretq_s8_u8(if BITS == 8 { veorq_u8(codes, vdupq_n_u8(0x80)) } else { codes })
                }
            },
        );
        let [scales, seconds] = [&group.scales, &group.seconds].map(
            #[inline(always)]
            // SAFETY: the target includes NEON; the array is the 16 bytes that are loaded.
            |x| unsafe { vld1q_f32(x.as_chunks::<ROWS>().0[part].as_ptr()) },
        );
        Self { codes, scales, seconds }
    }

    /// `sum` + the products with a half of group `g` of `x`.
    #[inline(always)]
    fn half(&self, isa: NeonDotProd, sum: int32x4_t, half: usize, x: &Block, g: usize) -> int32x4_t {
        let (codes, q) = (&self.codes[4 * half..4 * half + 4], &x.codes.as_chunks::<16>().0[2 * g + half]);
        // SAFETY: the target includes NEON; the array is the 16 bytes that are loaded.
        let q = unsafe { vld1q_s8(q.as_ptr()) };
        let sum = dot_lane::<1>(isa, dot_lane::<0>(isa, sum, codes[0], q), codes[1], q);
        dot_lane::<3>(isa, dot_lane::<2>(isa, sum, codes[2], q), codes[3], q)
    }

    /// Adds the products with group `g` of `x` to the rows' lanes.
    #[inline(always)]
    fn add<const BITS: u32, const MINIMUM: bool>(&self, isa: NeonDotProd, sums: &mut [f32; ROWS], x: &Block, g: usize) {
        // SAFETY: the target includes NEON; `sums` is the 16 bytes that are loaded and written.
        unsafe {
            let (none, d, s) = (vdupq_n_s32(0), vdupq_n_f32(x.scales[g]), vdupq_n_f32(x.sums[g]));
            let (mut sum, offset) = (vld1q_f32(sums.as_ptr()), vdupq_n_f32((1 << (BITS - 1)) as f32));
            let first = vdupq_n_f32(x.first_halves[g]);
            if two_scales(BITS) {
                for (i, scales, s) in [(0, self.scales, first), (1, self.seconds, vsubq_f32(s, first))] {
                    let v = vmulq_f32(scales, vfmsq_f32(vcvtq_f32_s32(self.half(isa, none, i, x, g)), offset, s));
                    sum = vfmaq_f32(sum, d, v);
                }
            } else {
                let products = vcvtq_f32_s32(self.half(isa, self.half(isa, none, 0, x, g), 1, x, g));
                let v = if MINIMUM {
                    let [minima, s] =
                        if two_minima(BITS) { unpack_minima(self.seconds, s, first) } else { [self.seconds, s] };
                    vfmaq_f32(vmulq_f32(minima, s), self.scales, products)
                } else if BITS == 8 {
                    vmulq_f32(self.scales, products)
                } else {
                    vmulq_f32(self.scales, vfmsq_f32(products, offset, s))
                };
                sum = vfmaq_f32(sum, d, v);
            }
            vst1q_f32(sums.as_mut_ptr(), sum);
        }
    }
}
