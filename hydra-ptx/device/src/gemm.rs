//! C = before + A · B + A₂ · B₂ with bf16 operands and f32 sums: the frozen product, the adapter's and a residual in one pass over
//! C, which is f32 or bf16. `before` may be null or C.
//!
//! ```text
//! rows:     C [m, n] = A [m, k] · Wᵀ,  W [n, k]     (x Wᵀ; B₂ is [n, k₂])
//! columns:  C [m, n] = A [m, k] · W,   W [k, n]     (dy W; B₂ is [k₂, n])
//! ```
//!
//! A block has a 128 x 128 tile of C, in the registers of 8 warps (64 x 32 each). Tiles of the operands, 32 deep, pass through
//! three stages in shared memory: while one is multiplied, two are on their way (`cp.async`). The second pair's tiles follow
//! the first's, so the adapter costs its multiplications alone. A block format's tile is decoded by the threads that load it.

use crate::format::{Bf16, Format, Q4_0, Q4_1, Q8_0};
use crate::prelude::*;
use crate::rows::Output;
use crate::sizes::{GEMM_GROUP, GEMM_K, GEMM_M, GEMM_N, GEMM_STAGES, GEMM_TILE_BYTES, THREADS};
use crate::tile::{a_fragment, at, b_fragments, b_fragments_transposed};

/// Chunks of a row of A's tile, and of B's where its rows are the weight's.
const DEEP: u32 = GEMM_K / 8;
/// Chunks of a row of B's tile where its rows are k.
const WIDE: u32 = GEMM_N / 8;

/// A bf16 matrix.
#[derive(Clone, Copy)]
struct Operand {
    at: *const u8,
    pitch: u32,
    rows: u32,
    /// A multiple of 8: padding is zero.
    columns: u32,
}

impl Operand {
    /// Starts copying the tile whose first element is (`row`, `column`).
    #[inline(always)]
    unsafe fn copy_tile<const CHUNKS: u32>(self, to: u32, row: u32, column: u32) {
        let mut i = thread();
        while i < GEMM_TILE_BYTES / 16 {
            let (r, chunk) = (i / CHUNKS, i % CHUNKS);
            let (row, column) = (row + r, column + 8 * chunk);
            let there = row < self.rows && column < self.columns;
            let offset = if there { (row as usize * self.pitch as usize + column as usize) * 2 } else { 0 };
            copy_async(at::<CHUNKS>(to, r, chunk), self.at.add(offset), there);
            i += THREADS;
        }
    }
}

/// Decodes the tile whose first element is (`row`, `column`): half a block a thread.
#[inline(always)]
unsafe fn decode_tile<F: Format, const CHUNKS: u32>(to: u32, w: Operand, scales: *const u8, row: u32, column: u32) {
    // Groups of 8 columns of a row of the tile are its chunks.
    let (r, first) = (thread() / (CHUNKS / 2), thread() % (CHUNKS / 2) * 2);
    for chunk in first..first + 2 {
        let (row, column) = (row + r, column + 8 * chunk);
        let mut values = [0.0; 8];
        if row < w.rows && column < w.columns {
            values = F::eight(w.at, scales, row, column / 8, w.pitch, w.columns);
        }
        st_u4(at::<CHUNKS>(to, r, chunk), pack8(values));
    }
}

/// This block's first row and column of C. Blocks start in order of their number; they are laid over C by groups of eight rows of
/// tiles, down a group's first column, then its second, so that those under way together cover something like a square.
#[inline(always)]
unsafe fn tile_of_block(m: u32, n: u32) -> (u32, u32) {
    let (rows, columns) = (m.div_ceil(GEMM_M), n.div_ceil(GEMM_N));
    let number = block_y() * columns + block_x();
    let in_group = GEMM_GROUP * columns;
    assume(in_group > 0);
    let (first, place) = (number / in_group * GEMM_GROUP, number % in_group);
    let height = (rows - first).min(GEMM_GROUP);
    assume(height > 0);
    ((first + place % height) * GEMM_M, place / height * GEMM_N)
}

