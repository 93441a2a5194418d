//! The gradient of attention, with scores computed again from q, k and lse (Dao, arXiv 2307.08691).
//!
//! ```text
//! delta = Σ d o ∘ o      p = exp(s − lse)      dp = d o vᵀ      ds = p ∘ (dp − delta) / √d
//! dq = ds k              dk = dsᵀ q            dv = pᵀ d o
//! ```
//!
//! dq: a block has 128 queries of one head, a warp 32 of them, and loops over the keys. dk and dv, in `attention_dkv.rs`:
//! a block has 64 keys of one key head and loops over the queries of all heads that share it. So each result has one
//! writer, and no atomics are needed.

use crate::attention_tiles::{Attention, Block, Head, WARP_ROWS, hide, loaded, row_of};
use crate::kernels::attention::{AttentionDeltaParams, AttentionDqParams};
use crate::prelude::*;
use crate::sizes::{ATTENTION_QUERIES, DQ_KEYS, THREADS};
use crate::tile::{Left, M, packed, registers_by_tile, rows_by_rows};
use core::f32::consts::LOG2_E;

/// What the backward pass reads in addition to q, k and v.
#[derive(Clone, Copy)]
pub struct Saved {
    /// [tokens, n_heads d].
    pub d_o: *const u16,
    /// [tokens, n_heads].
    pub lse: *const f32,
    /// [tokens, n_heads].
    pub delta: *const f32,
}

/// The shared memory of dq: q, d o, k and v twice, the block's numbers.
struct DqTiles<const CHUNKS: u32>;

impl<const CHUNKS: u32> DqTiles<CHUNKS> {
    const QUERIES: u32 = ATTENTION_QUERIES * CHUNKS * 16;
    const KEYS: u32 = DQ_KEYS * CHUNKS * 16;

    /// The tile of q, or d o.
    #[inline(always)]
    fn queries(d_o: bool) -> u32 {
        shared() + if d_o { Self::QUERIES } else { 0 }
    }

    /// This warp's rows of it.
    #[inline(always)]
    fn left(d_o: bool) -> Left<CHUNKS> {
        Left::new(Self::queries(d_o) + WARP_ROWS * (opaque(thread()) / WARP) * CHUNKS * 16)
    }

    /// The tile of k, or v.
    #[inline(always)]
    fn keys(block: u32, v: bool) -> u32 {
        shared() + 2 * Self::QUERIES + block % 2 * 2 * Self::KEYS + if v { Self::KEYS } else { 0 }
    }

    #[inline(always)]
    fn block() -> u32 {
        shared() + 2 * Self::QUERIES + 4 * Self::KEYS
    }

    /// Starts copying a block of keys and values, if there is one.
    #[inline(always)]
    #[track_caller]
    unsafe fn fetch(of: Attention, queries: Block, block: u32) {
        let (key, limit) = (block * DQ_KEYS, queries.first + queries.count);
        if key < limit {
            let (row, count) = (queries.start + key, (limit - key).min(DQ_KEYS));
            let (k, v) = (of.key_head(of.k, queries.kv_head), of.key_head(of.v, queries.kv_head));
            k.load_tile::<CHUNKS, DQ_KEYS>(Self::keys(block, false), row, count);
            v.load_tile::<CHUNKS, DQ_KEYS>(Self::keys(block, true), row, count);
        }
        copy_commit();
    }
}

