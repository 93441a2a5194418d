//! The gradient of attention, with scores computed again from q, k and lse (Dao, arXiv 2307.08691).
//!
//! ```text
//! delta = Σ d o ∘ o      p = exp(s − lse)      dp = d o vᵀ      ds = p ∘ (dp − delta) / √d
//! dq = ds k              dk = dsᵀ q            dv = pᵀ d o
//! ```
//!
//! dq: a block has 64 queries of one head and loops over the keys. dk and dv: a block has 64 keys of one key head and
//! loops over the queries of all heads that share it. So each result has one writer, and no atomics are needed.

use crate::attention::{Attention, column_of, loaded, row_of};
use crate::kernels::attention::{AttentionDeltaParams, AttentionDkvParams, AttentionDqParams};
use crate::prelude::*;
use crate::sizes::{ATTENTION_TILE, BACKWARD_QUERIES, THREADS};
use crate::tile::{registers_by_tile, rows_by_rows};
use core::f32::consts::LOG2_E;

/// What the backward pass reads in addition to q, k and v.
#[derive(Clone, Copy)]
struct Saved {
    /// [tokens, n_heads d].
    d_o: *const u16,
    /// [tokens, n_heads].
    lse: *const f32,
    /// [tokens, n_heads].
    delta: *const f32,
}

impl Saved {
    /// A query's lse, to base 2, and its delta.
    #[inline(always)]
    unsafe fn of_row(self, row: u32, head: u32, n_heads: u32) -> (f32, f32) {
        let at = row as usize * n_heads as usize + head as usize;
        (load(self.lse.add(at)) * LOG2_E, load(self.delta.add(at)))
    }
}

impl Attention {
    /// p of a score, given its query's lse to base 2.
    #[inline(always)]
    fn probability(self, score: f32, lse: f32) -> f32 {
        exp2(score * self.scale * LOG2_E - lse)
    }
}

#[inline(always)]
unsafe fn dq_block<const CHUNKS: u32, const N: usize>(dq: *mut u16, of: Attention, saved: Saved) {
    let (rows, head) = (of.rows(), block_y());
    let kv_head = head / of.group();
    let bytes = ATTENTION_TILE * CHUNKS * 16;
    let (q_tile, o_tile) = (shared(), shared() + bytes);
    let k_tile = |block: u32| o_tile + bytes + block % 2 * 2 * bytes;
    let v_tile = |block: u32| k_tile(block) + bytes;
    let (first, count) = (rows.start + rows.first, rows.count());
    of.query_head(of.q, head).load_tile::<CHUNKS>(q_tile, ATTENTION_TILE, first, count);
    of.query_head(saved.d_o, head).load_tile::<CHUNKS>(o_tile, ATTENTION_TILE, first, count);
    let (k, v) = (of.key_head(of.k, kv_head), of.key_head(of.v, kv_head));
    let limit = rows.first + count;
    let blocks = limit.div_ceil(ATTENTION_TILE);
    let first_block = of.first_seen(rows.first) / ATTENTION_TILE;
    let fetch = |block: u32| {
        if block < blocks {
            let key = block * ATTENTION_TILE;
            let (row, count) = (rows.start + key, (limit - key).min(ATTENTION_TILE));
            k.load_tile::<CHUNKS>(k_tile(block), ATTENTION_TILE, row, count);
            v.load_tile::<CHUNKS>(v_tile(block), ATTENTION_TILE, row, count);
        }
        copy_commit();
    };
    fetch(first_block);
    // Rows that don't exist have probability 0.
    let (mut row_lse, mut row_delta) = ([f32::INFINITY; 2], [0f32; 2]);
    for r in 0..2 {
        let row = row_of(2 * r);
        if row < count {
            (row_lse[r], row_delta[r]) = saved.of_row(first + row, head, of.n_heads);
        }
    }
    let mut acc = [[0f32; 4]; N];
    let mut block = first_block;
    while block < blocks {
        loaded();
        fetch(block + 1);
        let key = block * ATTENTION_TILE;
        let (mut s, mut dp) = ([[0f32; 4]; 8], [[0f32; 4]; 8]);
        rows_by_rows::<CHUNKS, 8>(&mut s, q_tile, 16 * warp(), k_tile(block));
        rows_by_rows::<CHUNKS, 8>(&mut dp, o_tile, 16 * warp(), v_tile(block));
        for n in 0..8 {
            for i in 0..4 {
                let seen = of.sees(rows.first + row_of(i), key + column_of(n, i));
                let p = if seen { of.probability(s[n][i], row_lse[i / 2]) } else { 0.0 };
                s[n][i] = p * (dp[n][i] - row_delta[i / 2]);
            }
        }
        registers_by_tile::<CHUNKS, 8, N>(&mut acc, &s, k_tile(block));
        block += 1;
    }
    of.query_head(dq, head).store_rows(rows, &acc, [of.scale; 2]);
}

