//! Causal attention over packed segments, after an optional prefix: o = softmax(q kᵀ / √d) v by blocks of keys with a
//! running softmax (Dao et al., arXiv 2205.14135).
//!
//! A block of four warps has 128 queries of one head, a warp 32 of them: two products for each fragment of keys or values
//! that it reads. Operands and results are bf16; scores, probabilities and sums stay in registers in f32. While a block
//! of keys is multiplied, the next one is being copied.
//!
//! A query sees `window` keys: its own and those just before it, into the prefix. Blocks of keys that no query of a block
//! sees are not read, and those that all queries of a warp see are not masked.

use crate::attention_tiles::{Attention, Block, Head, WARP_ROWS, hide, loaded, row_of};
use crate::kernels::attention::AttentionParams;
use crate::math;
use crate::prelude::*;
use crate::sizes::{ATTENTION_KEYS, ATTENTION_QUERIES};
use crate::tile::{Left, M, registers_by_tile, rows_by_rows};
use core::f32::consts::{LN_2, LOG2_E};

/// Rows' sums are of p = 2^(s · factor − base), where p may be as large as 2^8. So they are seldom scaled again.
const HEADROOM: f32 = 8.0;

/// The running softmax of a thread's rows.
struct RunningSoftmax {
    /// From scores to exponents of 2.
    factor: f32,
    base: [[f32; 2]; M],
    sum: [[f32; 2]; M],
}

impl RunningSoftmax {
    /// Before the first score. Its base is the lowest number, not −∞, from which a hidden score has no difference.
    #[inline(always)]
    fn new(factor: f32) -> Self {
        Self { factor, base: [[f32::MIN; 2]; M], sum: [[0.0; 2]; M] }
    }

    /// Raises bases, and scales sums, as scores ask for.
    #[inline(always)]
    fn raise<const N: usize>(&mut self, s: &[[[f32; 4]; 8]; M], acc: &mut [[[f32; 4]; N]; M]) {
        let (mut top, mut exceeded) = ([[f32::NEG_INFINITY; 2]; M], false);
        for m in 0..M {
            for n in 0..8 {
                for i in 0..4 {
                    top[m][i / 2] = top[m][i / 2].max(s[m][n][i]);
                }
            }
            for half in 0..2 {
                top[m][half] = over_quad::<Max>(top[m][half]) * self.factor;
                exceeded |= top[m][half] > self.base[m][half] + HEADROOM;
            }
        }
        if exceeded {
            for m in 0..M {
                let mut shrink = [0f32; 2];
                for half in 0..2 {
                    let base = self.base[m][half].max(top[m][half]);
                    shrink[half] = exp2(self.base[m][half] - base);
                    self.sum[m][half] *= shrink[half];
                    self.base[m][half] = base;
                }
                for n in 0..N {
                    for i in 0..4 {
                        acc[m][n][i] *= shrink[i / 2];
                    }
                }
            }
        }
    }

    /// Turns scores into unnormalised probabilities, packed as a left operand.
    #[inline(always)]
    fn probabilities(&mut self, s: &[[[f32; 4]; 8]; M]) -> [[[u32; 4]; 4]; M] {
        let mut left = [[[0; 4]; 4]; M];
        for n in 0..8 {
            for m in 0..M {
                for half in 0..2 {
                    let p = [2 * half, 2 * half + 1].map(
                        #[inline(always)]
                        |i| exp2(fma(s[m][n][i], self.factor, -self.base[m][half])),
                    );
                    self.sum[m][half] += p[0] + p[1];
                    left[m][n / 2][n % 2 * 2 + half] = pack_bf16(p[0], p[1]);
                }
            }
        }
        left
    }
}

/// The shared memory of the forward pass.
struct Tiles<const CHUNKS: u32>;

impl<const CHUNKS: u32> Tiles<CHUNKS> {
    const BYTES: u32 = ATTENTION_KEYS * CHUNKS * 16;

    #[inline(always)]
    fn q() -> u32 {
        shared()
    }

    #[inline(always)]
    fn k(block: u32) -> u32 {
        shared() + ATTENTION_QUERIES * CHUNKS * 16 + block % 2 * 2 * Self::BYTES
    }

    #[inline(always)]
    fn v(block: u32) -> u32 {
        Self::k(block) + Self::BYTES
    }

    #[inline(always)]
    fn block() -> u32 {
        shared() + (ATTENTION_QUERIES + 4 * ATTENTION_KEYS) * CHUNKS * 16
    }
}

/// Blocks of keys: the prefix's, then the segment's own.
#[derive(Clone, Copy)]
struct Keys {
    /// Keys of the prefix.
    prefix: u32,
    /// The prefix's blocks.
    prefix_blocks: u32,
}

impl Keys {
    #[inline(always)]
    fn new(prefix: u32) -> Self {
        Self { prefix, prefix_blocks: prefix.div_ceil(ATTENTION_KEYS) }
    }

    /// The block of the first key that a query of the segment sees.
    #[inline(always)]
    fn first_block(self, of: Attention, query: u32) -> u32 {
        let key = of.first_seen(self.prefix + query);
        if key < self.prefix { key / ATTENTION_KEYS } else { self.prefix_blocks + (key - self.prefix) / ATTENTION_KEYS }
    }

