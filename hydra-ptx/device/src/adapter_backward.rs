//! The adapter's gradients for many tokens, which read dy and x once: d mixed = dy B and dB = dyᵀ mixed, the gate's
//! gradient, and d[A; R] = d adapter_stateᵀ D(x).
//!
//! A block of [`lora_up_backward`] has a rectangle of dy. It writes the sums over its columns, a part of `d_mixed`, and
//! the sums over its tokens, a part of dB. `gate_backward` adds both kinds of parts.

use crate::gate::Adapter;
use crate::kernels::adapter::{LoraUpBackwardParams, WeightGradParams, WeightGradTotalParams};
use crate::mask::Mask;
use crate::mixed::MixedOperand;
use crate::prelude::*;
use crate::sizes::{NARROW, THREADS, WIDE, WIDE_EXCHANGE, WIDE_EXCHANGE_BYTES, WIDE_STAGES, WIDE_TOKENS};
use crate::tile::{a_fragment, at};
use crate::wide::*;

impl LoraUpBackwardParams {
    #[inline(always)]
    fn adapter(&self) -> Adapter {
        let &Self { a_rows, lora_heads, rank, per_head_a, .. } = self;
        let head_dropout = Mask { seed: self.head_seed, threshold: self.head_threshold, scale: self.head_keep_scale };
        Adapter::of_gradient((a_rows, lora_heads, rank, per_head_a), 0, 1.0, head_dropout)
    }
}

/// A warp's sums over columns of dy: 16 tokens, and 32 columns of `mixed`.
type ColumnSums = [[f32; 4]; 4];

/// A block's parts of dy B. Warps 2 m and 2 m + 1 have tokens 16 m and on of each tile, and a half of its columns each,
/// whose rows of B stay in their registers. They exchange their sums: each adds up 16 columns of `mixed`, which come
/// first in its fragments.
struct DMixed([Narrow; 8]);

impl DMixed {
    /// From B's tile [256, 32].
    #[inline(always)]
    unsafe fn new(b: u32) -> Self {
        let mut fragments = [[[0; 2]; 4]; 8];
        for step in 0..8 {
            let [own, others] = narrow_halves(b, WIDE / 2 * (warp() % 2) + 16 * step, warp() % 2);
            fragments[step as usize] = [own[0], own[1], others[0], others[1]];
        }
        Self(fragments)
    }

    /// Adds the products of 16 of the columns.
    #[inline(always)]
    unsafe fn add(&self, sums: &mut ColumnSums, tile: u32, step: u32) {
        let left = a_fragment::<WIDE_CHUNKS>(tile, warp() / 2 * 16, WIDE_CHUNKS / 2 * (warp() % 2) + 2 * step);
        for n in 0..4 {
            mma_bf16(&mut sums[n], left, self.0[step as usize][n]);
        }
    }

    /// Where a lane's four values for a half of `mixed`'s columns wait for the other warp.
    #[inline(always)]
    fn exchange(tile: u32, half: u32, n: u32) -> u32 {
        let place = (warp() / 2 * 2 + half) * 2 + n;
        shared() + WIDE_EXCHANGE + tile % 2 * WIDE_EXCHANGE_BYTES + (place * WARP + lane()) * 16
    }

    /// Gives the other warp its half of a tile's sums, and returns this warp's.
    #[inline(always)]
    unsafe fn give(tile: u32, sums: ColumnSums) -> [[f32; 4]; 2] {
        for n in 0..2 {
            st_u4(Self::exchange(tile, 1 - warp() % 2, n as u32), sums[n + 2].map(f32::to_bits));
        }
        [sums[0], sums[1]]
    }

