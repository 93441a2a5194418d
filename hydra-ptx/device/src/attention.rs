//! Causal attention over packed segments, after an optional prefix: o = softmax(q kᵀ / √d) v by blocks of keys with a
//! running softmax (Dao et al., arXiv 2205.14135), and the pieces that its gradient shares.
//!
//! A block of four warps has 64 queries of one head, a warp 16 of them. Operands and results are bf16; scores,
//! probabilities and sums stay in registers in f32. Heads have an even number of columns and are padded with zeros to
//! 64 or 128 in shared memory. While a block of keys is multiplied, the next one is being copied.
//!
//! A query sees `window` keys: its own and those just before it, into the prefix. Blocks of keys that no query of a block
//! sees are not read.
//!
//! `tiles` [n, 3] lists the blocks of 64 rows: the segment's first row, the block's first row in the segment, the
//! segment's length.

use crate::kernels::attention::AttentionParams;
use crate::math;
use crate::prelude::*;
use crate::sizes::ATTENTION_TILE;
use crate::tile::{at, registers_by_tile, rows_by_rows};

/// A segment and a block of its rows.
#[derive(Clone, Copy)]
pub struct Rows {
    /// The segment's first row.
    pub start: u32,
    /// The block's first row, counted from there.
    pub first: u32,
    /// The segment's length.
    pub len: u32,
}

impl Rows {
    /// Entry `i` of `tiles`.
    #[inline(always)]
    pub unsafe fn of(tiles: *const u32, i: u32) -> Self {
        let at = tiles.add(3 * i as usize);
        Self { start: load(at), first: load(at.add(1)), len: load(at.add(2)) }
    }

    /// Rows of the block.
    #[inline(always)]
    pub fn count(self) -> u32 {
        (self.len - self.first).min(ATTENTION_TILE)
    }
}

/// What every kernel of an attention reads: rotated q [tokens, n_heads d], k and v [tokens, kv_heads d], and its sizes.
#[derive(Clone, Copy)]
pub struct Attention {
    /// Queries.
    pub q: *const u16,
    /// Keys.
    pub k: *const u16,
    /// Values.
    pub v: *const u16,
    /// See the module's heading.
    pub tiles: *const u32,
    /// Keys that a query sees, less than 2³¹.
    pub window: u32,
    /// Query heads.
    pub n_heads: u32,
    /// Key heads.
    pub kv_heads: u32,
    /// Columns of a head.
    pub d: u32,
    /// 1/√d.
    pub scale: f32,
}

impl Attention {
    /// The rows of this block.
    #[inline(always)]
    pub unsafe fn rows(self) -> Rows {
        Rows::of(self.tiles, block_x())
    }

    /// The first key that a query sees, both counted from the same place.
    #[inline(always)]
    pub fn first_seen(self, query: u32) -> u32 {
        (query + 1).saturating_sub(self.window)
    }

    /// Whether a query sees a key, both counted from the same place: a key behind the query is 2³² minus something away.
    #[inline(always)]
    pub fn sees(self, query: u32, key: u32) -> bool {
        query.wrapping_sub(key) < self.window
    }

    /// Query heads that share a key head.
    #[inline(always)]
    pub unsafe fn group(self) -> u32 {
        assume(self.kv_heads > 0);
        let group = self.n_heads / self.kv_heads;
        assume(group > 0);
        group
    }

    /// A query head's columns of a matrix like q.
    #[inline(always)]
    pub unsafe fn query_head(self, at: *const u16, head: u32) -> Head {
        Head::new(at, head, self.n_heads, self.d)
    }

    /// A key head's columns of a matrix like k.
    #[inline(always)]
    pub unsafe fn key_head(self, at: *const u16, head: u32) -> Head {
        Head::new(at, head, self.kv_heads, self.d)
    }
}

/// A head's columns of a [rows, pitch] matrix.
#[derive(Clone, Copy)]
pub struct Head {
    /// Row 0's first column.
    pub at: *const u16,
    /// From a row to the next.
    pub pitch: u32,
    /// Columns.
    pub d: u32,
}

impl Head {
    /// Head `head` of `heads`.
    #[inline(always)]
    pub unsafe fn new(at: *const u16, head: u32, heads: u32, d: u32) -> Self {
        Self { at: at.add((head * d) as usize), pitch: heads * d, d }
    }

