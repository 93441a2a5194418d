//! Tiles of bf16 in shared memory, and the operands of `mma.m16n8k16` that are read from them.
//!
//! A row is `CHUNKS` chunks of 16 bytes. Chunks are permuted within a row, so that eight rows at the same column lie in
//! different banks: by `row % 8` where a row fills the banks (8 or 16 chunks), by `row / 2 % 4` where two rows do (4
//! chunks).

use crate::prelude::*;

/// The address of a chunk.
#[inline(always)]
pub fn at<const CHUNKS: u32>(base: u32, row: u32, chunk: u32) -> u32 {
    let permuted = if CHUNKS == 4 { chunk ^ (row >> 1 & 3) } else { chunk ^ (row & 7) };
    base + (row * CHUNKS + permuted) * 16
}

/// A [16, 16] with its first row and chunk at (`row`, `chunk`).
#[inline(always)]
#[track_caller]
pub unsafe fn a_fragment<const CHUNKS: u32>(base: u32, row: u32, chunk: u32) -> [u32; 4] {
    let lane = lane();
    ldmatrix(at::<CHUNKS>(base, row + lane % 16, chunk + lane / 16))
}

/// Two B [16, 8] side by side from a tile whose *rows* are B's columns: columns `row ..`, k from `chunk` on.
#[inline(always)]
#[track_caller]
pub unsafe fn b_fragments<const CHUNKS: u32>(base: u32, row: u32, chunk: u32) -> [u32; 4] {
    let lane = lane();
    ldmatrix(at::<CHUNKS>(base, row + lane / 16 * 8 + lane % 8, chunk + lane / 8 % 2))
}

/// The same from a tile whose rows are B's rows: k from `row` on, columns from `chunk` on.
#[inline(always)]
#[track_caller]
pub unsafe fn b_fragments_transposed<const CHUNKS: u32>(base: u32, row: u32, chunk: u32) -> [u32; 4] {
    let lane = lane();
    ldmatrix_transposed(at::<CHUNKS>(base, row + lane / 8 % 2 * 8 + lane % 8, chunk + lane / 16))
}

/// acc [16, 8 N] += rows `row .. row + 16` of the tile `a` · (the tile `b`)ᵀ, over the tiles' whole width.
#[inline(always)]
pub unsafe fn rows_by_rows<const CHUNKS: u32, const N: usize>(acc: &mut [[f32; 4]; N], a: u32, row: u32, b: u32) {
    for step in 0..CHUNKS / 2 {
        let left = a_fragment::<CHUNKS>(a, row, 2 * step);
        for pair in 0..N / 2 {
            let [b0, b1, b2, b3] = b_fragments::<CHUNKS>(b, 16 * pair as u32, 2 * step);
            mma_bf16(&mut acc[2 * pair], left, [b0, b1]);
            mma_bf16(&mut acc[2 * pair + 1], left, [b2, b3]);
        }
    }
}

/// acc [16, 8 N] += p [16, 8 K] · the tile `b` [8 K, 8 N]; p is what another product left in registers.
#[inline(always)]
pub unsafe fn registers_by_tile<const CHUNKS: u32, const K: usize, const N: usize>(
    acc: &mut [[f32; 4]; N],
    p: &[[f32; 4]; K],
    b: u32,
) {
    for step in 0..K / 2 {
        let (low, high) = (p[2 * step], p[2 * step + 1]);
        let left = [
            pack_bf16(low[0], low[1]),
            pack_bf16(low[2], low[3]),
            pack_bf16(high[0], high[1]),
            pack_bf16(high[2], high[3]),
        ];
        for pair in 0..N / 2 {
            let [b0, b1, b2, b3] = b_fragments_transposed::<CHUNKS>(b, 16 * step as u32, 2 * pair as u32);
            mma_bf16(&mut acc[2 * pair], left, [b0, b1]);
            mma_bf16(&mut acc[2 * pair + 1], left, [b2, b3]);
        }
    }
}