#[inline(always)]
unsafe fn dq_block<const CHUNKS: u32, const N: usize, const KEPT: usize>(
    (dq, pitch): (*mut u16, u32),
    of: Attention,
    saved: Saved,
) {
    let (rows, head) = of.queries();
    let (row, count) = (rows.start + rows.first, rows.count(ATTENTION_QUERIES));
    let (q, d_o) = (of.query_head(of.q, head), of.query_head(saved.d_o, head));
    q.load_tile::<CHUNKS, ATTENTION_QUERIES>(DqTiles::<CHUNKS>::queries(false), row, count);
    d_o.load_tile::<CHUNKS, ATTENTION_QUERIES>(DqTiles::<CHUNKS>::queries(true), row, count);
    let place = Block { start: rows.start, first: rows.first, count, kv_head: head / of.group() };
    let mut block = of.first_seen(rows.first) / DQ_KEYS;
    DqTiles::<CHUNKS>::fetch(of, place, block);
    place.save(DqTiles::<CHUNKS>::block());
    // Rows that don't exist have probability 0.
    let (mut lse, mut delta) = ([[f32::INFINITY; 2]; M], [[0f32; 2]; M]);
    for m in 0..M {
        for half in 0..2 {
            let r = WARP_ROWS * warp() + row_of(lane(), m, 2 * half);
            if r < count {
                let at = (row + r) as usize * of.n_heads as usize + head as usize;
                lse[m][half] = load(saved.lse.add(at)) * LOG2_E;
                delta[m][half] = load(saved.delta.add(at));
            }
        }
    }
    loaded();
    let (left, mut kept) = (DqTiles::<CHUNKS>::left(false), [[[0; 4]; M]; KEPT]);
    for step in 0..KEPT {
        kept[step] = left.fragments(step as u32);
    }
    let factor = of.scale * LOG2_E;
    let mut acc = [[[0f32; 4]; N]; M];
    loop {
        loaded();
        let place = Block::saved(DqTiles::<CHUNKS>::block());
        let key = block * DQ_KEYS;
        if key >= place.first + place.count {
            break;
        }
        DqTiles::<CHUNKS>::fetch(of, place, block + 1);
        let (k_tile, v_tile) = (DqTiles::<CHUNKS>::keys(block, false), DqTiles::<CHUNKS>::keys(block, true));
        let first = WARP_ROWS * (opaque(thread()) / WARP);
        let query = place.first + first;
        let (queries, keys) = ([query, WARP_ROWS], [key, DQ_KEYS]);
        if first < place.count && of.any(queries, keys) {
            let (mut s, mut dp) = ([[[0f32; 4]; 4]; M], [[[0f32; 4]; 4]; M]);
            rows_by_rows::<CHUNKS, KEPT, 4>(&mut s, &kept, DqTiles::<CHUNKS>::left(false), k_tile);
            rows_by_rows::<CHUNKS, 0, 4>(&mut dp, &[], DqTiles::<CHUNKS>::left(true), v_tile);
            if !of.all(queries, keys) {
                hide(
                    &mut s,
                    #[inline(always)]
                    |row, column| of.sees(query + row, key + column),
                );
            }
            for m in 0..M {
                for n in 0..4 {
                    for i in 0..4 {
                        let p = exp2(fma(s[m][n][i], factor, -lse[m][i / 2]));
                        s[m][n][i] = p * (dp[m][n][i] - delta[m][i / 2]);
                    }
                }
            }
            registers_by_tile::<CHUNKS, 2, N>(&mut acc, &packed(&s), k_tile);
        }
        block += 1;
    }
    let (rows, head) = of.queries();
    let (row, count) = (rows.start + rows.first, rows.count(ATTENTION_QUERIES));
    let place = [WARP_ROWS * warp(), count];
    Head::in_rows(dq, head, pitch, of.d).store_rows(row, place, &acc, [[of.scale; 2]; M]);
}

/// delta = Σ d_o ∘ o over a head's columns. Grid: [rows / 8], 256 threads.
#[inline(always)]
pub unsafe fn attention_delta(p: AttentionDeltaParams) {
    let row = block_x() * (THREADS / WARP) + warp();
    if row >= p.rows {
        return;
    }
    assume(p.n_heads > 0);
    let (token, head) = ((row / p.n_heads) as usize, row % p.n_heads);
    let at = row as usize * p.d as usize;
    let o_at = token * p.o_pitch as usize + (head * p.d) as usize;
    let (mut sum, mut i) = (0.0, lane());
    while 2 * i < p.d {
        let two = |from: *const u16, at: usize| unpack2(load(from.add(at).cast::<u32>().add(i as usize)));
        let ([d0, d1], [o0, o1]) = (two(p.d_o, at), two(p.o, o_at));
        sum = fma(d1, o1, fma(d0, o0, sum));
        i += WARP;
    }
    let sum = over_warp::<Sum>(sum);
    if lane() == 0 {
        store(p.delta.add(row as usize), sum);
    }
}

/// A kernel for each padded width. The last number: of how many columns / 16 of q registers keep fragments.
macro_rules! widths {
    ($($name:ident: $chunks:literal, $kept:literal;)*) => {$(
        /// dq. Grid: tiles · n_heads, 128 threads.
        #[inline(always)]
        pub unsafe fn $name(p: AttentionDqParams) {
            let AttentionDqParams { d_o, lse, delta, q, k, v, tiles, window, n_heads, kv_heads, d, scale, .. } = p;
            let of = Attention { q, k, v, tiles, window, n_heads, kv_heads, d, scale };
            dq_block::<$chunks, $chunks, $kept>((p.dq, p.dq_pitch), of, Saved { d_o, lse, delta })
        }
    )*};
}

widths! {
    attention_dq_64: 8, 0;
    attention_dq_128: 16, 3;
}
