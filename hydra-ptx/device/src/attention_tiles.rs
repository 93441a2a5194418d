//! What attention's forward and backward passes share: their inputs, tiles of them in shared memory, and the rows and
//! columns of a warp's products.
//!
//! `tiles` [n, 3] lists the blocks of 128 queries: the segment's first row, the block's first row in the segment, the
//! segment's length. Those with most keys come first, because blocks start in this order and the last ones should be
//! short. Heads have an even number of columns and are padded with zeros to 64 or 128 in shared memory.

use crate::prelude::*;
use crate::sizes::ATTENTION_THREADS;
use crate::tile::{M, at};

/// Rows of a warp.
pub const WARP_ROWS: u32 = 16 * M as u32;

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

    /// Rows of a block of at most `most`.
    #[inline(always)]
    pub fn count(self, most: u32) -> u32 {
        (self.len - self.first).min(most)
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
    /// The queries and the query head of this block, each time read again: registers are scarce in a loop.
    #[inline(always)]
    pub unsafe fn queries(self) -> (Rows, u32) {
        assume(self.n_heads > 0);
        let block = opaque(block_x());
        (Rows::of(self.tiles, block / self.n_heads), block % self.n_heads)
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

    /// Whether any of some queries sees any of some keys; these are the first and the number of both.
    #[inline(always)]
    pub fn any(self, [query, queries]: [u32; 2], [key, keys]: [u32; 2]) -> bool {
        key < query + queries && key + keys > self.first_seen(query)
    }

    /// Whether each of some queries sees each of some keys.
    #[inline(always)]
    pub fn all(self, [query, queries]: [u32; 2], [key, keys]: [u32; 2]) -> bool {
        key + keys <= query + 1 && key >= self.first_seen(query + queries - 1)
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

/// A block of queries and what it sees, as registers hold it for a short time only. Between, it is in shared memory.
#[derive(Clone, Copy)]
pub struct Block {
    /// The segment's first row.
    pub start: u32,
    /// The block's first row in the segment.
    pub first: u32,
    /// Rows of the block.
    pub count: u32,
    /// The key head.
    pub kv_head: u32,
}

impl Block {
    /// To be read after the next barrier.
    #[inline(always)]
    #[track_caller]
    pub unsafe fn save(self, to: u32) {
        if thread() == 0 {
            st_u4(to, [self.start, self.first, self.count, self.kv_head]);
        }
    }

    /// To be read after the next barrier.
    #[inline(always)]
    #[track_caller]
    pub unsafe fn saved(at: u32) -> Self {
        let [start, first, count, kv_head] = ld_u4(at);
        Self { start, first, count, kv_head }
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

    /// Head `head` of a matrix whose rows may have room behind them.
    #[inline(always)]
    pub unsafe fn in_rows(at: *const u16, head: u32, pitch: u32, d: u32) -> Self {
        Self { at: at.add((head * d) as usize), pitch, d }
    }

    /// Starts copying `ROWS` rows from `row` on, of which `count` exist; the others, and columns from d on, become
    /// zero. The copies have arrived after [`loaded`].
    #[inline(always)]
    #[track_caller]
    pub unsafe fn load_tile<const CHUNKS: u32, const ROWS: u32>(self, to: u32, row: u32, count: u32) {
        // The block copies so many rows at a time, a multiple of eight. So all of a thread's chunks are permuted alike.
        let pass = ATTENTION_THREADS / CHUNKS;
        let (thread, d) = (opaque(thread()), opaque(self.d));
        let (mut r, chunk) = (thread / CHUNKS, thread % CHUNKS);
        let to = at::<CHUNKS>(to, r, chunk);
        let mut from = self.at.add((row + r) as usize * self.pitch as usize + 8 * chunk as usize);
        let step = pass as usize * self.pitch as usize;
        if count >= ROWS && d == 8 * CHUNKS {
            for i in 0..ROWS / pass {
                copy_async(to + i * pass * CHUNKS * 16, from.cast(), true);
                from = from.wrapping_add(step);
            }
            return;
        }
        let mut to = to;
        while r < ROWS {
            let inside = r < count && 8 * chunk < d;
            if d.is_multiple_of(8) {
                copy_async(to, if inside { from.cast() } else { self.at.cast() }, inside);
            } else {
                let mut words = [0; 4];
                for two in 0..4 {
                    if inside && 8 * chunk + 2 * two < d {
                        words[two as usize] = load(from.cast::<u32>().add(two as usize));
                    }
                }
                st_u4(to, words);
            }
            from = from.wrapping_add(step);
            to += pass * CHUNKS * 16;
            // `pass`, in a way that keeps this loop from being unrolled.
            r += threads() / CHUNKS;
        }
    }

    /// Writes rows `first ..` of a result from `row` on, of which `count` exist; `factor` multiplies row `i` of fragment
    /// `m`, and the one eight below it.
    #[inline(always)]
    pub unsafe fn store_rows<const N: usize>(
        self,
        row: u32,
        [first, count]: [u32; 2],
        values: &[[[f32; 4]; N]; M],
        factors: [[f32; 2]; M],
    ) {
        for m in 0..M {
            for n in 0..N {
                for half in 0..2 {
                    let (r, column) = (first + row_of(lane(), m, 2 * half), column_of(lane(), n, 0));
                    if r < count && column < self.d {
                        let at = self.at.add((row + r) as usize * self.pitch as usize + column as usize);
                        let [left, right] = [values[m][n][2 * half], values[m][n][2 * half + 1]];
                        let both = pack_bf16(left * factors[m][half], right * factors[m][half]);
                        store(at.cast_mut().cast::<u32>(), both);
                    }
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

/// The row, among the warp's, of element `i` of a result's `m`-th fragment.
#[inline(always)]
pub fn row_of(lane: u32, m: usize, i: usize) -> u32 {
    16 * m as u32 + lane / 4 + i as u32 / 2 * 8
}

/// The column of element `i` of a result's `n`-th group of eight columns.
#[inline(always)]
pub fn column_of(lane: u32, n: usize, i: usize) -> u32 {
    8 * n as u32 + lane % 4 * 2 + i as u32 % 2
}

/// Makes scores −∞ where `seen`, of a row and a column of the warp's, is false.
#[inline(always)]
pub fn hide<const N: usize>(s: &mut [[[f32; 4]; N]; M], seen: impl Fn(u32, u32) -> bool) {
    let lane = opaque(lane());
    for m in 0..M {
        for n in 0..N {
            for i in 0..4 {
                if !seen(row_of(lane, m, i), column_of(lane, n, i)) {
                    s[m][n][i] = f32::NEG_INFINITY;
                }
            }
        }
    }
}