    /// Calls `body(token, column, sums of two columns)` once the other warp's sums of a tile have arrived. The token is
    /// counted from the tile's first.
    #[inline(always)]
    unsafe fn take(tile: u32, kept: [[f32; 4]; 2], body: impl Fn(u32, u32, [f32; 2])) {
        let half = warp() % 2;
        for n in 0..2 {
            let given = ld_u4(Self::exchange(tile, half, n as u32)).map(f32::from_bits);
            let [a, b, c, d]: [f32; 4] = core::array::from_fn(|i| kept[n][i] + given[i]);
            let (token, j) = (warp() / 2 * 16 + lane() / 4, 16 * half + column(n));
            body(token, j, [a, b]);
            body(token + 8, j, [c, d]);
        }
    }
}

/// `d_mixed` and dB, in parts. Grid: [d_out / 256, groups of tokens · columns of `mixed` / 32], 128 threads.
#[inline(always)]
pub unsafe fn lora_up_backward(p: LoraUpBackwardParams) {
    let adapter = p.adapter();
    let narrow = adapter.mixed_width().div_ceil(NARROW);
    assume(narrow > 0);
    let (group, j0, c0) = (block_y() / narrow, block_y() % narrow * NARROW, block_x() * WIDE);
    let tokens = (group * p.group_tokens, p.tokens.min(group * p.group_tokens + p.group_tokens));
    let dy = Rows::<WIDE_CHUNKS>::new((p.dy, p.dy_pitch), p.d_out, tokens, c0);
    let fetch = |tile: u32| {
        dy.copy::<WIDE_TOKENS>(wide_tile(tile), tile * WIDE_TOKENS);
        copy_commit();
    };
    // Loads arrive behind the copies that were started before them.
    fetch(0);
    let mixed = MixedOperand::new(adapter, p.adapter_state, j0, tokens);
    let first = mixed.load(0);
    let rounded = RoundedTile::load(p.b, (p.d_out, adapter.mixed_width()), (c0, j0));
    keep_order();
    for tile in 1..WIDE_STAGES - 1 {
        fetch(tile);
    }
    // The last stage is still free.
    let b = wide_tile(WIDE_STAGES - 1);
    rounded.put(b);
    mixed.put(narrow_tile(0), 0, first);
    barrier();
    let d_mixed = DMixed::new(b);
    let mut db = TokenSums::ZERO;
    copy_wait::<{ WIDE_STAGES - 2 }>();
    barrier();
    let pitch = padded(adapter.mixed_width());
    let (mut tile, count) = (0, tiles(tokens));
    while tile < count {
        let next = mixed.load(tile + 1);
        keep_order();
        // Nobody reads the tile any more that these copies overwrite.
        fetch(tile + WIDE_STAGES - 1);
        let (from, narrow, mut sums) = (wide_tile(tile), narrow_tile(tile % 2), [[0.0; 4]; 4]);
        // The two products take turns, so that neither waits for its own sums.
        for half in 0..2 {
            let narrow = narrow_fragments(narrow, 16 * half);
            for m in 0..4 {
                d_mixed.add(&mut sums, from, 4 * half + m);
                db.add(from, 16 * half, m, &narrow);
            }
        }
        let kept = DMixed::give(tile, sums);
        mixed.put(narrow_tile((tile + 1) % 2), tile + 1, next);
        copy_wait::<{ WIDE_STAGES - 2 }>();
        // All threads' copies of the next tile have arrived.
        barrier();
        DMixed::take(tile, kept, |t, j, sums| {
            let (t, j) = (tokens.0 + tile * WIDE_TOKENS + t, j0 + j);
            if t < tokens.1 && j < pitch {
                let row = block_x() as usize * p.tokens as usize + t as usize;
                store(p.d_mixed.add(row * pitch as usize + j as usize).cast(), Two(sums));
            }
        });
        tile += 1;
    }
    if p.db.is_null() {
        return;
    }
    db.each(|c, j, sums| {
        let (c, j) = (c0 + c, j0 + j);
        if c < p.d_out && j < pitch {
            let row = group as usize * p.d_out as usize + c as usize;
            store(p.db.add(row * pitch as usize + j as usize).cast(), Two(sums));
        }
    });
}

