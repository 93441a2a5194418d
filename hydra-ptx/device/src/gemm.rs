//! Products with a frozen matrix ([`crate::product`]) by `mma.sync`, which every device from 8.0 on has.
//!
//! A block has a 128 x 128 tile of C, in the registers of 8 warps (64 x 32 each); tiles of the operands are 32 deep, in
//! three stages.

use crate::format::Format;
use crate::prelude::*;
use crate::product::{Product, Tiling, products};
use crate::rows::Output;
use crate::sizes::{GEMM_K, GEMM_M, GEMM_N, GEMM_STAGES, GEMM_TILE_BYTES};
use crate::tile::{a_fragment, at, b_fragments, b_fragments_transposed};

/// Chunks of a row of A's tile, and of B's where its rows are the weight's.
const DEEP: u32 = GEMM_K / 8;
/// Chunks of a row of B's tile where its rows are k.
const WIDE: u32 = GEMM_N / 8;

struct Tiles;

impl Tiling for Tiles {
    const M: u32 = GEMM_M;
    const N: u32 = GEMM_N;
    const K: u32 = GEMM_K;

    #[inline(always)]
    fn a(base: u32, row: u32, chunk: u32) -> u32 {
        at::<DEEP>(base, row, chunk)
    }

    #[inline(always)]
    fn b_rows(base: u32, row: u32, chunk: u32) -> u32 {
        at::<DEEP>(base, row, chunk)
    }

    #[inline(always)]
    fn b_columns(base: u32, row: u32, chunk: u32) -> u32 {
        at::<WIDE>(base, row, chunk)
    }
}

#[inline(always)]
unsafe fn gemm<F: Format, const ROWS: bool>(c: Output, product: &Product<F, Tiles, ROWS>) {
    let a_stage = |tile: u32| shared() + tile % GEMM_STAGES * 2 * GEMM_TILE_BYTES;
    let b_stage = |tile: u32| a_stage(tile) + GEMM_TILE_BYTES;
    let (warp_m, warp_n) = (warp() / 4 * 64, warp() % 4 * 32);
    let mut acc = [[0f32; 4]; 16];
    for tile in 0..GEMM_STAGES - 1 {
        product.fetch(tile, a_stage(tile), b_stage(tile));
    }
    let mut tile = 0;
    while tile < product.tiles() {
        copy_wait::<{ GEMM_STAGES - 2 }>();
        // All threads' copies of the tile have arrived, and nobody reads the tile that the next copies overwrite.
        barrier();
        let ahead = tile + GEMM_STAGES - 1;
        product.fetch(ahead, a_stage(ahead), b_stage(ahead));
        for step in 0..GEMM_K / 16 {
            let mut right = [[0u32; 4]; 2];
            for pair in 0..2 {
                right[pair as usize] = if ROWS {
                    b_fragments::<DEEP>(b_stage(tile), warp_n + 16 * pair, 2 * step)
                } else {
                    b_fragments_transposed::<WIDE>(b_stage(tile), 16 * step, warp_n / 8 + 2 * pair)
                };
            }
            for row in 0..4 {
                let left = a_fragment::<DEEP>(a_stage(tile), warp_m + 16 * row as u32, 2 * step);
                for column in 0..4 {
                    let [b0, b1] = [right[column / 2][column % 2 * 2], right[column / 2][column % 2 * 2 + 1]];
                    mma_bf16(&mut acc[row * 4 + column], left, [b0, b1]);
                }
            }
        }
        tile += 1;
    }
    // The upper half of C, then the lower one: each fits where the operands were.
    for half in 0..2 {
        barrier();
        if warp() / 4 == half {
            for row in 0..4 {
                for column in 0..4 {
                    let (sums, row, column) = (acc[row * 4 + column], 16 * row as u32, warp_n + 8 * column as u32);
                    Product::<F, Tiles, ROWS>::stage(shared(), row, column, sums);
                }
            }
        }
        barrier();
        product.store(c, shared(), 64 * half, 64);
    }
}

products! {
    gemm;
    gemm_rows_bf16: Bf16, true;
    gemm_rows_q8_0: Q8_0, true;
    gemm_rows_q4_0: Q4_0, true;
    gemm_rows_q4_1: Q4_1, true;
    gemm_columns_bf16: Bf16, false;
    gemm_columns_q8_0: Q8_0, false;
    gemm_columns_q4_0: Q4_0, false;
    gemm_columns_q4_1: Q4_1, false;
}