    /// Starts copying `rows` rows from `row` on, of which `count` exist; the others, and columns from d on, become
    /// zero. The copies have arrived after [`loaded`].
    #[inline(always)]
    #[track_caller]
    pub unsafe fn load_tile<const CHUNKS: u32>(self, to: u32, rows: u32, row: u32, count: u32) {
        let mut i = thread();
        while i < rows * CHUNKS {
            let (r, chunk) = (i / CHUNKS, i % CHUNKS);
            let from = self.at.add((row + r) as usize * self.pitch as usize + 8 * chunk as usize);
            let (to, inside) = (at::<CHUNKS>(to, r, chunk), r < count && 8 * chunk < self.d);
            if self.d.is_multiple_of(8) {
                copy_async(to, if inside { from.cast() } else { self.at.cast() }, inside);
            } else {
                let mut words = [0; 4];
                for two in 0..4 {
                    if inside && 8 * chunk + 2 * two < self.d {
                        words[two as usize] = load(from.cast::<u32>().add(two as usize));
                    }
                }
                st_u4(to, words);
            }
            i += threads();
        }
    }

    /// Writes the rows of a result that exist, times a factor for each half of a warp's rows.
    #[inline(always)]
    pub unsafe fn store_rows<const N: usize>(self, rows: Rows, values: &[[f32; 4]; N], factors: [f32; 2]) {
        for n in 0..N {
            for half in 0..2 {
                let (row, column) = (row_of(2 * half), column_of(n, 0));
                if row < rows.count() && column < self.d {
                    let row = (rows.start + rows.first + row) as usize;
                    let at = self.at.add(row * self.pitch as usize + column as usize);
                    let [left, right] = [values[n][2 * half], values[n][2 * half + 1]];
                    store(at.cast_mut().cast::<u32>(), pack_bf16(left * factors[half], right * factors[half]));
                }
            }
        }
    }
}

/// Waits until the whole block's copies have arrived, and all its threads are done with the tiles before.
#[inline(always)]
#[track_caller]
pub unsafe fn loaded() {
    copy_wait::<0>();
    barrier();
}

/// The row, in the block, of element `i` of a matrix instruction's result; a warp's rows begin at 16 · warp.
#[inline(always)]
pub fn row_of(i: usize) -> u32 {
    16 * warp() + lane() / 4 + i as u32 / 2 * 8
}

/// The column of element `i` of a result's `n`-th group of eight columns.
#[inline(always)]
pub fn column_of(n: usize, i: usize) -> u32 {
    8 * n as u32 + lane() % 4 * 2 + i as u32 % 2
}

/// The running softmax of a thread's two rows, to base 2: p = 2^((s − max) · factor).
struct RunningSoftmax {
    factor: f32,
    max: [f32; 2],
    sum: [f32; 2],
}

impl RunningSoftmax {
    /// Turns a block of scores, of keys from `key` on, into unnormalised probabilities; each row sees keys from `first`
    /// up to `end`. Returns the factors of what was summed before.
    #[inline(always)]
    fn add(&mut self, s: &mut [[f32; 4]; 8], key: u32, [first, end]: &[[u32; 2]; 2]) -> [f32; 2] {
        let mut max = self.max;
        for n in 0..8 {
            for i in 0..4 {
                let key = key + column_of(n, i);
                if key < first[i / 2] || key >= end[i / 2] {
                    s[n][i] = f32::NEG_INFINITY;
                }
                max[i / 2] = max[i / 2].max(s[n][i]);
            }
        }
        let (mut shrink, mut base) = ([0f32; 2], [0f32; 2]);
        for r in 0..2 {
            max[r] = over_quad::<Max>(max[r]);
            // A row whose window begins in a later block has seen no key: its probabilities and sums are 2^(−∞) = 0.
            base[r] = if max[r] == f32::NEG_INFINITY { 0.0 } else { max[r] };
            shrink[r] = exp2((self.max[r] - base[r]) * self.factor);
            self.sum[r] *= shrink[r];
        }
        self.max = max;
        for n in 0..8 {
            for i in 0..4 {
                s[n][i] = exp2((s[n][i] - base[i / 2]) * self.factor);
                self.sum[i / 2] += s[n][i];
            }
        }
        shrink
    }
}