#[inline(always)]
unsafe fn dkv_block<const CHUNKS: u32, const N: usize>(dk: *mut u16, dv: *mut u16, of: Attention, saved: Saved) {
    let (rows, kv_head) = (of.rows(), block_y());
    let (key_bytes, query_bytes) = (ATTENTION_TILE * CHUNKS * 16, BACKWARD_QUERIES * CHUNKS * 16);
    let (k_tile, v_tile) = (shared(), shared() + key_bytes);
    let q_tile = |block: u32| v_tile + key_bytes + block % 2 * (2 * query_bytes + 8 * BACKWARD_QUERIES);
    let o_tile = |block: u32| q_tile(block) + query_bytes;
    let lse_row = |block: u32| o_tile(block) + query_bytes;
    let delta_row = |block: u32| lse_row(block) + 4 * BACKWARD_QUERIES;
    let (first, count) = (rows.start + rows.first, rows.count());
    of.key_head(of.k, kv_head).load_tile::<CHUNKS>(k_tile, ATTENTION_TILE, first, count);
    of.key_head(of.v, kv_head).load_tile::<CHUNKS>(v_tile, ATTENTION_TILE, first, count);
    let (mut dk_acc, mut dv_acc) = ([[0f32; 4]; N], [[0f32; 4]; N]);
    // Blocks of queries from this block's first row on to the last one that sees its last key, one head after the other.
    let limit = (rows.first + count - 1).saturating_add(of.window).min(rows.len);
    let group = of.group();
    let fetch = |block: u32, member: u32, query: u32| {
        if member < group {
            let head = kv_head * group + member;
            let (row, count) = (rows.start + query, (rows.len - query).min(BACKWARD_QUERIES));
            of.query_head(of.q, head).load_tile::<CHUNKS>(q_tile(block), BACKWARD_QUERIES, row, count);
            of.query_head(saved.d_o, head).load_tile::<CHUNKS>(o_tile(block), BACKWARD_QUERIES, row, count);
            if thread() < BACKWARD_QUERIES {
                let (mut l, mut e) = (f32::INFINITY, 0.0);
                if thread() < count {
                    (l, e) = saved.of_row(row + thread(), head, of.n_heads);
                }
                st_f32(lse_row(block) + 4 * thread(), l);
                st_f32(delta_row(block) + 4 * thread(), e);
            }
        }
        copy_commit();
    };
    let (mut block, mut member, mut query) = (0, 0, rows.first);
    fetch(block, member, query);
    while member < group {
        loaded();
        let mut next = (member, query + BACKWARD_QUERIES);
        if next.1 >= limit {
            next = (member + 1, rows.first);
        }
        fetch(block + 1, next.0, next.1);
        // Transposed: rows are keys, columns queries.
        let (mut p, mut ds) = ([[0f32; 4]; 4], [[0f32; 4]; 4]);
        rows_by_rows::<CHUNKS, 4>(&mut p, k_tile, 16 * warp(), q_tile(block));
        rows_by_rows::<CHUNKS, 4>(&mut ds, v_tile, 16 * warp(), o_tile(block));
        for n in 0..4 {
            for i in 0..4 {
                let column = column_of(n, i);
                let seen = of.sees(query + column, rows.first + row_of(i));
                let l = ld_f32(lse_row(block) + 4 * column);
                p[n][i] = if seen { of.probability(p[n][i], l) } else { 0.0 };
                ds[n][i] = p[n][i] * (ds[n][i] - ld_f32(delta_row(block) + 4 * column));
            }
        }
        registers_by_tile::<CHUNKS, 4, N>(&mut dv_acc, &p, o_tile(block));
        registers_by_tile::<CHUNKS, 4, N>(&mut dk_acc, &ds, q_tile(block));
        (block, member, query) = (block + 1, next.0, next.1);
    }
    of.key_head(dk, kv_head).store_rows(rows, &dk_acc, [of.scale; 2]);
    of.key_head(dv, kv_head).store_rows(rows, &dv_acc, [1.0; 2]);
}

/// delta = Σ d_o ∘ o over a head's columns. Grid: [rows / 8], 256 threads.
#[inline(always)]
pub unsafe fn attention_delta(p: AttentionDeltaParams) {
    let row = block_x() * (THREADS / WARP) + warp();
    if row >= p.rows {
        return;
    }
    let at = row as usize * p.d as usize;
    let (mut sum, mut i) = (0.0, lane());
    while 2 * i < p.d {
        let two = |from: *const u16| unpack2(load(from.add(at).cast::<u32>().add(i as usize)));
        let ([d0, d1], [o0, o1]) = (two(p.d_o), two(p.o));
        sum = fma(d1, o1, fma(d0, o0, sum));
        i += WARP;
    }
    let sum = over_warp::<Sum>(sum);
    if lane() == 0 {
        store(p.delta.add(row as usize), sum);
    }
}

/// Two kernels for each padded width.
macro_rules! widths {
    ($($dq:ident, $dkv:ident: $chunks:literal;)*) => {$(
        /// dq. Grid: [tiles, n_heads], 128 threads.
        #[inline(always)]
        pub unsafe fn $dq(p: AttentionDqParams) {
            let AttentionDqParams { dq, d_o, lse, delta, q, k, v, tiles, window, n_heads, kv_heads, d, scale } = p;
            let of = Attention { q, k, v, tiles, window, n_heads, kv_heads, d, scale };
            dq_block::<$chunks, $chunks>(dq, of, Saved { d_o, lse, delta })
        }

        /// dk and dv. Grid: [tiles, kv_heads], 128 threads.
        #[inline(always)]
        pub unsafe fn $dkv(p: AttentionDkvParams) {
            let AttentionDkvParams { dk, dv, d_o, lse, delta, q, k, v, tiles, window, n_heads, kv_heads, d, scale } = p;
            let of = Attention { q, k, v, tiles, window, n_heads, kv_heads, d, scale };
            dkv_block::<$chunks, $chunks>(dk, dv, of, Saved { d_o, lse, delta })
        }
    )*};
}

widths! {
    attention_dq_64, attention_dkv_64: 8;
    attention_dq_128, attention_dkv_128: 16;
}