/// d[A; R]; with more than one part, its sums go to `parts`, for [`weight_grad_total`]. Grid: [columns / 256, parts ·
/// rows / 32], 128 threads.
#[inline(always)]
pub unsafe fn weight_grad(p: WeightGradParams) {
    let mask = Mask { seed: p.seed, threshold: p.threshold, scale: p.keep_scale };
    let narrow = p.rows.div_ceil(NARROW);
    assume(narrow > 0);
    let (part, j0, c0) = (block_y() / narrow, block_y() % narrow * NARROW, block_x() * WIDE);
    let tokens = (part * p.part_tokens, p.tokens.min(part * p.part_tokens + p.part_tokens));
    let x = Rows::<WIDE_CHUNKS>::new((p.wide, p.wide_pitch), p.columns, tokens, c0);
    let s = Rows::<NARROW_CHUNKS>::new((p.narrow, p.narrow_pitch), p.rows, tokens, j0);
    let fetch = |tile: u32| {
        x.copy::<WIDE_TOKENS>(wide_tile(tile), tile * WIDE_TOKENS);
        s.copy::<WIDE_TOKENS>(narrow_tile(tile % WIDE_STAGES), tile * WIDE_TOKENS);
        copy_commit();
    };
    for tile in 0..WIDE_STAGES - 1 {
        fetch(tile);
    }
    let (mut plain, mut dropped) = (TokenSums::ZERO, TokenSums::ZERO);
    let (has_dropout, dropped_tile) = (mask.threshold > 0, narrow_tile(WIDE_STAGES));
    let (mut tile, count) = (0, tiles(tokens));
    while tile < count {
        copy_wait::<{ WIDE_STAGES - 2 }>();
        let (from, narrow) = (wide_tile(tile), narrow_tile(tile % WIDE_STAGES));
        if has_dropout {
            // A thread reads what it has copied itself.
            let first = tokens.0 + tile * WIDE_TOKENS;
            chunks::<WIDE_CHUNKS, WIDE_TOKENS>(|r, chunk| {
                let values = ld_u4(at::<WIDE_CHUNKS>(from, r, chunk));
                let left = mask.cut(values, first + r, c0 + 8 * chunk);
                st_u4(at::<WIDE_CHUNKS>(dropped_tile, r, chunk), left);
            });
        }
        // All threads' copies of the tile have arrived, and nobody reads the tile that the next copies overwrite.
        barrier();
        fetch(tile + WIDE_STAGES - 1);
        plain.add_tile(from, narrow);
        if has_dropout {
            dropped.add_tile(dropped_tile, narrow);
            barrier();
        }
        tile += 1;
    }
    if has_dropout {
        dropped.choose(&plain, mask.scale, |j| j0 + j < p.a_rows);
        plain = dropped;
    }
    if p.part_tokens < p.tokens {
        let pitch = padded(p.columns);
        plain.each(|c, j, sums| {
            for i in 0..2 {
                if c0 + c < pitch && j0 + j + i < p.rows {
                    let row = part as usize * p.rows as usize + (j0 + j + i) as usize;
                    store(p.parts.add(row * pitch as usize + (c0 + c) as usize), sums[i as usize]);
                }
            }
        });
        return;
    }
    plain.each(|c, j, sums| {
        for i in 0..2 {
            if c0 + c < p.columns && j0 + j + i < p.rows {
                let to = p.out.add((j0 + j + i) as usize * p.columns as usize + (c0 + c) as usize);
                store(to, load(to) + sums[i as usize]);
            }
        }
    });
}

/// Adds the parts of a weight gradient. Grid: [rows · columns / 2 / 256], 256 threads.
#[inline(always)]
pub unsafe fn weight_grad_total(p: WeightGradTotalParams) {
    let total = Total { out: p.out, rows: p.rows, columns: p.columns, scale: 1.0 };
    total.add(p.parts, p.count, block_x() * THREADS + thread());
}
