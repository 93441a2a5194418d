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

/// Fragments of 16 rows of a warp in attention.
pub const M: usize = 2;

/// The left operand of a product of attention: 16 M rows of a tile, by 16 columns. Addresses are computed again for each
/// product: registers are scarce.
#[derive(Clone, Copy)]
pub struct Left<const CHUNKS: u32> {
    /// Of the first columns.
    address: u32,
}

impl<const CHUNKS: u32> Left<CHUNKS> {
    /// Rows from `base` on. A tile begins at a multiple of its row's length, so that a step changes bits of the address
    /// that no row changes.
    #[inline(always)]
    pub fn new(base: u32) -> Self {
        let lane = opaque(lane());
        Self { address: at::<CHUNKS>(base, lane % 16, lane / 16) }
    }

    /// Columns 16 · `step` and on.
    #[inline(always)]
    #[track_caller]
    pub unsafe fn fragments(self, step: u32) -> [[u32; 4]; M] {
        let at = self.address ^ (step * 32);
        ldmatrix_twice([at, at + 16 * CHUNKS * 16])
    }
}

/// Columns 32 · `four` and on of acc [16 M, 8 N] += left [16 M, 16] · right [16, 32].
#[inline(always)]
fn products_of_four<const N: usize>(
    acc: &mut [[[f32; 4]; N]; M],
    left: [[u32; 4]; M],
    right: [[u32; 4]; 2],
    four: usize,
) {
    for pair in 0..2 {
        let [b0, b1, b2, b3] = right[pair];
        for m in 0..M {
            mma_bf16(&mut acc[m][4 * four + 2 * pair], left[m], [b0, b1]);
            mma_bf16(&mut acc[m][4 * four + 2 * pair + 1], left[m], [b2, b3]);
        }
    }
}

/// acc [16 M, 8 N] += a [16 M, 8 CHUNKS] · (the tile `b`)ᵀ. `kept` are a's fragments of the first columns.
#[inline(always)]
pub unsafe fn rows_by_rows<const CHUNKS: u32, const KEPT: usize, const N: usize>(
    acc: &mut [[[f32; 4]; N]; M],
    kept: &[[[u32; 4]; M]; KEPT],
    a: Left<CHUNKS>,
    b: u32,
) {
    let lane = opaque(lane());
    let b = at::<CHUNKS>(b, lane / 16 * 8 + lane % 8, lane / 8 % 2);
    for step in 0..CHUNKS / 2 {
        let left = if (step as usize) < KEPT { kept[step as usize] } else { a.fragments(step) };
        for four in 0..N / 4 {
            let b = (b ^ (step * 32)) + four as u32 * 32 * CHUNKS * 16;
            let right = ldmatrix_twice([b, b + 16 * CHUNKS * 16]);
            products_of_four(acc, left, right, four);
        }
    }
}

/// p [16 M, 8 N], which another product left in registers, as a left operand.
#[inline(always)]
pub fn packed<const N: usize, const K: usize>(p: &[[[f32; 4]; N]; M]) -> [[[u32; 4]; K]; M] {
    let mut left = [[[0; 4]; K]; M];
    for m in 0..M {
        for step in 0..K {
            let [a, b, c, d] = p[m][2 * step];
            let [e, f, g, h] = p[m][2 * step + 1];
            left[m][step] = [pack_bf16(a, b), pack_bf16(c, d), pack_bf16(e, f), pack_bf16(g, h)];
        }
    }
    left
}

/// acc [16 M, 8 N] += left [16 M, 16 K] · the tile `b` [16 K, 8 N].
#[inline(always)]
pub unsafe fn registers_by_tile<const CHUNKS: u32, const K: usize, const N: usize>(
    acc: &mut [[[f32; 4]; N]; M],
    left: &[[[u32; 4]; K]; M],
    b: u32,
) {
    let lane = opaque(lane());
    let b = at::<CHUNKS>(b, lane / 8 % 2 * 8 + lane % 8, lane / 16);
    for step in 0..K {
        for four in 0..N / 4 {
            let at = |pair: u32| (b ^ ((2 * four as u32 + pair) * 32)) + step as u32 * 16 * CHUNKS * 16;
            let right = ldmatrix_transposed_twice([at(0), at(1)]);
            products_of_four(acc, left.map(|steps| steps[step]), right, four);
        }
    }
}
