//! Products with a frozen bf16 matrix ([`crate::product`]) by Hopper's `wgmma` (sm_90a), several times as fast as
//! `mma.sync` there. A quantised matrix is decoded to bf16 before, because products that use `wgmma` have many rows
//! ([`crate::rows::decode`]).
//!
//! A block has a 128 x 256 tile of C, in the registers of two warpgroups (64 x 256 each). Tiles of the operands are 64
//! deep, which is one row of 128-byte swizzling: a tile is one panel of such rows (A, and B where its rows are the
//! weight's) or four side by side (B where its rows are k). There are four stages: one is being multiplied, one may
//! still be, two are being copied. A step starts the multiplications of a tile, then the copies of the tile after the
//! next, and only then waits for the multiplications of the tile before, so that the matrix units always have work.

use crate::format::Format;
use crate::prelude::*;
use crate::product::{Product, Tiling, products};
use crate::rows::Output;
use crate::sizes::{WGMMA_A_BYTES, WGMMA_K, WGMMA_M, WGMMA_N, WGMMA_STAGE_BYTES, WGMMA_STAGES};
use crate::tile::at;

/// Chunks of a panel's row.
const CHUNKS: u32 = WGMMA_K / 8;
/// Bytes of eight rows of a panel, after which the swizzling repeats.
const EIGHT_ROWS: u32 = 8 * 128;
/// Bytes of a panel of B where its rows are k.
const PANEL: u32 = WGMMA_K * 128;
/// Where there is only one panel: the hardware ignores it, and 16 is the convention.
const NO_PANEL: u32 = 16;
/// Rows of C that a warpgroup has.
const GROUP_M: u32 = 64;

struct Panels;

impl Tiling for Panels {
    const M: u32 = WGMMA_M;
    const N: u32 = WGMMA_N;
    const K: u32 = WGMMA_K;

    #[inline(always)]
    fn a(base: u32, row: u32, chunk: u32) -> u32 {
        at::<CHUNKS>(base, row, chunk)
    }

    #[inline(always)]
    fn b_rows(base: u32, row: u32, chunk: u32) -> u32 {
        at::<CHUNKS>(base, row, chunk)
    }

    #[inline(always)]
    fn b_columns(base: u32, row: u32, chunk: u32) -> u32 {
        at::<CHUNKS>(base + chunk / CHUNKS * PANEL, row, chunk % CHUNKS)
    }
}

#[inline(always)]
unsafe fn gemm<F: Format, const ROWS: bool>(c: Output, product: &Product<F, Panels, ROWS>) {
    let a_stage = |tile: u32| shared() + tile % WGMMA_STAGES * WGMMA_STAGE_BYTES;
    let b_stage = |tile: u32| a_stage(tile) + WGMMA_A_BYTES;
    let group_m = warp() / 4 * GROUP_M;
    let mut sums = Sums::zero();
    for tile in 0..WGMMA_STAGES - 2 {
        product.fetch(tile, a_stage(tile), b_stage(tile));
    }
    // Without it the sums could skip the loop, and the compiler would copy them.
    assume(product.tiles() > 0);
    let mut tile = 0;
    while tile < product.tiles() {
        copy_wait::<{ WGMMA_STAGES - 3 }>();
        proxy_fence();
        // All threads' copies of the tile have arrived, and no multiplication reads the tile that the next copies
        // overwrite.
        barrier();
        let a = Swizzled { at: a_stage(tile) + group_m * 128, panel: NO_PANEL, eight: EIGHT_ROWS };
        // 16 of k are two chunks of a row, or 16 rows.
        if ROWS {
            let b = Swizzled { at: b_stage(tile), panel: NO_PANEL, eight: EIGHT_ROWS };
            sums.start::<false>(a.steps(32), b.steps(32));
        } else {
            let b = Swizzled { at: b_stage(tile), panel: PANEL, eight: EIGHT_ROWS };
            sums.start::<true>(a.steps(32), b.steps(2 * EIGHT_ROWS));
        }
        let ahead = tile + WGMMA_STAGES - 2;
        product.fetch(ahead, a_stage(ahead), b_stage(ahead));
        sums.wait_for_all_but_one();
        tile += 1;
    }
    let sums = sums.finish();
    // The other warpgroup may still be reading operands from where C is staged.
    barrier();
    let row = group_m + warp() % 4 * 16;
    for column in 0..WGMMA_N / 8 {
        Product::<F, Panels, ROWS>::stage(shared(), row, 8 * column, sums[column as usize]);
    }
    barrier();
    product.store(c, shared(), 0, WGMMA_M);
}

products! {
    gemm;
    wgmma_rows_bf16: Bf16, true;
    wgmma_columns_bf16: Bf16, false;
}
