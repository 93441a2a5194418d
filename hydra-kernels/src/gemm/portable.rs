//! Micro-kernels in plain Rust, for any architecture.

use super::Store;
use super::convert::widen;
use super::tiled::{CTile, Micro, Piece, a_stride};
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
        let mut sums = [[0.0; NR]; MR];
        for &Piece { k, a, b } in pieces {
            let (b, _) = b.as_chunks::<NR>();
            add(&mut sums, k, a, c.rows, |p| b[p]);
        }
        store(sums, c);
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
        let mut sums = [[0.0; NR]; MR];
        for &Piece { k, a, b } in pieces {
            let (pairs, _) = b.as_chunks::<{ 2 * NR }>();
            add(&mut sums, k, a, c.rows, |p| core::array::from_fn(|j| widen(pairs[p / 2][2 * j + p % 2])));
        }
        store(sums, c);
    }
}

/// Sums of rows beyond `rows` are nothing in particular.
#[inline(always)]
fn add(sums: &mut [[f32; NR]; MR], k: usize, a: &[f32], rows: usize, b: impl Fn(usize) -> [f32; NR]) {
    let rows: [&[f32]; MR] = core::array::from_fn(|i| &a[i.min(rows - 1) * a_stride::<f32>()..][..k]);
    for p in 0..k {
        let b = b(p);
        for (sums, row) in sums.iter_mut().zip(rows) {
            for (sum, b) in sums.iter_mut().zip(b) {
                *sum += row[p] * b;
            }
        }
    }
}

fn store(sums: [[f32; NR]; MR], c: CTile<'_>) {
    for (row, sums) in c.data.chunks_mut(c.stride.max(c.cols)).zip(sums).take(c.rows) {
        for (c_element, sum) in row[..c.cols].iter_mut().zip(sums) {
            match c.store {
                Store::Overwrite => *c_element = sum,
                Store::Accumulate => *c_element += sum,
            }
        }
    }
}
