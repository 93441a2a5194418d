//! The gradient of attention, with scores computed again from q, k and lse (Dao, arXiv 2307.08691).
//!
//! ```text
//! delta = Σ d o ∘ o      p = exp(s − lse)      dp = d o vᵀ      ds = p ∘ (dp − delta) / √d
//! dq = ds k              dk = dsᵀ q            dv = pᵀ d o
//! ```
//!
//! dq: a block has 64 queries of one head and goes over the keys. dk and dv: a block has 64 keys of one key head and goes over
//! the queries of all heads that share it. So each result has one writer, and no atomics are needed.

use crate::attention::{Attention, column_of, loaded, row_of};
use crate::prelude::*;
use crate::sizes::{ATTENTION_TILE, BACKWARD_QUERIES, THREADS};
use crate::tile::{registers_by_tile, rows_by_rows};
use core::f32::consts::LOG2_E;

/// What the backward pass reads beside q, k and v.
#[derive(Clone, Copy)]
struct Saved {
    /// [tokens, heads d].
    d_o: *const u16,
    /// [tokens, heads].
    lse: *const f32,
    /// [tokens, heads].
    delta: *const f32,
}

impl Saved {
    /// A query's lse, to base 2, and its delta.
    #[inline(always)]
    unsafe fn of_row(self, row: u32, head: u32, heads: u32) -> (f32, f32) {
        let at = row as usize * heads as usize + head as usize;
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
    let (k_tile, v_tile) = (shared() + 2 * bytes, shared() + 3 * bytes);
    let (first, count) = (rows.start + rows.first, rows.count());
    of.query_head(of.q, head).load_tile::<CHUNKS>(q_tile, ATTENTION_TILE, first, count);
    of.query_head(saved.d_o, head).load_tile::<CHUNKS>(o_tile, ATTENTION_TILE, first, count);
    let (k, v) = (of.key_head(of.k, kv_head), of.key_head(of.v, kv_head));
    // Rows that don't exist have probability 0.
    let (mut row_lse, mut row_delta) = ([f32::INFINITY; 2], [0f32; 2]);
    for r in 0..2 {
        let row = row_of(2 * r);
        if row < count {
            (row_lse[r], row_delta[r]) = saved.of_row(first + row, head, of.heads);
        }
    }
    let mut acc = [[0f32; 4]; N];
    let (limit, mut key) = (rows.first + count, 0);
    while key < limit {
        barrier();
        let there = (limit - key).min(ATTENTION_TILE);
        k.load_tile::<CHUNKS>(k_tile, ATTENTION_TILE, rows.start + key, there);
        v.load_tile::<CHUNKS>(v_tile, ATTENTION_TILE, rows.start + key, there);
        loaded();
        let (mut s, mut dp) = ([[0f32; 4]; 8], [[0f32; 4]; 8]);
        rows_by_rows::<CHUNKS, 8>(&mut s, q_tile, 16 * warp(), k_tile);
        rows_by_rows::<CHUNKS, 8>(&mut dp, o_tile, 16 * warp(), v_tile);
        for n in 0..8 {
            for i in 0..4 {
                let seen = key + column_of(n, i) <= rows.first + row_of(i);
                let p = if seen { of.probability(s[n][i], row_lse[i / 2]) } else { 0.0 };
                s[n][i] = p * (dp[n][i] - row_delta[i / 2]);
            }
        }
        registers_by_tile::<CHUNKS, 8, N>(&mut acc, &s, k_tile);
        key += ATTENTION_TILE;
    }
    of.query_head(dq, head).store_rows(rows, &acc, [of.scale; 2]);
}

#[inline(always)]
unsafe fn dkv_block<const CHUNKS: u32, const N: usize>(dk: *mut u16, dv: *mut u16, of: Attention, saved: Saved) {
    let (rows, kv_head) = (of.rows(), block_y());
    let (key_bytes, query_bytes) = (ATTENTION_TILE * CHUNKS * 16, BACKWARD_QUERIES * CHUNKS * 16);
    let (k_tile, v_tile) = (shared(), shared() + key_bytes);
    let (q_tile, o_tile) = (v_tile + key_bytes, v_tile + key_bytes + query_bytes);
    let (lse_row, delta_row) = (o_tile + query_bytes, o_tile + query_bytes + 4 * BACKWARD_QUERIES);
    let (first, count) = (rows.start + rows.first, rows.count());
    of.key_head(of.k, kv_head).load_tile::<CHUNKS>(k_tile, ATTENTION_TILE, first, count);
    of.key_head(of.v, kv_head).load_tile::<CHUNKS>(v_tile, ATTENTION_TILE, first, count);
    let (mut dk_acc, mut dv_acc) = ([[0f32; 4]; N], [[0f32; 4]; N]);
    let group = of.group();
    let mut member = 0;
    while member < group {
        let head = kv_head * group + member;
        let (q, d_o) = (of.query_head(of.q, head), of.query_head(saved.d_o, head));
        let mut query = rows.first;
        while query < rows.len {
            barrier();
            let there = (rows.len - query).min(BACKWARD_QUERIES);
            q.load_tile::<CHUNKS>(q_tile, BACKWARD_QUERIES, rows.start + query, there);
            d_o.load_tile::<CHUNKS>(o_tile, BACKWARD_QUERIES, rows.start + query, there);
            if thread() < BACKWARD_QUERIES {
                let (mut l, mut e) = (f32::INFINITY, 0.0);
                if thread() < there {
                    (l, e) = saved.of_row(rows.start + query + thread(), head, of.heads);
                }
                st_f32(lse_row + 4 * thread(), l);
                st_f32(delta_row + 4 * thread(), e);
            }
            loaded();
            // Transposed: rows are keys, columns queries.
            let (mut p, mut ds) = ([[0f32; 4]; 4], [[0f32; 4]; 4]);
            rows_by_rows::<CHUNKS, 4>(&mut p, k_tile, 16 * warp(), q_tile);
            rows_by_rows::<CHUNKS, 4>(&mut ds, v_tile, 16 * warp(), o_tile);
            for n in 0..4 {
                for i in 0..4 {
                    let column = column_of(n, i);
                    let seen = query + column >= rows.first + row_of(i);
                    let l = ld_f32(lse_row + 4 * column);
                    p[n][i] = if seen { of.probability(p[n][i], l) } else { 0.0 };
                    ds[n][i] = p[n][i] * (ds[n][i] - ld_f32(delta_row + 4 * column));
                }
            }
            registers_by_tile::<CHUNKS, 4, N>(&mut dv_acc, &p, o_tile);
            registers_by_tile::<CHUNKS, 4, N>(&mut dk_acc, &ds, q_tile);
            query += BACKWARD_QUERIES;
        }
        member += 1;
    }
    of.key_head(dk, kv_head).store_rows(rows, &dk_acc, [of.scale; 2]);
    of.key_head(dv, kv_head).store_rows(rows, &dv_acc, [1.0; 2]);
}

/// The kernels that don't depend on a width, and two for each width.
macro_rules! widths {
    ($($dq:ident, $dkv:ident: $chunks:literal;)*) => {
        kernels! {
            /// delta [tokens, heads] = Σ d o ∘ o over a head; `rows` is tokens · heads. Grid: [rows / 8], 256 threads.
            fn attention_delta(delta: *mut f32, d_o: *const u16, o: *const u16, rows: u32, d: u32) {
                let row = block_x() * (THREADS / WARP) + warp();
                if row >= rows {
                    return;
                }
                let at = row as usize * d as usize;
                let (mut sum, mut i) = (0.0, lane());
                while 2 * i < d {
                    let two = |from: *const u16| unpack2(load(from.add(at).cast::<u32>().add(i as usize)));
                    let ([d0, d1], [o0, o1]) = (two(d_o), two(o));
                    sum = fma(d1, o1, fma(d0, o0, sum));
                    i += WARP;
                }
                let sum = over_warp::<Sum>(sum);
                if lane() == 0 {
                    store(delta.add(row as usize), sum);
                }
            }
            $(
            /// dq [tokens, heads d]. Grid: [tiles, heads], 128 threads.
            fn $dq(
                dq: *mut u16,
                d_o: *const u16,
                lse: *const f32,
                delta: *const f32,
                q: *const u16,
                k: *const u16,
                v: *const u16,
                tiles: *const u32,
                heads: u32,
                kv_heads: u32,
                d: u32,
                scale: f32,
            ) {
                let of = Attention { q, k, v, tiles, heads, kv_heads, d, scale };
                dq_block::<$chunks, $chunks>(dq, of, Saved { d_o, lse, delta })
            }

            /// dk, dv [tokens, kv_heads d]. Grid: [tiles, kv_heads], 128 threads.
            fn $dkv(
                dk: *mut u16,
                dv: *mut u16,
                d_o: *const u16,
                lse: *const f32,
                delta: *const f32,
                q: *const u16,
                k: *const u16,
                v: *const u16,
                tiles: *const u32,
                heads: u32,
                kv_heads: u32,
                d: u32,
                scale: f32,
            ) {
                let of = Attention { q, k, v, tiles, heads, kv_heads, d, scale };
                dkv_block::<$chunks, $chunks>(dk, dv, of, Saved { d_o, lse, delta })
            }
            )*
        }
    };
}

widths! {
    attention_dq_64, attention_dkv_64: 8;
    attention_dq_128, attention_dkv_128: 16;
}
