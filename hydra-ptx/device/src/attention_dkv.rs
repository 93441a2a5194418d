//! The gradients of attention's keys and values: see `attention_backward.rs`.
//!
//! A warp's registers hold dk or dv of 32 keys, not both. So two warps share 32 keys: the first computes p and dv, the
//! second, a block of queries behind it, dp, ds and dk. It gets p through shared memory.

use crate::attention_backward::Saved;
use crate::attention_tiles::{Attention, Head, Rows, WARP_ROWS, column_of, hide, loaded};
use crate::kernels::attention::AttentionDkvParams;
use crate::prelude::*;
use crate::sizes::{DKV_KEYS, DKV_QUERIES};
use crate::tile::{Left, M, packed, registers_by_tile, rows_by_rows};
use core::f32::consts::LOG2_E;

/// This warp's pair of dk and dv, and 1 if it computes dk. Computed again in each step: registers are scarce.
#[inline(always)]
fn place() -> [u32; 2] {
    let warp = opaque(thread()) / WARP;
    [warp % 2, warp / 2]
}

/// A block of keys for dk and dv, and the queries that see them, in steps.
#[derive(Clone, Copy)]
struct Dkv<const CHUNKS: u32> {
    of: Attention,
    saved: Saved,
    kv_head: u32,
    rows: Rows,
    /// The first query of the segment that sees no key.
    limit: u32,
    /// Query heads that share the key head.
    group: u32,
    steps: u32,
}

impl Attention {
    /// The keys and the key head of this block, each time read again. There may be none.
    #[inline(always)]
    unsafe fn keys(self, tile_count: u32) -> (Rows, u32) {
        assume(self.kv_heads > 0);
        let block = opaque(block_x());
        // The other way round: the first keys are seen by most queries. A block has half of a tile's rows.
        let half = block / self.kv_heads;
        let mut rows = Rows::of(self.tiles, tile_count - 1 - half / 2);
        rows.first += half % 2 * DKV_KEYS;
        (rows, block % self.kv_heads)
    }
}

/// A block of queries of one of the heads that share a key head.
#[derive(Clone, Copy)]
struct Step {
    /// The head, among those.
    member: u32,
    /// The first query.
    query: u32,
}

impl<const CHUNKS: u32> Dkv<CHUNKS> {
    const KEYS: u32 = DKV_KEYS * CHUNKS * 16;
    const QUERIES: u32 = DKV_QUERIES * CHUNKS * 16;
    const STEP: u32 = 2 * Self::QUERIES + 2 * DKV_QUERIES * 4;

    /// Blocks of queries from the first key on to the last query that sees the last key, one head after the other.
    #[inline(always)]
    unsafe fn new(of: Attention, saved: Saved, kv_head: u32, rows: Rows) -> Self {
        let limit = (rows.first + rows.count(DKV_KEYS) - 1).saturating_add(of.window).min(rows.len);
        let group = of.group();
        let steps = group * (limit - rows.first).div_ceil(DKV_QUERIES);
        Self { of, saved, kv_head, rows, limit, group, steps }
    }

    /// Between steps, numbers are in shared memory: registers are scarce.
    #[inline(always)]
    #[track_caller]
    unsafe fn save(self) {
        let Self { rows: Rows { start, first, len }, kv_head, limit, group, steps, .. } = self;
        if thread() == 0 {
            st_u4(Self::numbers(), [start, first, len, kv_head]);
            st_u4(Self::numbers() + 16, [limit, group, steps, 0]);
        }
    }

    #[inline(always)]
    #[track_caller]
    unsafe fn again(of: Attention, saved: Saved) -> Self {
        let [start, first, len, kv_head] = ld_u4(Self::numbers());
        let [limit, group, steps, _] = ld_u4(Self::numbers() + 16);
        Self { of, saved, kv_head, rows: Rows { start, first, len }, limit, group, steps }
    }

    #[inline(always)]
    fn numbers() -> u32 {
        shared() + 2 * Self::KEYS + 3 * Self::STEP + 2 * DKV_KEYS * DKV_QUERIES * 4
    }

