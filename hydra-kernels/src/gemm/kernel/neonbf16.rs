//! 8 × 8 micro-kernel for NEON with FEAT_BF16: BFMMLA multiplies two rows of four bf16 by two columns of four and adds
//! the four dot products to f32.
//!
//! The instruction takes subnormals for zeros and rounds to odd, whatever FPCR says (unless FEAT_EBF16 is enabled).
//! Sixteen accumulators hold 2 × 2 sums each; four vectors hold A, and four B, of 32 registers. Panels have pairs of
//! neighbours along k; exchanging words between two rows of pairs makes the operand's fours.
//!
//! BFMMLA is in `asm!` because its intrinsic is unstable.

use super::micro::{CTile, MicroKernel, PanelPair, a_stride};
use super::neon::store;
use crate::isa::{Isa, NeonBf16};
use core::arch::aarch64::*;
use core::arch::asm;
use core::array::from_fn;
use half::bf16;

const MR: usize = 8;
const NR: usize = 8;
/// The values along k that BFMMLA multiplies.
const K_STEP: usize = 4;

/// bf16 panels of A and of B.
#[derive(Clone, Copy)]
pub(in crate::gemm) struct NeonBf16Kernel(pub NeonBf16);

impl MicroKernel for NeonBf16Kernel {
    type B = bf16;
    type A = bf16;
    const MR: usize = MR;
    const NR: usize = NR;
    const K_STEP: usize = K_STEP;

    #[inline(always)]
    fn isa(self) -> Isa {
        Isa::Neon(self.0.neon())
    }

    fn multiply(self, panels: &[PanelPair<'_, Self>], c: CTile<'_>) {
        const TILES: [Tile; MR / 2] = [tile::<1, 2>, tile::<2, 4>, tile::<3, 6>, tile::<4, 8>];
        c.check(panels);
        // SAFETY: the token `self.0` proves NEON and FEAT_BF16; `check` asserted the bounds of `c.rows` rows.
        unsafe { TILES[c.rows.div_ceil(2) - 1](panels, c) }
    }
}

/// A tile function for a fixed number of pairs of rows.
type Tile = unsafe fn(&[PanelPair<'_, NeonBf16Kernel>], CTile<'_>);

/// # Safety
/// The CPU has NEON and FEAT_BF16; [`CTile::check`] has passed, and `c.rows` is ROWS, twice PAIRS, or one less.
#[target_feature(enable = "neon,bf16")]
unsafe fn tile<const PAIRS: usize, const ROWS: usize>(panels: &[PanelPair<'_, NeonBf16Kernel>], c: CTile<'_>) {
    // sums[i][j]: rows 2i and 2i + 1 of columns 2j and 2j + 1.
    let mut sums = [[vdupq_n_f32(0.0); NR / 2]; PAIRS];
    for pair in panels {
        let (a, b) = (pair.a.as_ptr().cast::<u16>(), pair.b.as_ptr().cast::<u16>());
        for p in (0..pair.k).step_by(K_STEP) {
            // SAFETY: p + K_STEP ≤ k, which `check` found to be a multiple of K_STEP; it found k · NR elements at b and
            // `c.rows` rows of k elements, `a_stride` apart, at a.
            unsafe {
                let b = columns(b.add(p * NR));
                for (i, sums) in sums.iter_mut().enumerate() {
                    // In an odd number of rows, the last stands in for the one beyond it.
                    let rows = [2 * i, (2 * i + 1).min(c.rows - 1)];
                    let [upper, lower] = rows.map(|row| vld1_u16(a.add(row * a_stride::<bf16>() + p)));
                    let a = vcombine_u16(upper, lower);
                    for (sum, b) in sums.iter_mut().zip(b) {
                        *sum = bfmmla(*sum, a, b);
                    }
                }
            }
        }
    }
    // SAFETY: this function enables NEON.
    unsafe { store::<ROWS>(rows_of(sums), c) }
}

/// Four rows of a panel, as pairs of columns of four values.
///
/// # Safety
/// K_STEP · NR elements can be read at `b`.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn columns(b: *const u16) -> [uint16x8_t; NR / 2] {
    // Pairs of rows 0 and 1 in columns 0..4 and 4..8, then pairs of rows 2 and 3.
    // SAFETY: the four vectors of eight are this function's contract.
    let pairs: [_; 4] = from_fn(|i| unsafe { vreinterpretq_u32_u16(vld1q_u16(b.add(8 * i))) });
    [
        vzip1q_u32(pairs[0], pairs[2]),
        vzip2q_u32(pairs[0], pairs[2]),
        vzip1q_u32(pairs[1], pairs[3]),
        vzip2q_u32(pairs[1], pairs[3]),
    ]
    .map(|words| vreinterpretq_u16_u32(words))
}

/// The rows of a tile from its sums of 2 × 2.
#[inline]
#[target_feature(enable = "neon")]
fn rows_of<const PAIRS: usize, const ROWS: usize>(sums: [[float32x4_t; NR / 2]; PAIRS]) -> [[float32x4_t; 2]; ROWS] {
    let half = |row: usize, j: usize| {
        let sums = sums[row / 2][j];
        if row % 2 == 0 { vget_low_f32(sums) } else { vget_high_f32(sums) }
    };
    from_fn(|row| from_fn(|q| vcombine_f32(half(row, 2 * q), half(row, 2 * q + 1))))
}

/// `sums` [2, 2] + `a` [2, 4] · `b`ᵀ, with b [2, 4].
#[inline]
#[target_feature(enable = "neon,bf16")]
fn bfmmla(mut sums: float32x4_t, a: uint16x8_t, b: uint16x8_t) -> float32x4_t {
    // SAFETY: this function enables FEAT_BF16; BFMMLA changes only its result.
    unsafe {
        asm!(
            "bfmmla {0:v}.4s, {1:v}.8h, {2:v}.8h",
            inout(vreg) sums,
            in(vreg) a,
            in(vreg) b,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sums
}
