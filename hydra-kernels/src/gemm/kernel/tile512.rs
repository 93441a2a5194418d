//! What the 12 × 32 micro-kernels of AVX-512 share: 24 accumulators, two vectors of B (four for widened bf16) and a
//! broadcast of A, of 32 registers.

use super::micro::{CTile, PanelPair};
use crate::gemm::view::Accumulate;
use core::arch::x86_64::*;

pub(super) const MR: usize = 12;
pub(super) const NR: usize = 32;

/// Tile functions by vectors of columns and by rows: `tiles[vectors - 1][rows - 1]`.
pub(super) type Tiles<K> = [[unsafe fn(&[PanelPair<'_, K>], CTile<'_>); MR]; 2];

macro_rules! tiles {
    ($tile:ident $($rows:literal)*) => {
        [[$($tile::<$rows, 1>),*], [$($tile::<$rows, 2>),*]]
    };
}
pub(super) use tiles;

/// Vectors that hold a tile's columns. With few columns, only the first of two is computed.
pub(super) fn vectors(c: &CTile<'_>) -> usize {
    c.cols.div_ceil(16)
}

/// Prefetches the tile of C while its sums are computed.
///
/// # Safety
/// R rows of `c` lie inside its slice.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn prefetch<const R: usize, const V: usize>(c: &CTile<'_>) {
    for i in 0..R {
        // SAFETY: i < R, so the first element of row i is inside the slice by this function's contract.
        let row = unsafe { c.data.as_ptr().add(i * c.stride) };
        for v in 0..V {
            _mm_prefetch::<_MM_HINT_T0>(row.wrapping_add(16 * v).cast());
        }
    }
}

/// Stores or adds the sums of a tile.
///
/// # Safety
/// The CPU has AVX-512F; R rows of `c.cols` ≤ 16 · V columns lie inside `c`'s slice.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn store<const R: usize, const V: usize>(sums: [[__m512; V]; R], c: CTile<'_>) {
    let columns = u32::MAX >> (NR - c.cols);
    let masks = [columns as u16, (columns >> 16) as u16];
    for (i, sums) in sums.into_iter().enumerate() {
        for (v, mut sum) in sums.into_iter().enumerate() {
            // `wrapping_add`: with few columns the second vector may start beyond the slice, entirely masked out.
            let at = c.data.as_mut_ptr().wrapping_add(i * c.stride + 16 * v);
            // SAFETY: i < R, and the masks admit only columns below `c.cols`: inside the slice by this function's
            // contract.
            unsafe {
                if c.accumulate == Accumulate::Add {
                    sum = _mm512_add_ps(_mm512_maskz_loadu_ps(masks[v], at), sum);
                }
                _mm512_mask_storeu_ps(at, masks[v], sum);
            }
        }
    }
}
