//! Micro-kernels in plain Rust, for any architecture.

use super::Accumulate;
use super::convert::widen;
use super::tiled::{CTile, Micro, Piece, a_stride, one_by_one};
use crate::isa::Isa;
use half::bf16;

/// 4 × 8: eight accumulators of four floats, in the sixteen registers of SSE2 or the 32 of NEON.
const MR: usize = 4;
const NR: usize = 8;

#[derive(Clone, Copy)]
pub(super) struct PortableF32;

impl Micro for PortableF32 {
    type E = f32;
    type A = f32;
    const MR: usize = MR;
    const NR: usize = NR;
    const K_STEP: usize = 1;

    #[inline(always)]
    fn isa(self) -> Isa {
        Isa::Portable
    }

    fn tile(self, pieces: &[Piece<'_, Self>], c: CTile<'_>) {
        one_by_one(pieces, c, |&Piece { k, a, b }, c| {
            let (b, _) = b.as_chunks::<NR>();
            sum(k, a, |p| b[p], c);
        });
    }
}

/// A is widened as it is copied, B as it is used.
#[derive(Clone, Copy)]
pub(super) struct PortableBf16;

impl Micro for PortableBf16 {
    type E = bf16;
    type A = f32;
    const MR: usize = MR;
    const NR: usize = NR;
    const K_STEP: usize = 2;

    #[inline(always)]
    fn isa(self) -> Isa {
        Isa::Portable
    }

    fn tile(self, pieces: &[Piece<'_, Self>], c: CTile<'_>) {
        one_by_one(pieces, c, |&Piece { k, a, b }, c| {
            let (pairs, _) = b.as_chunks::<{ 2 * NR }>();
            sum(k, a, |p| core::array::from_fn(|j| widen(pairs[p / 2][2 * j + p % 2])), c);
        });
    }
}

#[inline(always)]
fn sum(k: usize, a: &[f32], b: impl Fn(usize) -> [f32; NR], c: CTile<'_>) {
    // Beyond the last row it is repeated: always MR in registers.
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
            match c.store {
                Accumulate::Overwrite => *c_element = sum,
                Accumulate::Add => *c_element += sum,
            }
        }
    }
}