    #[inline(always)]
    fn after(self, step: Step) -> Step {
        let query = step.query + DKV_QUERIES;
        if query < self.limit {
            Step { query, ..step }
        } else {
            Step { member: step.member + 1, query: self.rows.first }
        }
    }

    /// The tile of k, or v.
    #[inline(always)]
    fn keys(v: bool) -> u32 {
        shared() + if v { Self::KEYS } else { 0 }
    }

    /// This warp's rows of k, or v.
    #[inline(always)]
    fn left() -> Left<CHUNKS> {
        let [pair, late] = place();
        Left::new(Self::keys(late == 1) + WARP_ROWS * pair * CHUNKS * 16)
    }

    /// A step's tile of q, or d o.
    #[inline(always)]
    fn queries(step: u32, d_o: bool) -> u32 {
        shared() + 2 * Self::KEYS + step % 3 * Self::STEP + if d_o { Self::QUERIES } else { 0 }
    }

    /// A step's lse, then delta.
    #[inline(always)]
    fn saved(step: u32) -> u32 {
        Self::queries(step, false) + 2 * Self::QUERIES
    }

    /// This thread's four values of p, for a step and a pair of warps, of group `n` of fragment `m`.
    #[inline(always)]
    fn p(step: u32, pair: u32, m: usize, n: usize) -> u32 {
        let base = shared() + 2 * Self::KEYS + 3 * Self::STEP + step % 2 * DKV_KEYS * DKV_QUERIES * 4;
        base + (((2 * pair + m as u32) * 4 + n as u32) * WARP + opaque(lane())) * 16
    }

    /// Starts a step's copies, if there is one. Two warps hold what this returns, lse or delta of a query, until
    /// [`Self::keep`].
    #[inline(always)]
    #[track_caller]
    unsafe fn fetch(self, number: u32, Step { member, query }: Step) -> f32 {
        let Self { of, saved, kv_head, rows, .. } = self;
        let mut value = 0.0;
        if number < self.steps {
            let head = kv_head * self.group + member;
            let (row, count) = (rows.start + query, (rows.len - query).min(DKV_QUERIES));
            let (q, d_o) = (of.query_head(of.q, head), of.query_head(saved.d_o, head));
            q.load_tile::<CHUNKS, DKV_QUERIES>(Self::queries(number, false), row, count);
            d_o.load_tile::<CHUNKS, DKV_QUERIES>(Self::queries(number, true), row, count);
            // Rows that don't exist have q, d o, lse and delta 0, and add nothing.
            if warp() < 2 && lane() < count {
                let from = if warp() == 0 { saved.lse } else { saved.delta };
                value = load(from.add((row + lane()) as usize * of.n_heads as usize + head as usize));
            }
        }
        copy_commit();
        value
    }

    #[inline(always)]
    #[track_caller]
    unsafe fn keep(number: u32, value: f32) {
        if warp() < 2 {
            st_f32(Self::saved(number) + 4 * thread(), value);
        }
    }
}

