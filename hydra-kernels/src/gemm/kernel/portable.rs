//! 4 × 8 micro-kernels in plain Rust, for any architecture.

use super::micro::{CTile, MicroKernel, PanelPair, a_stride, one_by_one};
use crate::gemm::bf16::widen;
use crate::gemm::view::Accumulate;
use crate::isa::Isa;
use half::bf16;

/// 4 × 8: eight accumulators of four f32, of the sixteen registers of SSE2 or the 32 of NEON.
const MR: usize = 4;
const NR: usize = 8;

/// f32 panels.
#[derive(Clone, Copy)]
pub(in crate::gemm) struct PortableF32;

impl MicroKernel for PortableF32 {
    type B = f32;
    type A = f32;
    const MR: usize = MR;
    const NR: usize = NR;
    const K_STEP: usize = 1;

    #[inline(always)]
    fn isa(self) -> Isa {
        Isa::Portable
    }

    fn multiply(self, panels: &[PanelPair<'_, Self>], c: CTile<'_>) {
        c.check(panels);
        one_by_one(panels, c, |&PanelPair { k, a, b }, c| {
            let (b, _) = b.as_chunks::<NR>();
            tile(k, a, |p| b[p], c);
        });
    }
}

/// bf16 panels: A is widened as it is packed, B as it is used.
#[derive(Clone, Copy)]
pub(in crate::gemm) struct PortableBf16;

impl MicroKernel for PortableBf16 {
    type B = bf16;
    type A = f32;
    const MR: usize = MR;
    const NR: usize = NR;
    const K_STEP: usize = 2;

    #[inline(always)]
    fn isa(self) -> Isa {
        Isa::Portable
    }

    fn multiply(self, panels: &[PanelPair<'_, Self>], c: CTile<'_>) {
        c.check(panels);
        one_by_one(panels, c, |&PanelPair { k, a, b }, c| {
            let (pairs, _) = b.as_chunks::<{ 2 * NR }>();
            tile(k, a, |p| core::array::from_fn(|j| widen(pairs[p / 2][2 * j + p % 2])), c);
        });
    }
}

/// One tile; `b(p)` is row p of the panel.
#[inline(always)]
fn tile(k: usize, a: &[f32], b: impl Fn(usize) -> [f32; NR], c: CTile<'_>) {
    // The last row stands in for those beyond it, so that MR rows are always in registers.
    let rows: [&[f32]; MR] = core::array::from_fn(|i| &a[i.min(c.rows - 1) * a_stride::<f32>()..][..k]);
    let mut sums = [[0.0f32; NR]; MR];
    for p in 0..k {
        let b = b(p);
        for (sums, row) in sums.iter_mut().zip(rows) {
            for (sum, b) in sums.iter_mut().zip(b) {
                *sum += row[p] * b;
            }
        }
    }
    for (row, sums) in c.data.chunks_mut(c.stride.max(c.cols)).zip(sums).take(c.rows) {
        for (c_element, sum) in row[..c.cols].iter_mut().zip(sums) {
            match c.accumulate {
                Accumulate::Overwrite => *c_element = sum,
                Accumulate::Add => *c_element += sum,
            }
        }
    }
}