#[inline(always)]
unsafe fn gemm<F: Format, const ROWS: bool>(
    c: *mut u8,
    before: *const u8,
    bf16: u32,
    m: u32,
    n: u32,
    a: *const u16,
    k: u32,
    w: *const u8,
    scales: *const u8,
    pitch: u32,
    a2: *const u16,
    k2: u32,
    b2: *const u16,
    pitch2: u32,
) {
    let operand = |at: *const u16, k: u32| Operand { at: at.cast(), pitch: padded(k), rows: m, columns: padded(k) };
    let weight = |at: *const u8, pitch: u32, k: u32| {
        if ROWS {
            Operand { at, pitch, rows: n, columns: padded(k) }
        } else {
            Operand { at, pitch, rows: k, columns: padded(n) }
        }
    };
    let (a, a2) = (operand(a, k), operand(a2, k2));
    let (w, b2) = (weight(w, pitch, k), weight(b2.cast(), pitch2, k2));
    let (m0, n0) = tile_of_block(m, n);
    let (tiles, tiles2) = (k.div_ceil(GEMM_K), k2.div_ceil(GEMM_K));
    let a_stage = |stage: u32| shared() + stage * 2 * GEMM_TILE_BYTES;
    let b_stage = |stage: u32| a_stage(stage) + GEMM_TILE_BYTES;

    let copy_b = |b: Operand, to: u32, k0: u32| {
        if ROWS { b.copy_tile::<DEEP>(to, n0, k0) } else { b.copy_tile::<WIDE>(to, k0, n0) }
    };
    let fetch = |tile: u32| {
        let stage = tile % GEMM_STAGES;
        let (a_to, b_to) = (a_stage(stage), b_stage(stage));
        if tile < tiles {
            let k0 = tile * GEMM_K;
            a.copy_tile::<DEEP>(a_to, m0, k0);
            match (F::PLAIN, ROWS) {
                (true, _) => copy_b(w, b_to, k0),
                (false, true) => decode_tile::<F, DEEP>(b_to, w, scales, n0, k0),
                (false, false) => decode_tile::<F, WIDE>(b_to, w, scales, k0, n0),
            }
        } else if tile < tiles + tiles2 {
            let k0 = (tile - tiles) * GEMM_K;
            a2.copy_tile::<DEEP>(a_to, m0, k0);
            copy_b(b2, b_to, k0);
        }
        // A group even where nothing is left to copy: so the latest two groups are always the two tiles ahead.
        copy_commit();
    };

    let (warp_m, warp_n) = (warp() / 4 * 64, warp() % 4 * 32);
    let mut acc = [[0f32; 4]; 16];
    for tile in 0..GEMM_STAGES - 1 {
        fetch(tile);
    }
    let mut tile = 0;
    while tile < tiles + tiles2 {
        copy_wait::<{ GEMM_STAGES - 2 }>();
        // The tile is here for all threads, and all are done with the one that the next copy overwrites.
        barrier();
        fetch(tile + GEMM_STAGES - 1);
        let stage = tile % GEMM_STAGES;
        for step in 0..GEMM_K / 16 {
            let mut right = [[0u32; 4]; 2];
            for pair in 0..2 {
                right[pair as usize] = if ROWS {
                    b_fragments::<DEEP>(b_stage(stage), warp_n + 16 * pair, 2 * step)
                } else {
                    b_fragments_transposed::<WIDE>(b_stage(stage), 16 * step, warp_n / 8 + 2 * pair)
                };
            }
            for row in 0..4 {
                let left = a_fragment::<DEEP>(a_stage(stage), warp_m + 16 * row as u32, 2 * step);
                for column in 0..4 {
                    let [b0, b1] = [right[column / 2][column % 2 * 2], right[column / 2][column % 2 * 2 + 1]];
                    mma_bf16(&mut acc[row * 4 + column], left, [b0, b1]);
                }
            }
        }
        tile += 1;
    }

    let (c, even) = (Output::new(c, before, bf16), n.is_multiple_of(2));
    for row in 0..4 {
        for column in 0..4 {
            for half in 0..2 {
                let row_at = m0 + warp_m + 16 * row as u32 + lane() / 4 + half as u32 * 8;
                let column_at = n0 + warp_n + 8 * column as u32 + lane() % 4 * 2;
                if row_at < m && column_at < n {
                    let [first, second] = [acc[row * 4 + column][2 * half], acc[row * 4 + column][2 * half + 1]];
                    let at = row_at as usize * n as usize + column_at as usize;
                    if even {
                        c.put_two(at, [first, second]);
                    } else {
                        c.put(at, first);
                        if column_at + 1 < n {
                            c.put(at + 1, second);
                        }
                    }
                }
            }
        }
    }
}

/// One kernel for each form and format: a table, not code.
macro_rules! forms {
    ($($name:ident: $format:ty, $rows:literal;)*) => {
        kernels! {$(
            /// See the module's heading. Grid: [n / 128, m / 128], 256 threads.
            fn $name(
                c: *mut u8,
                before: *const u8,
                bf16: u32,
                m: u32,
                n: u32,
                a: *const u16,
                k: u32,
                w: *const u8,
                scales: *const u8,
                pitch: u32,
                a2: *const u16,
                k2: u32,
                b2: *const u16,
                pitch2: u32,
            ) {
                gemm::<$format, $rows>(c, before, bf16, m, n, a, k, w, scales, pitch, a2, k2, b2, pitch2)
            }
        )*}
    };
}

forms! {
    gemm_rows_bf16: Bf16, true;
    gemm_rows_q8_0: Q8_0, true;
    gemm_rows_q4_0: Q4_0, true;
    gemm_rows_q4_1: Q4_1, true;
    gemm_columns_bf16: Bf16, false;
    gemm_columns_q8_0: Q8_0, false;
    gemm_columns_q4_0: Q4_0, false;
    gemm_columns_q4_1: Q4_1, false;
}