    /// The block after the one with the segment's key `limit - 1`.
    #[inline(always)]
    fn end(self, limit: u32) -> u32 {
        self.prefix_blocks + limit.div_ceil(ATTENTION_KEYS)
    }

    /// Whether a block is one of the prefix's, and its first key.
    #[inline(always)]
    fn place(self, block: u32) -> (bool, u32) {
        let in_prefix = block < self.prefix_blocks;
        (in_prefix, (if in_prefix { block } else { block - self.prefix_blocks }) * ATTENTION_KEYS)
    }
}

/// Starts copying a block of keys and values, if there is one.
#[inline(always)]
unsafe fn fetch<const CHUNKS: u32>(p: &AttentionParams, of: Attention, keys: Keys, queries: &Block, block: u32) {
    let limit = queries.first + queries.count;
    if block < keys.end(limit) {
        let (in_prefix, key) = keys.place(block);
        let (k, v, start, limit) =
            if in_prefix { (p.prefix_k, p.prefix_v, 0, keys.prefix) } else { (of.k, of.v, queries.start, limit) };
        let (row, count) = (start + key, (limit - key).min(ATTENTION_KEYS));
        let head = queries.kv_head;
        of.key_head(k, head).load_tile::<CHUNKS, ATTENTION_KEYS>(Tiles::<CHUNKS>::k(block), row, count);
        of.key_head(v, head).load_tile::<CHUNKS, ATTENTION_KEYS>(Tiles::<CHUNKS>::v(block), row, count);
    }
    copy_commit();
}

#[inline(always)]
unsafe fn attention<const CHUNKS: u32, const N: usize>(p: AttentionParams) {
    let AttentionParams { q, k, v, tiles, window, n_heads, kv_heads, d, scale, .. } = p;
    let of = Attention { q, k, v, tiles, window, n_heads, kv_heads, d, scale };
    let (rows, head) = of.queries();
    let (row, count) = (rows.start + rows.first, rows.count(ATTENTION_QUERIES));
    let place = Block { start: rows.start, first: rows.first, count, kv_head: head / of.group() };
    let keys = Keys::new(p.prefix);
    of.query_head(q, head).load_tile::<CHUNKS, ATTENTION_QUERIES>(Tiles::<CHUNKS>::q(), row, count);
    let mut block = keys.first_block(of, rows.first);
    fetch::<CHUNKS>(&p, of, keys, &place, block);
    place.save(Tiles::<CHUNKS>::block());
    let mut acc = [[[0f32; 4]; N]; M];
    let mut softmax = RunningSoftmax::new(scale * LOG2_E);
    loop {
        loaded();
        let place = Block::saved(Tiles::<CHUNKS>::block());
        let keys = Keys::new(opaque(p.prefix));
        if block >= keys.end(place.first + place.count) {
            break;
        }
        fetch::<CHUNKS>(&p, of, keys, &place, block + 1);
        // The warp's first query, counted as the keys are, and the number of keys.
        let (in_prefix, key) = keys.place(block);
        let (query, end) = if in_prefix { (keys.prefix, keys.prefix) } else { (0, u32::MAX) };
        let first = WARP_ROWS * (opaque(thread()) / WARP);
        let query = query + place.first + first;
        let (queries, seen) = ([query, WARP_ROWS], [key, ATTENTION_KEYS]);
        if first < place.count && of.any(queries, seen) {
            let mut s = [[[0f32; 4]; 8]; M];
            rows_by_rows::<CHUNKS, 0, 8>(
                &mut s,
                &[],
                Left::new(Tiles::<CHUNKS>::q() + first * CHUNKS * 16),
                Tiles::<CHUNKS>::k(block),
            );
            // Rows that don't exist may see zeros.
            if !of.all(queries, seen) || end - key < ATTENTION_KEYS {
                hide(
                    &mut s,
                    #[inline(always)]
                    |row, column| of.sees(query + row, key + column) && key + column < end,
                );
            }
            softmax.raise(&s, &mut acc);
            let left = softmax.probabilities(&s);
            registers_by_tile::<CHUNKS, 4, N>(&mut acc, &left, Tiles::<CHUNKS>::v(block));
        }
        block += 1;
    }
    let (rows, head) = of.queries();
    let (first, row, count) = (WARP_ROWS * warp(), rows.start + rows.first, rows.count(ATTENTION_QUERIES));
    let mut factors = [[0f32; 2]; M];
    for m in 0..M {
        for half in 0..2 {
            let log = math::ln(over_quad::<Sum>(softmax.sum[m][half]));
            // 1 / sum; a division has slow paths that take registers.
            factors[m][half] = exp2(-log * LOG2_E);
            let r = first + row_of(lane(), m, 2 * half);
            if r < count && lane().is_multiple_of(4) {
                let at = (row + r) as usize * n_heads as usize + head as usize;
                store(p.lse.add(at), softmax.base[m][half] * LN_2 + log);
            }
        }
    }
    Head::in_rows(p.o, head, p.o_pitch, p.d).store_rows(row, [first, count], &acc, factors);
}

/// A kernel for each padded width.
macro_rules! widths {
    ($($name:ident: $chunks:literal;)*) => {$(
        /// o and lse; see the module's heading. Grid: tiles · n_heads, 128 threads.
        #[inline(always)]
        pub unsafe fn $name(p: AttentionParams) {
            attention::<$chunks, $chunks>(p)
        }
    )*};
}

widths! {
    attention_64: 8;
    attention_128: 16;
}
