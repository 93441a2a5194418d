//! 8 × 8 micro-kernels for NEON: 16 accumulators, eight vectors of A and two of B, of 32 registers.
//!
//! FMLA multiplies by one element of a vector, so four values along k of each row of A are loaded at a time.
//!
//! bf16 panels are widened in registers: each 32-bit lane holds two neighbours along k, and shifting or masking it
//! gives either of them as f32.

use super::micro::{CTile, MicroKernel, PanelPair, a_stride};
use crate::gemm::view::Accumulate;
use crate::isa::{Isa, Neon};
use core::arch::aarch64::*;
use core::array::from_fn;
use half::bf16;

const MR: usize = 8;
const NR: usize = 8;
/// The values of a row of A that are loaded together.
const K_STEP: usize = 4;

/// f32 panels.
#[derive(Clone, Copy)]
pub(in crate::gemm) struct NeonF32(pub Neon);

impl MicroKernel for NeonF32 {
    type B = f32;
    type A = f32;
    const MR: usize = MR;
    const NR: usize = NR;
    const K_STEP: usize = K_STEP;

    #[inline(always)]
    fn isa(self) -> Isa {
        Isa::Neon(self.0)
    }

    fn multiply(self, panels: &[PanelPair<'_, Self>], c: CTile<'_>) {
        multiply_tile(panels, c);
    }
}

/// bf16 panels, widened in registers; A is widened as it is packed.
#[derive(Clone, Copy)]
pub(in crate::gemm) struct NeonWidenedBf16(pub Neon);

impl MicroKernel for NeonWidenedBf16 {
    type B = bf16;
    type A = f32;
    const MR: usize = MR;
    const NR: usize = NR;
    const K_STEP: usize = K_STEP;

    #[inline(always)]
    fn isa(self) -> Isa {
        Isa::Neon(self.0)
    }

    fn multiply(self, panels: &[PanelPair<'_, Self>], c: CTile<'_>) {
        multiply_tile(panels, c);
    }
}

/// Elements of B's panels, as vectors of f32.
trait Columns: Sized {
    /// Columns 0..4 and 4..8 of each of [`K_STEP`] rows of a panel.
    ///
    /// # Safety
    /// The CPU has NEON; K_STEP · NR elements can be read at `b`.
    unsafe fn load(b: *const Self) -> [[float32x4_t; 2]; K_STEP];
}

impl Columns for f32 {
    #[inline(always)]
    unsafe fn load(b: *const f32) -> [[float32x4_t; 2]; K_STEP] {
        // SAFETY: p · NR + 8 ≤ K_STEP · NR, which this function's contract covers.
        from_fn(|p| unsafe { [vld1q_f32(b.add(p * NR)), vld1q_f32(b.add(p * NR + 4))] })
    }
}

impl Columns for bf16 {
    #[inline(always)]
    unsafe fn load(b: *const bf16) -> [[float32x4_t; 2]; K_STEP] {
        // SAFETY: two rows of eight pairs, K_STEP · NR elements, are this function's contract; a load needs no
        // alignment beyond the elements'.
        unsafe {
            let pairs: [_; 4] = from_fn(|i| vreinterpretq_u32_u16(vld1q_u16(b.add(8 * i).cast())));
            let even = pairs.map(|pair| vreinterpretq_f32_u32(vshlq_n_u32::<16>(pair)));
            let odd = pairs.map(|pair| vreinterpretq_f32_u32(vandq_u32(pair, vdupq_n_u32(0xffff_0000))));
            [[even[0], even[1]], [odd[0], odd[1]], [even[2], even[3]], [odd[2], odd[3]]]
        }
    }
}

/// A tile function for a fixed number of rows.
type Tile<K> = unsafe fn(&[PanelPair<'_, K>], CTile<'_>);

/// [`MicroKernel::multiply`] of this file's kernels.
fn multiply_tile<K: MicroKernel<A = f32, B: Columns>>(panels: &[PanelPair<'_, K>], c: CTile<'_>) {
    const { assert!(K::MR == MR && K::NR == NR && K::K_STEP == K_STEP) };
    let tiles: [Tile<K>; MR] = [
        tile::<K, 1>,
        tile::<K, 2>,
        tile::<K, 3>,
        tile::<K, 4>,
        tile::<K, 5>,
        tile::<K, 6>,
        tile::<K, 7>,
        tile::<K, 8>,
    ];
    c.check(panels);
    // SAFETY: a kernel of this file holds the token that proves NEON; `check` asserted the bounds of `c.rows` rows.
    unsafe { tiles[c.rows - 1](panels, c) }
}

/// # Safety
/// The CPU has NEON; [`CTile::check`] has passed, and R = `c.rows`.
unsafe fn tile<K: MicroKernel<A = f32, B: Columns>, const R: usize>(panels: &[PanelPair<'_, K>], c: CTile<'_>) {
    // SAFETY: NEON is this function's contract.
    let mut sums = unsafe { [[vdupq_n_f32(0.0); 2]; R] };
    for pair in panels {
        let (a, b) = (pair.a.as_ptr(), pair.b.as_ptr());
        for p in (0..pair.k).step_by(K_STEP) {
            // SAFETY: p + K_STEP ≤ k, which `check` found to be a multiple of K_STEP; it found k · NR elements at b and
            // R rows of k elements, `a_stride` apart, at a.
            unsafe {
                let a: [_; R] = from_fn(|i| vld1q_f32(a.add(i * a_stride::<f32>() + p)));
                let b = K::B::load(b.add(p * NR));
                add_products::<0, R>(&mut sums, &a, b[0]);
                add_products::<1, R>(&mut sums, &a, b[1]);
                add_products::<2, R>(&mut sums, &a, b[2]);
                add_products::<3, R>(&mut sums, &a, b[3]);
            }
        }
    }
    // SAFETY: NEON is this function's contract.
    unsafe { store(sums, c) }
}

/// Adds the products of element `P` of each row of A with a row of B.
///
/// # Safety
/// The CPU has NEON.
#[inline(always)]
unsafe fn add_products<const P: i32, const R: usize>(
    sums: &mut [[float32x4_t; 2]; R],
    a: &[float32x4_t; R],
    b: [float32x4_t; 2],
) {
    for (sums, a) in sums.iter_mut().zip(a) {
        for (sum, b) in sums.iter_mut().zip(b) {
            // SAFETY: NEON is this function's contract.
            *sum = unsafe { vfmaq_laneq_f32::<P>(*sum, b, *a) };
        }
    }
}

/// Stores a tile by way of a row on the stack, so that a tile at C's edge needs no masks.
///
/// # Safety
/// The CPU has NEON.
#[inline(always)]
pub(super) unsafe fn store<const R: usize>(sums: [[float32x4_t; 2]; R], c: CTile<'_>) {
    for (i, sums) in sums.into_iter().enumerate().take(c.rows) {
        let mut row = [0.0f32; NR];
        // SAFETY: NEON is this function's contract; `row` is the two vectors of four that are written.
        unsafe {
            vst1q_f32(row.as_mut_ptr(), sums[0]);
            vst1q_f32(row.as_mut_ptr().add(4), sums[1]);
        }
        let out = &mut c.data[i * c.stride..][..c.cols];
        for (out, sum) in out.iter_mut().zip(row) {
            match c.accumulate {
                Accumulate::Overwrite => *out = sum,
                Accumulate::Add => *out += sum,
            }
        }
    }
}