#[inline(always)]
unsafe fn dkv_block<const CHUNKS: u32, const N: usize, const KEPT: usize>(
    [dk, dv]: [(*mut u16, u32); 2],
    tile_count: u32,
    of: Attention,
    saved: Saved,
) {
    let (rows, kv_head) = of.keys(tile_count);
    if rows.first >= rows.len {
        return;
    }
    let dkv = Dkv::<CHUNKS>::new(of, saved, kv_head, rows);
    let (row, count) = (rows.start + rows.first, rows.count(DKV_KEYS));
    of.key_head(of.k, kv_head).load_tile::<CHUNKS, DKV_KEYS>(Dkv::<CHUNKS>::keys(false), row, count);
    of.key_head(of.v, kv_head).load_tile::<CHUNKS, DKV_KEYS>(Dkv::<CHUNKS>::keys(true), row, count);
    dkv.save();
    let (mut before, mut now) = (Step { member: 0, query: 0 }, Step { member: 0, query: rows.first });
    Dkv::<CHUNKS>::keep(0, dkv.fetch(0, now));
    loaded();
    let (left, mut kept) = (Dkv::<CHUNKS>::left(), [[[0; 4]; M]; KEPT]);
    for step in 0..KEPT {
        kept[step] = left.fragments(step as u32);
    }
    let mut acc = [[[0f32; 4]; N]; M];
    let mut number = 0;
    loop {
        loaded();
        let dkv = Dkv::<CHUNKS>::again(of, saved);
        if number > dkv.steps {
            break;
        }
        let next = dkv.after(now);
        let value = dkv.fetch(number + 1, next);
        let [pair, late] = place();
        let mine = number.wrapping_sub(late);
        let (query, key) = (if late == 1 { before.query } else { now.query }, dkv.rows.first + WARP_ROWS * pair);
        let (queries, keys) = ([query, DKV_QUERIES], [key, WARP_ROWS]);
        if mine < dkv.steps && of.any(queries, keys) {
            // Transposed: rows are keys, columns queries.
            let mut s = [[[0f32; 4]; 4]; M];
            let right = Dkv::<CHUNKS>::queries(mine, late == 1);
            rows_by_rows::<CHUNKS, KEPT, 4>(&mut s, &kept, Dkv::<CHUNKS>::left(), right);
            let saved = Dkv::<CHUNKS>::saved(mine);
            if late == 0 {
                if !of.all(queries, keys) {
                    hide(
                        &mut s,
                        #[inline(always)]
                        |row, column| of.sees(query + column, key + row),
                    );
                }
                let factor = of.scale * LOG2_E;
                for n in 0..4 {
                    let lse = ld_f2(saved + 4 * column_of(lane(), n, 0)).map(|lse| lse * LOG2_E);
                    for m in 0..M {
                        for i in 0..4 {
                            s[m][n][i] = exp2(fma(s[m][n][i], factor, -lse[i % 2]));
                        }
                        st_u4(Dkv::<CHUNKS>::p(mine, pair, m, n), s[m][n].map(f32::to_bits));
                    }
                }
            } else {
                for n in 0..4 {
                    let delta = ld_f2(saved + 4 * (DKV_QUERIES + column_of(lane(), n, 0)));
                    for m in 0..M {
                        let p = ld_u4(Dkv::<CHUNKS>::p(mine, pair, m, n)).map(f32::from_bits);
                        for i in 0..4 {
                            s[m][n][i] = p[i] * (s[m][n][i] - delta[i % 2]);
                        }
                    }
                }
            }
            registers_by_tile::<CHUNKS, 2, N>(&mut acc, &packed(&s), Dkv::<CHUNKS>::queries(mine, late == 0));
        }
        Dkv::<CHUNKS>::keep(number + 1, value);
        (before, now) = (now, next);
        number += 1;
    }
    let (rows, kv_head) = of.keys(tile_count);
    let [pair, late] = place();
    let (row, first, count) = (rows.start + rows.first, WARP_ROWS * pair, rows.count(DKV_KEYS));
    let ((to, pitch), scale) = if late == 1 { (dk, of.scale) } else { (dv, 1.0) };
    Head::in_rows(to, kv_head, pitch, of.d).store_rows(row, [first, count], &acc, [[scale; 2]; M]);
}

/// A kernel for each padded width. The last number: of how many columns / 16 of k and v registers keep fragments.
macro_rules! widths {
    ($($name:ident: $chunks:literal, $kept:literal;)*) => {$(
        /// dk and dv. Grid: 2 · tiles · kv_heads, 128 threads.
        #[inline(always)]
        pub unsafe fn $name(p: AttentionDkvParams) {
            let AttentionDkvParams { lse, delta, q, k, v, tiles, window, n_heads, kv_heads, d, scale, .. } = p;
            let of = Attention { q, k, v, tiles, window, n_heads, kv_heads, d, scale };
            let saved = Saved { d_o: p.d_o, lse, delta };
            let out = [(p.dk, p.dk_pitch), (p.dv, p.dv_pitch)];
            dkv_block::<$chunks, $chunks, $kept>(out, p.tile_count, of, saved)
        }
    )*};
}

widths! {
    attention_dkv_64: 8, 2;
    attention_dkv_128: 16, 6;
}
