//! The adapter's first product and its gate for a few tokens: what [`crate::skinny`] does for many. A block has one token, and reads
//! the adapter's parameters as they are, f32: to convert them would take longer.

use crate::gate::{Heads, mix_tokens};
use crate::mask::Mask;
use crate::prelude::*;
use crate::rows::{dot, load_chunk, load_eight};
use crate::sizes::{FEW_ROWS, THREADS};

kernels! {
    /// [`crate::skinny::down`] without dropout for a few tokens, `a` being [A; R] itself, [rows, d_in]: `hidden`
    /// [tokens, a_rows + heads] and the operand `mixed` [tokens, padded heads rank]. Grid: [tokens], 256 threads.
    fn few_down(
        hidden: *mut f32,
        mixed: *mut u16,
        tokens: u32,
        x: *const u16,
        d_in: u32,
        a: *const f32,
        rows: u32,
        scale: f32,
        a_rows: u32,
        heads: u32,
        rank: u32,
        per_head: u32,
        gate: u32,
        labels: *const u32,
        sharpness: f32,
        top_k: u32,
    ) {
        let heads = Heads { a_rows, heads, rank, per_head, gate, labels, sharpness, top_k, mask: Mask::NONE };
        let (token, warps) = (block_x(), THREADS / WARP);
        let part_of = |row: u32, warp: u32| shared() + (row * warps + warp) * 4;
        let mut first = 0;
        while first < rows {
            let mut acc = [0.0; FEW_ROWS as usize];
            let mut group = thread();
            while 8 * group < d_in {
                let values = unpack8(load_chunk(x, padded(d_in), token, tokens, 8 * group));
                for i in 0..FEW_ROWS {
                    // The last row once more where there are no more: a load without a branch.
                    let weights = load_eight(a, (first + i).min(rows - 1), 8 * group, d_in);
                    acc[i as usize] = dot(values, weights, acc[i as usize]);
                }
                group += THREADS;
            }
            for i in 0..FEW_ROWS {
                let sum = over_warp::<Sum>(acc[i as usize]);
                if first + i < rows && lane() == 0 {
                    st_f32(part_of(first + i, warp()), sum);
                }
            }
            first += FEW_ROWS;
        }
        barrier();
        let mut row = thread();
        while row < rows {
            let mut sum = 0.0;
            for warp in 0..warps {
                sum += ld_f32(part_of(row, warp));
            }
            store(hidden.add((token * heads.hidden() + row) as usize), sum);
            row += THREADS;
        }
        barrier();
        mix_tokens(heads, hidden, mixed, scale, token, token + 1);
    }
}