#[inline(always)]
unsafe fn attention<const CHUNKS: u32, const N: usize>(p: AttentionParams) {
    let AttentionParams { q, k, v, tiles, window, n_heads, kv_heads, d, scale, .. } = p;
    let of = Attention { q, k, v, tiles, window, n_heads, kv_heads, d, scale };
    let (rows, head) = (of.rows(), block_y());
    let kv_head = head / of.group();
    let bytes = ATTENTION_TILE * CHUNKS * 16;
    let q_tile = shared();
    let k_tile = |block: u32| q_tile + bytes + block % 2 * 2 * bytes;
    let v_tile = |block: u32| k_tile(block) + bytes;
    // Blocks of keys: the prefix's, then the segment's own.
    let limit = rows.first + rows.count();
    let prefix_blocks = p.prefix.div_ceil(ATTENTION_TILE);
    let blocks = prefix_blocks + limit.div_ceil(ATTENTION_TILE);
    // The first one that the block's first query sees, which looks back the farthest.
    let first_key = of.first_seen(p.prefix + rows.first);
    let first_block = if first_key < p.prefix {
        first_key / ATTENTION_TILE
    } else {
        prefix_blocks + (first_key - p.prefix) / ATTENTION_TILE
    };
    let key_of = |block: u32| (if block < prefix_blocks { block } else { block - prefix_blocks }) * ATTENTION_TILE;
    let fetch = |block: u32| {
        if block < blocks {
            let in_prefix = block < prefix_blocks;
            let (k, v, start, limit) =
                if in_prefix { (p.prefix_k, p.prefix_v, 0, p.prefix) } else { (k, v, rows.start, limit) };
            let key = key_of(block);
            let (row, count) = (start + key, (limit - key).min(ATTENTION_TILE));
            of.key_head(k, kv_head).load_tile::<CHUNKS>(k_tile(block), ATTENTION_TILE, row, count);
            of.key_head(v, kv_head).load_tile::<CHUNKS>(v_tile(block), ATTENTION_TILE, row, count);
        }
        copy_commit();
    };
    of.query_head(q, head).load_tile::<CHUNKS>(q_tile, ATTENTION_TILE, rows.start + rows.first, rows.count());
    fetch(first_block);
    let factor = scale * core::f32::consts::LOG2_E;
    let mut acc = [[0f32; 4]; N];
    let mut softmax = RunningSoftmax { factor, max: [f32::NEG_INFINITY; 2], sum: [0.0; 2] };
    let mut block = first_block;
    while block < blocks {
        loaded();
        fetch(block + 1);
        let key = key_of(block);
        let in_prefix = block < prefix_blocks;
        let first = [0, 2].map(
            #[inline(always)]
            |i| {
                let first = of.first_seen(p.prefix + rows.first + row_of(i));
                if in_prefix { first } else { first.saturating_sub(p.prefix) }
            },
        );
        // Rows that don't exist may see zeros.
        let end = [0, 2].map(
            #[inline(always)]
            |i| if in_prefix { p.prefix } else { rows.first + row_of(i) + 1 },
        );
        let mut s = [[0f32; 4]; 8];
        rows_by_rows::<CHUNKS, 8>(&mut s, q_tile, 16 * warp(), k_tile(block));
        let shrink = softmax.add(&mut s, key, &[first, end]);
        for n in 0..N {
            for i in 0..4 {
                acc[n][i] *= shrink[i / 2];
            }
        }
        registers_by_tile::<CHUNKS, 8, N>(&mut acc, &s, v_tile(block));
        block += 1;
    }
    let sum = [over_quad::<Sum>(softmax.sum[0]), over_quad::<Sum>(softmax.sum[1])];
    of.query_head(p.o, head).store_rows(rows, &acc, [1.0 / sum[0], 1.0 / sum[1]]);
    for r in 0..2 {
        let row = row_of(2 * r);
        if row < rows.count() && lane().is_multiple_of(4) {
            let at = (rows.start + rows.first + row) as usize * n_heads as usize + head as usize;
            store(p.lse.add(at), softmax.max[r] * scale + math::ln(sum[r]));
        }
    }
}

/// A kernel for each padded width.
macro_rules! widths {
    ($($name:ident: $chunks:literal;)*) => {$(
        /// o and lse; see the module's heading. Grid: [tiles, n_heads], 128 threads.
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
